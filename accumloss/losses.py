"""Accumulation-aware losses over the ops, with the signatures that transformers calls its losses by.

All of them return ``sum of the item losses / num_items_in_batch``, where ``num_items_in_batch`` is the number of items
of the **whole optimizer step**. Summed over the micro-batches of a step, gradients and losses are then those of the one
batch that holds them all. Without ``num_items_in_batch`` the divisor is the number of items of the call: its mean.
A call, or a step, without a single item has loss 0 and gradient 0.
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import checks, inside, linear, ops, parallel, reference
from .arguments import (
    NumItems,
    check_class_weight,
    check_in_place,
    check_shift,
    check_tensors,
    check_vocab_size,
    divisor_of,
    like_rows,
    of_op,
    refuse_functorch,
)
from .keywords import checked, checked_loss
from .options import LossOptions, options_of
from .sums import TokenSums, at_least_one, widened
from .weighting import check_token_weight, refuse_token_weight, shifted, soft_sums, sums_of, weighted_sums, z_loss_of


class Known(NamedTuple):
    """A divisor, where the gradient that will come back to the quotient is known as well: for the integrations.

    Trainer averages the losses of k micro-batches, so that 1/k comes back to each. A gradient that is written in forward
    is written for that factor, and need not be visited again.
    """

    divisor: torch.Tensor  # () > 0, on any device
    expected_grad: float = 1.0
    metrics: bool = False  # whether the sums are to have theirs


class Divided(NamedTuple):
    """A loss, and the sums that it was made of."""

    loss: torch.Tensor  # ()
    sums: TokenSums | None = None  # where their metrics were asked for, of a cross-entropy

    def whole(self) -> Divided:
        """The same over all rows as plain tensors, where the logits were a DTensor."""
        if not parallel.is_dtensor(self.loss):
            return self
        sums = self.sums
        if sums is not None:
            of_rows: Any = ((field.name, getattr(sums, field.name)) for field in fields(TokenSums))
            sums = replace(sums, **{name: value.full_tensor() for name, value in of_rows if value is not None})
        return Divided(self.loss.full_tensor(), sums)


InPlace = Literal[False, "backward", "forward"]

# dtypes whose gradient may be written before the incoming gradient is known; see ops.GradInForward
_GRAD_IN_FORWARD_DTYPES = (torch.bfloat16, torch.float32)


@checked
def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    shift: int = 0,
    metrics: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> TokenSums:
    """Sum of the cross-entropies and count of the items, in one pass over the logits.

    Equivalent to, without the copies:

        F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum"), (labels != -100).sum()

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, of any strides; copied only where V is not contiguous.
        labels: (...) int64 or int32, class indices or ignore_index; or (..., V) of logits' dtype, the probabilities of the
            classes, as in F.cross_entropy: every row then counts, and shift, metrics and group have no meaning.
        weight: (V,) class weights of any floating dtype, or None.
        token_weight: (...) a weight for each label, of any floating dtype: loss_sum and total_weight are weighted by it, and
            carry its gradient; counts and entropies are not. None: 1. Not with a group.
        shift: row (..., t) reads label (..., t + shift), and its weight; 1 for causal language models, whose labels are not shifted.
        metrics: also count the correct top-1 predictions and sum the entropies, from the same pass.
        group: the processes that share the vocabulary. logits (..., V / processes) are then the classes of this one, cut
            as torch.chunk cuts; labels and weight are of the whole vocabulary, the same in all of them, and so is what is
            returned. Backward communicates nothing; docs/vocabulary-parallel.md. logits that are a DTensor need none.
        vocab_size: V; with a group that of the whole vocabulary, needed where the shares are not of one size.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.

    Returns:
        TokenSums; ``loss_sum`` carries the gradient. DTensors where the logits are one: Partial over what shares the rows
        out, else replicated.

    Raises:
        TypeError: an unknown keyword.
        ValueError: an option is out of range, of LossOptions or of the dtype that the loss is computed in.
        RuntimeError: shapes, dtypes or devices do not fit.
        IndexError: a label outside [0, V) that is not ignore_index. On CUDA the row's loss is NaN and its gradient zero,
            and the error is raised by the next call, or by check().

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> sums = cross_entropy(logits, torch.tensor([0, 1, -100]), metrics=True)
        >>> sums.num_items.item(), round(sums.loss_sum.item(), 4), sums.accuracy.item()
        (2, 0.4402, 1.0)
    """
    refuse_functorch("cross_entropy", logits, labels, weight)
    check_tensors("cross_entropy", ("logits (..., V)", logits), ("labels (...)", labels))
    check_shift("cross_entropy", shift)
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    options.check("cross_entropy", ops.accumulation_dtype(logits))
    if labels.is_floating_point():
        is_dtensor = parallel.is_dtensor(logits) or parallel.is_dtensor(labels)
        given = {
            "shift": shift, "metrics": metrics, "group": group, "vocab_size": vocab_size, "DTensor": is_dtensor,
        }  # fmt: skip
        return soft_sums("cross_entropy", logits, labels, weight, token_weight, options, given)
    sums = _sums(logits, labels, weight, token_weight, shift, metrics, (group, vocab_size), options)
    return inside.seen("cross_entropy", sums, labels, shift, ignore_index, weight)


def _sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    shift: int,
    metrics: bool,
    shared: tuple[dist.ProcessGroup | None, int | None],  # group, vocab_size
    options: LossOptions,
) -> TokenSums:
    group, vocab_size = shared
    if parallel.is_parallel(logits, labels, group):
        if token_weight is not None and group is None:
            refuse_token_weight("cross_entropy", token_weight, "beside DTensors")
        return _parallel_sums("cross_entropy", logits, labels, weight, shift, options, metrics, shared, token_weight)
    check_vocab_size("cross_entropy", logits, vocab_size)
    check_class_weight("cross_entropy", "weight", weight, logits.shape[-1:])
    if token_weight is not None:
        check_token_weight("cross_entropy", token_weight, labels)
        return weighted_sums("cross_entropy", logits, labels, token_weight, weight, shift, options, metrics)
    outputs = ops.cross_entropy(logits, labels, weight, **of_op(options, shift, metrics))
    loss_sum, num_items, total_weight, lse, num_correct, entropy_sum, _ = outputs
    z_loss_sum = z_loss_of(lse, None, options, loss_sum.dtype)
    if not metrics:
        return TokenSums(loss_sum, num_items, total_weight, z_loss_sum=z_loss_sum)
    return TokenSums(loss_sum, num_items, total_weight, num_correct, entropy_sum, z_loss_sum)


@checked_loss
def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Loss of a causal language model: position t predicts label t + 1; the shift is index arithmetic, not a copy.

    Equivalent to transformers' ``ForCausalLMLoss``, whose signature it has, at any accumulation depth.

    Args:
        logits: (B, T, V) bf16, fp16, fp32 or fp64.
        labels: (B, T) int64 or int32, not shifted; the first of a row is never a target. Unused with shift_labels.
        vocab_size: V, an error where logits have another; with group= that of the whole vocabulary.
        num_items_in_batch: items of the whole optimizer step: int, or tensor of any device and of shape () or (n, 1).
            0 counts as 1, a fraction is legal. None: the items of this call. A tensor is not looked at: where it is NaN,
            negative or infinite, so that a number would be refused, loss and gradient are NaN.
        ignore_index: labels that count nothing.
        shift_labels: (B, T) labels that are shifted already, as sequence-parallel training passes them; they win.
        weight: (V,) class weights. Without num_items_in_batch the divisor is then the items' total weight.
        token_weight: (B, T) a weight for each label, as in cross_entropy; shifted with them, or as shift_labels are. Without
            num_items_in_batch the divisor is then the items' total weight, whose gradient it has too. Not with a group.
        label_smoothing, z_loss, softcap, logit_scale: see LossOptions.
        inplace: "backward" or "forward" writes the gradient over the logits, which saves a buffer of their size: in
            backward, or at once together with the loss (num_items_in_batch must then be given, and the logits are gone
            after the call). Whatever else saved the logits for its own backward raises.
        group: the processes that share the vocabulary, of which logits (B, T, V / processes) are this one's classes, as in
            cross_entropy. logits may be a DTensor instead.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits); a DTensor where logits are one.

    Raises:
        TypeError: an unknown keyword, but for those that models of transformers pass along (accumloss/keywords.py).
        ValueError, RuntimeError, IndexError: as cross_entropy, and where num_items_in_batch or inplace do not fit.

    Examples:
        >>> logits = torch.zeros(2, 3, 5)
        >>> labels = torch.tensor([[0, 1, 2], [3, 4, -100]])  # 3 items: the first of a row is none
        >>> loss = accumloss.causal_lm_loss(logits, labels, num_items_in_batch=6)  # half of the step's items
        >>> round(loss.item(), 4) == round(math.log(5) * 3 / 6, 4)
        True
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return causal_lm(
        logits, labels, vocab_size, shift_labels, num_items_in_batch, options, weight, inplace, group, token_weight
    ).loss


def causal_lm(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None,
    shift_labels: torch.Tensor | None,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None = None,
    inplace: InPlace = False,
    group: dist.ProcessGroup | None = None,
    token_weight: torch.Tensor | None = None,
) -> Divided:
    """causal_lm_loss, for a divisor of any kind."""
    targets, shift = (labels, 1) if shift_labels is None else (shift_labels, 0)
    if targets is None:
        raise ValueError("causal_lm_loss: expected labels (B, T) or shift_labels (B, T), got neither")
    check_tensors("causal_lm_loss", ("logits (B, T, V)", logits), ("labels (B, T)", targets))
    return _mean_loss(
        "causal_lm_loss", logits, targets, shift, given, options, weight, inplace, group, vocab_size, token_weight
    )


@checked
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    shift: int = 0,
    metrics: bool = False,
    num_valid: int | linear.ValidCount | None = None,
    max_scratch_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden_grad: bool = True,
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
        token_weight: (...) a weight for each label, as in cross_entropy. The gradients are then made in backward, by one
            product more. Not with a group, num_valid or torch.compile.
        shift: row (..., t) reads label (..., t + shift).
        metrics: also count the correct top-1 predictions and sum the entropies.
        num_valid: how many labels count, after the shift, or more; or what count_valid returned for them. On CUDA, where
            they are not counted since that would wait for the GPU, rows that do not count are then dropped too. Fewer than
            there are: an error, on CUDA a loss of NaN.
        max_scratch_bytes: memory beside inputs and gradients. None: 256 MiB, a 64th of it for the matrix products' own; on
            CUDA what 4096 rows or 1 GiB hold, at most half of what is free; see linear_plan.
        group: the processes that share the vocabulary: weight (V / processes, H) and bias are of the classes of this one, as
            in cross_entropy; hidden, labels and class_weight are the same in all of them. hidden and weight that are
            DTensors need none; docs/vocabulary-parallel.md.
        vocab_size: V of the whole vocabulary, needed with a group where its shares are not of one size.
        reduce_hidden_grad: with a group, whether the gradient of hidden is summed over its processes, by one all_reduce in
            backward. False leaves each its part, for a gather of hidden states whose backward sums them up.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.

    Returns:
        TokenSums; ``loss_sum`` carries the gradient.

    Raises:
        ValueError, RuntimeError, IndexError: as cross_entropy.

    Examples:
        >>> hidden, head = torch.eye(3), torch.tensor([[2.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
        >>> sums = linear_cross_entropy(hidden, head, torch.tensor([0, 1, -100]), metrics=True)
        >>> sums.num_items.item(), round(sums.loss_sum.item(), 4), sums.accuracy.item()
        (2, 0.4402, 1.0)
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    shared = _Shared(group, vocab_size, reduce_hidden_grad)
    if token_weight is not None:
        return _weighted_linear(
            "linear_cross_entropy", hidden, weight, labels, bias, class_weight, token_weight, options, shift, metrics,
            num_valid, max_scratch_bytes, shared,
        )  # fmt: skip
    loss_sum, sums = _linear(
        "linear_cross_entropy", hidden, weight, labels, bias, class_weight, options, shift, metrics, None, num_valid,
        max_scratch_bytes, shared,
    )  # fmt: skip
    return inside.seen(
        "linear_cross_entropy", replace(sums, loss_sum=loss_sum), labels, shift, ignore_index, class_weight
    )


@functools.partial(checked_loss, is_made=False)
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
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    num_valid: int | linear.ValidCount | None = None,
    max_scratch_bytes: int | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden_grad: bool = True,
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
        token_weight: (B, T) a weight for each label, as in linear_cross_entropy.
        num_valid, max_scratch_bytes, group, vocab_size, reduce_hidden_grad: see linear_cross_entropy.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 hidden states); a DTensor where hidden is one.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as causal_lm_loss.

    Examples:
        >>> hidden, head = torch.randn(2, 3, 4), torch.zeros(5, 4)
        >>> loss = accumloss.linear_causal_lm_loss(hidden, head, torch.tensor([[0, 1, 2], [3, 4, 0]]))
        >>> round(loss.item(), 4) == round(math.log(5), 4)
        True
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return linear_causal_lm(
        hidden, weight, labels, shift_labels, num_items_in_batch, options, bias, class_weight, num_valid,
        max_scratch_bytes, _Shared(group, vocab_size, reduce_hidden_grad), token_weight,
    ).loss  # fmt: skip


def linear_causal_lm(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    given: NumItems | Known,
    options: LossOptions,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    num_valid: int | linear.ValidCount | None = None,
    max_scratch_bytes: int | None = None,
    shared: _Shared | None = None,
    token_weight: torch.Tensor | None = None,
) -> Divided:
    """linear_causal_lm_loss, for a divisor of any kind."""
    name = "linear_causal_lm_loss"
    if labels is None and shift_labels is None:
        raise ValueError(f"{name}: expected labels (B, T) or shift_labels (B, T), got neither")
    targets, shift = (shift_labels, 0) if shift_labels is not None else (labels, 1)
    check_tensors(name, ("labels (B, T)", targets))
    assert targets is not None
    if given is None and token_weight is None and inside.counting is not None:
        of_step = inside.counting.mean(name, targets, shift, options.ignore_index, class_weight, None)
        if of_step is not None:
            known, observed = of_step
            return observed(
                linear_causal_lm(
                    hidden, weight, labels, shift_labels, known, options, bias, class_weight, num_valid,
                    max_scratch_bytes, shared,
                )
            )  # fmt: skip
    metrics = isinstance(given, Known) and given.metrics
    is_mean = given is None
    if token_weight is not None:
        divisor, _, _ = _resolved(name, given, hidden)
        sums = _weighted_linear(
            name, hidden, weight, targets, bias, class_weight, token_weight, options, shift, metrics, num_valid,
            max_scratch_bytes, shared,
        )  # fmt: skip
        divisor = at_least_one(sums.total_weight) if divisor is None else divisor
        return Divided(sums.loss_sum / divisor, sums if metrics else None)
    if shared is not None and _is_shared(hidden, weight, shared):
        loss, sums = _linear(
            name, hidden, weight, targets, bias, class_weight, options, shift, metrics, given, num_valid,
            max_scratch_bytes, shared, is_mean,
        )  # fmt: skip
        return Divided(loss, sums if metrics else None)
    if given is None and class_weight is None and targets.dim() > 0:
        # counted before, on the device: the gradients are then written for it, and not visited again
        given = (targets[..., shift:] != options.ignore_index).count_nonzero()
    loss, sums = _linear(
        name, hidden, weight, targets, bias, class_weight, options, shift, metrics, given, num_valid, max_scratch_bytes
    )
    if given is None:
        loss = loss / ops.mean_divisor(sums.num_items, sums.total_weight, class_weight, loss.dtype)
    return Divided(loss, sums if metrics else None)


@checked_loss
def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    *,
    weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Loss of a masked language model, and of any head with one label for each position; nothing is shifted.

    Equivalent to transformers' ``ForMaskedLMLoss``, whose signature it has.

    Args:
        logits: (..., V).
        labels: (...) int64 or int32. Logits (N, V) or labels (N,) may be flattened.
        vocab_size, num_items_in_batch, ignore_index, weight, label_smoothing, z_loss, softcap, logit_scale, inplace, group:
            as causal_lm_loss.
        token_weight: (...) a weight for each label, as in cross_entropy.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as causal_lm_loss.

    Examples:
        >>> logits, labels = torch.zeros(2, 3, 5), torch.tensor([[-100, 1, -100], [3, 4, -100]])
        >>> round(accumloss.masked_lm_loss(logits, labels).item(), 4) == round(math.log(5), 4)  # of 3 items
        True
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return masked_lm(logits, labels, vocab_size, num_items_in_batch, options, weight, inplace, group, token_weight).loss


def masked_lm(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None = None,
    inplace: InPlace = False,
    group: dist.ProcessGroup | None = None,
    token_weight: torch.Tensor | None = None,
) -> Divided:
    """masked_lm_loss, for a divisor of any kind."""
    check_tensors("masked_lm_loss", ("logits (..., V)", logits), ("labels (...)", labels))
    return _mean_loss(
        "masked_lm_loss", logits, labels, 0, given, options, weight, inplace, group, vocab_size, token_weight
    )


@checked_loss
def token_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: Any = None,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    *,
    weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
) -> torch.Tensor:
    """Loss of a token classification head. Equivalent to transformers' ``ForTokenClassification``.

    Args:
        logits: (B, T, C).
        labels: (B, T) int64 or int32.
        config: with ``num_labels`` = C; an error where logits have another. None: not checked.
        num_items_in_batch, ignore_index, weight, token_weight, label_smoothing, z_loss, softcap, logit_scale, inplace: as
            causal_lm_loss; items are tokens.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as causal_lm_loss.

    Examples:
        >>> logits, labels = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0, 1]])
        >>> round(accumloss.token_classification_loss(logits, labels, num_items_in_batch=2).item(), 4)
        0.2201
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return token_classification(logits, labels, config, num_items_in_batch, options, weight, inplace, token_weight).loss


