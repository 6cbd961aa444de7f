"""Losses that are called without a divisor, inside of a step that somebody else counts.

A Trainer that accumloss is registered with counts the items of its step. A loss of ours that code of the user's calls in it
for its own mean, or for a sum that the code then divides, tells of itself here, as PyTorch's losses do whose names are bound
to ours. ``counting`` is None where nobody counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch

from .sums import TokenSums


class Counting(Protocol):
    """Who counts the items of the steps."""

    def mean(
        self, name: str, labels: torch.Tensor, shift: int, ignore_index: int | None, weight: Any, classes: int | None
    ) -> tuple[Any, Callable[[Any], Any]] | None:
        """Of a loss that would be divided by its own items: its divisor (losses.Known), and what is handed the outcome
        (losses.Divided) and returns it. None: no step counts it."""

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
        """A sum (), or a value for each label, that its caller divides; what he is to get in its place."""


counting: Counting | None = None


def seen(
    name: str, sums: TokenSums, labels: torch.Tensor, shift: int, ignore_index: int, weight: torch.Tensor | None
) -> TokenSums:
    """Sums of a call, whose loss_sum is divided by whoever made it."""
    if counting is None:
        return sums
    return replace(sums, loss_sum=counting.summed(name, sums.loss_sum, labels, shift, ignore_index, weight, "sum"))


def seen_rows(
    name: str, value: torch.Tensor, labels: torch.Tensor, shift: int, ignore_index: int, weight: torch.Tensor | None
) -> torch.Tensor:
    """A value for each label, 0 where it is ignored, which whoever made the call averages."""
    if counting is None:
        return value
    return counting.summed(name, value, labels, shift, ignore_index, weight, "none")
