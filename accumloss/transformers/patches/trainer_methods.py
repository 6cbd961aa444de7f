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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..._compat import LOSS_FUNCTION, class_of, has_steps_to_log, is_compiled, labels_as_they_are
from ...inexact import InexactWarning
from ...sums import TokenSums, widened
from .. import counting, deferred, known, losses, objective, rebind
from .. import step as steps
from ..models import base_model, counted_labels, trainer_module
from ..ranks import (
    agree_on_batches,
    averaged_losses,
    averaged_ranks,
    gathers,
    is_of_ulysses,
    is_sharded_later,
    over_all_ranks,
    over_counted,
    over_ranks,
    same_batch,
)
from ..registration import Patches, registration
from ..settings import settings
from ..state import Metrics, State, Window, begin, counted_in_step, is_covered, state_of
from ..versions import TESTED
from ..watch import look_at, measure_once
from . import originals
from .compute_loss import compute_own_loss
from .evaluation_loop import evaluation_loop


def install(patches: Patches) -> None:
    """Wraps the methods. Raises RuntimeError, and changes nothing, where transformers has not got them."""
    if patches:
        return
    cls = trainer_module().Trainer
    missing = [name for name in METHODS if not callable(getattr(cls, name, None))]
    if missing:
        raise RuntimeError(
            f"register_with_transformers: expected transformers.Trainer to have {', '.join(missing)}, got a "
            f"transformers that does not; {TESTED} are supported"
        )
    for name, ours in METHODS.items():
        if name in patches.stayed and getattr(cls, name) is not originals[name]:
            continue  # somebody has wrapped ours, and goes on calling it
        if getattr(cls, name) is not ours:
            originals[name] = getattr(cls, name)
        patches.bind(cls, name, ours)


def train(self: Any, *args: Any, **kwargs: Any) -> Any:
    _tell_ulysses(self)
    _tell_unused_loss(self)
    _tell_unused_fusion(self)
    with outermost(self):
        return originals["train"](self, *args, **kwargs)


def _tell_unused_loss(trainer: Any) -> None:
    """A loss of ours that was assigned to a model which never asks for it."""
    model = base_model(trainer)
    given = getattr(model, LOSS_FUNCTION, None)
    is_unused = losses.underlying(given) is not None and not deferred.calls_loss_function(class_of(model))
    if (
        is_covered(trainer)
        and is_unused
        and not registration.is_one_of(model)
        and "loss_function" not in state_of(trainer).warned
    ):
        state_of(trainer).warned.add("loss_function")
        warnings.warn(
            f"accumloss: the loss_function that was assigned to {class_of(model).__name__} has no effect: its forward calls none; "
            "pass Trainer a compute_loss_func: functools.partial(accumloss.compute_loss_func, ...)",
            InexactWarning,
            stacklevel=3,
        )


