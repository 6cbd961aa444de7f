"""A weight for each token: sums, means and accumulation of weighted rows, and the gradient of the weights themselves."""

import pytest
import torch
from tolerances import ACCUMULATED_GRADIENT, SUM, assert_close, assert_within, ulp

import accumloss
from accumloss import Accumulator, LossOptions, reference

B, T, V, H = 3, 6, 33, 8
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.5}


def sample(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 2).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :3] = -100
    weight = torch.rand(B, T, generator=generator) * 2
    weight[1, 2] = 0.0
    weight[0, 0] = torch.nan  # of a label that is ignored: it counts nothing
    return logits, labels, weight


def wanted(logits, labels, token_weight, class_weight=None, options=None, shift=0):
    """loss_sum, total_weight, and the mean by the latter, in float64 by the reference; all with gradients."""
    rows = reference.rows(logits, labels, class_weight, LossOptions(**(options or {})), shift=shift)
    moved = torch.zeros_like(token_weight)
    moved[:, : T - shift] = token_weight[:, shift:]
    of_rows = torch.where(rows.is_item, moved.double(), 0.0)
    loss_sum, total = (rows.loss * of_rows).sum(), (rows.weight * of_rows).sum()
    return loss_sum, total, loss_sum / total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "options"])
def test_sums_and_gradients_are_weighted(dtype, options):
    logits, labels, token_weight = sample(dtype)
    class_weight = torch.linspace(0.5, 2.0, V)
    found_leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found_weight, exact_weight = token_weight.clone().requires_grad_(), token_weight.double().requires_grad_()
    sums = accumloss.cross_entropy(
        found_leaf, labels, weight=class_weight, token_weight=found_weight, shift=1, metrics=True, **options
    )
    loss_sum, total, mean = wanted(exact_leaf, labels, exact_weight, class_weight, options, 1)
    plain = accumloss.cross_entropy(logits, labels, weight=class_weight, shift=1, metrics=True, **options)
    assert_close(sums.loss_sum, loss_sum, 4 * SUM, "loss_sum")
    assert_close(sums.total_weight, total, SUM, "total_weight")
    assert sums.num_items == plain.num_items and sums.num_correct == plain.num_correct
    assert_close(sums.entropy_sum, plain.entropy_sum, SUM, "entropy_sum")
    assert not sums.detach().total_weight.requires_grad
    for found, exact in ((sums.loss_sum, loss_sum), (sums.mean_loss, mean)):
        grads = torch.autograd.grad(found, (found_leaf, found_weight), retain_graph=True)
        exacts = torch.autograd.grad(exact, (exact_leaf, exact_weight), retain_graph=True)
        # an entry is a difference of terms of the size of its row's largest, as is a weight's of all losses
        scale = exacts[0].abs().amax(-1, keepdim=True).expand_as(exacts[0])
        assert_within(grads[0], exacts[0], 8 * SUM * scale + ulp(exacts[0], dtype), "of logits")
        assert_within(grads[1], exacts[1], 8 * SUM * exacts[1].nan_to_num().abs().max(), "of token_weight")


@pytest.mark.parametrize(
    "name", ["causal_lm_loss", "masked_lm_loss", "token_classification_loss", "linear_causal_lm_loss"]
)
@pytest.mark.parametrize("num_items", [None, 7])
def test_the_losses_divide_by_the_weights_or_by_what_is_given(name, num_items):
    logits, labels, token_weight = sample(torch.float32)
    shift = int("causal" in name)
    inputs = (logits,) if "linear" not in name else (torch.eye(V)[labels.clamp(0)] * 2, torch.randn(V, V))
    exact = inputs[0].double() if len(inputs) == 1 else inputs[0].double() @ inputs[1].double().t()
    loss_sum, _, mean = wanted(exact, labels, token_weight, shift=shift)
    loss = getattr(accumloss, name)(*inputs, labels, num_items_in_batch=num_items, token_weight=token_weight)
    assert_close(loss, mean if num_items is None else loss_sum / num_items, 4 * SUM, name)


