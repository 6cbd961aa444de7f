"""Losses of accumloss itself that code of the step calls: in a compute_loss, in a module, as somebody's ``loss_function``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .. import inside
from .. import losses as core
from ..parallel import is_dtensor
from . import losses
from . import step as steps
from .registration import Patches


class OfSteps:
    """Counts by the step that is current (accumloss.inside.Counting)."""

    def mean(
        self, name: str, labels: torch.Tensor, shift: int, ignore_index: int | None, weight: Any, classes: int | None
    ) -> tuple[Any, Callable[[Any], Any]] | None:
        if not steps.is_counted() or is_dtensor(labels):
            return None
        length = ignore_index if ignore_index == classes else None  # positions beyond the sequence
        divisor = losses.divisor(
            labels, None, shift=shift, ignore_index=ignore_index, length=length, weight=weight, name=name
        )
        if not isinstance(divisor, steps.Divisor):
            return None
        return losses.known(divisor), functools.partial(_observed, divisor)

    def summed(
        self,
        name: str,
        value: torch.Tensor,
        labels: torch.Tensor,
        shift: int,
        ignore_index: int,
        weight: Any,
        reduction: str,
    ) -> torch.Tensor:
        if not steps.is_counted() or torch.compiler.is_compiling() or is_dtensor(value) or is_dtensor(labels):
            return value
        return steps.see(value, labels, reduction, ignore_index, name, weight, shift)


def _observed(divisor: steps.Divisor, divided: core.Divided) -> core.Divided:
    return core.Divided(losses.observed(divisor, divided), divided.sums)


OF_STEPS = OfSteps()


def install(patches: Patches) -> None:
    patches.bind(inside, "counting", OF_STEPS)
