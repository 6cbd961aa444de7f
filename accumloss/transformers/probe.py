"""What a loss averages over, measured: a Trainer's own compute_loss, on a few rows of its own dataset, whole and in parts.

A step is exact if the parts of a batch add up to the whole, however it is cut. Where they do not, what is left of the loss
without its known terms is some mean: over rows, over labels, over what a mask leaves. Which of them it is shows where a batch
is cut unevenly: with the right weights the means of the parts are the mean of the whole.

Everything that the measurement may change is put back: random numbers, buffers, flags, the Trainer's own attributes.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from .. import display
from .._compat import NUM_GPUS, BatchNorm, Dropout, prepared_inputs, without_autocast
from ..sums import widened
from . import counting, known, objective
from . import step as steps
from .counting import Rule
from .registration import Patches
from .terms import CONSTANT, MEANS, ROWS_WEIGH, SUM_WEIGHS, UNKNOWN, Combination, Measured, Schemes, Weight

MOST_ROWS, FEWEST_ROWS = 6, 3
CUTS = {3: ((1, 2), (2, 1)), 4: ((2, 2), (1, 3)), 5: ((2, 3), (3, 2)), 6: ((2, 4), (3, 3), (2, 2, 2))}
ROUNDING = 5e-7  # of the loss, in fp32
FITS = 2e-6  # of what is measured


@dataclass(frozen=True)
class MeasuredTerm:
    """One term of a Trainer's loss.

    Attributes:
        name: the loss that computes it; "the rest": nothing that accumloss knows.
        coefficient: of the term in the loss.
        averages_over: what it is a mean over, in words.
        known_by: "LOSS_MAPPING", "a recognised call", "its coefficient" (it is averaged by hand), or "measured".
        is_exact: whether it is that of the one batch, over micro-batches.
        reason: why it is not.
    """

    name: str
    coefficient: float
    averages_over: str
    known_by: str
    is_exact: bool
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """What accumloss.verify found. Print it.

    Attributes:
        trainer: the name of its class.
        is_exact: whether a step over micro-batches is that of the one batch; None: it could not be measured.
        reason: why not, or why it could not be measured.
        terms: of the loss.
        rows: how many were used.
        cuts: the sizes of the parts that they were cut into.
        error: the largest relative difference between the loss of the rows and that of their parts.
        forwards: calls of compute_loss that it took.
        can_be_exact: whether register_with_transformers(verify=True) makes it exact, which then uses what was measured.
        measured, schemes: what it would use.

    Examples:
        >>> found = accumloss.verify(trainer)
        accumloss: ...
        >>> found.is_exact, [term.averages_over for term in found.terms]
        (True, [...])
    """

    trainer: str
    is_exact: bool | None
    reason: str = ""
    terms: tuple[MeasuredTerm, ...] = ()
    rows: int = 0
    cuts: tuple[tuple[int, ...], ...] = ()
    error: float = 0.0
    forwards: int = 0
    can_be_exact: bool = False
    measured: Measured = field(default=Measured(), repr=False)
    schemes: Schemes = field(default_factory=Schemes, repr=False, compare=False)

    def __str__(self) -> str:
        verdict = {True: "is exact", False: "is NOT exact", None: "could not be measured"}[self.is_exact]
        found = {"why": self.reason}
        if self.cuts:
            cuts = ", ".join(" + ".join(map(str, cut)) for cut in self.cuts)
            found["rows"] = f"{self.rows}, as {cuts}; {self.forwards} forwards"
            found["error"] = f"{self.error:.1e} of the loss, between the rows and their parts"
        terms = [
            (
                f"{term.coefficient:.6g} x {term.name}",
                term.averages_over,
                term.known_by,
                "exact" if term.is_exact else "not exact",
            )
            for term in self.terms
        ]
        return display.answer(
            f"accumloss: the step of {self.trainer} over micro-batches {verdict}",
            display.facts(found),
            display.table(("term of the loss", "averages over", "known by", "over micro-batches"), terms)
            if terms
            else "",
        )


class NotMeasured(Exception):
    """Why a Trainer's loss cannot be measured."""


