"""The terms that a loss is made of, and those among them that somebody averages by hand.

PyTorch's losses with reduction="sum" or "none" are divided by whoever called them: ``loss.sum() / mask.sum()`` is a mean over
the micro-batch, and ``loss.sum() / num_items_in_batch`` a part of the step's. Which it is says the coefficient of the term in
the loss, by autograd: 1 / items, 1 / rows, 1 / num_items_in_batch or 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._compat import engines_at_rest, function_of, is_mean_of_scalar
from ..parallel import is_dtensor
from ..sums import widened
from .counting import Rule, half_of, num_rows

if TYPE_CHECKING:
    from .step import Step


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

    def amount(self, coefficient: torch.Tensor, is_wide: bool = False) -> torch.Tensor:
        """What of the loss it is. (), in the widest dtype where is_wide."""
        parts = (
            [(coefficient * value).sum() for value in map(widened, self.more)]
            if is_wide
            else [(coefficient * value).sum() for value in self.more]
        )
        first = widened(coefficient) * widened(self.value) if is_wide else coefficient * self.value
        return sum(parts, first.sum())


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
UNKNOWN = ""

MEANS = (ITEMS, WEIGHTS, ROWS, ELEMENTS)
SUMS = (SUM, SCALED, TAKEN)
BY_NUMBER = (NUMBER, SHORT, OPEN)
ACTED_ON = (*MEANS, *SUMS, COUNTED, SHORT, OPEN)


class Combination:
    """A loss as a combination of the terms of a step: the sum of coefficient times term, and a rest.

    Attributes:
        pairs: the terms that are in the loss, with their coefficients.
        by_number: () float64, what of the loss is divided by num_items_in_batch. None: that is not known.
        once: the autograd.Function of somebody's own between the loss and its terms, whose backward may run but once. Then
            there are no pairs.

    Args:
        number: a leaf that num_items_in_batch was made of, where what depends on it is to be found.
    """

    def __init__(self, step: Step, loss: Any, number: torch.Tensor | None = None):
        terms = [term for term in step.terms if term.value.requires_grad]
        self.pairs: list[tuple[Term, torch.Tensor]] = []
        self.by_number: torch.Tensor | None = None
        self.once: type | None = None
        values = [term.value for term in terms] + ([] if number is None else [number])
        if values and isinstance(loss, torch.Tensor) and loss.requires_grad:
            self.once = _function_between(loss, values)
        if values and isinstance(loss, torch.Tensor) and loss.requires_grad and self.once is None:
            with engines_at_rest(getattr(step.trainer, "model_wrapped", None), loss):
                found = torch.autograd.grad(loss.sum(), values, retain_graph=True, allow_unused=True)
            self.pairs = [(term, c.detach()) for term, c in zip(terms, found, strict=False) if c is not None]
            if number is not None:  # x / n changes by -x / n^2
                slope = torch.zeros_like(number) if found[-1] is None else found[-1]
                self.by_number = -(widened(number.detach()) * widened(slope)).sum().to(loss.device)

    def merge(self, step: Step, schemes: Schemes, loss: Any) -> None:
        """Makes one term of the calls that are parts of one sum: the chunks of a sequence, or its rows, over one count."""
        groups: list[tuple[float, list[int]]] = []  # coefficient, places in pairs
        empty: dict[str, list[int]] = {}  # places of those without an item, whose coefficient says nothing
        for place, (term, coefficient) in enumerate(self.pairs):
            if term.call[0] != "by hand" or term.target is None:
                continue
            mine = [group for group in groups if self.pairs[group[1][0]][0].name == term.name]
            if has_no_items(term):
                (mine[-1][1] if mine else empty.setdefault(term.name, [])).append(place)
                continue
            scale, used = _unit(term, coefficient) or (0.0, None)
            if used is not None or scale == 0 or (scale == 1 and not _is_averaged(loss, term.value)):
                continue
            same = [group for group in mine if abs(group[0] - scale) <= _tolerance(coefficient) * abs(scale)]
            if same:
                same[0][1].append(place)
            else:
                groups.append((scale, [*empty.pop(term.name, []), place]))
        merged: set[int] = set()
        for scale, places in groups:
            terms = [self.pairs[place][0] for place in places]
            rule = schemes.rule_of_parts(step, terms, scale, loss)
            if rule is None:
                continue
            first, coefficient = self.pairs[places[0]]
            target = torch.cat([term.target.flatten() for term in terms if term.target is not None])
            more = tuple(term.value for term in terms[1:])
            of_all = torch.full((), scale, dtype=coefficient.dtype, device=coefficient.device)
            whole = first._replace(rule=rule, reduction="sum", target=target, more=more)
            self.pairs[places[0]] = whole, of_all
            merged |= set(places[1:])
        self.pairs = [pair for place, pair in enumerate(self.pairs) if place not in merged]

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
        theirs = [
            (t, c) for t, c in self.pairs if schemes.found.get(t.call) in (*BY_NUMBER, COUNTED) and t.call not in left
        ]
        return sum((t.amount(c, is_wide=True) for t, c in theirs), torch.zeros((), dtype=torch.float64))


class Fit(NamedTuple):
    """What a rank says of a loss that it averages by hand, the first time it does."""

    schemes: list[str]  # those that fit, the likeliest first
    is_averaged: bool  # whether something divides, where one of them is a sum
    rule: Rule | None


class Schemes:
    """What is known of how a Trainer averages its terms, by call: found in its first window, and used from then on.

    Attributes:
        found: call -> one of the words above: the first of those that fitted all micro-batches so far.
        units: call -> the coefficients of this window's micro-batches, where they follow none of them.
        constants: call -> the class weights that it had in this window.
        new: call -> what this rank says of it, where the others are to be asked.
        of_parts: the first call of several that are parts of one sum -> its name, and how the items of all are counted.
    """

    def __init__(self) -> None:
        self.found: dict[Any, str] = {}
        self._fitting: dict[Any, list[str]] = {}
        self.units: dict[Any, list[float]] = {}
        self.constants: dict[Any, torch.Tensor] = {}
        self.new: dict[Any, Fit] = {}
        self.of_parts: dict[Any, tuple[str, Rule]] = {}

    def rule_of_parts(self, step: Step, terms: list[Term], scale: float, loss: Any) -> Rule | None:
        """How the items of several calls are counted together, which are divided by one count of all of them; None: they are
        not parts of one sum."""
        first = terms[0]
        known = self.of_parts.get(first.call)
        if not step.is_watched:
            return None if known is None or known[0] != first.name else known[1]
        if len(terms) < 2 or not isinstance(loss, torch.Tensor):
            return None
        put_together = _joined([term.target for term in terms if term.target is not None])
        rules = (step.rule_of_parts(target, first) for target in put_together)
        rule = next((rule for rule in rules if rule is not None), None)
        if rule is None:
            return None
        counts = {float(step.held(one)) for one in (rule, rule._replace(weight=None))}
        near = _tolerance(first.value)
        fits = any(
            abs(scale * count - 1) <= near or is_divided_by(loss, first.value, count) for count in counts if count
        )
        if not fits:
            return None
        for term in terms:
            step.doubts.pop(term.call, None)
        self.of_parts[first.call] = first.name, rule
        return rule

    def is_part(self, call: Any, name: str, is_unknown: bool) -> bool:
        """Whether a call is, or may be, one of several that are parts of one sum: how many there are may differ."""
        return call in self.of_parts or (is_unknown and any(name == known for known, _ in self.of_parts.values()))

    @property
    def are_acted_on(self) -> bool:
        return any(scheme in ACTED_ON for scheme in self.found.values())

    def look(self, step: Step, loss: torch.Tensor, combination: Combination, number: Any, is_taken: bool) -> set[str]:
        """Finds the scheme of each term in a micro-batch of the first window; what speaks against one found before.

        Args:
            number: num_items_in_batch per micro-batch, where the loss has made use of it; else None.
            is_taken: whether it was taken as a number of Python's, of the whole step.
        """
        reasons = set()
        for term, coefficient in combination.pairs:
            if not bool(torch.isfinite(coefficient).all()) or has_no_items(term):
                continue  # nothing, divided by nothing, or by a bound: another micro-batch will tell
            if _is_in_mean_of_rows(step, term, loss):
                if self.found.get(term.call, ROWS) not in (ROWS, UNKNOWN):
                    reasons.add(f"the {term.name} of a row was averaged over something else in a micro-batch before")
                elif step.exchange is not None and term.reduction != "mean" and term.call not in self.found:
                    self.new[term.call] = Fit([ROWS], True, term.rule)
                is_new = term.reduction == "mean" and term.call not in self.found
                if is_new and num_rows(step.inputs) == 2 and _taken_by(term) == "a slice":
                    reasons.add(
                        f"the {term.name} of a slice of one row may be a mean over the first or the second half of the rows; it "
                        "is taken for a row's, index instead of slicing"
                    )
                self._fitting[term.call], self.found[term.call] = [ROWS], ROWS
                continue
            factors = _fitting(step, term, coefficient, number, is_taken, loss)
            fitting = list(factors)
            if _may_be_of_his_own(loss, term, coefficient, factors):
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
                is_averaged = SUM not in fitting or _is_averaged(loss, term.value)
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
                unit = _unit(term, coefficient)
                if unit is not None:
                    # the weight of a single item says nothing of what all are divided by
                    if term.reduction == "sum" or int((_is_item(term, coefficient) & (coefficient != 0)).sum()) > 1:
                        self.units.setdefault(term.call, []).append(unit[0])
                elif number is None:
                    reasons.add(f"the {term.name} without a reduction is averaged in a way that is not recognised")
            elif self.found[term.call] in MEANS and term.reduction != "mean":
                self.units.setdefault(term.call, []).append(factors.get(self.found[term.call], 1.0))
            elif self.found[term.call] == SCALED:
                unit = _unit(term, coefficient)
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
        return reasons

    def ends_of_window(self) -> set[str]:
        """What speaks against coefficients that are taken for those of a sum, or of a mean."""
        reasons = set()
        for (kind, *_), units in self.units.items():
            if not max(units) - min(units) <= 1e-5 * max(map(abs, units)):
                done = "multiplied" if kind == "mean" else "divided"
                reasons.add(f"a loss is {done} by another number in each micro-batch, which is not recognised")
        self.units.clear()
        self.constants.clear()
        return reasons

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
            scheme = self.found.get(term.call, UNKNOWN)
            if scheme == OPEN and coefficient.any():
                number = getattr(step.items, "share", step.items)
                is_ready = NUMBER in _fitting(step, term, coefficient, number, False)
                scheme = self.found[term.call] = NUMBER if is_ready else SHORT
            factor = _factor(step, term, coefficient, scheme) if scheme in ACTED_ON else 1.0
            if term.call[:2] in corrections and scheme != ROWS and (term.rule is not None or term.share is not None):
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


def _is_averaged(loss: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there is a division or a mean between a term and the loss: with a single row or item it cannot be seen from its
    coefficient."""
    wanted = torch.autograd.graph.get_gradient_edge(value).node
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or node is wanted:
            continue
        seen.add(node)
        if node.name().startswith(("Div", "Mean")) and not is_mean_of_scalar(node) and _leads_to(node, wanted):
            return True
        waiting += [following for following, _ in node.next_functions]
        if len(seen) > MOST_NODES:
            return True
    return False


