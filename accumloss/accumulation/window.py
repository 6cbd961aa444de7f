"""A window: the sums of its micro-batches on this rank, and what a backward of each has written."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _compat
from ..sums import TokenSums, wide_dtype
from .gradients import Marks, is_unchanged, marks, version_of

# what is packed into the one all_reduce: the fields of TokenSums, and how many micro-batches were divided by known_total
LOSS_SUM, NUM_ITEMS, TOTAL_WEIGHT, NUM_CORRECT, ENTROPY_SUM, Z_LOSS_SUM, MICRO_BATCHES, KNOWN = range(8)


@dataclass
class Window:
    """Micro-batches of this rank. Their sums are added up in the end, not one by one: a stack each, and in fp64."""

    known_total: int | torch.Tensor | None = None
    left: Marks = field(default_factory=dict)  # gradients of the window before, which must be zeroed by now
    sums: list[TokenSums] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)  # micro-batches that were not back-propagated yet
    written: Marks = field(default_factory=dict)  # the gradients that the window has written, as they were after it
    before: Marks = field(default_factory=dict)  # all others, before the backward that runs
    backward: int | None = None  # the backward that runs
    running: set[int] = field(default_factory=set)  # and its micro-batches

    def check_known(self, name: str, known_total: int | torch.Tensor | None) -> None:
        if (known_total is None) != (self.known_total is None):
            raise ValueError(
                f"{name}: expected known_total for all micro-batches of a window or for none, got "
                f"{'none' if known_total is None else 'one'} after {len(self.sums)} with{'out' if self.known_total is None else ''}"
            )
        if is_count(known_total) and is_count(self.known_total) and known_total != self.known_total:
            raise ValueError(
                f"{name}: expected the known_total {self.known_total} of the window, got {known_total}; it counts the items of "
                "all micro-batches and ranks"
            )

    def add(self, sums: TokenSums) -> int:
        """The index of the micro-batch."""
        index = len(self.sums)
        self.sums.append(sums.detach())
        self.pending.add(index)
        return index

    def refuse_changes(self, name: str, is_finish: bool = False, may_be_reduced: bool = False) -> None:
        """Raises where anything but a backward has written to the gradients of the window, or dropped them.

        Not judged: unscale_ and all_reduce, which raise no version; another tensor in the place of a gradient, which
        DistributedDataParallel puts there with views of its buckets, and a reduction that is not in place; and what is done
        to gradients that the caller reduces.
        """
        lost, is_changed = 0, False
        for parameter, grad, version in self.written.values():
            now = parameter.grad
            if now is None:
                lost += 1
            elif now._version != version and grad() is now and version_of(now) != version:
                is_changed = not may_be_reduced
        if lost:
            of = "" if is_finish else "'s earlier micro-batches"
            raise RuntimeError(
                f"{name}: expected the gradients of the window{of}, got none "
                f"for {lost} of {len(self.written)} parameters; zero them after optimizer.step() only, or drop the window with "
                "reset()"
            )
        if is_changed:
            where = "before finish()" if is_finish else "in the middle of a window"
            raise RuntimeError(
                f"{name}: expected gradients that nothing but backward() has changed {where}, got others; zero, clip or scale "
                "them after finish(), add further losses to the sum, or drop the window with reset()"
            )

    def pass_backward(self, index: int) -> None:
        """A backward that cannot be watched."""
        self.pending.discard(index)
        self.left, self.written = {}, {}

    def begin_backward(self, index: int, parameters: list[torch.Tensor]) -> bool:
        """False where it is the second micro-batch of one backward."""
        backward = _compat.current_backward()
        if self.backward == backward:
            self.running.add(index)
            return False
        self.refuse_changes("Accumulator")  # Lightning zeroes between the loss and the first backward
        self.left = {key: mark for key, mark in self.left.items() if is_unchanged(mark)}
        self.before = marks(parameters, but=self.written)
        self.backward, self.running = backward, {index}
        return True

    def end_backward(self, parameters: list[torch.Tensor]) -> None:
        self.pending -= self.running
        written = {}
        for parameter in parameters:
            key, grad = id(parameter), parameter.grad
            if grad is None:
                continue
            before = self.before.get(key)
            if before is None or not is_unchanged(before):
                written[key] = (parameter, weakref.ref(grad), version_of(grad))
        is_on_top = any(key in written for key in self.left)
        self.written, self.before, self.backward = written, {}, None
        if is_on_top:
            raise RuntimeError(
                "Accumulator: expected gradients that were zeroed after the last window, got those of that window; call "
                "optimizer.zero_grad() after optimizer.step(), and reset()"
            )

    def pack(self, device: torch.device) -> torch.Tensor:
        """(8,) in the widest dtype, on the device of the losses; on ``device`` where there is none. The same layout on all ranks."""
        if self.sums:
            device = self.sums[0].loss_sum.device
        micro_batches = len(self.sums)
        known = 0 if self.known_total is None else micro_batches
        rows = [
            _add_up([getattr(sums, name) for sums in self.sums], device)
            for name in ("loss_sum", "num_items", "total_weight", "num_correct", "entropy_sum", "z_loss_sum")
        ]
        counts = (torch.full((), n, dtype=wide_dtype(device), device=device) for n in (micro_batches, known))
        return torch.stack([*rows, *counts])

    def unpack(self, packed: torch.Tensor) -> TokenSums:
        if self.sums:
            dtype = torch.promote_types(self.sums[0].loss_sum.dtype, torch.float32)
            has_metrics = all(s.num_correct is not None and s.entropy_sum is not None for s in self.sums)
        else:  # this rank cannot know; it has had nothing to do, and may wait for the answer
            dtype = torch.float32
            has_metrics = packed[MICRO_BATCHES].item() > 0 and not packed[NUM_CORRECT].isnan().item()
        if self.sums:
            has_z_loss = all(s.z_loss_sum is not None for s in self.sums)
        else:
            has_z_loss = packed[MICRO_BATCHES].item() > 0 and not packed[Z_LOSS_SUM].isnan().item()
        return TokenSums(
            packed[LOSS_SUM].to(dtype),
            packed[NUM_ITEMS].to(torch.int64),
            packed[TOTAL_WEIGHT].to(dtype),
            packed[NUM_CORRECT].to(torch.int64) if has_metrics else None,
            packed[ENTROPY_SUM].to(dtype) if has_metrics else None,
            packed[Z_LOSS_SUM].to(dtype) if has_z_loss else None,
        )


def _add_up(values: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """() in the widest dtype; NaN where some of the values are missing, 0 of none."""
    present = [value.to(device, non_blocking=True) for value in values if value is not None]
    if len(present) < len(values) or not present:
        return torch.full((), float("nan") if values else 0.0, dtype=wide_dtype(device), device=device)
    return torch.stack(present).sum(dtype=wide_dtype(device))


def as_sums(name: str, sums: Any, num_items: Any, has_graph: bool = True) -> TokenSums:
    if isinstance(sums, TokenSums):
        if num_items is not None:
            raise ValueError(f"{name}: expected no num_items with TokenSums, which have their own, got {num_items!r}")
        checked = sums
    else:
        if isinstance(sums, (tuple, list)) and len(sums) == 2 and num_items is None:
            sums, num_items = sums
        if not isinstance(sums, torch.Tensor):
            raise TypeError(
                f"{name}: expected TokenSums, a sum of losses or (loss_sum, num_items), got {type(sums).__name__}"
            )
        if num_items is None:
            raise ValueError(
                f"{name}: expected num_items with a sum of losses, got None; pass the items of the micro-batch, or the TokenSums "
                "of accumloss.cross_entropy"
            )
        check_count(name, "num_items", num_items)
        if not isinstance(num_items, torch.Tensor):
            num_items = torch.full((), num_items, dtype=torch.int64, device=sums.device)
        count = num_items.detach().reshape(())
        checked = TokenSums(sums, count, count)
    loss_sum = checked.loss_sum
    if loss_sum.dim() != 0 or not loss_sum.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating-point sum of losses of shape (), got {loss_sum.dtype} {tuple(loss_sum.shape)}; "
            "take the sum over the items, not their mean"
        )
    if has_graph and not loss_sum.requires_grad:
        raise ValueError(
            f"{name}: expected a loss sum with a graph, got one that does not require grad; was it detached?"
        )
    return checked


def check_count(name: str, what: str, count: Any) -> None:
    if isinstance(count, torch.Tensor):
        if count.numel() != 1:
            raise ValueError(f"{name}: expected {what} of shape (), got {tuple(count.shape)}")
    elif not is_count(count):
        raise TypeError(f"{name}: expected {what} as an int or a () tensor, got {type(count).__name__}")
    elif count < 0:
        raise ValueError(f"{name}: expected {what} >= 0, got {count}")


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def when_all_is_written(work: Callable[[], None], turns: int = 4) -> None:
    """Does the work when the backward that runs has ended, after the engines that write gradients then.

    Autograd calls what is queued in its order. FSDP queues its work in a hook; DistributedDataParallel queues work that
    queues some more. Going to the end of the queue a few times comes after both.
    """
    _compat.at_the_end_of_backward(work if turns == 0 else lambda: when_all_is_written(work, turns - 1))
