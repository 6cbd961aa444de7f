"""Exact gradient accumulation for training loops of one's own, on one process or on many.

The items of an optimizer step are not known before its last micro-batch. Each micro-batch therefore back-propagates the
**sum** of its losses, and ``finish()`` multiplies the gradients once, before clipping:

    gradient of the window = sum over micro-batches and ranks of d(loss sum) / N

where N is the number of items (total weight, with class weights) of the window over all ranks. Engines that average
gradients over W ranks have divided by W already, so there the factor is W / N.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import _compat
from .sums import TokenSums, _at_least_one, is_distributed

Sums = TokenSums | torch.Tensor | tuple[torch.Tensor, int | torch.Tensor]
Reduction = Literal["mean", "sum"]

DEFAULT_DIVISOR = 512  # with a GradScaler: its first scale, 65536, leaves fp16 no room for sums


class Accumulator:
    """Accumulates gradients over micro-batches, whatever their sizes, to those of the one batch that holds them all.

    A window is what one optimizer step sees. Equivalent, where the window fits into one batch, to::

        F.cross_entropy(logits_of_the_window, labels_of_the_window).backward()

    Args:
        model_or_params: a module, possibly wrapped (DistributedDataParallel, FullyShardedDataParallel, fully_shard,
            torch.compile), or an iterable of parameters.
        process_group: the data-parallel ranks, over which items are counted. None: that of DistributedDataParallel, else
            the default group. With tensor or pipeline parallelism, give the data-parallel group.
        gradient_reduction: "mean" where gradients are averaged over those ranks, "sum" where they are added up. None:
            "mean" for the wrappers above; otherwise, on several ranks, it must be given.
        max_items: an upper bound, or an estimate, of the window's items. Sums are divided by the next power of two before
            backward, and ``finish()`` multiplies it back: the same bits, but nothing overflows in fp16.
            None: no divisor, or 512 with a scaler.
        scaler: a torch.amp.GradScaler, which ``backward()`` scales by. The order is then ``scaler.unscale_(optimizer)``,
            ``finish()``, ``scaler.step(optimizer)``, ``scaler.update()``.

    Attributes:
        scale: () what the last ``finish()`` multiplied the gradients by, or would have with rescale=True.
        grad_norm: () 2-norm of the rescaled gradients before clipping, where ``finish()`` was given max_norm; else None.

    Raises:
        ValueError: several ranks and no gradient_reduction; an argument out of range.
        TypeError: not a module, nor parameters.

    The optimizer refuses to step in the middle of a window. Nothing synchronises with the device but a ``finish()`` that
    compares with an int known_total, or on a rank that had no micro-batch.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> accumulator = Accumulator([weight])
        >>> for x, labels in ([[1.0, 0.0], [0.0, 2.0]], [0, 1]), ([[4.0, 4.0]], [1]):
        ...     logits = torch.tensor(x) @ weight
        ...     loss_sum = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
        ...     accumulator.backward(loss_sum, num_items=len(labels))
        >>> stats = accumulator.finish()
        >>> stats.num_items.item(), round(stats.mean_loss.item(), 4), round(accumulator.scale.item(), 4)
        (3, 0.6931, 0.3333)
    """

    scale: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None

    def __init__(
        self,
        model_or_params: torch.nn.Module | Iterable[torch.Tensor],
        *,
        process_group: dist.ProcessGroup | None = None,
        gradient_reduction: Reduction | None = None,
        max_items: int | None = None,
        scaler: Any = None,
    ) -> None:
        if isinstance(model_or_params, torch.nn.Module):
            self._owner: torch.nn.Module | list[torch.Tensor] = model_or_params
        else:
            self._owner = _distinct(model_or_params)
        if gradient_reduction not in (None, "mean", "sum"):
            raise ValueError(f'Accumulator: expected gradient_reduction "mean" or "sum", got {gradient_reduction!r}')
        if max_items is not None and (not _is_count(max_items) or max_items < 1):
            raise ValueError(f"Accumulator: expected max_items as an int >= 1, got {max_items!r}")
        engine = _engine(self._owner)
        self._group = process_group if process_group is not None else engine.group
        self._ranks = dist.get_world_size(self._group) if is_distributed() else 1
        if self._ranks > 1 and gradient_reduction is None and engine.reduction is None:
            raise ValueError(
                f"Accumulator: expected gradient_reduction on {self._ranks} ranks, got None and no DDP or FSDP module to tell; "
                'give "mean" where the gradients are averaged over the ranks, "sum" where they are added up'
            )
        self._factor = 1 if (gradient_reduction or engine.reduction) == "sum" else self._ranks  # undoes the averaging
        self._reduced_by_caller = gradient_reduction is not None
        self._hides_norm = engine.hides_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if max_items is None:
            max_items = 1 if self._scaler is None else DEFAULT_DIVISOR
        self._divisor = 1 << (max_items - 1).bit_length()
        self._window: _Window | None = None  # None between windows
        self._left: _Marks = {}  # the gradients that the last finish() left, until they are written to again
        self._has_warned = False
        _watch_optimizers(self)

    def loss(
        self, sums: Sums, num_items: int | torch.Tensor | None = None, *, known_total: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Records a micro-batch and returns what is to be back-propagated, for engines whose own backward must be called.

        Args:
            sums: TokenSums, divided by their total_weight in the end; or the () sum of the losses, with num_items; or the
                pair (loss_sum, num_items) that torch.ops.accumloss.causal_lm returns.
            num_items: items of the micro-batch: int, or () tensor of any device.
            known_total: items (total weight) of the whole window over all ranks, where they are known beforehand: int, or
                () tensor. The loss is divided at once, and ``finish()`` multiplies by nothing. For all micro-batches of a
                window, or none.

        Returns:
            () tensor; its value is no loss to be logged. ``finish()`` returns that.

        Raises:
            ValueError, TypeError: sums, num_items or known_total do not fit.
            RuntimeError: gradients were zeroed or changed in the middle of the window, or not zeroed since the last.
        """
        return self._record("Accumulator.loss", sums, num_items, known_total)

    def backward(
        self, sums: Sums, num_items: int | torch.Tensor | None = None, *, known_total: int | torch.Tensor | None = None
    ) -> None:
        """Records a micro-batch and back-propagates it, through ``scaler.scale`` where there is a scaler; else as ``loss()``."""
        loss = self._record("Accumulator.backward", sums, num_items, known_total)
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def finish(self, *, rescale: bool = True, max_norm: float | None = None) -> TokenSums:
        """Makes the gradients those of the window: one all_reduce of the sums, one pass over the gradients.

        On every rank, once per window, after its last backward and before clipping; also on a rank that had no
        micro-batch. Gradients that the caller reduces over the ranks may be reduced before or after, but with max_norm
        before.

        Args:
            rescale: False leaves the gradients as they are; multiply them by ``scale``.
            max_norm: clip them to this 2-norm in the same pass, as ``torch.nn.utils.clip_grad_norm_`` would afterwards.
                ``math.inf`` clips nothing, and ``grad_norm`` is there.

        Returns:
            Sums of the window over all ranks, on the device of the losses, detached: ``mean_loss``, ``num_items``,
            ``perplexity``; and where all micro-batches had metrics, ``accuracy`` and ``mean_entropy``. A window without
            items has num_items 0, mean_loss 0 and zero gradients.

        Raises:
            RuntimeError: no micro-batch (on a single rank); one that was not back-propagated; gradients that were zeroed,
                clipped or scaled since; max_norm before ``scaler.unscale_``.
            ValueError: an int known_total that is not what was counted; max_norm out of range, or with FSDP1, whose
                gradients are shards without a mesh.
        """
        window = self._window
        if window is None and self._ranks == 1:
            self._check_ranks("Accumulator.finish")
            raise RuntimeError(
                "Accumulator.finish: expected micro-batches since the last finish(), got none; call backward() or loss() first"
            )
        window = window or _Window()
        self._check_finish(window, max_norm)
        parameters = self._parameters()
        packed = self._reduce(window)
        stats = window.unpack(packed)
        if _is_count(window.known_total):
            self._check_total(window, packed)

        scale = self._factor * self._divisor / _at_least_one(packed[_TOTAL_WEIGHT])
        scale = torch.where(packed[_KNOWN] > 0, torch.ones_like(scale), scale)
        grads = [p.grad for p in parameters if p.grad is not None]
        self.grad_norm = None
        if max_norm is not None:
            norm = _norm(grads, scale.device) * scale
            self.grad_norm = norm.to(stats.loss_sum.dtype)
            scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: as torch.nn.utils.clip_grad_norm_
        self.scale = scale.to(stats.loss_sum.dtype)
        if rescale and (window.known_total is None or max_norm is not None):
            _multiply_(grads, scale)
        self._window = None
        self._left = _marks(parameters)
        return stats

    def reset(self) -> None:
        """Drops an unfinished window, after an error in its middle, say. The caller zeroes the gradients."""
        self._window, self._left = None, {}

    # ------------------------------------------------------------------------------------------------ a micro-batch

    def _record(self, name: str, sums: Sums, num_items: Any, known_total: Any) -> torch.Tensor:
        checked = _as_sums(name, sums, num_items)
        window = self._window
        if known_total is not None:
            _check_count(name, "known_total", known_total)
        if window is None:
            self._check_ranks(name)
            window = _Window(known_total, left=self._left)
        else:
            window.refuse_changes(name)
            window.check_known(name, known_total)

        loss_sum = checked.loss_sum
        if known_total is None:
            loss = loss_sum / self._divisor
        elif isinstance(known_total, torch.Tensor):
            total = known_total.detach().to(loss_sum.device, loss_sum.dtype, non_blocking=True).reshape(())
            loss = loss_sum * (self._factor / _at_least_one(total))
        else:
            loss = loss_sum * (self._factor / max(known_total, 1))
        loss.register_hook(partial(_begin_backward, weakref.ref(self), window, window.add(checked)))
        self._window, self._left = window, {}
        return loss

    # -------------------------------------------------------------------------------------------------- a window

    def _parameters(self) -> list[torch.Tensor]:
        return _parameters_of(self._owner) if isinstance(self._owner, torch.nn.Module) else self._owner

    def _check_ranks(self, name: str) -> None:
        ranks = dist.get_world_size(self._group) if is_distributed() else 1
        if ranks != self._ranks:
            raise RuntimeError(
                f"{name}: expected an Accumulator that was made after init_process_group, got one for {self._ranks} of {ranks} "
                "ranks; make it later"
            )

    def _check_finish(self, window: _Window, max_norm: float | None) -> None:
        name = "Accumulator.finish"
        if window.pending:
            raise RuntimeError(
                f"{name}: expected a backward of every loss, got none of {len(window.pending)} of {len(window.sums)}; "
                "back-propagate what loss() returns, or drop the window with reset()"
            )
        window.refuse_changes(name, is_finish=True, may_be_reduced=self._reduced_by_caller)
        if max_norm is None:
            return
        if not max_norm > 0:
            raise ValueError(f"{name}: expected max_norm > 0, got {max_norm!r}")
        if self._hides_norm:
            raise ValueError(
                f"{name}: expected max_norm=None with FullyShardedDataParallel, whose gradients are shards, got {max_norm!r}; "
                "call finish(), then model.clip_grad_norm_(max_norm)"
            )
        if self._scaler is not None and not _has_unscaled(self._scaler):
            raise RuntimeError(
                f"{name}: expected scaler.unscale_(optimizer) before finish(max_norm={max_norm!r}), got scaled gradients"
            )

    def _reduce(self, window: _Window) -> torch.Tensor:
        packed = window.pack(next((p.device for p in self._parameters()), torch.device("cpu")))
        if self._ranks > 1:
            dist.all_reduce(packed, group=self._group)
        return packed

    def _check_total(self, window: _Window, packed: torch.Tensor) -> None:
        counted, known, micro_batches = packed[[_TOTAL_WEIGHT, _KNOWN, _MICRO_BATCHES]].tolist()
        if known != micro_batches:
            raise ValueError(
                f"Accumulator.finish: expected known_total on all ranks or none, got it for {known:.0f} of {micro_batches:.0f} "
                "micro-batches"
            )
        if counted != window.known_total:
            raise ValueError(
                f"Accumulator.finish: expected the known_total {window.known_total} over all micro-batches and ranks, got "
                f"{counted:g}; count what the loss counts: labels after the shift that are not ignore_index, of all ranks"
            )

    # ------------------------------------------------------------------------------------------------ an optimizer

    def _refuse_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before (with a closure, after) each step of any optimizer."""
        if self._window is not None and _holds(optimizer, self._parameters()):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step: expected Accumulator.finish() before it, got a window of "
                f"{len(self._window.sums)} micro-batches whose gradients are sums; call finish() first"
            )

    def _see_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of any optimizer: what is left now may have been clipped after finish()."""
        if self._window is not None or not self._left:
            return
        stepped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        ours = [p for p in stepped if id(p) in self._left]
        if not ours:
            return
        self._left.update(_marks(ours))
        if not self._has_warned and len(ours) < len(stepped):
            self._warn_of_others(optimizer, stepped)

    def _warn_of_others(self, optimizer: torch.optim.Optimizer, stepped: list[torch.Tensor]) -> None:
        accumulated = {id(p) for accumulator in list(_watched) for p in accumulator._parameters()}
        others = sum(id(p) not in accumulated for p in stepped)
        if others:
            self._has_warned = True
            warnings.warn(
                f"{type(optimizer).__name__}.step: expected parameters of an Accumulator only, got {others} others with a gradient "
                f"beside {len(stepped) - others}, which finish() has not rescaled; give all of them to the Accumulator, or the "
                "others to an optimizer of their own",
                stacklevel=2,
            )