def test_weights_of_one_are_none():
    logits, labels, _ = sample(torch.bfloat16)
    ones = torch.ones(B, T)
    losses, grads = [], []
    for given in ({}, {"token_weight": ones}, {"token_weight": ones, "inplace": "backward"}):
        leaf = logits.clone().requires_grad_()
        losses.append(accumloss.causal_lm_loss(leaf * 1, labels, **given))
        grads += torch.autograd.grad(losses[-1], leaf)
    assert_close(losses[1], losses[0], SUM, "loss")
    assert torch.equal(losses[1], losses[2]) and torch.equal(grads[1], grads[2])
    assert_within(grads[1], grads[0], ulp(grads[0].double(), torch.bfloat16), "gradient")


@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_is_that_of_the_one_batch(fused):
    """Rows of uneven weights over micro-batches: gradient and mean of the batch that holds them all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, T, H, generator=generator)
    labels = torch.randint(0, V, (8, T), generator=generator)
    token_weight = torch.rand(8, T, generator=generator) ** 4 * 5
    found = []
    for size in (8, 3):
        head = torch.nn.Linear(H, V, bias=False)
        with torch.no_grad():
            head.weight.copy_(torch.randn(V, H, generator=torch.Generator().manual_seed(1)))
        accumulator = Accumulator(head)
        for part in torch.arange(8).split(size):
            given = {"token_weight": token_weight[part], "shift": 1}
            if fused:
                sums = accumloss.linear_cross_entropy(x[part], head.weight, labels[part], **given)
            else:
                sums = accumloss.cross_entropy(head(x[part]), labels[part], **given)
            accumulator.backward(sums)
        found.append((accumulator.finish().mean_loss, head.weight.grad))
    assert_close(found[1][0], found[0][0], SUM, "mean loss")
    assert (found[1][1] - found[0][1]).norm() <= ACCUMULATED_GRADIENT[torch.float32] * found[0][1].norm()


def test_second_derivatives():
    logits, labels, token_weight = sample()
    leaf, weights = logits[:1].clone().requires_grad_(), token_weight[:1].double().requires_grad_()

    def mean(x, w):
        return accumloss.cross_entropy(x, labels[:1], token_weight=w.nan_to_num(), z_loss=1e-2).mean_loss

    assert torch.autograd.gradcheck(mean, (leaf, weights))
    assert torch.autograd.gradgradcheck(mean, (leaf, weights), fast_mode=True)


def test_it_compiles_whole():
    logits, labels, token_weight = sample(torch.float32)

    def loss(x, w):
        return accumloss.causal_lm_loss(x, labels, token_weight=w)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf, weights = logits.clone().requires_grad_(), token_weight.nan_to_num().requires_grad_()
        value = function(leaf, weights)
        results.append((value, *torch.autograd.grad(value, (leaf, weights))))
    for eager, traced in zip(*results, strict=True):
        assert (traced - eager).norm() <= ACCUMULATED_GRADIENT[torch.float32] * eager.norm()


X, Y, W = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accumloss.cross_entropy(X, Y, token_weight=W[0]), RuntimeError, r"token_weight of shape \(2, 3\) .* \(3,\)"),
        (lambda: accumloss.cross_entropy(X, Y, token_weight=Y), RuntimeError, "token_weight of a floating dtype, got torch.int64"),
        (lambda: accumloss.causal_lm_loss(X, Y, token_weight=1.0), TypeError, "a tensor token_weight .* got a float"),
        (
            lambda: accumloss.masked_lm_loss(X.requires_grad_() * 1, Y, num_items_in_batch=2, token_weight=W, inplace="forward"),
            ValueError, 'masked_lm_loss: expected no token_weight where inplace="forward"',
        ),
        (
            lambda: accumloss.linear_cross_entropy(X, torch.zeros(7, 5), Y, token_weight=W, num_valid=3),
            ValueError, "linear_cross_entropy: expected no token_weight beside num_valid",
        ),
        (
            lambda: accumloss.linear_cross_entropy(X, torch.zeros(7, 5), Y, token_weight=W, vocab_size=7),
            ValueError, "linear_cross_entropy: expected no token_weight where processes share the vocabulary",
        ),
        (
            lambda: torch.compile(accumloss.linear_cross_entropy, fullgraph=True)(X, torch.zeros(7, 5), Y, token_weight=W),
            RuntimeError, "linear_cross_entropy: expected no torch.compile around it",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
