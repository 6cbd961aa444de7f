"""Losses that are computed row by row, in a loop over the micro-batch, and put together by somebody's own code.

``sum(cross_entropy(x, y) for x, y in zip(logits, labels)) / len(labels)`` is a mean over rows that have a mean each,
and the same without the division a sum over them. Which row a call is of says the memory of its labels; what the rows'
losses are made into, the graph and their coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .counting import Rule, ends_in, may_be_labels, num_rows
from .graph import Graph, is_near
from .term import Term, unit_of

if TYPE_CHECKING:
    from .step import Step


class Row(NamedTuple):
    """Where in an entry the labels of a call are."""

    key: str
    row: int
    first: int  # of its labels
    last: int  # so many behind them are not among these


def row_of(labels: torch.Tensor, entries: Mapping[str, Any]) -> Row | None:
    """The row of an entry that these labels are a view of alone, or of a part of it."""
    for key, entry in entries.items():
        if not may_be_labels(key) or not isinstance(entry, torch.Tensor) or entry.dim() < 2:
            continue
        ends = ends_in(labels, entry)
        if ends is None:
            continue
        (first, last), width = ends, int(entry.stride(0))
        row = first // width
        if last // width == row:
            return Row(key, row, first - row * width, (row + 1) * width - 1 - last)
    return None


# What a loop over rows makes of their losses
MEAN = "a mean over its rows"
SUM = "a sum over its rows"
BY_ITEMS = "a mean over its rows, which weigh by their items"
UNKNOWN = ""


class Loop(NamedTuple):
    """What the losses of one micro-batch are made into that a loop over its rows has called.

    Attributes:
        made: one of the words above.
        factor: of a sum, besides; of a mean whatever the rows weigh.
        rule: how the items of all rows are counted, where they weigh by them.
        doubt: why it may be something else.
    """

    made: str
    factor: float = 1.0
    rule: Rule | None = None
    doubt: str = ""


def loop_at(step: Step, graph: Graph, found: Sequence[tuple[Term, torch.Tensor]], before: str) -> Loop | None:
    """What a loop over rows makes of the losses that one place in the code has called, with their coefficients; None: there is
    none.

    Args:
        before: what it made in a micro-batch before.
    """
    terms = [term for term, _ in found]
    if len({term.reduction for term in terms}) != 1 or not is_loop(step, graph, terms):
        return None
    if terms[0].reduction == "mean":
        return loop_of_means(step, graph, found, before)
    scales, counts = [], []
    for term, coefficient in found:
        scale, used = unit_of(term, coefficient) or (0.0, None)
        if used is not None or scale == 0 or term.target is None:
            return None
        of_row = Rule("labels", 0, term.ignore_index, weight=term.weight)
        items = [float(rule.total({"labels": term.target})) for rule in (of_row, of_row._replace(weight=None))]
        scales.append(scale)
        counts.append([*items, float(term.target.numel())])
    return loop_of_sums(step, graph, found, before, scales, counts)


def is_loop(step: Step, graph: Graph, terms: Sequence[Term]) -> bool:
    """Whether these losses, which one place in the code has called, are those of different rows of the micro-batch."""
    rows = num_rows(step.inputs)
    if rows == 0 or len(terms) > rows or any(term.value.dim() > 1 for term in terms):
        return False
    if rows == 1:
        if step.is_training:
            return bool(taken_by(terms[0]))
        return terms[0].row is not None and graph.is_added_up(terms[0].value)  # there no logits have a graph
    if any(term.row is not None and not taken_by(term) and not _is_whole(term.row) for term in terms):
        return False  # chunks, of which the others were left out
    known = [term.row for term in terms if term.row is not None]
    if known and len({place.row for place in known}) != len(terms):
        return False
    are_taken = all(taken_by(term) and (term.rule is None or term.rule.half is not None) for term in terms)
    return bool(known) or are_taken


def _is_whole(place: Row) -> bool:
    return place.first <= 1 and place.last == 0


def _is_in_loop(graph: Graph, terms: Sequence[Term]) -> bool:
    """Whether the one of these is put beside others of its kind, if it had any."""
    return len(terms) > 1 or graph.is_added_up(terms[0].value)


def _tells_sums(step: Step, before: str) -> bool:
    """Whether a loss that nothing divides is a sum over rows: of one row in an evaluation no graph says that it is a row's."""
    return step.is_training or num_rows(step.inputs) > 1 or before == SUM


