"""The gradients of a window: which there are, whether anything has written to them, their norm and their multiple."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from .. import _compat
from ..sums import wide_dtype

# A parameter, its gradient, and the gradient's version: whether anything has written to it since. The gradient by a weak
# reference, so that one that is dropped is freed. A plain tuple, since there is one for each parameter and micro-batch.
Mark = tuple[torch.Tensor, "weakref.ref[torch.Tensor]", int]
Marks = dict[int, Mark]  # by the id of the parameter


def marks(parameters: Iterable[torch.Tensor], but: Marks | None = None) -> Marks:
    """Of all parameters that have a gradient."""
    found = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and (but is None or id(parameter) not in but):
            found[id(parameter)] = (parameter, weakref.ref(grad), version_of(grad))
    return found


def is_unchanged(mark: Mark) -> bool:
    parameter, grad, version = mark
    now = parameter.grad
    return now is not None and grad() is now and version_of(now) == version


def version_of(grad: torch.Tensor) -> int:
    """Negative where a tensor inside counts too, so that the version of the outer one alone never equals it.

    Of a DTensor, the sum of its own (zero_() counts there) and its local tensor's (FSDP adds to that).
    """
    if type(grad) is torch.Tensor and not grad.is_sparse:
        return grad._version
    local = _compat.local_of(grad)
    if local is None:
        local = local_of(grad)
    return grad._version if local is grad else -1 - grad._version - local._version


@torch.no_grad()
def local_of(grad: torch.Tensor) -> torch.Tensor:
    """The memory of this rank: the shard of a DTensor, the values of a sparse gradient."""
    if hasattr(grad, "to_local"):
        grad = grad.to_local()
    return grad._values() if grad.is_sparse else grad


@torch.no_grad()
def multiply_(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies all gradients by a () factor; one foreach for each device and dtype."""
    groups = defaultdict(list)
    for grad in map(local_of, grads):
        groups[grad.device, grad.dtype].append(grad)
    for (device, dtype), group in groups.items():
        if dtype in (torch.float32, torch.float64):
            _compat.foreach_mul_(group, factor.to(device, dtype))
        elif device.type == "cpu":
            _compat.foreach_mul_(group, factor.to(device, torch.float32))
        else:  # a () factor would be rounded to bf16 or fp16 first, and with it every gradient in the same direction
            factor32 = factor.to(device, torch.float32)
            _compat.foreach_mul_(group, [factor32.expand(grad.shape) for grad in group])


@torch.no_grad()
def norm_of(grads: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """() 2-norm, in the widest dtype, of all gradients together; of DTensors, over all of their shards."""
    groups = defaultdict(list)
    for grad in grads:
        if grad.is_sparse:
            grad = grad.coalesce()._values()
        groups[grad.device, grad.dtype, getattr(grad, "device_mesh", None)].append(grad)
    norms = [torch.zeros((), dtype=wide_dtype(device), device=device)]
    for (_, dtype, _), group in groups.items():
        accumulated = torch.promote_types(dtype, torch.float32)  # in fp16, the norm of a sum would be infinite
        norm: Any = torch.linalg.vector_norm(torch.stack(_compat.foreach_norm(group, 2, dtype=accumulated)))
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        norms.append(norm.to(device, wide_dtype(device)))
    return torch.linalg.vector_norm(torch.stack(norms))


# Whose they are ---------------------------------------------------------------------------------------------------------


def parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """list(module.parameters()), in a third of the time: this runs in every backward."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    waiting: list[torch.nn.Module | None] = [module]
    while waiting:
        module_or_none = waiting.pop()
        if module_or_none is None or id(module_or_none) in seen:
            continue
        seen.add(id(module_or_none))
        for parameter in module_or_none._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        waiting.extend(reversed(module_or_none._modules.values()))
    return list(found.values())


def distinct(parameters: Any) -> list[torch.Tensor]:
    if isinstance(parameters, Iterable) and not isinstance(parameters, torch.Tensor):
        found = list(parameters)
        if all(isinstance(p, torch.Tensor) for p in found):
            return list(dict.fromkeys(found))
    raise TypeError(f"Accumulator: expected a module or an iterable of parameters, got {type(parameters).__name__}")