def _tell_ulysses(trainer: Any) -> None:
    """What a step is that DeepSpeed's sequence parallelism divides by itself: transformers takes its loss as it is."""
    if not registration.is_active or not is_of_ulysses(trainer):
        return
    groups = max(trainer.args.world_size // same_batch(trainer), 1)
    if trainer.args.gradient_accumulation_steps * groups > 1:
        objective.tell(
            trainer,
            state_of(trainer).warned,
            "under DeepSpeed's sequence parallelism (sp_size > 1) each micro-batch is divided by its own tokens, not by the "
            "step's, and accumloss leaves it to DeepSpeed; cp_size in the place of sp_size is exact",
            settings.verify == "error",
        )


def _tell_unused_fusion(trainer: Any) -> None:
    """What keeps a loss from the hidden states of any model; the rest says its first call (deferred.py)."""
    if not settings.fused_linear or not is_covered(trainer):
        return
    if trainer.args.torch_compile or is_compiled(trainer.model):
        deferred.tell_unused(base_model(trainer), "it is compiled")
    elif trainer.compute_loss_func is not None:
        deferred.tell_unused(base_model(trainer), "compute_loss_func takes the logits")


@contextmanager
def outermost(trainer: Any) -> Iterator[None]:
    """Puts ours around the methods of a step, whatever class they come from, for as long as it trains."""
    methods = state_of(trainer).methods
    with Patches() as patches:
        for name, around in AROUND.items():
            methods[name] = getattr(trainer, name)
            patches.bind(trainer, name, functools.partial(around, trainer, methods[name]))
        try:
            yield
        finally:
            methods.clear()


def _around_get_batch_samples(trainer: Any, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    batch_samples, num_items_in_batch = theirs(*args, **kwargs)
    window = state_of(trainer).window
    if is_covered(trainer) and (window is None or window.fetched is not batch_samples):
        window = state_of(trainer).window = Window(batch_samples, is_sharded_later(trainer))
    if window is not None and is_covered(trainer):
        _count_over_ranks(trainer, window)
    return batch_samples, num_items_in_batch


def _count_over_ranks(trainer: Any, window: Window) -> None:
    """What the ranks count of a window when it is fetched."""
    if gathers(trainer):
        over_all = functools.partial(over_all_ranks, trainer)
        state_of(trainer).exchange.fetch(window.batches, window.totals, over_all)


def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
    batch_samples, num_items_in_batch = originals["get_batch_samples"](self, *args, **kwargs)
    if is_covered(self):
        window = state_of(self).window = Window(batch_samples, is_sharded_later(self))
        is_ours = type(self)._get_num_items_in_batch is _get_num_items_in_batch
        if is_ours and isinstance(num_items_in_batch, torch.Tensor) and num_items_in_batch.dim() == 0:
            # counted just now, over all ranks: the usual loss needs no second count
            window.totals[counted_in_step(self, window, window.batches[0])] = steps.at_least_one(
                widened(num_items_in_batch)
            )
    return batch_samples, num_items_in_batch


def _get_num_items_in_batch(self: Any, batch_samples: list, device: torch.device) -> Any:
    original = originals["_get_num_items_in_batch"]
    if not is_covered(self) or not all(isinstance(b, Mapping) and "labels" in b for b in batch_samples):
        return original(self, batch_samples, device)
    agree_on_batches(self, batch_samples)
    model = base_model(self)
    counted = [{"labels": counted_labels(model, batch)} for batch in batch_samples]
    with labels_as_they_are(self):  # shifted already
        num_items = original(self, counted, device)
    missing = over_counted(self)
    return num_items if num_items is None or missing == 1 else num_items * missing


def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer's own: of a step that is entered already, or of one whose train() began before accumloss was registered."""
    original = functools.partial(originals["training_step"], self)
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
    measure_once(trainer, state, inputs)
    step = make_step(trainer, state, model, inputs)
    if settings.metrics:
        state.metrics = state.metrics or Metrics()
        step.observer = state.metrics
    # one that never reaches Trainer's own divides by itself, or not at all: for it there is one micro-batch
    is_theirs = not is_trainers_own(theirs)
    says = (1, 1) if is_theirs and not reaches_trainers_own(theirs) else (step.micro_batches, step.asked)
    with steps.entered(step), objective.micro_batches(trainer, *says):
        if is_theirs:
            step.averaged, step.expected_grad = averaged_losses(trainer), 1.0
        try:
            if state.known is not None and state.known.has_own_step:
                loss = known.own_step(trainer, step, theirs, args, kwargs)
            else:
                loss = theirs(*args, **kwargs)
        finally:
            objective.settled(step)  # no rank waits for one whose step called no compute_loss, or failed in it
    step.collect()
    look_at(trainer, state, step)
    return loss


def is_trainers_own(method: Any) -> bool:
    """Whether a bound method is transformers', in our wrapper or not, and no override."""
    while isinstance(method, functools.partial):
        method = method.func
    function = getattr(method, "__func__", method)
    return function is training_step or function is originals.get("training_step")


def reaches_trainers_own(method: Any) -> bool:
    """Whether an override of training_step goes on to the one it overrides, as far as its code says."""
    while isinstance(method, functools.partial):
        method = method.func
    code = getattr(inspect.unwrap(getattr(method, "__func__", method)), "__code__", None)
    return code is not None and "super" in code.co_names


def make_step(trainer: Any, state: State, model: Any, inputs: Any) -> steps.Step:
    """The step around one micro-batch."""
    index = None if state.window is None else state.window.find(inputs)
    # not prefetched by Trainer: of the others nothing is known, and what they are called with counts
    window = Window([]) if index is None or state.window is None else state.window
    step = steps.Step(
        window.batches,
        {},
        averaged=1,
        expected_grad=1.0,
        # replicas of DataParallel are no ranks: as_seen() takes care of them
        over_ranks=lambda total: total if trainer.args.n_gpu > 1 else over_ranks(trainer, total),
        over_all=lambda total: over_all_ranks(trainer, total),
        totals=window.totals,
        origins=state.origins,
        gathers=gathers(trainer),
    )
    step.among = averaged_losses(trainer)
    step.num_groups = max(trainer.args.world_size // same_batch(trainer), 1)
    step.known = state.look_up(trainer, inputs)
    if step.gathers and step.known is None and state.methods:  # outside of train() nothing says where a window begins
        step.exchange = state.exchange
    step.model = model
    step.trainer, step.is_watched = trainer, not state.check.is_done
    if index is not None and not window.is_sharded:  # else what is used is no longer what was fetched
        step.index, step.here = index, window.batches[index]
        step.fetched = counting.entries_of(window.fetched[index])
        step.counts = window.counts[index] if window.counts else ()
    step.schemes, step.measured = state.schemes, state.measured
    step.is_watched_for_ambiguity = "ambiguous" not in state.warned
    step.micro_batches = getattr(
        trainer, "current_gradient_accumulation_steps", 1
    )  # absent where train() is not running
    step.num_ranks, step.num_replicas = averaged_ranks(trainer), max(trainer.args.n_gpu, 1)
    step.asked = trainer.args.gradient_accumulation_steps
    if not window.is_sharded:  # in place, before compute_loss
        begin(trainer, state, step, inputs)
    return step


def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer's own: reached from the outermost one, which divides, or itself the outermost."""
    return _around_compute_loss(self, functools.partial(compute_own_loss, self), *args, **kwargs)


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
        step.known, step.measured, step.is_watched, step.exchange = state.known, state.measured, False, None
    divides_itself = objective.says_it_is_scaled(trainer)
    if divides_itself and (step.known is None or step.known.window is None):
        return theirs(*args, **kwargs)
    begin(trainer, state, step, inputs)
    step.depth += 1
    step.is_computed = True
    try:
        if step.known is not None and step.known.is_counted_often and kwargs.get("num_items_in_batch") is not None:
            kwargs = {**kwargs, "num_items_in_batch": kwargs["num_items_in_batch"] / step.micro_batches}
        if divides_itself:
            assert step.known is not None and step.known.window is not None
            step.window, step.here = list(step.known.window(trainer)), None
            step.totals = {} if state.window is None else state.window.totals
            return objective.divided_by_itself(trainer, theirs, step, averaged_losses(trainer), args, kwargs)
        check = None if state.check.is_done else state.check
        with known.tokens_shown(args[0] if args else trainer.model, step.known, _shown_in(step)):
            share = (state.window or Window([])).share_of_items
            return objective.divided(trainer, theirs, step, averaged_losses(trainer), check, share, args, kwargs)
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


def _maybe_log_save_evaluate(self: Any, *args: Any, **kwargs: Any) -> Any:
    metrics = state_of(self).metrics
    if metrics is not None and self.control.should_log and has_steps_to_log(self):
        metrics.collect(self)
    return originals["_maybe_log_save_evaluate"](self, *args, **kwargs)


def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
    metrics = state_of(self).metrics
    if metrics is not None and "loss" in logs:
        logs.update(metrics.to_log)
        metrics.to_log = {}
    return originals["log"](self, logs, *args, **kwargs)


METHODS = {
    "train": train,
    "get_batch_samples": get_batch_samples,
    "_get_num_items_in_batch": _get_num_items_in_batch,
    "training_step": training_step,
    "compute_loss": compute_loss,
    "evaluation_loop": evaluation_loop,
    "_maybe_log_save_evaluate": _maybe_log_save_evaluate,
    "log": log,
}
