"""Cross-entropy over a vocabulary that several processes share: no logits are gathered, and backward communicates nothing.

Each process reduces a row to a few numbers over the classes of its own (``cross_entropy_shard``). One all_gather shares
them, and ``merge`` makes of them the row of the whole vocabulary, alike in every process. The gradient of the local
logits needs that row's lse and nll alone, so that backward is local.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from . import checks, ops, reference
from ._compat import all_gather_single
from .arguments import check_class_weight, check_vocab_size
from .options import LossOptions
from .sums import wide_dtype, widened


class Shard(NamedTuple):
    """Which classes of a vocabulary are this process's: cut as torch.chunk cuts, and DTensor."""

    group: Any  # the process group that shares it
    size: int  # processes
    chunk: int  # classes of each process, but for the last that have any
    class_offset: int
    num_classes: int
    vocab_size: int
    refusal: Exception | None = None  # why this process takes no part; raised by forward(), when all have heard of it

    @property
    def kwargs(self) -> dict[str, int]:
        """As the ops take it."""
        return {"class_offset": self.class_offset, "vocab_size": self.vocab_size}


def shard_of(name: str, what: str, num_classes: int, group: Any, vocab_size: int | None) -> Shard:
    """The classes of this process, num_classes of them. what: the tensor that has them, for the error.

    Where vocab_size is not cut as torch.chunk cuts it, which may be so in this process alone, it is a refusal.

    Raises:
        ValueError: vocab_size is no size.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{name}: expected a group that this process is of, got one that it is not")
    if vocab_size is None:
        vocab_size = num_classes * size
    elif isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or not 1 <= vocab_size < 2**53:
        raise ValueError(f"{name}: expected vocab_size >= 1, an int, or None, got {vocab_size!r}")
    chunk = -(-vocab_size // size)
    begin = min(rank * chunk, vocab_size)
    count = min(chunk, vocab_size - begin)
    shard = Shard(group, size, chunk, begin, num_classes, vocab_size)
    if num_classes == count and vocab_size > 0:
        return shard
    return _refused(
        shard,
        ValueError(
            f"{name}: expected {what} with {count} classes, [{begin}, {begin + count}) of vocab_size {vocab_size}, on rank "
            f"{rank} of {size}, cut as torch.chunk cuts, got {num_classes}"
        ),
    )


REFUSED = -1  # in the place of vocab_size


def _refused(shard: Shard, error: Exception) -> Shard:
    """The shard with an error that this process may be alone with: the others would wait for one that raises at once."""
    if torch.compiler.is_compiling():
        raise error
    return shard if shard.refusal is not None else shard._replace(refusal=error)


class Rows(NamedTuple):
    """The sums of a call, and what is told of each row, 0 where it is ignored: the same in every process of the group."""

    sums: tuple[torch.Tensor, ...]  # the fields of TokenSums
    lse: torch.Tensor  # (...) double
    nll: torch.Tensor  # (...)
    loss: torch.Tensor  # (...)
    entropy: torch.Tensor  # (...); (0,) without metrics, as is what follows
    argmax: torch.Tensor  # (...) int64, -1 where a row is ignored; (0,) where nobody has asked for it


def forward(
    name: str,
    logits: torch.Tensor,  # (..., num_classes)
    labels: torch.Tensor,  # (...) of the whole vocabulary, not shifted
    weight: torch.Tensor | None,  # (vocab_size,)
    shard: Shard,
    options: LossOptions,
    metrics: bool,
    finds_argmax: bool = False,
) -> Rows:
    """One read of the logits, and one all_gather of 16 bytes a row and process: 8 more with smoothing, 16 with metrics, 16 with
    the argmax, 8 for logits of float64; and 16 a call, by which the processes see that they have the same vocabulary and
    labels."""
    error: Exception | None = None
    if torch.compiler.is_compiling():
        columns = columns_of(logits, labels, weight, shard, options, metrics)
    else:
        try:
            if shard.refusal is not None:
                raise shard.refusal
            columns = columns_of(logits, labels, weight, shard, options, metrics)
        except Exception as raised:  # told when all have met: the others would wait
            error = raised
            count = ops.shard_columns(options.label_smoothing, metrics)
            wide = wide_dtype(logits.device)
            columns = torch.full((count, *labels.shape), torch.nan, dtype=wide, device=logits.device)
    # of a label that only looks bad, since the vocabulary is another, the sizes tell more
    refusal = None if isinstance(error, IndexError) else error
    leaders = [(columns[:2] if error else largest_of(logits, shard)).flatten()] if finds_argmax else []
    has_pairs = columns.dtype == torch.float64 != logits.dtype
    if has_pairs:
        columns = _paired(columns)
    packed = torch.cat(
        [columns.flatten(), *leaders, columns.new_full((1,), shard.vocab_size), _checksum(labels).view(1)]
    )
    if refusal is not None:
        packed = _written_over(packed, f"{type(refusal).__name__}: {refusal}")
    gathered = packed.new_empty(shard.size * packed.numel())
    if torch.compiler.is_compiling():
        all_gather_single(gathered, packed, group=shard.group)
    else:
        try:
            all_gather_single(gathered, packed, group=shard.group)
        except RuntimeError as failed:
            raise refusal or RuntimeError(
                f"{name}: the all_gather of {packed.numel()} numbers failed; expected as many rows, the same dtype, metrics and "
                "label smoothing in all processes of the group; TORCH_DISTRIBUTED_DEBUG=DETAIL says what the others sent"
            ) from failed
    if refusal is not None:
        raise refusal
    gathered = gathered.view(shard.size, packed.numel())
    sizes, checksums = gathered[:, -2], gathered[:, -1]
    if gathered.is_cpu and not torch.compiler.is_compiling():
        _tell_refusals(name, gathered)
        _refuse_sizes(name, sizes, shard)
        if (checksums != checksums[0]).any():
            raise ValueError(
                f"{name}: expected the same labels in all processes that share the vocabulary, got others on some; the data is "
                "shared out over other processes than the vocabulary"
            )
    if error is not None:
        raise error
    dtype = ops.accumulation_dtype(logits)
    of_rows = gathered[:, :-2].view(shard.size, len(columns) + 2 * finds_argmax, *labels.shape)
    of_shards = of_rows[:, : len(columns)]
    rows = merge(_unpaired(of_shards) if has_pairs else of_shards, labels, weight, shard, options, metrics, dtype)
    # elsewhere it cannot be known without a sync
    is_one = (sizes == shard.vocab_size).all() & (checksums == checksums[0]).all()
    loss_sum, loss = (torch.where(is_one, value, float("nan")) for value in (rows.sums[0], rows.loss))
    rows = rows._replace(sums=(loss_sum, *rows.sums[1:]), loss=loss)
    if not finds_argmax:
        return rows
    values, classes = of_rows[:, -2], of_rows[:, -1]
    first = classes.gather(0, values.argmax(0, keepdim=True)).squeeze(0).long()  # NaN is the largest
    return rows._replace(argmax=torch.where(labels == options.ignore_index, -1, first))


def _written_over(packed: torch.Tensor, text: str) -> torch.Tensor:
    """What a process sends that takes no part: REFUSED, and as much of the text as the rows have bytes."""
    said = torch.zeros(packed.numel() * packed.element_size(), dtype=torch.uint8)
    letters = text.encode()[: said.numel() - 2 * packed.element_size()]
    said[: len(letters)] = torch.tensor(list(letters), dtype=torch.uint8)
    said = said.view(packed.dtype)
    said[-2] = REFUSED
    return said.to(packed.device)


def _tell_refusals(name: str, gathered: torch.Tensor) -> None:
    """Raises what another process of the group has refused."""
    refused = (gathered[:, -2] == REFUSED).nonzero().flatten().tolist()
    if refused:
        letters = gathered[refused[0], :-2].contiguous().view(torch.uint8).tolist()
        said = bytes(letters).rstrip(b"\0").decode(errors="ignore")
        raise RuntimeError(f"{name}: rank {refused[0]} of the group takes no part in this call: {said}")


def largest_of(logits: torch.Tensor, shard: Shard) -> torch.Tensor:
    """(2, ...) in the widest dtype: the largest of the local logits, and its class."""
    if shard.num_classes == 0:
        return logits.new_full((2, *logits.shape[:-1]), -torch.inf, dtype=wide_dtype(logits.device))
    values, places = logits.detach().max(-1)
    return torch.stack([widened(values), widened(places + shard.class_offset)])


def _paired(columns: torch.Tensor) -> torch.Tensor:
    """The bits of (columns, ...) double, of which max and target are float: those two as one number."""
    both = torch.stack([columns[0], columns[2]], -1).float().view(torch.float64).squeeze(-1)
    return torch.cat([both.unsqueeze(0), columns[1:2], columns[3:]])


def _unpaired(gathered: torch.Tensor) -> torch.Tensor:
    """What _paired() was given, of each process: (size, columns, ...)."""
    both = gathered[:, :1].contiguous().unsqueeze(-1).view(torch.float32).double()
    return torch.cat([both[..., 0], gathered[:, 1:2], both[..., 1], gathered[:, 2:]], 1)


def _checksum(labels: torch.Tensor) -> torch.Tensor:
    """() in the widest dtype: a number that other labels would hardly have, nor the same in another order."""
    places = torch.arange(1, labels.numel() + 1, device=labels.device) * 2654435761
    digits = 52 if wide_dtype(labels.device) == torch.float64 else 23
    return widened(((labels.flatten().long() + 1) * places).sum().bitwise_and(2**digits - 1))


def columns_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    shard: Shard,
    options: LossOptions,
    metrics: bool,
) -> torch.Tensor:
    """What this process tells the others of each row: ShardColumns of csrc/row.h, (columns, ...) double."""
    if shard.num_classes > 0:
        return ops.cross_entropy_shard(logits, labels, weight, **shard.kwargs, **options.as_kwargs(), metrics=metrics)
    # a vocabulary of fewer classes than processes; labels are compared as elsewhere, or the others would wait
    one = {"class_offset": 0, "vocab_size": shard.vocab_size, **options.as_kwargs(), "metrics": metrics}
    columns = ops.cross_entropy_shard(logits.new_zeros(*labels.shape, 1), labels, weight, **one).zero_()
    columns[:2] = -torch.inf
    columns[2] = torch.nan
    if metrics:
        columns[-1] = -torch.inf
    return columns


def merge(
    gathered: torch.Tensor,  # (size, columns, ...) double: ShardColumns of csrc/row.h, of each process
    labels: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (vocab_size,)
    shard: Shard,
    options: LossOptions,
    metrics: bool,
    dtype: torch.dtype,
) -> Rows:
    """row_result() of csrc/row.h, of all rows at once."""
    is_item = labels != options.ignore_index
    zero = torch.zeros((), dtype=gathered.dtype, device=labels.device)
    labels = torch.where(is_item, labels, torch.zeros_like(labels)).long()
    owner = (labels // shard.chunk).clamp(0, shard.size - 1)  # of bad labels too, whose rows are NaN
    target = gathered[:, 2].gather(0, owner.unsqueeze(0)).squeeze(0)  # NaN where the processes have other labels
    largest = torch.maximum(gathered[:, 0].amax(0), target)
    top = torch.where(largest.isfinite(), largest, zero)
    # log-sum-exps about top, so that what is far from 0 swallows none of them
    each = (gathered[:, 0] - top) + gathered[:, 1]
    others, own = torch.logsumexp(each, 0), target - top
    gap = others - own
    nll = torch.where(largest.isfinite(), torch.logaddexp(gap, zero), float("nan"))
    # a label that far below adds nothing, and would swallow the digits of lse
    is_far_below = gap > 1024
    lse = torch.where(is_far_below, top + others, target + nll)
    lse_about_top = torch.where(is_far_below, others, own + nll)
    item_weight = zero + 1
    if weight is not None:
        weights = weight.to(dtype).to(gathered.dtype)
        item_weight = weights[labels.clamp(0, shard.vocab_size - 1)]
    loss = (1 - options.label_smoothing) * item_weight * nll
    if options.label_smoothing > 0:
        of_classes = weights if weight is not None else gathered.new_ones(shard.vocab_size)
        of_classes = torch.nn.functional.pad(of_classes, (0, shard.size * shard.chunk - shard.vocab_size))
        weight_sums = of_classes.view(shard.size, *[1] * labels.dim(), shard.chunk).sum(-1)
        about = torch.where(gathered[:, 2].isfinite(), gathered[:, 2], zero)
        about = torch.where(gathered[:, 0].isfinite(), gathered[:, 0], about)
        spread = (weight_sums * (lse_about_top + (top - about)) - gathered[:, 3]).sum(0)
        loss = loss + options.label_smoothing / shard.vocab_size * spread
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse * lse
    num_items = is_item.sum()
    total_weight = torch.where(is_item, item_weight, zero).sum() if weight is not None else num_items
    num_correct, entropy_sum, entropy_of_rows = torch.zeros_like(num_items), zero, zero.new_empty(0)
    if metrics:
        entropy, best = gathered[:, -2], gathered[:, -1]
        share, own_share = torch.exp(each - lse_about_top), torch.exp(-nll)
        parts = torch.where(share == 0, zero, share * (entropy + (lse_about_top - each))).sum(0)
        of_rows = parts + torch.where(own_share == 0, zero, own_share * nll)
        entropy_of_rows = torch.where(is_item, of_rows, zero)
        entropy_sum = entropy_of_rows.sum()
        # torch.argmax is the first of the largest
        ranks = torch.arange(shard.size, device=labels.device).view(-1, *[1] * labels.dim())
        mine = best.gather(0, owner.unsqueeze(0))
        wins = torch.where(ranks < owner, best < mine, best <= mine).all(0)
        num_correct = (wins & is_item & ~nll.isnan()).sum()
    loss, lse, nll = (torch.where(is_item, value, zero) for value in (loss, lse, nll))
    sums = (loss.sum().to(dtype), num_items, total_weight.to(dtype), num_correct, entropy_sum.to(dtype))
    nll, loss, entropy_of_rows = (value.to(dtype).contiguous() for value in (nll, loss, entropy_of_rows))
    return Rows(sums, lse.contiguous(), nll, loss, entropy_of_rows, num_items.new_empty(0))


def backward(
    grad_loss_sum: torch.Tensor,  # ()
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,  # (...) of the whole vocabulary, as is nll
    nll: torch.Tensor,
    weight: torch.Tensor | None,
    shard: Shard,
    options: LossOptions,
    in_place: bool = False,
) -> torch.Tensor:
    """The gradient of the local logits, which it may be written over: a second read of them, nothing else."""
    if shard.num_classes == 0:
        return logits if in_place else torch.empty_like(logits)
    op = ops.cross_entropy_shard_backward_ if in_place else ops.cross_entropy_shard_backward
    kwargs = {**shard.kwargs, **options.as_kwargs()}
    found = op(grad_loss_sum, logits, labels, lse, nll, weight, **kwargs)
    return logits if in_place else found


class VocabParallel(torch.autograd.Function):
    """The fields of TokenSums, of which loss_sum carries the gradient. In place: it overwrites the logits, in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor | None,
        name: str,
        shard: Shard,
        options: LossOptions,
        metrics: bool,
        in_place: bool,
    ) -> tuple[torch.Tensor, ...]:
        rows = forward(name, logits, labels, weight, shard, options, metrics)
        ctx.save_for_backward(logits, labels, rows.lse, rows.nll, weight)
        ctx.shard, ctx.options, ctx.in_place = shard, options, in_place
        ctx.mark_non_differentiable(*rows.sums[1:])
        ctx.set_materialize_grads(False)
        return rows.sums

    @staticmethod
    def backward(ctx: Any, grad_loss_sum: torch.Tensor | None, *_: Any) -> tuple:
        if grad_loss_sum is None:
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(ops.NO_SECOND_DERIVATIVE)
        logits, labels, lse, nll, weight = ctx.saved_tensors  # raises where the logits changed since
        checks.refuse_forward_ad("accumloss", grad_loss_sum)
        data = logits.detach() if ctx.in_place else logits
        grad = backward(grad_loss_sum, data, labels, lse, nll, weight, ctx.shard, ctx.options, ctx.in_place)
        if ctx.in_place:
            torch.autograd.graph.increment_version(logits)
        return grad, *(None,) * 7


