"""The optimizer step that a Trainer is in: the micro-batches it holds, and what each term of the loss is divided by.

Trainer averages the losses of the k micro-batches of a step, and data-parallel training the gradients of its ranks. A
term whose items are spread over all of them is therefore reported as ``averaged * sum / N``: averaged = k x ranks, N = the
term's items of the whole step. N is counted in the micro-batches that Trainer has prefetched, by the entry that the loss
was given as labels: what a loss averages over is read from the call, not from the name of the model.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

from .._compat import not_compiled
from ..linear import ValidCount
from ..reference import shift_labels
from ..sums import TokenSums, at_least_one, widened
from . import sites
from .counting import (
    COUNTED,
    Counted,
    Origin,
    Rule,
    counted_in_memory,
    likely_origins,
    may_be_labels,
    num_objects,
    num_rows,
    reshaping_origins,
    same_memory,
)
from .exchange import Alone, Exchange
from .rows import row_of
from .terms import (
    ACTED_ON,
    NOT_LOOKED_AT,
    ROWS_WEIGH,
    SUM_WEIGHS,
    Measured,
    Schemes,
    Term,
    Weight,
    is_contrastive,
    is_of_pairs,
)


class Observer(Protocol):
    """Gets to see each loss that is divided, and what takes its place is what it returns."""

    @property
    def metrics(self) -> bool:
        """Whether to compute the metrics of TokenSums."""

    def __call__(self, loss: torch.Tensor, sums: TokenSums | None) -> torch.Tensor:
        """loss (), divided; sums, with metrics, where they are wanted and the loss is a cross-entropy."""


class Divisor(NamedTuple):
    """What the sum of a term is divided by, and who sees the quotient."""

    value: torch.Tensor  # () > 0, on any device
    expected_grad: float = 1.0  # the gradient that will come back to the quotient
    observer: Observer | None = None

    def observed(self, loss: torch.Tensor, sums: TokenSums | None = None) -> torch.Tensor:
        """The loss, or what the observer puts in its place."""
        return loss if self.observer is None else self.observer(loss, sums)


class _Recorder:
    """Observes the losses of a micro-batch in eager mode: each is a term of what compute_loss returns."""

    def __init__(self, step: Step):
        self.step = step

    @property
    def metrics(self) -> bool:
        return self.step.observer is not None and self.step.observer.metrics

    @not_compiled
    def __call__(self, loss: torch.Tensor, sums: TokenSums | None) -> torch.Tensor:
        observer = self.step.observer
        return self.step.record(loss if observer is None else observer(loss, sums))


CHANGED = (
    "labels were changed after the micro-batches were fetched, and not in each alike: how many the step has is not known "
    "before its end; change them in the collator"
)


class Step:
    """One micro-batch of an optimizer step, while its loss is computed.

    Args:
        window: the micro-batches of the step on this rank.
        inputs: the entries of this micro-batch, as the model gets them.
        averaged: calls that are averaged into the step: its micro-batches (where Trainer divides by them) x ranks.
        expected_grad: what will come back to the loss in backward.
        over_ranks: makes a count of this rank one of all data-parallel ranks.
        totals: counts of this window that are known already.
        origins: of the labels of earlier calls, where only one was possible.
        over_all: the same, where Trainer averages over no ranks too.
        gathers: whether over_ranks waits for the other ranks.

    Attributes:
        exchange: what the ranks tell each other of the losses that compute_loss calls. Others they count together, and so
            must call equally often, whatever each of them finds; and all of a known Trainer's, which has none.
    """

    is_training = True
    trainer: Any = None  # whose step it is
    model: Any = None  # which it trains, without what is wrapped around it
    known: Any = None  # what is written down of its Trainer (known.Known)
    measured = Measured()  # what its loss was measured to average over
    main: Rule | None = None  # what Trainer counts
    here: Mapping[str, Any] | None = None  # this micro-batch in the window: labels as they were when it was fetched
    index = 0  # of the micro-batch in the window
    fetched: Mapping[str, Any] = {}
    counts: Sequence[Counted] = ()  # of its labels, for the host
    micro_batches = 1  # of this step; Trainer's own count says 1 while compute_loss runs
    asked = 1  # of a full one
    num_items_in_batch: torch.Tensor | None = None  # what the model was given under this name
    items: Any = None  # what compute_loss was given under it (objective.Items)
    among = 1  # losses of ranks that are averaged, where what compute_loss returns is not multiplied by them
    num_groups = 1  # of ranks that hold different micro-batches
    num_ranks = 1  # that the gradients are averaged over
    num_replicas = 1  # of nn.DataParallel, each of which has a chunk of the micro-batch
    of_replicas = 1  # as many see a part of the step each, where this is one's
    chunks: Sequence[Mapping[str, Any]] = ()  # of the entries, where this is the step as a replica sees it
    label_smoothing = 0.0
    observer: Observer | None = None  # of the losses that are divided here
    is_watched = False
    is_watched_for_ambiguity = False
    # what has been seen so far
    raw: Any = None  # what compute_loss returned
    depth = 0  # of compute_loss, which may call another
    is_computed = False  # whether a compute_loss was called
    is_settled = False  # whether the ranks have told each other of it
    rests_of_ranks: Sequence[tuple[float, float] | None] = ()  # what they said of their losses without the terms
    calls = 0  # losses of ours
    smoothed = 0  # of them, those that label_smoothing applied to
    unknown = 0  # of them, those whose labels are of no known origin
    found: tuple[str, Rule | None] = "", None  # of the call that is to be recorded next
    share_found: Any = None  # where it is no matter of its rule
    by_hand = 0  # calls of PyTorch's losses that somebody averages
    sums = 0  # of them, those with reduction="sum"
    has_unknown_sums = False  # of them, some that were found to be divided by nothing that is known
    is_of_objects = False  # sums over boxes or masks, which are divided by those of the step
    is_known = False  # how the loss depends on the micro-batches, though no loss of ours computed it

    def __init__(
        self,
        window: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
        averaged: float,
        expected_grad: float,
        over_ranks: Callable[[torch.Tensor], torch.Tensor],
        totals: dict[Any, Any],
        origins: dict[Any, Origin] | None = None,
        gathers: bool = False,
        over_all: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.window = window
        self.inputs = inputs
        self.averaged = averaged
        self.expected_grad = expected_grad
        self.over_ranks = over_ranks
        self.over_all = over_ranks if over_all is None else over_all
        self.totals = totals
        self.origins = {} if origins is None else origins
        self.gathers = gathers
        self.exchange: Exchange | None = None
        self.alone: dict[Any, Alone] = {}  # what was divided by before the other ranks were asked
        self.compared: dict[Any, Rule] = totals.setdefault(
            "compared", {}
        )  # of this window: call -> what its labels fitted
        self.ambiguous: set[str] = set()  # where several things fitted, which now are not alike
        self.coupled: set[str] = set()  # why no split of the batch can be exact
        self.doubts: dict[Any, tuple[int, str]] = {}  # by call: what would be unknown or coupled
        self.versions: dict[str, int] = {}  # of the entries of inputs, before anything ran
        self.terms: list[Term] = []  # what losses of ours returned, and PyTorch's that somebody averages by hand
        self.schemes = Schemes()  # the Trainer's, of what is averaged by hand
        self.place_found: dict[str, Any] = {}  # of that call: Term's site, row, ignore_index and weight
        self.calls_at: dict[int, int] = {}  # how many losses were called at a site
        self.recorder = _Recorder(self)
        self.thread = threading.get_ident()
        self.replicas: dict[int, Step] = {}  # the step as those threads see it

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Takes inputs as the entries of this micro-batch from here on, as they are before anything runs."""
        if len(inputs) == len(self.inputs) and all(self.inputs.get(key) is value for key, value in inputs.items()):
            return  # begun with already, by who calls this one
        known = {id(self.inputs[key]): version for key, version in self.versions.items() if key in self.inputs}
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        self.versions = {key: known.get(id(value), value._version) for key, value in tensors.items()}
        self.inputs = dict(inputs)  # somebody may take entries out

    def record(self, loss: torch.Tensor) -> torch.Tensor:
        """Keeps what a loss of ours returned, for who looks at what they are made into.

        While a Check looks at them the caller gets a copy: he may add to it in place.
        """
        name, rule = self.found
        call: tuple[Any, ...] = "mean", self.calls
        several = sum(term.call[:2] == call for term in self.terms)  # a head and its auxiliary head
        call = (*call, several) if several else call
        self.terms.append(Term(loss, name, rule, call, share=self.share_found, **self.place_found))
        self.found, self.share_found, self.place_found = ("", None), None, {}
        return loss.clone() if self.is_watched else loss

    def see(
        self,
        value: torch.Tensor,
        target: torch.Tensor,
        reduction: str,
        ignore_index: int | None,
        name: str,
        weight: Any,
        shift: int = 0,
    ) -> torch.Tensor:
        """Keeps what a loss returned that its caller averages; he gets a copy, which he may write over."""
        self.sums += reduction == "sum"
        self.by_hand += 1
        site = sites.site()
        turn = self.calls_at[site] = self.calls_at.get(site, 0) + 1
        call = "by hand", (site, turn)
        is_part = not self.is_watched and self.schemes.is_part(call, site)
        is_left = not (self.is_watched or is_part or self.schemes.of_call(call, site) in ACTED_ON)
        self.has_unknown_sums |= is_left and reduction == "sum"
        if is_left and self.window and value.requires_grad and self.schemes.is_new(call, site):
            self.ambiguous.add(NOT_LOOKED_AT.format(name))
        if is_left or self.is_of_objects or not self.window or not value.requires_grad:
            return value
        if weight is not None:
            self.weigh(call, weight, name)
        is_of_row = site in self.schemes.loops
        row = row_of(target, self.inputs) if self.is_watched else None
        is_of_row = is_of_row or (row is not None and num_rows(self.inputs) > 2)
        unknown = self.unknown
        rule = None if is_part or is_of_row else self._rule(target, shift, ignore_index, None, call)
        target = aligned(target, shift, ignore_index)
        is_of_pairs = rule is None and not is_part and not is_of_row and self._is_of_pairs(target)
        if is_of_pairs or self.unknown != unknown:  # unless it is found to be a part of one sum
            why = f"{name} compares the rows of its micro-batch with each other" if is_of_pairs else ""
            self.doubts[call], self.unknown = (self.unknown - unknown, why), unknown
        rule = rule if rule is None else rule.weighted(weight)
        place = {"ignore_index": ignore_index, "weight": weight, "site": site, "row": row}
        self.terms.append(Term(value, name, rule, call, reduction, target=target, **place))
        return value.clone()

    def rule_of_memory(self, targets: Sequence[torch.Tensor], ignore_index: int | None) -> Rule | None:
        """How the items of several calls are counted whose labels are views of one entry, and hold each item of it once."""
        entries, changed = self._entries()
        for key, entry in entries.items():
            if key in changed or not may_be_labels(key) or type(entry) is not torch.Tensor or not entry.is_contiguous():
                continue
            held = counted_in_memory(targets, entry)
            if held is None or bool((held > 1).any()):
                continue
            is_item = torch.ones_like(held, dtype=torch.bool) if ignore_index is None else entry != ignore_index
            if not bool((is_item & (held == 0)).any()):
                return Rule(key, 0, ignore_index)
            columns = held.reshape(-1, held.shape[-1]).any(0).nonzero().flatten().tolist()
            first, last = columns[0], columns[-1] + 1
            if not bool((is_item & (held == 0))[..., last:].any()):
                last = held.shape[-1]  # cut off where the longest row ends
            if held.dim() > 1 and not bool((is_item & (held == 0))[..., first:last].any()):
                return Rule(key, first, ignore_index, last=held.shape[-1] - last)
        return None

    def rule_of_parts(self, target: torch.Tensor, first: Term) -> Rule | None:
        """How the items of several calls are counted that are parts of one sum, of which this is the first."""
        rule = self._rule_of(target, 0, first.ignore_index, None, ("parts", first.call))
        return None if rule is None else rule.weighted(first.weight)

    def take_doubts(self) -> None:
        """What speaks against losses that are averaged by hand, and are no parts of one sum."""
        for unknown, why in self.doubts.values():
            self.unknown += unknown
            self.coupled |= {why} - {""}
        self.doubts.clear()

    def weigh(self, call: Any, weight: torch.Tensor, name: str) -> None:
        """Looks whether a loss has the same class weights in all micro-batches: the one batch would have others else."""
        if self.is_watched and not self.chunks and not self.schemes.is_constant(call, weight):
            self.coupled.add(f"the class weights of {name or 'a loss'} are others in each micro-batch")

    def _is_of_pairs(self, target: torch.Tensor) -> bool:
        rows = num_rows(self.inputs)
        classes = getattr(getattr(self.model, "config", None), "num_labels", None)
        return is_of_pairs(target, rows) and rows != classes

    def is_given(self, value: Any) -> bool:
        """Whether a num_items_in_batch is the one that Trainer, or we in its place, handed in."""
        if value is None or value is self.num_items_in_batch or (self.items is not None and value is self.items):
            return True
        ours = self.num_items_in_batch
        if not self.chunks or ours is None or not isinstance(value, torch.Tensor) or not value.numel():
            return False
        return float(value.reshape(-1)[0]) == float(ours.reshape(-1)[0])  # a replica gets a copy

    # nn.DataParallel ---------------------------------------------------------------------------------------------------

    def as_seen(self) -> Step:
        """The step as the thread sees it that asks: a replica of nn.DataParallel calls losses on a chunk of the micro-batch,
        beside the others."""
        thread = threading.get_ident()
        if self.num_replicas == 1 or thread == self.thread:
            return self
        seen = self.replicas.get(thread)
        if seen is None:
            seen = copy.copy(self)
            seen.terms, seen.coupled, seen.compared, seen.calls_at = [], set(), {}, {}
            seen.recorder, seen.num_replicas = _Recorder(seen), 1
            seen.smoothed = seen.unknown = seen.sums = 0
            seen.averaged = self.averaged * self.num_replicas  # the losses of the replicas are averaged
            seen.of_replicas = self.num_replicas
            tensors = {k: v for k, v in self.inputs.items() if isinstance(v, torch.Tensor) and v.dim()}
            chunked = {key: value.chunk(self.num_replicas) for key, value in tensors.items()}
            count = min((len(chunks) for chunks in chunked.values()), default=0)
            seen.chunks = [{key: chunks[n] for key, chunks in chunked.items()} for n in range(count)]
            self.replicas[thread] = seen
        return seen

    def collect(self) -> None:
        """Takes over what the replicas have seen, at the end of their forward."""
        for seen in self.replicas.values():
            self.calls, self.by_hand = max(self.calls, seen.calls), max(self.by_hand, seen.by_hand)
            self.smoothed, self.unknown = self.smoothed + seen.smoothed, self.unknown + seen.unknown
            self.sums += seen.sums
            self.coupled |= seen.coupled
            self.is_of_objects |= seen.is_of_objects
        self.replicas.clear()

    def _entries(self) -> tuple[dict[str, torch.Tensor], set[str]]:
        """The tensors of this micro-batch that labels may come from, and which of them have been written over since.

        Of those the copy is taken that was made when the window was fetched. Entries that somebody took out of the inputs
        are there as well.
        """
        here = self.window[0] if self.here is None else self.here
        entries = {key: value for key, value in self.inputs.items() if isinstance(value, torch.Tensor)}
        entries = {key: value for key, value in entries.items() if key in here}
        changed = {key for key, value in entries.items() if value._version != self.versions.get(key, value._version)}
        if self.here is not None:
            entries.update({key: here[key].to(entries[key].device) for key in changed})
            entries.update(
                {key: v for key, v in here.items() if key not in self.inputs and isinstance(v, torch.Tensor)}
            )
        return dict(
            sorted(entries.items(), key=lambda entry: not may_be_labels(entry[0]))
        ), changed  # input_ids may be equal

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
    ) -> Any:
        """The num_items_in_batch of a loss over these labels, which may be any reshaped view or copy of an entry.

        ``given``, the num_items_in_batch that the loss was called with, wins where it is not what Trainer itself passed.
        Labels that are in no entry count as Trainer's own do if they are as many, decided on the device; else the call is
        a mean over its items, which weighs in the step as its rows do. None: the mean of the call.
        """
        self.calls += 1
        if not self.window or not self.is_given(given):
            return given
        observer = self.observer if is_compiled else self.recorder
        self.found, site = (name, None), 0 if is_compiled else sites.site()
        self.place_found = {"site": site, "ignore_index": ignore_index, "weight": weight}
        if weight is not None and not is_compiled:
            self.weigh(("mean", self.calls), weight, name)
        matched = self._matched(labels, weight) if weight is not None else None
        if matched is not None:
            return Divisor(matched, self.expected_grad, observer)
        measured = dict(self.measured.calls).get(("mean", self.calls)) if self.measured.calls else None
        is_of_row = site in self.schemes.loops
        if self.is_watched and site and length is None:
            row = row_of(labels, self.inputs)
            self.place_found["row"] = row
            is_of_row = is_of_row or (row is not None and num_rows(self.inputs) > 2)  # of two it may be a half
        is_looked_for = not is_of_row and (not measured or length is not None)
        turn = self.calls_at[site] = self.calls_at.get(site, 0) + 1 if site else self.calls
        unknown = self.unknown
        rule = self._rule(labels, shift, ignore_index, length, ("mean", site, turn)) if is_looked_for else None
        if rule is None and is_looked_for and not measured and ignore_index is None and length is None:
            rule = self._rule_of_size(labels)
        if rule is None and measured and length is None:
            here = at_least_one(Rule("labels", shift, ignore_index, weight=weight).total({"labels": labels}))
            self.share_found = self.share_of_weights(measured, ("measured", self.calls), ("mean", self.calls))
            return Divisor(widened(here / self.share_found), self.expected_grad, observer)
        main = None if ignore_index is None or length is not None or is_of_row else self.main
        counted = main if rule is None else rule
        total = self._total_of_call(None if counted is None else counted.weighted(weight), is_compiled=is_compiled)
        if rule is not None and total is not None:
            self.found = name, rule.weighted(weight)
            more = self._changed(rule.weighted(weight))
            divisor = self._per_call(total)
            divisor = divisor if more is None else divisor.to(more.device) * more
            if self.is_watched and site and num_rows(self.inputs) <= 2:  # it may be one of a loop over rows
                here = at_least_one(self.held(rule.weighted(weight)))
                self.share_found = here / divisor.to(here.device)
            return Divisor(divisor, self.expected_grad, observer)
        if length is not None:
            self.unknown += 1
            return None
        of_rows = ignore_index is None and self.are_alike_in_rows(labels, self.calls)
        self.unknown += int((main is None or total is None) and not of_rows)
        is_looked_at, coupled = self.is_watched and not is_compiled, ""
        if is_looked_at and not is_of_row and is_contrastive(labels, num_rows(self.inputs)):
            coupled = f"{name or 'a loss'} tells each row apart from the others of its micro-batch"
            main = None
        if is_looked_at and ignore_index is None and self._is_of_pairs(labels):
            coupled = f"{name or 'a loss'} compares the rows of its micro-batch with each other"
        if is_looked_at and not self.chunks:  # unless a loop over rows is found to have called it
            self.doubts["mean", self.calls], self.unknown = (self.unknown - unknown, coupled), unknown
        else:
            self.coupled |= {coupled} - {""}
        here = Rule("labels", shift, ignore_index, weight=weight).total({"labels": labels})
        mean = at_least_one(here) / self.share_of_rows()
        if main is None or total is None:
            return Divisor(mean, self.expected_grad, observer)
        fits = [
            here == main.weighted(weight).total(entries).to(here.device) for entries in self.chunks or [self.inputs]
        ]
        is_main = torch.stack(fits).any()
        more = self._changed(main.weighted(weight))
        if self.is_watched and not is_compiled:
            if not is_main:
                more_unknown, why = self.doubts.get(("mean", self.calls), (0, ""))
                self.doubts["mean", self.calls] = more_unknown + 1, why
            self.found = name, main.weighted(weight) if is_main else None
        step = self._per_call(total).to(here.device) * (1.0 if more is None else more.to(here.device))
        return Divisor(torch.where(is_main, step, mean), self.expected_grad, observer)

    def num_valid(self, labels: torch.Tensor, ignore_index: int) -> ValidCount | None:
        """How many of these labels count or more, where they are an entry as it was fetched. Nothing waits here."""
        if ignore_index != COUNTED:
            return None
        return next((counted.valid for counted in self.counts if counted.is_of(labels)), None)

    def total(self, rule: Rule) -> torch.Tensor:
        """The items of the whole step by a rule, 1 where there are none. Counted when it is first asked for in a window."""
        if rule not in self.totals:
            self.totals[rule] = at_least_one(self.over_ranks(self._here(rule)))
        return self.totals[rule]

    def _here(self, rule: Rule) -> torch.Tensor:
        """The items of the step that this rank holds."""
        return torch.stack([rule.total(batch) for batch in self.window]).sum()

    def _total_of_call(
        self, rule: Rule | None, call: Any = None, of_terms: Any = None, is_compiled: bool = False
    ) -> torch.Tensor | None:
        """total(rule) for this call of a loss; None without a rule.

        Where ranks wait for each other, each call of the window's first micro-batch counts once, rule or not. A call that
        finds another rule in a later one scales that count by what this rank holds.
        """
        if not self.gathers:
            return None if rule is None else self.total(rule)
        call = ("mean", self.calls) if call is None else call
        # is_computed: it is computed again, in a backward
        if self.exchange is not None and (self.depth or self.is_computed) and not is_compiled:
            if rule is None or rule in self.totals:
                return None if rule is None else self.totals[rule]
            return self.exchange.total(self, rule, call, call if of_terms is None else of_terms)
        if call not in self.totals:
            held = torch.zeros((), dtype=torch.float64) if rule is None else self._here(rule)
            self.totals[call] = rule, at_least_one(self.over_ranks(held))
        counted, total = self.totals[call]
        if rule is None or counted is None:
            return None
        return total if rule == counted else total * self._here(rule) / at_least_one(self._here(counted))

    def _changed(self, rule: Rule) -> torch.Tensor | None:
        """How many more items the step has by a rule than were fetched, as far as it is known, where this micro-batch was changed
        since: labels that are masked on the device, rows that are repeated or dropped. None: it is as it was.

        The micro-batches before this one are known, and this one; those to come are taken to be changed as these were.
        """
        keys = [key for key in (rule.key, rule.mask, rule.length_of) if key is not None]
        if self.here is None or self.chunks:
            return None
        now: Any = None
        before: Any = None
        both = self.inputs, self.here
        if any(self.inputs.get(key) is not self.fetched.get(key) for key in keys) and all(
            isinstance(entries.get(key), torch.Tensor) for entries in both for key in keys
        ):
            now, before = rule.total(self.inputs), rule.total(self.here)
            before = before.to(now.device)
        seen = self.totals.get("changed")
        if now is None or bool(now == before):
            if seen:
                self.ambiguous.add(CHANGED)
            return None
        if seen is None:
            seen = self.totals["changed"] = {}
        counts = seen.setdefault(rule, {})
        counts[self.index] = now, before
        for index in range(self.index):
            if index not in counts:
                held = rule.total(self.window[index]).to(now.device)
                counts[index] = held, held
        nows, befores = (torch.stack(some) for some in zip(*counts.values(), strict=True))
        if bool((nows * before != befores * now).any()):
            self.ambiguous.add(CHANGED)
        return at_least_one(nows.sum()) / at_least_one(befores.sum())

    def _per_call(self, total: torch.Tensor) -> torch.Tensor:
        """A total by what it is averaged over: once a window, where the window keeps the total."""
        kept, quotient = self.totals.get(("per call", self.averaged, id(total)), (None, None))
        if kept is not total:
            quotient = total / self.averaged
            self.totals["per call", self.averaged, id(total)] = total, quotient
        return quotient

    def share_of_tokens(self) -> torch.Tensor | float:
        """What a mean over the tokens of this micro-batch is multiplied by, for it to weigh as much as they do in the step."""
        rules = (Rule("attention_mask", ignore_index=0), Rule("input_ids", ignore_index=None))
        for rule in rules:
            if self.window and all(isinstance(b.get(rule.key), torch.Tensor) for b in (self.inputs, self.window[0])):
                return self.share_of(rule)
        return self.share_of_rows()

    def share_of_rows(self) -> float:
        """What a mean over this micro-batch's rows is multiplied by, for it to weigh as much as they do in the step: 1 where
        all micro-batches are of one size."""
        here = num_rows(self.inputs)
        sizes = [num_rows(batch) for batch in self.window]
        if here == 0 or len(set(sizes)) <= 1:
            return 1.0
        return here * len(sizes) / sum(sizes)

    def share_of_call(self) -> float:
        """share_of_rows, of a call of a loss of ours."""
        self.calls += 1
        return self.share_of_rows()

    def objects_of_the_step(self) -> float:
        """What the boxes or masks of this micro-batch, by which its sums are divided, are multiplied by to be the step's per
        micro-batch and rank: over all ranks, whatever Trainer averages over, as these losses do themselves."""
        counts, here = self._counts_of_objects(), num_objects(self.inputs)
        if counts is None or here is None:
            return 1.0
        self.calls += 1
        self.is_of_objects = True
        if "objects" not in self.totals:
            total = self.over_all(torch.tensor(float(sum(map(sum, counts))), dtype=torch.float64))
            self.totals["objects"] = max(float(total), 1.0) / (len(counts) * self.num_ranks)
        return self.totals["objects"] / max(sum(here), 1)

    def _counts_of_objects(self) -> list[list[int]] | None:
        """The boxes or masks of each row of each micro-batch; None where they are no lists of such."""
        counts = [num_objects(batch) for batch in self.window]
        if not counts or None in counts or num_objects(self.inputs) is None:
            return None
        return [count for count in counts if count is not None]

    def are_alike_in_rows(self, target: torch.Tensor, call: Any) -> bool:
        """Whether a target without ignored elements has equally many in each row of the step, so that they weigh as rows."""
        rows = num_rows(self.inputs)
        if rows == 0 or target.numel() % rows:
            return False
        of_a_row = target.numel() // rows
        return self.totals.setdefault(("elements of a row", call), of_a_row) == of_a_row

    def held(self, rule: Rule) -> torch.Tensor:
        """The items of this micro-batch, by its entries as they were when it was fetched."""
        return rule.total(self.inputs if self.here is None or rule.key not in self.here else self.here)

    def is_of_one_length(self, rule: Rule | None) -> bool:
        """Whether the rows of all micro-batches are as long, so that padding weighs as much in each."""
        if rule is None or not all(isinstance(batch.get(rule.key), torch.Tensor) for batch in self.window):
            return False
        return len({batch[rule.key].shape[1:] for batch in self.window}) == 1

    def share_of_call_by_hand(self, call: Any, rule: Rule | None, of_terms: Any = None) -> Any:
        """share_of a rule, for a loss that somebody averages; counted once a window, and by all ranks."""
        total = self._total_of_call(rule, call, of_terms)
        if rule is None or total is None:
            return self.share_of_rows()
        held = self.held(rule)
        return (held * self.averaged / total.to(held.device)).to(torch.float32)

    def share_of_mean(self, term: Term) -> Any:
        """What the mean of a recognised loss over its own items was multiplied by."""
        if term.share is not None:
            return term.share
        return self.share_of_rows() if term.rule is None else self.share_of_call_by_hand(("mean", term.call), term.rule)

    def share_of_weights(self, weights: Sequence[Weight], call: Any, of_terms: Any = None) -> Any:
        """What a mean of this micro-batch over what was measured is multiplied by, to be a part of the step's."""
        shares = [self._share_of_weight(weight, (call, i), of_terms) for i, weight in enumerate(weights)]
        if len(shares) > 1 and self.is_watched_for_ambiguity:
            values = [float(share) for share in shares]
            if max(values) - min(values) > 1e-6 * max(values):
                self.ambiguous.add("what it averages over fits several rules, which differ in this window")
        return shares[0]

    def _share_of_weight(self, weight: Weight, call: Any, of_terms: Any) -> Any:
        if weight == SUM_WEIGHS:
            return float(self.micro_batches)
        if isinstance(weight, str):
            return self.share_of_rows() if weight == ROWS_WEIGH else 1.0
        return self.share_of_call_by_hand(call, weight, of_terms)

    def share_of(self, rule: Rule) -> torch.Tensor | float:
        """What a mean over the items of this micro-batch is multiplied by, for it to weigh as much as they do in the step."""
        averaged = self.averaged / self.of_replicas  # each replica weighs as the others
        return (rule.total(self.inputs) * averaged / self.total(rule)).to(torch.float32)

    def part(self, value: torch.Tensor, share: Any) -> torch.Tensor:
        """A mean of this micro-batch as a part of the step's."""
        self.share_found, self.place_found = share, {"site": sites.site()}
        return self.record(value * share)

    def _matched(self, classes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """The divisor of the classes (rows, queries) that detection has matched to its queries: an object each, and the last
        class, of another weight, for all others. None: these are none."""
        counts = self._counts_of_objects()
        if classes.dim() != 2 or classes.shape[0] != num_rows(self.inputs) or counts is None:
            return None
        if not bool((weight[:-1] == 1).all()):
            return None
        queries = classes.shape[1]
        key = "matched", queries, float(weight[-1])
        if key not in self.totals:
            objects = sum(min(n, queries) for count in counts for n in count)
            others = sum(map(len, counts)) * queries - objects
            held = torch.tensor(objects + others * float(weight[-1].double()), dtype=torch.float64)
            self.totals[key] = self.over_all(held) / (len(counts) * self.num_ranks)
        return self.totals[key]

    def _rule(
        self, labels: torch.Tensor, shift: int, ignore_index: int | None, length: int | None, number: Any = None
    ) -> Rule | None:
        """How the items of these labels are counted: by the entry whose elements they are; and whether the micro-batches
        before were counted by another rule, which fitted them as well."""
        number = self.calls if number is None else number
        rule = self._rule_of(labels, shift, ignore_index, length, number)
        if rule is not None and not self.chunks:
            self.unknown += self.differs(number, rule)
        return rule

    def differs(self, number: Any, rule: Rule) -> bool:
        """Whether the micro-batches before were counted by another rule than the same call of this one, which fitted them as
        well."""
        before = self.compared.setdefault(number, rule)
        return rule != before and bool(self._here(rule) != self._here(before))

    def _rule_of(
        self, labels: torch.Tensor, shift: int, ignore_index: int | None, length: int | None, number: Any
    ) -> Rule | None:
        """How the items of these labels are counted: by the entry whose elements they are.

        The same memory, or else the same values, whose comparison synchronises. Where a micro-batch fits several origins (no
        position of it is masked, say), the one that alone fitted the same call of another is taken.
        """
        if self.chunks:
            return self._rule_of_chunk(labels, shift, ignore_index, length, number)
        if length is None and (here := self._entry_of_memory(labels)) is not None:
            return Rule(here, shift, ignore_index)
        entries, changed = self._entries()
        length_of, longer_by = None, 0
        if length is not None:
            found = self._entry_of_length(length)
            if found is None:
                return None
            length_of, longer_by = found
        for key, value in entries.items():
            if key not in changed and value.numel() == labels.numel() and same_memory(value, labels):
                return Rule(key, shift, ignore_index, length_of, longer_by)
        call = (number, tuple(entries))
        known = self.origins.get(call)
        likeliest = [] if known is None else [known]
        fitting: list[tuple[Origin, int]] = []
        # what is left out or put in is looked for where nothing else fits: few labels fit much by chance
        for origins in (
            itertools.chain(likeliest, likely_origins(entries, labels, ignore_index, length)),
            reshaping_origins(entries, labels, ignore_index, length),
        ):
            for origin in origins if not fitting else ():
                copies = origin.copies_in(labels, entries, shift, ignore_index, length) if origin.key in entries else 0
                if copies:
                    fitting.append((origin, copies))
                    if origin is known or length is not None or not may_be_labels(origin.key):
                        break
        if not fitting:
            return None
        origin, copies = fitting[0]
        if origin is not known and self._cuts_nothing(origin, entries, ignore_index):
            rule = Rule(origin.key, shift, ignore_index, mask=origin.mask, filled=origin.filled)
        else:
            if len(fitting) == 1:
                self.origins[call] = origin
            first = 0 if origin.kept == "items" else max(origin.first + shift - origin.front, 0)
            rule = Rule(
                origin.key,
                first,
                ignore_index,
                length_of,
                longer_by,
                mask=origin.mask,
                part=origin.part,
                copies=copies,
                last=origin.last,
                filled=origin.filled,
                half=origin.half,
            )
        return rule

    @staticmethod
    def _cuts_nothing(origin: Origin, entries: Mapping[str, torch.Tensor], ignore_index: int | None) -> bool:
        """Whether columns are left out in which all is ignored, more than one: cut off where the longest row ends."""
        if origin.first > 1 or origin.last < 2 or origin.part is not None or origin.half is not None:
            return False
        if ignore_index is None:
            return False
        is_item = torch.ne(entries[origin.key][..., -origin.last - 1 :], ignore_index)
        return bool(is_item[..., 0].any()) and not bool(is_item[..., 1:].any())

    def _rule_of_chunk(self, labels: torch.Tensor, *how: Any) -> Rule | None:
        """_rule() of the labels of a replica, which are made from one chunk of the entries."""
        for chunk in self.chunks:
            part = copy.copy(self)
            part.inputs, part.here, part.chunks = chunk, None, ()
            part.versions = {key: value._version for key, value in chunk.items()}
            rule = part._rule(labels, *how)
            self.unknown += part.unknown - self.unknown
            if rule is not None:
                return rule
        return None

    def _entry_of_memory(self, labels: torch.Tensor) -> str | None:
        """The key of the entry of labels that these are themselves, or a view of all of it: as the most are, in every call."""
        here = self.window[0] if self.here is None else self.here
        for key, value in self.inputs.items():
            if not may_be_labels(key) or not isinstance(value, torch.Tensor) or key not in here:
                continue
            is_as_fetched = value._version == self.versions.get(key, value._version)
            if is_as_fetched and value.numel() == labels.numel() and same_memory(value, labels):
                return key
        return None

    def _rule_of_size(self, target: torch.Tensor) -> Rule | None:
        """The rule of a target without ignored elements that has one for each item of an entry of numbers (a spectrogram, -100
        where it ends), or for each of its frames; its values may be the head's own."""
        for key, entry in self.inputs.items():
            if "label" in key and isinstance(entry, torch.Tensor) and entry.is_floating_point() and entry.dim() == 3:
                for rule in (Rule(key), Rule(key, part=0)):
                    if int(rule.total(self.inputs)) == target.numel() and key in self.window[0]:
                        return rule
        return None

    def _entry_of_length(self, length: int) -> tuple[str, int] | None:
        """The key of an entry whose dimension 1 is as long as the logits', or of the text and what they are longer by."""
        for key, value in self.inputs.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == length:
                return key, 0
        text = self.inputs.get("input_ids")
        return ("input_ids", length - text.shape[1]) if isinstance(text, torch.Tensor) and text.dim() == 2 else None


# By the thread that entered it, and not a context variable: DataParallel's threads and those of a backward must see it, and
# the compiler guards on the flags cheaply.
_entered: dict[int, Step] = {}
is_active = False  # whether there is one in any thread; what compiled code looks at
is_training = False  # whether one of them is of an optimizer step, and not of an evaluation


def current() -> Step | None:
    """The step of this thread; of a thread that has entered none the only one that there is."""
    step = _entered.get(threading.get_ident())
    if step is None and len(_entered) == 1:
        step = next(iter(_entered.values()), None)
    return None if step is None else step.as_seen()


def is_counted() -> bool:
    """Whether a loss that is called here is one of the step's: in training one that has a gradient, and not a metric."""
    return is_active and (not is_training or torch.is_grad_enabled())


@not_compiled
def see(
    value: torch.Tensor,
    target: torch.Tensor,
    reduction: str,
    ignore_index: int | None = None,
    name: str = "",
    weight: torch.Tensor | None = None,
    shift: int = 0,
) -> torch.Tensor:
    """What a loss returned with reduction="sum" or "none", for the current step to look at; value (..., t) of target
    (..., t + shift)."""
    step = current()
    return value if step is None else step.see(value, target, reduction, ignore_index, name, weight, shift)


def aligned(target: torch.Tensor, shift: int, ignore_index: int | None) -> torch.Tensor:
    """The target of each value, where value (..., t) is of target (..., t + shift)."""
    return target if shift == 0 or ignore_index is None else shift_labels(target, shift, ignore_index)


@not_compiled
def weigh(weight: torch.Tensor, name: str) -> None:
    """Looks at the class weights of the loss that is called next, where the current step is looked at."""
    step = current()
    if step is not None and step.is_training:
        step.weigh(("weighed", step.calls, step.by_hand), weight, name)


@not_compiled
def share(of: Callable[[Step], Any]) -> Any:
    """What the current step says that something is multiplied by; 1 where there is none."""
    step = current()
    return 1.0 if step is None else of(step)


@not_compiled
def part(value: torch.Tensor, share: Callable[[Step], Any], name: str = "") -> torch.Tensor:
    """A mean of one micro-batch as a part of the current step's, which is as large as share says."""
    step = current()
    if step is None:
        return value
    step.found = name, None
    return step.part(value, share(step))


@contextmanager
def entered(step: Step | None) -> Iterator[Step | None]:
    """Makes a step the current one; None: none is."""
    thread = threading.get_ident()
    outer = _entered.get(thread)
    try:
        _enter(thread, step)
        yield step
    finally:
        _enter(thread, outer)


def _enter(thread: int, step: Step | None) -> None:
    global is_active, is_training
    if step is None:
        _entered.pop(thread, None)
    else:
        _entered[thread] = step
    is_active = bool(_entered)
    is_training = any(entered.is_training for entered in list(_entered.values()))
