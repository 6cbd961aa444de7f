"""Trainer's own compute_loss: the model's loss as a part of the step's, or of the evaluation set's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..._compat import class_of
from .. import counting, hook, losses, objective
from .. import evaluation as evaluations
from .. import step as steps
from ..models import (
    MASKS,
    OURS_TO_KNOW,
    base_model,
    computes_its_loss_alone,
    counted_rule,
    is_sum_over_examples,
    is_transducer,
    names_the_items,
    shifts_labels,
    takes_the_items,
)
from ..ranks import over_ranks, ranks
from ..state import begin, is_covered, state_of
from . import originals


def compute_own_loss(
    self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
) -> Any:
    """A loss of Trainer's compute_loss: its terms are parts of the step's, averaged over the micro-batches."""
    original = originals["compute_loss"]
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
        if num_items_in_batch is not None:  # Trainer multiplies by the ranks itself, or by the replicas of DataParallel
            step.averaged = step.micro_batches / step.num_replicas
        return original(self, model, inputs, return_outputs, num_items_in_batch, **kwargs)

    if step.model is None:
        step.model = base_model(self)
    begin(self, state_of(self), step, inputs)
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
    step.collect()
    loss = _weighed(self, step, loss, is_called=step.calls > calls)
    return (loss, outputs) if return_outputs else loss


def _items_for(trainer: Any, step: steps.Step) -> Any:
    """The items per micro-batch that the model is to be given; None: it takes none, or there are none."""
    if trainer.model_accepts_loss_kwargs:
        return step.items
    if not takes_the_items(class_of(step.model).forward) or not step.window:
        return None
    if step.items is None and step.main is not None:  # Trainer counts none for such a model
        return step.total(step.main) / step.micro_batches
    return step.items


def _weighed(trainer: Any, step: steps.Step, loss: torch.Tensor, is_called: bool) -> torch.Tensor:
    """The loss of a model as a part of the step's."""
    model = step.model
    if not is_called and not class_of(model).__module__.startswith(OURS_TO_KNOW) and not is_transducer(model):
        # a module of somebody's own, and nothing in it was recognised: it may honour the number that it was given
        step.is_known = step.num_items_in_batch is not None and names_the_items(class_of(model).forward)
        return loss
    factor = share(step, is_called)
    if factor is not None:
        return step.record(loss * factor)
    step.is_known = step.is_known or not is_called
    return loss


def _compute_evaluation_loss(
    trainer: Any, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any, **kwargs: Any
) -> Any:
    """A batch outside of a training step: the mean over its items, smoothed as in training."""
    original = originals["compute_loss"]
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
    original = originals["compute_loss"]
    if trainer.compute_loss_func is not None:
        is_ours = getattr(trainer.compute_loss_func, "func", trainer.compute_loss_func) is hook.compute_loss_func
        given = None if is_ours else num_items_in_batch
        return original(trainer, model, inputs, return_outputs, given, **kwargs)
    step.inputs = inputs
    labels = counting.entries_of(inputs).get("labels")
    step.main = counted_rule(trainer, inputs) if isinstance(labels, torch.Tensor) else None
    step.num_items_in_batch = None
    # compiled code makes use of it, and is not observed
    takes_items = trainer.model_accepts_loss_kwargs or takes_the_items(class_of(base_model(trainer)).forward)
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
    step.collect()
    if step.smoothed:
        return loss, outputs
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
    loss = losses.masked_lm_loss if not shifts_labels(base_model(trainer)) else losses.causal_lm_loss
    smoothed = loss(
        logits, labels, None, step.num_items_in_batch, smoother.ignore_index, label_smoothing=smoother.epsilon
    )
    return smoothed, outputs


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
    elif step.num_items_in_batch is not None and not computes_its_loss_alone(class_of(model).forward):
        return None
    return step.share_of_rows()
