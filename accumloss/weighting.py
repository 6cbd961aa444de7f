"""Sums over rows that have a loss each: what a weight for each token, and losses that are made row by row, are summed up by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from . import checks, ops, reference
from .arguments import check_in_place, of_op
from .options import LossOptions
from .sums import TokenSums, widened


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
    return sums_of(rows, labels, shifted(token_weight, shift), weight, options, metrics)


def sums_of(
    rows: tuple[torch.Tensor, ...],  # loss, nll, lse, entropy, argmax (...), as token_statistics returns them
    labels: torch.Tensor,  # (...) shifted
    token_weight: torch.Tensor,  # (...) shifted
    weight: torch.Tensor | None,  # (V,)
    options: LossOptions,
    metrics: bool,
) -> TokenSums:
    """loss_sum carries gradients to the rows and to token_weight, total_weight to the latter. Summed up in the widest dtype."""
    loss, nll, lse, entropy, argmax = rows
    is_item = labels != options.ignore_index
    of_rows = torch.where(is_item, token_weight.to(loss.device, loss.dtype), 0.0)
    of_rows = widened(of_rows)
    of_classes = of_rows
    if weight is not None:
        classes = torch.where(is_item, labels, 0).long().clamp(0, weight.shape[0] - 1)
        of_classes = of_rows * widened(weight.to(loss.dtype))[classes]
    loss_sum = (widened(loss) * of_rows).sum().to(loss.dtype)
    z_loss_sum = z_loss_of(lse, of_rows, options, loss.dtype)
    sums = TokenSums(loss_sum, is_item.sum(), of_classes.sum().to(loss.dtype), z_loss_sum=z_loss_sum)
    if not metrics:
        return sums
    is_correct = (argmax == labels) & is_item & ~nll.isnan()
    entropy_sum = widened(entropy.detach()).sum().to(loss.dtype)
    return replace(sums, num_correct=is_correct.sum(), entropy_sum=entropy_sum)


def z_loss_of(
    lse: torch.Tensor, of_rows: torch.Tensor | None, options: LossOptions, dtype: torch.dtype
) -> torch.Tensor | None:
    """What the z-loss of rows with lse (...), 0 where they count nothing, and weights of_rows (...) adds to loss_sum."""
    if options.z_loss == 0:
        return None
    squares = lse * lse if of_rows is None else lse * lse * of_rows
    return (options.z_loss * squares.sum()).to(dtype)


def soft_sums(
    name: str,
    logits: torch.Tensor,  # (..., V)
    targets: torch.Tensor,  # (..., V)
    weight: torch.Tensor | None,  # (V,)
    token_weight: torch.Tensor | None,  # (...)
    options: LossOptions,
    given: dict[str, Any],
) -> TokenSums:
    """The sums of a call against class probabilities: every row is an item. given: what has no meaning then."""
    losses = soft_losses(name, logits, targets, weight, options, given)
    if token_weight is not None:
        check_token_weight(name, token_weight, losses)
    return sums_of_losses(losses, torch.ones_like(losses, dtype=torch.bool), token_weight)


def soft_losses(
    name: str,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    given: dict[str, Any],
) -> torch.Tensor:
    """The loss of each row (...) against class probabilities."""
    for what, value in {**given, "ignore_index": options.ignore_index != -100}.items():
        if value:
            raise ValueError(
                f"{name}: expected no {what} with labels that are class probabilities, got one; pass class indices, or leave it "
                "out"
            )
    if targets.shape != logits.shape:
        raise RuntimeError(
            f"{name}: expected labels that are class probabilities in the shape of logits, {tuple(logits.shape)}, got "
            f"{tuple(targets.shape)} of {targets.dtype}; class indices are int64 or int32"
        )
    kwargs = {key: value for key, value in options.as_kwargs().items() if key != "ignore_index"}
    return ops.soft_cross_entropy(logits, targets, weight, **kwargs)[0]


def sums_of_losses(loss: torch.Tensor, is_item: torch.Tensor, token_weight: torch.Tensor | None) -> TokenSums:
    """The sums of rows (...) that have a loss each, and perhaps a weight: no classes, so no metrics."""
    of_rows = widened(is_item)
    if token_weight is not None:
        of_rows = torch.where(is_item, token_weight.to(loss.device, loss.dtype), 0.0)
        of_rows = widened(of_rows)
    loss_sum = (widened(loss) * of_rows).sum().to(loss.dtype)
    return TokenSums(loss_sum, is_item.sum(), of_rows.sum().to(loss.dtype))