def loop_of_means(step: Step, graph: Graph, found: Sequence[tuple[Term, torch.Tensor]], before: str) -> Loop | None:
    """What a loop over rows makes of their means, which these are, with their coefficients; where that cannot be told from
    what it made before, this. None: it may be no loop."""
    rows, name = num_rows(step.inputs), found[0][0].name
    divisors = [graph.divisors(term.value) for term, _ in found]
    coefficients = [float(coefficient) for _, coefficient in found]
    if not all(graph.is_linear(term.value) for term, _ in found):
        return Loop(UNKNOWN, doubt=OTHERWISE.format(name))
    items = _items(step, [term for term, _ in found])
    is_mean = all(_has(rows, of_term) for of_term in divisors)
    may_weigh = items is not None and not (is_mean and before == MEAN)
    is_told = not is_mean or before == BY_ITEMS
    if may_weigh and items is not None and _weigh_by_items(graph, found, coefficients, *items, is_told=is_told):
        return Loop(BY_ITEMS, rule=items[0])
    is_one_of_several = len(found) == 1 and rows > 1
    if is_mean and (not is_one_of_several or _is_in_loop(graph, [found[0][0]])):
        taken = {taken_by(term) for term, _ in found}
        may_be_halves = rows <= 2 and taken == {"a split"}
        return Loop(MEAN, doubt=HALVES.format(name) if may_be_halves else "")
    if not _is_in_loop(graph, [term for term, _ in found]) or not _tells_sums(step, before):
        return None
    if not _are_alike(coefficients):
        return Loop(UNKNOWN, doubt=OTHERWISE.format(name))
    others = [divisor for of_term in divisors for divisor in of_term if not is_near(divisor, 1.0)]
    if others and (is_near(coefficients[0], 1.0) or (len(found) < rows and is_near(others[0], len(found)))):
        return Loop(UNKNOWN, doubt=OTHERWISE.format(name))
    return Loop(SUM, coefficients[0])


def loop_of_sums(
    step: Step,
    graph: Graph,
    found: Sequence[tuple[Term, torch.Tensor]],
    before: str,
    scales: Sequence[float],
    counts: Any,
) -> Loop | None:
    """What a loop over rows makes of their losses that it averages itself; None: of each it makes no mean.

    Args:
        scales: the coefficients of the terms' items.
        counts: what each may be divided by to be a mean: of every term as many numbers.
    """
    rows = num_rows(step.inputs)
    for of_rows in zip(*counts, strict=True):
        values = [term.value for term, _ in found]
        own = [graph.divisors_of_itself(value) for value in values]
        if not all(_has(count, of_term) for count, of_term in zip(of_rows, own, strict=True)):
            continue
        left = [_without(graph.divisors(value), count) for value, count in zip(values, of_rows, strict=True)]
        if all(_has(rows, rest or ()) for rest in left):
            return Loop(MEAN)
        means = [scale * count for scale, count in zip(scales, of_rows, strict=True)]
        is_sum = _is_in_loop(graph, [term for term, _ in found]) and _tells_sums(step, before)
        if is_sum and _are_alike(means) and all(is_near(divisor, 1.0) for rest in left for divisor in rest or ()):
            return Loop(SUM, means[0])
    return None


HALVES = (
    "the {} of one row that was split off may be a mean over the first or the second half of the rows; it is taken for a row's, "
    "index instead of splitting"
)
OTHERWISE = "the {} of single rows is averaged in a way that is not recognised"
ALONE = "the {} of one row was called by its index, and not in a loop over the rows: of one batch it would be the same row alone"
SKIPS = "a loop over rows calls no loss in some micro-batches: it may be a mean over the rows that have one"


def _items(step: Step, terms: Sequence[Term]) -> tuple[Rule, list[float]] | None:
    """How the items of all rows are counted, and how many each of these has."""
    places = [term.row for term in terms]
    first = places[0]
    if first is None or terms[0].ignore_index is None or terms[0].weight is not None:
        return None
    if any(place is None or place[2:] != first[2:] or place.key != first.key for place in places):
        return None
    rule = Rule(first.key, first.first, terms[0].ignore_index, last=first.last)
    entry = step.inputs[first.key]
    counts = [float(rule.total({first.key: entry[place.row : place.row + 1]})) for place in places if place is not None]
    return rule, counts


def _weigh_by_items(
    graph: Graph,
    found: Sequence[tuple[Term, torch.Tensor]],
    coefficients: Sequence[float],
    rule: Rule,
    counts: Sequence[float],
    is_told: bool,
) -> bool:
    """is_told: whether nothing speaks for a mean over the rows, where all have equally many items."""
    total = sum(counts)
    if not all(is_near(c * total, n) for c, n in zip(coefficients, counts, strict=True)):
        return False
    if len(set(counts)) > 1:
        return True
    return is_told and all(
        _has(n, graph.multipliers(term.value)) and _has(total, graph.divisors(term.value))
        for (term, _), n in zip(found, counts, strict=True)
    )