def _on_the_way(loss: torch.Tensor, value: torch.Tensor) -> Iterator[Any]:
    """The nodes of the graph between a term and the loss, the loss's first."""
    wanted = torch.autograd.graph.get_gradient_edge(value).node
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting and len(seen) <= MOST_NODES:
        node = waiting.pop()
        if node is None or node in seen or node is wanted or not _leads_to(node, wanted):
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def _divisors(loss: torch.Tensor, value: torch.Tensor) -> list[float]:
    """The numbers that a term is divided by on its way to the loss, or multiplied by one over."""
    found: list[float] = []
    for node in _on_the_way(loss, value):
        if node.name().startswith("Div"):
            found += _saved(node, "_saved_other")
        elif node.name().startswith("Mul"):
            found += [1 / number for name in ("_saved_other", "_saved_self") for number in _saved(node, name, True)]
        elif node.name().startswith("Mean") and not is_mean_of_scalar(node):
            found.append(_size_of_mean(node))
    return found


def _multipliers(loss: torch.Tensor, value: torch.Tensor) -> list[float]:
    """The numbers that a term is multiplied by on its way to the loss."""
    return [
        number
        for node in _on_the_way(loss, value)
        if node.name().startswith("Mul")
        for name in ("_saved_other", "_saved_self")
        for number in _saved(node, name)
    ]


