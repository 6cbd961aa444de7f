"""Sums, counts and gradients from hidden states, chunk by chunk, below autograd: the matrix products of a head with a loss.

The rows go through in chunks. A chunk's logits are a matrix product into a buffer that is reused; ``add_cross_entropy_``
turns them into their gradient where they lie, and adds to the sums of the call; two more products take that gradient to the
hidden states and to the weight. So nothing is computed twice, and of the logits one chunk exists at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .. import ops, parallel
from ..options import LossOptions
from ..sums import wide_dtype, widened
from . import device as devices
from .plan import ROWS_ALIGNED, LinearPlan, chunks, linear_plan

# Of the sums. They are added up in double, and handed out in the dtype of the accumulation
SUM_DTYPES = (torch.float64, torch.int64, torch.float64, torch.int64, torch.float64)
_BLOCK_BYTES = 8 * 2**20  # of a product that is added to an accumulator
# A product of fewer classes at a time reads them from the cache: 3 to 12 % faster than all of them at once
_LOGITS_CLASSES = 1024  # of fp32 and fp64
_LOGITS_CLASSES_BF16 = 2048  # for _LOGITS_ROWS_BF16 and more; for fewer there is nothing to gain
_LOGITS_ROWS_BF16 = 1024


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Outputs(NamedTuple):
    sums: list[torch.Tensor]  # the fields of TokenSums
    hidden: torch.Tensor | None  # gradients for the factor that was given
    weight: torch.Tensor | None  # fp16: in fp32
    bias: torch.Tensor | None  # fp32 or fp64


Place = slice | torch.Tensor  # of a chunk's rows among all
# turns the logits (n, V) of rows with labels (n,) into their gradient, where one is wanted
Turn = Callable[[torch.Tensor, torch.Tensor, Place], None]


def run(
    factor: torch.Tensor,  # () what the gradients are multiplied by
    hidden: torch.Tensor,  # (N, H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (N,) shifted
    bias: torch.Tensor | None,  # (V,)
    class_weight: torch.Tensor | None,  # (V,)
    needs: Needs,
    options: dict[str, Any],
    num_valid: int | None,
    max_scratch_bytes: int | None,
    shard: parallel.Shard | None = None,
    turn: Turn | None = None,
) -> Outputs:
    """Everything, below autograd. Of a shard: weight, bias and their gradients of its classes, labels and class_weight of all;
    the gradient of hidden is its part of a sum over the processes. turn: what stands in for the loss; the sums are 0 then."""
    H, V = hidden.shape[1], weight.shape[0]
    acc = ops.accumulation_dtype(hidden)
    vocab_size, most_classes = (V, V) if shard is None else (shard.vocab_size, shard.chunk)
    rows, given = valid_rows(labels, vocab_size, options["ignore_index"], num_valid)
    n = hidden.shape[0] if rows is None else rows.shape[0]
    plan = linear_plan(  # of a shard for the largest: all processes go through the same chunks
        n, H, most_classes, hidden.dtype, weight_grad=needs.weight, hidden_grad=needs.hidden, gathered=rows is not None,
        max_scratch_bytes=max_scratch_bytes, device=hidden.device,
        free_bytes=devices.free_bytes(hidden.device) if shard is None and max_scratch_bytes is None else None,
    )  # fmt: skip
    wants_grad = needs.hidden or needs.weight or needs.bias
    gathers_all = plan.block_classes > 0  # else chunk by chunk
    all_hidden = hidden if rows is None or not gathers_all else hidden.index_select(0, rows)

    grad_hidden = grad_weight = grad_bias = None
    if needs.hidden:
        grad_hidden = torch.empty_like(hidden) if rows is None else torch.zeros_like(hidden)
    if needs.weight:
        if plan.accumulator == weight.dtype:
            grad_weight = ops.scratch(weight, V, H)  # memory that is kept
        else:
            grad_weight = torch.empty(V, H, dtype=plan.accumulator, device=weight.device)
        if n == 0:
            grad_weight.zero_()
    if needs.bias:
        grad_bias = torch.zeros(V, dtype=acc, device=weight.device)
    totals = torch.zeros(len(SUM_DTYPES), dtype=wide_dtype(hidden.device), device=hidden.device)
    is_smaller = most_classes > V and not devices.is_cuda(hidden.device)  # a shard than that of the plan
    buffer = ops.scratch(hidden, plan.chunk_rows if n else 0, V if is_smaller else plan.row_stride)
    for part in chunks(n, plan):
        begin = part.start
        index = None if rows is None else rows[part]
        h = hidden.index_select(0, index) if index is not None and not gathers_all else all_hidden[part]
        targets = labels[part] if index is None else labels.index_select(0, index)
        logits = buffer[: part.stop - begin, :V]
        product_of_logits(logits, h, weight, bias)
        wanted = factor if wants_grad else None
        if turn is not None:
            turn(logits, targets, part if index is None else index)
        elif shard is not None:
            totals += _of_shard(wanted, logits, targets, class_weight, shard, options)
        else:
            ops.add_cross_entropy_(totals, wanted, logits, targets, class_weight, **options)
        grad_h = None
        if grad_hidden is not None:
            grad_h = grad_hidden[part] if index is None else torch.empty_like(h)
        if grad_weight is not None and begin < plan.parked_rows:
            for classes, parked in _parked(grad_weight, plan):
                parked[part].copy_(logits[:, classes])
        elif grad_weight is not None and plan.block_classes:
            _product_by_blocks(grad_weight, logits, all_hidden, plan, None if plan.has_buffer else grad_h)
        elif grad_weight is not None:
            _add_product(grad_weight, logits, h, plan, is_first=begin == 0)
        if grad_hidden is not None and grad_h is not None:
            torch.mm(logits, weight, out=grad_h)
            if index is not None:
                grad_hidden.index_copy_(0, index, grad_h)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=acc)
        del logits
    del buffer
    if grad_weight is not None and hidden.dtype == torch.bfloat16:
        grad_weight = grad_weight.to(torch.bfloat16)
    final = [
        total.to(acc if dtype.is_floating_point else dtype, copy=True)
        for total, dtype in zip(totals, SUM_DTYPES, strict=True)
    ]
    if given is not None:  # fewer than there are: no row of theirs may be missing unseen
        final[0] = torch.where(given, final[0], torch.full_like(final[0], float("nan")))
    return Outputs(final, grad_hidden, grad_weight, grad_bias)


def _of_shard(
    factor: torch.Tensor | None,
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    shard: parallel.Shard,
    options: dict[str, Any],
) -> torch.Tensor:
    """The sums of a chunk over the whole vocabulary, (5,); with a factor the gradient takes the place of the logits."""
    of_loss = {name: value for name, value in options.items() if name != "metrics"}
    loss_options = LossOptions(**of_loss)
    name = "linear_cross_entropy"
    rows = parallel.forward(name, logits, labels, class_weight, shard, loss_options, options["metrics"])
    if factor is not None:
        parallel.backward(factor, logits, labels, rows.lse, rows.nll, class_weight, shard, loss_options, in_place=True)
    return torch.stack([widened(value) for value in rows.sums])


def product_of_logits(
    logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """logits (n, V) = hidden (n, H) weightᵀ (H, V) + bias (V,)"""
    block = V = weight.shape[0]
    if logits.device.type == "cpu":
        if logits.dtype in (torch.float32, torch.float64):
            block = _LOGITS_CLASSES
        elif logits.dtype == torch.bfloat16 and logits.shape[0] >= _LOGITS_ROWS_BF16:
            block = _LOGITS_CLASSES_BF16
    for begin in range(0, V, block):
        part = slice(begin, min(begin + block, V))
        if bias is None:
            torch.mm(hidden, weight[part].t(), out=logits[:, part])
        else:
            torch.addmm(bias[part], hidden, weight[part].t(), out=logits[:, part])


def _parked(grad_weight: torch.Tensor, plan: LinearPlan) -> Iterator[tuple[slice, torch.Tensor]]:
    """Ranges of classes, and where their parked rows (parked_rows, classes) lie: in those classes' own part of grad_weight."""
    V = grad_weight.shape[0]
    for begin in range(0, V, plan.block_classes):
        classes = slice(begin, min(begin + plan.block_classes, V))
        count = classes.stop - begin
        yield classes, grad_weight[classes].view(-1)[: plan.parked_rows * count].view(plan.parked_rows, count)