def _has(number: float, numbers: Sequence[float]) -> bool:
    return any(is_near(one, number) for one in numbers)


def _without(numbers: Sequence[float], number: float) -> list[float] | None:
    """The numbers without one that is near to this; None: none is."""
    for index, one in enumerate(numbers):
        if is_near(one, number):
            return [*numbers[:index], *numbers[index + 1 :]]
    return None


def _are_alike(numbers: Sequence[float]) -> bool:
    return max(numbers) - min(numbers) <= 1e-5 * max(map(abs, numbers))


def is_in_mean_of_rows(step: Step, term: Term, graph: Graph) -> bool:
    """Whether what a loss is the mean of is a number for each row, which this term is one of, or all of which it is made into:
    ``torch.stack([cross_entropy(x, y) for x, y in rows]).mean()``, ``(values.sum(1) / lengths).mean()``."""
    rows = num_rows(step.inputs)
    if tuple(term.value.shape) == (rows,):
        return False  # its own mean tells by its coefficient
    of_a_row = term.rule is None or (term.rule.half is not None and term.rule.of == rows)
    if term.value.dim() == 0 and rows > 1 and not of_a_row:
        return False  # two heads of two rows
    if not is_mean_of_rows(graph, term.value, rows):
        return False
    length = term.target.shape[-1] if term.target is not None and term.target.dim() > 1 else 0
    # a row's own mean over its length is one over padding too
    return length <= 1 or not graph.is_divided_by(term.value, length)


def is_mean_of_rows(graph: Graph, value: torch.Tensor, rows: int) -> bool:
    """Whether there is a mean over a tensor (rows,) between a term and the loss, or its sum and a division by as many; and that
    tensor is a sum over each row, or a stack of numbers. A mean over each row is one over padding too, and something else."""
    sums = means = is_made_of_rows = False
    for node in graph.way_to(value) or ():
        sizes, name = tuple(getattr(node, "_saved_self_sym_sizes", ())), node.name()
        if sizes == (rows,):
            means |= name.startswith("Mean")
            sums |= name.startswith("Sum")
        elif name.startswith("Mean") and len(sizes) > 1:
            return False
        is_made_of_rows |= name.startswith(("Stack", "Cat", "Unsqueeze")) or (name.startswith("Sum") and len(sizes) > 1)
    return is_made_of_rows and (means or (sums and graph.is_divided_by(value, rows)))


MAY_BE_A_LOOP = (
    "the {} may be that of one row of several, of which a loop over the rows is to make a mean; it is taken for a mean over its "
    "items"
)


def may_be_a_loop(graph: Graph, term: Term) -> bool:
    """Whether a loss of a micro-batch of one row is added to nothing and divided by 1, as a loop over rows would do that calls
    the model with each."""
    return term.reduction == "mean" and graph.is_added_up(term.value) and _has(1, graph.divisors(term.value))


def is_picked(term: Term, rows: int) -> bool:
    """Whether a loss was called with one of so many rows by its index."""
    return any(
        node.name().startswith("Select") and node._saved_dim == 0 and len(sizes) > 2 and sizes[0] == rows
        for node, sizes in _views_before(term)
    )


MOST_VIEWS = 12  # operations between a loss and the logits of all rows


def taken_by(term: Term) -> str:
    """How what a loss was called with was taken from a batch as one row of it; "" where it was not, as far as can be seen."""
    for node, sizes in _views_before(term):
        name, saved = node.name(), [getattr(node, f"_saved_{what}", 0) for what in ("dim", "start", "end")]
        dim = saved[0]
        if name.startswith("Unbind") or (name.startswith("Select") and dim == 0):
            return "an index"
        if name.startswith("Slice") and dim == 0 and saved[2] - saved[1] == 1 and len(sizes) > 2:
            return "a slice"
        if name.startswith("Split") and dim == 0 and getattr(node, "_saved_split_size", 0) == 1 and len(sizes) > 2:
            return "a split"
    return ""


def _views_before(term: Term) -> Iterator[tuple[Any, Sequence[int]]]:
    """The nodes between a loss and the logits of all rows, the loss's first, with the sizes of what each was made of."""
    node: Any = term.value.grad_fn
    for _ in range(MOST_VIEWS):
        if node is None or node.name().startswith(("Addmm", "Mm", "Bmm", "Linear", "AccumulateGrad")):
            return
        yield node, getattr(node, "_saved_self_sym_sizes", ())
        node = next((after for after, _ in node.next_functions if after is not None), None)