class VocabParallelInPlace(torch.autograd.Function):
    """The loss, loss_sum / divisor, and the fields of TokenSums; its gradient overwrites the logits in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor | None,
        divisor: torch.Tensor,
        expected_grad: float,
        name: str,
        shard: Shard,
        options: LossOptions,
        metrics: bool,
    ) -> tuple[torch.Tensor, ...]:
        data = logits.detach()
        rows = forward(name, data, labels, weight, shard, options, metrics)
        factor = ops.expected_factor(expected_grad, divisor)
        ctx.grad = backward(factor, data, labels, rows.lse, rows.nll, weight, shard, options, in_place=True)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits for its own backward must notice
        ctx.expected_grad = expected_grad
        ctx.mark_non_differentiable(*rows.sums)
        return rows.sums[0] / divisor, *rows.sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple:
        return ops.gradient_handed_out(ctx, grad_loss), *(None,) * 8


class VocabParallelRows(torch.autograd.Function):
    """What token_statistics returns: loss, nll, lse, entropy and argmax (...), all but the last with gradients. In place: it
    overwrites the logits, in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor | None,
        name: str,
        shard: Shard,
        options: LossOptions,
        metrics: bool,
        in_place: bool,
    ) -> tuple[torch.Tensor, ...]:
        rows = forward(name, logits, labels, weight, shard, options, metrics, finds_argmax=metrics)
        nll = torch.where(rows.loss.isnan(), rows.loss, rows.nll)  # of a vocabulary that the processes do not share
        ctx.save_for_backward(logits, labels, nll, rows.lse, rows.entropy, weight)
        ctx.shard, ctx.options, ctx.metrics, ctx.in_place = shard, options, metrics, in_place
        ctx.mark_non_differentiable(rows.argmax)
        ctx.set_materialize_grads(False)
        return rows.loss, nll, rows.lse, rows.entropy, rows.argmax

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        given = grads[:4] if ctx.metrics else (*grads[:3], None)
        if all(grad is None for grad in given):
            return (None,) * 8
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(ops.NO_SECOND_DERIVATIVE)
        logits, labels, nll, lse, entropy, weight = ctx.saved_tensors  # raises where the logits changed since
        checks.refuse_forward_ad("accumloss", *given)
        if ctx.shard.num_classes == 0:
            return torch.empty_like(logits), *(None,) * 7
        kwargs = {**ctx.shard.kwargs, **ctx.options.as_kwargs()}
        if not ctx.in_place:
            found = ops.token_statistics_backward(*given, logits, labels, nll, lse, entropy, weight, **kwargs)
            return found, *(None,) * 7
        data = logits.detach()
        ops.token_statistics_backward_(*given, data, labels, nll, lse, entropy, weight, **kwargs)
        torch.autograd.graph.increment_version(logits)
        return data, *(None,) * 7