class _Part(NamedTuple):
    """One call of compute_loss."""

    batch: Mapping[str, Any]
    loss: float
    share: float  # of it, in the step
    rest: float
    terms: list[tuple[Any, float, float]]  # Term, coefficient, its mean over this part alone
    is_touched: bool


# Rows -----------------------------------------------------------------------------------------------------------------


class _Batches:
    """The rows to be measured on, whole and in parts.

    Args:
        loader: the Trainer's own.
        here: a micro-batch that has been fetched, for where the dataset cannot be asked for rows.
    """

    def __init__(self, loader: Any, here: Any):
        dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
        self.cut: Callable[[int, int], Any]
        is_indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and callable(collate)
        if is_indexed and getattr(loader, "batch_sampler", None) is not None:
            assert collate is not None and dataset is not None
            self.rows = min(len(dataset), MOST_ROWS)
            if self.rows < FEWEST_ROWS:
                raise NotMeasured(f"its dataset has {self.rows} rows, and {FEWEST_ROWS} are needed")
            last = len(dataset) - 1
            rows = [dataset[round(i * last / (self.rows - 1))] for i in range(self.rows)]
            whole = collate(copy.deepcopy(rows))
            if _is_alike(whole, collate(copy.deepcopy(rows))):
                self.cut = lambda begin, end: collate(copy.deepcopy(rows[begin:end]))
                return
            self.cut = _cutting(whole, self.rows)  # collating draws random numbers
            return
        if here is None:
            raise NotMeasured(
                "its dataset can only be iterated; accumloss.register_with_transformers(verify=True) measures it on the "
                "first micro-batch of the training"
            )
        self.rows = min(counting.num_rows(counting.entries_of(here)), MOST_ROWS)
        if self.rows < FEWEST_ROWS:
            raise NotMeasured(f"its micro-batches have {self.rows} rows, and {FEWEST_ROWS} are needed")
        self.cut = _cutting(here, counting.num_rows(counting.entries_of(here)))


def _cutting(whole: Any, rows: int) -> Callable[[int, int], Any]:
    """Cuts a batch whose entries all go by row."""
    entries = counting.entries_of(whole)
    for key, value in entries.items():
        length = len(value) if isinstance(value, (list, tuple)) else None
        length = value.shape[0] if isinstance(value, torch.Tensor) and value.dim() else length
        if length not in (None, rows):
            raise NotMeasured(f"its batches cannot be cut: the entry {key!r} does not go by row")

    def cut(begin: int, end: int) -> Any:
        by_row = (list, tuple, torch.Tensor)
        taken = {
            key: value[begin:end] if isinstance(value, by_row) and getattr(value, "ndim", 1) > 0 else value
            for key, value in entries.items()
        }
        return copy.deepcopy(counting.like(whole, taken))

    return cut


def _is_alike(one: Any, other: Any) -> bool:
    one, other = counting.entries_of(one), counting.entries_of(other)
    if one.keys() != other.keys():
        return False
    return all(torch.equal(v, other[key]) for key, v in one.items() if isinstance(v, torch.Tensor))


# Nothing is changed ---------------------------------------------------------------------------------------------------


