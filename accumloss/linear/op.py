"""Head and cross-entropy as an op and in the graph: without ever holding the logits.

The gradient is written in forward for a factor that is known by then, and scaled by what the backward brings beyond it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import checks, ops, reference
from ..options import SCHEMA, LossOptions
from . import compute
from .compute import Needs
from .count import ValidCount

# The op: sums, with gradients for a factor of 1 that its formula scales -----------------------------------------------


@torch.library.custom_op(
    "accumloss::linear_cross_entropy_with_grad",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias=None, Tensor? class_weight=None, *, "
        f"bool[] needs, int shift=0, {SCHEMA}, bool metrics=False, int? num_valid=None, "
        "int? max_scratch_bytes=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _with_grad(hidden, weight, labels, bias=None, class_weight=None, **given):
    checks.refuse_forward_ad("torch.ops.accumloss.linear_cross_entropy_with_grad", hidden, weight, bias, class_weight)
    needs, options, limits = _given(given)
    factor = torch.ones((), dtype=ops.accumulation_dtype(hidden), device=hidden.device)
    sums, *grads = _compute(factor, hidden, weight, labels, bias, class_weight, needs, options, limits)
    return (*sums, *[hidden.new_empty(0) if grad is None else grad for grad in grads])


def _given(given: dict[str, Any]) -> tuple[Needs, dict[str, Any], tuple[int | None, int | None]]:
    """The keywords of the op: needs, the options of all rows, and num_valid with max_scratch_bytes."""
    options = {"shift": 0, "metrics": False, **LossOptions().as_kwargs(), **given}
    limits = (options.pop("num_valid", None), options.pop("max_scratch_bytes", None))
    return Needs(*options.pop("needs")), options, limits


@_with_grad.register_fake
def _(hidden, weight, labels, bias=None, class_weight=None, **given):
    needs, options, limits = _given(given)
    _check(hidden, weight, labels, bias, class_weight, options, *limits)
    acc = ops.accumulation_dtype(hidden)
    sums = [hidden.new_empty((), dtype=d if d == torch.int64 else acc) for d in compute.SUM_DTYPES]
    weight_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    grads = [
        torch.empty(hidden.shape if needs.hidden else 0, dtype=hidden.dtype, device=hidden.device),
        hidden.new_empty(weight.shape, dtype=weight_dtype) if needs.weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[:1], dtype=acc) if needs.bias else hidden.new_empty(0),
    ]
    return (*sums, *grads)


def _setup(ctx, inputs, keyword_only_inputs, output):
    hidden, weight, labels, bias, class_weight = inputs
    sums, grads = output[:5], output[5:]
    ctx.given = keyword_only_inputs
    ctx.save_for_backward(hidden, weight, labels, bias, class_weight, *grads)
    ctx.mark_non_differentiable(*sums[1:], *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss_sum, *_):
    if grad_loss_sum is None:
        return None, None, None, None, None
    hidden, weight, labels, bias, class_weight, *grads = ctx.saved_tensors
    needs = Needs(*ctx.given["needs"])
    inputs = (hidden, weight, bias)
    found: Any
    if torch.is_grad_enabled():
        _, options, _ = _given(ctx.given)
        found = _differentiable_grads(grad_loss_sum, inputs, needs, labels, class_weight, options)
    else:
        found = [
            (grad * grad_loss_sum).to(tensor.dtype) if needed else None
            for tensor, grad, needed in zip(inputs, grads, needs, strict=True)
        ]
    return found[0], found[1], None, found[2], None


_with_grad.register_autograd(_backward, setup_context=_setup)


def _differentiable_grads(grad_loss_sum, inputs, needs, labels, class_weight, options):
    """The gradients by way of the logits, as a graph: for a backward of the backward."""
    hidden, weight, bias = inputs
    logits = F.linear(hidden, weight, bias)
    loss_sum = ops.cross_entropy(logits, labels, class_weight, **options)[0]
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(loss_sum, wanted, grad_loss_sum, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def linear_cross_entropy(
    hidden: torch.Tensor,  # (..., H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (...)
    bias: torch.Tensor | None = None,  # (V,)
    class_weight: torch.Tensor | None = None,  # (V,)
    *,
    num_valid: int | None = None,
    max_scratch_bytes: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch.ops.accumloss.linear_cross_entropy: the fields of TokenSums; the first carries the gradient."""
    checks.refuse_forward_ad("torch.ops.accumloss.linear_cross_entropy", hidden, weight, labels, bias, class_weight)
    hidden, weight, bias = autocast(hidden, weight, bias)
    _check(hidden, weight, labels, bias, class_weight, options, num_valid, max_scratch_bytes)
    needs = needs_of(hidden, weight, bias)
    return _with_grad(
        hidden, weight, labels, bias, class_weight, needs=list(needs), num_valid=num_valid,
        max_scratch_bytes=max_scratch_bytes, **options,
    )[:5]  # fmt: skip


