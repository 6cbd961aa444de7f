"""How a call is timed and its memory seen, on the CPU and on a GPU; and the ceilings that the calls are held against."""

from __future__ import annotations

import contextlib
import gc
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch

import accumloss

COPY, COPY_TO_NEW, READ = "copy", "copy to new", "read"

Work = Callable[[], object]


class Cpu:
    """Wall time on threads that are awake, page faults, and the resident memory of the process."""

    name = "cpu"

    def __init__(self) -> None:
        self._small = torch.zeros(65536 * max(torch.get_num_threads(), 1))

    def _wake(self) -> None:
        """Threads that slept since the last call would be woken on the first competitor's time: a millisecond and more."""
        for _ in range(50):
            self._small.add_(1)

    def facts(self) -> dict[str, object]:
        """What record.environment() does not say already."""
        return {}

    def ceilings(self, source: torch.Tensor, logits: torch.Tensor) -> dict[str, Work]:
        """`copy` writes to a buffer that exists, `copy to new` to one that is allocated for it."""
        target = torch.empty_like(source).copy_(source)
        return {COPY: lambda: target.copy_(logits), COPY_TO_NEW: logits.clone}

    def timed(self, work: Work) -> tuple[float, int]:
        """Milliseconds and minor page faults of work(); what it returns is freed after the clock has stopped."""
        self._wake()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter_ns()
        result = work()
        end = time.perf_counter_ns()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        del result
        return (end - start) / 1e6, faults

    def peak_bytes(self, work: Work) -> int | None:
        """Peak memory of the process during work() above what it had before; None where the system cannot tell."""
        gc.collect()
        accumloss.empty_cache()
        try:
            import ctypes

            ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept must not serve this call unseen
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before = _status_bytes("VmRSS")
            work()
            return max(0, _status_bytes("VmHWM") - before)
        except (OSError, AttributeError, TypeError):
            return None


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


class Cuda:
    """Time between two events on the GPU, with its L2 flushed before, and the peak of torch's allocator.

    The stream is kept busy while the host enqueues the call, so that the time is the GPU's alone, as in a training loop
    whose host runs ahead. A call that waits for the GPU itself pays for that.
    """

    name = "cuda"

    def facts(self) -> dict[str, object]:
        """The GPU and its driver."""
        properties = torch.cuda.get_device_properties(0)
        driver = None
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return {
            "device": properties.name,
            "driver": driver,
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "device_memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        }

    def __init__(self) -> None:
        record.refuse_fallback("cuda")
        properties = torch.cuda.get_device_properties(0)
        self._flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device="cuda")

    def ceilings(self, source: torch.Tensor, logits: torch.Tensor) -> dict[str, Work]:
        """`copy` reads and writes the logits' bytes once, `read` sums them up: what a forward alone is held against."""
        target = torch.empty_like(source)
        # as fp32, where the bytes allow: the reduction's arithmetic on 16 bits is no ceiling of the memory
        words = logits.flatten()
        if words.element_size() == 2 and words.numel() % 2 == 0:
            words = words.view(torch.float32)
        return {COPY: lambda: target.copy_(logits), READ: words.sum}

    def timed(self, work: Work) -> tuple[float, int]:
        """Milliseconds of the GPU for work(), 0."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond for the host to enqueue
        start.record()
        result = work()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end), 0

    def peak_bytes(self, work: Work) -> int | None:
        """Peak of what torch's allocator has handed out during work() above what it had before."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


Device = Cpu | Cuda
