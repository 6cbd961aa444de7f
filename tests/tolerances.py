"""Every tolerance of the suite, derived from the rounding of a dtype, the size of the row and the device.

Bounds are per element and relative to what the element is made of. None is an absolute floor: with V = 128256 the
probabilities are around 1e-5, and a floor of 5e-5 would accept a gradient that is missing altogether.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

UNIT = 2.0**-24  # half an ulp of fp32, relative
UNIT64 = 2.0**-53

# docs/numerics.md: the promises
ROW_LOSS = {"cpu": 8 * UNIT, "cuda": 2e-6, "fallback": 2e-6}
SUM = 1e-6
ROW_LOSS_FLOAT64 = 1e-12
# entries of a bf16 gradient that are another neighbour of the exact value where the row was summed up in other parts
OTHER_NEIGHBOUR = 5e-5
# a step of Trainer over micro-batches against the one batch, fp32: relative error of the whole gradient, and of the loss
TRAINER_GRADIENT = 1e-5
TRAINER_LOSS = 1e-6
# a window accumulated in any way against its one batch, relative error of the whole gradient, by the precision of the model: some
# roundings of each micro-batch's gradient. In fp32 the one batch is computed in fp64.
ACCUMULATED_GRADIENT = {torch.float32: 1e-6, torch.bfloat16: 4 * 2.0**-8, torch.float16: 4 * 2.0**-11}
# on a device without float64 two lse of up to 16, those of a student and of a teacher, are rounded to fp32
WITHOUT_FLOAT64_GRADIENT = ACCUMULATED_GRADIENT[torch.float32] + 2 * 16 * UNIT
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


def unit_of(dtype: torch.dtype) -> float:
    """Unit roundoff of the arithmetic that computes logits of a dtype."""
    return UNIT64 if dtype == torch.float64 else UNIT


def row_loss_bound(dtype: torch.dtype, device: str, z_scale: float = 0.0) -> float:
    """Relative error of a row loss and of its nll, at any confidence.

    z_scale: largest ``|z|`` where the logits pass through a scale or a cap: its rounding moves every z by some units.
    """
    bound = ROW_LOSS_FLOAT64 if dtype == torch.float64 else ROW_LOSS[device]
    return bound + 4 * unit_of(dtype) * z_scale


def entropy_bound(rows: Any, dtype: torch.dtype, row_loss: float) -> torch.Tensor:
    """Absolute error of a row's entropy: relative where the label is the largest logit, else also that of 1 in a float sum.

    rows: with nll and entropy (...) in float64. row_loss: row_loss_bound() of them.
    """
    leads = rows.nll < math.log(2)  # the label has more than half
    return 2 * row_loss * (rows.entropy + torch.where(leads, 0.0, 1.0))


class DivergenceBounds(NamedTuple):
    loss: torch.Tensor  # (...)
    student: torch.Tensor  # (..., V) of the gradient for an incoming one of 1
    teacher: torch.Tensor  # (..., V)


def divergence_bound(s: torch.Tensor, t: torch.Tensor, beta: float, dtype: torch.dtype) -> DivergenceBounds:
    """Absolute errors of a divergence of z (..., V) and of its gradients, in float64: units of the terms that they are sums of.

    A log-probability is the difference of z and lse, off by a unit of each; it is a factor of a term, and the exponent of one.
    """
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    of_z = [torch.where(x.isfinite(), x, 0.0).abs().amax(-1, keepdim=True) for x in (s, t)]

    def magnitude(log_p: torch.Tensor) -> torch.Tensor:
        return torch.where(log_p.isfinite(), log_p, 0.0).abs()

    units = 8 + magnitude(log_s) + magnitude(log_t) + of_z[0] + of_z[1]
    gap = magnitude(log_t) + magnitude(log_s)
    shares = (log_s.exp(), log_t.exp())
    terms = {0.0: shares[1] * (1 + gap), 1.0: shares[0] * (1 + gap)}.get(beta, (shares[0] + shares[1]) * (1 + gap))
    unit = unit_of(dtype) * (4 if dtype == torch.float64 else 1)
    loss = unit * (units * terms).sum(-1)
    size = terms.sum(-1, keepdim=True)
    own = [unit * units * (p * (1 + gap + size)) for p in shares]
    both = [x + unit * units * (shares[0] + shares[1]) * (beta in (0.0, 1.0)) for x in own]
    return DivergenceBounds(loss, *both)


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next number of ``dtype`` at ``value`` (given in float64), subnormals included."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(value.abs().clamp(min=info.tiny)))
    return torch.exp2(exponent + 1 - MANTISSA[dtype])


def gradient_bound(
    expected: torch.Tensor,  # (..., V) float64 gradient
    z: torch.Tensor,  # (..., V) float64 transformed logits
    lse: torch.Tensor,  # (...) float64
    terms: torch.Tensor,  # (..., V) float64: sum of the magnitudes that an entry is the difference of
    dtype: torch.dtype,
    device: str,
    is_transformed: bool = False,
) -> torch.Tensor:
    """Absolute error allowed per entry of a gradient in ``dtype``.

    One rounding to ``dtype`` (an ulp; half of it is the rounding, half is for a value that lies near the middle), and
    the arithmetic before it: ``(4 + |z - max|)`` units of the terms on CPU, twice that elsewhere. A transform adds the
    rounding of z itself.
    """
    distance = (z - lse.unsqueeze(-1)).abs()
    distance = torch.where(torch.isfinite(distance), distance, torch.zeros_like(distance))
    units = 4 + distance
    if is_transformed:
        finite = torch.where(torch.isfinite(z), z, torch.zeros_like(z)).abs()
        units = units + 4 * (finite + finite.amax(-1, keepdim=True)) + 4
    if dtype == torch.float64:  # lse has no second double to keep its low bits, and neither has the oracle
        units = 8 * units + 4 * torch.nan_to_num(lse).abs().unsqueeze(-1)
    arithmetic = units * unit_of(dtype) * (1 if device == "cpu" else 2) * terms
    rounding = ulp(expected, dtype) if dtype in (torch.bfloat16, torch.float16) else 0.5 * ulp(expected, dtype)
    return rounding + arithmetic + torch.finfo(torch.float32).tiny * (dtype != torch.float64)


def fp32_gradient_limit() -> float:
    """Largest relative error of any fp32 gradient entry without options; performance, not a derivation, allows more."""
    return 4e-6


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float, what: str) -> None:
    """Elementwise ``|actual - expected| <= bound``; NaN and infinities must be the same ones."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    same = (actual == expected) | (torch.isnan(actual) & torch.isnan(expected))
    bound = torch.as_tensor(bound, dtype=torch.float64).cpu().expand_as(expected)
    error = (actual - expected).abs()
    bad = ~(same | (error <= bound))
    if bad.any():
        ratio = torch.where(bad, torch.nan_to_num(error / bound, nan=math.inf), torch.zeros_like(error))
        worst = int(ratio.argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} entries out of bounds; worst at flat index {worst}: "
            f"{actual.flatten()[worst].item():.9g}, expected {expected.flatten()[worst].item():.9g} "
            f"+- {bound.flatten()[worst].item():.3g}"
        )


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float, what: str) -> None:
    """``|actual - expected| <= relative * |expected|``."""
    assert_within(actual, expected, relative * expected.detach().double().cpu().abs(), what)


