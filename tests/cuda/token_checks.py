"""What holds of the kernels that tell of each row, against float64: for the emulator and for a GPU.

A backend has tokens, distillation and targets, each with its backward, on tensors of the CPU: emulated.Backend, and what
test_on_gpu.py makes of the ops.
"""

from __future__ import annotations

import math

import emulated
import torch
from oracle import token_expected, z_scale
from test_distillation import exact, pairs, soft_targets
from test_per_token import incoming
from tolerances import UNIT, assert_close, assert_within, divergence_bound, entropy_bound, row_loss_bound, ulp

NAMES = ("loss", "nll", "lse", "entropy")


def rows_of(tensor: torch.Tensor, dims: int) -> torch.Tensor:
    """(..., T, V) or (..., T) as the op hands it to a kernel."""
    while tensor.dim() < dims:
        tensor = tensor[None]
    tensor = tensor.flatten(0, -dims)
    return tensor.contiguous() if dims == 3 and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 else tensor


def check_tokens(backend, case, seed) -> None:
    """Values and gradients, out of place and in place."""
    logits, labels, weight, dtype = rows_of(case.logits, 3), rows_of(case.labels, 2), case.weight, case.logits.dtype
    wanted = token_expected(case)
    found = backend.tokens(logits, labels, weight, **case.kwargs, metrics=True)
    bound = row_loss_bound(dtype, "cuda", z_scale(case))
    shaped = {name: value.view(case.labels.shape) for name, value in found.items()}
    assert_close(shaped["loss"], wanted.loss, bound, f"{case.name}: loss")
    assert_close(shaped["nll"], wanted.nll, bound, f"{case.name}: nll")
    assert_within(shaped["lse"], wanted.lse, bound * (wanted.lse.abs() + wanted.nll), f"{case.name}: lse")
    assert_within(shaped["entropy"], wanted.entropy, entropy_bound(wanted, dtype, bound), f"{case.name}: entropy")
    assert torch.equal(shaped["argmax"], wanted.argmax), f"{case.name}: argmax"
    few = backend.tokens(logits, labels, weight, **case.kwargs)
    assert_close(few["loss"].view(case.labels.shape), wanted.loss, bound, f"{case.name}: loss alone")
    for used in ({"loss"}, {"nll"}, {"loss", "lse"}, set(NAMES)):
        grads = {name: incoming(case, seed + i).float().double() for i, name in enumerate(NAMES) if name in used}
        of_rows = {name: rows_of(grad, 2) for name, grad in grads.items()}
        want, within = wanted.gradient(grads, "cuda")
        got = backend.tokens_backward(logits, labels, found, of_rows, weight, **case.kwargs)
        emulated.check_guards(got)
        assert_within(got.view(want.shape), want, within, f"{case.name}: gradient of {used}")
    over = emulated.guarded(logits)
    backend.tokens_backward(over, labels, found, of_rows, weight, out=over, **case.kwargs)
    emulated.check_guards(over)
    assert_within(over.view(want.shape), want, within, f"{case.name}: gradient in place")


def check_distillation(backend, dtype, beta) -> None:
    """Every regime, with any gradient for each row; rows that lie otherwise against 16 bytes than their teacher's."""
    for name, student, teacher, labels in pairs(dtype):
        s, t, wanted = exact(student, teacher, labels, beta, 0.7)
        grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5))
        grad.flatten()[0] = 0.0
        (of_exact,) = torch.autograd.grad(wanted, s, grad.double())
        mask = torch.zeros(wanted.shape, dtype=torch.int64) if labels is None else labels.clamp(max=0)
        given = [rows_of(x, 3) for x in (student, teacher)]
        given[1] = emulated.guarded(given[1], 1)
        options = {"beta": beta, "logit_scale": 1 / 0.7}
        found = backend.distillation(*given, rows_of(mask, 2), **options)
        bounds = divergence_bound(s.detach() / 0.7, t.detach() / 0.7, beta, dtype)
        assert_within(found["loss"].view(wanted.shape), wanted, bounds.loss, f"{name}: loss")
        scale = (grad.abs() / 0.7).unsqueeze(-1)
        rounding = ulp(of_exact, dtype) / (1 if dtype in (torch.bfloat16, torch.float16) else 2)
        within = bounds.student * scale + rounding + torch.finfo(torch.float32).tiny * (dtype != torch.float64)
        over = emulated.guarded(given[0], 3)
        for out, logits in ((None, given[0]), (over, over)):
            got = backend.distillation_backward(
                logits, given[1], rows_of(mask, 2), found, rows_of(grad, 2), out=out, **options
            )
            emulated.check_guards(got)
            assert_within(got.view(of_exact.shape), of_exact, within, f"{name}: gradient")


