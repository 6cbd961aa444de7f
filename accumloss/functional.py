"""Accumulation-aware losses over the ops, with the signatures that transformers calls its losses by.

All of them return ``sum of the item losses / num_items_in_batch``, where ``num_items_in_batch`` is the number of items
of the **whole optimizer step**. Summed over the micro-batches of a step, gradients and losses are then those of the one
batch that holds them all. Without ``num_items_in_batch`` the divisor is the number of items of the call: its mean.
A call, or a step, without a single item has loss 0 and gradient 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from . import checks, linear, ops
from .options import LossOptions
from .sums import TokenSums


class Observer(Protocol):
    """Gets to see each loss that is divided, and what takes its place is what it returns."""

    metrics: bool  # whether to compute the metrics of TokenSums

    def __call__(self, loss: torch.Tensor, sums: TokenSums | None) -> torch.Tensor:
        """loss (), divided; sums, with metrics, where they are wanted and the loss is a cross-entropy."""


class Divisor(NamedTuple):
    """What a sum is divided by, where the gradient that will come back to the quotient is known as well.

    Trainer averages the losses of k micro-batches, so that 1/k comes back to each. A gradient that is written in forward
    is written for that factor, and need not be visited again.
    """

    value: torch.Tensor  # () > 0, on any device
    expected_grad: float = 1.0
    observer: Observer | None = None  # sees the quotient

    def observed(self, loss: torch.Tensor, sums: TokenSums | None = None) -> torch.Tensor:
        """The loss, or what the observer puts in its place."""
        return loss if self.observer is None else self.observer(loss, sums)


NumItems = int | float | torch.Tensor | Divisor | None
InPlace = Literal[False, "backward", "forward"]

# dtypes whose gradient may be written before the incoming gradient is known; see ops.GradInForward
_GRAD_IN_FORWARD_DTYPES = (torch.bfloat16, torch.float32)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    shift: int = 0,
    metrics: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> TokenSums:
    """Sum of the cross-entropies and count of the items, in one pass over the logits.

    Equivalent to, without the copies::

        F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum"), (labels != -100).sum()

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, of any strides; copied only where V is not contiguous.
        labels: (...) int64 or int32, class indices or ignore_index.
        weight: (V,) class weights of any floating dtype, or None.
        shift: row (..., t) reads label (..., t + shift); 1 for causal language models, whose labels are not shifted.
        metrics: also count the correct top-1 predictions and sum the entropies, from the same pass.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.

    Returns:
        TokenSums; ``loss_sum`` carries the gradient.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a label outside [0, V) that is not ignore_index. On CUDA the row's loss is NaN and its gradient zero,
            and the error is raised by the next call, or by check().

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> sums = cross_entropy(logits, torch.tensor([0, 1, -100]), metrics=True)
        >>> sums.num_items.item(), round(sums.loss_sum.item(), 4), sums.accuracy.item()
        (2, 0.4402, 1.0)
    """
    _refuse_functorch("cross_entropy", logits, labels, weight)
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    outputs = ops.cross_entropy(logits, labels, weight, shift=shift, metrics=metrics, **options.as_kwargs())
    loss_sum, num_items, total_weight, _, num_correct, entropy_sum, _ = outputs
    if not metrics:
        return TokenSums(loss_sum, num_items, total_weight)
    return TokenSums(loss_sum, num_items, total_weight, num_correct, entropy_sum)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Loss of a causal language model: position t predicts label t + 1; the shift is index arithmetic, not a copy.

    Equivalent to transformers' ``ForCausalLMLoss``, whose signature it has, at any accumulation depth.

    Args:
        logits: (B, T, V) bf16, fp16, fp32 or fp64.
        labels: (B, T) int64 or int32, not shifted; the first of a row is never a target. Unused with shift_labels.
        vocab_size: V, for the signature; an error where logits have another.
        num_items_in_batch: items of the whole optimizer step: int, or tensor of any device and of shape () or (n, 1).
            None: the items of this call.
        ignore_index: labels that count nothing.
        shift_labels: (B, T) labels that are shifted already, as sequence-parallel training passes them; they win.
        weight: (V,) class weights. Without num_items_in_batch the divisor is then the items' total weight.
        label_smoothing, z_loss, softcap, logit_scale: see LossOptions.
        inplace: "backward" or "forward" writes the gradient over the logits, which saves a buffer of their size: in
            backward, or at once together with the loss (num_items_in_batch must then be given, and the logits are gone
            after the call). Whatever else saved the logits for its own backward raises.
        **kwargs: whatever else a model passes; ignored.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, RuntimeError, IndexError: as cross_entropy, and where num_items_in_batch or inplace do not fit.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check_vocab_size("causal_lm_loss", logits, vocab_size)
    if shift_labels is not None:
        return _mean_loss("causal_lm_loss", logits, shift_labels, weight, options, 0, num_items_in_batch, inplace)
    if labels is None:
        raise ValueError("causal_lm_loss: expected labels (B, T) or shift_labels (B, T), got neither")
    return _mean_loss("causal_lm_loss", logits, labels, weight, options, 1, num_items_in_batch, inplace)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    shift: int = 0,
    metrics: bool = False,
    num_valid: int | None = None,
    max_scratch_bytes: int = linear.MAX_SCRATCH_BYTES,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> TokenSums:
    """cross_entropy of ``F.linear(hidden, weight, bias)``, chunk by chunk: the logits never exist as a whole.

    The gradients are made in forward, each matrix product once; ``linear_plan`` shows the chunks. Hidden states of rows
    that count nothing take no part in the products. A weight, bias or hidden that needs no gradient costs none. Under
    autocast the inputs are cast as F.linear casts them.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or fp64.
        weight: (V, H) of hidden's dtype: the head's, tied to the embedding or not.
        labels: (...) int64 or int32, class indices or ignore_index.
        bias: (V,) of hidden's dtype, or None.
        class_weight: (V,) class weights of any floating dtype, or None.
        shift: row (..., t) reads label (..., t + shift).
        metrics: also count the correct top-1 predictions and sum the entropies.
        num_valid: how many labels count, after the shift, or more: on CUDA, where they are not counted since that would
            wait for the GPU, rows that do not count are then dropped too. Fewer than there are: an error, on CUDA a loss
            of NaN.
        max_scratch_bytes: memory beside inputs and gradients, a 64th of it for the matrix products' own; default 256 MiB.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.

    Returns:
        TokenSums; ``loss_sum`` carries the gradient.

    Raises:
        ValueError, RuntimeError, IndexError: as cross_entropy.

    Example:
        >>> hidden, head = torch.eye(3), torch.tensor([[2.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
        >>> sums = linear_cross_entropy(hidden, head, torch.tensor([0, 1, -100]), metrics=True)
        >>> sums.num_items.item(), round(sums.loss_sum.item(), 4), sums.accuracy.item()
        (2, 0.4402, 1.0)
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    loss_sum, sums = _linear(
        "linear_cross_entropy", hidden, weight, labels, bias, class_weight, options, shift, metrics, None, num_valid,
        max_scratch_bytes,
    )  # fmt: skip
    return replace(sums, loss_sum=loss_sum)


def linear_causal_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    num_valid: int | None = None,
    max_scratch_bytes: int = linear.MAX_SCRATCH_BYTES,
    **kwargs: Any,
) -> torch.Tensor:
    """causal_lm_loss of ``F.linear(hidden, weight, bias)``, without ever holding the logits; see linear_cross_entropy.

    Args:
        hidden: (B, T, H) bf16, fp16, fp32 or fp64.
        weight: (V, H) of the head.
        labels: (B, T) int64 or int32, not shifted. Unused with shift_labels.
        num_items_in_batch: items of the whole optimizer step; see causal_lm_loss.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.
        shift_labels: (B, T) labels that are shifted already; they win.
        bias, class_weight: (V,) or None.
        num_valid, max_scratch_bytes: see linear_cross_entropy.
        **kwargs: whatever else a model passes; ignored.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 hidden states).
    """
    if labels is None and shift_labels is None:
        raise ValueError("linear_causal_lm_loss: expected labels (B, T) or shift_labels (B, T), got neither")
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    targets, shift = (shift_labels, 0) if shift_labels is not None else (labels, 1)
    assert targets is not None
    given, _, metrics = _given(num_items_in_batch)
    divisor = num_items_in_batch
    if divisor is None and class_weight is None and targets.dim() > 0:
        # counted before, on the device: the gradients are then written for it, and not visited again
        divisor = (targets[..., shift:] != ignore_index).count_nonzero()
    loss, sums = _linear(
        "linear_causal_lm_loss", hidden, weight, targets, bias, class_weight, options, shift, metrics, divisor, num_valid,
        max_scratch_bytes,
    )  # fmt: skip
    if divisor is None:
        loss = loss / ops.mean_divisor(sums.num_items, sums.total_weight, class_weight, loss.dtype)
    return loss if given is None else given.observed(loss, sums if metrics else None)


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Loss of a masked language model, and of any head with one label for each position; nothing is shifted.

    Equivalent to transformers' ``ForMaskedLMLoss``, whose signature it has.

    Args:
        logits: (..., V).
        labels: (...) int64 or int32.
        vocab_size, num_items_in_batch, ignore_index, weight, label_smoothing, z_loss, softcap, logit_scale, inplace:
            as causal_lm_loss.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    _check_vocab_size("masked_lm_loss", logits, vocab_size)
    return _mean_loss("masked_lm_loss", logits, labels, weight, options, 0, num_items_in_batch, inplace)


def token_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: Any = None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    inplace: InPlace = False,
    **kwargs: Any,
) -> torch.Tensor:
    """Loss of a token classification head. Equivalent to transformers' ``ForTokenClassification``.

    Args:
        logits: (B, T, C).
        labels: (B, T) int64 or int32.
        config: with ``num_labels`` = C; an error where logits have another. None: not checked.
        num_items_in_batch, ignore_index, weight, label_smoothing, inplace: as causal_lm_loss; items are tokens.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).
    """
    options = LossOptions(ignore_index=ignore_index, label_smoothing=label_smoothing)
    _check_vocab_size("token_classification_loss", logits, getattr(config, "num_labels", None), "config.num_labels")
    return _mean_loss("token_classification_loss", logits, labels, weight, options, 0, num_items_in_batch, inplace)


def sequence_classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config: Any,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Loss of a sequence classification head. Equivalent to transformers' ``ForSequenceClassificationLoss``.

    ``config.problem_type`` decides, and where it is None is set as transformers sets it (pipelines read it later):

    ============================  ==============================================  =====================
    problem_type                  loss                                            an item is
    ============================  ==============================================  =====================
    regression                    squared error                                   an element of labels
    single_label_classification   cross-entropy                                   an example
    multi_label_classification    binary cross-entropy of pooled_logits (B, C)    an element of labels
    ============================  ==============================================  =====================

    Args:
        labels: (B,) class indices, (B,) or (B, C) values for regression, (B, C) of 0 and 1 for multi label.
        pooled_logits: (B, C).
        config: with ``num_labels`` and ``problem_type``.
        num_items_in_batch: items of the whole optimizer step in the unit above; see causal_lm_loss.
        ignore_index, label_smoothing: single label only.
        weight: (C,) class weights; not for regression.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).
    """
    name = "sequence_classification_loss"
    num_labels = config.num_labels
    set_problem_type(config, labels)
    labels = labels.to(pooled_logits.device)

    if config.problem_type == "single_label_classification":
        options = LossOptions(ignore_index=ignore_index, label_smoothing=label_smoothing)
        logits = pooled_logits.reshape(-1, num_labels)
        return _mean_loss(name, logits, labels.reshape(-1), weight, options, 0, num_items_in_batch, False)

    acc = ops.accumulation_dtype(pooled_logits)
    logits, targets = pooled_logits.to(acc), labels.to(acc)
    if config.problem_type == "regression":
        if weight is not None:
            raise ValueError(f"{name}: expected no class weights for regression, got {tuple(weight.shape)}")
        if num_labels == 1:
            logits, targets = logits.flatten(), targets.flatten()
        _check_same_shape(name, logits, targets)
        loss_sum = F.mse_loss(logits, targets, reduction="sum")
    elif config.problem_type == "multi_label_classification":
        _check_same_shape(name, logits, targets)
        weight = weight if weight is None else weight.to(logits.device, acc)
        loss_sum = F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="sum")
    else:
        raise ValueError(
            f"{name}: expected config.problem_type regression, single_label_classification or "
            f"multi_label_classification, got {config.problem_type!r}"
        )
    divisor = _divisor(name, num_items_in_batch, loss_sum)
    loss = loss_sum / (max(targets.numel(), 1) if divisor is None else divisor)
    return num_items_in_batch.observed(loss) if isinstance(num_items_in_batch, Divisor) else loss


def set_problem_type(config: Any, labels: torch.Tensor) -> None:
    """Sets ``config.problem_type`` as transformers does where it is None."""
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"


def question_answering_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor | None,
    end_positions: torch.Tensor | None,
    num_items_in_batch: NumItems | tuple[NumItems, NumItems] = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Loss of an extractive question answering head, the mean of its two ends. ``ForQuestionAnsweringLoss``.

    Args:
        start_logits, end_logits: (B, T).
        start_positions, end_positions: (B,) or (B, 1) int64 or int32; those beyond the sequence are ignored, negative
            ones count as 0. None for either: no loss.
        num_items_in_batch: examples of the whole optimizer step, for both ends, or a pair of one for each. None: each
            end is divided by its own items.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits), or None.
    """
    if start_positions is None or end_positions is None:
        return None
    ignore_index = start_logits.shape[1]
    options = LossOptions(ignore_index=ignore_index)
    if isinstance(num_items_in_batch, tuple) and not isinstance(num_items_in_batch, Divisor):
        start_items, end_items = num_items_in_batch
    else:
        start_items = end_items = num_items_in_batch

    def one(logits: torch.Tensor, positions: torch.Tensor, count: NumItems) -> torch.Tensor:
        labels = positions.reshape(positions.shape[0]).to(logits.device).clamp(0, ignore_index)
        return _mean_loss("question_answering_loss", logits, labels, None, options, 0, count, False)

    return (one(start_logits, start_positions, start_items) + one(end_logits, end_positions, end_items)) / 2


