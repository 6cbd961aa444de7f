"""How the rows go through: chunks, and where the gradient of the weight is summed up, from shapes and a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ..keywords import checked
from . import device as devices

MAX_SCRATCH_BYTES = 256 * 2**20  # on the CPU
CUDA_SCRATCH_BYTES = 2**30  # of a chunk, and more where that holds fewer than CUDA_ROWS rows
CUDA_ROWS = 4096
CUDA_COLUMNS_ALIGNED = 64  # rows that begin anywhere take slow paths through two of the three products
CUDA_ROWS_ALIGNED = 128  # of a tile of the products
_SHARE_OF_FREE = 2  # a plan takes at most half of the free memory
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
        row_stride: elements from one row of a chunk's logits to the next: V, on CUDA rounded up to a multiple of 64.
        product: dtype in which each chunk's product for the weight's gradient leaves the matrix product: fp32 where an fp32
            accumulator takes it unrounded. None without a gradient.

    Examples:
        >>> accumloss.linear_plan(512, 1024, 32000).chunk_rows
        512
    """

    chunk_rows: int
    num_chunks: int
    accumulator: torch.dtype | None
    scratch_bytes: int
    parked_rows: int = 0
    block_classes: int = 0
    has_buffer: bool = False
    row_stride: int = 0
    product: torch.dtype | None = None


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
    max_scratch_bytes: int | None = None,
    device: torch.device | str | float | tuple[int, int] = "cpu",
    free_bytes: int | None = None,
) -> LinearPlan:
    """The chunks of a call, from its shapes and the budget; see LinearPlan.

    Args:
        rows, hidden_size, vocab_size, dtype: of the call.
        weight_grad, hidden_grad: whether these gradients are made.
        gathered: whether ``rows`` are those that count among others, which are left out: the hidden states of a chunk are
            copied together then.
        max_scratch_bytes: the budget. None: 256 MiB on the CPU. On CUDA what 4096 rows take, or 1 GiB where that is more,
            with an fp32 accumulator beside it.
        device: ``"cpu"``; ``"cuda"``, or a GPU as ``accumloss.plan`` takes it (``"sm_90"``, ``"H100"``); needs none. GPUs differ
            by their memory, which ``free_bytes`` says, and by whether they have a product into fp32.
        free_bytes: what is free there. Without a budget a call asks the GPU, and takes at most half of it; but where the
            processes share the vocabulary, which must have the same chunks. None: enough.

    On the CPU a 64th of the budget is left to what the matrix products allocate themselves. Where one chunk is not enough in
    bf16, up to hidden_size rows more than the budget holds are parked (parked_rows). Beyond that, each chunk's product is
    added in fp32 inside the matrix product and rounded to bf16, one rounding for each chunk; more than three chunks go to
    an fp32 accumulator where the budget holds it beside 256 rows of logits. A larger ``max_scratch_bytes`` decides
    otherwise. fp16 always has an fp32 accumulator. The budget is exceeded only by that, or where it does not hold the
    logits of one row.

    On CUDA no rows are parked. All rows go through in one chunk where that takes no more than the budget. Several chunks add
    up in fp32, by a product into fp32 (sm_80 and newer). Where there is none, two or three chunks in bf16 are rounded once
    each, and more are rounded once each before an fp32 accumulator takes them. The budget is exceeded, by as little as
    possible, where it would take more than three bf16 roundings.

    Returns:
        LinearPlan.

    Raises:
        ValueError: a size below 1, or a GPU that nobody knows.

    Examples:
        >>> linear_plan(2048, 2048, 32000).num_chunks
        1
        >>> plan = linear_plan(2048, 1024, 128256)
        >>> plan.num_chunks, plan.chunk_rows, plan.parked_rows, plan.scratch_bytes
        (2, 1024, 1024, 262668288)
        >>> linear_plan(8192, 1024, 128256).num_chunks, linear_plan(8192, 1024, 128256, max_scratch_bytes=2**30).num_chunks
        (8, 2)
        >>> plan = linear_plan(16384, 4096, 151936, device="H200")
        >>> plan.num_chunks, plan.chunk_rows, plan.accumulator, plan.product
        (4, 4096, torch.float32, torch.float32)
        >>> linear_plan(4096, 2048, 50257, device="H200").row_stride
        50304
    """
    sizes = rows < 0 or hidden_size < 1 or vocab_size < 1 or (max_scratch_bytes is not None and max_scratch_bytes < 1)
    if sizes or (free_bytes is not None and free_bytes < 0):
        raise ValueError(
            "linear_plan: expected rows and free_bytes >= 0, hidden_size, vocab_size and max_scratch_bytes >= 1, got "
            f"{rows}, {free_bytes}, {hidden_size}, {vocab_size}, {max_scratch_bytes}"
        )
    call = _Call(rows, hidden_size, vocab_size, dtype, weight_grad, hidden_grad, gathered)
    if devices.is_cuda(device):
        return _plan_on_cuda(call, device, max_scratch_bytes, free_bytes)
    return _plan_on_cpu(call, MAX_SCRATCH_BYTES if max_scratch_bytes is None else max_scratch_bytes)


