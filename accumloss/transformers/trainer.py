"""Trainer's bookkeeping: which items it counts, what it passes to the model, what it divides by.

Methods of the class are wrapped, so that Trainers and subclasses that exist already are covered too:

    get_batch_samples        remembers the window: the micro-batches of the step that comes
    _get_num_items_in_batch  counts the labels that the model's loss uses
    training_step            enters the step, in which every loss of ours finds its divisor (step.py)
    compute_loss             passes the items *per micro-batch* and returns the share of this micro-batch
    evaluation_loop          takes the loss over the items of the whole set (evaluation.py)
    _maybe_log_save_evaluate adds the metrics of the tokens since the last log, over all ranks
    log                      writes them

Whatever calls nothing of ours is then a mean of means at worst: each micro-batch's loss is divided by their number. Trainer
itself divides no loss of a model that takes keyword arguments, whether that has made use of them or not.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .._compat import LOSS_FUNCTION, dataloaders_of, not_compiled, uncompiled
from ..inexact import InexactWarning
from ..sums import TokenSums
from . import counting, coupled, deferred, hook, known, losses, mapping, objective, probe, rebind, terms, tracked
from . import evaluation as evaluations
from . import step as steps
from .registration import Patches, registration
from .settings import settings

METHODS = (
    "train",
    "get_batch_samples",
    "_get_num_items_in_batch",
    "training_step",
    "compute_loss",
    "evaluation_loop",
    "_maybe_log_save_evaluate",
    "log",
)

_originals: dict[str, Callable[..., Any]] = {}  # transformers' own methods, from the first time ours took their place


class Window:
    """The micro-batches of one optimizer step on this rank, and what has been counted in them.

    Attributes:
        batches: their entries as they were when they were fetched; a forward may write over its labels.
    """

    def __init__(self, fetched: Sequence[Any]):
        self.fetched = fetched
        self.batches = [counting.kept(batch) for batch in fetched]
        self.totals: dict[Any, Any] = {}
        self.shift: int | None = None  # of the labels that Trainer counts, once asked for
        self.items: tuple[Any, int, torch.Tensor] | None = None  # see share_of_items
        self.seen = 0  # micro-batches that have been trained on

    def share_of_items(self, given: Any, micro_batches: int) -> torch.Tensor:
        """The items per micro-batch: () fp32, computed once for the number that all micro-batches are given."""
        if self.items is None or self.items[0] is not given or self.items[1] != micro_batches:
            self.items = given, micro_batches, objective.per_micro_batch(given, micro_batches)
        return self.items[2].clone()

    def find(self, inputs: Any) -> Mapping[str, Any] | None:
        """The micro-batch that inputs are, or were made from: one that shares a tensor's memory with them."""
        for batch, entries in zip(self.fetched, self.batches, strict=True):
            if batch is inputs:
                return entries
        mine = {v.data_ptr() for v in counting.entries_of(inputs).values() if isinstance(v, torch.Tensor) and v.numel()}
        for batch, entries in zip(self.fetched, self.batches, strict=True):
            theirs = counting.entries_of(batch).values()
            if any(isinstance(v, torch.Tensor) and v.numel() and v.data_ptr() in mine for v in theirs):
                return entries
        return None


class State:
    """What is known of one Trainer."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self.origins: dict[Any, counting.Origin] = {}  # of the labels of earlier calls
        self.metrics: Metrics | None = None
        self.warned: set[str] = set()
        self.check = objective.Check()
        self.measured = terms.Measured()
        self.verification: probe.Verification | None = None
        self.schemes = terms.Schemes()
        self.known: known.Known | None = None  # what is written down of its class
        self.is_looked_up = False

    def look_up(self, trainer: Any, inputs: Any) -> known.Known | None:
        """What is written down of a Trainer's class, by a micro-batch as compute_loss gets it: asked once."""
        if not self.is_looked_up and isinstance(inputs, Mapping):
            self.is_looked_up = True
            self.known = known.look_up(trainer, inputs)
            if self.known is not None:
                self.check.is_done, self.measured = True, self.known.measured
        return self.known


def state_of(trainer: Any) -> State:
    state = registration.trainers.get(trainer)
    if state is None:
        state = registration.trainers[trainer] = State()
    return state


class Metrics:
    """Observes the losses of a Trainer: the metrics of the tokens that were trained on since the last log."""

    metrics = True

    def __init__(self) -> None:
        self.sums: Any = None  # items, correct ones, entropy: (3,) float64
        self.to_log: dict[str, float] = {}

    @not_compiled
    def __call__(self, loss: torch.Tensor, sums: TokenSums | None) -> torch.Tensor:
        step = steps.current()
        if sums is not None and step is not None and step.observer is self:
            step.observer = None  # the first cross-entropy of a micro-batch is its main one; the others need no metrics
            values = (sums.num_items, sums.num_correct, sums.entropy_sum)
            added = torch.stack([value.double() for value in values if value is not None])
            self.sums = added if self.sums is None else self.sums + added.to(self.sums.device)
        return loss

    def collect(self, trainer: Any) -> None:
        """Adds the sums up over the ranks, for the log that follows. Every rank calls it."""
        sums = torch.zeros(3, dtype=torch.float64, device=trainer.args.device) if self.sums is None else self.sums
        items, correct, entropy = _sum_over_ranks(trainer, sums).tolist()
        self.sums = None
        self.to_log = {"token_accuracy": correct / items, "token_entropy": entropy / items} if items else {}


def _sum_over_ranks(trainer: Any, sums: torch.Tensor) -> torch.Tensor:
    if trainer.args.world_size == 1:
        return sums
    return trainer.accelerator.gather(sums.to(trainer.args.device).reshape(1, -1)).sum(0)


