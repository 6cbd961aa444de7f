"""Measures whether accumulation is exact for one model: real Trainer steps over micro-batches against the one batch.

The truth is the model's own loss over the one batch that holds all rows, differentiated in plain PyTorch, without a
Trainer and without accumloss. A step of Trainer over any split of the rows must have its gradient and log its loss.
Models run in eval mode: dropout and its kin are random, and batch normalisation couples the rows whatever the loss.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import resource
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .. import transformers as integration
from .._compat import BatchNorm
from ..inexact import InexactWarning

Rows = list[dict[str, Any]]
Gradients = dict[str, torch.Tensor]

EXACT = 1e-4  # relative error of the gradient, fp32
SAME_LOSS = 1e-5  # relative difference of an evaluation's loss, fp32
WAYS = ("stock", "accumloss")


class AuditError(RuntimeError):
    """The audit cannot run; the message says why and what to do."""


class NoGradient(AuditError):
    """A loss or gradient that is zero or not finite."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of Trainer over a split of the rows, held against the one batch."""

    way: str  # stock or accumloss
    split: str  # sizes of the micro-batches, 3+3+2
    micro_batches: int
    ratio: float  # size of the gradient, of that of the one batch
    gradient_error: float  # relative
    loss_error: float  # of the logged loss, relative
    cause: str  # empty where exact
    seconds: float
    peak_mb: float  # of the process, above what was in use before
    groups: dict[str, float] = field(default_factory=dict)  # gradient error of each parameter group
    told: str = ""  # the InexactWarning that was given

    @property
    def is_exact(self) -> bool:
        return not self.cause


@dataclass(frozen=True)
class Report:
    """What audit() found."""

    model: str
    rows: int
    loss: float  # of the one batch
    noise: float  # relative difference of its gradient where the rows come in another order: rounding
    steps: list[StepResult]
    reason: str = ""  # why accumloss is not exact, where it is not
    remedy: str = ""  # what can be done about it
    # of the one batch\'s gradient from every weighting of the micro-batches\', where accumloss is not exact
    distance: float | None = None
    # way: relative difference of Trainer's eval_loss between batch sizes; without a way whose Trainer gives none
    evaluation: dict[str, float] = field(default_factory=dict)

    def of(self, way: str) -> list[StepResult]:
        return [step for step in self.steps if step.way == way]

    def worst(self, way: str) -> StepResult:
        return max(self.of(way), key=lambda step: (_rank(step.gradient_error), _rank(step.loss_error)))

    def is_exact(self, way: str = "accumloss") -> bool:
        return all(step.is_exact for step in self.of(way))

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["exact"] = {way: self.is_exact(way) for way in WAYS if self.of(way)}
        return found


def one_line(error: BaseException) -> str:
    """The message of an error."""
    return " ".join(str(error).split())[:300]


def named_line(error: BaseException) -> str:
    """The kind and the message of an error."""
    return f"{type(error).__name__}: {one_line(error)}"[:300]


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


# Rows -----------------------------------------------------------------------------------------------------------------


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of rows: tensors of one shape are stacked, anything else is a list."""
    batch: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if all(isinstance(value, torch.Tensor) and value.shape == values[0].shape for value in values):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values
    return batch


def rows_of(batches: Sequence[Mapping[str, Any]]) -> Rows:
    """The rows of batches; tensors of different lengths are padded: labels with -100, anything else with 0."""
    rows: Rows = []
    for batch in batches:
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
        if not tensors:
            raise AuditError(
                "audit: expected batches of tensors (rows, ...), got none; see a DataLoader of the Trainer's"
            )
        count = len(next(iter(tensors.values())))
        uneven = {key: tuple(value.shape) for key, value in tensors.items() if len(value) != count}
        if uneven:
            raise AuditError(f"audit: expected {count} rows in every entry of a batch, got {uneven}")
        rows += [{key: value[i] for key, value in tensors.items()} for i in range(count)]
    keys = rows[0].keys()
    for key in keys:
        if any(row.keys() != keys for row in rows):
            raise AuditError(f"audit: expected the same entries in every batch, got {sorted(set().union(*rows))}")
        shape = [max(sizes) for sizes in zip(*(row[key].shape for row in rows), strict=True)]
        for row in rows:
            row[key] = _padded(row[key], shape, -100 if "label" in key else 0)
    return rows


def _padded(value: torch.Tensor, shape: Sequence[int], filler: int) -> torch.Tensor:
    if list(value.shape) == list(shape):
        return value
    padded = value.new_full(tuple(shape), filler)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


# Gradients ------------------------------------------------------------------------------------------------------------


def norm(gradients: Gradients) -> float:
    return math.sqrt(sum(g.double().pow(2).sum().item() for g in gradients.values()))


def difference(a: Gradients, b: Gradients) -> Gradients:
    """a - b, where what one of them lacks is zero there."""
    result = {}
    for name in a.keys() | b.keys():
        if name in a and name in b:
            result[name] = a[name].double() - b[name].double()
        else:
            result[name] = a[name].double() if name in a else -b[name].double()
    return result


def combined(parts: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    total: Gradients = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, g in part.items():
            total[name] = total.get(name, 0.0) + g.double() * weight
    return total


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def prepared(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy that stays in eval mode when a Trainer asks it to train."""
    copied = copy.deepcopy(model).eval()
    copied.train = lambda mode=True: copied  # type: ignore[method-assign]
    for part in copied.modules():
        if isinstance(part, BatchNorm) and part.running_var is not None:
            part.forward = functools.partial(_normalized, part)  # type: ignore[method-assign]
    try:
        yield copied
    finally:
        del copied.train


