"""The terms that a loss is made of, and those among them that somebody averages by hand.

PyTorch's losses with reduction="sum" or "none" are divided by whoever called them: ``loss.sum() / mask.sum()`` is a mean over
the micro-batch, and ``loss.sum() / num_items_in_batch`` a part of the step's. Which it is says the coefficient of the term in
the loss, by autograd: 1 / items, 1 / rows, 1 / num_items_in_batch or 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._compat import engines_at_rest
from ..sums import widened
from . import rows
from .counting import Rule, half_of, num_rows
from .graph import Graph
from .term import Term, has_no_items, is_item, put_together, tolerance, unit_of

if TYPE_CHECKING:
    from .step import Step


# What a mean was measured to be over: a Rule, or one of these
ROWS_WEIGH = "rows"
SUM_WEIGHS = "nothing: it is a plain sum"
CONSTANT = "nothing: it is the same in every micro-batch"
Weight = Rule | str


class Measured(NamedTuple):
    """What a training step makes use of, where register_with_transformers(verify=True) has measured.

    Attributes:
        rest: what the part of the loss is a mean over that nothing recognised computed; all that fitted, the likeliest
            first. Empty: there is none, or nothing fits.
        calls: the same for recognised losses whose labels come from no entry of the batch, by call.
    """

    rest: tuple[Weight, ...] = ()
    calls: tuple[tuple[Any, tuple[Weight, ...]], ...] = ()


# How a coefficient is made: what is divided by, or how often it is added up
ITEMS = "its items"
WEIGHTS = "the weights of its items"
ROWS = "its rows"
ELEMENTS = "its elements, padding included"
NUMBER = "num_items_in_batch"
SHORT = "num_items_in_batch, and not multiplied by the ranks"
OPEN = "num_items_in_batch, and perhaps not multiplied by the ranks"
TAKEN = "num_items_in_batch as a number of Python's"
SUM = "nothing: a sum"
SCALED = "nothing: a sum, times a constant"
COUNTED = "num_items_in_batch, times its own items"
SUM_OF_ROWS = "nothing: a sum of what its rows have for a mean"
ITEMS_OF_ROWS = "its items, a row's mean by its own"
UNKNOWN = ""

MEANS = (ITEMS, WEIGHTS, ROWS, ELEMENTS)
SUMS = (SUM, SCALED, TAKEN)
OVER_RANKS = (SUM, SCALED)
BY_NUMBER = (NUMBER, SHORT, OPEN)
OF_LOOPS = {rows.MEAN: ROWS, rows.SUM: SUM_OF_ROWS, rows.BY_ITEMS: ITEMS_OF_ROWS, rows.UNKNOWN: UNKNOWN}
ACTED_ON = (*MEANS, *SUMS, COUNTED, SHORT, OPEN, SUM_OF_ROWS, ITEMS_OF_ROWS)


class Combination:
    """A loss as a combination of the terms of a step: the sum of coefficient times term, and a rest.

    Attributes:
        pairs: the terms that are in the loss, with their coefficients.
        by_number: () float64, what of the loss is divided by num_items_in_batch. None: that is not known.
        once: the autograd.Function of somebody's own between the loss and its terms, whose backward may run but once. Then
            there are no pairs.
        graph: of the loss, down to its terms; None where it has none.

    Args:
        number: a leaf that num_items_in_batch was made of, where what depends on it is to be found.
    """

    def __init__(self, step: Step, loss: Any, number: torch.Tensor | None = None):
        terms = [term for term in step.terms if term.value.requires_grad]
        self.pairs: list[tuple[Term, torch.Tensor]] = []
        self.by_number: torch.Tensor | None = None
        self.once: type | None = None
        values = [term.value for term in terms] + ([] if number is None else [number])
        self.graph: Graph | None = None
        if values and isinstance(loss, torch.Tensor) and loss.requires_grad:
            self.graph = Graph(loss, values)
            self.once = self.graph.function_between()
        if values and isinstance(loss, torch.Tensor) and loss.requires_grad and self.once is None:
            with engines_at_rest(getattr(step.trainer, "model_wrapped", None), loss):
                found = torch.autograd.grad(loss.sum(), values, retain_graph=True, allow_unused=True)
            self.pairs = [(term, c.detach()) for term, c in zip(terms, found, strict=False) if c is not None]
            if number is not None:  # x / n changes by -x / n^2
                slope = torch.zeros_like(number) if found[-1] is None else found[-1]
                self.by_number = -(widened(number.detach()) * widened(slope)).sum().to(loss.device)

    def merge(self, step: Step, schemes: Schemes) -> None:
        """Makes one term of the calls that are parts of one sum: the chunks of a sequence, or its rows, over one count."""
        parts: list[tuple[int, float]] = []  # places in pairs, and the coefficients of their items
        empty: list[int] = []  # places of those without an item, whose coefficient says nothing
        for place, (term, coefficient) in enumerate(self.pairs):
            if term.call[0] != "by hand" or term.target is None or term.site in schemes.loops:
                continue
            if has_no_items(term):
                empty.append(place)
                continue
            scale, used = unit_of(term, coefficient) or (0.0, None)
            if used is None and scale != 0 and (scale != 1 or self.is_averaged(term)):
                parts.append((place, scale))
        merged: dict[int, int] = {}  # places that have gone into others
        # the turns of one loop, and then what several lines of code sum
        for of in (lambda term: (term.site, term.name), lambda term: None):
            groups: list[tuple[Any, float, list[int]]] = []
            for place, scale in parts:
                term, coefficient = self.pairs[place]
                key = schemes.part_of(term, of(term)) if not step.is_watched else of(term)
                near = tolerance(coefficient) * abs(scale)
                same = [places for k, other, places in groups if k == key and abs(other - scale) <= near]
                if same:
                    same[0].append(place)
                else:
                    groups.append((key, scale, [place]))
            for _, scale, places in groups:
                if self._merge(step, schemes, scale, places, empty):
                    merged.update(dict.fromkeys(places, places[0]))
            parts = [(place, scale) for place, scale in parts if place not in merged]
        for place in empty:
            term = self.pairs[place][0]
            if any(self.pairs[other][0].site == term.site for other in merged):
                step.doubts.pop(term.call, None)
                merged[place] = -1
        self.pairs = [pair for place, pair in enumerate(self.pairs) if merged.get(place, place) == place]

    def _merge(self, step: Step, schemes: Schemes, scale: float, places: list[int], empty: list[int]) -> bool:
        """Whether the terms at these places are parts of one sum; then the first of them is all of it."""
        terms = [self.pairs[place][0] for place in places]
        sites = {term.site for term in terms}
        without = [self.pairs[place][0] for place in empty if self.pairs[place][0].site in sites]
        rule = schemes.rule_of_parts(step, terms, without, scale, self)
        if rule is None:
            return False
        first, coefficient = self.pairs[places[0]]
        whole, of_all = put_together(terms, scale, coefficient)
        more = tuple(term.value for term in terms[1:])
        call = schemes.call_of_parts(first.site)
        if not step.is_watched:
            schemes.found.setdefault(call, ITEMS if rule.weight is None else WEIGHTS)
        self.pairs[places[0]] = whole._replace(rule=rule, call=call, more=more), of_all
        return True

    def is_averaged(self, term: Term) -> bool:
        """Whether there is a division or a mean between a term and the loss."""
        return self.graph is None or self.graph.is_averaged(term.value)

    @property
    def uses_a_mean(self) -> bool:
        return any(term.reduction == "mean" for term, _ in self.pairs)

    def rest(self, loss: torch.Tensor, left: Any = ()) -> torch.Tensor:
        """What is left of the loss without its terms, but for those of the calls that are to be left in it."""
        for term, coefficient in self.pairs:
            if term.call not in left:
                loss = loss - term.amount(coefficient)
        return loss

    def divided_by_number(self, schemes: Schemes) -> Any:
        """The terms that are divided by num_items_in_batch: what of by_number they are. () float64."""
        left = schemes.left_in_rest()
        theirs = [(t, c) for t, c in self.pairs if schemes.of(t) in (*BY_NUMBER, COUNTED) and t.call not in left]
        return sum((t.amount(c, is_wide=True) for t, c in theirs), torch.zeros((), dtype=torch.float64))


NOT_LOOKED_AT = "a {} that is averaged by hand was called that no step which was looked at had"


class Fit(NamedTuple):
    """What a rank says of a loss that it averages by hand, the first time it does."""

    schemes: list[str]  # those that fit, the likeliest first
    is_averaged: bool  # whether something divides, where one of them is a sum
    rule: Rule | None


class Counted(NamedTuple):
    """Where in a window a loss was computed whose items are counted by one rule."""

    name: str
    turns: set[int | None]  # micro-batches; None: not known which
    sites: set[int]  # in the code


class Schemes:
    """What is known of how a Trainer averages its terms, by call: found in its first window, and used from then on.

    Attributes:
        found: call -> one of the words above: the first of those that fitted all micro-batches so far.
        units: call -> the coefficients of this window's micro-batches, where they follow none of them.
        constants: call -> the class weights that it had in this window.
        new: call -> what this rank says of it, where the others are to be asked.
        of_parts: site of calls that are parts of one sum, or that may be -> the first site of that sum, and how the items
            of all are counted.
        loops: site of calls that a loop over rows makes -> what their losses are made into, and how all items are counted
            where they weigh by them.
        has_looked: whether a micro-batch was looked at.
    """

    def __init__(self) -> None:
        self.found: dict[Any, str] = {}
        self._fitting: dict[Any, list[str]] = {}
        self.units: dict[Any, list[float]] = {}
        self.constants: dict[Any, torch.Tensor] = {}
        self.new: dict[Any, Fit] = {}
        self.of_parts: dict[int, tuple[int, Rule]] = {}
        self.loops: dict[int, tuple[str, Rule | None]] = {}
        self.has_looked = False
        self._together: set[int] = set()  # first sites of sums whose parts were seen
        self._called: dict[Rule, Counted] = {}  # how items are counted -> where they are, in this window
        self._looked_at = 0  # micro-batches of this window
        self._looped: dict[int, int] = {}  # site -> in how many of them a loop over rows has called a loss
        self._divided_by_all: set[int] = set()  # sites of loops that leave rows out, and divide by all of them

    def of(self, term: Term) -> str:
        """The scheme of a term."""
        return self.of_call(term.call, term.site)

    def of_call(self, call: Any, site: int) -> str:
        if site in self.loops:
            return self.loops[site][0]
        if self.is_part(call, site):
            return self.found.get(self.call_of_parts(site), UNKNOWN)
        return self.found.get(call, UNKNOWN)

    def call_of_parts(self, site: int) -> Any:
        """The call that stands for all parts of one sum: which of them is the first that has an item is no matter."""
        return "by hand", (self.of_parts[site][0], 0)

    def is_part(self, call: Any, site: int) -> bool:
        """Whether a call is, or may be, one of several that are parts of one sum: how many there are may differ."""
        known = self.of_parts.get(site)
        return known is not None and (known[0] in self._together or call not in self.found)

    def is_new(self, call: Any, site: int) -> bool:
        """Whether nothing like this call was made in any micro-batch that was looked at."""
        return self.has_looked and call not in self.found and site not in self.loops and site not in self.of_parts

    def part_of(self, term: Term, otherwise: Any) -> Any:
        """What a term was a part of when it was looked at."""
        return self.of_parts[term.site][0] if term.site in self.of_parts else otherwise

    def rule_of_parts(
        self, step: Step, terms: list[Term], empty: list[Term], scale: float, combination: Combination
    ) -> Rule | None:
        """How the items of several calls are counted together, which are divided by one count of all of them; None: they are
        not parts of one sum.

        Args:
            empty: calls from the same places that had no item.
        """
        first = terms[0]
        if not step.is_watched:
            known = self.of_parts.get(first.site)
            is_together = known is not None and known[0] in self._together
            is_alone = step.calls_at.get(first.site) == 1
            if known is None or (is_alone and not self.is_part(first.call, first.site)):
                return None
            if is_together or self._are_divided(step, terms, scale, known[1], combination):
                return known[1]
            step.ambiguous.add(NOT_LOOKED_AT.format(first.name))
            return None
        rule = self._rule_together(step, terms, empty)
        is_alone = len(terms) < 2 and step.calls_at.get(first.site) == 1
        is_known = is_alone and first.rule is not None and _unweighted(rule) == _unweighted(first.rule)
        if rule is None or is_known or not self._are_divided(step, terms, scale, rule, combination):
            return None
        for term in terms:
            step.doubts.pop(term.call, None)
            self.of_parts[term.site] = first.site, rule
        if step.differs(("parts", first.site), rule._replace(weight=None)):
            step.doubts["parts", first.site] = 1, ""
        self._together.add(first.site)
        return rule

    @staticmethod
    def _rule_together(step: Step, terms: list[Term], empty: list[Term]) -> Rule | None:
        first = terms[0]
        ordered = sorted([*terms, *empty], key=lambda term: term.call[1][1]) if empty else terms
        targets = [term.target for term in ordered if term.target is not None]
        rule = step.rule_of_memory(targets, first.ignore_index)
        if rule is not None:
            return rule.weighted(first.weight)
        if len(terms) < 2 and not empty and first.rule is not None:
            return first.rule
        rules = (step.rule_of_parts(target, first) for target in _joined(targets, num_rows(step.inputs), first))
        return next((rule for rule in rules if rule is not None), None)

    @staticmethod
    def _are_divided(step: Step, terms: list[Term], scale: float, rule: Rule, combination: Combination) -> bool:
        """Whether a sum of these is divided by what the rule counts."""
        near, graph = tolerance(terms[0].value), combination.graph
        counts = {float(step.held(one)) for one in (rule, rule._replace(weight=None))}
        return any(
            abs(scale * count - 1) <= near or (graph is not None and graph.is_divided_by(terms[0].value, count))
            for count in counts
            if count
        )

    @property
    def are_acted_on(self) -> bool:
        return bool(self.loops) or any(scheme in ACTED_ON for scheme in self.found.values())

    def look(self, step: Step, combination: Combination, number: Any, is_taken: bool) -> set[str]:
        """Finds the scheme of each term in a micro-batch of the first window; what speaks against one found before.

        Args:
            number: num_items_in_batch per micro-batch, where the loss has made use of it; else None.
            is_taken: whether it was taken as a number of Python's, of the whole step.
        """
        self.has_looked = True
        self._looked_at += 1
        reasons = set()
        graph = combination.graph
        for term, coefficient in combination.pairs:
            if not bool(torch.isfinite(coefficient).all()) or has_no_items(term) or graph is None:
                continue  # nothing, divided by nothing, or by a bound: another micro-batch will tell
            if term.site in self.loops:
                continue
            num = num_rows(step.inputs)
            if num <= 2 and term.row is not None and rows.is_picked(term, num):
                reasons.add(rows.ALONE.format(term.name))
            if rows.is_in_mean_of_rows(step, term, graph):
                if self.found.get(term.call, ROWS) not in (ROWS, UNKNOWN):
                    reasons.add(f"the {term.name} of a row was averaged over something else in a micro-batch before")
                elif step.exchange is not None and term.reduction != "mean" and term.call not in self.found:
                    self.new[term.call] = Fit([ROWS], True, term.rule)
                self._fitting[term.call], self.found[term.call] = [ROWS], ROWS
                continue
            if num == 1 and rows.may_be_a_loop(graph, term):
                reasons.add(rows.MAY_BE_A_LOOP.format(term.name))
            factors = _fitting(step, term, coefficient, number, is_taken, graph)
            fitting = list(factors)
            if _may_be_of_his_own(graph, term, coefficient, factors):
                fitting = [SCALED, *fitting]
                reasons.add(
                    f"the factor of the {term.name} that is added up may be one of its own, or one over its items or rows; it is "
                    "taken for the former, divide by the latter"
                )
            if is_taken and step.among != 1 and TAKEN in fitting:
                reasons.add(
                    "num_items_in_batch is divided by as a number of Python's, which counts the labels of all ranks, whose "
                    "gradients are averaged: multiply by the ranks, or divide by the tensor"
                )
            before = self.found.get(term.call)
            if before == OPEN:  # until now
                before = next((scheme for scheme in (NUMBER, SHORT) if scheme in fitting), OPEN)
                self.found[term.call] = before
            if before is None:
                is_averaged = SUM not in fitting or combination.is_averaged(term)
                if step.exchange is not None and term.reduction != "mean":
                    self.new[term.call] = Fit(fitting, is_averaged, term.rule)
                if not is_averaged:
                    fitting = [SUM]
                self._fitting[term.call] = fitting
                self.found[term.call] = fitting[0] if fitting else UNKNOWN
            elif term.reduction == "mean":
                if before == UNKNOWN and fitting:
                    self.found[term.call] = fitting[0]  # its factor was 1, so far
            elif before not in (UNKNOWN, OPEN) and before not in fitting:
                still = [scheme for scheme in self._fitting[term.call] if scheme in fitting]
                self._fitting[term.call], self.found[term.call] = still, still[0] if still else UNKNOWN
                reasons.add(f"the {term.name} that is divided by hand fitted another divisor in a micro-batch before")
            if self.found[term.call] == UNKNOWN and term.reduction != "mean":
                unit = unit_of(term, coefficient)
                if unit is not None:
                    # the weight of a single item says nothing of what all are divided by
                    if term.reduction == "sum" or int((is_item(term, coefficient) & (coefficient != 0)).sum()) > 1:
                        self.units.setdefault(term.call, []).append(unit[0])
                elif number is None:
                    reasons.add(f"the {term.name} without a reduction is averaged in a way that is not recognised")
            elif self.found[term.call] in MEANS and term.reduction != "mean":
                self.units.setdefault(term.call, []).append(factors.get(self.found[term.call], 1.0))
            elif self.found[term.call] == SCALED:
                unit = unit_of(term, coefficient)
                self.units.setdefault(term.call, []).append(float("nan") if unit is None else unit[0])
            elif term.reduction == "mean":
                like = (*term.call, term.name, None if term.rule is None else term.rule.key)
                self.units.setdefault(like, []).append(1.0 if fitting else float(coefficient))
            if self.found[term.call] == ELEMENTS and not step.is_of_one_length(term.rule):
                reasons.add(f"the {term.name} is averaged over padding too, of which the micro-batches have less")
            is_of_rows = (
                term.ignore_index is None and term.target is not None and step.are_alike_in_rows(term.target, term.call)
            )
            if self.found[term.call] in (ITEMS, WEIGHTS) and term.rule is None and not is_of_rows:
                reasons.add(f"the labels of the {term.name} that is divided by hand come from no entry of the batch")
            if term.rule is not None and (term.reduction == "mean" or self.found[term.call] in (ITEMS, WEIGHTS)):
                counted = self._called.setdefault(term.rule._replace(weight=None), Counted(term.name, set(), set()))
                counted.turns.add(None if step.here is None else step.index)
                counted.sites.add(term.site)
            if self.found[term.call] in (ITEMS, WEIGHTS) and term.rule is not None and term.reduction != "mean":
                rule = rule_of_scheme(term.rule, self.found[term.call])  # it may be called in chunks some day
                if rule is not None:
                    self.of_parts.setdefault(term.site, (term.site, rule))
        return reasons

    def look_at_loops(self, step: Step, combination: Combination) -> set[str]:
        """Finds what loops over rows make of the losses that they call; what speaks against it."""
        reasons: set[str] = set()
        graph = combination.graph
        at_sites: dict[int, list[tuple[Term, torch.Tensor]]] = {}
        for term, coefficient in combination.pairs if graph is not None else ():
            at_sites.setdefault(term.site, []).append((term, coefficient))
        for site, called in at_sites.items():
            found = [(t, c) for t, c in called if bool(torch.isfinite(c).all()) and not has_no_items(t)]
            if not found or not site or graph is None:
                continue
            before = self.loops.get(site)
            made = next((made for made, scheme in OF_LOOPS.items() if before is not None and scheme == before[0]), "")
            loop = rows.loop_at(step, graph, found, made)
            if loop is None and before is None:
                continue
            scheme = UNKNOWN if loop is None else OF_LOOPS[loop.made]
            name = found[0][0].name
            if before is None and loop is not None:
                self.loops[site] = scheme, loop.rule
                if step.exchange is not None:
                    self.new["loop", site] = Fit([scheme], True, loop.rule)
            elif before is not None and scheme != before[0]:
                reasons.add(f"the {name} of a row was averaged over something else in a micro-batch before")
            if loop is None:
                continue
            reasons |= {loop.doubt} - {""}
            self._looped[site] = self._looped.get(site, 0) + 1
            if len(called) < num_rows(step.inputs):
                self._divided_by_all.add(site)
            if scheme == SUM_OF_ROWS:
                self.units.setdefault(("by hand", site), []).append(loop.factor)
            for term, _ in called:
                step.doubts.pop(term.call if term.call[0] == "by hand" else term.call[:2], None)
        return reasons

    def ends_of_window(self, batches: Sequence[Mapping[str, Any]]) -> set[str]:
        """What speaks against coefficients that are taken for those of a sum, or of a mean, of the micro-batches of a window."""
        reasons = set()
        for (kind, *_), units in self.units.items():
            if not max(units) - min(units) <= 1e-5 * max(map(abs, units)):
                done = "multiplied" if kind == "mean" else "divided"
                reasons.add(f"a loss is {done} by another number in each micro-batch, which is not recognised")
        for site, count in self._looped.items():
            if self.loops[site][0] == ROWS and count < self._looked_at and site not in self._divided_by_all:
                reasons.add(rows.SKIPS)
        for rule, counted in self._called.items():
            keys = [key for key in (rule.key, rule.mask, rule.length_of) if key is not None]
            without = [index for index in range(len(batches)) if not {index, None} & counted.turns]
            without = [i for i in without if all(isinstance(batches[i].get(key), torch.Tensor) for key in keys)]
            if any(self._has_more(rule, counted, index, batches[index]) for index in without):
                reasons.add(f"the {counted.name} is computed in some micro-batches alone, and others have items of it")
        self.units.clear()
        self.constants.clear()
        self._called.clear()
        self._looped.clear()
        self._looked_at = 0
        return reasons

    def _has_more(self, rule: Rule, counted: Counted, index: int, batch: Mapping[str, Any]) -> bool:
        """Whether a micro-batch has items of a rule, and more than the same call was found to have in it."""
        others = [rule for rule, other in self._called.items() if index in other.turns and other.sites & counted.sites]
        return float(rule.total(batch)) > max((float(other.total(batch)) for other in others), default=0.0)

    def is_constant(self, call: Any, value: torch.Tensor) -> bool:
        """Whether class weights are those that the same call had in the micro-batches of this window before."""
        before = self.constants.setdefault(call, value.detach().clone())
        return before.shape == value.shape and bool(torch.eq(before, value).all())

    def take_new(self) -> dict[Any, Fit]:
        """What the other ranks are to be told, once."""
        new, self.new = self.new, {}
        return new

    def agree(self, call: Any, fits: list[Fit]) -> str:
        """The scheme of a call that fits on all ranks that have it, by what each of them says."""
        fitting = [scheme for scheme in fits[0].schemes if all(scheme in fit.schemes for fit in fits)]
        if call[0] == "loop":
            scheme = fitting[0] if fitting else UNKNOWN
            self.loops[call[1]] = scheme, next((fit.rule for fit in fits if fit.rule is not None), None)
            return scheme
        if SUM in fitting and not all(fit.is_averaged for fit in fits):
            fitting = [SUM]
        self._fitting[call] = fitting
        self.found[call] = fitting[0] if fitting else UNKNOWN
        return self.found[call]

    def weighed(
        self, step: Step, combination: Combination, loss: torch.Tensor, corrections: Mapping[Any, torch.Tensor]
    ) -> torch.Tensor:
        """The loss whose terms are parts of the step's, as those are that accumloss divides.

        Args:
            corrections: what the terms of a call are multiplied by besides.
        """
        for term, coefficient in combination.pairs:
            scheme = self.of(term)
            if scheme == OPEN and coefficient.any():
                number = getattr(step.items, "share", step.items)
                is_ready = NUMBER in _fitting(step, term, coefficient, number, False)
                scheme = self.found[term.call] = NUMBER if is_ready else SHORT
            if term.site in self.loops:
                factor = _factor_of_loop(step, term, *self.loops[term.site])
            else:
                factor = _factor(step, term, coefficient, scheme) if scheme in ACTED_ON else 1.0
            is_of_rows = scheme == ROWS or term.site in self.loops
            if term.call[:2] in corrections and not is_of_rows and (term.rule is not None or term.share is not None):
                factor = factor * corrections[term.call[:2]]
            if isinstance(factor, torch.Tensor) or factor != 1.0:
                loss = loss + ((factor - 1) * term.amount(coefficient)).to(loss.device, loss.dtype)
        return loss

    def open_again(self) -> None:
        """After a measurement, which runs as if there were one rank: what somebody does for several is still to be seen."""
        self.found = {call: OPEN if scheme == NUMBER else scheme for call, scheme in self.found.items()}

    def left_in_rest(self) -> set[Any]:
        """Calls of which nothing is known, and which so are no terms."""
        return {call for call, scheme in self.found.items() if scheme == UNKNOWN and call[0] == "by hand"}


def _joined(targets: list[torch.Tensor], rows: int, first: Term) -> Iterator[torch.Tensor]:
    """What targets may be chunks of: one behind the other or before it, along a dimension, or of each row; and if some were
    left out in which all is ignored, the items of these."""
    if any(target.dtype != targets[0].dtype for target in targets):
        return
    together: list[torch.Tensor] = []
    for ordered in (targets, targets[::-1]):
        together.append(torch.cat([target.flatten() for target in ordered]))
        for dim in range(1, min(target.dim() for target in ordered)):
            if len({(*target.shape[:dim], *target.shape[dim + 1 :]) for target in ordered}) == 1:
                together.append(torch.cat(ordered, dim))
        if rows > 1 and all(target.dim() == 1 and target.numel() % rows == 0 for target in ordered):
            together.append(torch.cat([target.reshape(rows, -1) for target in ordered], 1))
    yield from together
    if first.ignore_index is not None:
        yield from (whole[whole != first.ignore_index] for whole in together)


def _unweighted(rule: Rule | None) -> Rule | None:
    return None if rule is None else rule._replace(weight=None)


def _fitting(
    step: Step, term: Term, coefficient: torch.Tensor, number: Any, is_taken: bool, graph: Graph | None = None
) -> dict[str, float]:
    """The schemes that a coefficient fits, the likeliest first, each with the factor that the term has besides.

    Where that is not 1 the loss tells: its graph has a division by what is counted.
    """

    def is_one(value: Any) -> bool:
        return abs(float(value) - 1) <= tolerance(coefficient)

    here = None if term.rule is None else step.held(term.rule)
    if term.reduction == "mean":
        if number is None or here is None or is_one(coefficient):
            return {}
        whole = number * (step.micro_batches if is_taken else 1)
        return {COUNTED: 1.0} if here > 0 and is_one(float(coefficient) * float(whole) / float(here)) else {}
    unit = unit_of(term, coefficient)
    if unit is None:
        return {}
    scale, used = unit
    by_number = []
    if number is not None and not is_taken:
        by_number += [NUMBER] if is_one(scale * float(number) / step.among) else []
        by_number += [SHORT] if step.among != 1 and is_one(scale * float(number)) else []
        if not by_number and step.among != 1 and graph is not None and graph.is_divided_by(term.value, number):
            is_ready = step.among in graph.multipliers(term.value)
            return {NUMBER if is_ready else SHORT: scale * float(number) / (step.among if is_ready else 1)}
    if used is not None or scale == 0:
        return dict.fromkeys(by_number, 1.0)
    counts = {}
    if here is None and term.target is not None:
        here = Rule("labels", 0, term.ignore_index).total({"labels": term.target})
    if here is not None and term.rule is not None and term.rule.weight is not None:
        unweighted = step.held(term.rule._replace(weight=None))
        counts[WEIGHTS] = float(here)
        here = unweighted
    if here is not None:
        counts[ITEMS] = float(here)
    counts[ROWS] = float(num_rows(step.inputs))
    if term.target is not None and term.rule is not None:
        counts[ELEMENTS] = float(term.target.numel())
    fitting = [scheme for scheme, count in counts.items() if scheme in (WEIGHTS, ITEMS) and is_one(scale * count)]
    fitting += by_number
    if is_taken and is_one(scale * float(number) * step.micro_batches):
        fitting.append(TAKEN)
    fitting += [scheme for scheme, count in counts.items() if scheme in (ROWS, ELEMENTS) and is_one(scale * count)]
    if is_one(scale):
        fitting.append(SUM)
    divisors = [] if graph is None or number is not None else graph.divisors(term.value)
    places = {s: [i for i, d in enumerate(divisors) if abs(d - n) <= 1e-6 * n] for s, n in counts.items()}
    divided = {scheme: scale * counts[scheme] for scheme, found in places.items() if found}
    if divided:  # what the graph says goes before what may be chance, and what is divided by first before the rest
        ordered = sorted(divided, key=lambda scheme: (not is_one(divided[scheme]), -places[scheme][-1]))
        return {**{scheme: divided[scheme] for scheme in ordered}, **{s: 1.0 for s in fitting if s not in divided}}
    if not fitting and number is None and _is_written_down(step, scale):
        return {SCALED: scale}
    if not fitting:  # by some times a count, as 2 * items is
        return {s: scale * n for s, n in counts.items() if n and any(d / n in range(2, 65) for d in divisors)}
    return dict.fromkeys(fitting, 1.0)


def _may_be_of_his_own(graph: Graph, term: Term, coefficient: torch.Tensor, fitting: dict[str, float]) -> bool:
    """Whether a coefficient that fits one over a count may be a factor like 0.5 as well: nothing on the way divides."""
    if term.reduction == "mean" or not fitting or next(iter(fitting)) not in MEANS:
        return False
    unit = unit_of(term, coefficient)
    if unit is None or unit[0] in (0.0, 1.0) or abs(float(f"{unit[0]:.2g}") / unit[0] - 1) > 1e-6:
        return False
    return not graph.is_averaged(term.value) and not graph.divisors(term.value)


def _is_written_down(step: Step, scale: float) -> bool:
    """Whether a factor is one of somebody's own, such as 0.01, and no division by something that the batch may hold so often."""
    most = max((v.numel() for v in step.inputs.values() if isinstance(v, torch.Tensor)), default=0)
    inverse = abs(1 / scale)
    is_count = abs(inverse / max(round(inverse), 1) - 1) <= 1e-6 and inverse <= most
    return not is_count and abs(float(f"{scale:.2g}") / scale - 1) <= 1e-6