def assert_mostly_correctly_rounded(actual: torch.Tensor, expected: torch.Tensor, share: float = 0.999) -> None:
    """At least ``share`` of the entries are the nearest number of their dtype to the float64 value."""
    nearest = expected.detach().to(actual.dtype)
    right = (actual.detach().cpu() == nearest.cpu()).double().mean().item()
    if right < share:
        raise AssertionError(f"only {right:.5f} of the entries are correctly rounded, expected {share}")


def assert_same_but_for_neighbours(actual: torch.Tensor, expected: torch.Tensor, share: float, what: str) -> None:
    """The same bits, but for at most ``share`` of the entries (one of few), which are neighbours in their dtype."""
    differs = actual != expected
    assert_within(actual[differs], expected[differs], ulp(expected[differs].double(), expected.dtype), what)
    if differs.sum() > max(1, share * differs.numel()):
        raise AssertionError(f"{what}: {int(differs.sum())} of {differs.numel()} entries differ, expected {share}")


def linear_gradient_bound(logits_path: float, dtype: torch.dtype, roundings: int = 0) -> float:
    """Relative error of a whole gradient of the fused linear loss, given that of the logits path, both against float64.

    The same roundings in another order; and, where chunks are summed up in ``dtype``, one more for each of them, which
    are independent: half an ulp is spread evenly.
    """
    eps = torch.finfo(dtype).eps
    # bf16 and fp16 round the logits, by far the most of it; fp32 and fp64 have only the order of their sums
    same = 1.1 * logits_path + (eps / 8 if dtype in (torch.bfloat16, torch.float16) else 4 * eps)
    return math.hypot(same, math.sqrt(roundings) * eps / math.sqrt(12))