def token_classification(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: Any,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None = None,
    inplace: InPlace = False,
    token_weight: torch.Tensor | None = None,
) -> Divided:
    """token_classification_loss, for a divisor of any kind."""
    check_tensors("token_classification_loss", ("logits (B, T, C)", logits), ("labels (B, T)", labels))
    check_vocab_size("token_classification_loss", logits, getattr(config, "num_labels", None), "config.num_labels")
    return _mean_loss(
        "token_classification_loss", logits, labels, 0, given, options, weight, inplace, None, None, token_weight
    )


@checked_loss
def sequence_classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config: Any,
    num_items_in_batch: NumItems = None,
    ignore_index: int = -100,
    *,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
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
        ignore_index, label_smoothing, z_loss, inplace: as causal_lm_loss; single label only.
        softcap, logit_scale: as causal_lm_loss; not for regression.
        weight: (C,) class weights, as causal_lm_loss; not for regression.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, RuntimeError, IndexError: as causal_lm_loss, and for an option that the problem has no use for.

    Examples:
        >>> config = types.SimpleNamespace(num_labels=2, problem_type=None)  # of a model of transformers
        >>> loss = accumloss.sequence_classification_loss(torch.tensor([0, 1]), torch.zeros(2, 2), config)
        >>> round(loss.item(), 4), config.problem_type
        (0.6931, 'single_label_classification')
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return sequence_classification(labels, pooled_logits, config, num_items_in_batch, options, weight, inplace).loss


