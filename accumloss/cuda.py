"""What runs on CUDA, and what went wrong there: the kernel that serves a call, and labels that a kernel met."""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import torch

from . import _C, fallback, gpus
from .checks import FLOATS
from .keywords import checked


class CudaPlan(NamedTuple):
    """How a call runs on CUDA; ``accumloss.plan`` tells.

    Attributes:
        kernel: packed, warp, held, staged, block or partly_held.
        threads: of a block.
        cluster: blocks that share a row.
        stages: rows on chip or on their way to it; staged only.
        shared_bytes: shared memory of a block.
        bytes_per_element: of device memory, read and written, where nothing is ignored.
        resident: clusters (of one block: blocks) that the GPU runs at once; staged launches no more. None: not known.
        groups: of the threads of a block, each with a row of its own: packed, warp, staged.

    Examples:
        >>> plan = accumloss.plan(128256, arch="sm_90")
        >>> plan.kernel, plan.cluster
        ('staged', 4)
    """

    kernel: str  # packed, warp, held, staged, block or partly_held
    threads: int  # of a block
    cluster: int  # blocks that share a row
    stages: int  # rows on chip or on their way to it; staged only
    shared_bytes: int  # of a block
    bytes_per_element: float  # of device memory, read and written, where nothing is ignored
    resident: int | None = None  # clusters (of one block: blocks) that the GPU runs at once; staged launches no more
    groups: int = 1  # of the threads of a block, each with a row of its own: packed, warp, staged


_CALLS = ("forward", "backward", "with_grad")


@checked
def plan(
    logits: torch.Tensor | int,  # (..., V), or V
    dtype: torch.dtype = torch.bfloat16,
    *,
    arch: str | float | tuple[int, int] | None = None,
    call: str = "with_grad",
    aligned: bool = True,
) -> CudaPlan:
    """The CUDA kernel that serves a call, as chosen by its shape and the architecture. Needs no GPU where arch is given.

    Args:
        logits: logits (..., V), which also give dtype, alignment and architecture; or V alone.
        dtype: of the logits, where V alone is given.
        arch: a compute capability from 75 on, as ``"sm_90"``, ``"90"``, ``"9.0"``, 90 or ``(9, 0)``; or a GPU: ``"T4"``,
            ``"A100"``, ``"RTX 4090"``, ``"H100"``, ``"H200"``, ``"B200"``, ``"RTX 5090"``, also in the name that torch has
            for it; default: the logits' device, or the current one.
        call: ``"forward"``, ``"backward"``, or ``"with_grad"`` for both in one.
        aligned: whether each row of the gradient lies against 16 bytes as its logits do. It does in place, and for
            contiguous logits that start at 16 bytes.

    Returns:
        CudaPlan. ``packed``: 8 lanes a row; ``warp``: a warp a row; ``held``: a block a row, which stays in shared memory
        for its gradient; ``partly_held``: as far as there is room, the rest read again from the L2; ``staged``: a cluster
        of blocks a row, the next rows on their way (sm_90 and newer); ``block``: a block a row, visited twice.
        ``resident`` is what the GPU itself answers where it is asked for, an upper bound where one is named, None where
        an ``sm_`` is.

    Raises:
        ValueError: no V, no floating dtype, a call or an architecture that nobody knows, or none where there is no GPU.

    Examples:
        >>> plan(32000, arch="sm_90").kernel, plan(128256, arch="sm_90").cluster, plan(32000, arch="sm_80").kernel
        ('staged', 4, 'held')
        >>> plan(128256, arch="H200").resident  # clusters of 4 blocks on 132 multiprocessors
        32
    """
    if call not in _CALLS:
        raise ValueError(f"plan: expected call to be one of {', '.join(_CALLS)}, got {call!r}")
    device: torch.device | None = None
    if isinstance(logits, torch.Tensor):
        V, dtype = logits.shape[-1], logits.dtype
        row_bytes = [stride * logits.element_size() for stride in logits.stride()[:-1]]
        starts_alike = logits.is_contiguous() or all(step % 16 == 0 for step in [*row_bytes, V * logits.element_size()])
        aligned = aligned and logits.data_ptr() % 16 == 0 and starts_alike
        device = logits.device if logits.is_cuda else None
    else:
        V = logits
    if V < 1 or dtype not in FLOATS:
        raise ValueError(f"plan: expected V >= 1 and a floating dtype of logits, got V = {V} and {dtype}")
    gpu = ""
    numbers = V, FLOATS.index(dtype), _CALLS.index(call)
    if arch is None:
        if not torch.cuda.is_available():
            raise ValueError('plan: expected arch, such as "sm_90" or "H200", where there is no GPU, got None')
        if hasattr(_C, "device_plan"):
            index = torch.cuda.current_device() if device is None or device.index is None else device.index
            return CudaPlan(*_C.device_plan(index, *numbers, aligned))
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    else:
        found = gpus.gpu_of(arch)
        if found is None:
            raise ValueError(f"plan: expected arch to be {gpus.known()}, got {arch!r}")
        gpu, capability = found
    return CudaPlan(*_C.plan(*numbers, capability, aligned, gpu))


@checked
def check() -> None:
    """Raises IndexError if a CUDA call has met a label outside [0, V) since the last check; on CPU the call itself does.

    Such labels never become an index: the row's loss is NaN, its gradient zero, and the first of them is recorded
    without a sync. Call ``torch.cuda.synchronize()`` before, to be sure that the work so far is covered.

    On a device without kernels (``FallbackWarning``) it waits for the calls so far; nothing else raises there.

    Raises:
        IndexError: such a label, with its row.

    Examples:
        >>> accumloss.check()  # nothing was met
    """
    _C.check()
    fallback.check_labels()


def warn_without_kernels() -> None:
    """Says at import that this build lacks the kernels of the GPUs that torch sees, unless it was asked for without them.

    The first call on such a GPU does not say it again.
    """
    if _C.build_info()["without_cuda"] != "nvcc was not found" or torch.version.cuda is None:
        return
    if (
        torch.cuda.device_count() and os.environ.get("ACCUMLOSS_FALLBACK", "").strip() == ""
    ):  # by NVML: CUDA stays as it is, for forks
        warnings.warn(
            f"accumloss was built without its CUDA kernels, since nvcc was not found; torch has CUDA {torch.version.cuda} and "
            "sees a GPU, where losses are computed in plain PyTorch, slower: install it again with an nvcc, or online, where "
            "nvcc is fetched (docs/install.md); ACCUMLOSS_FALLBACK=error refuses",
            fallback.FallbackWarning,
            stacklevel=3,
        )
        fallback.announced.add("cuda")
