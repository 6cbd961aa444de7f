"""What the ranks of a step tell each other: which losses they compute, and how many items each has over all of them.

They meet where all of them come by, and nowhere else: when a window is fetched, and in the first, second, fourth, eighth ...
window at the end of each compute_loss. A loss that only some ranks compute keeps none of the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ..sums import at_least_one
from .counting import Rule
from .terms import UNKNOWN, Fit, Schemes, rule_of_scheme

if TYPE_CHECKING:
    from .step import Step

Key = tuple[Any, str]  # a call of a loss, and the entry of its labels: each rank counts by the rule that it has found

DISAGREE = "the ranks divide a loss that is averaged by hand by different things"
ALONE = (
    "a loss was computed that no window before had on any rank: in this one its items are those of its own rank, as though "
    "the others had as many"
)


class Alone(NamedTuple):
    """A total that a loss was divided by before the other ranks were asked."""

    rule: Rule
    total: torch.Tensor
    call: Any  # of the terms that were divided by it


class Said(NamedTuple):
    """What one rank has computed in a micro-batch, without tensors on a device."""

    counts: dict[Key, Rule]
    fits: dict[Any, Fit]
    rest: tuple[float, float] | None  # of its loss without its terms, and the size of that; where it was looked at


def held(rule: Rule, batches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The items of a rule in these micro-batches; 0 in those that lack its entries, as another rank's may. () float64."""
    keys = [key for key in (rule.key, rule.mask, rule.length_of) if key is not None]
    counts = [rule.total(batch) for batch in batches if all(isinstance(batch.get(key), torch.Tensor) for key in keys)]
    return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.float64)


def _key(call: Any, rule: Rule) -> Key:
    return call, rule.key


def _on_cpu(rule: Rule) -> Rule:
    return rule if rule.weight is None else rule._replace(weight=rule.weight.detach().cpu())


def _counted_by(scheme: str, fits: Sequence[Fit]) -> list[Rule]:
    """How the items are counted of a loss that is averaged by hand."""
    rules = [rule_of_scheme(fit.rule, scheme) for fit in fits if fit.rule is not None]
    return [rule for rule in rules if rule is not None]


class Exchange:
    """Of one Trainer on one rank.

    Attributes:
        rules: what is counted when a window is fetched: the same keys in the same order on all ranks. Class weights are this
            rank's own where it has computed the loss itself.
        is_open: whether the ranks meet at the end of each compute_loss of this window.
    """

    def __init__(self) -> None:
        self.rules: dict[Key, Rule] = {}
        self.is_open = True
        self._windows = 0
        self._is_wanted = False  # by this rank, that the next but one is open
        self._asked: torch.Tensor | None = None  # on how many ranks that was so, when the last window was fetched

    def fetch(
        self,
        batches: Sequence[Mapping[str, Any]],
        totals: dict[Any, Any],
        over_all: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Counts the items of a window for all losses that any rank has computed so far. Every rank calls it.

        Args:
            totals: of the window; gets what was counted.
            over_all: adds counts (n,) up over the ranks.
        """
        self._windows += 1
        is_asked = self._asked is not None and bool(self._asked)
        self.is_open = is_asked or self._windows & (self._windows - 1) == 0
        wanted = torch.tensor(float(self._is_wanted), dtype=torch.float64)
        self._asked, *found = self._counted(batches, list(self.rules.values()), over_all, wanted)
        self._is_wanted = False
        self._keep(totals, self.rules, found)

    @staticmethod
    def _counted(batches: Any, rules: Sequence[Rule], over_all: Any, *more: torch.Tensor) -> Sequence[torch.Tensor]:
        counts = [*more, *(held(rule, batches) for rule in rules)]
        device = counts[-1].device
        return over_all(torch.stack([count.to(device) for count in counts])).unbind()

    @staticmethod
    def _keep(totals: dict[Any, Any], rules: Mapping[Key, Rule], found: Sequence[torch.Tensor]) -> None:
        for (key, rule), total in zip(rules.items(), found, strict=True):
            totals[key] = totals[key[0]] = rule, at_least_one(total)

    def is_open_to(self, step: Step) -> bool:
        """Whether the ranks have still to meet in this micro-batch."""
        return self.is_open and not step.is_settled

    def total(self, step: Step, rule: Rule, call: Any, of_terms: Any) -> torch.Tensor:
        """The items of the whole step for this call of a loss. () float64, at least 1.

        As long as only this rank knows of the call, it is as though all others had as many items: settle() corrects that,
        and where this window is not open it is told.

        Args:
            of_terms: the call of the terms that are divided by it, where that is another.
        """
        key = _key(call, rule)
        counted, total = step.totals.get(key, (None, None))
        is_open = self.is_open_to(step)
        if key in self.rules and self.rules[key] != rule:
            self.rules[key] = rule  # the next window is counted by it
        if counted is None and not is_open:
            self._is_wanted = True
            counted, total = step.totals.get(call, (None, None))  # by another rule
            if counted is not None and not bool(held(counted, step.window)):
                counted = None
        if counted is not None:
            return (
                total if rule == counted else total * held(rule, step.window) / at_least_one(held(counted, step.window))
            )
        if key in step.alone:
            return step.alone[key].total
        total = at_least_one(held(rule, step.window)) * step.num_groups
        if is_open:
            step.alone[key] = Alone(rule, total, of_terms)
        else:
            step.totals[key] = rule, total
            step.ambiguous.add(ALONE)
        return total

    def settle(self, step: Step, schemes: Schemes, rest: tuple[float, float] | None) -> dict[Any, torch.Tensor]:
        """Once in each micro-batch of an open window: tells what this rank has computed, and counts what any has.

        Every rank calls it, at the end of its compute_loss, or of its training_step where that called none.

        Returns:
            What the terms of a call are to be multiplied by, which were divided by a total of this rank alone.
        """
        step.is_settled = True
        mine = {key: alone.rule for key, alone in step.alone.items()}
        for i, weight in enumerate(step.measured.rest):
            if isinstance(weight, Rule):
                mine[_key(("the rest", i), weight)] = weight
        fits = schemes.take_new()
        own = Said(
            {key: _on_cpu(rule) for key, rule in mine.items()},
            {call: fit._replace(rule=fit.rule and _on_cpu(fit.rule)) for call, fit in fits.items()},
            rest,
        )
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, own)
        step.rests_of_ranks = [one.rest for one in said]
        wanted: dict[Key, Rule] = {}
        for one in said:
            wanted.update({key: rule for key, rule in one.counts.items() if key not in wanted})
        for call in dict.fromkeys(call for one in said for call in one.fits):
            theirs = [one.fits[call] for one in said if call in one.fits]
            scheme = schemes.agree(call, theirs)
            if scheme == UNKNOWN and any(fit.schemes for fit in theirs):
                step.ambiguous.add(DISAGREE)
            for counted in _counted_by(scheme, theirs):
                wanted.setdefault(_key(call, counted), counted)
            for counted in _counted_by(scheme, [fits[call]] if call in fits else []):
                mine[_key(call, counted)] = counted
        new = {key: mine.get(key, rule) for key, rule in wanted.items() if key not in self.rules}
        if new:
            self.rules.update(new)
            self._keep(step.totals, new, self._counted(step.window, list(new.values()), step.over_all))
        corrections = {
            alone.call: alone.total / step.totals[key][1].to(alone.total.device) for key, alone in step.alone.items()
        }
        step.alone.clear()
        return corrections