def sequence_classification(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config: Any,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None = None,
    inplace: InPlace = False,
) -> Divided:
    """sequence_classification_loss, for a divisor of any kind; without sums where it is no cross-entropy."""
    name = "sequence_classification_loss"
    check_tensors(name, ("labels (B,)", labels), ("pooled_logits (B, C)", pooled_logits))
    if not (hasattr(config, "num_labels") and hasattr(config, "problem_type")):
        raise TypeError(f"{name}: expected config with num_labels and problem_type, got a {type(config).__name__}")
    num_labels = config.num_labels
    set_problem_type(config, labels)
    problem = config.problem_type
    labels = labels.to(pooled_logits.device)

    if problem == "single_label_classification":
        check_vocab_size(name, pooled_logits, num_labels, "config.num_labels")
        return _mean_loss(name, pooled_logits, labels, 0, given, options, weight, inplace)

    acc = ops.accumulation_dtype(pooled_logits)
    logits, targets = pooled_logits.to(acc), labels.to(acc)
    if problem == "regression":
        _refuse_options(name, problem, {**options.as_kwargs(), "weight": weight, "inplace": inplace})
        if num_labels == 1 and logits.shape != targets.shape:  # (B, 1) and (B,)
            columns = logits if logits.shape[-1:] == (1,) else logits.unsqueeze(-1)
            logits, targets = columns.squeeze(-1), like_rows(name, columns, targets)
        _check_same_shape(name, logits, targets)
        loss_sum = F.mse_loss(logits, targets, reduction="sum")
    elif problem == "multi_label_classification":
        unused = {option: getattr(options, option) for option in ("ignore_index", "label_smoothing", "z_loss")}
        _refuse_options(name, problem, {**unused, "inplace": inplace})
        options.check(name, acc)
        _check_same_shape(name, logits, targets)
        check_class_weight(name, "weight", weight, logits.shape[-1:])
        if options.softcap != 0 or options.logit_scale != 1:
            logits = reference.transform(logits, options)
        weight = weight if weight is None else weight.to(logits.device, acc)
        loss_sum = F.binary_cross_entropy_with_logits(logits, targets, weight=weight, reduction="sum")
    else:
        raise ValueError(
            f"{name}: expected config.problem_type regression, single_label_classification or "
            f"multi_label_classification, got {problem!r}"
        )
    if given is None and inside.counting is not None:
        of_step = inside.counting.mean(name, labels, 0, None, None, None)
        if of_step is not None:
            known, observed = of_step
            return observed(Divided(loss_sum / known.divisor.to(loss_sum.device, loss_sum.dtype)))
    divisor, _, _ = _resolved(name, given, loss_sum)
    return Divided(loss_sum / (max(targets.numel(), 1) if divisor is None else divisor))


