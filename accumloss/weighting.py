"""Sums over rows that have a loss each: what a weight for each token, and losses that are made row by row, are summed up by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from . import checks, ops, reference
from .arguments import check_in_place, of_op
from .options import LossOptions
from .sums import TokenSums


def check_token_weight(name: str, token_weight: Any, labels: torch.Tensor) -> None:
    if not isinstance(token_weight, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor token_weight (...) or None, got a {type(token_weight).__name__}")
    if token_weight.shape != labels.shape:
        raise RuntimeError(
            f"{name}: expected token_weight of shape {tuple(labels.shape)} as labels, a weight for each of them, got "
            f"{tuple(token_weight.shape)}"
        )
    if token_weight.dtype not in checks.FLOATS:
        raise RuntimeError(
            f"{name}: expected token_weight of a floating dtype, got {token_weight.dtype}; convert it with .float()"
        )


def refuse_token_weight(name: str, token_weight: Any, what: str) -> None:
    """Where it has no meaning, or no way."""
    if token_weight is not None:
        raise ValueError(
            f"{name}: expected no token_weight {what}, got one; weight the rows of token_losses, or leave it out"
        )


def shifted(token_weight: torch.Tensor, shift: int) -> torch.Tensor:
    """The weight of row (..., t) is that of label (..., t + shift); 0 where there is none. (..., T)"""
    if shift == 0:
        return token_weight
    cut = min(shift, token_weight.shape[-1])
    return F.pad(token_weight[..., cut:], (0, cut))


def weighted_sums(
    name: str,
    logits: torch.Tensor,  # (..., V)
    labels: torch.Tensor,  # (...)
    token_weight: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,)
    shift: int,
    options: LossOptions,
    metrics: bool,
    inplace: Any = False,
) -> TokenSums:
    """The sums of a call whose rows have weights: the loss and the total weight are weighted, counts and entropies are not."""
    if inplace == "forward":
        raise ValueError(
            f'{name}: expected no token_weight where inplace="forward", whose gradient is written by one factor for all '
            'rows, got one; use inplace="backward"'
        )
    kwargs = of_op(options, shift, metrics)
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        check_in_place(name, logits, inplace)
        rows = ops.TokenStatisticsInPlace.apply(logits, labels, weight, kwargs)
    else:
        rows = ops.token_statistics(logits, labels, weight, **kwargs)
    labels = reference.shift_labels(labels, shift, options.ignore_index) if labels.dim() else labels
    return sums_of(rows, labels, shifted(token_weight, shift), weight, options.ignore_index, metrics)


def sums_of(
    rows: tuple[torch.Tensor, ...],  # loss, nll, lse, entropy, argmax (...), as token_statistics returns them
    labels: torch.Tensor,  # (...) shifted
    token_weight: torch.Tensor,  # (...) shifted
    weight: torch.Tensor | None,  # (V,)
    ignore_index: int,
    metrics: bool,
) -> TokenSums:
    """loss_sum carries gradients to the rows and to token_weight, total_weight to the latter. Summed up in fp64."""
    loss, nll, _, entropy, argmax = rows
    is_item = labels != ignore_index
    of_rows = torch.where(is_item, token_weight.to(loss.device, loss.dtype), 0.0).double()
    of_classes = of_rows
    if weight is not None:
        classes = torch.where(is_item, labels, 0).long().clamp(0, weight.shape[0] - 1)
        of_classes = of_rows * weight.to(loss.dtype).double()[classes]
    loss_sum = (loss.double() * of_rows).sum().to(loss.dtype)
    sums = TokenSums(loss_sum, is_item.sum(), of_classes.sum().to(loss.dtype))
    if not metrics:
        return sums
    is_correct = (argmax == labels) & is_item & ~nll.isnan()
    entropy_sum = entropy.detach().double().sum().to(loss.dtype)
    return TokenSums(sums.loss_sum, sums.num_items, sums.total_weight, is_correct.sum(), entropy_sum)