def semantic_segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    num_items_in_batch: NumItems = None,
    auxiliary_logits: torch.Tensor | None = None,
    auxiliary_loss_weight: float = 0.4,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> torch.Tensor:
    """Loss of a semantic segmentation head. Equivalent to transformers' ``ForSemanticSegmentationLoss``.

    The logits are enlarged to the size of the labels, bilinearly, with the classes innermost: the kernel then reads them
    where they lie, and no permuted copy of the enlarged logits is made.

    Args:
        logits: (B, C, h, w).
        labels: (B, H, W) int64 or int32.
        ignore_index: of pixels that count nothing.
        num_items_in_batch: pixels that count, of the whole optimizer step; see causal_lm_loss.
        auxiliary_logits: (B, C, h', w') of a second head on the same labels, or None.
        auxiliary_loss_weight: factor of the second head's loss.
        weight, label_smoothing: as causal_lm_loss.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).
    """
    options = LossOptions(ignore_index=ignore_index, label_smoothing=label_smoothing)

    def one(head: torch.Tensor) -> torch.Tensor:
        inner = head.contiguous(memory_format=torch.channels_last)  # small: before it is enlarged
        enlarged = F.interpolate(inner, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        by_pixel = enlarged.permute(0, 2, 3, 1)  # (B, H, W, C)
        return _mean_loss("semantic_segmentation_loss", by_pixel, labels, weight, options, 0, num_items_in_batch, False)

    loss = one(logits)
    return loss if auxiliary_logits is None else loss + auxiliary_loss_weight * one(auxiliary_logits)


def _mean_loss(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    options: LossOptions,
    shift: int,
    num_items_in_batch: NumItems,
    inplace: InPlace,
) -> torch.Tensor:
    """The one way from logits to a loss: sum, divided once."""
    if inplace not in (False, "backward", "forward"):
        raise ValueError(f'{name}: expected False, "backward" or "forward" for inplace, got {inplace!r}')
    _refuse_functorch(name, logits, labels, weight, num_items_in_batch)
    if labels.device != logits.device:
        labels = labels.to(logits.device, non_blocking=True)
    if weight is not None and weight.device != logits.device:
        weight = weight.to(logits.device, non_blocking=True)
    if shift == 0 and labels.shape != logits.shape[:-1] and labels.numel() * logits.shape[-1] == logits.numel():
        logits, labels = logits.flatten(0, -2), labels.flatten()  # one of them came flattened

    divisor = _divisor(name, num_items_in_batch, logits)
    given, expected_grad, metrics = _given(num_items_in_batch)
    kwargs = {"shift": shift, "metrics": metrics, **options.as_kwargs()}
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    # The compiler takes the op with its formula; so do second derivatives, which fp64 is for.
    in_forward = wants_grad and divisor is not None and logits.dtype in _GRAD_IN_FORWARD_DTYPES
    if inplace and wants_grad:
        loss, *fields = _in_place(name, logits, labels, weight, divisor, expected_grad, kwargs, inplace)
    elif in_forward and not torch.compiler.is_compiling():
        loss, *fields = ops.GradInForward.apply(logits, labels, weight, divisor, expected_grad, kwargs)
    else:
        loss_sum, num_items, total_weight, _, num_correct, entropy_sum, _ = ops.cross_entropy(
            logits, labels, weight, **kwargs
        )
        if divisor is None:
            divisor = ops.mean_divisor(num_items, total_weight, weight, loss_sum.dtype)
        loss, fields = loss_sum / divisor, [loss_sum, num_items, total_weight, num_correct, entropy_sum]
    return loss if given is None else given.observed(loss, TokenSums(*fields) if metrics else None)


def _linear(
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    options: LossOptions,
    shift: int,
    metrics: bool,
    num_items_in_batch: NumItems,
    num_valid: int | None,
    max_scratch_bytes: int,
) -> tuple[torch.Tensor, TokenSums]:
    """loss_sum divided by num_items_in_batch (None: not divided), which carries the gradient, and the sums."""
    _refuse_functorch(name, hidden, weight, labels, bias, class_weight, num_items_in_batch)
    labels = labels.to(hidden.device, non_blocking=True)
    class_weight = class_weight if class_weight is None else class_weight.to(hidden.device, non_blocking=True)
    divisor = _divisor(name, num_items_in_batch, hidden)
    kwargs: dict[str, Any] = {"shift": shift, "metrics": metrics, **options.as_kwargs()}
    if torch.compiler.is_compiling():
        kwargs.update(num_valid=num_valid, max_scratch_bytes=max_scratch_bytes)
        sums = list(linear.linear_cross_entropy(hidden, weight, labels, bias, class_weight, **kwargs))
        loss = sums[0] if divisor is None else sums[0] / divisor
    else:
        hidden, weight, bias = linear.autocast(hidden, weight, bias)
        if divisor is None:
            divisor = torch.ones((), dtype=ops.accumulation_dtype(hidden), device=hidden.device)
        _, expected_grad, _ = _given(num_items_in_batch)
        needs = linear.needs_of(hidden, weight, bias)
        limits = (num_valid, max_scratch_bytes)
        loss, *sums = linear.LinearGradInForward.apply(
            hidden, weight, labels, bias, class_weight, divisor, expected_grad, needs, kwargs, limits
        )
    return loss, TokenSums(*sums) if metrics else TokenSums(*sums[:3])


def _in_place(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    divisor: torch.Tensor | None,
    expected_grad: float,
    kwargs: dict[str, Any],
    inplace: InPlace,
) -> tuple[torch.Tensor, ...]:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: expected inplace=False under torch.compile, got {inplace!r}")
    if logits.is_leaf:
        raise ValueError(
            f"{name}: expected logits that a model computed where inplace={inplace!r}, got a leaf that requires grad; "
            "its values would be lost"
        )
    if inplace == "backward":
        return ops.InPlaceBackward.apply(logits, labels, weight, divisor, kwargs)
    if divisor is None:
        raise ValueError(
            f'{name}: expected num_items_in_batch where inplace="forward", got None; the gradient is written before '
            'the items of the call are counted; give it, or use inplace="backward"'
        )
    if logits.dtype == torch.float16:
        raise ValueError(
            f'{name}: expected bfloat16, float32 or float64 logits where inplace="forward", got float16, in which a '
            'gradient divided by the number of items underflows; use inplace="backward"'
        )
    return ops.InPlaceForward.apply(logits, labels, weight, divisor, expected_grad, kwargs)


def _given(num_items_in_batch: NumItems) -> tuple[Divisor | None, float, bool]:
    """The Divisor, where it is one; the gradient that will come back to the loss; whether metrics are wanted."""
    if not isinstance(num_items_in_batch, Divisor):
        return None, 1.0, False
    observer = num_items_in_batch.observer
    return num_items_in_batch, num_items_in_batch.expected_grad, observer is not None and observer.metrics


def _divisor(name: str, num_items_in_batch: NumItems, like: torch.Tensor) -> torch.Tensor | None:
    """num_items_in_batch as a 0-dim tensor > 0 on the device of ``like``, without a sync; 1 for 0, None for None."""
    if num_items_in_batch is None:
        return None
    acc = ops.accumulation_dtype(like)
    if isinstance(num_items_in_batch, Divisor):
        return num_items_in_batch.value.to(like.device, acc, non_blocking=True)
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() == 0:
            raise ValueError(f"{name}: expected num_items_in_batch of shape () or (n, 1), got an empty tensor")
        first = (
            num_items_in_batch.detach() if num_items_in_batch.dim() == 0 else num_items_in_batch.detach().flatten()[0]
        )
        first = first.to(like.device, acc, non_blocking=True)
        # not clamp(min=1): what is passed may be the items of a step for each of its micro-batches, a fraction
        return torch.where(first > 0, first, torch.ones_like(first))
    is_number = isinstance(num_items_in_batch, (int, float)) and not isinstance(num_items_in_batch, bool)
    if not is_number or not 0 <= num_items_in_batch < float("inf"):
        raise ValueError(f"{name}: expected num_items_in_batch >= 0, got {num_items_in_batch!r}")
    return torch.full((), num_items_in_batch if num_items_in_batch > 0 else 1, dtype=acc, device=like.device)


def _refuse_functorch(name: str, *tensors: Any) -> None:
    checks.refuse_forward_ad(name, *tensors)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: expected no torch.func transform (grad, vjp, vmap, ...) around it, got one; "
            "use torch.autograd.grad, which also gives second derivatives"
        )


def _check_vocab_size(name: str, logits: torch.Tensor, size: int | None, source: str = "vocab_size") -> None:
    if size is not None and logits.shape[-1] != size:
        raise ValueError(f"{name}: expected logits of shape (..., {source} = {size}), got {tuple(logits.shape)}")


def _check_same_shape(name: str, logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.shape != labels.shape:
        raise ValueError(f"{name}: expected labels of shape {tuple(logits.shape)}, got {tuple(labels.shape)}")