def _normalized(norm: BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Batch normalisation in eval mode, x (N, C, ...), in plain operations.

    PyTorch's own has a wrong gradient on CPU for one row whose gradient is laid out channels last with the strides of a larger
    tensor (2.13: strides (64, 1, 128, 64) of a gradient (1, 64, 2, 2)), as in CvT, D-FINE and RT-DETR.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    shift = -norm.running_mean * scale
    if norm.affine:
        scale, shift = scale * norm.weight, shift * norm.weight + norm.bias
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return x * scale.view(shape) + shift.view(shape)


def loss_of(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """What the model returns as the loss of a batch: ()."""
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is None:
        raise AuditError(
            f"audit: expected {type(model).__name__} to return a loss for these entries: {', '.join(batch)}"
        )
    return loss.sum()


def plain_loss(model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[float, Gradients]:
    """The model's own loss over a batch and its gradient, in plain PyTorch."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    loss = loss_of(model, batch)
    if not loss.requires_grad:
        raise AuditError(f"audit: expected the loss of {type(model).__name__} to have a gradient, got none")
    loss.backward()
    gradients = gradients_of(model)
    model.zero_grad(set_to_none=True)
    if not math.isfinite(loss.item()) or not math.isfinite(norm(gradients)):
        raise NoGradient(f"audit: expected a finite loss and gradient of {type(model).__name__}, got {loss.item()}")
    if norm(gradients) == 0:
        raise NoGradient(f"audit: expected a gradient of {type(model).__name__} that is not zero")
    return loss.item(), gradients


def is_deterministic(model: torch.nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether the loss is the same whatever the state of the random numbers."""
    with torch.no_grad():
        losses = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            losses.append(loss_of(model, batch).item())
    return losses[0] == losses[1]


def noise_of(model: torch.nn.Module, rows: Rows, whole: Gradients) -> float:
    """How far rounding alone moves the gradient of the one batch: relative change where its rows are reversed."""
    return norm(difference(plain_loss(model, collate(rows[::-1]))[1], whole)) / norm(whole)


def distance_to_span(whole: Gradients, parts: Sequence[Gradients]) -> float:
    """How much of a gradient no weighting of the micro-batches' gradients gives, relative: 0 for a loss of one term."""
    gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    against = torch.zeros(len(parts), dtype=torch.float64)
    for name in set(whole).union(*parts):
        columns = torch.stack([_flat(part, name, whole, parts) for part in parts], dim=1)
        gram += columns.T @ columns
        against += columns.T @ _flat(whole, name, whole, parts)
    weights = torch.linalg.lstsq(gram, against, driver="gelsd").solution
    return norm(difference(whole, combined(parts, weights.tolist()))) / norm(whole)


def _flat(gradients: Gradients, name: str, whole: Gradients, parts: Sequence[Gradients]) -> torch.Tensor:
    if name in gradients:
        return gradients[name].double().reshape(-1)
    like = next(g[name] for g in (whole, *parts) if name in g)
    return torch.zeros(like.numel(), dtype=torch.float64)


# Steps ----------------------------------------------------------------------------------------------------------------


def sizes_of(rows: int, batch_size: int) -> list[int]:
    """The micro-batches that a DataLoader makes of so many rows."""
    return [min(batch_size, rows - begin) for begin in range(0, rows, batch_size)]


def name_of(sizes: Sequence[int]) -> str:
    """8x1, 4x2, 3+3+2"""
    return f"{len(sizes)}x{sizes[0]}" if len(set(sizes)) == 1 else "+".join(map(str, sizes))


class Trained(NamedTuple):
    """What one optimizer step of the real Trainer did."""

    gradients: Gradients
    loss: float  # as logged
    seconds: float
    peak_mb: float
    told: str  # the InexactWarning, where there was one


def train_step(model: torch.nn.Module, rows: Rows, batch_size: int, way: str) -> Trained:
    """One optimizer step of the real Trainer over all rows."""
    import transformers

    class Recorder(transformers.TrainerCallback):
        gradients: Gradients
        loss = math.nan

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.gradients = gradients_of(model)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.loss = float(logs["loss"])

    class Trainer(transformers.Trainer):  # by the name that its user's has, since warnings name it
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    recorder = Recorder()
    context = integration.registered() if way == "accumloss" else integration.unregistered()
    with (
        tempfile.TemporaryDirectory() as folder,
        context,
        prepared(model) as copied,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", InexactWarning)
        trainer = Trainer(
            model=copied,
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=len(sizes_of(len(rows), batch_size)),
                max_steps=1,
                max_grad_norm=0.0,
                learning_rate=0.0,
                optim="sgd",
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=next(model.parameters()).device.type == "cpu",
            ),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[recorder],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with _measured() as measured:
            trainer.train()
    told = "; ".join(str(warning.message) for warning in caught if issubclass(warning.category, InexactWarning))
    return Trained(recorder.gradients, recorder.loss, measured["seconds"], measured["peak_mb"], told)


def evaluation_difference(model: torch.nn.Module, rows: Rows, batch_sizes: Sequence[int], way: str) -> float | None:
    """How much Trainer's eval_loss of the rows differs, relatively, from that over one batch; None where there is none."""
    import transformers

    dataset: Any = rows
    losses: list[float] = []
    context = integration.registered() if way == "accumloss" else integration.unregistered()
    with tempfile.TemporaryDirectory() as folder, context, prepared(model) as copied, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for size in (len(rows), *batch_sizes):
            trainer = transformers.Trainer(
                model=copied,
                args=transformers.TrainingArguments(
                    output_dir=folder,
                    per_device_eval_batch_size=size,
                    prediction_loss_only=True,
                    report_to=[],
                    disable_tqdm=True,
                    remove_unused_columns=False,
                    use_cpu=next(model.parameters()).device.type == "cpu",
                ),
                data_collator=collate,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            metrics = trainer.evaluate(dataset)
            if "eval_loss" not in metrics:
                return None
            losses.append(float(metrics["eval_loss"]))
    return max(abs(loss - losses[0]) for loss in losses) / (abs(losses[0]) or 1.0)


def parts_of(model: torch.nn.Module, rows: Rows, batch_size: int) -> list[Gradients]:
    """The gradients of the model's own loss over each micro-batch, in plain PyTorch."""
    parts = []
    for begin in range(0, len(rows), batch_size):
        try:
            parts.append(plain_loss(model, collate(rows[begin : begin + batch_size]))[1])
        except NoGradient:  # no items in this one: as a mean, 0 / 0
            parts.append({})
    return parts


def step_result(
    model: torch.nn.Module,
    rows: Rows,
    batch_size: int,
    way: str,
    split: str,
    loss: float,
    whole: Gradients,
    parts: Sequence[Gradients],
    groups: bool,
) -> StepResult:
    """One step of Trainer, held against the one batch."""
    gradients, logged, seconds, peak_mb, told = train_step(model, rows, batch_size, way)
    size = norm(whole)
    error = norm(difference(gradients, whole)) / size
    loss_error = abs(logged - loss) / abs(loss) if loss else abs(logged)
    by_group = group_errors(gradients, whole) if groups else {}
    cause = "" if error <= EXACT and loss_error <= EXACT else cause_of(gradients, parts, error)
    ratio = norm(gradients) / size
    return StepResult(way, split, len(parts), ratio, error, loss_error, cause, seconds, peak_mb, by_group, told)


# of the micro-batches; the first is some k times too large
SUM_OF_MEANS, MEAN_OF_MEANS, MISCOUNTED = "sum of means", "mean of means", "miscounted"
NOT_A_NUMBER = "not a number"  # a micro-batch without items
WRONG_LOSS = "loss is wrong"  # as it is logged; the gradient is right


def cause_of(gradients: Gradients, parts: Sequence[Gradients], error: float) -> str:
    """What a step that is not exact did instead."""
    if error <= EXACT:
        return WRONG_LOSS
    if math.isnan(error):
        return NOT_A_NUMBER
    for cause, weight in ((SUM_OF_MEANS, 1.0), (MEAN_OF_MEANS, 1.0 / len(parts))):
        candidate = combined(parts, [weight] * len(parts))
        if norm(difference(gradients, candidate)) <= EXACT * norm(candidate):
            return cause
    return MISCOUNTED


def group_errors(gradients: Gradients, whole: Gradients) -> dict[str, float]:
    """Relative gradient error of each parameter group: the first two parts of the names."""
    names: dict[str, list[str]] = {}
    for name in gradients.keys() | whole.keys():
        names.setdefault(".".join(name.split(".")[:2]), []).append(name)
    errors = {}
    for group, members in sorted(names.items()):
        ours = {n: gradients[n] for n in members if n in gradients}
        theirs = {n: whole[n] for n in members if n in whole}
        size = norm(theirs)
        errors[group] = norm(difference(ours, theirs)) / size if size else norm(ours)
    return errors


DEPENDS_ON_BATCH = "what the model returns for a row depends on the other rows of its batch"
REMEDIES = {
    DEPENDS_ON_BATCH: (
        "give every micro-batch rows of one length and its attention mask; where the model itself mixes rows, let a micro-batch "
        "hold the whole step: a larger per_device_train_batch_size and gradient_accumulation_steps=1"
    ),
    "coupled": (
        "let a micro-batch hold all the rows that its loss compares: a larger per_device_train_batch_size, over "
        "gradient checkpointing if memory is short; more micro-batches are another objective"
    ),
    "not recognised": (
        "accumloss.register_with_transformers(verify=True) measures what it averages over and weighs it so; "
        "accumloss.verify(trainer) shows what it finds"
    ),
}
COUPLED = 1e-3  # a gradient further than this from the span of the micro-batches' is of no weighting of them


def explained(
    report: Report, model: torch.nn.Module, rows: Rows, whole: Gradients, parts: Mapping[int, Sequence[Gradients]]
) -> Report:
    """The report with the reason why accumloss is not exact."""
    distance = max(distance_to_span(whole, gradients) for gradients in parts.values())
    with prepared(model) as copied:
        name, change = largest_change(copied, rows)
    if change > COUPLED:
        reason = f"{DEPENDS_ON_BATCH}: {name} of a row alone differs by {change:.2g} of its size"
        remedy = REMEDIES[DEPENDS_ON_BATCH]
    elif distance > COUPLED:
        reason = (
            f"the loss is coupled over the batch, or has terms that count different things: no weighting of the micro-batches "
            f"gives the gradient of the one batch (it is {distance:.2g} of its size away)"
        )
        remedy = REMEDIES["coupled"]
    else:
        reason = f"what the loss averages over was not recognised: {report.worst('accumloss').cause}"
        remedy = REMEDIES["not recognised"]
    return replace(report, reason=reason, remedy=remedy, distance=distance)


def largest_change(model: torch.nn.Module, rows: Rows) -> tuple[str, float]:
    """The output that changes most where a row is alone in its batch, and by what share of its size."""
    found = ("", 0.0)
    with torch.no_grad():
        torch.manual_seed(0)
        together = _outputs(model(**collate(rows)))
        for i, row in enumerate(rows):
            torch.manual_seed(0)
            for name, alone in _outputs(model(**collate([row]))).items():
                whole = together.get(name)
                if whole is None or whole.shape[:1] != (len(rows),) or whole.shape[1:] != alone.shape[1:]:
                    continue  # no row of its own in it
                size = whole[i].abs().max().item()
                change = (whole[i] - alone[0]).abs().max().item()
                if size and change / size > found[1]:
                    found = (name, change / size)
    return found


def _outputs(outputs: Any) -> dict[str, torch.Tensor]:
    """The floating tensors with a batch dimension that a model returns, by name."""
    if not isinstance(outputs, Mapping):
        return {}
    return {
        name: value
        for name, value in outputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1
    }


@contextlib.contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """Seconds and peak memory (MB) of the block: of the GPU where there is one, else of the process, above what it had."""
    found: dict[str, float] = {}
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = float(torch.cuda.memory_allocated())
    else:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:  # resets the peak
            file.write("5")
        before = _peak_bytes()
    start = time.perf_counter()
    yield found
    if on_cuda:
        torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    peak = float(torch.cuda.max_memory_allocated()) if on_cuda else _peak_bytes()
    found["peak_mb"] = max(0.0, peak - before) / 2**20


def _peak_bytes() -> float:
    """Peak resident memory since it was last reset."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
