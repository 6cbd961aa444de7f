"""What a training loop may be wrapped in: DistributedDataParallel and FSDP, which reduce gradients, and a GradScaler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from .. import _compat
from ..sums import is_distributed

Reduction = Literal["mean", "sum"]


class Engine(NamedTuple):
    """What reduces the gradients over the ranks.

    Attributes:
        groups: of the ranks whose micro-batches differ, one after the other; (None,): all ranks, (): this one alone.
        factors: of parameters whose gradients are averaged over other ranks than most: how many those are. By id.
        apart: why the caller has to say what becomes of the gradients; empty where the engine says it.
    """

    reduction: Reduction | None = None
    groups: tuple[dist.ProcessGroup | None, ...] = (None,)
    hides_norm: bool = False  # shards without a mesh over which to take their norm
    factors: dict[int, int] = {}  # noqa: RUF012 (never written to)
    apart: str = ""


def engine_of(owner: Any) -> Engine:
    if not is_distributed():
        return Engine()
    if not isinstance(owner, torch.nn.Module):
        return _of_no_engine(owner)
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a second to import, so only here

    for part in owner.modules():  # torch.compile, Accelerate and Fabric wrap the wrapper
        if isinstance(part, torch.nn.parallel.DistributedDataParallel):
            ignored = sorted(part.parameters_to_ignore & {name for name, _ in part.module.named_parameters()})
            apart = f"DistributedDataParallel leaves {', '.join(ignored[:3])} to you" if ignored else ""
            return Engine("mean", (part.process_group,), apart=apart)
        if isinstance(part, FullyShardedDataParallel):
            return Engine("mean", hides_norm=True)
        if isinstance(part, FSDPModule):
            return _of_units(owner)
    return _of_no_engine(owner.parameters())


def size_of(groups: Iterable[dist.ProcessGroup | None]) -> int:
    """How many ranks groups have that lie across each other, as the dimensions of a mesh do."""
    return math.prod(dist.get_world_size(group) for group in groups)


def _of_units(module: torch.nn.Module) -> Engine:
    """FSDP2: each unit averages over a mesh of its own, which is a smaller one for experts that the ranks divide among them."""
    units = [(parameters, groups, size_of(groups)) for parameters, groups in _compat.fsdp_meshes(module)]
    groups, ranks = max(((groups, size) for _, groups, size in units), key=lambda unit: unit[1])
    factors = {id(p): size for parameters, _, size in units if size != ranks for p in parameters}
    sharded = {id(p) for parameters, _, _ in units for p in parameters}
    left = [name for name, parameter in module.named_parameters() if id(parameter) not in sharded]
    apart = f"fully_shard leaves {', '.join(left[:3])} to you" if left else ""
    return Engine("mean", tuple(groups), factors=factors, apart=apart)


def _of_no_engine(parameters: Iterable[Any]) -> Engine:
    """Plain parameters, or DTensors of who knows what: tensor-parallel ranks hold the same micro-batches, others do not."""
    sharded = any(
        placement.is_shard() and size > 1
        for p in parameters
        if hasattr(p, "device_mesh")
        for placement, size in zip(p.placements, p.device_mesh.shape, strict=True)
    )
    return Engine(apart="parameters are DTensors, whose ranks may hold the same micro-batches" if sharded else "")


def has_unscaled(scaler: Any) -> bool:
    """Whether scaler.unscale_() was called since its last update()."""
    return _compat.has_found_inf(scaler)