# Putting the methods in place ---------------------------------------------------------------------------------------


def install(patches: Patches) -> None:
    """Wraps the methods. Raises RuntimeError, and changes nothing, where transformers has not got them."""
    if patches:
        return
    cls = _trainer_module().Trainer
    missing = [name for name in METHODS if not callable(getattr(cls, name, None))]
    if missing:
        raise RuntimeError(
            f"register_with_transformers: expected transformers.Trainer to have {', '.join(missing)}, got a "
            "transformers that does not; transformers 4.57 to 5.24 are supported"
        )
    for name in METHODS:
        ours = globals()[name]
        if name in patches.stayed and getattr(cls, name) is not _originals[name]:
            continue  # somebody has wrapped ours, and goes on calling it
        if getattr(cls, name) is not ours:
            _originals[name] = getattr(cls, name)
        patches.bind(cls, name, ours)


def install_name(patches: Patches) -> None:
    """trainer asks ``LOSS_MAPPING.get(...) is ForCausalLMLoss``, by a name of its own."""
    module = _trainer_module()
    if hasattr(module, "ForCausalLMLoss"):
        patches.bind(module, "ForCausalLMLoss", losses.causal_lm_loss)


def install_smoother(patches: Patches) -> None:
    """Trainer's label smoother, for those who call it in a compute_loss of their own."""
    from transformers.trainer_pt_utils import LabelSmoother

    if not patches:
        _originals["label_smoother"] = LabelSmoother.__call__
        patches.bind(LabelSmoother, "__call__", _smooth)


def _smooth(
    self: Any, model_output: Any, labels: torch.Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
) -> torch.Tensor:
    """LabelSmoother.__call__: a mean over the labels, which in a step are those of all its micro-batches."""
    logits = model_output["logits"] if isinstance(model_output, Mapping) else model_output[0]
    if not steps.is_counted() or labels.dim() != logits.dim() - 1:
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return _originals["label_smoother"](self, model_output, labels, shift_labels, **given)
    loss = losses.causal_lm_loss if shift_labels else losses.masked_lm_loss
    return loss(logits, labels, None, num_items_in_batch, self.ignore_index, label_smoothing=self.epsilon)


def _trainer_module() -> Any:
    try:
        import transformers.trainer
    except ImportError as error:
        raise RuntimeError(
            f"register_with_transformers: expected transformers.trainer to import, got: {error}; pip install accelerate"
        ) from error
    return transformers.trainer


# What Trainer's model is and does -------------------------------------------------------------------------------------