# ------------------------------------------------------------------------------------------------------------ a window

# what is packed into the one all_reduce: the fields of TokenSums, and how many micro-batches were divided by known_total
_LOSS_SUM, _NUM_ITEMS, _TOTAL_WEIGHT, _NUM_CORRECT, _ENTROPY_SUM, _MICRO_BATCHES, _KNOWN = range(7)


@dataclass
class _Window:
    """Micro-batches of this rank. Their sums are added up in the end, not one by one: a stack each, and in fp64."""

    known_total: int | torch.Tensor | None = None
    left: _Marks = field(default_factory=dict)  # gradients of the window before, which must be zeroed by now
    sums: list[TokenSums] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)  # micro-batches that were not back-propagated yet
    written: _Marks = field(default_factory=dict)  # the gradients that the window has written, as they were after it
    before: _Marks = field(default_factory=dict)  # all others, before the backward that runs
    backward: int | None = None  # the backward that runs
    running: set[int] = field(default_factory=set)  # and its micro-batches

    def check_known(self, name: str, known_total: int | torch.Tensor | None) -> None:
        if (known_total is None) != (self.known_total is None):
            raise ValueError(
                f"{name}: expected known_total for all micro-batches of a window or for none, got "
                f"{'none' if known_total is None else 'one'} after {len(self.sums)} with{'out' if self.known_total is None else ''}"
            )
        if _is_count(known_total) and _is_count(self.known_total) and known_total != self.known_total:
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
            elif now._version != version and grad() is now and _version(now) != version:
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
        self.left = {key: mark for key, mark in self.left.items() if _is_unchanged(mark)}
        self.before = _marks(parameters, but=self.written)
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
            if before is None or not _is_unchanged(before):
                written[key] = (parameter, weakref.ref(grad), _version(grad))
        is_on_top = any(key in written for key in self.left)
        self.written, self.before, self.backward = written, {}, None
        if is_on_top:
            raise RuntimeError(
                "Accumulator: expected gradients that were zeroed after the last window, got those of that window; call "
                "optimizer.zero_grad() after optimizer.step(), and reset()"
            )

    def pack(self, device: torch.device) -> torch.Tensor:
        """(7,) float64, on the device of the losses; on ``device`` where there is none. The same layout on all ranks."""
        if self.sums:
            device = self.sums[0].loss_sum.device
        micro_batches = len(self.sums)
        known = 0 if self.known_total is None else micro_batches
        rows = [
            _add_up([getattr(sums, name) for sums in self.sums], device)
            for name in ("loss_sum", "num_items", "total_weight", "num_correct", "entropy_sum")
        ]
        counts = (torch.full((), n, dtype=torch.float64, device=device) for n in (micro_batches, known))
        return torch.stack([*rows, *counts])

    def unpack(self, packed: torch.Tensor) -> TokenSums:
        if self.sums:
            dtype = torch.promote_types(self.sums[0].loss_sum.dtype, torch.float32)
            has_metrics = all(s.num_correct is not None and s.entropy_sum is not None for s in self.sums)
        else:  # this rank cannot know; it has had nothing to do, and may wait for the answer
            dtype = torch.float32
            has_metrics = packed[_MICRO_BATCHES].item() > 0 and not packed[_NUM_CORRECT].isnan().item()
        return TokenSums(
            packed[_LOSS_SUM].to(dtype),
            packed[_NUM_ITEMS].to(torch.int64),
            packed[_TOTAL_WEIGHT].to(dtype),
            packed[_NUM_CORRECT].to(torch.int64) if has_metrics else None,
            packed[_ENTROPY_SUM].to(dtype) if has_metrics else None,
        )