# DTensors -------------------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> TypeGuard[Any]:
    """Whether it is one; torch.distributed.tensor is not imported for the question."""
    return type(tensor) is not torch.Tensor and hasattr(tensor, "device_mesh")


class Overwritten(torch.autograd.Function):
    """The local tensor of a DTensor that a backward, or the forward before it, overwrites: raises the version of the DTensor.

    The two have versions of their own, and autograd has saved the DTensor.
    """

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, dtensor: torch.Tensor) -> torch.Tensor:
        ctx.dtensor = dtensor  # detached: of one version with what it was detached from
        return local.view_as(local)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        torch.autograd.graph.increment_version(ctx.dtensor)
        return grad, None


class Part(NamedTuple):
    """What of a call is this process's."""

    logits: torch.Tensor  # (..., V) local, or hidden states (..., H)
    labels: torch.Tensor  # (...) of its rows, shifted
    weight: torch.Tensor | None  # class weights (V,) of the whole vocabulary
    shard: Shard | None  # of the vocabulary, where it has not the whole
    mesh: Any = None  # of the DTensors
    placements: tuple[Any, ...] = ()  # of the sums over its rows
    row_placements: tuple[Any, ...] = ()  # of what is told of each of them
    row_shape: torch.Size | None = None  # (...) of all rows

    def whole(self, of_rows: torch.Tensor) -> torch.Tensor:
        """A sum over its rows, summed over those of all processes; without a gradient."""
        return of_rows if self.mesh is None else self.wrap(of_rows).full_tensor()

    def wrap(self, of_rows: Any) -> Any:
        """A sum over its rows as a DTensor: Partial over the dimensions of the mesh that share the rows out."""
        if self.mesh is None or of_rows is None:
            return of_rows
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(of_rows, self.mesh, self.placements, run_check=False)

    def wrap_rows(self, of_rows: Any) -> Any:
        """What is told of each row (...) as a DTensor, placed as the rows are."""
        if self.mesh is None:
            return of_rows
        from torch.distributed.tensor import DTensor

        assert self.row_shape is not None
        stride = torch.empty(self.row_shape, device="meta").stride()
        return DTensor.from_local(
            of_rows, self.mesh, self.row_placements, run_check=False, shape=self.row_shape, stride=stride
        )


