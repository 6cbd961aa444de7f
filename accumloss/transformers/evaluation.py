"""The loss of a whole evaluation set: every term a mean over its items of the set, whatever the batches and the ranks.

Trainer averages the means of the batches, weighted by their rows. Here each term of the loss reports its mean and its items,
batch by batch. The loss of a model may be any sum of multiples of its terms and of a rest: the multiples are found once, by
what the loss of the first batch changes by when a term does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .._compat import not_compiled
from ..sums import TokenSums
from . import counting
from . import step as steps

PROBES = (0.5, 0.125)  # what a term is made larger by, of itself: a loss that is linear in it changes alike by both
LINEAR = 1e-5  # of the loss: how much the two may disagree by


class Amount(NamedTuple):
    """How much a loss that is no sum of terms weighs: times of the set's over."""

    times: torch.Tensor | float
    over: torch.Tensor | float


class _Term:
    """Observes one call of a loss."""

    def __init__(self, evaluation: Evaluation, items: torch.Tensor):
        self.evaluation, self.items = evaluation, items
        self.metrics = evaluation.metrics and not evaluation.means

    @not_compiled
    def __call__(self, loss: torch.Tensor, sums: TokenSums | None) -> torch.Tensor:
        return self.evaluation.observe(loss, self.items, sums)


