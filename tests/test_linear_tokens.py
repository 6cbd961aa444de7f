"""Per token from hidden states: the numbers of the logits' path, in chunks, whatever comes back to the rows."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import ACCUMULATED_GRADIENT, MANTISSA, assert_within, linear_gradient_bound, row_loss_bound

import accumloss
from accumloss import linear_token_log_probs, token_log_probs

N, H, V = 150, 24, 1030


def sample(dtype, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, N // 3, H, generator=generator).to(dtype)
    weight = (torch.randn(V, H, generator=generator) / 3).to(dtype)
    labels = torch.randint(0, V, (3, N // 3), generator=generator)
    labels[0, ::3] = -100
    grad = torch.randn(3, N // 3, generator=generator)
    grad[1, ::2] = 0.0
    return hidden, weight, (torch.randn(V, generator=generator).to(dtype) if bias else None), labels, grad


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [16, N], ids=["chunks", "one chunk"])
def test_values_and_gradients_are_those_of_the_logits(dtype, rows):
    hidden, weight, bias, labels, grad = sample(dtype)
    budget = rows * V * dtype.itemsize * 65 // 64 + 64
    exact = leaves(*(t.double() for t in (hidden, weight, bias)))
    wanted = token_log_probs(F.linear(*exact), labels, 0.8, shift=1)
    of_exact = torch.autograd.grad(wanted, exact, grad.double())
    stock = leaves(hidden, weight, bias)
    of_stock = torch.autograd.grad(
        token_log_probs(F.linear(*stock), labels, 0.8, shift=1),
        stock,
        grad.to(wanted.dtype if dtype == torch.float64 else torch.float32),
    )
    ours = leaves(hidden, weight, bias)
    found = linear_token_log_probs(ours[0], ours[1], labels, 0.8, bias=ours[2], shift=1, max_scratch_bytes=budget)
    logits = F.linear(hidden.double(), weight.double(), bias.double()) / 0.8
    bound = (
        (2.0 ** -MANTISSA[dtype] if dtype in (torch.bfloat16, torch.float16) else row_loss_bound(dtype, "cpu"))
        * 4
        * logits.abs().amax(-1)
    )
    assert_within(found, wanted, bound, "log-probabilities")
    assert (found[labels.roll(-1, 1) == -100][:-1] == 0).all()
    of_ours = torch.autograd.grad(found, ours, grad.to(found.dtype))
    for name, a, b, c in zip(("hidden", "weight", "bias"), of_ours, of_stock, of_exact, strict=True):
        assert a.dtype == dtype
        error, by_logits = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= linear_gradient_bound(by_logits.item(), dtype, -(-N // rows)), name


def test_rows_without_a_gradient_take_no_part(monkeypatch):
    """Backward's products are of the rows to which something comes back, of 64 at least."""
    from accumloss.linear import compute

    hidden, weight, _, labels, grad = sample(torch.float32)
    seen, original = [], compute.valid_rows

    def valid_rows(*args):
        found = original(*args)
        seen.append(N if found[0] is None else found[0].numel())
        return found

    monkeypatch.setattr(compute, "valid_rows", valid_rows)
    h, w = leaves(hidden, weight)
    grad[:, 10:] = 0.0
    of_h, _ = torch.autograd.grad(linear_token_log_probs(h, w, labels), (h, w), grad)
    assert seen == [N, 64]
    assert (of_h[:, 10:] == 0).all() and (of_h[2, :10] != 0).all()


def test_what_needs_no_gradient_costs_none(monkeypatch):
    from accumloss.linear import compute

    hidden, weight, _, labels, grad = sample(torch.float32)
    seen = []
    original = compute.run

    def run(*args, **kwargs):
        seen.append(args[6])
        return original(*args, **kwargs)

    monkeypatch.setattr(compute, "run", run)
    h = hidden.requires_grad_()
    linear_token_log_probs(h, weight, labels).backward(grad)
    assert seen == [(False, False, False), (True, False, False)]
    assert not linear_token_log_probs(h.detach(), weight, labels).requires_grad


def test_second_derivatives_go_by_way_of_the_logits():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 7))
    labels = torch.tensor([0, 6, -100, 2])
    assert torch.autograd.gradcheck(lambda h, w: linear_token_log_probs(h, w, labels, 0.7), (hidden, weight))
    assert torch.autograd.gradgradcheck(lambda h, w: linear_token_log_probs(h, w, labels), (hidden, weight))


def test_token_weights_are_those_of_the_logits():
    """linear_cross_entropy with them: sums, metrics, gradients of hidden states, weight and token weights."""
    hidden, weight, bias, labels, _ = sample(torch.float32)
    token_weight, class_weight = torch.rand(labels.shape) * 2, torch.linspace(0.5, 2, V)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "metrics": True, "shift": 1}
    found = []
    for fused in (False, True):
        h, w, b, t = leaves(hidden, weight, bias, token_weight)
        if fused:
            sums = accumloss.linear_cross_entropy(
                h, w, labels, bias=b, class_weight=class_weight, token_weight=t, max_scratch_bytes=40 * V * 4, **options
            )
        else:
            sums = accumloss.cross_entropy(F.linear(h, w, b), labels, weight=class_weight, token_weight=t, **options)
        grads = torch.autograd.grad(sums.mean_loss, (h, w, b, t))
        found.append([sums.loss_sum, sums.total_weight, sums.entropy_sum, *grads])
        assert sums.num_items == (labels[:, 1:] != -100).sum()
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 4 * ACCUMULATED_GRADIENT[torch.float32] * theirs.norm()


H2, W2, Y2 = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_token_log_probs(H2, None, Y2), ValueError, "linear_token_log_probs: expected a tensor weight"),
        (lambda: linear_token_log_probs(H2, W2.t(), Y2), RuntimeError, r"linear_token_log_probs: expected hidden \(..., H\)"),
        (lambda: linear_token_log_probs(H2, W2, Y2[0]), RuntimeError, "linear_token_log_probs: expected labels"),
        (lambda: linear_token_log_probs(H2, W2, Y2 + 5), IndexError, r"expected labels in \[0, 5\)"),
        (lambda: linear_token_log_probs(H2, W2, Y2, -1), ValueError, "linear_token_log_probs: .* for temperature"),
        (lambda: torch.compile(linear_token_log_probs, fullgraph=True)(H2, W2, Y2), RuntimeError, "linear_token_log_probs: expected no torch.compile"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