def is_parallel(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> bool:
    return group is not None or is_dtensor(logits) or is_dtensor(labels)


def check_group(name: str, group: Any) -> None:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: expected a torch.distributed.ProcessGroup or None for group, got {group!r}")


def checked_part_of(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    shift: int,
    options: LossOptions,
    group: Any,
    vocab_size: int | None,
) -> Part:
    """part_of() of checked arguments, its labels and weight where its logits are."""
    check_group(name, group)
    if group is None:
        check_vocab_size(name, logits, vocab_size)
    if logits.dim() < 1:
        raise RuntimeError(f"{name}: expected logits of shape (..., V), got a 0-dim tensor")
    part = part_of(name, logits, labels, weight, shift, options.ignore_index, group, vocab_size)
    num_classes = part.logits.shape[-1] if part.shard is None else part.shard.vocab_size
    try:
        check_class_weight(name, "weight", part.weight, torch.Size([num_classes]))
    except (RuntimeError, TypeError) as error:
        if part.shard is None:
            raise
        part = part._replace(shard=_refused(part.shard, error))
    device = part.logits.device
    weight = part.weight if part.weight is None else part.weight.to(device, non_blocking=True)
    return part._replace(labels=part.labels.to(device, non_blocking=True), weight=weight)


def part_of(
    name: str,
    logits: torch.Tensor,  # (..., V)
    labels: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,)
    shift: int,
    ignore_index: int,
    group: Any,
    vocab_size: int | None,
) -> Part:
    """This process's part of a call, with group= or on DTensors. Labels are handed on shifted.

    Raises:
        ValueError: DTensors whose placements do not fit: both are named, and the remedy.
    """
    if not is_dtensor(logits):
        for what, tensor in (("labels", labels), ("weight", weight)):
            if is_dtensor(tensor):
                raise ValueError(
                    f"{name}: expected plain {what} beside plain logits, got a DTensor placed {_placed(tensor)}; pass "
                    f"{what}.full_tensor() or {what}.to_local(), whichever has the rows of these logits"
                )
        own = shard_of(name, "logits (..., V / ranks)", logits.shape[-1], group, vocab_size)
        return Part(logits, shifted(labels, shift, ignore_index), weight, own)

    if group is not None:
        raise ValueError(f"{name}: expected no group= beside a DTensor, whose mesh has it, got one; leave it out")
    rows, vocabulary = row_placements(name, "logits", logits)
    mesh = logits.device_mesh
    local = logits.to_local()
    shard: Shard | None = None
    if vocabulary is not None:
        shard = shard_of(
            name, "logits.to_local() (..., V)", local.shape[-1], mesh.get_group(vocabulary), logits.shape[-1]
        )
    labels = labels_of(name, "logits", logits, labels, rows, shift, ignore_index)
    return Part(local, labels, _whole_weight(name, weight), shard, mesh, sums_over(rows), rows, logits.shape[:-1])