class _Call(NamedTuple):
    rows: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    weight_grad: bool
    hidden_grad: bool
    gathered: bool

    @property
    def gathered_bytes(self) -> int:
        """Of a row."""
        return self.hidden_size * self.dtype.itemsize * self.gathered

    def row_bytes(self, row_stride: int) -> int:
        """Of a row of a chunk: its logits, and its copies."""
        return row_stride * self.dtype.itemsize + self.gathered_bytes * (1 + self.hidden_grad)

    @property
    def accumulator_bytes(self) -> int:
        return self.hidden_size * self.vocab_size * 4

    def chunks(self, most: int, aligned: int) -> tuple[int, int]:
        """Rows of a chunk of at most so many, and how many there are: as few as possible, of one size but for the last."""
        most = min(max(most, 1), max(self.rows, 1))
        count = -(-self.rows // most) if self.rows else 0
        if count < 2:
            return most, count
        even = -(-self.rows // count)
        return min(-(-even // aligned) * aligned, most), count


def _plan_on_cpu(call: _Call, max_scratch_bytes: int) -> LinearPlan:
    rows, hidden_size, vocab_size, dtype = call[:4]
    budget = max(max_scratch_bytes - max_scratch_bytes // _PACKING_SHARE, 1)
    row_bytes = call.row_bytes(vocab_size)

    def plan(budget: int, accumulator: torch.dtype | None, product: torch.dtype | None) -> LinearPlan:
        chunk_rows, count = call.chunks(budget // row_bytes, 16)
        bytes_ = chunk_rows * row_bytes + (call.accumulator_bytes if accumulator not in (None, dtype) else 0)
        return LinearPlan(chunk_rows, count, accumulator, bytes_, row_stride=vocab_size, product=product)

    if not call.weight_grad:
        return plan(budget, None, None)
    if dtype == torch.float16:
        left = max(budget - call.accumulator_bytes, _FEWEST_ROWS * row_bytes)
        return plan(left, torch.float32, torch.float32)
    within = plan(budget, dtype, dtype)
    # rows that do not begin at 64 bytes take a slow path through the product that has them as columns
    is_slow = bool(rows) and vocab_size * dtype.itemsize % 64 != 0
    if dtype == torch.bfloat16 and (within.num_chunks > 1 or is_slow):
        all_bytes = rows * call.gathered_bytes  # the product over all rows needs their hidden states together
        parked = _parked_plan(
            rows, hidden_size, vocab_size, row_bytes - call.gathered_bytes, dtype, call.hidden_grad, budget - all_bytes
        )
        if parked is not None:
            return parked._replace(scratch_bytes=parked.scratch_bytes + all_bytes, row_stride=vocab_size, product=dtype)
    has_room = budget - call.accumulator_bytes >= _FEWEST_ROWS * row_bytes
    if dtype == torch.bfloat16 and within.num_chunks > _FEW_CHUNKS and has_room:
        return plan(budget - call.accumulator_bytes, torch.float32, dtype)
    return within


def row_stride(vocab_size: int, device: torch.device | str | float | tuple[int, int]) -> int:
    """Of a chunk's logits."""
    if not devices.is_cuda(device):
        return vocab_size
    return -(-vocab_size // CUDA_COLUMNS_ALIGNED) * CUDA_COLUMNS_ALIGNED


def _plan_on_cuda(call: _Call, device: Any, max_scratch_bytes: int | None, free_bytes: int | None) -> LinearPlan:
    rows, dtype = call.rows, call.dtype
    stride = row_stride(call.vocab_size, device)
    row_bytes = call.row_bytes(stride)
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    accumulator_bytes = call.accumulator_bytes if call.weight_grad and is_narrow else 0
    if max_scratch_bytes is None:
        budget = max(CUDA_SCRATCH_BYTES, CUDA_ROWS * row_bytes) + accumulator_bytes
        if free_bytes is not None:
            budget = max(min(budget, free_bytes // _SHARE_OF_FREE), MAX_SCRATCH_BYTES)
    else:
        budget = max_scratch_bytes

    def plan(most: int, accumulator: torch.dtype | None, product: torch.dtype | None) -> LinearPlan:
        chunk_rows, count = call.chunks(most, CUDA_ROWS_ALIGNED)
        bytes_ = chunk_rows * row_bytes + (accumulator_bytes if accumulator not in (None, dtype) else 0)
        return LinearPlan(chunk_rows, count, accumulator, bytes_, row_stride=stride, product=product)

    if not call.weight_grad:
        return plan(budget // row_bytes, None, None)
    if not is_narrow:
        return plan(budget // row_bytes, dtype, dtype)
    has_wide_product = devices.has_product_into_fp32(device, dtype)
    product = torch.float32 if has_wide_product or dtype == torch.float16 else dtype
    in_fp32 = plan(
        max((budget - accumulator_bytes) // row_bytes, min(_FEWEST_ROWS, budget // row_bytes)), torch.float32, product
    )
    if dtype == torch.float16:  # has no range for the sum over the rows
        return in_fp32
    most_chunks = 1 if has_wide_product else _FEW_CHUNKS
    rounded = plan(budget // row_bytes, dtype, dtype)
    if rounded.num_chunks <= most_chunks:
        return rounded
    if in_fp32.scratch_bytes <= budget:
        return in_fp32
    rounded = plan(-(-rows // _FEW_CHUNKS), dtype, dtype)
    return min(in_fp32, rounded, key=lambda plan: plan.scratch_bytes)


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