def fitting_schemes(step: Step, term: Term, coefficient: torch.Tensor, graph: Graph) -> dict[str, float]:
    """The schemes that a coefficient of a term that somebody averages fits, with the factor that the term has besides; a sum
    over one row or item is told by its graph."""
    if rows.is_in_mean_of_rows(step, term, graph):
        return {}  # it stays what Trainer makes of it, who averages by rows
    fitting = _fitting(step, term, coefficient, None, False, graph)
    if _may_be_of_his_own(graph, term, coefficient, fitting):
        unit = unit_of(term, coefficient)
        assert unit is not None
        return {SCALED: unit[0]}
    return {SUM: 1.0} if SUM in fitting and not graph.is_averaged(term.value) else fitting


def _factor(step: Step, term: Term, coefficient: torch.Tensor, scheme: str) -> Any:
    """What a term is multiplied by to be a part of the step's, which Trainer averages over the micro-batches."""
    if scheme in OVER_RANKS:
        return step.micro_batches * ranks_of_sum(step, term, coefficient)
    if scheme in SUMS:
        return float(step.micro_batches)
    if scheme in (SHORT, OPEN):  # the number is of all ranks, over which gradients are averaged
        return float(step.among)
    if scheme == COUNTED:  # the mean has been divided by what the step holds already
        return torch.where(coefficient == 0, 1.0, 1 / coefficient)
    if scheme == ROWS and term.reduction == "mean":  # it has been made a part of the step by its items
        share = step.share_of_mean(term)
        return step.share_of_rows() / share if float(share) else 1.0
    if scheme == ROWS:
        return step.share_of_rows()
    return step.share_of_call_by_hand(term.call, None if term.rule is None else rule_of_scheme(term.rule, scheme))


