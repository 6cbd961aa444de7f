"""The loss of a whole evaluation set: every term a mean over its items of the set, whatever the batches and the ranks.

Trainer averages the means of the batches, weighted by their rows. Here each term of the loss reports its mean and its items,
batch by batch. The loss of a model may be any sum of multiples of its terms and of a rest: the multiples are its derivatives
by them, in the first batch (tracked.py). Nobody's code is called twice for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .._compat import not_compiled
from ..sums import TokenSums, wide_dtype, widened
from . import counting, rows, sites
from . import step as steps
from .graph import Graph
from .rows import is_mean_of_rows, row_of
from .term import Term, has_no_items, put_together, unit_of
from .terms import (
    ELEMENTS,
    ITEMS,
    MEANS,
    ROWS,
    SCALED,
    SUM,
    WEIGHTS,
    fitting_schemes,
    is_contrastive,
)
from .tracked import leaf_and_tracked, untracked

# what somebody may divide a sum by, in the order in which they are tried
SCHEMES = (WEIGHTS, ITEMS, ROWS, ELEMENTS, SUM, SCALED)
COUNTED_BY_ITEM = (WEIGHTS, ITEMS, ELEMENTS)  # of two calls they are as many as of both
SAME = 1e-5  # of the loss: what the rest may differ by from batch to batch


class Amount(NamedTuple):
    """How much a loss that is no sum of terms weighs: times of the set's over."""

    times: torch.Tensor | float
    over: torch.Tensor | float