def set_problem_type(config: Any, labels: torch.Tensor) -> None:
    """Sets ``config.problem_type`` as transformers does where it is None."""
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.dtype in (torch.int64, torch.int32):
            config.problem_type = "single_label_classification"
        else:
            config.problem_type = "multi_label_classification"


@checked_loss
def question_answering_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor | None,
    end_positions: torch.Tensor | None,
    num_items_in_batch: NumItems | tuple[NumItems, NumItems] = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
) -> torch.Tensor | None:
    """Loss of an extractive question answering head, the mean of its two ends. ``ForQuestionAnsweringLoss``.

    Args:
        start_logits, end_logits: (B, T).
        start_positions, end_positions: (B,) or (B, 1) int64 or int32; those beyond the sequence are ignored, negative
            ones count as 0. None for either: no loss.
        num_items_in_batch: examples of the whole optimizer step, for both ends, or a pair of one for each. None: each
            end is divided by its own items.
        label_smoothing, z_loss, softcap, logit_scale, inplace: as causal_lm_loss, for each end; the classes are the
            positions, which have no weights, and those that are ignored are given.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits), or None.

    Raises:
        TypeError, ValueError, RuntimeError: as causal_lm_loss.

    Examples:
        >>> start, end = torch.zeros(2, 8), torch.zeros(2, 8)
        >>> loss = accumloss.question_answering_loss(start, end, torch.tensor([1, 9]), torch.tensor([2, 3]))
        >>> round(loss.item(), 4) == round(math.log(8), 4)  # the start beyond the sequence counts nothing
        True
    """
    if start_positions is None or end_positions is None:
        return None
    options = LossOptions(label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
    start, end = question_answering(
        start_logits, end_logits, start_positions, end_positions, num_items_in_batch, options, inplace
    )
    return (start.loss + end.loss) / 2


def question_answering(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor,
    end_positions: torch.Tensor,
    given: NumItems | tuple[NumItems | Known, NumItems | Known],
    options: LossOptions,
    inplace: InPlace = False,
) -> tuple[Divided, Divided]:
    """The two ends whose mean is question_answering_loss, for divisors of any kind."""
    name = "question_answering_loss"
    check_tensors(
        name, ("start_logits (B, T)", start_logits), ("end_logits (B, T)", end_logits),
        ("start_positions (B,)", start_positions), ("end_positions (B,)", end_positions),
    )  # fmt: skip
    if start_logits.dim() != 2 or start_logits.shape != end_logits.shape:
        raise RuntimeError(
            f"{name}: expected start_logits and end_logits of one shape (B, T), got {tuple(start_logits.shape)} and "
            f"{tuple(end_logits.shape)}"
        )
    B, T = start_logits.shape
    options = replace(options, ignore_index=T)
    start_items, end_items = _pair(name, given)

    def one(end: str, logits: torch.Tensor, positions: torch.Tensor, items: NumItems | Known) -> Divided:
        if positions.shape not in ((B,), (B, 1)):
            raise RuntimeError(f"{name}: expected {end} of shape ({B},) or ({B}, 1), got {tuple(positions.shape)}")
        labels = positions.reshape(B).to(logits.device).clamp(0, T)
        return _mean_loss(name, logits, labels, 0, items, options, None, inplace)

    return (
        one("start_positions", start_logits, start_positions, start_items),
        one("end_positions", end_logits, end_positions, end_items),
    )


def _pair(name: str, given: Any) -> tuple[NumItems | Known, NumItems | Known]:
    if not isinstance(given, tuple):
        return given, given
    if len(given) != 2:
        raise ValueError(f"{name}: expected a pair for num_items_in_batch, got {len(given)} values")
    return given


@checked_loss
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
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: InPlace = False,
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
        weight, label_smoothing, z_loss, softcap, logit_scale: as causal_lm_loss, of the enlarged logits.
        inplace: as causal_lm_loss, over the enlarged logits, which nobody else sees: the caller's stay.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as causal_lm_loss.

    Examples:
        >>> logits, labels = torch.zeros(1, 3, 2, 2), torch.full((1, 4, 4), 255)
        >>> labels[0, 0, 0] = 1  # the one pixel that counts
        >>> round(accumloss.semantic_segmentation_loss(logits, labels).item(), 4) == round(math.log(3), 4)
        True
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    first, *auxiliary = semantic_segmentation(
        logits, labels, auxiliary_logits, num_items_in_batch, options, weight, inplace
    )
    return first.loss + auxiliary_loss_weight * auxiliary[0].loss if auxiliary else first.loss


def semantic_segmentation(
    logits: torch.Tensor,
    labels: torch.Tensor,
    auxiliary_logits: torch.Tensor | None,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None = None,
    inplace: InPlace = False,
) -> list[Divided]:
    """Of the head, and of the auxiliary head where there is one: what semantic_segmentation_loss adds up."""
    name = "semantic_segmentation_loss"

    def one(what: str, head: torch.Tensor) -> Divided:
        check_tensors(name, (f"{what} (B, C, h, w)", head), ("labels (B, H, W)", labels))
        if head.dim() != 4 or labels.dim() != 3 or head.shape[0] != labels.shape[0]:
            raise RuntimeError(
                f"{name}: expected {what} (B, C, h, w) and labels (B, H, W), got {tuple(head.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if head.layout != torch.strided or head.dtype not in checks.FLOATS or head.numel() == 0:
            raise RuntimeError(
                f"{name}: expected {what} (B, C, h, w) of bfloat16, float16, float32 or float64, dense and not empty, got "
                f"{tuple(head.shape)} of {head.dtype}, {head.layout}"
            )
        inner = head.contiguous(memory_format=torch.channels_last)  # small: before it is enlarged
        enlarged = F.interpolate(inner, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        by_pixel = enlarged.permute(0, 2, 3, 1)  # (B, H, W, C)
        return _mean_loss(name, by_pixel, labels, 0, given, options, weight, inplace)

    found = [one("logits", logits)]
    if auxiliary_logits is not None:
        found.append(one("auxiliary_logits", auxiliary_logits))
    return found


def _mean_loss(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    shift: int,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None,
    inplace: InPlace,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    token_weight: torch.Tensor | None = None,
) -> Divided:
    """The one way from logits to a loss: sum, divided once."""
    if inplace not in (False, "backward", "forward"):
        raise ValueError(f'{name}: expected False, "backward" or "forward" for inplace, got {inplace!r}')
    refuse_functorch(name, logits, labels, weight, given.divisor if isinstance(given, Known) else given)
    options.check(name, ops.accumulation_dtype(logits))
    if token_weight is not None:
        check_token_weight(name, token_weight, labels)
        token_weight = like_rows(name, logits, token_weight, shift)
    labels = like_rows(name, logits, labels, shift)
    if given is None and token_weight is None and inside.counting is not None:
        of_step = inside.counting.mean(name, labels, shift, options.ignore_index, weight, logits.shape[-1])
        if of_step is not None:
            known, observed = of_step
            return observed(_mean_loss(name, logits, labels, shift, known, options, weight, inplace, group, vocab_size))
    if parallel.is_parallel(logits, labels, group):
        refuse_token_weight(name, token_weight, "where processes share the vocabulary, or beside DTensors")
        return _parallel_mean_loss(name, logits, labels, shift, given, options, weight, inplace, group, vocab_size)
    check_vocab_size(name, logits, vocab_size)
    check_class_weight(name, "weight", weight, logits.shape[-1:])
    if labels.device != logits.device:
        labels = labels.to(logits.device, non_blocking=True)
    if weight is not None and weight.device != logits.device:
        weight = weight.to(logits.device, non_blocking=True)

    divisor, expected_grad, metrics = _resolved(name, given, logits)
    if token_weight is not None:
        sums = weighted_sums(name, logits, labels, token_weight, weight, shift, options, metrics, inplace)
        divisor = at_least_one(sums.total_weight) if divisor is None else divisor
        return Divided(sums.loss_sum / divisor, sums if metrics else None)
    kwargs = of_op(options, shift, metrics)
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    # The compiler takes the op with its formula; so do second derivatives, which fp64 is for.
    in_forward = wants_grad and divisor is not None and logits.dtype in _GRAD_IN_FORWARD_DTYPES
    if inplace and wants_grad:
        loss, *fields = _in_place(name, logits, labels, weight, divisor, expected_grad, kwargs, inplace)
    elif in_forward and not torch.compiler.is_compiling():
        loss, *fields = ops.GradInForward.apply(logits, (labels, weight, divisor, expected_grad, kwargs))
    else:
        loss_sum, num_items, total_weight, _, num_correct, entropy_sum, _ = ops.cross_entropy(
            logits, labels, weight, **kwargs
        )
        if divisor is None:
            divisor = ops.mean_divisor(num_items, total_weight, weight, loss_sum.dtype)
        loss, fields = loss_sum / divisor, [loss_sum, num_items, total_weight, num_correct, entropy_sum]
    return Divided(loss, TokenSums(*fields) if metrics else None)


def _parallel_sums(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    shift: int,
    options: LossOptions,
    metrics: bool,
    shared: tuple[dist.ProcessGroup | None, int | None],  # group, vocab_size
    token_weight: torch.Tensor | None,
) -> TokenSums:
    part = parallel.checked_part_of(name, logits, labels, weight, shift, options, *shared)
    if part.shard is None:
        found = _sums(part.logits, part.labels, part.weight, None, 0, metrics, (None, None), options)
        return TokenSums(*(part.wrap(getattr(found, field.name)) for field in fields(TokenSums)))
    if token_weight is not None:
        check_token_weight(name, token_weight, labels)
        call = (part.logits, part.labels, part.weight, name, part.shard, options, metrics, False)
        rows = parallel.VocabParallelRows.apply(*call)
        return sums_of(rows, part.labels, shifted(token_weight, shift), part.weight, options, metrics)
    sums = parallel.VocabParallel.apply(
        part.logits, part.labels, part.weight, name, part.shard, options, metrics, False
    )
    return TokenSums(*map(part.wrap, sums if metrics else sums[:3]))


def _parallel_mean_loss(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    shift: int,
    given: NumItems | Known,
    options: LossOptions,
    weight: torch.Tensor | None,
    inplace: InPlace,
    group: dist.ProcessGroup | None,
    vocab_size: int | None,
) -> Divided:
    """_mean_loss where the vocabulary is shared, or the logits are a DTensor."""
    wants_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and wants_grad:
        check_in_place(name, logits, inplace)
    part = parallel.checked_part_of(name, logits, labels, weight, shift, options, group, vocab_size)
    shard = part.shard
    if parallel.is_dtensor(given):
        given = given.full_tensor()
    if given is None and part.mesh is not None and not (inplace == "forward" and wants_grad):
        given = _items_of(part, options)  # of all rows: the sums below are of those that are here
    if inplace and wants_grad and part.mesh is not None:
        part = part._replace(logits=parallel.Overwritten.apply(part.logits, logits.detach()))
    if shard is None:
        found = _mean_loss(name, part.logits, part.labels, 0, given, options, part.weight, inplace)
        loss, sums = found
    else:
        divisor, expected_grad, metrics = _resolved(name, given, part.logits)
        arguments = (name, shard, options, metrics)
        if inplace == "forward" and wants_grad:
            divisor = _check_in_forward(name, part.logits, divisor)
            loss, *of_rows = parallel.VocabParallelInPlace.apply(
                part.logits, part.labels, part.weight, divisor, expected_grad, *arguments
            )
        else:
            of_rows = parallel.VocabParallel.apply(
                part.logits, part.labels, part.weight, *arguments, bool(inplace) and wants_grad
            )
            if divisor is None:
                divisor = ops.mean_divisor(of_rows[1], of_rows[2], part.weight, of_rows[0].dtype)
            loss = of_rows[0] / divisor
        sums = TokenSums(*of_rows) if metrics else None
    if sums is not None:
        sums = TokenSums(*(part.wrap(getattr(sums, field.name)) for field in fields(TokenSums)))
    return Divided(part.wrap(loss), sums)


def _items_of(part: parallel.Part, options: LossOptions) -> torch.Tensor:
    """The divisor of the mean of a call over all of its rows, those of other processes too."""
    is_item = part.labels != options.ignore_index
    num_items = is_item.sum()
    if part.weight is None:
        return part.whole(num_items)
    dtype = ops.accumulation_dtype(part.logits)
    classes = part.labels.clamp(0, part.weight.shape[0] - 1).long()
    weights = torch.where(is_item, widened(part.weight.to(dtype))[classes], 0.0)
    return part.whole(weights.sum()).to(dtype)


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
    given: NumItems | Known,
    num_valid: int | linear.ValidCount | None,
    max_scratch_bytes: int | None,
    shared: _Shared | None = None,
    is_mean: bool = False,
) -> tuple[torch.Tensor, TokenSums]:
    """loss_sum divided by what is given (None: not divided), which carries the gradient, and the sums.

    is_mean: where nothing is given it is divided by the items of all rows; of processes that share the vocabulary.
    """
    known = given.divisor if isinstance(given, Known) else given
    refuse_functorch(name, hidden, weight, labels, bias, class_weight, known)
    check_tensors(name, ("hidden (..., H)", hidden), ("weight (V, H)", weight), ("labels (...)", labels))
    check_shift(name, shift)
    part: parallel.Part | None = None
    shard: parallel.Shard | None = None
    is_summed = False
    if shared is not None and _is_shared(hidden, weight, shared):
        parallel.check_group(name, shared.group)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{name}: expected no torch.compile where processes share the vocabulary, got one around it"
            )
        own = parallel.linear_part_of(
            name, hidden, weight, labels, bias, class_weight, shift, options.ignore_index, *shared
        )
        part, is_summed, shard, shift = own.part, own.is_summed, own.part.shard, 0
        hidden, weight, bias, labels, class_weight = own.hidden, own.weight, own.bias, part.labels, part.weight
        if parallel.is_dtensor(given):
            given = given.full_tensor()
        if is_mean:
            given = _items_of(part, options)
    elif shared is not None and shared.vocab_size is not None and weight.shape[:1] != (shared.vocab_size,):
        raise ValueError(
            f"{name}: expected weight of shape (vocab_size = {shared.vocab_size}, H), got {tuple(weight.shape)}"
        )
    linear.check(name, hidden, weight, labels, bias, class_weight, num_valid, max_scratch_bytes, shard)
    options.check(name, ops.accumulation_dtype(hidden))
    labels = labels.to(hidden.device, non_blocking=True)
    class_weight = class_weight if class_weight is None else class_weight.to(hidden.device, non_blocking=True)
    divisor, expected_grad, _ = _resolved(name, given, hidden)
    kwargs: dict[str, Any] = {"shift": shift, "metrics": metrics, **options.as_kwargs()}
    if torch.compiler.is_compiling():
        if isinstance(num_valid, linear.ValidCount):
            raise RuntimeError(
                f"{name}: expected an int for num_valid inside of torch.compile, got a ValidCount; int() of it"
            )
        kwargs.update(num_valid=num_valid, max_scratch_bytes=max_scratch_bytes)
        sums = list(linear.linear_cross_entropy(hidden, weight, labels, bias, class_weight, **kwargs))
        loss = sums[0] if divisor is None else sums[0] / divisor
    else:
        hidden, weight, bias = linear.autocast(hidden, weight, bias)
        if divisor is None:
            divisor = torch.ones((), dtype=ops.accumulation_dtype(hidden), device=hidden.device)
        # one that follows what is made of it sees the division, and not the autograd.Function
        followed, divisor = divisor, divisor.as_subclass(torch.Tensor)
        needs = linear.needs_of(hidden, weight, bias)
        # asked as late as possible
        limits = (int(num_valid) if isinstance(num_valid, linear.ValidCount) else num_valid, max_scratch_bytes)
        loss, *sums = linear.LinearGradInForward.apply(
            hidden,
            weight,
            labels,
            bias,
            class_weight,
            divisor,
            expected_grad,
            needs,
            kwargs,
            limits,
            (shard, is_summed),
        )
        if type(followed) is not torch.Tensor:
            loss = loss * divisor / followed
    if part is not None:
        loss, sums = part.wrap(loss), [part.wrap(of_rows) for of_rows in sums]
    return loss, TokenSums(*sums) if metrics else TokenSums(*sums[:3])


def _weighted_linear(
    name: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    token_weight: torch.Tensor,
    options: LossOptions,
    shift: int,
    metrics: bool,
    num_valid: int | linear.ValidCount | None,
    max_scratch_bytes: int | None,
    shared: _Shared | None,
) -> TokenSums:
    """_linear where each label has a weight."""
    refuse_functorch(name, hidden, weight, labels, bias, class_weight, token_weight)
    check_tensors(name, ("hidden (..., H)", hidden), ("weight (V, H)", weight), ("labels (...)", labels))
    check_shift(name, shift)
    check_token_weight(name, token_weight, labels)
    if shared is not None and (_is_shared(hidden, weight, shared) or shared.vocab_size is not None):
        refuse_token_weight(name, token_weight, "where processes share the vocabulary, or beside DTensors")
    if num_valid is not None:
        refuse_token_weight(name, token_weight, "beside num_valid")
    options.check(name, ops.accumulation_dtype(hidden))
    labels = reference.shift_labels(labels, shift, options.ignore_index) if labels.dim() else labels
    labels = labels.to(hidden.device, non_blocking=True)
    class_weight = class_weight if class_weight is None else class_weight.to(hidden.device, non_blocking=True)
    kwargs = {**options.as_kwargs(), "metrics": metrics}
    rows = linear.token_rows(name, hidden, weight, labels, bias, class_weight, kwargs, max_scratch_bytes)
    weights = shifted(token_weight, shift)
    return sums_of(rows, labels, weights, class_weight, options, metrics)


class _Shared(NamedTuple):
    """What is said of the processes that share the vocabulary of a head."""

    group: dist.ProcessGroup | None
    vocab_size: int | None
    reduce_hidden_grad: bool


def _is_shared(hidden: Any, weight: Any, shared: _Shared) -> bool:
    return shared.group is not None or parallel.is_dtensor(hidden) or parallel.is_dtensor(weight)


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
    check_in_place(name, logits, inplace)
    if inplace == "backward":
        return ops.InPlaceBackward.apply(logits, labels, weight, divisor, kwargs)
    divisor = _check_in_forward(name, logits, divisor)
    return ops.InPlaceForward.apply(logits, labels, weight, divisor, expected_grad, kwargs)


def _check_in_forward(name: str, logits: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    """The divisor, where inplace="forward" may be."""
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
    return divisor


def _resolved(name: str, given: NumItems | Known, like: torch.Tensor) -> tuple[torch.Tensor | None, float, bool]:
    """A divisor as in divisor_of, the gradient that will come back to the loss, and whether metrics are wanted."""
    if isinstance(given, Known):
        divisor = given.divisor.to(like.device, ops.accumulation_dtype(like), non_blocking=True)
        return divisor, given.expected_grad, given.metrics
    return divisor_of(name, given, like), 1.0, False


def _refuse_options(name: str, problem: str, given: dict[str, Any]) -> None:
    """Options that have no meaning for a problem: none of them may be anything but its default."""
    defaults = {**LossOptions().as_kwargs(), "weight": None, "inplace": False}
    for option, value in given.items():
        default = defaults[option]
        if value is not default and (isinstance(value, torch.Tensor) or value != default):
            got = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{name}: expected no {option} for {problem}, got {got}")


def _check_same_shape(name: str, logits: torch.Tensor, labels: torch.Tensor) -> None:
    if logits.shape != labels.shape:
        raise ValueError(f"{name}: expected labels of shape {tuple(logits.shape)}, got {tuple(labels.shape)}")
