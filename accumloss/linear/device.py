"""What a head does otherwise on CUDA than on the CPU, in small functions with a body for each: the same meaning."""

from __future__ import annotations

from typing import Any

import torch

from ..gpus import GPU, gpu_of, known

_BLOCK_BYTES = 8 * 2**20  # of a product on the CPU that is added to an accumulator
_LEAST_CAPABILITY = {torch.bfloat16: 80, torch.float16: 70}  # of tensor cores that take this dtype


def is_cuda(device: Any) -> bool:
    """Whether calls run by the plans for CUDA.

    Args:
        device: a torch.device, "cpu", "cuda", "cuda:1", an index, or a GPU as accumloss.plan takes it.

    Raises:
        ValueError: none of these.
    """
    return _kind(device) != "cpu"


def has_product_into_fp32(device: Any, dtype: torch.dtype) -> bool:
    """Whether torch multiplies 16-bit matrices there into fp32, on tensor cores: since 2.10 into an accumulator too."""
    kind = _kind(device)
    if kind == "cpu" or torch.version.hip is not None:
        return False
    if isinstance(kind, GPU):
        capability = kind.capability
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    else:
        return True  # of a GPU of which nothing is known
    return capability >= _LEAST_CAPABILITY.get(dtype, 0)


def _kind(device: Any) -> str | GPU:
    """cpu, cuda, or a GPU that is named."""
    if isinstance(device, torch.device):
        return "cuda" if device.type == "cuda" else "cpu"
    found = gpu_of(device)
    if found is not None:
        return found
    if isinstance(device, str) and device.partition(":")[0] in ("cpu", "cuda"):
        return device.partition(":")[0]
    if type(device) is int and 0 <= device < 50:  # an index, as torch takes it; beyond that an old capability
        return "cuda"
    try:
        is_known = isinstance(device, str) and torch.device(device).type != "meta"
    except RuntimeError:
        is_known = False
    if not is_known:
        raise ValueError(f'linear_plan: expected a device of torch ("cpu", "cuda:0"), {known()}, got {device!r}')
    return "cpu"  # a device without kernels of ours: plain PyTorch, by the plan for the CPU


def waits(device: torch.device) -> bool:
    """Whether the host would have to wait for the device to see a value there."""
    return device.type != "cpu"


def free_bytes(device: torch.device) -> int | None:
    """Memory that the device has left, with what torch keeps of it for the next tensors. None: it cannot be asked, as in the
    capture of a graph, or nobody has to: on the CPU."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    stats: dict[str, Any] = torch.cuda.memory_stats_as_nested_dict(device)
    kept = stats["reserved_bytes"]["all"]["current"] - stats["allocated_bytes"]["all"]["current"] if stats else 0
    return torch.cuda.mem_get_info(device)[0] + kept


def add_product_(
    accumulator: torch.Tensor,  # (V, H) fp32
    grad_logits: torch.Tensor,  # (n, V) bf16 or fp16, rows of any stride
    hidden: torch.Tensor,  # (n, H) of grad_logits' dtype
    is_first: bool,
) -> None:
    """accumulator = or += grad_logitsᵀ hidden, of which nothing is rounded to 16 bits: where there is no such product, of
    operands that are widened first."""
    if accumulator.is_cuda and has_product_into_fp32(accumulator.device, hidden.dtype):
        if is_first:
            torch.mm(grad_logits.t(), hidden, out_dtype=torch.float32, out=accumulator)
        else:
            torch.addmm(accumulator, grad_logits.t(), hidden, out_dtype=torch.float32, out=accumulator)
        return
    V, H = accumulator.shape
    wide = hidden.float()
    block = max(_BLOCK_BYTES // (H * wide.element_size()), 1)
    for begin in range(0, V, block):
        part = slice(begin, begin + block)
        left = grad_logits[:, part].t().float()
        product = torch.mm(left, wide, out=wide.new_empty(left.shape[0], H))  # without out= autocast would round both
        if is_first:
            accumulator[part] = product
        else:
            accumulator[part] += product


def to_host(counts: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """A copy of counts for the host, on its way, and what to wait for: None where it is there already.

    On CUDA the copy goes to pinned memory behind the work that is queued, and an event behind the copy.
    """
    if not counts.is_cuda:
        return counts.cpu(), None
    with torch.cuda.device(counts.device):
        host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    return host, event
