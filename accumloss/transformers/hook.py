"""Trainer's own hook, for those who would rather pass a function than register anything."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..keywords import checked
from . import losses


@functools.partial(checked, also=losses.options_named_by("masked_lm"))
def compute_loss_func(
    outputs: Any,
    labels: torch.Tensor | None,
    num_items_in_batch: Any = None,
    *,
    shift: int | None = None,
    **options: Any,
) -> torch.Tensor:
    """The loss of Trainer's ``compute_loss_func``: the cross-entropy of outputs.logits, divided by the items of the step.

    ``Trainer(..., compute_loss_func=accumloss.compute_loss_func)``, or with options
    ``functools.partial(accumloss.compute_loss_func, label_smoothing=0.1)``. One label for each position of the logits;
    a head that has other losses computes them in its forward, and is left to register_with_transformers().

    Args:
        outputs: what the model returned, with ``logits`` (B, T, V) or (B, C).
        labels: (B, T) or (B,), which Trainer takes out of the inputs.
        num_items_in_batch: items of the whole step, from Trainer; None: those of the call.
        shift: 1 where position t predicts label t + 1, else 0. None: 1 for the outputs of a causal language model
            (``...CausalLM...`` in the name of their class).
        **options: of accumloss.masked_lm_loss: ignore_index, label_smoothing, z_loss, softcap, logit_scale, weight, inplace.

    Returns:
        0-dim loss.

    Raises:
        TypeError: an unknown option.
        ValueError: no labels, no logits, or outputs that do not say whether they are shifted.

    Examples:
        >>> hook = functools.partial(accumloss.compute_loss_func, label_smoothing=0.1)
        >>> trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=hook)
    """
    if labels is None:
        raise ValueError(
            "compute_loss_func: expected a batch with labels, got none; heads with other targets (question answering) "
            "compute their loss in forward: use accumloss.register_with_transformers() instead"
        )
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(f"compute_loss_func: expected outputs with logits, got {type(outputs).__name__}")
    if shift is None:
        name = type(outputs).__name__
        if type(outputs) is dict and logits.dim() > 2:
            raise ValueError(
                "compute_loss_func: expected outputs whose class says whether labels are shifted, got a dict; pass shift: "
                "functools.partial(accumloss.compute_loss_func, shift=1)"
            )
        shift = 1 if "CausalLM" in name and logits.dim() > 2 else 0
    loss = losses.causal_lm_loss if shift else losses.masked_lm_loss
    return loss(logits, labels, None, num_items_in_batch, **options)
