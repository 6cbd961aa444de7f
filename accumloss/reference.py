"""The same losses in plain PyTorch: the specification, and the oracle of the tests. Slow, and large in memory.

The label is left out of the sum of exponentials here too: ``logsumexp(z) - z[y]`` cancels on confident rows, and even
in float64 loses the digits that the kernels keep.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .options import LossOptions


class Rows(NamedTuple):
    """Row by row, in the shape of labels: zeros in ignored rows."""

    loss: torch.Tensor
    lse: torch.Tensor
    nll: torch.Tensor
    weight: torch.Tensor
    correct: torch.Tensor
    entropy: torch.Tensor
    is_item: torch.Tensor


def shift_labels(labels: torch.Tensor, shift: int, ignore_index: int) -> torch.Tensor:
    """Labels (..., T) such that row t has label t + shift; ignore_index where there is none."""
    if shift == 0:
        return labels
    shifted = torch.full_like(labels, ignore_index)
    if shift < labels.shape[-1]:
        shifted[..., :-shift] = labels[..., shift:]
    return shifted


def transform(logits: torch.Tensor, options: LossOptions) -> torch.Tensor:
    """``softcap * tanh(logit_scale * x / softcap)``, or ``logit_scale * x`` without a softcap."""
    z = logits * options.logit_scale
    return options.softcap * torch.tanh(z / options.softcap) if options.softcap > 0 else z


def rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    options: LossOptions | None = None,
    *,
    shift: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Every row's loss and what it is made of, computed in ``dtype``; differentiable any number of times.

    Args:
        logits: (..., V).
        labels: (...) class indices.
        weight: (V,) class weights, or None.
        options: see LossOptions, whose formula this is.
        shift: row (..., t) reads label (..., t + shift).
        dtype: of the computation and the result.
    """
    options = options or LossOptions()
    if logits.dim() < 1 or labels.shape != logits.shape[:-1]:
        raise RuntimeError(
            f"reference.rows: expected labels of shape {tuple(logits.shape[:-1])}, as logits without the classes, got "
            f"{tuple(labels.shape)}"
        )
    num_classes = logits.shape[-1]
    labels = shift_labels(labels.long(), shift, options.ignore_index)
    is_item = labels != options.ignore_index
    y = torch.where(is_item, labels, torch.zeros_like(labels)).unsqueeze(-1)
    z = transform(logits.to(dtype), options)
    w = torch.ones(num_classes, dtype=dtype, device=logits.device) if weight is None else weight.to(dtype)

    is_label, target, others, nll = _of_label(z, y)
    # a label that far below adds nothing, and would swallow the digits of lse: that of a masked class often does
    lse = torch.where(others - target > 1024, others, target + nll)

    surprise = torch.where(is_label, nll.unsqueeze(-1), lse.unsqueeze(-1) - z)  # -log p, (..., V)
    loss = (1 - options.label_smoothing) * w.take(y.squeeze(-1)) * nll
    if options.label_smoothing > 0:
        loss = loss + options.label_smoothing / num_classes * (w * surprise).sum(-1)
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse**2
    p = torch.exp(-surprise)
    entropy = (p * torch.where(p == 0, torch.zeros_like(p), surprise)).sum(-1)  # whose gradient is no NaN either
    correct = (logits.argmax(-1, keepdim=True) == y).squeeze(-1) & ~torch.isnan(nll)

    def items(value: torch.Tensor) -> torch.Tensor:
        return torch.where(is_item, value, torch.zeros_like(value))

    weights = items(w.take(y.squeeze(-1)))
    return Rows(items(loss), items(lse), items(nll), weights, items(correct), items(entropy), is_item)


def _of_label(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of logits (..., V) and a class for each (..., 1): where it is (..., V), its logit, the logsumexp of the others, and its
    negative log-probability, with its digits where that is next to nothing."""
    is_label = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, y, True)
    target = z.gather(-1, y).squeeze(-1)
    others = torch.logsumexp(z.masked_fill(is_label, -torch.inf), dim=-1)
    if z.shape[-1] == 1:
        return is_label, target, others, target * 0
    nll = torch.logaddexp(torch.zeros_like(others), others - target)
    nll = torch.where(torch.isneginf(target), torch.where(torch.isneginf(others), torch.nan, torch.inf), nll)
    return is_label, target, others, nll


def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    options: LossOptions | None = None,
    *,
    shift: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, ...]:
    """The outputs of ``torch.ops.accumloss.token_statistics(..., metrics=True)``; arguments as in rows()."""
    r = rows(logits, labels, weight, options, shift=shift, dtype=dtype)
    return r.loss, r.nll, r.lse, r.entropy, torch.where(r.is_item, logits.argmax(-1), -1)


def distillation(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    beta: float = 0.5,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The loss of each row, of ``torch.ops.accumloss.distillation``: a generalized Jensen-Shannon divergence.

    With probabilities s of the student, t of the teacher and m = (1 - beta) s + beta t it is beta KL(t | m) + (1 - beta)
    KL(s | m); for beta 0 its limit over beta, KL(t | s), for beta 1 KL(s | t). A class of probability 0 adds nothing.
    """
    log_s = (student_logits.to(dtype) * logit_scale).log_softmax(-1)
    log_t = (teacher_logits.to(dtype) * logit_scale).log_softmax(-1)

    def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        p = log_p.exp()
        return (p * torch.where(p == 0, 0.0, log_p - log_q)).sum(-1)

    if beta == 0:
        loss = divergence(log_t, log_s)
    elif beta == 1:
        loss = divergence(log_s, log_t)
    else:
        is_none = torch.isneginf(log_s) & torch.isneginf(log_t)  # whose logarithm would have no gradient
        of_s, of_t = (torch.where(is_none, 0.0, log_p) for log_p in (log_s, log_t))
        log_m = torch.logaddexp(of_s + math.log1p(-beta), of_t + math.log(beta))
        loss = beta * divergence(log_t, log_m) + (1 - beta) * divergence(log_s, log_m)
    return torch.where(labels != ignore_index, loss, 0.0)


def soft_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None = None,
    options: LossOptions | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The loss of each row against class probabilities targets (..., V), of ``torch.ops.accumloss.soft_cross_entropy``."""
    options = options or LossOptions()
    e, num_classes = options.label_smoothing, logits.shape[-1]
    z = transform(logits.to(dtype), options)
    q = targets.to(dtype) * (1 - e) + e / num_classes
    if weight is not None:
        q = q * weight.to(dtype)
    is_label, _, _, nll = _of_label(z, targets.argmax(-1, keepdim=True))
    lse = torch.logsumexp(z, dim=-1)
    surprise = torch.where(is_label, nll.unsqueeze(-1), lse.unsqueeze(-1) - z)
    loss = (q * torch.where(q == 0, 0.0, surprise)).sum(-1)
    return loss + options.z_loss * lse**2 if options.z_loss > 0 else loss


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None = None,
    options: LossOptions | None = None,
    *,
    shift: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, ...]:
    """The outputs of ``torch.ops.accumloss.cross_entropy(..., metrics=True)``; arguments as in rows()."""
    r = rows(logits, labels, weight, options, shift=shift, dtype=dtype)
    sums = (r.loss.sum(), r.is_item.sum(), r.weight.sum(), r.lse, r.correct.sum(), r.entropy.sum(), r.nll)
    return sums