torch.library.define(
    "accumloss::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias=None, Tensor? class_weight=None, *, int shift=0, "
    f"{SCHEMA}, bool metrics=False, int? num_valid=None, int? max_scratch_bytes=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("accumloss::linear_cross_entropy", "CompositeImplicitAutograd")(linear_cross_entropy)


def needs_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Needs:
    is_on = torch.is_grad_enabled()
    return Needs(
        is_on and hidden.requires_grad,
        is_on and weight.requires_grad,
        is_on and bias is not None and bias.requires_grad,
    )


def autocast(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors as F.linear would take them: under autocast in its dtype, fp64 left alone."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


# The gradient in forward, for a divisor that is known -----------------------------------------------------------------


class LinearGradInForward(torch.autograd.Function):
    """``loss_sum / divisor`` and the fields of TokenSums; the gradients of the former are made together with it.

    They are scaled in place where another gradient comes to the loss than expected, and handed out by the first backward; a repeated one (retain_graph=True) computes them again, and one
    with create_graph=True by way of the logits. fp16 gradients are written for a factor of 1: divided by the number of
    items they would underflow before a GradScaler's factor reaches them.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, labels, bias, class_weight, divisor, expected_grad, needs, options, limits, shared=None
    ):
        # shared: a Shard of the vocabulary, and whether the gradient of hidden is summed over its processes
        # hidden (..., H), weight (V, H), labels (...), bias and class_weight (V,) or None, divisor ()
        if hidden.dtype == torch.float16:
            ctx.factor = torch.ones_like(divisor)
        elif expected_grad == 1:
            ctx.factor = divisor.reciprocal()
        else:  # a quotient of tensors, as autograd's: a number over a tensor is its reciprocal times the number, an ulp off
            ctx.factor = torch.full_like(divisor, expected_grad) / divisor
        ctx.needs, ctx.options, ctx.limits = needs, options, limits
        ctx.shard, ctx.is_summed = shared or (None, False)
        ctx.save_for_backward(hidden, weight, labels, bias, class_weight, divisor)
        sums, *ctx.grads = _compute(
            ctx.factor, hidden, weight, labels, bias, class_weight, needs, options, limits, ctx.shard
        )
        ctx.mark_non_differentiable(*sums)
        ctx.set_materialize_grads(False)  # zeros for each of the sums
        return sums[0] / divisor, *sums

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 11
        checks.refuse_forward_ad("accumloss", grad_loss)
        hidden, weight, labels, bias, class_weight, divisor = ctx.saved_tensors
        inputs, wanted = (hidden, weight, bias), grad_loss / divisor
        grads, ctx.grads = ctx.grads, None
        found: Any
        if torch.is_grad_enabled():
            if ctx.shard is not None:
                raise RuntimeError(ops.NO_SECOND_DERIVATIVE)
            found = _differentiable_grads(wanted, inputs, ctx.needs, labels, class_weight, ctx.options)
            return found[0], found[1], None, found[2], *[None] * 7
        if grads is None:
            grads = _compute(
                ctx.factor, hidden, weight, labels, bias, class_weight, ctx.needs, ctx.options, ctx.limits, ctx.shard
            )[1:]
        if ctx.is_summed and grads[0] is not None:
            dist.all_reduce(grads[0], group=ctx.shard.group)
        ratio = wanted / ctx.factor
        found = [_finish(grad, ratio, tensor) for grad, tensor in zip(grads, inputs, strict=True)]
        return found[0], found[1], None, found[2], *[None] * 7


def _finish(grad: torch.Tensor | None, ratio: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor | None:
    if grad is None or like is None:
        return None
    ops.scale_(grad, ratio)
    return grad.to(like.dtype)


def _compute(factor, hidden, weight, labels, bias, class_weight, needs, options, limits, shard=None) -> compute.Outputs:
    """compute.run for hidden (..., H) and labels (...) that are not shifted."""
    shift = options["shift"]
    num_valid, max_scratch_bytes = limits
    _check(hidden, weight, labels, bias, class_weight, options, num_valid, max_scratch_bytes, shard)
    targets = reference.shift_labels(labels, shift, options["ignore_index"]) if labels.dim() else labels
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    of_rows = {name: value for name, value in options.items() if name != "shift"}
    bias = bias if bias is None else bias.detach()
    with torch.no_grad():
        found = compute.run(
            factor, rows, weight.detach(), targets.reshape(-1), bias, class_weight, needs, of_rows, num_valid,
            max_scratch_bytes, shard,
        )  # fmt: skip
    return found if found.hidden is None else found._replace(hidden=found.hidden.view(hidden.shape))


def check(name, hidden, weight, labels, bias, class_weight, num_valid, max_scratch_bytes, shard=None, of="") -> None:
    """Shapes, and the limits; devices and dtypes are check_kinds'. of: what stands before hidden, weight and bias."""
    for what, tensor in ((f"{of}weight", weight), (f"{of}hidden", hidden), (f"{of}bias", bias)):
        if tensor is not None and hasattr(tensor, "placements"):
            raise RuntimeError(
                f"{name}: expected a whole {what}, got a sharded DTensor; under FSDP2 call it where the head is unsharded, "
                "inside the forward of the module that fully_shard was applied to, or after module.unshard()"
            )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{name}: expected {of}hidden (..., H) and {of}weight (V, H), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if shard is None and weight.numel() == 0:
        raise RuntimeError(f"{name}: expected {of}weight (V, H) with V and H >= 1, got {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:-1]:
        raise RuntimeError(
            f"{name}: expected labels of shape {tuple(hidden.shape[:-1])}, as {of}hidden without H, got "
            f"{tuple(labels.shape)}"
        )
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    for what, tensor, size in ((f"{of}bias", bias, weight.shape[0]), ("class_weight", class_weight, vocab_size)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor {what} (V,) or None, got a {type(tensor).__name__}")
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise RuntimeError(f"{name}: expected {what} of shape (V,) = ({size},), got {tuple(tensor.shape)}")
    for what, tensor in ((f"{of}weight", weight), (f"{of}hidden", hidden)):
        if tensor.layout != torch.strided:
            raise RuntimeError(
                f"{name}: expected {what} of dense layout, got a layout of {tensor.layout}; pass {what}.to_dense()"
            )
    for what, value, least in (("num_valid", num_valid, 0), ("max_scratch_bytes", max_scratch_bytes, 1)):
        if value is None or (what == "num_valid" and isinstance(value, ValidCount)):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise ValueError(f"{name}: expected {what} >= {least}, an int, got {value!r}")


def check_kinds(name, hidden, weight, labels, bias, class_weight=None, of="") -> None:
    """Devices and dtypes, of tensors that are in place and cast. of: what stands before hidden, weight and bias."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{name}: expected int64 or int32 labels, got {labels.dtype}")
    of_hidden = f"{of}hidden's"
    for what, tensor in (
        (f"{of}weight", weight), ("labels", labels), (f"{of}bias", bias), ("class_weight", class_weight),
    ):  # fmt: skip
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(f"{name}: expected {what} on {of_hidden} device {hidden.device}, got {tensor.device}")
    for what, tensor in ((f"{of}weight", weight), (f"{of}bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise RuntimeError(f"{name}: expected {what} of {of_hidden} dtype {hidden.dtype}, got {tensor.dtype}")
    for what, tensor in ((f"{of}hidden", hidden), ("class_weight", class_weight)):
        if tensor is not None and tensor.dtype not in checks.FLOATS:
            raise RuntimeError(f"{name}: expected {what} of bfloat16, float16, float32 or float64, got {tensor.dtype}")


def _check(hidden, weight, labels, bias, class_weight, options, num_valid, max_scratch_bytes, shard=None) -> None:
    """Everything that can be known without a look at the values."""
    name = "linear_cross_entropy"
    check(name, hidden, weight, labels, bias, class_weight, num_valid, max_scratch_bytes, shard)
    checks.check_options(name, hidden, **options)
    check_kinds(name, hidden, weight, labels, bias, class_weight)
    if class_weight is not None:
        vocab_size = weight.shape[0] if shard is None else shard.vocab_size
        checks.check_class_weight(name, "class_weight", class_weight, vocab_size, hidden, "hidden")
    if options.get("shift", 0) > 0 and hidden.dim() < 2:
        raise RuntimeError(f"{name}: expected hidden (..., T, H) where shift > 0, got {tuple(hidden.shape)}")