class LinearPart(NamedTuple):
    """What of a call with hidden states and a weight is this process's."""

    hidden: torch.Tensor  # (..., H) of all rows that the processes of the vocabulary share
    weight: torch.Tensor  # (V, H) local
    bias: torch.Tensor | None  # (V,) local
    part: Part  # of it logits are hidden
    is_summed: bool  # whether the gradient of hidden has to be summed over the processes here


def linear_part_of(
    name: str,
    hidden: torch.Tensor,  # (..., H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (...)
    bias: torch.Tensor | None,  # (V,)
    class_weight: torch.Tensor | None,  # (V,)
    shift: int,
    ignore_index: int,
    group: Any,
    vocab_size: int | None,
    is_summed: bool,
) -> LinearPart:
    """This process's part of a call of linear_cross_entropy, with group= or on DTensors.

    On each dimension of the mesh weight is replicated, or sharded by classes. Where it is sharded, hidden states that share
    their rows out are gathered, and their gradient is left Partial.

    Raises:
        ValueError: placements that do not fit: both are named, and the remedy.
        RuntimeError: a weight that is a DTensor, as FSDP2 leaves it too, beside plain hidden states without a group.
    """
    if not is_dtensor(hidden):
        if group is None:
            raise RuntimeError(
                f"{name}: expected a whole weight, got a sharded DTensor placed {_placed(weight)} beside plain hidden states; "
                "under FSDP2 call it where the head is unsharded, inside the forward of the module that fully_shard was "
                "applied to, or after module.unshard(); where processes share the vocabulary, and have the same hidden states, "
                "pass group=, or DTensor.from_local(hidden, weight.device_mesh, ...)"
            )
        if is_dtensor(labels):
            raise ValueError(
                f"{name}: expected plain labels beside plain hidden, got a DTensor placed {_placed(labels)}"
            )
        if is_dtensor(weight):
            vocab_size = weight.shape[0] if vocab_size is None else vocab_size
            weight, bias = _of_group(name, "weight", weight, group), _of_group(name, "bias", bias, group)
        own = shard_of(name, "weight (V / ranks, H)", weight.shape[0], group, vocab_size)
        if vocab_size is None:
            _check_same_size(name, own, weight.device)
        part = Part(hidden, shifted(labels, shift, ignore_index), _whole_weight(name, class_weight), own)
        return LinearPart(hidden, weight, bias, part, is_summed)

    from torch.distributed.tensor import Partial, Replicate

    if group is not None:
        raise ValueError(f"{name}: expected no group= beside a DTensor, whose mesh has it, got one; leave it out")
    if not is_dtensor(weight) or weight.device_mesh != hidden.device_mesh:
        got = f"a DTensor on {_mesh(weight.device_mesh)}" if is_dtensor(weight) else "a plain tensor"
        raise ValueError(
            f"{name}: expected weight as a DTensor on the mesh of hidden, placed {_placed(hidden)} on "
            f"{_mesh(hidden.device_mesh)}, got {got}; distribute_tensor(weight, hidden.device_mesh, ...)"
        )
    mesh = hidden.device_mesh
    rows, of_columns = row_placements(name, "hidden", hidden)
    vocabulary = [i for i, placement in enumerate(weight.placements) if placement.is_shard(0)]
    fits = of_columns is None and len(vocabulary) < 2
    if not fits or not all(placement.is_shard(0) or placement.is_replicate() for placement in weight.placements):
        raise ValueError(
            f"{name}: expected weight (V, H) placed Shard(dim=0) on one dimension of the mesh at most, else Replicate(), and "
            f"hidden (..., H) sharded by rows or replicated, got weight placed {_placed(weight)} and hidden placed "
            f"{_placed(hidden)}; redistribute one of them"
        )
    if bias is not None and (not is_dtensor(bias) or bias.placements != weight.placements):
        got = _placed(bias) if is_dtensor(bias) else "nowhere: a plain tensor"
        raise ValueError(f"{name}: expected bias placed as weight is, {_placed(weight)}, got {got}; redistribute it")
    rows = tuple(Replicate() if i in vocabulary else placement for i, placement in enumerate(rows))
    whole_rows = hidden if rows == tuple(hidden.placements) else hidden.redistribute(placements=rows)
    of_hidden = [Partial() if i in vocabulary else placement for i, placement in enumerate(rows)]
    of_weight = [Partial() if row.is_shard() else own for row, own in zip(rows, weight.placements, strict=True)]
    shard: Shard | None = None
    local = weight.to_local(grad_placements=of_weight)
    if vocabulary:
        shard = shard_of(
            name, "weight.to_local() (V, H)", local.shape[0], mesh.get_group(vocabulary[0]), weight.shape[0]
        )
    local_hidden = whole_rows.to_local(grad_placements=of_hidden)
    targets = labels_of(name, "hidden", whole_rows, labels, rows, shift, ignore_index)
    part = Part(local_hidden, targets, _whole_weight(name, class_weight), shard, mesh, sums_over(rows))
    local_bias = bias if bias is None else bias.to_local(grad_placements=of_weight)
    return LinearPart(local_hidden, local, local_bias, part, False)


