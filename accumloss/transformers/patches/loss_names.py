"""Losses that Trainer holds under names of its own, beside LOSS_MAPPING."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import losses
from .. import step as steps
from ..models import trainer_module
from ..registration import Patches
from . import originals


def install_name(patches: Patches) -> None:
    """trainer asks ``LOSS_MAPPING.get(...) is ForCausalLMLoss``, by a name of its own."""
    module = trainer_module()
    if hasattr(module, "ForCausalLMLoss"):
        patches.bind(module, "ForCausalLMLoss", losses.causal_lm_loss)


def install_smoother(patches: Patches) -> None:
    """Trainer's label smoother, for those who call it in a compute_loss of their own."""
    from transformers.trainer_pt_utils import LabelSmoother

    if not patches:
        originals["label_smoother"] = LabelSmoother.__call__
        patches.bind(LabelSmoother, "__call__", _smooth)


def _smooth(
    self: Any, model_output: Any, labels: torch.Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
) -> torch.Tensor:
    """LabelSmoother.__call__: a mean over the labels, which in a step are those of all its micro-batches."""
    logits = model_output["logits"] if isinstance(model_output, Mapping) else model_output[0]
    if not steps.is_counted() or labels.dim() != logits.dim() - 1:
        given = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return originals["label_smoother"](self, model_output, labels, shift_labels, **given)
    loss = losses.causal_lm_loss if shift_labels else losses.masked_lm_loss
    return loss(logits, labels, None, num_items_in_batch, self.ignore_index, label_smoothing=self.epsilon)