def _add_up(values: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """() float64; NaN where some of the values are missing, 0 of none."""
    present = [value.to(device, non_blocking=True) for value in values if value is not None]
    if len(present) < len(values) or not present:
        return torch.full((), float("nan") if values else 0.0, dtype=torch.float64, device=device)
    return torch.stack(present).sum(dtype=torch.float64)


def _as_sums(name: str, sums: Any, num_items: Any) -> TokenSums:
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
        _check_count(name, "num_items", num_items)
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
    if not loss_sum.requires_grad:
        raise ValueError(
            f"{name}: expected a loss sum with a graph, got one that does not require grad; was it detached?"
        )
    return checked


def _check_count(name: str, what: str, count: Any) -> None:
    if isinstance(count, torch.Tensor):
        if count.numel() != 1:
            raise ValueError(f"{name}: expected {what} of shape (), got {tuple(count.shape)}")
    elif not _is_count(count):
        raise TypeError(f"{name}: expected {what} as an int or a () tensor, got {type(count).__name__}")
    elif count < 0:
        raise ValueError(f"{name}: expected {what} >= 0, got {count}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------------------- gradients


# A parameter, its gradient, and the gradient's version: whether anything has written to it since. The gradient by a weak
# reference, so that one that is dropped is freed. A plain tuple, since there is one for each parameter and micro-batch.
_Mark = tuple[torch.Tensor, "weakref.ref[torch.Tensor]", int]
_Marks = dict[int, _Mark]  # by the id of the parameter


def _marks(parameters: Iterable[torch.Tensor], but: _Marks | None = None) -> _Marks:
    """Of all parameters that have a gradient."""
    found = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None and (but is None or id(parameter) not in but):
            found[id(parameter)] = (parameter, weakref.ref(grad), _version(grad))
    return found


def _is_unchanged(mark: _Mark) -> bool:
    parameter, grad, version = mark
    now = parameter.grad
    return now is not None and grad() is now and _version(now) == version


def _begin_backward(accumulator: weakref.ref[Accumulator], window: _Window, index: int, _: torch.Tensor) -> None:
    """A hook on the loss of a micro-batch: called when its backward begins, and calls when that has ended."""
    if torch.compiler.is_compiling():  # compiled autograd, which traces hooks and has no such calls
        window.pass_backward(index)
        return
    owner = accumulator()
    if owner is None or owner._window is not window or not window.begin_backward(index, owner._parameters()):
        return
    _when_all_is_written(lambda: window.end_backward(owner._parameters()))


def _when_all_is_written(work: Callable[[], None], turns: int = 4) -> None:
    """Does the work when the backward that runs has ended, after the engines that write gradients then.

    Autograd calls what is queued in its order. FSDP queues its work in a hook; DistributedDataParallel queues work that
    queues some more. Going to the end of the queue a few times comes after both.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(work if turns == 0 else lambda: _when_all_is_written(work, turns - 1))


def _parameters_of(module: torch.nn.Module) -> list[torch.Tensor]:
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


def _version(grad: torch.Tensor) -> int:
    """Negative where a tensor inside counts too, so that the version of the outer one alone never equals it.

    Of a DTensor, the sum of its own (zero_() counts there) and its local tensor's (FSDP adds to that).
    """
    if type(grad) is torch.Tensor and not grad.is_sparse:
        return grad._version
    local = getattr(grad, "_local_tensor", None)  # to_local(), a hundred times as fast
    if local is None:
        local = _local(grad)
    return grad._version if local is grad else -1 - grad._version - local._version


@torch.no_grad()
def _local(grad: torch.Tensor) -> torch.Tensor:
    """The memory of this rank: the shard of a DTensor, the values of a sparse gradient."""
    if hasattr(grad, "to_local"):
        grad = grad.to_local()
    return grad._values() if grad.is_sparse else grad


@torch.no_grad()
def _multiply_(grads: list[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies all gradients by a () factor; one foreach for each device and dtype."""
    groups = defaultdict(list)
    for grad in map(_local, grads):
        groups[grad.device, grad.dtype].append(grad)
    for (device, dtype), group in groups.items():
        if dtype in (torch.float32, torch.float64):
            torch._foreach_mul_(group, factor.to(device, dtype))
        elif device.type == "cpu":
            torch._foreach_mul_(group, factor.to(device, torch.float32))
        else:  # a () factor would be rounded to bf16 or fp16 first, and with it every gradient in the same direction
            factor32 = factor.to(device, torch.float32)
            torch._foreach_mul_(group, [factor32.expand(grad.shape) for grad in group])


@torch.no_grad()
def _norm(grads: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """() float64 2-norm of all gradients together; of DTensors, over all of their shards."""
    groups = defaultdict(list)
    for grad in grads:
        if grad.is_sparse:
            grad = grad.coalesce()._values()
        groups[grad.device, grad.dtype, getattr(grad, "device_mesh", None)].append(grad)
    norms = [torch.zeros((), dtype=torch.float64, device=device)]
    for (_, dtype, _), group in groups.items():
        accumulated = torch.promote_types(dtype, torch.float32)  # in fp16, the norm of a sum would be infinite
        norm: Any = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(group, 2, dtype=accumulated)))
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        norms.append(norm.to(device, torch.float64))
    return torch.linalg.vector_norm(torch.stack(norms))


def _distinct(parameters: Any) -> list[torch.Tensor]:
    if isinstance(parameters, Iterable) and not isinstance(parameters, torch.Tensor):
        found = list(parameters)
        if all(isinstance(p, torch.Tensor) for p in found):
            return list(dict.fromkeys(found))
    raise TypeError(f"Accumulator: expected a module or an iterable of parameters, got {type(parameters).__name__}")


# ------------------------------------------------------------------------------------------------- engines, optimizers


class _Engine(NamedTuple):
    """What reduces the gradients over the ranks."""

    reduction: Reduction | None = None
    group: dist.ProcessGroup | None = None
    hides_norm: bool = False  # shards without a mesh over which to take their norm


def _engine(owner: Any) -> _Engine:
    if not isinstance(owner, torch.nn.Module) or not is_distributed():
        return _Engine()
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a second to import, so only here

    for module in owner.modules():  # torch.compile, Accelerate and Fabric wrap the wrapper
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            return _Engine("mean", module.process_group)
        if isinstance(module, FullyShardedDataParallel):
            return _Engine("mean", hides_norm=True)
        if isinstance(module, FSDPModule):
            return _Engine("mean")
    return _Engine()


def _has_unscaled(scaler: Any) -> bool:
    """Whether scaler.unscale_() was called since its last update()."""
    return any(state["found_inf_per_device"] for state in scaler._per_optimizer_states.values())


def _holds(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor]) -> bool:
    ours = set(map(id, parameters))
    return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])


_watched: weakref.WeakSet[Accumulator] = weakref.WeakSet()
_hooks: list[Any] = []


def _watch_optimizers(accumulator: Accumulator) -> None:
    """One pair of hooks for all accumulators, from the first of them on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_pre_hook))
        _hooks.append(register_optimizer_step_post_hook(_post_hook))
    _watched.add(accumulator)


def _pre_hook(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if not _has_closure(args, kwargs):
        for accumulator in list(_watched):
            accumulator._refuse_step(optimizer)


def _post_hook(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    for accumulator in list(_watched):
        if _has_closure(args, kwargs):  # backward and finish() are in the closure
            accumulator._refuse_step(optimizer)
        accumulator._see_step(optimizer)


def _has_closure(args: tuple, kwargs: dict) -> bool:
    return any(callable(argument) for argument in (*args[1:], kwargs.get("closure")))
