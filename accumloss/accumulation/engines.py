"""What a training loop may be wrapped in: DistributedDataParallel and FSDP, which reduce gradients, and a GradScaler."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from .. import _compat
from ..sums import is_distributed

Reduction = Literal["mean", "sum"]


class Engine(NamedTuple):
    """What reduces the gradients over the ranks."""

    reduction: Reduction | None = None
    group: dist.ProcessGroup | None = None
    hides_norm: bool = False  # shards without a mesh over which to take their norm


def engine_of(owner: Any) -> Engine:
    if not isinstance(owner, torch.nn.Module) or not is_distributed():
        return Engine()
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a second to import, so only here

    for module in owner.modules():  # torch.compile, Accelerate and Fabric wrap the wrapper
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            return Engine("mean", module.process_group)
        if isinstance(module, FullyShardedDataParallel):
            return Engine("mean", hides_norm=True)
        if isinstance(module, FSDPModule):
            return Engine("mean")
    return Engine()


def has_unscaled(scaler: Any) -> bool:
    """Whether scaler.unscale_() was called since its last update()."""
    return _compat.has_found_inf(scaler)
