"""The processes that a Trainer's step is spread over: how many losses are averaged, and what is counted over all of them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..sums import wide_dtype
from . import counting


def ranks(trainer: Any) -> int:
    """How many losses the gradients of a step are averaged over, besides its micro-batches, where tokens are counted
    over all of them: the factor that Trainer multiplies by."""
    args = trainer.args
    if not args.average_tokens_across_devices:
        return 1
    if args.n_gpu > 1:
        return args.n_gpu
    return averaged_ranks(trainer)


def averaged_losses(trainer: Any) -> int:
    """How many losses of this process and the others are averaged into a micro-batch's. Replicas of DataParallel are no ranks:
    their losses are, and one that is computed outside of them is not (Step.as_seen)."""
    return 1 if trainer.args.n_gpu > 1 else ranks(trainer)


def gathers(trainer: Any) -> bool:
    """Whether over_ranks() waits for the other ranks."""
    return bool(trainer.args.average_tokens_across_devices) and trainer.args.world_size > 1


def over_ranks(trainer: Any, total: torch.Tensor) -> torch.Tensor:
    """A count of this rank as Trainer's own count of items goes over the ranks. () float64, no sync."""
    args = trainer.args
    if args.average_tokens_across_devices:
        return over_all_ranks(trainer, total)
    total = _on(total, args.device)
    return (total // args.n_gpu if args.n_gpu > 1 else total) / same_batch(trainer)


def over_all_ranks(trainer: Any, total: torch.Tensor) -> torch.Tensor:
    """A count of this rank, or several (n,), of all ranks. float64 of the same shape, no sync."""
    total = _on(total, trainer.args.device)
    if trainer.args.world_size > 1:
        total = trainer.accelerator.gather(total.reshape(1, -1)).sum(0).reshape(total.shape)
    return total / same_batch(trainer)


def _on(count: torch.Tensor, device: torch.device) -> torch.Tensor:
    return count.to(wide_dtype(device)).to(device) if count.is_floating_point() else count.to(device)


def averaged_ranks(trainer: Any) -> int:
    """How many ranks the gradients are averaged over."""
    tensor_parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    return max(trainer.accelerator.num_processes // max(tensor_parallel, 1), 1)


def same_batch(trainer: Any) -> int:
    """Ranks that fetch the same micro-batches: neighbours, since data-parallel dimensions are the outer ones of a mesh.

    As the mesh says, and agree_on_batches() has seen: tensor-parallel ranks, and context and sequence-parallel ones, whose
    micro-batches are sharded after they were fetched.
    """
    return _agreed.get(trainer) or math.prod(_sizes(trainer))


_agreed: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def over_counted(trainer: Any) -> float:
    """What Trainer's own count of items is too small by: it divides by all of the mesh that is not data-parallel."""
    return math.prod(_sizes(trainer)) / same_batch(trainer)


def _sizes(trainer: Any) -> list[int]:
    """The mesh's dimensions that are not data-parallel, from the innermost: tensor, sequence and context parallel."""
    if all(hasattr(trainer, name) for name in ("get_tp_size", "get_cp_size", "get_sp_size")):
        return [trainer.get_tp_size(), trainer.get_sp_size(), trainer.get_cp_size()]
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return [1 if config is None else config.non_data_parallel_size]


def agree_on_batches(trainer: Any, batches: Sequence[Mapping[str, Any]]) -> None:
    """Looks once whether the ranks hold the micro-batches that the mesh says: a dataloader may have sharded them.

    All ranks call it. The sizes of the mesh are multiplied from the innermost, as long as all ranks of a group hold the same.
    """
    sizes = _sizes(trainer)
    if trainer in _agreed or math.prod(sizes) == 1 or trainer.args.world_size == 1:
        return
    mine = torch.tensor([_fingerprint(batches)], dtype=torch.int64, device=trainer.args.device)
    held = trainer.accelerator.gather(mine).tolist()
    same = 1
    for size in sizes:
        groups = [held[i : i + same * size] for i in range(0, len(held), same * size)]
        if any(len(set(group)) > 1 for group in groups):
            break
        same *= size
    _agreed[trainer] = same


def _fingerprint(batches: Sequence[Mapping[str, Any]]) -> int:
    """A number that differs where the integers of micro-batches do."""
    found = 0
    for batch in batches:
        for key in sorted(batch, key=str):
            value = batch[key]
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                flat = value.reshape(-1).long().cpu()
                place = torch.arange(1, len(flat) + 1)
                found = (found * 1000003 + len(flat) + int((flat * place * place).sum())) % (2**61 - 1)
    return found


def is_of_ulysses(trainer: Any) -> bool:
    """Whether DeepSpeed shards the sequences, whose own function then computes the loss of each micro-batch."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return getattr(config, "sp_size", 1) > 1 and getattr(config, "sp_backend", "") == "deepspeed"


def is_sharded_later(trainer: Any) -> bool:
    """Whether micro-batches are split along the sequence after they were fetched: accelerate's context parallelism does,
    in place, around the step."""
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return config is not None and getattr(config, "cp_size", 1) > 1


def sum_over_ranks(trainer: Any, sums: torch.Tensor) -> torch.Tensor:
    if trainer.args.world_size == 1:
        return sums
    return trainer.accelerator.gather(sums.to(trainer.args.device).reshape(1, -1)).sum(0)


def largest(trainer: Any, *numbers: int) -> list[int]:
    """The largest of each over the ranks."""
    if trainer.args.world_size == 1:
        return list(numbers)
    mine = torch.tensor([numbers], device=trainer.args.device)
    return trainer.accelerator.gather(mine).amax(0).tolist()


def real_rows(trainer: Any, inputs: Any) -> tuple[int, bool]:
    """How many rows of a batch are not there only to make the ranks' last batches equally large; whether all ranks' are not."""
    rows = counting.num_rows(counting.entries_of(inputs))
    state = trainer.accelerator.gradient_state
    ranks_with_batches = trainer.args.world_size // same_batch(trainer)
    if ranks_with_batches == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return rows, True
    before = trainer.args.process_index // same_batch(trainer) * rows  # as gather_for_metrics takes them
    return min(max(state.remainder - before, 0), rows), state.remainder >= ranks_with_batches * rows


def first_rows(inputs: Any, n: int) -> Any:
    """The first rows of a batch; where an entry has none, the labels of the others are ignored instead."""
    entries = counting.entries_of(inputs)
    rows = counting.num_rows(entries)
    by_row = {
        k: v for k, v in entries.items() if isinstance(v, (list, tuple)) or (isinstance(v, torch.Tensor) and v.dim())
    }
    if all(len(value) == rows for value in by_row.values()):
        return counting.like(inputs, {**entries, **{key: value[:n] for key, value in by_row.items()}})
    ignored = {}
    for key in ("labels", "shift_labels"):
        if isinstance(entries.get(key), torch.Tensor) and not entries[key].is_floating_point():
            ignored[key] = entries[key].clone()
            ignored[key][n:] = -100
    return counting.like(inputs, {**entries, **ignored})