def is_divided_by(loss: torch.Tensor, value: torch.Tensor, number: Any) -> bool:
    """Whether the graph shows a division of a term by this number."""
    return any(abs(divisor - float(number)) <= 1e-6 * abs(float(number)) for divisor in _divisors(loss, value))


def _is_in_mean_of_rows(step: Step, term: Term, loss: torch.Tensor) -> bool:
    """Whether what a loss is the mean of is a number for each row, which this term is one of, or all of which it is made into:
    ``torch.stack([cross_entropy(x, y) for x, y in rows]).mean()``, ``(values.sum(1) / lengths).mean()``."""
    rows = num_rows(step.inputs)
    if tuple(term.value.shape) == (rows,):
        return False  # its own mean tells by its coefficient
    of_a_row = term.rule is None or (term.rule.half is not None and term.rule.of == rows)
    if term.value.dim() == 0 and rows > 1 and not of_a_row:
        return False  # two heads of two rows
    if term.reduction == "mean" and _taken_by(term) and is_divided_by(loss, term.value, rows):
        return True  # in a loop over them, which adds up
    if not is_mean_of_rows(loss, term.value, rows):
        return False
    length = term.target.shape[-1] if term.target is not None and term.target.dim() > 1 else 0
    # a row's own mean over its length is one over padding too
    return length <= 1 or not is_divided_by(loss, term.value, length)


