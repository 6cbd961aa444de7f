"""A device for which nobody has compiled anything: PrivateUse1 as "acme", in Python, whose memory is the host's.

Its tensors are plain torch.Tensors with storages, strides and views of their own. Every op of ATen on them runs on a CPU
tensor over the same memory. For a process of its own: torch has one PrivateUse1, which stays.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "acme"
_CPU, _OTHER = 1, 12  # kDLCPU, kDLExtDev of DLPack
aten = torch.ops.aten
# the host would wait for the device, or a shape depends on a value
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]  # and more


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


@dataclass
class Record:
    """What the device has been asked for."""

    ops: list[str] = field(default_factory=list)
    to_host: int = 0  # copies
    most_bytes: int = 0  # of one new tensor

    @property
    def waits(self) -> list[str]:
        return [op for op in self.ops if op in WAITS] + ["copy to the host"] * self.to_host


_records: list[Record] = []
has_float64 = True


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    _records.append(Record())
    try:
        yield _records[-1]
    finally:
        _records.pop()


@contextlib.contextmanager
def without_float64() -> Iterator[None]:
    """Inside, the device has no float64, as MPS has none."""
    from accumloss import sums

    global has_float64
    has_float64 = False
    sums.WITHOUT_FLOAT64.add(NAME)
    try:
        yield
    finally:
        has_float64 = True
        sums.WITHOUT_FLOAT64.remove(NAME)


def _over_same_memory(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        capsule = torch._C._to_dlpack(tensor)
        _DLTensor.from_address(_pointer(capsule, b"dltensor")).device_type = device_type
        return torch._C._from_dlpack(capsule)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return _over_same_memory(tensor, _CPU) if tensor.device.type == NAME else tensor


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype == torch.float64 and not has_float64:
        raise TypeError("acme has no float64")
    return _over_same_memory(tensor, _OTHER) if tensor.device.type == "cpu" else tensor


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    for record in _records:
        record.ops.append(op.name().partition(".")[0])
    if op in (aten._copy_from.default, aten._copy_from_and_resize.default):
        source, target = args[:2]
        for record in _records:
            record.to_host += target.device.type == "cpu"
        if op is aten._copy_from_and_resize.default:
            target.resize_(source.shape)
        _on_host(target).copy_(_on_host(source))
        return target
    if op is aten.resize_.default:  # DLPack's memory has one size
        args[0].data = _on_device(torch.empty(args[1], dtype=args[0].dtype))
        return args[0]
    given: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the device, and what the host has for it

    def host(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == NAME else value
        if not isinstance(value, torch.Tensor) or value.device.type != NAME:
            return value
        given.append((value, _on_host(value) if value.numel() else torch.empty(value.shape, dtype=value.dtype)))
        return given[-1][1]

    def device(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        for of_device, of_host in given:
            if value is of_host:
                return of_device
        if not any(value.untyped_storage().data_ptr() == of_host.untyped_storage().data_ptr() for _, of_host in given):
            for record in _records:
                record.most_bytes = max(record.most_bytes, value.numel() * value.element_size())
        return _on_device(value)

    found = op(*tree_map(host, args), **tree_map(host, kwargs))
    for of_device, of_host in given:
        if of_device.shape != of_host.shape:  # an empty out=
            of_device.data = _on_device(of_host)
    return tree_map(device, found)


_setup_privateuseone_for_python_backend(NAME)
_library = torch.library.Library("_", "IMPL")
_library.fallback(_kernel, "PrivateUse1")
