"""What the ops refuse, in Python: for their fakes, which raise if and only if the ops do, the values of labels aside.

Mirrors the checks of ``csrc/ops.cpp`` one by one. Sizes are compared by ``torch._check``, which may be symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from ._compat import is_forward_ad_open
from .options import LossOptions
from .sums import wide_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def require(condition: Any, function: str, message: Callable[[], str]) -> None:
    """RuntimeError where the condition does not hold; a symbolic one becomes a guard, or is asserted at run time."""
    torch._check(condition, lambda: f"{function}: expected {message()}")


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def check_device(function: str, name: str, tensor: torch.Tensor, like: torch.Tensor, like_name: str = "logits") -> None:
    """Both on one device; an index that is not named is that of the current device, as torch has it."""
    require(
        tensor.device == like.device,
        function,
        lambda: (
            f"{name} on the device of {like_name}, {like.device}, got {tensor.device}; "
            f"move it with .to({like_name}.device)"
        ),
    )


def check_options(
    function: str, logits: torch.Tensor, *, shift: int = 0, metrics: bool = False, **options: Any
) -> None:
    if shift < 0:
        raise ValueError(f"{function}: expected shift >= 0, got {shift}")
    LossOptions(**options).check(function, torch.float64 if logits.dtype == torch.float64 else torch.float32)


def check_dtype(function: str, logits: torch.Tensor) -> None:
    require(
        logits.dtype in FLOATS,
        function,
        lambda: (
            f"logits of dtype bfloat16, float16, float32 or float64, got {logits.dtype}; convert them with .float()"
        ),
    )


def check_class_weight(function: str, name: str, weight: torch.Tensor, V: int, like: torch.Tensor, of: str) -> None:
    require(weight.dim() == 1, function, lambda: f"{name} of shape (V,) = ({V},), got {_shape(weight)}")
    require(weight.shape[0] == V, function, lambda: f"{name} of shape (V,) = ({V},), got {_shape(weight)}")
    require(weight.dtype in FLOATS, function, lambda: f"{name} of a floating dtype, got {weight.dtype}")
    check_device(function, name, weight, like, of)


def check_labels_dtype(function: str, labels: torch.Tensor) -> None:
    require(
        labels.dtype in (torch.int64, torch.int32),
        function,
        lambda: f"labels of dtype int64 or int32, got {labels.dtype}; convert them with .long()",
    )


def check_call(
    function: str,
    logits: torch.Tensor,  # (..., V)
    labels: torch.Tensor,  # (...)
    weight: torch.Tensor | None,  # (V,); of a shard (vocab_size,)
    options: dict[str, Any],
    shard: tuple[int, int] | None = None,  # class_offset and vocab_size
) -> None:
    require(logits.dim() >= 1, function, lambda: "logits of shape (..., V), got a 0-dim tensor")
    check_dtype(function, logits)
    V = logits.shape[-1]
    require(V >= 1, function, lambda: f"logits of shape (..., V) with V >= 1, got {_shape(logits)}")
    class_offset, vocab_size = shard or (0, V)
    vocab_size = vocab_size or V
    for holds in (class_offset >= 0, class_offset <= vocab_size - V):
        require(
            holds,
            function,
            lambda: (
                "the classes [class_offset, class_offset + V) of a vocabulary of vocab_size, got "
                f"V = {V}, class_offset {class_offset} and vocab_size {vocab_size}"
            ),
        )
    require(
        options.get("shift", 0) <= 0 or logits.dim() >= 2,
        function,
        lambda: f"logits of shape (..., T, V) where shift > 0, got {_shape(logits)}",
    )
    check_labels_dtype(function, labels)

    def of_labels() -> str:
        return (
            f"labels of shape {_shape(logits)} without its last dimension, got {_shape(labels)}; labels are class "
            "indices, one for each row of logits"
        )

    require(labels.dim() == logits.dim() - 1, function, of_labels)
    for of_label, of_logit in zip(labels.shape, logits.shape, strict=False):
        require(of_label == of_logit, function, of_labels)
    check_device(function, "labels", labels, logits)
    if weight is not None:
        check_class_weight(function, "weight", weight, vocab_size, logits, "logits")
    check_options(function, logits, **options)


def check_grad(function: str, grad_loss_sum: torch.Tensor, logits: torch.Tensor) -> None:
    require(
        grad_loss_sum.numel() == 1,
        function,
        lambda: f"grad_loss_sum with one element, got shape {_shape(grad_loss_sum)}",
    )
    check_device(function, "grad_loss_sum", grad_loss_sum, logits)


def check_totals(function: str, totals: torch.Tensor, logits: torch.Tensor) -> None:
    def message() -> str:
        wide = "double" if wide_dtype(totals.device) == torch.float64 else "float"
        return f"contiguous totals (5,) of dtype {wide}, got {totals.dtype} of shape {_shape(totals)}"

    require(totals.dim() == 1, function, message)
    require(totals.shape[0] == 5 and totals.dtype == wide_dtype(totals.device), function, message)
    require(not _is_known(totals) or totals.is_contiguous(), function, message)
    check_device(function, "totals", totals, logits)


def check_divisor(function: str, divisor: torch.Tensor, logits: torch.Tensor, dtype: torch.dtype) -> None:
    require(
        divisor.numel() == 1 and divisor.dtype == dtype,
        function,
        lambda: f"a divisor of dtype {dtype} with one element, got {divisor.dtype} of shape {_shape(divisor)}",
    )
    check_device(function, "divisor", divisor, logits)


def check_saved(
    function: str, name: str, saved: torch.Tensor, dtype: torch.dtype, labels: torch.Tensor, logits: torch.Tensor
) -> None:
    def message() -> str:
        return f"{name} as cross_entropy returned it for these logits, got {saved.dtype} of shape {_shape(saved)}"

    require(saved.dtype == dtype, function, message)
    require(saved.numel() == labels.numel(), function, message)
    require(not _is_known(saved) or saved.is_contiguous(), function, message)
    check_device(function, name, saved, logits)


def check_token_grads(
    function: str, grads: Sequence[torch.Tensor | None], labels: torch.Tensor, logits: torch.Tensor
) -> None:
    for name, grad in zip(("grad_loss", "grad_nll", "grad_lse", "grad_entropy"), grads, strict=True):
        if grad is not None:
            check_row_grad(function, name, grad, labels, logits)


def check_row_grad(function: str, name: str, grad: torch.Tensor, labels: torch.Tensor, logits: torch.Tensor) -> None:
    def message() -> str:
        return f"{name} of shape {_shape(labels)} as labels, got {_shape(grad)}"

    require(grad.dim() == labels.dim(), function, message)
    for of_grad, of_label in zip(grad.shape, labels.shape, strict=False):
        require(of_grad == of_label, function, message)
    check_device(function, name, grad, logits)


def check_like(function: str, name: str, other: torch.Tensor, logits: torch.Tensor, logits_name: str) -> None:
    """Another tensor (..., V) beside the logits."""
    require(
        other.dtype == logits.dtype,
        function,
        lambda: f"{name} of the dtype of {logits_name}, {logits.dtype}, got {other.dtype}; convert one of them",
    )

    def message() -> str:
        return f"{name} of shape {_shape(logits)} as {logits_name}, got {_shape(other)}"

    require(other.dim() == logits.dim(), function, message)
    for of_other, of_logits in zip(other.shape, logits.shape, strict=False):
        require(of_other == of_logits, function, message)
    check_device(function, name, other, logits, logits_name)


def check_distillation(
    function: str,
    student_logits: torch.Tensor,  # (..., V)
    teacher_logits: torch.Tensor,  # (..., V)
    labels: torch.Tensor,  # (...)
    beta: float = 0.5,
    **options: Any,
) -> None:
    check_call(function, student_logits, labels, None, options)
    check_like(function, "teacher_logits", teacher_logits, student_logits, "student_logits")
    if not 0 <= beta <= 1:
        raise ValueError(f"{function}: expected beta in [0, 1], got {beta}")


def check_in_place(function: str, logits: torch.Tensor) -> None:
    if logits.dim() < 1 or not _is_known(logits):
        return
    check_dtype(function, logits)
    require(
        logits.is_contiguous() or _is_writable(tuple(logits.shape), logits.stride()),
        function,
        lambda: (
            "logits of shape (..., V) with unit stride along V, at most two strides before it, and rows that do not "
            f"overlap, since the gradient overwrites them, got shape {_shape(logits)} and strides {logits.stride()}; "
            "pass logits.contiguous(), or leave in-place off"
        ),
    )


def check_scale(values: torch.Tensor, factor: torch.Tensor) -> None:
    function = "scale_"
    check_dtype(function, values)
    require(values.dim() >= 1, function, lambda: "values of shape (..., n), got a 0-dim tensor; pass values.view(1)")
    require(
        not _is_known(values) or values.is_contiguous(),
        function,
        lambda: f"contiguous values, got shape {_shape(values)}",
    )
    require(factor.numel() == 1, function, lambda: f"a factor with one element, got shape {_shape(factor)}")
    check_device(function, "factor", factor, values, "values")


def check_scratch(like: torch.Tensor, rows: int, columns: int) -> None:
    check_dtype("scratch", like)
    require(rows >= 0 and columns >= 0, "scratch", lambda: f"rows and columns >= 0, got {rows} and {columns}")


def _is_known(tensor: torch.Tensor) -> bool:
    """Whether its sizes and strides can be compared: not those that only the data will tell."""
    return all(not isinstance(n, torch.SymInt) or n.node.has_hint() for n in (*tensor.shape, *tensor.stride()))


def _is_writable(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether rows can be overwritten where they lie; is_writable() of the sources."""
    V = sizes[-1]
    if math.prod(sizes) == 0:
        return True
    if V > 1 and strides[-1] != 1:
        return False
    B, T = math.prod(sizes[:-2]), sizes[-2] if len(sizes) > 1 else 1
    stride_b, stride_t = 0, strides[-2] if len(sizes) > 1 else 0
    following: int | None = None
    for size, stride in zip(reversed(sizes[:-2]), reversed(strides[:-2]), strict=True):
        if size == 1:
            continue
        if following is None:
            stride_b = stride
        elif stride != following:
            return False
        following = stride * size
    return _rows_are_apart(B, T, V, stride_b, stride_t)