class OfLoop(NamedTuple):
    """What a loop over the rows of one batch has made of their losses."""

    made: str  # one of the words of rows.py
    total: torch.Tensor  # ()
    over: float  # the items that it was divided by, where rows weigh by them


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
        self.summed: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this batch, by somebody: sum, counts by scheme
        self.leaves: list[torch.Tensor] = []  # of the means, where they are tracked
        self.places: list[Term] = []  # of the means: where they were called, and of which row
        self.has_loops = False  # over rows, on any rank
        self.loops: dict[int, str] = {}  # site -> what a loop over rows makes of its losses
        self.of_loops: list[OfLoop] = []  # of this batch
        self.are_rows: list[bool] = []  # whether the labels of each are those of one row
        self.is_row = False  # the same of the call that is to be observed next
        self.terms_by_hand: list[Term] = []  # of this batch, whose values are leaves
        self.at_sites: dict[int, int] = {}  # where somebody sums -> which of self.summed it is
        self.mixed: set[int] = set()  # of these, those whose calls have several coefficients
        self.looked = 0  # batches
        self.is_unsteady = False  # the coefficients of means differ from batch to batch
        # schemes of all that somebody sums together, where its calls may be the chunks of one sum over one count; of one
        # loss alone
        self.fitting_together = set(COUNTED_BY_ITEM)
        self.has_parts = False  # several were seen that it fits
        self.apart: set[int] = set()  # places of what is averaged by something that is known
        self.fitting: list[set[str]] | None = None  # of what somebody sums: the schemes that fitted all batches so far
        self.scales: dict[tuple[int, str], float] = {}  # the factor that a sum has besides, by scheme
        self.rests: list[torch.Tensor] = []  # of the batches: the loss without its means, its size, what somebody sums
        self.token_sums: TokenSums | None = None
        self.amount: Amount | None = None
        self.target: torch.Tensor | None = None
        self.is_linear = True  # in its terms
        self.is_touched = False  # somebody's own compute_loss has made use of num_items_in_batch
        self.is_by_number = False  # what of the loss is no term honours the number
        self.num_terms: int | None = None  # of a batch, the most that a rank has
        self.num_means = 0  # of the first batch of this rank
        self.coefficients: list[float] | None = None  # of the terms in the loss
        self.of_rows: list[float] = []  # the same of terms that are a row's, times the rows: Trainer averages by rows
        self.totals_of_set: torch.Tensor | None = None  # float64, see add()

    @property
    def is_looking(self) -> bool:
        """Whether the terms of this batch are tracked."""
        is_open = any(len(fitting) > 1 or SCALED in fitting for fitting in self.fitting or ())
        may_be_parts = self.fitting is not None and len(self.fitting) > 1 and bool(self.fitting_together)
        return self.coefficients is None or self.looked < 2 or is_open or may_be_parts or self.has_loops

    def begin(self, inputs: Any) -> None:
        """Begins a batch."""
        inputs = counting.entries_of(inputs)
        self.window = [inputs]
        super().begin(inputs)
        self.means, self.summed, self.token_sums, self.amount = [], [], None, None
        self.leaves, self.terms_by_hand, self.places, self.of_loops = [], [], [], []
        self.at_sites = {}
        self.are_rows, self.is_row = [], False
        self.calls = 0
        self.place_found, self.found = {}, ("", None)

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
            items = widened((labels.clamp(0, length) != length).sum())
        else:
            items = counting.Rule("labels", shift, ignore_index, weight=weight).total({"labels": labels})
        are_indices = ignore_index is not None and length is None and not labels.is_floating_point()
        is_looked_at = self.is_looking and not is_compiled
        row = row_of(labels, self.inputs) if is_looked_at else None
        is_of_row = row is not None and counting.num_rows(self.inputs) > 1
        if is_looked_at and are_indices and not is_of_row and self._is_contrastive(labels):
            self.coupled.add(f"{name or 'a loss'} tells each row apart from the others of its batch")
        self.is_row = self.is_looking and self._is_row(labels, shift)
        if is_looked_at:
            self.found = name, None
            self.place_found = {"site": sites.site(), "row": row, "ignore_index": ignore_index, "weight": weight}
        return steps.Divisor(steps.at_least_one(items), observer=_Term(self, items))

    def _is_row(self, labels: torch.Tensor, shift: int) -> bool:
        """Whether these are the labels of one row of the batch, as far as their shape says."""
        rows = counting.num_rows(self.inputs)
        if labels.dim() != 1 and labels.shape[:1] != (1,):
            return False
        entries = [v for k, v in self.inputs.items() if isinstance(v, torch.Tensor) and counting.may_be_labels(k)]
        return any(
            entry.dim() > 1 and entry.shape[0] == rows and 0 <= entry[0].numel() - labels.numel() <= shift + 1
            for entry in entries
        )

    def _is_contrastive(self, labels: torch.Tensor) -> bool:
        """Whether labels are the numbers of the rows, and no entry of the batch."""
        rows = counting.num_rows(self.inputs)
        if not is_contrastive(labels, rows) and not (rows == labels.numel() == 1 and bool((labels == 0).all())):
            return False
        entries = (v for v in self.inputs.values() if isinstance(v, torch.Tensor) and v.numel() == labels.numel())
        return not any(counting.same_values(entry, labels) for entry in entries)

    def observe(self, loss: torch.Tensor, items: torch.Tensor, sums: TokenSums | None = None) -> torch.Tensor:
        self.means.append((widened(loss.detach()), _number(items, loss.device)))
        if sums is not None:
            self.token_sums = sums
        if not self.is_looking or torch.compiler.is_compiling():
            return loss
        leaf, handed_out = leaf_and_tracked(loss)
        self.places.append(Term(leaf, self.found[0], None, ("mean", len(self.means)), **self.place_found))
        self.found, self.place_found = ("", None), {}
        self.leaves.append(leaf)
        self.are_rows.append(self.is_row)
        return handed_out

    def part(self, value: torch.Tensor, share: Any) -> torch.Tensor:
        if self.is_looking:
            self.found, self.place_found = ("", None), {"site": sites.site()}
        return self.observe(value, torch.as_tensor(share, dtype=torch.float64))

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
        """A loss that its caller averages: its sum, and all that he may divide it by."""
        if self.amount is not None:  # over boxes or masks
            return value
        row = row_of(target, self.inputs) if self.is_looking else None
        target = steps.aligned(target, shift, ignore_index)
        rule = counting.Rule("labels", 0, ignore_index, weight=weight)
        counts = {
            ITEMS: rule._replace(weight=None).total({"labels": target}),
            ROWS: self.share_of_rows(),
            ELEMENTS: float(target.numel()),
            SUM: 1.0,
            SCALED: 1.0,
        }
        counts[WEIGHTS] = rule.total({"labels": target}) if weight is not None else counts[ITEMS]
        total, site = widened(value.detach()).sum(), sites.site()
        if site in self.at_sites:  # the turns of a loop are one sum
            counts = {scheme: count if scheme in COUNTED_BY_ITEM else 0.0 for scheme, count in counts.items()}
        over = torch.stack([_number(counts[scheme], value.device) for scheme in SCHEMES])
        if site in self.at_sites:
            index = self.at_sites[site]
            before, over_before = self.summed[index]
            self.summed[index] = before + total, over_before + over
        else:
            index = self.at_sites[site] = len(self.summed)
            self.summed.append((total, over))
        leaf, handed_out = leaf_and_tracked(value) if self.is_looking else (None, value)
        if leaf is not None:
            place = {"ignore_index": ignore_index, "weight": weight, "site": site, "row": row}
            self.terms_by_hand.append(Term(leaf, name, rule, ("by hand", index), reduction, target=target, **place))
        return handed_out

    def _groups(self, found: list[torch.Tensor | None]) -> list[tuple[Term, torch.Tensor] | None]:
        """Of each sum of this batch one term for all turns of its loop, with the coefficient that they share; None: it has no
        item, or is not in the loss, or they share none.

        Args:
            found: the derivatives of the loss by what somebody sums.
        """
        grouped: list[tuple[Term, torch.Tensor] | None] = []
        for index in range(len(self.summed)):
            called = [one for one in zip(self.terms_by_hand, found, strict=True) if one[0].call[1] == index]
            if any(c is None for _, c in called):  # a metric, or nothing that is known
                self.mixed.add(index)
            turns = [(term, c.detach()) for term, c in called if c is not None and not has_no_items(term)]
            if len(turns) < 2:
                grouped.append(turns[0] if turns else None)
                continue
            units = [unit_of(term, c) or (0.0, None) for term, c in turns]
            scales = [scale if used is None else 0.0 for scale, used in units]
            if min(map(abs, scales)) == 0 or max(scales) - min(scales) > SAME * max(map(abs, scales)):
                self.mixed.add(index)
                grouped.append(None)
                continue
            grouped.append(put_together([term for term, _ in turns], scales[0], turns[0][1]))
        return grouped

    def _together(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What somebody sums in this batch and averages by nothing that is known, as though it were one call."""
        summed = [one for index, one in enumerate(self.summed) if index not in self.apart]
        if not summed:
            return None
        return torch.stack([total for total, _ in summed]).sum(), torch.stack([counts for _, counts in summed]).sum(0)

    def _look_together(self, grouped: list[tuple[Term, torch.Tensor] | None]) -> None:
        """Whether the sums of this batch that nothing else is known of are divided by one count of all of them."""
        calls = [one for i, one in enumerate(grouped) if i not in self.apart and one is not None]
        together = self._together()
        if together is None or not calls:
            return
        scales = [float(c) for _, c in calls if c.dim() == 0]
        names = {term.name for term, _ in calls}
        if len(names) != 1 or len(scales) != len(calls) or max(scales) - min(scales) > SAME * max(map(abs, scales)):
            self.fitting_together = set()
            return
        counts = dict(zip(SCHEMES, together[1].tolist(), strict=True))
        self.fitting_together &= {scheme for scheme, n in counts.items() if abs(scales[0] * n - 1) <= SAME}
        self.has_parts |= len(calls) > 1 and bool(self.fitting_together)

    def held(self, rule: counting.Rule) -> torch.Tensor:
        return rule.total({"labels": self.target})

    # Shares are amounts here: what of the set this batch is, is not known before its end.

    def share_of(self, rule: counting.Rule) -> torch.Tensor:
        return rule.total(self.inputs)

    def share_of_rows(self) -> float:
        return float(counting.num_rows(self.inputs))

    def share_of_call_by_hand(self, call: Any, rule: Any, of_terms: Any = None) -> torch.Tensor:
        return rule.total(self.inputs)

    def objects_of_the_step(self) -> float:
        """Losses are sums over boxes or masks, divided by how many this batch has, or by 1."""
        counts = counting.num_objects(self.inputs)
        if counts is not None:
            self.calls += 1
            self.amount = Amount(max(sum(counts), 1), sum(counts))
        return 1.0

    # Adding up ---------------------------------------------------------------------------------------------------------

    def look(self, loss: torch.Tensor, agree: Callable[..., list[int]]) -> None:
        """Finds how the loss depends on its terms, where that of this batch is finite.

        A loss that is not linear in them (a perplexity) is none that could be put together from theirs: is_linear is false
        then, and no term is taken out of it.

        Args:
            loss: (), tracked where a term is in it.
            agree: the largest of each number over the ranks, all of which ask equally often.
        """
        loss = untracked(loss)
        graph, found = self.take_loops_out(loss)
        leaves = [*self.leaves, *(term.value for term in self.terms_by_hand)]
        self.looked += 1
        if self.num_terms is None:
            numbers = agree(len(self.means), len(self.summed), int(bool(self.loops)))
            self.num_terms, self.fitting = numbers[0], [set(SCHEMES) for _ in range(numbers[1])]
            self.has_loops = bool(numbers[2])
        is_finite = bool(torch.isfinite(loss))
        if agree(int(not is_finite))[0]:
            return  # another batch will tell
        bends = int(any(_bends(coefficient, leaves) for coefficient in found))
        is_first = self.coefficients is None
        self._look_at_means(graph, found[: len(self.leaves)])
        assert self.fitting is not None
        grouped = self._groups(found[len(self.leaves) :])[: len(self.fitting)]
        for index, one in enumerate(grouped):
            if index in self.mixed:
                self.fitting[index] = set()
            if one is None or graph is None:
                continue
            term, coefficient = one
            self.target = term.target
            schemes = fitting_schemes(self, term, coefficient, graph)
            self.fitting[index] &= set(schemes)
            for scheme, scale in schemes.items():
                if abs(self.scales.setdefault((index, scheme), scale) - scale) > SAME * abs(scale):
                    self.fitting[index].discard(scheme)
        if is_first and self.fitting:
            scales = [float(one[1].sum()) for one in grouped if one is not None]
            are_alike = not scales or max(scales) - min(scales) <= SAME * max(map(abs, scales))
            is_known = [
                not are_alike and index < len(grouped) and grouped[index] is not None and not fitting.isdisjoint(MEANS)
                for index, fitting in enumerate(self.fitting)
            ]
            unknown = agree(*(int(not known) for known in is_known))
            self.apart = {index for index, is_unknown in enumerate(unknown) if not is_unknown}
        self._look_together(grouped)
        if agree(bends)[0]:
            self.is_linear, self.coefficients = False, [0.0] * self.num_terms
            self.fitting, self.fitting_together = [set() for _ in self.fitting], set()

    def _look_at_means(self, graph: Graph | None, found: list[torch.Tensor | None]) -> None:
        """Finds the coefficients of the means in the first batch, and whether they are the same in others."""
        assert self.num_terms is not None
        num_rows = counting.num_rows(self.inputs)
        coefficients = [0.0 if c is None else float(c.detach()) for c in found]
        if self.coefficients is not None:
            if not self.is_linear:
                return
            before = [
                known + (self.of_rows[i] / num_rows if i < len(self.of_rows) else 0.0)
                for i, known in enumerate(self.coefficients)
            ]
            is_same = [
                abs(c - known) <= SAME * max(abs(c), abs(known)) or term.row is not None
                for c, known, term in zip(coefficients, before, self.places, strict=False)
            ]
            self.is_unsteady |= len(found) != self.num_means or not all(is_same)
            return
        self.num_means = len(found)
        in_mean = [
            graph is not None
            and (is_mean_of_rows(graph, leaf, num_rows) or (is_row and graph.is_divided_by(leaf, num_rows)))
            for leaf, is_row in zip(self.leaves, self.are_rows, strict=True)
        ]
        if sum(in_mean) == num_rows:  # of rows that have a mean each: as Trainer averages them
            self.of_rows = [c * num_rows if of_rows else 0.0 for c, of_rows in zip(coefficients, in_mean, strict=True)]
            coefficients = [0.0 if of_rows else c for c, of_rows in zip(coefficients, in_mean, strict=True)]
        of_some = [term.row is not None and num_rows > 1 for term in self.places]  # rows, in no loop over all
        coefficients = [0.0 if alone else c for c, alone in zip(coefficients, of_some, strict=True)]
        self.coefficients = [*coefficients, *[0.0] * (self.num_terms - len(coefficients))]

    def take_loops_out(self, loss: torch.Tensor) -> tuple[Graph | None, list[torch.Tensor | None]]:
        """Takes what loops over rows make of their losses for what it is, and these from among the terms of this batch.

        Args:
            loss: (), tracked where a term is in it.

        Returns:
            The graph of the loss, and its derivatives by the leaves that are left.
        """
        loss = untracked(loss)
        leaves = [*self.leaves, *(term.value for term in self.terms_by_hand)]
        found: list[torch.Tensor | None] = [None] * len(leaves)
        if not leaves or not loss.requires_grad:
            return None, found
        found = list(torch.autograd.grad(loss, leaves, create_graph=True, retain_graph=True, allow_unused=True))
        graph = Graph(loss, leaves)
        num_means = len(self.leaves)
        terms = [*self.places, *self.terms_by_hand]
        at_sites: dict[int, list[int]] = {}
        for index, term in enumerate(terms):
            if term.site and found[index] is not None:
                at_sites.setdefault(term.site, []).append(index)
        taken: set[int] = set()
        for site, indices in at_sites.items():
            pairs = [(terms[i], c.detach()) for i in indices if (c := found[i]) is not None]
            known = self.loops.get(site, rows.UNKNOWN)
            loop = rows.loop_at(self, graph, [pair for pair in pairs if not has_no_items(pair[0])], known)
            if loop is None:
                self.is_unsteady |= site in self.loops
                continue
            taken |= set(indices)
            self.is_unsteady |= self.loops.setdefault(site, loop.made) != loop.made
            if loop.made == rows.UNKNOWN:
                continue  # it stays what Trainer makes of it
            total = torch.stack([widened(term.amount(c)).detach() for term, c in pairs]).sum()
            over = 1.0 if loop.rule is None else float(loop.rule.total(self.inputs))
            self.of_loops.append(OfLoop(loop.made, total, over))
        kept = [i for i in range(num_means) if i not in taken]
        sums = sorted({term.call[1] for i, term in enumerate(terms) if i >= num_means and i in taken})
        left = [index for index in range(len(self.summed)) if index not in sums]
        by_hand = [terms[i] for i in range(num_means, len(terms)) if i not in taken]
        self.means, self.leaves = [self.means[i] for i in kept], [self.leaves[i] for i in kept]
        self.places, self.are_rows = [self.places[i] for i in kept], [self.are_rows[i] for i in kept]
        self.summed = [self.summed[index] for index in left]
        self.terms_by_hand = [term._replace(call=("by hand", left.index(term.call[1]))) for term in by_hand]
        return graph, [c for i, c in enumerate(found) if i not in taken]

    def _of_loops(self, made: str) -> tuple[torch.Tensor, float]:
        """Of this batch what loops of a kind have made, and the items that it was divided by."""
        found = [one for one in self.of_loops if one.made == made]
        if not found:
            return torch.zeros((), dtype=torch.float64), 0.0
        return torch.stack([one.total for one in found]).sum(), found[0].over

    def add(self, loss: torch.Tensor, amount: Amount, is_real: bool = True) -> None:
        """Adds this batch to the set. Without a host sync."""
        assert self.num_terms is not None and self.fitting is not None
        loss = untracked(loss)
        device = loss.device
        loss, wide = widened(loss.detach()), wide_dtype(device)
        empty = torch.zeros((), dtype=wide, device=device)
        times, over = (_number(value, device) for value in amount)
        (summed_up, _), (weighed, items_of_rows) = self._of_loops(rows.SUM), self._of_loops(rows.BY_ITEMS)
        summed_up, weighed = summed_up.to(device, wide), weighed.to(device, wide)
        rest = loss - summed_up - weighed - self._of_loops(rows.MEAN)[0].to(device, wide)
        num_rows = counting.num_rows(self.inputs)
        if self.coefficients is not None and self.is_linear and is_real:
            self.is_unsteady |= len(self.means) != self.num_means
        row = [loss * times, over, loss * num_rows, _number(num_rows, device), summed_up, summed_up * times]
        row += [weighed * items_of_rows, _number(items_of_rows, device), weighed * times]
        for index in range(self.num_terms):
            mean, items = self.means[index] if index < len(self.means) else (empty, empty)
            mean, items = mean.to(device), items.to(device, wide)
            row += [mean * items, items, mean * times]
            rest = rest - self.coefficients[index] * mean if self.coefficients else rest
            if index < len(self.of_rows):
                rest = rest - self.of_rows[index] / num_rows * mean
        of_batch = []
        summed = [*self.summed[: len(self.fitting)]]
        summed += [(empty, torch.zeros(len(SCHEMES)))] * (len(self.fitting) - len(summed))
        if self.fitting:
            summed.append(self._together() or (empty, torch.zeros(len(SCHEMES))))
        for total, counts in summed:
            total, counts = total.to(device), counts.to(device, wide)
            means = total / torch.where(counts > 0, counts, torch.ones_like(counts))
            row += [total, *counts, *(means * times)]
            of_batch += list(means)
        sums = self.token_sums
        for value in (None, None, None) if sums is None else (sums.num_items, sums.num_correct, sums.entropy_sum):
            row.append(empty if value is None else value.to(device, wide))
        added = torch.stack(row)
        if not is_real:
            added = torch.zeros_like(added)
        else:
            self.rests.append(torch.stack([rest, loss.abs(), *of_batch]))
            if self.skips_non_finite:
                added = torch.where(torch.isfinite(loss), added, torch.zeros_like(added))
        self.totals_of_set = added if self.totals_of_set is None else self.totals_of_set + added

    def agree_on_schemes(self, agree: Callable[..., list[int]]) -> list[int | None]:
        """Of what somebody sums, which of SCHEMES fitted all batches of all ranks, and last of all of it together; None: none
        did."""
        if self.fitting is None:
            return []
        self.is_unsteady = bool(agree(int(self.is_unsteady))[0])
        if not self.fitting:
            return []
        misfits = agree(*(int(scheme not in self.fitting_together) for scheme in SCHEMES), int(self.has_parts))
        together = misfits.index(0) if misfits.pop() and 0 in misfits else None
        chosen: list[int | None] = []
        for fitting in self.fitting:
            misfits = agree(*(int(scheme not in fitting) for scheme in SCHEMES))
            chosen.append(misfits.index(0) if 0 in misfits else None)
        if together is not None:
            chosen = [scheme if index in self.apart else None for index, scheme in enumerate(chosen)]
        return [*chosen, together]

    def _scale(self, index: int, scheme: int) -> float:
        return self.scales.get((index, SCHEMES[scheme]), 1.0)

    def depends_on_batches(self, chosen: list[int | None]) -> bool:
        """Whether a part of the loss that is no term differs from batch to batch, so that its mean over the rows may be another."""
        if self.is_unsteady:
            return True
        if len(self.rests) < 2:
            return False
        stacked = torch.stack(self.rests)
        rests, sizes = stacked[:, 0], stacked[:, 1]
        for index, scheme in enumerate(chosen):
            if scheme is not None:
                rests = rests - self._scale(index, scheme) * stacked[:, 2 + index * len(SCHEMES) + scheme]
        rests = rests[torch.isfinite(rests)]
        return bool(len(rests) > 1 and rests.max() - rests.min() > SAME * sizes.nan_to_num().max())

    def results(self, over_ranks: Callable[[torch.Tensor], torch.Tensor], chosen: list[int | None]) -> dict[str, float]:
        """The loss of the set, and where there are metrics the accuracy and entropy of its items; {} where it had none.

        Args:
            over_ranks: adds up over them.
            chosen: what somebody's sums are divided by.
        """
        if self.totals_of_set is None or self.coefficients is None:
            return {}
        total, amount, *rest = over_ranks(self.totals_of_set).tolist()
        by_rows, num_rows, summed_up, of_sums, weighed, items_of_rows, of_weighed, *rest = rest
        *by_term, items, correct, entropy = rest
        loss = _ratio(total, amount)
        loss += summed_up - _ratio(of_sums, amount) + _ratio(weighed, items_of_rows) - _ratio(of_weighed, amount)
        for index, coefficient in enumerate(self.coefficients):
            of_items, term_items, of_batches = by_term[3 * index : 3 * index + 3]
            loss += coefficient * (_ratio(of_items, term_items) - _ratio(of_batches, amount))
        width = 1 + 2 * len(SCHEMES)
        for index, scheme in enumerate(chosen):
            begin = 3 * len(self.coefficients) + index * width
            summed, *of_schemes = by_term[begin : begin + width]
            if scheme is not None:
                count, of_batches = of_schemes[scheme], of_schemes[len(SCHEMES) + scheme]
                of_set = summed if SCHEMES[scheme] in (SUM, SCALED) else _ratio(summed, count)
                loss += self._scale(index, scheme) * (of_set - _ratio(of_batches, amount))
        results = {"loss": _ratio(by_rows, num_rows) if self.is_unsteady else loss}
        if items:
            results.update(token_accuracy=_ratio(correct, items), token_entropy=_ratio(entropy, items))
        return results


def _bends(coefficient: torch.Tensor | None, leaves: list[torch.Tensor]) -> bool:
    """Whether what a loss depends on a term by depends on a term in its turn."""
    if coefficient is None or not coefficient.requires_grad:
        return False
    again = torch.autograd.grad(coefficient.sum(), leaves, retain_graph=True, allow_unused=True)
    return any(second is not None and bool((second != 0).any()) for second in again)


def _number(value: Any, device: torch.device) -> torch.Tensor:
    """() in the widest dtype of a device, on it."""
    wide = wide_dtype(device)
    return torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else wide).to(wide).to(device)


def _ratio(total: float, items: float) -> float:
    return total / items if items else 0.0
