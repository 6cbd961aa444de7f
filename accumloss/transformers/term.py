"""One call of a loss inside of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..sums import widened
from .counting import Rule

if TYPE_CHECKING:
    from .rows import Row


class Term(NamedTuple):
    """What one call of a loss returned inside of a step."""

    value: torch.Tensor  # (), or without a reduction one for each label
    name: str  # of the loss
    rule: Rule | None  # how its items are counted; None: they are rows, or of no known origin
    call: tuple[Any, ...]  # which of the micro-batch's calls it is: kind, number, and which of what one call returns
    reduction: str = "mean"
    share: Any = None  # of the mean over its own items, in what was returned; None: by its rule
    target: torch.Tensor | None = None  # where somebody averages it
    ignore_index: int | None = None
    weight: torch.Tensor | None = None  # of the classes
    more: tuple[torch.Tensor, ...] = ()  # what further calls returned that are parts of the same sum
    site: int = 0  # in the code, where it was called
    row: Row | None = None  # of the micro-batch, whose labels alone it was called with

    def amount(self, coefficient: torch.Tensor, is_wide: bool = False) -> torch.Tensor:
        """What of the loss it is. (), in the widest dtype where is_wide."""
        parts = (
            [(coefficient * value).sum() for value in map(widened, self.more)]
            if is_wide
            else [(coefficient * value).sum() for value in self.more]
        )
        first = widened(coefficient) * widened(self.value) if is_wide else coefficient * self.value
        return sum(parts, first.sum())


def put_together(terms: Sequence[Term], scale: float, like: torch.Tensor) -> tuple[Term, torch.Tensor]:
    """One term of calls that are summed, whose items have one coefficient; and this, in the dtype of another. value is the first's
    alone."""
    target = torch.cat([term.target.flatten() for term in terms if term.target is not None])
    whole = terms[0]._replace(reduction="sum", target=target)
    return whole, torch.full((), scale, dtype=like.dtype, device=like.device)


def unit_of(term: Term, coefficient: torch.Tensor) -> tuple[float, torch.Tensor | None] | None:
    """The one coefficient of all items, and where they are if they are not all: a mask of the value's shape.

    None: the items have different ones.
    """
    if term.reduction == "sum":
        return float(coefficient), None
    items = is_item(term, coefficient)
    used = items & (coefficient != 0)
    values = coefficient[used]
    if not values.numel():
        return 0.0, None
    low, high = float(values.min()), float(values.max())
    if high - low > tolerance(coefficient) * abs(high):
        return None
    return high, None if bool((used == items).all()) else used


def is_item(term: Term, coefficient: torch.Tensor) -> torch.Tensor:
    """Which values of a term without a reduction are not ignored; all where that cannot be said."""
    if term.ignore_index is not None and term.target is not None and term.target.shape == coefficient.shape:
        return term.target != term.ignore_index
    return torch.ones_like(coefficient, dtype=torch.bool)


def tolerance(value: torch.Tensor) -> float:
    return max(1e-5, 4 * torch.finfo(value.dtype).eps)


def has_no_items(term: Term) -> bool:
    if term.reduction == "mean" or term.target is None or term.ignore_index is None:
        return False
    return not bool((term.target != term.ignore_index).any())