def _of_group(name: str, what: str, tensor: Any, group: Any) -> Any:
    """What this process has of a DTensor that is sharded by classes over the group, and not sharded otherwise."""
    if not is_dtensor(tensor):
        return tensor
    mesh = tensor.device_mesh
    fits = all(
        placement.is_replicate() or (placement.is_shard(0) and mesh.get_group(i) == group)
        for i, placement in enumerate(tensor.placements)
    )
    if not fits or not any(placement.is_shard(0) for placement in tensor.placements):
        raise ValueError(
            f"{name}: expected {what} placed Shard(dim=0) over the group that is given, and replicated otherwise, got a DTensor "
            f"placed {_placed(tensor)} on {_mesh(mesh)}; under FSDP2 call it where the head is unsharded"
        )
    return tensor.to_local()


def _check_same_size(name: str, shard: Shard, device: torch.device) -> None:
    """That no process has taken another size for that of the vocabulary: before labels are compared with it."""
    mine = torch.full((1,), shard.vocab_size, dtype=torch.int64, device=device)
    sizes = mine.new_empty(shard.size)
    all_gather_single(sizes, mine, group=shard.group)
    if sizes.is_cpu:
        _refuse_sizes(name, sizes, shard)


def _refuse_sizes(name: str, sizes: torch.Tensor, shard: Shard) -> None:
    if (sizes != shard.vocab_size).any():
        raise ValueError(
            f"{name}: expected one vocabulary in all processes of the group, got vocab_size {[int(n) for n in sizes]}; give "
            "vocab_size= where the shards are not of one size"
        )


