"""The processes that a Trainer's step is spread over: how many losses are averaged, and what is counted over all of them."""

from __future__ import annotations

from typing import Any

import torch

from . import counting


def ranks(trainer: Any) -> int:
    """How many losses the gradients of a step are averaged over, besides its micro-batches, where tokens are counted
    over all of them: the factor that Trainer multiplies by."""
    args = trainer.args
    if not args.average_tokens_across_devices:
        return 1
    if args.n_gpu > 1:
        return args.n_gpu
    tensor_parallel = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    return max(trainer.accelerator.num_processes // max(tensor_parallel, 1), 1)


def over_ranks(trainer: Any, total: torch.Tensor) -> torch.Tensor:
    """A count of this rank as Trainer's own count of items goes over the ranks. () float64, no sync."""
    args = trainer.args
    total = total.to(args.device)
    if args.average_tokens_across_devices:
        if args.world_size > 1:
            total = trainer.accelerator.gather(total.reshape(1)).sum()
    elif args.n_gpu > 1:
        total = total // args.n_gpu
    return total / same_batch(trainer)


def same_batch(trainer: Any) -> int:
    """Ranks that hold the same micro-batches: tensor, context and sequence parallel ones."""
    if all(hasattr(trainer, name) for name in ("get_tp_size", "get_cp_size", "get_sp_size")):
        return trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    config = getattr(trainer.accelerator, "parallelism_config", None)
    return 1 if config is None else config.non_data_parallel_size


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
