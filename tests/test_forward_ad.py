"""Forward-mode AD is refused wherever a tangent comes in: there is no formula, and it would be dropped in silence."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import accumloss

ops = torch.ops.accumloss
B, T, V, H = 2, 3, 5, 4
LABELS = torch.tensor([[1, 2, -100], [0, 4, 3]])
REFUSED = r"expected no (forward-mode AD|torch\.func transform)"


def good_input(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(B, T, V, generator=generator).to(dtype)
    _, _, _, lse, _, _, nll = ops.cross_entropy(logits, LABELS)
    return {
        "logits": logits, "weight": torch.ones(V), "grad": torch.ones((), dtype=acc), "lse": lse, "nll": nll,
        "hidden": torch.randn(B, T, H, generator=generator).to(dtype), "head": torch.ones(V, H, dtype=dtype),
        "bias": torch.ones(V, dtype=dtype), "items": torch.tensor(4.0),
    }  # fmt: skip


class Config(SimpleNamespace):
    num_labels, problem_type = V, "single_label_classification"


CALLS = {
    "cross_entropy": (("logits", "weight"), lambda x, w: ops.cross_entropy(x, LABELS, w)),
    "causal_lm": (("logits", "weight"), lambda x, w: ops.causal_lm(x, LABELS, w)),
    "masked_lm": (("logits", "weight"), lambda x, w: ops.masked_lm(x, LABELS, w)),
    "backward": (("grad", "logits", "lse", "nll", "weight"),
                 lambda g, x, lse, nll, w: ops.cross_entropy_backward(g, x, LABELS, lse, nll, w)),
    "backward_": (("grad", "logits", "lse", "nll", "weight"),
                  lambda g, x, lse, nll, w: ops.cross_entropy_backward_(g, x, LABELS, lse, nll, w)),
    "with_grad": (("grad", "logits", "weight"), lambda g, x, w: ops.cross_entropy_with_grad(g, x, LABELS, w)),
    "with_grad_": (("grad", "logits", "weight"), lambda g, x, w: ops.cross_entropy_with_grad_(g, x, LABELS, w)),
    "add_cross_entropy_": (
        ("grad", "logits", "weight"),
        lambda g, x, w: ops.add_cross_entropy_(torch.zeros(5, dtype=torch.float64), g, x, LABELS, w)),
    "mean_with_grad": (("grad", "logits", "weight"), lambda g, x, w: ops.mean_with_grad(g, x, LABELS, w)),
    "scale_": (("logits", "grad"), lambda x, g: ops.scale_(x, g)),
    "linear_cross_entropy": (("hidden", "head", "bias", "weight"),
                             lambda h, w, b, c: ops.linear_cross_entropy(h, w, LABELS, b, c)),
    "accumloss.cross_entropy": (("logits", "weight"), lambda x, w: accumloss.cross_entropy(x, LABELS, weight=w)),
    "causal_lm_loss": (("logits", "weight", "items"),
                       lambda x, w, n: accumloss.causal_lm_loss(x, LABELS, num_items_in_batch=n, weight=w)),
    "masked_lm_loss": (("logits", "weight"), lambda x, w: accumloss.masked_lm_loss(x, LABELS, weight=w)),
    "inplace": (("logits",), lambda x: accumloss.masked_lm_loss(x * 1, LABELS, inplace="backward")),
    "token_classification_loss": (("logits",), lambda x: accumloss.token_classification_loss(x, LABELS)),
    "sequence_classification_loss": (
        ("logits",), lambda x: accumloss.sequence_classification_loss(LABELS[1, :2], x[:, 0], Config())),
    "question_answering_loss": (
        ("logits",), lambda x: accumloss.question_answering_loss(x[:, 0], x[:, 1], LABELS[1, :2], LABELS[1, :2])),
    "semantic_segmentation_loss": (
        ("logits",), lambda x: accumloss.semantic_segmentation_loss(x.mT[..., None], LABELS[..., None], -100)),
    "accumloss.linear_cross_entropy": (
        ("hidden", "head", "bias", "weight"),
        lambda h, w, b, c: accumloss.linear_cross_entropy(h, w, LABELS, bias=b, class_weight=c)),
    "linear_causal_lm_loss": (
        ("hidden", "head", "bias", "weight", "items"),
        lambda h, w, b, c, n: accumloss.linear_causal_lm_loss(h, w, LABELS, n, bias=b, class_weight=c)),
}  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_tangent_is_refused(name, requires_grad):
    names, call = CALLS[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensors = good_input(dtype)
        for which in names:
            if requires_grad and name.endswith("_") and which == "logits":
                continue  # a leaf that is written over is torch's to refuse
            primal = tensors[which].clone().requires_grad_(requires_grad)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(primal, torch.ones_like(primal))
                arguments = [dual if n == which else tensors[n].clone() for n in names]
                for mode in (torch.enable_grad, torch.no_grad):
                    with mode(), pytest.raises(RuntimeError, match=REFUSED):
                        call(*arguments)
                call(*[tensors[n].clone() for n in names])  # a level without a tangent is nobody's business

            def of_one(x, which=which, tensors=tensors):
                return call(*[x if n == which else tensors[n].clone() for n in names])

            with pytest.raises(RuntimeError, match=REFUSED):
                torch.func.jvp(of_one, (tensors[which],), (torch.ones_like(tensors[which]),))


def losses(x, w, h, head):
    yield "with the gradient in forward", x, accumloss.masked_lm_loss(x, LABELS, num_items_in_batch=4)
    yield "by the op", x, accumloss.masked_lm_loss(x, LABELS)
    yield "in place, backward", x, accumloss.masked_lm_loss(x * 1, LABELS, inplace="backward")
    in_forward = accumloss.masked_lm_loss(x * 1, LABELS, num_items_in_batch=4, inplace="forward")
    yield "in place, forward", x, in_forward
    yield "linear", h, accumloss.linear_causal_lm_loss(h, head, LABELS)


def test_a_tangent_of_the_incoming_gradient_is_refused():
    """Forward over reverse: the loss is an ordinary one, what is multiplied into its backward has a tangent."""
    tensors = good_input(torch.float32)
    x, h = (tensors[n].requires_grad_() for n in ("logits", "hidden"))
    for way, of, loss in losses(x, tensors["weight"], h, tensors["head"]):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss))
            try:
                torch.autograd.grad(loss, of, dual)
            except RuntimeError as error:
                refusal = str(error)
            else:
                refusal = "nothing"
            assert re.search(REFUSED, refusal), f"{way}: {refusal}"