def _rows_are_apart(B: int, T: int, V: int, stride_b: int, stride_t: int) -> bool:
    outer, inner, num_outer, num_inner = stride_b, stride_t, B, T
    if num_inner == 1 or (num_outer > 1 and outer < inner):
        outer, inner, num_outer, num_inner = inner, outer, num_inner, num_outer
    if num_inner > 1 and inner < V:
        return False
    if num_outer == 1:
        return True
    if outer >= (num_inner - 1) * inner + V:  # before any number of rows is asked for, which may be a symbol
        return True
    for b in range(1, num_outer):
        t = min(b * outer // inner, num_inner - 1) if num_inner > 1 else 0
        if b * outer - t * inner < V:
            return False
        if t + 1 == num_inner:
            return True
        if (t + 1) * inner - b * outer < V:
            return False
    return True


# Forward-mode AD ------------------------------------------------------------------------------------------------------


def refuse_dtensor(function: str, *tensors: Any) -> None:
    """RuntimeError for a DTensor: which part of a row is here, the op cannot know; the function of the package can."""
    for tensor in tensors:
        if type(tensor) is not torch.Tensor and hasattr(tensor, "device_mesh"):
            placements = ", ".join(map(repr, tensor.placements))
            raise RuntimeError(
                f"torch.ops.accumloss.{function}: expected plain tensors, got a DTensor placed ({placements}); call "
                "accumloss.cross_entropy, causal_lm_loss or masked_lm_loss, which take DTensors and gather no logits"
            )


def refuse_forward_ad(function: str, *tensors: Any) -> None:
    """RuntimeError where a tensor carries a tangent: the ops have no formula for it, and would drop it."""
    if not is_forward_ad_open():
        return
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{function}: expected no forward-mode AD (torch.autograd.forward_ad, torch.func.jvp), got a tensor with "
                "a tangent, for which there is no formula; use torch.autograd.grad"
            )