def ranks_of_sum(step: Step, term: Term, coefficient: torch.Tensor) -> float:
    """What a sum is multiplied by, since the gradients of the ranks are averaged; 1 where its caller has done so."""
    ranks = step.averaged / step.micro_batches
    unit = unit_of(term, coefficient)
    return 1.0 if unit is not None and unit[0] == ranks else float(ranks)


def _factor_of_loop(step: Step, term: Term, scheme: str, rule: Rule | None) -> Any:
    """_factor of a term that a loop over rows has called; what is not recognised weighs as rows do, in Trainer's own way."""
    if scheme == SUM_OF_ROWS:
        whole: Any = float(step.averaged)
    elif scheme == ITEMS_OF_ROWS:
        whole = step.share_of_call_by_hand(("loop", term.site), rule)
    else:
        whole = step.share_of_rows() if scheme == ROWS or term.reduction == "mean" else 1.0
    if term.reduction != "mean":
        return whole
    share = step.share_of_mean(term)
    return whole / share if float(share) else 1.0


def rule_of_scheme(rule: Rule, scheme: str) -> Rule | None:
    """How what is divided by is counted, of a loss over the items of a rule; None: it is not."""
    if scheme == ITEMS:
        return rule._replace(weight=None)
    if scheme == ELEMENTS:
        return rule._replace(weight=None, ignore_index=None, mask=None, filled=None)
    return rule if scheme in (WEIGHTS, ITEMS_OF_ROWS) else None


def is_of_pairs(target: torch.Tensor, rows: int) -> bool:
    """Whether a target has an element for each pair of rows: similarities, or which of them belong together."""
    return target.dim() > 1 and rows > 1 and all(size == rows for size in target.shape)


def is_contrastive(labels: torch.Tensor, rows: int) -> bool:
    """Whether labels are the numbers of the rows, each of which is to be told apart from the others of its micro-batch; or
    all the first class, where a row's own partner stands before those of the others."""
    first = half_of(labels, 0) if labels.numel() == 2 * rows else labels
    if labels.dim() != 1 or rows < 2 or labels.is_floating_point():
        return False
    is_first = labels.numel() == rows and bool((labels == 0).all())
    return is_first or bool((first == torch.arange(len(first), device=labels.device)).all())
