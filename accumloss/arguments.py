"""What the public functions over logits refuse, and how they hand on to the ops."""

from __future__ import annotations

from typing import Any

import torch

from . import checks
from ._compat import is_functorch_active
from .options import LossOptions

NumItems = int | float | torch.Tensor | None

# the least and the largest number > 0 of the dtypes of a sum
_HELD = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}


def check_tensors(name: str, *given: tuple[str, Any]) -> None:
    """given: what each is, with its shape; and the value."""
    for what, value in given:
        if not isinstance(value, torch.Tensor):
            got = "None" if value is None else f"a {type(value).__name__}"
            raise (ValueError if value is None else TypeError)(f"{name}: expected a tensor {what}, got {got}")


def check_shift(name: str, shift: Any) -> None:
    if isinstance(shift, bool) or not isinstance(shift, int) or not 0 <= shift < 2**63:
        raise ValueError(f"{name}: expected shift >= 0, an int, got {shift!r}")


def refuse_functorch(name: str, *tensors: Any) -> None:
    checks.refuse_forward_ad(name, *tensors)
    if is_functorch_active():
        raise RuntimeError(
            f"{name}: expected no torch.func transform (grad, vjp, vmap, ...) around it, got one; "
            "use torch.autograd.grad, which also gives second derivatives"
        )


def check_in_place(name: str, logits: torch.Tensor, inplace: Any) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: expected inplace=False under torch.compile, got {inplace!r}")
    if logits.is_leaf:
        raise ValueError(
            f"{name}: expected logits that a model computed where inplace={inplace!r}, got a leaf that requires grad; "
            "its values would be lost"
        )


def of_op(options: LossOptions, shift: int, metrics: bool) -> dict[str, Any]:
    """The keyword arguments of an op, but for its defaults."""
    kwargs = options.given()
    if shift:
        kwargs["shift"] = shift
    if metrics:
        kwargs["metrics"] = True
    return kwargs


def check_vocab_size(name: str, logits: torch.Tensor, size: int | None, source: str = "vocab_size") -> None:
    if size is not None and (logits.dim() < 1 or logits.shape[-1] != size):
        raise ValueError(f"{name}: expected logits of shape (..., {source} = {size}), got {tuple(logits.shape)}")


def check_class_weight(name: str, what: str, weight: Any, shape: torch.Size) -> None:
    if weight is None:
        return
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {what} (V,) or None, got a {type(weight).__name__}")
    if weight.shape != shape:
        raise RuntimeError(f"{name}: expected {what} of shape (V,) = {tuple(shape)}, got {tuple(weight.shape)}")


def like_rows(name: str, logits: torch.Tensor, labels: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """labels in the shape of the rows of logits (..., V): theirs, or one of the two flattened where nothing is shifted."""
    if logits.dim() < 1:
        raise RuntimeError(f"{name}: expected logits of shape (..., V), got a 0-dim tensor")
    rows = logits.shape[:-1]
    if labels.shape == rows:
        return labels
    is_flat = shift == 0 and (labels.dim() == 1 or logits.dim() == 2)
    if not is_flat or labels.numel() * logits.shape[-1] != logits.numel():
        flattened = ", or either of them flattened" if shift == 0 else ""
        raise RuntimeError(
            f"{name}: expected labels of shape {tuple(rows)}, as logits {tuple(logits.shape)} without the classes"
            f"{flattened}, got {tuple(labels.shape)}"
        )
    return labels.reshape(rows)


def divisor_of(name: str, num_items_in_batch: NumItems, like: torch.Tensor) -> torch.Tensor | None:
    """num_items_in_batch as a 0-dim tensor > 0 on the device of ``like``, without a sync; 1 for 0, None for None."""
    if num_items_in_batch is None:
        return None
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    tiny, largest = _HELD[acc]
    if isinstance(num_items_in_batch, torch.Tensor):
        shape, dtype = tuple(num_items_in_batch.shape), num_items_in_batch.dtype
        if num_items_in_batch.numel() == 0:
            raise ValueError(f"{name}: expected num_items_in_batch of shape () or (n, 1), got an empty tensor")
        if len(shape) > 2 or (len(shape) == 2 and shape[1] != 1):
            raise ValueError(f"{name}: expected num_items_in_batch of shape (), (n,) or (n, 1), got {shape}")
        if dtype == torch.bool or dtype.is_complex:
            raise ValueError(f"{name}: expected num_items_in_batch of an integer or floating dtype, got {dtype}")
        first = num_items_in_batch.detach()
        first = first.flatten()[0] if shape else first
        first = first.to(like.device, non_blocking=True)
        value = first.to(acc)
        # NaN for what is no number of items, or none that acc holds: what it is cannot be known here without a sync.
        # Not clamp(min=1): what is passed may be the items of a step for each of its micro-batches, a fraction.
        is_held = value.clamp(tiny, largest) == value
        return torch.where(is_held, value, torch.where(first == 0, torch.ones_like(value), float("nan")))
    is_number = isinstance(num_items_in_batch, (int, float)) and not isinstance(num_items_in_batch, bool)
    if not is_number or not (num_items_in_batch == 0 or tiny <= num_items_in_batch <= largest):
        raise ValueError(
            f"{name}: expected num_items_in_batch >= 0, got {num_items_in_batch!r}; it is 0 or a number in "
            f"[{tiny:.4g}, {largest:.4g}], which {acc} holds, or a tensor of one; None counts the items of the call"
        )
    return torch.full((), float(num_items_in_batch) if num_items_in_batch else 1.0, dtype=acc, device=like.device)
