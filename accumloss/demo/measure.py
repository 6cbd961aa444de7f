"""The peak memory of a piece of work, and the end of what a device still does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """Peak memory of work() above what was in use before it; None where the system cannot tell (CPU outside Linux)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed must not serve this one unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        work()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None