def _taken_by(term: Term) -> str:
    """How what a loss was called with was taken from a batch as one row of it; "" where it was not, as far as can be seen."""
    node = term.value.grad_fn
    for _ in range(MOST_VIEWS):
        if node is None:
            return ""
        name, saved = node.name(), [getattr(node, f"_saved_{what}", 0) for what in ("dim", "start", "end")]
        dim = saved[0]
        if name.startswith("Unbind") or (name.startswith("Select") and dim == 0):
            return "an index"
        sizes = getattr(node, "_saved_self_sym_sizes", ())
        if name.startswith("Slice") and dim == 0 and saved[2] - saved[1] == 1 and len(sizes) > 2:
            return "a slice"
        following = [after for after, _ in node.next_functions if after is not None]
        node = following[0] if following else None
        if name.startswith(("Addmm", "Mm", "Bmm", "Linear", "AccumulateGrad")):
            return ""
    return ""


MOST_VIEWS = 12  # operations between a loss and the logits of all rows


def is_mean_of_rows(loss: torch.Tensor, value: torch.Tensor, rows: int) -> bool:
    """Whether there is a mean over a tensor (rows,) between a term and the loss, or its sum and a division by as many; and that
    tensor is a sum over each row, or a stack of numbers. A mean over each row is one over padding too, and something else."""
    sums = means = is_made_of_rows = False
    for node in _on_the_way(loss, value):
        sizes, name = tuple(getattr(node, "_saved_self_sym_sizes", ())), node.name()
        if sizes == (rows,):
            means |= name.startswith("Mean")
            sums |= name.startswith("Sum")
        elif name.startswith("Mean") and len(sizes) > 1:
            return False
        is_made_of_rows |= name.startswith(("Stack", "Cat", "Unsqueeze")) or (name.startswith("Sum") and len(sizes) > 1)
    return is_made_of_rows and (means or (sums and is_divided_by(loss, value, rows)))