class Evaluation(steps.Step):
    """The step that an evaluation loop is in; its current micro-batch is the batch at hand.

    Args:
        metrics: whether the first term of each batch also gives TokenSums.num_correct and entropy_sum.
        skips_non_finite: whether batches without a finite loss are left out, as Trainer does.
    """

    is_training = False

    def __init__(self, metrics: bool, skips_non_finite: bool):
        super().__init__([], {}, averaged=1, expected_grad=1.0, over_ranks=lambda total: total, totals={})
        self.metrics, self.skips_non_finite = metrics, skips_non_finite
        self.means: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this batch: mean, items
        self.token_sums: TokenSums | None = None
        self.amount: Amount | None = None
        self.probed: tuple[int, float] | None = None
        self.is_linear = True  # in its terms
        self.num_terms: int | None = None  # of a batch
        self.coefficients: list[float] | None = None  # of the terms in the loss
        self.totals_of_set: torch.Tensor | None = None  # (2 + 3 terms + 3) float64, see add()

    def begin(self, inputs: Any, probed: tuple[int, float] | None = None) -> None:
        """Begins a batch; probed: a term, and by how much of itself it is to be larger than it is."""
        inputs = counting.entries_of(inputs)
        self.window, self.probed = [inputs], probed
        super().begin(inputs)
        self.means, self.token_sums, self.amount = [], None, None
        self.calls = 0

    # What losses ask a step --------------------------------------------------------------------------------------------

    def divisor(
        self,
        labels: torch.Tensor,
        given: Any = None,
        *,
        shift: int = 0,
        ignore_index: int | None = -100,
        length: int | None = None,
        weight: torch.Tensor | None = None,
        is_compiled: bool = False,
        name: str = "",
    ) -> steps.Divisor:
        """The items of the call, whatever was given."""
        self.calls += 1
        if length is not None:
            items = (labels.clamp(0, length) != length).sum().double()
        else:
            items = counting.Rule("labels", shift, ignore_index, weight=weight).total({"labels": labels})
        return steps.Divisor(steps.at_least_one(items), observer=_Term(self, items))

    def observe(self, loss: torch.Tensor, items: torch.Tensor, sums: TokenSums | None = None) -> torch.Tensor:
        index = len(self.means)
        self.means.append((loss.detach().double(), items.to(loss.device)))
        if sums is not None:
            self.token_sums = sums
        if self.probed is None or index != self.probed[0]:
            return loss
        return loss + (self.probed[1] * _size(loss)).to(loss.dtype)

    def part(self, value: torch.Tensor, share: Any) -> torch.Tensor:
        return self.observe(value, torch.as_tensor(share, dtype=torch.float64))

    def see(self, value: torch.Tensor, *_: Any) -> torch.Tensor:
        return value

    # Shares are amounts here: what of the set this batch is, is not known before its end.

    def share_of(self, rule: counting.Rule) -> torch.Tensor:
        return rule.total(self.inputs)

    def share_of_rows(self) -> float:
        return float(counting.num_rows(self.inputs))

    def objects_of_the_step(self) -> float:
        """Losses are sums over boxes or masks, divided by how many this batch has, or by 1."""
        counts = counting.num_objects(self.inputs)
        if counts is not None:
            self.calls += 1
            self.amount = Amount(max(sum(counts), 1), sum(counts))
        return 1.0

    # Adding up ---------------------------------------------------------------------------------------------------------

    def find_coefficients(
        self, loss: torch.Tensor, again: Callable[[tuple[int, float]], torch.Tensor], agree: Callable[..., list[int]]
    ) -> None:
        """Finds how the loss depends on its terms, where that of this batch is finite.

        A loss that is not linear in them (a perplexity) is none that could be put together from theirs: is_linear is false
        then, and no term is taken out of it.

        Args:
            loss: ().
            again: the loss of this batch with a term probed.
            agree: the largest of each number over the ranks, all of which must compute the batch equally often.
        """
        terms = list(self.means)
        is_term = len(terms) == 1 and bool((loss.double() == terms[0][0]) & (terms[0][0] != 0))
        is_finite = bool(torch.isfinite(loss))
        num_terms, differs, not_finite = agree(len(terms), int(not is_term), int(not is_finite))
        if self.num_terms is None:
            self.num_terms = num_terms
        if not_finite:
            return  # another batch will tell
        if not differs:
            self.coefficients = [1.0] * self.num_terms
            return
        coefficients, bends = [], 0
        for term in range(self.num_terms):
            size = _size(terms[term][0]) if term < len(terms) else torch.ones((), dtype=torch.float64)
            found = [((again((term, probe)).double() - loss.double()) / (probe * size)).item() for probe in PROBES]
            coefficients.append(found[0])
            bends |= int(not abs(found[0] - found[1]) * size.item() <= LINEAR * abs(loss.item()))
        self.is_linear = not agree(bends)[0]
        self.coefficients = coefficients if self.is_linear else [0.0] * self.num_terms

    def add(self, loss: torch.Tensor, amount: Amount, is_real: bool = True) -> None:
        """Adds this batch to the set. Without a host sync."""
        assert self.num_terms is not None
        device = loss.device
        loss = loss.detach().double()
        empty = torch.zeros((), dtype=torch.float64, device=device)
        times, over = (torch.as_tensor(value, dtype=torch.float64).to(device) for value in amount)
        row = [loss * times, over]
        for index in range(self.num_terms):
            mean, items = self.means[index] if index < len(self.means) else (empty, empty)
            mean, items = mean.to(device), items.to(device, torch.float64)
            row += [mean * items, items, mean * times]
        sums = self.token_sums
        for value in (None, None, None) if sums is None else (sums.num_items, sums.num_correct, sums.entropy_sum):
            row.append(empty if value is None else value.to(device, torch.float64))
        added = torch.stack(row)
        if not is_real:
            added = torch.zeros_like(added)
        elif self.skips_non_finite:
            added = torch.where(torch.isfinite(loss), added, torch.zeros_like(added))
        self.totals_of_set = added if self.totals_of_set is None else self.totals_of_set + added

    def results(self, over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The loss of the set, and where there are metrics the accuracy and entropy of its items; {} where it had none."""
        if self.totals_of_set is None or self.coefficients is None:
            return {}
        total, amount, *rest = over_ranks(self.totals_of_set).tolist()
        *by_term, items, correct, entropy = rest
        loss = _ratio(total, amount)
        for index, coefficient in enumerate(self.coefficients):
            of_items, term_items, of_batches = by_term[3 * index : 3 * index + 3]
            loss += coefficient * (_ratio(of_items, term_items) - _ratio(of_batches, amount))
        results = {"loss": loss}
        if items:
            results.update(token_accuracy=_ratio(correct, items), token_entropy=_ratio(entropy, items))
        return results


def _size(term: torch.Tensor) -> torch.Tensor:
    """The size of a term, 1 where it is none."""
    size = term.detach().double().abs()
    return torch.where(size > 0, size, torch.ones_like(size))


def _ratio(total: float, items: float) -> float:
    return total / items if items else 0.0