def shifted(labels: torch.Tensor, shift: int, ignore_index: int) -> torch.Tensor:
    return reference.shift_labels(labels, shift, ignore_index) if shift and labels.dim() else labels


def row_placements(name: str, what: str, tensor: Any) -> tuple[tuple[Any, ...], int | None]:
    """How the rows of a DTensor (..., V) are placed, and the dimension of the mesh that shares the last one of it."""
    from torch.distributed.tensor import Replicate, Shard

    last = tensor.dim() - 1
    found: list[Any] = []
    vocabulary: list[int] = []
    for i, placement in enumerate(tensor.placements):
        if type(placement) is not Shard and not placement.is_replicate():
            raise ValueError(
                f"{name}: expected {what} placed Shard or Replicate on each dimension of the mesh, got {_placed(tensor)}; "
                f"{what}.redistribute(placements=...) makes one of the other"
            )
        if placement.is_shard(last):
            vocabulary.append(i)
        found.append(Replicate() if placement.is_shard(last) else placement)
    if len(vocabulary) > 1:
        raise ValueError(
            f"{name}: expected {what} (..., V) with V sharded over one dimension of the mesh, got {_placed(tensor)}; "
            f"redistribute {what}, or flatten these dimensions of the mesh into one"
        )
    return tuple(found), vocabulary[0] if vocabulary else None