_DROPOUTS = {
    torch.nn.functional.dropout, torch.nn.functional.dropout1d, torch.nn.functional.dropout2d,
    torch.nn.functional.dropout3d, torch.nn.functional.alpha_dropout, torch.nn.functional.feature_alpha_dropout,
    torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_, torch.feature_dropout,
}  # fmt: skip


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is torch.nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def as_it_was(trainer: Any, model: Any) -> Iterator[None]:
    """Puts back what a forward and a compute_loss may change, whatever happens; meanwhile nothing is logged."""
    restore = [_restoring(vars(trainer)), *(_restoring(vars(part)) for part in (trainer.state, trainer.control))]
    flags = [(part, part.training) for part in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    python, numpy_state = random.getstate(), _numpy_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        patches = Patches()
        stack.callback(patches.undo)
        patches.bind(trainer, "log", lambda *args, **kwargs: None)
        try:
            yield
        finally:
            patches.undo()
            for put_back in restore:
                put_back()
            for part, training in flags:
                part.training = training
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for parameter, grad in grads:
                parameter.grad = grad
            random.setstate(python)
            if numpy_state is not None:
                import numpy

                numpy.random.set_state(numpy_state)  # noqa: NPY002  what people's code draws from


def _numpy_state() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy.random.get_state()  # noqa: NPY002


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


def _restoring(value: Any, depth: int = 4) -> Callable[[], None]:
    """What puts a container, and those in it, back as they are now: the same objects, with what they hold now."""
    if not isinstance(value, _CONTAINERS) or depth == 0 or len(value) > 100_000:
        return lambda: None
    if isinstance(value, dict):
        held = dict(value)
        inner = [_restoring(entry, depth - 1) for entry in held.values()]

        def put_back() -> None:
            value.clear()
            value.update(held)
            for put in inner:
                put()
    else:
        kept = list(value)
        inner = [] if isinstance(value, set) or len(kept) > 1000 else [_restoring(entry, depth - 1) for entry in kept]

        def put_back() -> None:
            value.clear()
            value.update(kept) if isinstance(value, set) else value.extend(kept)
            for put in inner:
                put()

    return put_back


@contextmanager
def _in_fp32(model: Any) -> Iterator[None]:
    """Weights in fp32, and no autocast: half precision is too coarse to tell one mean from another."""
    patches = Patches()
    theirs = []
    for part in model.modules():
        theirs_before = without_autocast(part)
        if theirs_before is not None:
            patches.bind(part, "forward", theirs_before)
    try:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in (torch.bfloat16, torch.float16):
                theirs.append((tensor, tensor.data))
                tensor.data = tensor.data.float()
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for tensor, data in theirs:
            tensor.data = data
        patches.undo()


@contextmanager
def _uncompiled() -> Iterator[None]:
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _without_dropout(model: Any) -> Iterator[None]:
    layers = [part for part in model.modules() if isinstance(part, Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        with _NoDropout():
            yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def coupling(model: Any) -> set[str]:
    """What in a model normalises by the statistics of the micro-batch, as it stands in the middle of its training."""
    norms = (BatchNorm,)
    found = {type(part).__name__ for part in model.modules() if isinstance(part, norms) and part.training}
    return {
        f"{name} normalises by the statistics of a micro-batch, and no split of a batch is then exact" for name in found
    }


is_running = False  # whether a loss is being measured


@contextmanager
def _running() -> Iterator[None]:
    global is_running
    is_running = True
    try:
        yield
    finally:
        is_running = False


# Measuring ------------------------------------------------------------------------------------------------------------


class Probe:
    """One measurement of a Trainer's loss.

    Args:
        trainer: its state is left as it is.
        model: the transformers model, unwrapped.
        compute_loss: the outermost, without what accumloss has put around it.
        counted_rule: how Trainer counts the labels of a batch.
        measured: what was found before, and is made use of.
    """

    def __init__(
        self,
        trainer: Any,
        model: Any,
        compute_loss: Callable[..., Any],
        counted_rule: Callable[[Any], Any],
        measured: Any,
    ):
        self.trainer, self.model, self.compute_loss = trainer, model, compute_loss
        self.counted_rule, self.measured = counted_rule, measured
        self.forwards = 0
        self.schemes = Schemes()
        self.coupling: set[str] = set()  # what in the model makes it so

    def run(self, loader: Any, here: Any = None) -> Verification:
        """Raises NotMeasured, and whatever the Trainer's own code raises."""
        name = type(self.trainer).__name__
        with as_it_was(self.trainer, self.model), _in_fp32(self.model), _running():
            batches = _Batches(loader, here)
            rows = batches.rows
            self.model.train()
            self.coupling = coupling(self.model)
            with _without_dropout(self.model), torch.enable_grad(), _uncompiled():
                whole = self._window([batches.cut(0, rows)])[0]
                again = self._window([batches.cut(0, rows)])[0]
                scale = max(abs(whole.loss), abs(again.loss))
                if abs(whole.loss - again.loss) > ROUNDING * scale or not scale < float("inf"):
                    raise NotMeasured("the loss of the same rows is another one the second time: it is random")
                cuts: dict[tuple[int, ...], list[_Part]] = {}
                for cut in CUTS[rows]:
                    begins = [sum(cut[:i]) for i in range(len(cut) + 1)]
                    pairs = itertools.pairwise(begins)
                    cuts[cut] = self._window([batches.cut(begin, end) for begin, end in pairs])
        return self._conclude(name, rows, whole, cuts, scale)

    def _window(self, batches: Sequence[Any]) -> list[_Part]:
        """Every micro-batch of a window, as Trainer would train on it."""
        trainer, k = self.trainer, len(batches)
        with Patches() as patches:
            patches.bind(trainer.args, "average_tokens_across_devices", False)
            patches.bind(trainer.args, NUM_GPUS, min(trainer.args.n_gpu, 1))
            patches.bind(trainer, "current_gradient_accumulation_steps", k)
            prepared, number = trainer.get_batch_samples(iter(batches), k, trainer.args.device)
            window = [counting.kept(batch) for batch in prepared]
            totals: dict[Any, Any] = {}
            return [self._part(window, i, batch, number, totals) for i, batch in enumerate(prepared)]

    def _part(self, window: list[Any], index: int, batch: Any, number: Any, totals: dict[Any, Any]) -> _Part:
        trainer, k = self.trainer, len(window)
        inputs = prepared_inputs(trainer, batch)
        step = steps.Step(window, {}, 1, 1.0, lambda total: total, totals)
        step.trainer, step.here, step.is_watched = trainer, window[index], True
        step.schemes, step.micro_batches, step.asked, step.measured = self.schemes, k, k, self.measured
        written = step.known = known.look_up(trainer, inputs)
        if written is not None:
            step.measured = written.measured
            self.coupling |= {written.coupled} - {""}
        step.begin(counting.entries_of(inputs))
        if isinstance(step.inputs.get("labels"), torch.Tensor) and isinstance(inputs, Mapping):
            step.main = self.counted_rule(inputs)
        check = objective.Check()
        kwargs = {"num_items_in_batch": number}
        self.forwards += 1
        with steps.entered(step):
            if objective.says_it_is_scaled(trainer):
                loss, share = self.compute_loss(self.model, inputs, **kwargs), 1.0
                loss = loss[0] if isinstance(loss, tuple) else loss
                raw = loss
            else:
                step.depth = 1
                loss = objective.divided(
                    trainer, self.compute_loss, step, 1, check, objective.per_micro_batch, (self.model, inputs), kwargs
                )
                loss = loss[0] if isinstance(loss, tuple) else loss
                share = 1.0 if objective.is_taken_as_scaled(trainer, number) else 1.0 / k
                raw = step.raw
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise NotMeasured("what compute_loss returned is no loss with a gradient")
        combination = Combination(step, raw)
        combination.merge(step, self.schemes)
        terms = []
        with torch.no_grad():
            rest = combination.rest(widened(raw.mean()), self.schemes.left_in_rest())
            for term, coefficient in combination.pairs:
                if term.reduction == "mean":
                    terms.append(
                        (term, float(coefficient), float(term.value) / (float(step.share_of_mean(term)) or 1.0))
                    )
                elif self.schemes.of(term) != UNKNOWN:
                    terms.append((term, 1.0, float(term.amount(coefficient))))
        return _Part(
            dict(window[index]), float(raw.mean()), float(loss.mean()) * share, float(rest), terms,
            objective.is_touched(step),
        )  # fmt: skip

    def _conclude(
        self, name: str, rows: int, whole: _Part, cuts: dict[tuple[int, ...], list[_Part]], scale: float
    ) -> Verification:
        error = max(abs(sum(part.share for part in parts) - whole.share) for parts in cuts.values()) / (scale or 1.0)
        is_exact = error <= FITS + ROUNDING * 4
        terms, measured_calls = [], []
        for index, (term, coefficient, mean) in enumerate(whole.terms):
            values = [[part.terms[index] for part in parts if index < len(part.terms)] for parts in cuts.values()]
            if any(len(found) != len(parts) for found, parts in zip(values, cuts.values(), strict=True)):
                terms.append(
                    MeasuredTerm(
                        term.name,
                        coefficient,
                        "?",
                        "measured",
                        False,
                        "some parts of the rows have it, and some have not",
                    )
                )
                continue
            means = [(mean, [value for _, _, value in found]) for found in values]
            terms.append(self._term(term, coefficient, means, cuts, whole, scale, is_exact))
            if term.reduction == "mean" and term.rule is None:
                fitting = self._fitting(means, cuts, whole, scale)
                measured_calls.append((term.call, tuple(fitting)))
        rests = [(whole.rest, [part.rest for part in parts]) for parts in cuts.values()]
        measured_rest: tuple[Weight, ...] = ()
        if any(abs(value) > 4 * ROUNDING * scale for of_whole, parts in rests for value in (of_whole, *parts)):
            measured_rest = tuple(self._fitting(rests, cuts, whole, scale))
            if whole.is_touched:
                over, reason = "num_items_in_batch", "" if is_exact else "a part of it does not honour the number"
                measured_rest = ()
            elif measured_rest:
                over = " or ".join(map(describe, measured_rest[:2]))
                reason = "" if is_exact else "accumloss.register_with_transformers(verify=True) makes it so"
            else:
                over, reason = "nothing that was tried", COUPLED
                over, reason = ("num_items_in_batch, as it was given", "") if is_exact else (over, reason)
            terms.append(MeasuredTerm("the rest", 1.0, over, "measured", is_exact or not reason, reason))
        reasons = self.coupling | {f"{term.name}: {term.reason}" for term in terms if term.reason}
        reason = "" if is_exact else "; ".join(sorted(reasons))
        if not is_exact and not reason:
            reason = "its parts do not add up, though each of its terms does"
        return Verification(
            name, is_exact, reason, tuple(terms), rows, tuple(cuts), error, self.forwards,
            measured=Measured(measured_rest, tuple(measured_calls)), schemes=self.schemes,
        )  # fmt: skip

    def _term(
        self, term: Any, coefficient: float, means: Any, cuts: Any, whole: _Part, scale: float, is_exact: bool
    ) -> Any:
        """What is said of a recognised term: the rule that it is counted by, held against its values."""
        scheme = self.schemes.of(term)
        rule = term.rule
        known_by = "its coefficient" if term.reduction != "mean" else "a recognised call"
        if term.name.endswith("_loss") and term.name.removesuffix("_loss") in LOSSES and known_by != "its coefficient":
            known_by = "LOSS_MAPPING"
        if rule is not None and (term.reduction == "mean" or scheme in MEANS[:2]):
            fits = _fits(means, [[_weigh(rule, part.batch) for part in parts] for parts in cuts.values()], scale)
            over = describe(rule)
            return MeasuredTerm(
                term.name, coefficient, over, known_by, is_exact or fits,
                "" if is_exact or fits else f"it is no mean over {over} where the rows are collated anew",
            )  # fmt: skip
        if term.reduction != "mean" and scheme not in MEANS:
            return MeasuredTerm(term.name, coefficient, scheme or "nothing that is known", known_by, is_exact)
        fitting = self._fitting(means, cuts, whole, scale)
        over = " or ".join(map(describe, fitting[:2])) or "nothing that was tried"
        reason = COUPLED
        if fitting:
            reason = "accumloss.register_with_transformers(verify=True) makes it so"
        return MeasuredTerm(term.name, coefficient, over, "measured", is_exact, "" if is_exact else reason)

    def _fitting(self, values: Any, cuts: Any, whole: _Part, scale: float) -> list[Weight]:
        """All weights with which the parts make up the whole; the likeliest first."""
        fitting: list[Weight] = []
        if all(abs(part - of_whole) <= _bound(of_whole, scale) for of_whole, parts in values for part in parts):
            return [CONSTANT]
        for weight in _candidates(whole.batch):
            if (
                isinstance(weight, Rule)
                and weight.half is not None
                and any(not _is_of_half(found) for found in fitting)
            ):
                continue  # halves of the parts are as large as the parts
            weights = [[_weigh(weight, part.batch) for part in parts] for parts in cuts.values()]
            if _fits(values, weights, scale):
                fitting.append(weight)
        if all(abs(sum(parts) - of_whole) <= _bound(of_whole, scale) for of_whole, parts in values):
            fitting.append(SUM_WEIGHS)
        return fitting


def _is_of_half(weight: Weight) -> bool:
    return isinstance(weight, Rule) and weight.half is not None


COUPLED = "it is coupled over the rows of a micro-batch, or no mean at all"
LOSSES = (
    "causal_lm", "masked_lm", "token_classification", "sequence_classification", "question_answering",
    "semantic_segmentation",
)  # fmt: skip


def _bound(value: float, scale: float) -> float:
    return FITS * abs(value) + ROUNDING * scale


def _fits(values: Any, weights: Any, scale: float) -> bool:
    for (of_whole, parts), of_parts in zip(values, weights, strict=True):
        total = sum(of_parts)
        if not total > 0:
            return False
        mean = sum(w * part for w, part in zip(of_parts, parts, strict=True)) / total
        if not abs(mean - of_whole) <= _bound(of_whole, scale):
            return False
    return True


def _candidates(batch: Mapping[str, Any]) -> Iterator[Weight]:
    """What a mean may be over: rows, labels, what a mask leaves, shifted or not, of all rows or of one half."""
    yield ROWS_WEIGH
    rules: list[Rule] = []
    entries = {
        key: v for key, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() and not v.is_floating_point()
    }
    for key, entry in sorted(entries.items(), key=lambda item: not counting.may_be_labels(item[0])):
        is_mask = not counting.may_be_labels(key) and bool(((entry == 0) | (entry == 1)).all())
        if not is_mask and not counting.may_be_labels(key):
            continue
        ignored = 0 if is_mask else -100
        rules += [
            Rule(key, shift, ignored, half=half)
            for half in (None, 0, 1)
            for shift in ((0, 1) if entry.dim() > 1 else (0,))
        ]
    yield from sorted(rules, key=_is_of_half)


def _weigh(weight: Weight, batch: Mapping[str, Any]) -> float:
    if isinstance(weight, str):
        return float(counting.num_rows(batch)) if weight == ROWS_WEIGH else 1.0
    return float(weight.total(batch)) if isinstance(batch.get(weight.key), torch.Tensor) else float("nan")


def describe(weight: Weight) -> str:
    """A rule in words."""
    if isinstance(weight, str):
        return weight
    what = f"the elements of {weight.key!r}" if weight.ignore_index is None else f"the labels in {weight.key!r}"
    if weight.ignore_index == 0:
        what = f"the ones of {weight.key!r}"
    elif weight.ignore_index not in (None, -100):
        what += f" other than {weight.ignore_index}"
    what += "" if not weight.shift else f", without the first {weight.shift} of each row"
    what += "" if not weight.last else f", without the last {weight.last} of each row"
    what += "" if weight.mask is None else f", where {weight.mask!r} is 1"
    what += "" if weight.half is None else f", in the {('first', 'second')[weight.half]} half of the rows"
    return what + ("" if weight.weight is None else ", by their class weights")