def _product_by_blocks(
    grad_weight: torch.Tensor,
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    plan: LinearPlan,
    memory: torch.Tensor | None,
) -> None:
    """grad_weight (V, H) = grad_logitsᵀ hidden of all n rows: the parked ones, and the others (n - parked_rows, V), copied
    together for some classes at a time; in memory that may be written over, else in new memory."""
    shape = (hidden.shape[0], plan.block_classes)
    buffer = grad_weight.new_empty(shape) if memory is None else memory.view(-1)[: shape[0] * shape[1]].view(shape)
    for classes, parked in _parked(grad_weight, plan):
        block = buffer[:, : parked.shape[1]]
        block[: plan.parked_rows] = parked
        block[plan.parked_rows :] = grad_logits[:, classes]
        torch.mm(block.t(), hidden, out=grad_weight[classes])


def valid_rows(
    labels: torch.Tensor, V: int, ignore_index: int, num_valid: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Indices of the rows that count, None for all of them; and, where their number was given, whether that held.

    They are as many as count, rounded up to a multiple of 64.
    """
    N = labels.shape[0]
    can_look = not devices.waits(labels.device)
    if not can_look and (num_valid is None or num_valid >= N):
        return None, None
    is_valid = labels != ignore_index
    if can_look:
        bad = is_valid & ((labels < 0) | (labels >= V))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"linear_cross_entropy: expected labels in [0, {V}) or ignore_index {ignore_index}, got "
                f"{int(labels[row])} for row {row} of {N}; check vocab_size and the value that pads the labels"
            )
        count = int(is_valid.count_nonzero())
        if num_valid is not None and num_valid < count:
            raise ValueError(
                f"linear_cross_entropy: expected num_valid of at least {count}, the labels that count (after the shift), "
                f"got {num_valid}"
            )
        padded = _aligned(count, N)
        if padded == N:
            return None, None
        rows = is_valid.nonzero().squeeze(1)
        if padded > count:  # by rows that do not count: products over an odd number of rows take a slow path
            others = is_valid.logical_not().nonzero().squeeze(1)
            rows = torch.cat([rows, others[: padded - count]])
        return rows, None
    assert num_valid is not None
    is_enough = is_valid.count_nonzero() <= num_valid
    padded = _aligned(num_valid, N)
    if padded == N:
        return None, is_enough
    # those that count first, in their order; without a sync
    return torch.argsort(is_valid.logical_not().to(torch.int8), stable=True)[:padded], is_enough


def _aligned(count: int, N: int) -> int:
    return min(-(-count // ROWS_ALIGNED) * ROWS_ALIGNED, N)


def _add_product(
    grad_weight: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, plan: LinearPlan, is_first: bool
) -> None:
    """grad_weight (V, H) = or += grad_logits (n, V)ᵀ hidden (n, H)"""
    if grad_weight.dtype == hidden.dtype:
        if is_first:
            torch.mm(grad_logits.t(), hidden, out=grad_weight)
        else:
            grad_weight.addmm_(grad_logits.t(), hidden)
        return
    if plan.product == torch.float32:
        devices.add_product_(grad_weight, grad_logits, hidden, is_first)
        return
    V, H = grad_weight.shape
    block = max(_BLOCK_BYTES // (H * hidden.element_size()), 1)
    for begin in range(0, V, block):
        part = slice(begin, begin + block)
        product = torch.mm(grad_logits[:, part].t(), hidden)
        if is_first:
            grad_weight[part] = product
        else:
            grad_weight[part] += product
