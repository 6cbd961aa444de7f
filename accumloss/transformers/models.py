"""What a model is and does: which of its labels are targets, whether it honours num_items_in_batch, who computes its loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._compat import class_of, uncompiled
from . import counting, losses, mapping

OURS_TO_KNOW = ("transformers.", "transformers_modules.")


def base_model(trainer: Any) -> Any:
    """The transformers model inside of what torch.compile and PEFT have wrapped."""
    return unwrapped(trainer.model)


def unwrapped(model: Any) -> Any:
    """The model inside of what torch.compile and PEFT have wrapped."""
    model = uncompiled(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def is_overridden(trainer: Any, name: str) -> bool:
    """Whether a method of a Trainer is somebody's own."""
    return getattr(type(trainer), name) is not getattr(trainer_module().Trainer, name)


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


def counted_rule(trainer: Any, batch: Mapping[str, Any]) -> counting.Rule:
    """counted_labels, as a rule."""
    if "shift_labels" in batch:
        return counting.Rule("shift_labels")
    return counting.Rule("labels", int(shifts_labels(base_model(trainer))))


MASKS = ("bool_masked_pos", "future_observed_mask")  # entries whose ones a head averages over by itself


def is_transducer(model: Any) -> bool:
    """Whether the loss is over examples: CTC and its kin."""
    name = class_of(model).__name__
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


REMEDIES = {
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
    for library in REMEDIES:
        if any(place and place.split(".")[0] == library for place in places):  # None: of code that has no module
            return library
    return "liger_kernel" if getattr(trainer.args, "use_liger_kernel", False) else None


def trainer_module() -> Any:
    try:
        import transformers.trainer
    except ImportError as error:
        raise RuntimeError(
            f"register_with_transformers: expected transformers.trainer to import, got: {error}; pip install accelerate"
        ) from error
    return transformers.trainer
