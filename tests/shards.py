"""A vocabulary cut into shards in one process: what several would compute, without them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from cases import Case

from accumloss import parallel, reference


def shards_of(vocab_size: int, size: int) -> list[parallel.Shard]:
    """What each of so many processes has of a vocabulary; the last may have nothing."""
    chunk = -(-vocab_size // size)
    cuts = [min(rank * chunk, vocab_size) for rank in range(size + 1)]
    return [
        parallel.Shard(None, size, chunk, begin, end - begin, vocab_size) for begin, end in itertools.pairwise(cuts)
    ]


def part(logits: torch.Tensor, shard: parallel.Shard) -> torch.Tensor:
    """The logits (..., num_classes) of a shard, in memory of their own."""
    return logits[..., shard.class_offset : shard.class_offset + shard.num_classes].contiguous()


def merged(
    case: Case,
    size: int,
    columns_of: Callable[..., torch.Tensor] = parallel.columns_of,  # (logits, labels, weight, shard, options, metrics)
    metrics: bool = True,
) -> tuple[parallel.Rows, torch.Tensor, list[parallel.Shard]]:
    """The rows of the whole vocabulary from those of its shards; the labels (...), shifted; the shards."""
    labels = reference.shift_labels(case.labels, case.shift, case.options.ignore_index)
    shards = shards_of(case.logits.shape[-1], size)
    columns = [columns_of(part(case.logits, s), labels, case.weight, s, case.options, metrics) for s in shards]
    dtype = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    rows = parallel.merge(torch.stack(columns), labels, case.weight, shards[0], case.options, metrics, dtype)
    return rows, labels, shards


def seven_outputs(rows: parallel.Rows) -> tuple[torch.Tensor, ...]:
    """As torch.ops.accumloss.cross_entropy returns them."""
    loss_sum, num_items, total_weight, num_correct, entropy_sum = rows.sums
    return loss_sum, num_items, total_weight, rows.lse, num_correct, entropy_sum, rows.nll


def extreme_rows(V: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """(rows, V): everything, one shard or all but it at the ends of a dtype's range, -inf; NaN and +inf in one shard."""
    # the difference of the ends of float64 is no number, nor that of float32's in the kernel for short rows
    ends = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    lowest, highest = (end / 4 if V <= 512 else end for end in (ends.min, ends.max))
    usual = (torch.randn(V, generator=torch.Generator().manual_seed(V)) * 2).to(dtype)
    rows = [torch.full((V,), value, dtype=dtype) for value in (lowest, highest, -torch.inf)]
    for shard in shards_of(V, size):
        if shard.num_classes == 0:
            continue
        classes = slice(shard.class_offset, shard.class_offset + shard.num_classes)
        for rest in (usual, *rows[:3:2]):
            for value in (lowest, highest, -torch.inf, torch.nan, torch.inf, 0.5):
                for places in (classes, shard.class_offset):
                    row = rest.clone()
                    row[places] = value
                    rows.append(row)
    return torch.stack(rows)
