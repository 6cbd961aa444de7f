"""How the rows go through: chunks, and where the gradient of the weight is summed up, from shapes and a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..keywords import checked

MAX_SCRATCH_BYTES = 256 * 2**20
ROWS_ALIGNED = 64
_PARKED_BLOCK_BYTES = 16 * 2**20  # at most, of the gradient of logits that makes a part of the weight's
_PACKING_SHARE = 64  # the budget's 64th is left to the matrix products, for operands in an order of their own
_FEWEST_ROWS = 256  # of a chunk, for which an accumulator is worth its memory
_FEW_CHUNKS = 3  # of bf16, whose roundings are no worse than those of products that an fp32 accumulator adds up


class LinearPlan(NamedTuple):
    """How ``linear_cross_entropy`` goes through its rows.

    Attributes:
        chunk_rows: rows whose logits exist at a time.
        num_chunks: chunks of all rows.
        accumulator: dtype in which the weight's gradient is summed up over the chunks; None without one.
        scratch_bytes: memory beside inputs and gradients: a chunk of logits, an accumulator that is not the gradient,
            a block of the classes of all rows, and the hidden states of rows that are gathered, with their gradient.
        parked_rows: rows whose gradient of logits waits in the memory of the weight's gradient, which is then made by one
            product over all rows, as without chunks: nothing is summed up.
        block_classes: classes of that product at a time; 0 where the weight's gradient is not made so.
        has_buffer: whether the blocks have memory of their own. Without it they take that of the last chunk's gradient of
            the hidden states, which is made after them.
    """

    chunk_rows: int
    num_chunks: int
    accumulator: torch.dtype | None
    scratch_bytes: int
    parked_rows: int = 0
    block_classes: int = 0
    has_buffer: bool = False


@checked
def linear_plan(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weight_grad: bool = True,
    hidden_grad: bool = True,
    gathered: bool = False,
    max_scratch_bytes: int = MAX_SCRATCH_BYTES,
) -> LinearPlan:
    """The chunks of a call, from its shapes and the budget; see LinearPlan.

    ``gathered`` says that ``rows`` are those that count among others, which are left out: the hidden states of a chunk are
    copied together then. A 64th of the budget is left to what the matrix products allocate themselves.

    Where one chunk is not enough in bf16, up to hidden_size rows more than the budget holds are parked (parked_rows). Beyond
    that, each chunk's product is added in fp32 inside the matrix product and rounded to bf16, one rounding for each
    chunk; more than three chunks go to an fp32 accumulator where the budget holds it beside 256 rows of logits. A larger
    ``max_scratch_bytes`` decides otherwise. fp16 always has an fp32 accumulator. The budget is exceeded only by that, or
    where it does not hold the logits of one row.

    >>> linear_plan(2048, 2048, 32000).num_chunks
    1
    >>> plan = linear_plan(2048, 1024, 128256)
    >>> plan.num_chunks, plan.chunk_rows, plan.parked_rows, plan.scratch_bytes
    (2, 1024, 1024, 262668288)
    >>> linear_plan(8192, 1024, 128256).num_chunks, linear_plan(8192, 1024, 128256, max_scratch_bytes=2**30).num_chunks
    (8, 2)
    """
    if rows < 0 or hidden_size < 1 or vocab_size < 1 or max_scratch_bytes < 1:
        raise ValueError(
            "linear_plan: expected rows >= 0, hidden_size, vocab_size and max_scratch_bytes >= 1, got "
            f"{rows}, {hidden_size}, {vocab_size}, {max_scratch_bytes}"
        )
    budget = max(max_scratch_bytes - max_scratch_bytes // _PACKING_SHARE, 1)
    gathered_bytes = hidden_size * dtype.itemsize * gathered  # of a row
    row_bytes = vocab_size * dtype.itemsize + gathered_bytes * (1 + hidden_grad)
    accumulator_bytes = hidden_size * vocab_size * 4

    def chunks(budget: int) -> tuple[int, int]:
        most = min(max(budget // row_bytes, 1), max(rows, 1))
        count = -(-rows // most) if rows else 0
        if count < 2:
            return most, count
        even = -(-rows // count)
        return min(-(-even // 16) * 16, most), count  # chunks of one size, but for the last

    chunk_rows, count = chunks(budget)
    if not weight_grad:
        return LinearPlan(chunk_rows, count, None, chunk_rows * row_bytes)
    if dtype == torch.float16:
        chunk_rows, count = chunks(max(budget - accumulator_bytes, _FEWEST_ROWS * row_bytes))
        return LinearPlan(chunk_rows, count, torch.float32, chunk_rows * row_bytes + accumulator_bytes)
    # rows that do not begin at 64 bytes take a slow path through the product that has them as columns
    if dtype == torch.bfloat16 and (count > 1 or (rows and vocab_size * dtype.itemsize % 64)):
        all_bytes = rows * gathered_bytes  # the product over all rows needs their hidden states together
        row_bytes -= gathered_bytes
        parked = _parked_plan(rows, hidden_size, vocab_size, row_bytes, dtype, hidden_grad, budget - all_bytes)
        if parked is not None:
            return parked._replace(scratch_bytes=parked.scratch_bytes + all_bytes)
        row_bytes += gathered_bytes
    has_room = budget - accumulator_bytes >= _FEWEST_ROWS * row_bytes
    if dtype == torch.bfloat16 and count > _FEW_CHUNKS and has_room:
        chunk_rows, count = chunks(budget - accumulator_bytes)
        return LinearPlan(chunk_rows, count, torch.float32, chunk_rows * row_bytes + accumulator_bytes)
    return LinearPlan(chunk_rows, count, dtype, chunk_rows * row_bytes)


def _parked_plan(
    rows: int, hidden_size: int, vocab_size: int, row_bytes: int, dtype: torch.dtype, hidden_grad: bool, budget: int
) -> LinearPlan | None:
    """The plan with parked rows and blocks as large as they may be; None where there are too many rows for it."""
    classes = min(max(_PARKED_BLOCK_BYTES // (rows * dtype.itemsize) // 64 * 64, 64), vocab_size)
    while True:
        for has_buffer in (True, False):
            buffer = rows * classes * dtype.itemsize if has_buffer else 0
            most = (budget - buffer) // row_bytes
            if most < 1 or most + hidden_size < rows:
                continue
            parked = max(rows - most, 0)
            aligned = -(-parked // ROWS_ALIGNED) * ROWS_ALIGNED
            parked = aligned if aligned <= min(hidden_size, rows - 1) else parked
            kept = rows - parked
            if not has_buffer and not (hidden_grad and kept * hidden_size >= rows * classes):
                continue
            bytes_ = kept * row_bytes + buffer
            return LinearPlan(kept, -(-parked // kept) + 1, dtype, bytes_, parked, classes, has_buffer)
        if classes <= 64:
            return None
        classes = max(classes // 128 * 64, 64)


def chunks(rows: int, plan: LinearPlan) -> Iterator[slice]:
    """Those that are parked, then the others."""
    for first, last in ((0, plan.parked_rows), (plan.parked_rows, rows)):
        for begin in range(first, last, plan.chunk_rows):
            yield slice(begin, min(begin + plan.chunk_rows, last))
