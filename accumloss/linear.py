"""Linear head and cross-entropy in one: sums, counts and gradients from hidden states, without ever holding the logits.

The rows go through in chunks. A chunk's logits are a matrix product into a buffer that is reused; ``cross_entropy_with_grad_``
turns them into their gradient where they lie, with the sums as a by-product; two more products take that gradient to the
hidden states and to the weight. So nothing is computed twice, and of the logits one chunk exists at a time.

The gradient is written in forward for a factor that is known by then, and scaled by what the backward brings beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import checks, ops, reference
from .keywords import checked
from .options import SCHEMA, LossOptions

MAX_SCRATCH_BYTES = 256 * 2**20
_BLOCK_BYTES = 8 * 2**20  # of a product that is added to an accumulator
_PARKED_BLOCK_BYTES = 16 * 2**20  # at most, of the gradient of logits that makes a part of the weight's
_PACKING_SHARE = 64  # the budget's 64th is left to the matrix products, for operands in an order of their own
_ROWS_ALIGNED = 64
_FEWEST_ROWS = 256  # of a chunk, for which an accumulator is worth its memory
_FEW_CHUNKS = 3  # of bf16, whose roundings are no worse than those of products that an fp32 accumulator adds up
# A product of fewer classes at a time reads them from the cache: 3 to 12 % faster than all of them at once
_LOGITS_CLASSES = 1024  # of fp32 and fp64
_LOGITS_CLASSES_BF16 = 2048  # for _LOGITS_ROWS_BF16 and more; for fewer there is nothing to gain
_LOGITS_ROWS_BF16 = 1024


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
            aligned = -(-parked // _ROWS_ALIGNED) * _ROWS_ALIGNED
            parked = aligned if aligned <= min(hidden_size, rows - 1) else parked
            kept = rows - parked
            if not has_buffer and not (hidden_grad and kept * hidden_size >= rows * classes):
                continue
            bytes_ = kept * row_bytes + buffer
            return LinearPlan(kept, -(-parked // kept) + 1, dtype, bytes_, parked, classes, has_buffer)
        if classes <= 64:
            return None
        classes = max(classes // 128 * 64, 64)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class _Outputs(NamedTuple):
    sums: list[torch.Tensor]  # the fields of TokenSums
    hidden: torch.Tensor | None  # gradients for the factor that was given
    weight: torch.Tensor | None  # fp16: in fp32
    bias: torch.Tensor | None  # fp32 or fp64


def _run(
    factor: torch.Tensor,  # () what the gradients are multiplied by
    hidden: torch.Tensor,  # (N, H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (N,) shifted
    bias: torch.Tensor | None,  # (V,)
    class_weight: torch.Tensor | None,  # (V,)
    needs: Needs,
    options: dict[str, Any],
    num_valid: int | None,
    max_scratch_bytes: int,
) -> _Outputs:
    """Everything, below autograd."""
    H, V = hidden.shape[1], weight.shape[0]
    acc = ops.accumulation_dtype(hidden)
    rows, given = _valid_rows(labels, V, options["ignore_index"], num_valid)
    n = hidden.shape[0] if rows is None else rows.shape[0]
    plan = linear_plan(
        n, H, V, hidden.dtype, weight_grad=needs.weight, hidden_grad=needs.hidden, gathered=rows is not None,
        max_scratch_bytes=max_scratch_bytes,
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
    sums = [torch.zeros((), dtype=dtype, device=hidden.device) for dtype in _SUM_DTYPES]
    buffer = ops.scratch(hidden, plan.chunk_rows if n else 0, V)
    for part in _chunks(n, plan):
        begin = part.start
        index = None if rows is None else rows[part]
        h = hidden.index_select(0, index) if index is not None and not gathers_all else all_hidden[part]
        targets = labels[part] if index is None else labels.index_select(0, index)
        logits = buffer[: part.stop - begin]
        _product_of_logits(logits, h, weight, bias)
        if wants_grad:
            found = ops.cross_entropy_with_grad_(factor, logits, targets, class_weight, **options)
        else:
            loss_sum, num_items, total_weight, _, num_correct, entropy_sum, _ = ops.cross_entropy(
                logits, targets, class_weight, **options
            )
            found = (loss_sum, num_items, total_weight, num_correct, entropy_sum)
        for total, value in zip(sums, found, strict=True):
            total += value
        grad_h = None
        if grad_hidden is not None:
            grad_h = grad_hidden[part] if index is None else torch.empty_like(h)
        if grad_weight is not None and begin < plan.parked_rows:
            for classes, parked in _parked(grad_weight, plan):
                parked[part].copy_(logits[:, classes])
        elif grad_weight is not None and plan.block_classes:
            _product_by_blocks(grad_weight, logits, all_hidden, plan, None if plan.has_buffer else grad_h)
        elif grad_weight is not None:
            _add_product(grad_weight, logits, h, is_first=begin == 0)
        if grad_hidden is not None and grad_h is not None:
            torch.mm(logits, weight, out=grad_h)
            if index is not None:
                grad_hidden.index_copy_(0, index, grad_h)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=acc)
    if grad_weight is not None and hidden.dtype == torch.bfloat16:
        grad_weight = grad_weight.to(torch.bfloat16)
    final = [total.to(acc) if total.is_floating_point() else total for total in sums]
    if given is not None:  # fewer than there are: no row of theirs may be missing unseen
        final[0] = torch.where(given, final[0], torch.full_like(final[0], float("nan")))
    return _Outputs(final, grad_hidden, grad_weight, grad_bias)


def _chunks(rows: int, plan: LinearPlan) -> Iterator[slice]:
    """Those that are parked, then the others."""
    for first, last in ((0, plan.parked_rows), (plan.parked_rows, rows)):
        for begin in range(first, last, plan.chunk_rows):
            yield slice(begin, min(begin + plan.chunk_rows, last))


def _product_of_logits(
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


_SUM_DTYPES = (torch.float64, torch.int64, torch.float64, torch.int64, torch.float64)


def _valid_rows(
    labels: torch.Tensor, V: int, ignore_index: int, num_valid: int | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Indices of the rows that count, None for all of them; and, where their number was given, whether that held."""
    N = labels.shape[0]
    is_valid = labels != ignore_index
    if labels.device.type == "cpu":
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
        padded = min(-(-count // _ROWS_ALIGNED) * _ROWS_ALIGNED, N) if count else 0
        if padded == N:
            return None, None
        rows = is_valid.nonzero().squeeze(1)
        if padded > count:  # by rows that do not count: products over an odd number of rows take a slow path
            others = is_valid.logical_not().nonzero().squeeze(1)
            rows = torch.cat([rows, others[: padded - count]])
        return rows, None
    if num_valid is None or num_valid >= N:
        return None, None
    # those that count first, in their order; without a sync
    rows = torch.argsort(is_valid.logical_not().to(torch.int8), stable=True)[:num_valid]
    return rows, is_valid.count_nonzero() <= num_valid


def _add_product(grad_weight: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, is_first: bool) -> None:
    """grad_weight (V, H) = or += grad_logits (n, V)ᵀ hidden (n, H)"""
    if grad_weight.dtype == hidden.dtype:
        if is_first:
            torch.mm(grad_logits.t(), hidden, out=grad_weight)
        else:
            grad_weight.addmm_(grad_logits.t(), hidden)
        return
    V, H = grad_weight.shape
    if hidden.dtype == torch.float16:  # a sum over the rows may be beyond fp16
        hidden = hidden.float()
    block = max(_BLOCK_BYTES // (H * hidden.element_size()), 1)
    for begin in range(0, V, block):
        part = slice(begin, begin + block)
        product = torch.mm(grad_logits[:, part].t().to(hidden.dtype), hidden)
        if is_first:
            grad_weight[part] = product
        else:
            grad_weight[part] += product


# The op: sums, with gradients for a factor of 1 that its formula scales -----------------------------------------------


@torch.library.custom_op(
    "accumloss::linear_cross_entropy_with_grad",
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias=None, Tensor? class_weight=None, *, "
        f"bool[] needs, int shift=0, {SCHEMA}, bool metrics=False, int? num_valid=None, "
        f"int max_scratch_bytes={MAX_SCRATCH_BYTES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _with_grad(hidden, weight, labels, bias=None, class_weight=None, **given):
    checks.refuse_forward_ad("torch.ops.accumloss.linear_cross_entropy_with_grad", hidden, weight, bias, class_weight)
    needs, options, limits = _given(given)
    factor = torch.ones((), dtype=ops.accumulation_dtype(hidden), device=hidden.device)
    sums, *grads = _compute(factor, hidden, weight, labels, bias, class_weight, needs, options, limits)
    return (*sums, *[hidden.new_empty(0) if grad is None else grad for grad in grads])


def _given(given: dict[str, Any]) -> tuple[Needs, dict[str, Any], tuple[int | None, int]]:
    """The keywords of the op: needs, the options of all rows, and num_valid with max_scratch_bytes."""
    options = {"shift": 0, "metrics": False, **LossOptions().as_kwargs(), **given}
    limits = (options.pop("num_valid", None), options.pop("max_scratch_bytes", MAX_SCRATCH_BYTES))
    return Needs(*options.pop("needs")), options, limits


@_with_grad.register_fake
def _(hidden, weight, labels, bias=None, class_weight=None, **given):
    needs, options, limits = _given(given)
    _check(hidden, weight, labels, bias, class_weight, options, *limits)
    acc = ops.accumulation_dtype(hidden)
    sums = [hidden.new_empty((), dtype=d if d == torch.int64 else acc) for d in _SUM_DTYPES]
    weight_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    grads = [
        torch.empty(hidden.shape if needs.hidden else 0, dtype=hidden.dtype, device=hidden.device),
        hidden.new_empty(weight.shape, dtype=weight_dtype) if needs.weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[:1], dtype=acc) if needs.bias else hidden.new_empty(0),
    ]
    return (*sums, *grads)


def _setup(ctx, inputs, keyword_only_inputs, output):
    hidden, weight, labels, bias, class_weight = inputs
    sums, grads = output[:5], output[5:]
    ctx.given = keyword_only_inputs
    ctx.save_for_backward(hidden, weight, labels, bias, class_weight, *grads)
    ctx.mark_non_differentiable(*sums[1:], *grads)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss_sum, *_):
    if grad_loss_sum is None:
        return None, None, None, None, None
    hidden, weight, labels, bias, class_weight, *grads = ctx.saved_tensors
    needs = Needs(*ctx.given["needs"])
    inputs = (hidden, weight, bias)
    found: Any
    if torch.is_grad_enabled():
        _, options, _ = _given(ctx.given)
        found = _differentiable_grads(grad_loss_sum, inputs, needs, labels, class_weight, options)
    else:
        found = [
            (grad * grad_loss_sum).to(tensor.dtype) if needed else None
            for tensor, grad, needed in zip(inputs, grads, needs, strict=True)
        ]
    return found[0], found[1], None, found[2], None


_with_grad.register_autograd(_backward, setup_context=_setup)


def _differentiable_grads(grad_loss_sum, inputs, needs, labels, class_weight, options):
    """The gradients by way of the logits, as a graph: for a backward of the backward."""
    hidden, weight, bias = inputs
    logits = F.linear(hidden, weight, bias)
    loss_sum = ops.cross_entropy(logits, labels, class_weight, **options)[0]
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(loss_sum, wanted, grad_loss_sum, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def linear_cross_entropy(
    hidden: torch.Tensor,  # (..., H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (...)
    bias: torch.Tensor | None = None,  # (V,)
    class_weight: torch.Tensor | None = None,  # (V,)
    *,
    num_valid: int | None = None,
    max_scratch_bytes: int = MAX_SCRATCH_BYTES,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch.ops.accumloss.linear_cross_entropy: the fields of TokenSums; the first carries the gradient."""
    checks.refuse_forward_ad("torch.ops.accumloss.linear_cross_entropy", hidden, weight, labels, bias, class_weight)
    hidden, weight, bias = autocast(hidden, weight, bias)
    _check(hidden, weight, labels, bias, class_weight, options, num_valid, max_scratch_bytes)
    needs = needs_of(hidden, weight, bias)
    return _with_grad(
        hidden, weight, labels, bias, class_weight, needs=list(needs), num_valid=num_valid,
        max_scratch_bytes=max_scratch_bytes, **options,
    )[:5]  # fmt: skip


torch.library.define(
    "accumloss::linear_cross_entropy",
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias=None, Tensor? class_weight=None, *, int shift=0, "
    f"{SCHEMA}, bool metrics=False, int? num_valid=None, int max_scratch_bytes={MAX_SCRATCH_BYTES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("accumloss::linear_cross_entropy", "CompositeImplicitAutograd")(linear_cross_entropy)


def needs_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Needs:
    is_on = torch.is_grad_enabled()
    return Needs(
        is_on and hidden.requires_grad,
        is_on and weight.requires_grad,
        is_on and bias is not None and bias.requires_grad,
    )


def autocast(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors as F.linear would take them: under autocast in its dtype, fp64 left alone."""
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


# The gradient in forward, for a divisor that is known -----------------------------------------------------------------


class LinearGradInForward(torch.autograd.Function):
    """``loss_sum / divisor`` and the fields of TokenSums; the gradients of the former are made together with it.

    They are scaled in place where another gradient comes to the loss than expected, and handed out by the first backward; a repeated one (retain_graph=True) computes them again, and one
    with create_graph=True by way of the logits. fp16 gradients are written for a factor of 1: divided by the number of
    items they would underflow before a GradScaler's factor reaches them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, class_weight, divisor, expected_grad, needs, options, limits):
        # hidden (..., H), weight (V, H), labels (...), bias and class_weight (V,) or None, divisor ()
        # a quotient of tensors, as autograd's: a number over a tensor is its reciprocal times the number, an ulp off
        expected = torch.full_like(divisor, expected_grad)
        ctx.factor = torch.ones_like(divisor) if hidden.dtype == torch.float16 else expected / divisor
        ctx.needs, ctx.options, ctx.limits = needs, options, limits
        ctx.save_for_backward(hidden, weight, labels, bias, class_weight, divisor)
        sums, *ctx.grads = _compute(ctx.factor, hidden, weight, labels, bias, class_weight, needs, options, limits)
        ctx.mark_non_differentiable(*sums)
        return sums[0] / divisor, *sums

    @staticmethod
    def backward(ctx, grad_loss, *_):
        checks.refuse_forward_ad("accumloss", grad_loss)
        hidden, weight, labels, bias, class_weight, divisor = ctx.saved_tensors
        inputs, wanted = (hidden, weight, bias), grad_loss / divisor
        grads, ctx.grads = ctx.grads, None
        found: Any
        if torch.is_grad_enabled():
            found = _differentiable_grads(wanted, inputs, ctx.needs, labels, class_weight, ctx.options)
            return found[0], found[1], None, found[2], *[None] * 6
        if grads is None:
            grads = _compute(
                ctx.factor, hidden, weight, labels, bias, class_weight, ctx.needs, ctx.options, ctx.limits
            )[1:]
        ratio = wanted / ctx.factor
        found = [_finish(grad, ratio, tensor) for grad, tensor in zip(grads, inputs, strict=True)]
        return found[0], found[1], None, found[2], *[None] * 6


def _finish(grad: torch.Tensor | None, ratio: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor | None:
    if grad is None or like is None:
        return None
    ops.scale_(grad, ratio)
    return grad.to(like.dtype)


def _compute(factor, hidden, weight, labels, bias, class_weight, needs, options, limits) -> _Outputs:
    """_run for hidden (..., H) and labels (...) that are not shifted."""
    shift = options["shift"]
    _check(hidden, weight, labels, bias, class_weight, options, *limits)
    targets = reference.shift_labels(labels, shift, options["ignore_index"]) if labels.dim() else labels
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    of_rows = {name: value for name, value in options.items() if name != "shift"}
    bias = bias if bias is None else bias.detach()
    with torch.no_grad():
        found = _run(factor, rows, weight.detach(), targets.reshape(-1), bias, class_weight, needs, of_rows, *limits)
    return found if found.hidden is None else found._replace(hidden=found.hidden.view(hidden.shape))


def check(name, hidden, weight, labels, bias, class_weight, num_valid, max_scratch_bytes) -> None:
    """Shapes, and the limits; devices and dtypes are seen where the tensors are in place and cast."""
    for what, tensor in (("weight", weight), ("hidden", hidden), ("bias", bias)):
        if tensor is not None and hasattr(tensor, "placements"):
            raise RuntimeError(
                f"{name}: expected a whole {what}, got a sharded DTensor; under FSDP2 call it where the head is unsharded, "
                "inside the forward of the module that fully_shard was applied to, or after module.unshard()"
            )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{name}: expected hidden (..., H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise RuntimeError(f"{name}: expected weight (V, H) with V and H >= 1, got {tuple(weight.shape)}")
    if labels.shape != hidden.shape[:-1]:
        raise RuntimeError(
            f"{name}: expected labels of shape {tuple(hidden.shape[:-1])}, as hidden without H, got {tuple(labels.shape)}"
        )
    for what, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor {what} (V,) or None, got a {type(tensor).__name__}")
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise RuntimeError(
                f"{name}: expected {what} of shape (V,) = ({weight.shape[0]},), got {tuple(tensor.shape)}"
            )
    for what, value, least in (("num_valid", num_valid, 0), ("max_scratch_bytes", max_scratch_bytes, 1)):
        if value is None and what == "num_valid":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise ValueError(f"{name}: expected {what} >= {least}, an int, got {value!r}")


def _check(hidden, weight, labels, bias, class_weight, options, num_valid, max_scratch_bytes) -> None:
    """Everything that can be known without a look at the values."""
    name = "linear_cross_entropy"
    check(name, hidden, weight, labels, bias, class_weight, num_valid, max_scratch_bytes)
    checks.check_options(name, hidden, **options)
    if labels.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{name}: expected int64 or int32 labels, got {labels.dtype}")
    for what, tensor in (("weight", weight), ("labels", labels), ("bias", bias), ("class_weight", class_weight)):
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(f"{name}: expected {what} on hidden's device {hidden.device}, got {tensor.device}")
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise RuntimeError(f"{name}: expected {what} of hidden's dtype {hidden.dtype}, got {tensor.dtype}")
    for what, tensor in (("hidden", hidden), ("class_weight", class_weight)):
        if tensor is not None and tensor.dtype not in ops.DTYPES:
            raise RuntimeError(f"{name}: expected {what} of bfloat16, float16, float32 or float64, got {tensor.dtype}")
    if class_weight is not None:
        checks.check_class_weight(name, "class_weight", class_weight, weight.shape[0], hidden, "hidden")
    if options.get("shift", 0) > 0 and hidden.dim() < 2:
        raise RuntimeError(f"{name}: expected hidden (..., T, H) where shift > 0, got {tuple(hidden.shape)}")
