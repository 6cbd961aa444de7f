"""The losses of heads that call PyTorch's own in their forward: the same names, which find their divisor in a step.

Outside of a Trainer step they are PyTorch's. Inside, a mean is divided by the items of the whole step (step.py), and the
cross-entropies of class indices run on our kernels. Sums, and losses without reduction, stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import losses as core
from . import losses
from . import step as steps


def _is_mean(reduction: str, size_average: Any, reduce: Any) -> bool:
    """Whether a loss is called for a mean inside of a step, which is then divided by what the step holds."""
    if not steps.is_counted():
        return False
    return reduction == "mean" and size_average is None and reduce is None


def _is_by_hand(reduction: str, size_average: Any, reduce: Any) -> bool:
    """Whether a loss is called inside of a step for its sum or its single values, which the caller then averages."""
    is_eager = steps.is_counted() and not torch.compiler.is_compiling()
    return is_eager and reduction in ("sum", "none") and size_average is None and reduce is None


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """``torch.nn.functional.cross_entropy``: input (N, C) or (N, C, ...), target (N) or (N, ...)."""
    is_indices = not target.is_floating_point() and input.dim() > 1 and input.dim() == target.dim() + 1
    if not _is_mean(reduction, size_average, reduce) or not is_indices:
        value = F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing=label_smoothing
        )
        if not is_indices or not _is_by_hand(reduction, size_average, reduce):
            return value
        return steps.see(value, target, reduction, ignore_index, "cross_entropy", weight)
    logits = input if input.dim() == 2 else input.movedim(1, -1)
    # question answering: positions are classes, and those beyond the sequence are clamped to its length and ignored
    length = ignore_index if ignore_index == logits.shape[-1] else None
    divisor = losses.divisor(
        target, None, ignore_index=ignore_index, length=length, weight=weight, name="cross_entropy"
    )
    options = losses.smoothed({"label_smoothing": label_smoothing} if label_smoothing else {})
    given = losses.of_core({"weight": weight, **options}, ignore_index)
    return losses.observed(divisor, core.masked_lm(logits, target, None, losses.known(divisor), *given))


def nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """``torch.nn.functional.nll_loss``: log-probabilities (N, C) or (N, C, ...), target (N) or (N, ...)."""
    if not _is_mean(reduction, size_average, reduce):
        value = F.nll_loss(input, target, weight, size_average, ignore_index, reduce, reduction)
        is_seen = _is_by_hand(reduction, size_average, reduce)
        return steps.see(value, target, reduction, ignore_index, "nll_loss", weight) if is_seen else value
    divisor = losses.divisor(target, None, ignore_index=ignore_index, weight=weight, name="nll_loss")
    if divisor is None:
        return F.nll_loss(input, target, weight, ignore_index=ignore_index)
    total = F.nll_loss(input, target, weight, ignore_index=ignore_index, reduction="sum")
    return divisor.observed(total / divisor.value.to(total.device, total.dtype))


def mse_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torch.nn.functional.mse_loss``."""
    extra = {} if weight is None else {"weight": weight}
    loss = F.mse_loss(input, target, size_average, reduce, reduction, **extra)
    if weight is not None:
        return loss
    if _is_by_hand(reduction, size_average, reduce):
        return steps.see(loss, target, reduction, None, "mse_loss")
    return _over_step(loss, target, "mse_loss") if _is_mean(reduction, size_average, reduce) else loss


def _over_elements(theirs: Any) -> Any:
    """A loss of PyTorch's whose mean is over the elements of its target: (input, target, ..., reduction="mean")."""
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = theirs(*args, **kwargs)
        if not steps.is_counted():
            return value
        given = signature.bind(*args, **kwargs).arguments
        weight = given.get("pos_weight")
        if weight is not None and weight.shape != given["target"].shape and not torch.compiler.is_compiling():
            steps.weigh(weight, theirs.__name__)
        reduction = given.get("reduction", "mean")
        if reduction == "batchmean":  # kl_div: the sum, divided by the rows
            return steps.part(value, lambda step: step.share_of_call(), theirs.__name__)
        old = given.get("size_average"), given.get("reduce")
        if _is_by_hand(reduction, *old):
            return steps.see(value, given["target"], reduction, None, theirs.__name__)
        return _over_step(value, given["target"], theirs.__name__) if _is_mean(reduction, *old) else value

    return loss


l1_loss = _over_elements(F.l1_loss)
smooth_l1_loss = _over_elements(F.smooth_l1_loss)
huber_loss = _over_elements(F.huber_loss)
kl_div = _over_elements(F.kl_div)
binary_cross_entropy = _over_elements(F.binary_cross_entropy)
binary_cross_entropy_with_logits = _over_elements(F.binary_cross_entropy_with_logits)


def _over_step(mean: torch.Tensor, target: torch.Tensor, name: str) -> torch.Tensor:
    """A mean over the elements of target as a part of the step's: times its elements, divided by the step's."""
    divisor = losses.divisor(target, None, ignore_index=None, name=name)
    if divisor is None:
        return mean
    return divisor.observed(mean * (target.numel() / divisor.value).to(mean.device, mean.dtype))


class _Criterion(nn.Module):
    """A loss module of PyTorch's whose class is ours while accumloss is registered; copies and pickles name PyTorch's."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        theirs = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.nn."))
        return object.__new__, (theirs,), vars(self).copy()


class CrossEntropyLoss(_Criterion, nn.CrossEntropyLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(_Criterion, nn.NLLLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class MSELoss(_Criterion, nn.MSELoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse_loss(input, target, reduction=self.reduction)


class L1Loss(_Criterion, nn.L1Loss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(_Criterion, nn.SmoothL1Loss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(_Criterion, nn.HuberLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class KLDivLoss(_Criterion, nn.KLDivLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class BCELoss(_Criterion, nn.BCELoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy(input, target, self.weight, reduction=self.reduction)


class BCEWithLogitsLoss(_Criterion, nn.BCEWithLogitsLoss):
    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(
            input, target, self.weight, pos_weight=self.pos_weight, reduction=self.reduction
        )


_FUNCTIONS = (
    cross_entropy,
    nll_loss,
    mse_loss,
    l1_loss,
    smooth_l1_loss,
    huber_loss,
    kl_div,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
)
_CLASSES = (
    CrossEntropyLoss,
    NLLLoss,
    MSELoss,
    L1Loss,
    SmoothL1Loss,
    HuberLoss,
    KLDivLoss,
    BCELoss,
    BCEWithLogitsLoss,
)
FUNCTIONS: dict[str, Any] = {ours.__name__: ours for ours in _FUNCTIONS}
CLASSES: dict[str, Any] = {ours.__name__: ours for ours in _CLASSES}