def sums_over(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """The placements of a sum over rows so placed."""
    from torch.distributed.tensor import Partial, Replicate

    return tuple(Partial() if placement.is_shard() else Replicate() for placement in rows)


def labels_of(
    name: str, what: str, like: Any, labels: torch.Tensor, rows: tuple[Any, ...], shift: int, ignore_index: int
) -> torch.Tensor:
    """The labels (...) of this process's rows of a DTensor, shifted. Nothing is communicated.

    Plain labels are those of all rows. DTensors are placed as the rows are, or replicated.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    if not is_dtensor(labels):
        whole = shifted(labels, shift, ignore_index).to(like.device)
        labels = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return labels.redistribute(placements=rows).to_local()

    time = labels.dim() - 1
    fits = labels.device_mesh == mesh and all(
        mine.is_replicate() or mine == row for mine, row in zip(labels.placements, rows, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected labels placed as the rows of {what} are, {_written(rows)}, or replicated, got {what} placed "
            f"{_placed(like)} on {_mesh(mesh)} and labels placed {_placed(labels)} on {_mesh(labels.device_mesh)}; "
            f"redistribute one of them, or pass labels that are no DTensor, of all rows"
        )
    if shift and any(placement.is_shard(time) for placement in labels.placements):
        raise ValueError(
            f"{name}: expected labels whole along time, as they are shifted by {shift} here, got {what} placed "
            f"{_placed(like)} and labels placed {_placed(labels)}; pass shift_labels=, which are shifted before they are "
            "sharded, or labels that are no DTensor, of all rows"
        )
    local = shifted(labels.to_local(), shift, ignore_index)
    return DTensor.from_local(local, mesh, labels.placements, run_check=False).redistribute(placements=rows).to_local()


def _whole_weight(name: str, weight: Any) -> Any:
    if not is_dtensor(weight):
        return weight
    if not all(placement.is_replicate() for placement in weight.placements):
        raise ValueError(
            f"{name}: expected class weights (V,) of the whole vocabulary, got a DTensor placed {_placed(weight)}; pass "
            "weight.full_tensor()"
        )
    return weight.to_local()


def _placed(tensor: Any) -> str:
    return _written(tensor.placements)


def _written(placements: Any) -> str:
    return "(" + ", ".join(map(repr, placements)) + ")"


def _mesh(mesh: Any) -> str:
    return f"a mesh of {tuple(mesh.shape)}"