def _saved(node: Any, name: str, is_tensor: bool = False) -> list[float]:
    """A number that a node has kept for its backward; none where it was written over since. is_tensor: only one that was a
    tensor, and no number of Python's, which autograd keeps in fp64."""
    try:
        kept = getattr(node, name, None)
    except RuntimeError:
        return []
    # of a DTensor the ranks would have to meet
    if not isinstance(kept, torch.Tensor) or is_dtensor(kept) or kept.is_complex() or kept.numel() != 1:
        return []
    if is_tensor and kept.dtype == torch.float64:
        return []
    number = float(kept.detach())
    return [number] if math.isfinite(number) and number != 0 else []


def _size_of_mean(node: Any) -> float:
    """How many numbers a mean is of."""
    sizes = tuple(getattr(node, "_saved_self_sym_sizes", ()))
    dims = getattr(node, "_saved_dim", None) or range(len(sizes))
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in dims]  # autograd keeps a negative one so
    return float(math.prod(int(sizes[dim]) for dim in signed))


def _function_between(loss: torch.Tensor, values: list[torch.Tensor]) -> type | None:
    """An autograd.Function of somebody's own that a gradient of the loss by these values would run through."""
    wanted = {torch.autograd.graph.get_gradient_edge(value).node for value in values}
    seen: set[Any] = set(wanted)
    waiting: list[Any] = [loss.grad_fn]
    while waiting and len(seen) <= MOST_NODES:
        node = waiting.pop(0)  # the nearest first
        if node is None or node in seen:
            continue
        seen.add(node)
        function = function_of(node)
        is_own = function is not None and function.__module__.partition(".")[0] not in TRUSTED
        if is_own and any(_leads_to(node, one) for one in wanted):
            return function
        waiting += [following for following, _ in node.next_functions]
    return None


TRUSTED = ("torch", "accumloss", "accelerate", "transformers", "deepspeed")  # whose functions' backward may run twice
MOST_NODES = 200  # of a graph that are looked at


def _leads_to(node: Any, wanted: Any) -> bool:
    seen: set[Any] = set()
    waiting = [node]
    while waiting and len(seen) <= MOST_NODES:
        node = waiting.pop()
        if node is wanted:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return False


def _unit(term: Term, coefficient: torch.Tensor) -> tuple[float, torch.Tensor | None] | None:
    """The one coefficient of all items, and where they are if they are not all: a mask of the value's shape.

    None: the items have different ones.
    """
    if term.reduction == "sum":
        return float(coefficient), None
    is_item = _is_item(term, coefficient)
    used = is_item & (coefficient != 0)
    values = coefficient[used]
    if not values.numel():
        return 0.0, None
    low, high = float(values.min()), float(values.max())
    if high - low > _tolerance(coefficient) * abs(high):
        return None
    return high, None if bool((used == is_item).all()) else used


