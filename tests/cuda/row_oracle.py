"""Cross-entropy of each row in float64 with the label left out of the sum, and what the CUDA kernels may deviate.

A reference that subtracts the label's logit from the log-sum-exp loses the confident rows: see docs/numerics.md.
"""

from __future__ import annotations

import dataclasses
import math

import torch

U = {torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclasses.dataclass
class Rows:
    loss: torch.Tensor  # (B, T); 0 in ignored rows, as lse, nll, entropy
    lse: torch.Tensor
    nll: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor
    items: torch.Tensor  # (B, T) bool
    weight: torch.Tensor
    grad: torch.Tensor  # (B, T, V)
    loss_bound: torch.Tensor
    nll_bound: torch.Tensor
    grad_bound: torch.Tensor


def rows(
    logits: torch.Tensor,  # (B, T, V)
    labels: torch.Tensor,  # (B, T)
    weight: torch.Tensor | None = None,  # (V,)
    grad: float = 1.0,
    *,
    shift: int = 0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    metrics: bool = False,
) -> Rows:
    B, T, V = logits.shape
    u = U[logits.dtype]
    x = logits.double()
    y = torch.full((B, T), ignore_index, dtype=torch.int64)
    y[:, : max(T - shift, 0)] = labels.long()[:, shift:]
    items = y != ignore_index
    y = y.where(items, 0)
    w = torch.ones(V, dtype=torch.float64) if weight is None else weight.double()
    z = softcap * torch.tanh(logit_scale * x / softcap) if softcap else logit_scale * x
    slope = torch.full_like(x, logit_scale)
    if softcap:
        e = torch.exp(-2 * (logit_scale * x / softcap).abs())
        slope = logit_scale * 4 * e / (1 + e) ** 2
    is_label = torch.arange(V) == y[..., None]
    z_y = z.gather(2, y[..., None])[..., 0]
    others = z.masked_fill(is_label, -math.inf).logsumexp(2) if V > 1 else torch.full_like(z_y, -math.inf)
    others = others.where(~z.isnan().any(2), math.nan)
    d = others - z_y  # nll = log(1 + e^d)
    nll = torch.where(d > 0, d + torch.log1p(torch.exp(-d)), torch.log1p(torch.exp(d)))
    lse = torch.where(d > 1024, others, z_y + nll)  # a label that far below adds nothing, but would swallow digits
    p = torch.exp(z - lse[..., None])
    hard = (1 - label_smoothing) * w[y]
    share = label_smoothing / V
    smooth = share * (w * (lse[..., None] - z)).sum(2) if share else torch.zeros_like(lse)
    loss = hard * nll + smooth + z_loss * lse**2
    terms = (p * z).where(p != 0, 0.0)
    entropy = lse - terms.sum(2) if metrics else torch.zeros_like(lse)
    soft = share * w.sum() + 2 * z_loss * lse
    C = hard + soft
    dz = C[..., None] * p - share * w
    dz_y = soft * torch.exp(-nll) + hard * torch.expm1(-nll) - share * w[y]
    dz = torch.where(is_label, dz_y[..., None], dz)
    gradient = grad * dz * slope
    nan = loss.isnan()
    gradient = gradient.masked_fill(nan[..., None], math.nan)
    correct = (x.argmax(2) == y) & ~nan & items

    # Bounds: 2e-6 of the row loss; 2 (4 + |z - max|) u of the probability; the transform costs z some ulp.
    plain = softcap == 0 and logit_scale == 1
    finite = z.masked_fill(~z.isfinite(), 0.0)
    z_error = (torch.zeros_like(z) if plain else 4 * u * finite.abs()) if V else z
    z_error_max = z_error.amax(2)
    top = z.amax(2, keepdim=True)
    nll_bound = 33 * u * nll + 2 * z_error_max
    loss_bound = hard * nll_bound + z_loss * (2 * lse.abs() * (nll_bound + u * lse.abs()) + u * lse**2)
    if share:
        spread = (w * (lse[..., None] - finite).abs()).mean(2)
        loss_bound = loss_bound + label_smoothing * ((16 + math.log2(V) + V / 512) * u * spread + w.mean() * nll_bound)
    r = 2 * u * (4 + (z - top).abs()) + z_error + z_error_max[..., None] + u * (8 + V / 8192)
    if u < 1e-12:
        r = r + 4 * u * lse.abs()[..., None]  # for float, lse comes in two pieces
    terms = (C.abs()[..., None] * p + share * w) * r.where(p > 0, 0.0) + share * w * 4 * u
    label_terms = soft.abs() * torch.exp(-nll) - hard * torch.expm1(-nll) + share * w[y]
    label_r = 33 * u + 2 * z_error_max
    if u < 1e-12:
        label_r = label_r + u * (others - z_y).abs()  # the rounding of d, which exp(d) shows, is of this function
    grad_bound = torch.where(is_label, (label_terms * label_r)[..., None], terms) * slope
    if not plain:
        grad_bound = grad_bound + (dz * slope).abs() * 16 * u * (
            1 + (logit_scale * x / softcap).abs() if softcap else 1
        )
    info = torch.finfo(logits.dtype)
    half_ulp = gradient.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
    grad_bound = grad_bound * abs(grad) + half_ulp * (1 + 1e-6)

    def mask(t):
        return t.masked_fill(~items, 0.0)

    keep = items[..., None]
    return Rows(
        mask(loss), mask(lse), mask(nll), mask(entropy), correct, items, mask(w[y]),
        gradient.masked_fill(~keep, 0.0), mask(loss_bound), mask(nll_bound), grad_bound.masked_fill(~keep, 0.0),
    )  # fmt: skip