def check_digits(backend) -> None:
    """A divergence keeps its digits wherever the logits lie."""
    _, student, teacher, _ = next(pair for pair in pairs(torch.float32) if pair[0] == "shifted up")
    for beta in (0.0, 0.5, 1.0):
        *_, wanted = exact(student, teacher, None, beta, 1.0)
        labels = torch.zeros(1, len(student), dtype=torch.int64)
        found = backend.distillation(student[None], teacher[None], labels, beta)["loss"][0]
        assert_within(found, wanted, 16 * UNIT * (1 + wanted), f"beta {beta}")


def check_targets(backend, dtype, options) -> None:
    for case in soft_targets(dtype, options):
        logits, targets = case.logits[None], emulated.guarded(case.targets[None], 1)
        found = backend.targets(logits, targets, case.weight, **options)
        bound = 2 * row_loss_bound(dtype, "cuda", case.z_scale)
        assert_close(found["loss"][0], case.losses, bound, f"V={case.V}: losses")
        assert torch.equal(found["label"], targets.argmax(-1)), case.V
        for offset in (0, 1):
            out = emulated.guarded(torch.full_like(logits, 7.0), offset)
            backend.targets_backward(logits, targets, found, case.grad[None], case.weight, out=out, **options)
            emulated.check_guards(out)
            assert_within(out[0], case.of_logits, case.bound, f"V={case.V}: gradient")


def check_special_rows(backend, dtype, V) -> None:
    """argmax is torch's; where nothing comes back the gradient is zero; a bad label is told."""
    logits = torch.randn(1, 8, V, generator=torch.Generator().manual_seed(8)).to(dtype)
    labels = torch.full((1, 8), 5)
    logits[0, 0, 6:] = -math.inf
    logits[0, 1, 5] = -math.inf
    logits[0, 2, V - 1] = logits[0, 2, V - 3] = math.nan
    logits[0, 2, 5] = 40.0  # the label leads all that are numbers
    logits[0, 3, 5] = logits[0, 3, 7] = math.nan
    logits[0, 4, V - 2] = logits[0, 4, 9] = math.inf
    logits[0, 5] = -math.inf
    labels[0, 6], labels[0, 7] = -100, V
    found = backend.tokens(logits, labels, metrics=True)
    assert found["argmax"][0, :6].tolist() == logits[0, :6].argmax(-1).tolist()
    assert found["argmax"][0, 6:].tolist() == [-1, -1]
    assert found["loss"][0].isnan().tolist() == [False, False, True, True, True, True, False, True]
    assert found["entropy"][0].isnan().tolist() == [False, False, True, True, True, True, False, True]
    assert found["nll"][0, 1] == math.inf and found["loss"][0, 6] == found["lse"][0, 6] == 0
    assert backend.take_bad_label() == (7, V)
    for name in NAMES:
        grad = torch.ones(1, 8, dtype=torch.float64)
        grad[0, [3, 4]] = 0.0
        gradient = backend.tokens_backward(logits, labels, found, {name: grad})[0]
        assert (gradient[[3, 4, 6, 7]] == 0).all(), name
        assert gradient[2].isnan().all(), name
        assert gradient[0].isfinite().all() and (gradient[0, 6:] == 0).all(), name