def base_model(trainer: Any) -> Any:
    """The transformers model inside of what torch.compile and PEFT have wrapped."""
    model = uncompiled(trainer.model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def is_covered(trainer: Any) -> bool:
    """Whether the step of this Trainer is ours to count."""
    if not registration.is_active:
        return False
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if config is not None and getattr(config, "sp_enabled", False) and getattr(config, "sp_backend", "") == "deepspeed":
        return False  # counts its own tokens, and divides by them
    if registration.covers_all:
        return True
    return registration.is_active and losses.underlying(mapping.loss_of(base_model(trainer))) is not None


def shifts_labels(model: Any) -> bool:
    """Whether the loss that the model calls takes label t + 1 for position t, so that the first label is no target."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss = mapping.loss_of(model)
    if loss is not None and mapping.replacement_for(loss) is None:  # the user's own: as Trainer, by the loss_type
        loss = mapping.loss_mapping().get(getattr(model, "loss_type", None))
    replacement = mapping.replacement_for(loss)
    return replacement is not None and losses.underlying(replacement) is losses.causal_lm_loss


def counted_labels(model: Any, batch: Mapping[str, Any]) -> Any:
    """The labels of a micro-batch that are targets, before those that are ignored are left out."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    labels = batch["labels"]
    return labels[..., 1:] if isinstance(labels, torch.Tensor) and shifts_labels(model) else labels


def _counted_rule(trainer: Any, batch: Mapping[str, Any]) -> counting.Rule:
    """counted_labels, as a rule."""
    if "shift_labels" in batch:
        return counting.Rule("shift_labels")
    return counting.Rule("labels", int(shifts_labels(base_model(trainer))))


def _counted_in_step(trainer: Any, window: Window | None, batch: Mapping[str, Any]) -> counting.Rule:
    """_counted_rule, whose shift is asked for once a window."""
    if window is None or "shift_labels" in batch:
        return _counted_rule(trainer, batch)
    if window.shift is None:
        window.shift = int(shifts_labels(base_model(trainer)))
    return counting.Rule("labels", window.shift)


def ranks(trainer: Any) -> int:
    """How many losses the gradients of a step are averaged over, besides its micro-batches, where tokens are counted
    over all of them: the factor that Trainer multiplies by."""
    args = trainer.args
    if not args.average_tokens_across_devices:
        return 1
    if args.n_gpu > 1:
        return args.n_gpu
    tensor_parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    return max(trainer.accelerator.num_processes // max(tensor_parallel, 1), 1)


def over_ranks(trainer: Any, total: torch.Tensor) -> torch.Tensor:
    """A count of this rank as Trainer's own count of items goes over the ranks. () float64, no sync."""
    args = trainer.args
    total = total.to(args.device)
    if args.average_tokens_across_devices:
        if args.world_size > 1:
            total = trainer.accelerator.gather(total.reshape(1)).sum()
    elif args.n_gpu > 1:
        total = total // args.n_gpu
    return total / same_batch(trainer)


def same_batch(trainer: Any) -> int:
    """Ranks that hold the same micro-batches: tensor, context and sequence parallel ones."""
    if all(hasattr(trainer, name) for name in ("get_tp_size", "get_cp_size", "get_sp_size")):
        return trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return 1 if config is None else config.non_data_parallel_size


# The methods ----------------------------------------------------------------------------------------------------------


def train(self: Any, *args: Any, **kwargs: Any) -> Any:
    _tell_unused_loss(self)
    with outermost(self):
        return _originals["train"](self, *args, **kwargs)


def _tell_unused_loss(trainer: Any) -> None:
    """A loss of ours that was assigned to a model which never asks for it."""
    model = base_model(trainer)
    given = getattr(model, LOSS_FUNCTION, None)
    is_unused = losses.underlying(given) is not None and not deferred.calls_loss_function(type(model))
    if (
        is_covered(trainer)
        and is_unused
        and not registration.is_one_of(model)
        and "loss_function" not in state_of(trainer).warned
    ):
        state_of(trainer).warned.add("loss_function")
        warnings.warn(
            f"accumloss: the loss_function that was assigned to {type(model).__name__} has no effect: its forward calls none; "
            "pass Trainer a compute_loss_func: functools.partial(accumloss.compute_loss_func, ...)",
            InexactWarning,
            stacklevel=3,
        )


@contextmanager
def outermost(trainer: Any) -> Iterator[None]:
    """Puts ours around the methods of a step, whatever class they come from, for as long as it trains."""
    patches = Patches()
    for name, around in AROUND.items():
        patches.bind(trainer, name, functools.partial(around, trainer, getattr(trainer, name)))
    try:
        yield
    finally:
        patches.undo()


def _around_get_batch_samples(trainer: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    batch_samples, num_items_in_batch = theirs(*args, **kwargs)
    window = state_of(trainer).window
    if is_covered(trainer) and (window is None or window.fetched is not batch_samples):
        state_of(trainer).window = Window(batch_samples)
    return batch_samples, num_items_in_batch


def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
    batch_samples, num_items_in_batch = _originals["get_batch_samples"](self, *args, **kwargs)
    if is_covered(self):
        window = state_of(self).window = Window(batch_samples)
        is_ours = type(self)._get_num_items_in_batch is _get_num_items_in_batch
        if is_ours and isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.dim() == 0:
            # counted just now, over all ranks: the usual loss needs no second count
            window.totals[_counted_in_step(self, window, window.batches[0])] = steps.at_least_one(
                num_items_in_batch.double()
            )
    return batch_samples, num_items_in_batch


def _get_num_items_in_batch(self: Any, batch_samples: list, device: torch.device) -> Any:
    original = _originals["_get_num_items_in_batch"]
    if not is_covered(self) or not all(isinstance(b, Mapping) and "labels" in b for b in batch_samples):
        return original(self, batch_samples, device)
    model = base_model(self)
    counted = [{"labels": counted_labels(model, batch)} for batch in batch_samples]
    shifts, self._loss_shifts_labels = getattr(self, "_loss_shifts_labels", False), False  # done already
    try:
        return original(self, counted, device)
    finally:
        self._loss_shifts_labels = shifts


def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer's own: of a step that is entered already, or of one whose train() began before accumloss was registered."""
    original = functools.partial(_originals["training_step"], self)
    step = steps.current()
    if step is not None and step.is_training and step.trainer is self:
        with objective.micro_batches(self, step.micro_batches, step.asked):
            return original(*args, **kwargs)
    return _around_training_step(self, original, *args, **kwargs)


def _around_training_step(trainer: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not is_covered(trainer):
        return theirs(*args, **kwargs)
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)  # an override may have a signature of its own
    state, model = state_of(trainer), base_model(trainer)
    rebind.rebind_for(trainer, model)
    _measure_once(trainer, state, inputs)
    step = make_step(trainer, state, model, inputs)
    if settings.metrics:
        state.metrics = state.metrics or Metrics()
        step.observer = state.metrics
    # one that never reaches Trainer's own divides by itself, or not at all: for it there is one micro-batch
    is_theirs = not is_trainers_own(theirs)
    says = (1, 1) if is_theirs and not reaches_trainers_own(theirs) else (step.micro_batches, step.asked)
    with steps.entered(step), objective.micro_batches(trainer, *says):
        if is_theirs:
            step.averaged, step.expected_grad = ranks(trainer), 1.0
        if state.known is not None and state.known.has_own_step:
            loss = known.own_step(trainer, step, theirs, args, kwargs)
        else:
            loss = theirs(*args, **kwargs)
    _look_at(trainer, state, step)
    return loss


def is_trainers_own(method: Any) -> bool:
    """Whether a bound method is transformers', in our wrapper or not, and no override."""
    while isinstance(method, functools.partial):
        method = method.func
    function = getattr(method, "__func__", method)
    return function is training_step or function is _originals.get("training_step")


def reaches_trainers_own(method: Any) -> bool:
    """Whether an override of training_step goes on to the one it overrides, as far as its code says."""
    while isinstance(method, functools.partial):
        method = method.func
    code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
    return code is not None and "super" in code.co_names


def _look_at(trainer: Any, state: State, step: steps.Step) -> None:
    """At the end of a window: says once what of the step is not exact by construction."""
    window = state.window
    if state.known is not None and state.known.coupled and (step.micro_batches > 1 or trainer.args.world_size > 1):
        objective.tell(trainer, state.warned, state.known.coupled, settings.verify == "error", "differs")
    for reason in step.ambiguous - state.warned:
        state.warned |= {reason, "ambiguous"}
        objective.tell(trainer, set(), reason, settings.verify == "error")
    if window is None or state.check.is_done:
        return
    window.seen += 1
    if not step.is_computed and not step.terms:
        state.check.blame("training_step computes it without compute_loss, by nothing that was recognised")
    if window.seen < len(window.fetched):
        return
    if len(window.fetched) == 1 and trainer.args.world_size == 1:
        state.check, state.schemes = objective.Check(), terms.Schemes()  # nothing was accumulated
        return
    for reason in state.schemes.ends_of_window():
        state.check.blame(reason)
    smallest = min(counting.num_rows(batch) for batch in window.batches)
    why = coupled.why(type(base_model(trainer)).__name__, smallest)
    for reason in probe.coupling(base_model(trainer)) | ({why} if why else set()):
        state.check.blame(reason)
    reason = state.check.end()
    library = bypassing_library(trainer)
    if reason and library:
        reason += f" ({library} computes the loss of {type(base_model(trainer)).__name__}: {_REMEDIES[library]})"
    found = state.verification
    if reason and found is not None:
        reason += f"; it could not be measured: {found.reason}"
    elif reason:
        reason += "; accumloss.verify(trainer) measures what it averages over"
    objective.tell(trainer, state.warned, reason, settings.verify == "error")


def measure(trainer: Any, here: Any = None, is_training: bool = False) -> probe.Verification:
    """What the loss of a Trainer averages over, measured on its own rows; see accumloss.verify."""
    state = state_of(trainer)
    before, measured = state.window, state.measured
    name = type(trainer).__name__
    dataloaders = list(dataloaders_of(trainer.accelerator))
    theirs = trainer.compute_loss
    if isinstance(theirs, functools.partial) and theirs.func is _around_compute_loss:
        theirs = theirs.args[1]
    try:
        why_not = _why_not_measured(trainer)
        if why_not:
            raise probe.NotMeasured(why_not)
        model = uncompiled(trainer.model)
        with probe.as_it_was(trainer, model):
            loader = trainer.callback_handler.train_dataloader if is_training else trainer.get_train_dataloader()

            def run(measured: terms.Measured) -> probe.Verification:
                counted = functools.partial(_counted_rule, trainer)
                return probe.Probe(trainer, model, theirs, counted, measured).run(loader, here)

            found = run(measured)
            if found.is_exact is False and (found.measured.rest or any(w for _, w in found.measured.calls)):
                again = run(found.measured)
                if again.is_exact and is_training:
                    return replace(again, measured=found.measured, can_be_exact=True)
                return replace(found, forwards=again.forwards + found.forwards, can_be_exact=bool(again.is_exact))
            return found
    except probe.NotMeasured as error:
        return probe.Verification(name, None, str(error))
    except Exception as error:  # whatever the code of somebody else raises on rows of its own dataset
        return probe.Verification(name, None, f"on some rows of its dataset it raised {type(error).__name__}: {error}")
    finally:
        dataloaders_of(trainer.accelerator)[:] = dataloaders
        state.window = before


def _why_not_measured(trainer: Any) -> str:
    if not is_covered(trainer):
        return "accumloss is not registered for its model"
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        return "its weights are sharded"
    if "_buffered_inputs" in vars(trainer):
        return "it generates the rows that it trains on, and makes its micro-batches of them by itself"
    step = type(trainer).training_step
    if step is not training_step and not {"super", "compute_loss"} & set(inspect.unwrap(step).__code__.co_names):
        return f"{type(trainer).__name__}.training_step computes the loss itself"
    if trainer.train_dataset is None:
        return "it has no train_dataset"
    return ""


def _measure_once(trainer: Any, state: State, inputs: Any) -> None:
    """Before the first step of a Trainer, where register_with_transformers(verify=True) asks for it."""
    window = state.window
    if not settings.verify or state.verification is not None or window is None:
        return
    if state.look_up(trainer, inputs) is not None:
        return  # it is written down
    if len(window.fetched) == 1 and trainer.args.world_size == 1:
        return  # nothing is accumulated
    mine = found = measure(trainer, inputs, is_training=True)
    if trainer.args.world_size > 1:
        from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

        found = broadcast_object_list([mine])[0]  # all ranks must count equally often
        if (mine.is_exact, mine.measured) != (found.is_exact, found.measured):
            objective.tell(
                trainer,
                set(),
                f"on rank {trainer.args.process_index} it was measured to be another: {mine.reason or 'exact'}",
            )
    state.verification = found
    if found.is_exact is None:
        return  # what is known by construction is all there is
    state.check.is_done, state.schemes = True, found.schemes
    if found.can_be_exact:
        state.measured = found.measured
    if not found.is_exact:
        objective.tell(trainer, state.warned, found.reason, settings.verify == "error", "differs")


def make_step(trainer: Any, state: State, model: Any, inputs: Any) -> steps.Step:
    """The step around one micro-batch."""
    here = None if state.window is None else state.window.find(inputs)
    # not prefetched by Trainer: of the others nothing is known, and what they are called with counts
    window = Window([]) if here is None or state.window is None else state.window
    step = steps.Step(
        window.batches,
        {},
        averaged=1,
        expected_grad=1.0,
        over_ranks=lambda total: over_ranks(trainer, total),
        totals=window.totals,
        origins=state.origins,
        gathers=trainer.args.average_tokens_across_devices and trainer.args.world_size > 1,
    )
    step.known = state.look_up(trainer, inputs)
    step.model = model
    step.trainer, step.here, step.is_watched = trainer, here, not state.check.is_done
    step.schemes, step.measured = state.schemes, state.measured
    step.is_watched_for_ambiguity = "ambiguous" not in state.warned
    step.micro_batches = getattr(
        trainer, "current_gradient_accumulation_steps", 1
    )  # absent where train() is not running
    step.asked = trainer.args.gradient_accumulation_steps
    _begin(trainer, state, step, inputs)
    return step


def _begin(trainer: Any, state: State, step: steps.Step, inputs: Any) -> None:
    step.begin(counting.entries_of(inputs))
    if isinstance(step.inputs.get("labels"), torch.Tensor) and isinstance(inputs, Mapping):
        step.main = _counted_in_step(trainer, state.window, inputs)


def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer's own: reached from the outermost one, which divides, or itself the outermost."""
    return _around_compute_loss(self, functools.partial(_compute_loss, self), *args, **kwargs)


def _around_compute_loss(trainer: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    step = steps.current()
    is_of_step = step is not None and step.is_training and step.trainer is trainer
    if not is_of_step or not is_covered(trainer):
        return theirs(*args, **kwargs)
    assert step is not None
    if step.depth:  # called by another, or by itself
        return theirs(*args, **kwargs)
    state = state_of(trainer)
    if len(args) > 3:
        args, kwargs = args[:3], {"num_items_in_batch": args[3], **kwargs}
    inputs = kwargs.get("inputs", args[1] if len(args) > 1 else None)
    if step.known is None and state.look_up(trainer, inputs) is not None:
        step.known, step.measured, step.is_watched = state.known, state.measured, False
    divides_itself = objective.says_it_is_scaled(trainer)
    if divides_itself and (step.known is None or step.known.window is None):
        return theirs(*args, **kwargs)
    _begin(trainer, state, step, inputs)
    step.depth += 1
    step.is_computed = True
    try:
        if step.known is not None and step.known.is_counted_often and kwargs.get("num_items_in_batch") is not None:
            kwargs = {**kwargs, "num_items_in_batch": kwargs["num_items_in_batch"] / step.micro_batches}
        if divides_itself:
            assert step.known is not None and step.known.window is not None
            step.window, step.here = list(step.known.window(trainer)), None
            step.totals = {} if state.window is None else state.window.totals
            return objective.divided_by_itself(trainer, theirs, step, ranks(trainer), args, kwargs)
        check = None if state.check.is_done else state.check
        with known.tokens_shown(args[0] if args else trainer.model, step.known, _shown_in(step)):
            share = (state.window or Window([])).share_of_items
            return objective.divided(trainer, theirs, step, ranks(trainer), check, share, args, kwargs)
    finally:
        step.depth -= 1


def _shown_in(step: steps.Step) -> Any:
    """What takes the sums over the tokens of a micro-batch, where metrics are wanted of it."""
    observer = step.observer

    def show(sums: TokenSums) -> None:
        if step.observer is not None:
            step.observer(sums.loss_sum, sums)

    return show if observer is not None and observer.metrics else None


AROUND = {
    "get_batch_samples": _around_get_batch_samples,
    "training_step": _around_training_step,
    "compute_loss": _around_compute_loss,
}


def _compute_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
) -> Any:
    """A loss of Trainer's compute_loss: its terms are parts of the step's, averaged over the micro-batches."""
    original = _originals["compute_loss"]
    step = steps.current()
    if not is_covered(self):
        return original(self, model, inputs, return_outputs, num_items_in_batch, **kwargs)
    if isinstance(step, evaluations.Evaluation):
        return _compute_batch_of_set(self, step, model, inputs, return_outputs, num_items_in_batch, **kwargs)
    if step is None or step.trainer is not self or objective.says_it_is_scaled(self):
        if self.compute_loss_func is not None or step is not None:
            return original(self, model, inputs, return_outputs, num_items_in_batch, **kwargs)
        return _compute_evaluation_loss(self, model, inputs, return_outputs, num_items_in_batch, **kwargs)
    if self.compute_loss_func is not None:
        if num_items_in_batch is not None:  # Trainer multiplies by the ranks itself
            step.averaged = step.micro_batches
        return original(self, model, inputs, return_outputs, num_items_in_batch, **kwargs)

    if step.model is None:
        step.model = base_model(self)
    _begin(self, state_of(self), step, inputs)
    calls = step.calls
    if self.model_accepts_loss_kwargs and not step.is_given(num_items_in_batch):
        given = torch.as_tensor(num_items_in_batch) / ranks(self)  # somebody's own number
        inputs = {**inputs, "num_items_in_batch": given}
    elif (items := _items_for(self, step)) is not None:
        share = items.share if isinstance(items, objective.Items) else items
        among = ranks(self)
        step.num_items_in_batch = share if among == 1 else (share / among).to(torch.float32)
        inputs = {**inputs, "num_items_in_batch": step.num_items_in_batch}
    # without num_items_in_batch Trainer passes none, and does not multiply by the ranks
    loss, outputs = _smoothed_loss(self, step, original, model, inputs, **kwargs)
    loss = _weighed(self, step, loss, is_called=step.calls > calls)
    return (loss, outputs) if return_outputs else loss


def _items_for(trainer: Any, step: steps.Step) -> Any:
    """The items per micro-batch that the model is to be given; None: it takes none, or there are none."""
    if trainer.model_accepts_loss_kwargs:
        return step.items
    if not takes_the_items(type(step.model).forward) or not step.window:
        return None
    if step.items is None and step.main is not None:  # Trainer counts none for such a model
        return step.total(step.main) / step.micro_batches
    return step.items


def _weighed(trainer: Any, step: steps.Step, loss: torch.Tensor, is_called: bool) -> torch.Tensor:
    """The loss of a model as a part of the step's."""
    model = step.model
    if not is_called and not type(model).__module__.startswith(OURS_TO_KNOW) and not is_transducer(model):
        # a module of somebody's own, and nothing in it was recognised: it may honour the number that it was given
        step.is_known = step.num_items_in_batch is not None and names_the_items(type(model).forward)
        return loss
    factor = share(step, is_called)
    if factor is not None:
        return step.record(loss * factor)
    step.is_known = step.is_known or not is_called
    return loss


OURS_TO_KNOW = ("transformers.", "transformers_modules.")


def _compute_evaluation_loss(
    trainer: Any, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any, **kwargs: Any
) -> Any:
    """A batch outside of a training step: the mean over its items, smoothed as in training."""
    original = _originals["compute_loss"]
    if trainer.label_smoother is None or "labels" not in inputs:
        return original(trainer, model, inputs, return_outputs, num_items_in_batch, **kwargs)
    step = steps.Step([inputs], inputs, ranks(trainer), 1.0, lambda total: over_ranks(trainer, total), {})
    with steps.entered(step):
        loss, outputs = _smoothed_loss(trainer, step, original, model, inputs, **kwargs)
    return (loss, outputs) if return_outputs else loss


def _compute_batch_of_set(
    trainer: Any,
    step: evaluations.Evaluation,
    model: Any,
    inputs: Any,
    return_outputs: bool,
    num_items_in_batch: Any,
    **kwargs: Any,
) -> Any:
    """A batch of an evaluation loop: the mean over its own items, and what Trainer multiplies by the ranks is left out."""
    original = _originals["compute_loss"]
    if trainer.compute_loss_func is not None:
        is_ours = getattr(trainer.compute_loss_func, "func", trainer.compute_loss_func) is hook.compute_loss_func
        given = None if is_ours else num_items_in_batch
        return original(trainer, model, inputs, return_outputs, given, **kwargs)
    step.inputs = inputs
    labels = counting.entries_of(inputs).get("labels")
    step.main = _counted_rule(trainer, inputs) if isinstance(labels, torch.Tensor) else None
    step.num_items_in_batch = None
    # compiled code makes use of it, and is not observed
    takes_items = trainer.model_accepts_loss_kwargs or takes_the_items(type(base_model(trainer)).forward)
    if takes_items and step.main is not None:
        given = step.num_items_in_batch = steps.at_least_one(step.main.total(inputs)).to(torch.float32)
        inputs = {**inputs, "num_items_in_batch": given}
    loss, outputs = _smoothed_loss(trainer, step, original, model, inputs, **kwargs)
    return (loss, outputs) if return_outputs else loss


def _smoothed_loss(
    trainer: Any, step: steps.Step, original: Callable[..., Any], model: Any, inputs: dict[str, Any], **kwargs: Any
) -> tuple[Any, Any]:
    """Loss and outputs of the original compute_loss, with label smoothing inside of our kernels.

    Trainer's LabelSmoother takes the labels from the model and guesses from its name whether it shifts them. Here the
    model computes its own loss, smoothed. Where that was none of ours, the logits that it returns are used instead.
    """
    smoother = trainer.label_smoother
    if smoother is None or "labels" not in inputs:
        return original(trainer, model, inputs, True, None, **kwargs)
    labels = inputs["labels"]
    trainer.label_smoother, step.label_smoothing = None, smoother.epsilon
    try:
        loss, outputs = original(trainer, model, inputs, True, None, **kwargs)
    finally:
        trainer.label_smoother, step.label_smoothing = smoother, 0.0
    if step.smoothed:
        return loss, outputs
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
    loss = losses.masked_lm_loss if not shifts_labels(base_model(trainer)) else losses.causal_lm_loss
    smoothed = loss(
        logits, labels, None, step.num_items_in_batch, smoother.ignore_index, label_smoothing=smoother.epsilon
    )
    return smoothed, outputs


MASKS = ("bool_masked_pos", "future_observed_mask")  # entries whose ones a head averages over by itself


def share(step: steps.Step, is_called: bool) -> Any:
    """What a loss that none of ours computed is multiplied by, for its items to weigh in the step as they are many.

    CTC and transducers: a mean is over examples, a sum over all of the step. Masked image models: the mean over the masked
    patches; time series: over the values that were observed.
    None: it was ours, or it may have divided by the num_items_in_batch that it was given.
    """
    model = step.model
    if is_transducer(model):
        if is_sum_over_examples(model):
            return step.micro_batches
    elif is_called:
        return None
    elif step.window and (mask := next((key for key in MASKS if isinstance(step.inputs.get(key), torch.Tensor)), None)):
        return step.share_of(counting.Rule(mask, ignore_index=0))
    elif step.num_items_in_batch is not None and not computes_its_loss_alone(type(model).forward):
        return None
    return step.share_of_rows()


def is_transducer(model: Any) -> bool:
    """Whether the loss is over examples: CTC and its kin."""
    name = type(model).__name__
    return getattr(model, "loss_type", None) == "ForCTC" or name.endswith(("ForCTC", "ForTDT", "ForRNNT"))


def is_sum_over_examples(model: Any) -> bool:
    return is_transducer(model) and getattr(model.config, "ctc_loss_reduction", None) == "sum"


@functools.cache
def computes_its_loss_alone(forward: Callable[..., Any]) -> bool:
    """Whether a forward calls no loss function and looks at no num_items_in_batch: its loss is a mean of its own."""
    try:
        source = inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return False
    return "loss_function" not in source and "num_items_in_batch" not in source


@functools.cache
def names_the_items(forward: Callable[..., Any]) -> bool:
    """Whether a forward looks at num_items_in_batch."""
    try:
        return "num_items_in_batch" in inspect.getsource(inspect.unwrap(forward))
    except (OSError, TypeError):
        return False


@functools.cache
def takes_the_items(forward: Callable[..., Any]) -> bool:
    """Whether a forward has a parameter num_items_in_batch. Trainer passes it to those only that take any keyword."""
    try:
        return "num_items_in_batch" in inspect.signature(forward).parameters
    except (ValueError, TypeError):
        return False


# Evaluation -----------------------------------------------------------------------------------------------------------


def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = _originals["evaluation_loop"]
    if not is_covered(self) or not settings.evaluation or self.args.n_gpu > 1:
        return original(self, *args, **kwargs)
    rebind.rebind_for(self, base_model(self))
    evaluation = evaluations.Evaluation(settings.metrics, self.args.logging_nan_inf_filter)
    evaluation.model = base_model(self)
    patches = Patches()  # of the instance; a subclass may have others than Trainer
    patches.bind(self, "prediction_step", functools.partial(_prediction_step, self, evaluation, self.prediction_step))
    if type(self).compute_loss is not compute_loss:
        patches.bind(self, "compute_loss", functools.partial(_evaluated, self, evaluation, self.compute_loss))
    try:
        with steps.entered(evaluation):
            output = original(self, *args, **kwargs)
    finally:
        patches.undo()
    chosen = evaluation.agree_on_schemes(functools.partial(_largest, self))
    _tell_evaluation(self, evaluation, chosen)
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    prefix = given.get("metric_key_prefix", "eval")
    if output.metrics is not None and f"{prefix}_loss" in output.metrics:
        results = evaluation.results(lambda sums: _sum_over_ranks(self, sums), chosen)
        output.metrics.update({f"{prefix}_{name}": value for name, value in results.items()})
    return output


def _prediction_step(
    trainer: Any,
    evaluation: evaluations.Evaluation,
    predict: Callable[..., Any],
    model: Any,
    inputs: Any,
    prediction_loss_only: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Trainer's, of any class, whose loss goes into the evaluation."""

    written = evaluation.known = state_of(trainer).look_up(trainer, inputs)

    def show(sums: TokenSums) -> None:
        evaluation.token_sums = evaluation.token_sums or sums

    def called(inputs: Any, loss_only: bool) -> Any:
        evaluation.begin(inputs)
        shown = show if evaluation.metrics else None
        with known.parts(trainer, written), known.tokens_shown(model, written, shown):
            return predict(model, inputs, loss_only, *args, **kwargs)

    with _smoothed_in_kernel(trainer, evaluation, prediction_loss_only):
        predicted = called(inputs, prediction_loss_only)
    if predicted[0] is None:
        return tracked.plain(predicted)
    loss = predicted[0].mean()
    predicted = tracked.plain(predicted)
    real, are_all_real = real_rows(trainer, inputs)
    if evaluation.is_looking:
        evaluation.look(loss, functools.partial(_largest, trainer))
    if not are_all_real:  # rows that fill the last batch up are in the set already
        inputs = first_rows(inputs, max(real, 1))
        loss = called(inputs, True)[0].mean()
    if evaluation.is_linear:
        amount = evaluation.amount or _known_amount(evaluation) or _measured_amount(trainer, evaluation)
        amount = amount or _amount(trainer, evaluation)
    else:
        amount = evaluations.Amount(*[float(counting.num_rows(evaluation.inputs))] * 2)
    evaluation.add(loss, amount, is_real=real > 0)
    return predicted


def _tell_evaluation(trainer: Any, evaluation: evaluations.Evaluation, chosen: list[int | None]) -> None:
    """Says what of an evaluation may depend on the size of its batches."""
    if evaluation.known is not None:
        if evaluation.known.coupled:
            objective.tell_evaluation(trainer, state_of(trainer).warned, evaluation.known.coupled)
        return
    knows = state_of(trainer).measured.rest or evaluation.is_by_number or not _is_somebodys_own(trainer)
    reasons = sorted(evaluation.coupled)
    if not evaluation.is_linear:
        reasons.append(objective.NOT_LINEAR)
    elif not knows and evaluation.depends_on_batches(chosen):
        reasons.append(objective.OF_NO_TERM)
    if reasons:
        objective.tell_evaluation(trainer, state_of(trainer).warned, "; ".join(reasons))


@contextmanager
def _smoothed_in_kernel(trainer: Any, evaluation: evaluations.Evaluation, prediction_loss_only: bool) -> Iterator[None]:
    """Seq2SeqTrainer smooths the logits beside a generation itself, as a mean of the batch: here the model's loss does."""
    smoother = trainer.label_smoother
    generates = getattr(trainer.args, "predict_with_generate", False) and not prediction_loss_only
    if smoother is None or not generates:
        yield
        return
    trainer.label_smoother, evaluation.label_smoothing = None, smoother.epsilon
    try:
        yield
    finally:
        trainer.label_smoother, evaluation.label_smoothing = smoother, 0.0


def _largest(trainer: Any, *numbers: int) -> list[int]:
    """The largest of each over the ranks."""
    if trainer.args.world_size == 1:
        return list(numbers)
    mine = torch.tensor([numbers], device=trainer.args.device)
    return trainer.accelerator.gather(mine).amax(0).tolist()


def real_rows(trainer: Any, inputs: Any) -> tuple[int, bool]:
    """How many rows of a batch are not there only to make the ranks' last batches equally large; whether all ranks' are not."""
    rows = counting.num_rows(counting.entries_of(inputs))
    state = trainer.accelerator.gradient_state
    ranks_with_batches = trainer.args.world_size // same_batch(trainer)
    if ranks_with_batches == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows, True
    before = trainer.args.process_index // same_batch(trainer) * rows  # as gather_for_metrics takes them
    return min(max(state.remainder - before, 0), rows), state.remainder >= ranks_with_batches * rows


def first_rows(inputs: Any, n: int) -> Any:
    """The first rows of a batch; where an entry has none, the labels of the others are ignored instead."""
    entries = counting.entries_of(inputs)
    rows = counting.num_rows(entries)
    by_row = {
        k: v for k, v in entries.items() if isinstance(v, (list, tuple)) or (isinstance(v, torch.Tensor) and v.dim())
    }
    if all(len(value) == rows for value in by_row.values()):
        return counting.like(inputs, {**entries, **{key: value[:n] for key, value in by_row.items()}})
    ignored = {}
    for key in ("labels", "shift_labels"):
        if isinstance(entries.get(key), torch.Tensor) and not entries[key].is_floating_point():
            ignored[key] = entries[key].clone()
            ignored[key][n:] = -100
    return counting.like(inputs, {**entries, **ignored})


def _evaluated(
    trainer: Any, evaluation: evaluations.Evaluation, theirs: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The outermost compute_loss of somebody's own, in an evaluation: whether it makes use of the items that it is given."""
    given = kwargs.get("num_items_in_batch")
    inputs: Any = kwargs.get("inputs", args[1] if len(args) > 1 else None)
    labels = counting.entries_of(inputs).get("labels")
    if given is None or not isinstance(labels, torch.Tensor) or objective.is_compiled(trainer):
        return theirs(*args, **kwargs)
    items = objective.Items.of(given, objective.per_micro_batch(given, 1))
    evaluation.main = _counted_rule(trainer, inputs)
    result = theirs(*args, **{**kwargs, "num_items_in_batch": items})
    evaluation.is_touched = items.is_touched or items.is_taken
    evaluation.is_by_number = evaluation.is_by_number or evaluation.is_touched
    return result


def _is_somebodys_own(trainer: Any) -> bool:
    """Whether the loss of an evaluation is computed by other code than Trainer's and transformers'."""
    import transformers

    cls = type(trainer)
    own = transformers.Trainer.prediction_step, transformers.Seq2SeqTrainer.prediction_step
    is_own = cls.compute_loss is not compute_loss or cls.prediction_step not in own
    return (
        is_own
        or trainer.compute_loss_func is not None
        or not type(base_model(trainer)).__module__.startswith(OURS_TO_KNOW)
    )


def _known_amount(evaluation: evaluations.Evaluation) -> evaluations.Amount | None:
    """What a batch weighs where it is written down what the rest of the loss is a mean over."""
    if evaluation.known is None:
        return None
    rows = evaluation.share_of_rows()
    over = evaluation.known.over if evaluation.known.evaluated_over is None else evaluation.known.evaluated_over
    if over == terms.SUM_WEIGHS:
        return evaluations.Amount(1.0, rows)
    items = rows if over is None or isinstance(over, str) else over.total(evaluation.inputs)
    return evaluations.Amount(items, items)


def _measured_amount(trainer: Any, evaluation: evaluations.Evaluation) -> evaluations.Amount | None:
    """What a batch weighs where it was measured what the rest of the loss is a mean over."""
    weight = next(iter(state_of(trainer).measured.rest), None)
    if not isinstance(weight, counting.Rule) or not isinstance(evaluation.inputs.get(weight.key), torch.Tensor):
        return None
    items = weight.total(evaluation.inputs)
    return evaluations.Amount(items, items)


def _amount(trainer: Any, evaluation: evaluations.Evaluation) -> evaluations.Amount:
    """What a batch weighs in the set, besides its terms: its rows, mostly."""
    rows = evaluation.share_of_rows()
    if evaluation.is_touched and evaluation.main is not None:
        of_main = evaluation.main.total(evaluation.inputs)
        return evaluations.Amount(of_main, of_main)
    if is_sum_over_examples(base_model(trainer)):
        return evaluations.Amount(1.0, rows)
    items = share(evaluation, evaluation.calls > 0)
    if items is None:
        main = None if evaluation.calls or evaluation.summed else evaluation.main
        evaluation.is_by_number = evaluation.is_by_number or main is not None
        items = rows if main is None else main.total(evaluation.inputs)
    return evaluations.Amount(items, items)


# Logs -----------------------------------------------------------------------------------------------------------------


def _maybe_log_save_evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
    metrics = state_of(self).metrics
    if metrics is not None and self.control.should_log and self.state.global_step > self._globalstep_last_logged:
        metrics.collect(self)
    return _originals["_maybe_log_save_evaluate"](self, *args, **kwargs)


def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
    metrics = state_of(self).metrics
    if metrics is not None and "loss" in logs:
        logs.update(metrics.to_log)
        metrics.to_log = {}
    return _originals["log"](self, logs, *args, **kwargs)


# What goes past us ----------------------------------------------------------------------------------------------------


_REMEDIES = {
    "liger_kernel": "use_liger_kernel=False, or liger_kernel_config=dict(cross_entropy=False, "
    "fused_linear_cross_entropy=False)",
    "trl": "return a loss of accumloss's, or of PyTorch's, from a compute_loss of your own",
    "unsloth": "UNSLOTH_RETURN_LOGITS=1, or load the model without unsloth",
}


def bypassing_library(trainer: Any) -> str | None:
    """The library whose code stands in the way of the model's own loss, by where its functions come from."""
    model = base_model(trainer)
    forward = getattr(model, "forward", None)
    places = [getattr(getattr(forward, "__func__", forward), "__module__", "") or ""]
    places += [cls.__module__ for cls in type(model).__mro__]
    places += [getattr(type(trainer).compute_loss, "__module__", ""), type(trainer).__module__]
    for library in _REMEDIES:
        if any(place.split(".")[0] == library for place in places):
            return library
    return "liger_kernel" if getattr(trainer.args, "use_liger_kernel", False) else None