def _joined(targets: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What targets may be chunks of: one behind the other, or along a dimension."""
    if any(target.dtype != targets[0].dtype for target in targets):
        return
    yield torch.cat([target.flatten() for target in targets])
    for dim in range(1, min(target.dim() for target in targets)):
        if len({(*target.shape[:dim], *target.shape[dim + 1 :]) for target in targets}) == 1:
            yield torch.cat(targets, dim)


def has_no_items(term: Term) -> bool:
    if term.reduction == "mean" or term.target is None or term.ignore_index is None:
        return False
    return not bool((term.target != term.ignore_index).any())


def _is_item(term: Term, coefficient: torch.Tensor) -> torch.Tensor:
    """Which values of a term without a reduction are not ignored; all where that cannot be said."""
    if term.ignore_index is not None and term.target is not None and term.target.shape == coefficient.shape:
        return term.target != term.ignore_index
    return torch.ones_like(coefficient, dtype=torch.bool)


def _tolerance(value: torch.Tensor) -> float:
    return max(1e-5, 4 * torch.finfo(value.dtype).eps)


def _fitting(
    step: Step, term: Term, coefficient: torch.Tensor, number: Any, is_taken: bool, loss: torch.Tensor | None = None
) -> dict[str, float]:
    """The schemes that a coefficient fits, the likeliest first, each with the factor that the term has besides.

    Where that is not 1 the loss tells: its graph has a division by what is counted.
    """

    def is_one(value: Any) -> bool:
        return abs(float(value) - 1) <= _tolerance(coefficient)

    here = None if term.rule is None else step.held(term.rule)
    if term.reduction == "mean":
        if number is None or here is None or is_one(coefficient):
            return {}
        whole = number * (step.micro_batches if is_taken else 1)
        return {COUNTED: 1.0} if here > 0 and is_one(float(coefficient) * float(whole) / float(here)) else {}
    unit = _unit(term, coefficient)
    if unit is None:
        return {}
    scale, used = unit
    by_number = []
    if number is not None and not is_taken:
        by_number += [NUMBER] if is_one(scale * float(number) / step.among) else []
        by_number += [SHORT] if step.among != 1 and is_one(scale * float(number)) else []
        if not by_number and step.among != 1 and loss is not None and is_divided_by(loss, term.value, number):
            is_ready = step.among in _multipliers(loss, term.value)
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
    divisors = [] if loss is None or number is not None else _divisors(loss, term.value)
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


def _may_be_of_his_own(loss: torch.Tensor, term: Term, coefficient: torch.Tensor, fitting: dict[str, float]) -> bool:
    """Whether a coefficient that fits one over a count may be a factor like 0.5 as well: nothing on the way divides."""
    if term.reduction == "mean" or not fitting or next(iter(fitting)) not in MEANS:
        return False
    unit = _unit(term, coefficient)
    if unit is None or unit[0] in (0.0, 1.0) or abs(float(f"{unit[0]:.2g}") / unit[0] - 1) > 1e-6:
        return False
    return not _is_averaged(loss, term.value) and not _divisors(loss, term.value)


def _is_written_down(step: Step, scale: float) -> bool:
    """Whether a factor is one of somebody's own, such as 0.01, and no division by something that the batch may hold so often."""
    most = max((v.numel() for v in step.inputs.values() if isinstance(v, torch.Tensor)), default=0)
    inverse = abs(1 / scale)
    is_count = abs(inverse / max(round(inverse), 1) - 1) <= 1e-6 and inverse <= most
    return not is_count and abs(float(f"{scale:.2g}") / scale - 1) <= 1e-6


def fitting_schemes(step: Step, term: Term, coefficient: torch.Tensor, loss: torch.Tensor) -> dict[str, float]:
    """The schemes that a coefficient of a term that somebody averages fits, with the factor that the term has besides; a sum
    over one row or item is told by its graph."""
    if _is_in_mean_of_rows(step, term, loss):
        return {}  # it stays what Trainer makes of it, who averages by rows
    fitting = _fitting(step, term, coefficient, None, False, loss)
    if _may_be_of_his_own(loss, term, coefficient, fitting):
        unit = _unit(term, coefficient)
        assert unit is not None
        return {SCALED: unit[0]}
    return {SUM: 1.0} if SUM in fitting and not _is_averaged(loss, term.value) else fitting


def _factor(step: Step, term: Term, coefficient: torch.Tensor, scheme: str) -> Any:
    """What a term is multiplied by to be a part of the step's, which Trainer averages over the micro-batches."""
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


def rule_of_scheme(rule: Rule, scheme: str) -> Rule | None:
    """How what is divided by is counted, of a loss over the items of a rule; None: it is not."""
    if scheme == ITEMS:
        return rule._replace(weight=None)
    if scheme == ELEMENTS:
        return rule._replace(weight=None, ignore_index=None, mask=None, filled=None)
    return rule if scheme == WEIGHTS else None


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
