"""Accumulator: records the micro-batches of a window, and makes the gradients those of the window."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..keywords import checked
from ..sums import TokenSums, at_least_one, is_distributed
from .engines import Engine, Reduction, engine_of, has_unscaled, size_of
from .gradients import Marks, distinct, marks, multiply_, norm_of, parameters_of
from .window import (
    KNOWN,
    MICRO_BATCHES,
    TOTAL_WEIGHT,
    Window,
    as_sums,
    check_count,
    is_count,
    when_all_is_written,
)

Sums = TokenSums | torch.Tensor | tuple[torch.Tensor, int | torch.Tensor]

DEFAULT_DIVISOR = 512  # with a GradScaler: its first scale, 65536, leaves fp16 no room for sums


class Accumulator:
    """Accumulates gradients over micro-batches, whatever their sizes, to those of the one batch that holds them all.

    A window is what one optimizer step sees. Equivalent, where the window fits into one batch, to:

        F.cross_entropy(logits_of_the_window, labels_of_the_window).backward()

    Args:
        model_or_params: a module, possibly wrapped (DistributedDataParallel, FullyShardedDataParallel, fully_shard,
            torch.compile), or an iterable of parameters.
        process_group: the data-parallel ranks, over which items are counted. None: those over which DistributedDataParallel
            or fully_shard averages; else all ranks. With tensor parallelism alone it must be given.
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
        TypeError: not a module, nor parameters; an unknown keyword.

    The optimizer refuses to step in the middle of a window. Nothing synchronises with the device but a ``finish()`` that
    compares with an int known_total, or on a rank that had no micro-batch.

    Examples:
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

    @partial(checked, name="Accumulator", names_errors=False)
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
            self._owner = distinct(model_or_params)
        if gradient_reduction not in (None, "mean", "sum"):
            raise ValueError(f'Accumulator: expected gradient_reduction "mean" or "sum", got {gradient_reduction!r}')
        if max_items is not None and (not is_count(max_items) or max_items < 1):
            raise ValueError(f"Accumulator: expected max_items as an int >= 1, got {max_items!r}")
        engine = engine_of(self._owner)
        self._groups = engine.groups if process_group is None else (process_group,)
        self._ranks = size_of(self._groups) if is_distributed() else 1
        self._check_engine(engine, process_group, gradient_reduction)
        if self._ranks > 1 and gradient_reduction is None and engine.reduction is None:
            raise ValueError(
                f"Accumulator: expected gradient_reduction on {self._ranks} ranks, got None and no DDP or FSDP module to tell; "
                'give "mean" where the gradients are averaged over the ranks, "sum" where they are added up'
            )
        self._factor = 1 if (gradient_reduction or engine.reduction) == "sum" else self._ranks  # undoes the averaging
        self._factors = {} if gradient_reduction is not None else engine.factors  # of some parameters, others
        self._reduced_by_caller = gradient_reduction is not None
        self._hides_norm = engine.hides_norm
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if max_items is None:
            max_items = 1 if self._scaler is None else DEFAULT_DIVISOR
        self._divisor = 1 << (max_items - 1).bit_length()
        self._window: Window | None = None  # None between windows
        self._left: Marks = {}  # the gradients that the last finish() left, until they are written to again
        self._has_warned = False
        _watch_optimizers(self)

    @partial(checked, name="Accumulator.loss", names_errors=False)
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

    @partial(checked, name="Accumulator.backward", names_errors=False)
    def backward(
        self, sums: Sums, num_items: int | torch.Tensor | None = None, *, known_total: int | torch.Tensor | None = None
    ) -> None:
        """Records a micro-batch and back-propagates it, through ``scaler.scale`` where there is a scaler; else as ``loss()``."""
        loss = self._record("Accumulator.backward", sums, num_items, known_total)
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    @partial(checked, name="Accumulator.add", names_errors=False)
    def add(self, sums: Sums, num_items: int | torch.Tensor | None = None) -> None:
        """Records a micro-batch whose backward is somebody else's, as it is: a pipeline schedule's, say.

        The sum of its losses must be back-propagated undivided, before or after this. A schedule of torch divides all
        gradients by its micro-batches unless it was made with ``scale_grads=False``; that cannot be seen here.

        Args:
            sums, num_items: as of loss(); no graph is needed.

        Raises:
            ValueError, TypeError: sums or num_items do not fit; the Accumulator has max_items, a scaler, or a window with
                known_total, for which losses have to be divided before their backward.
        """
        name = "Accumulator.add"
        checked = as_sums(name, sums, num_items, has_graph=False)
        if self._divisor != 1 or (self._window is not None and self._window.known_total is not None):
            raise ValueError(
                f"{name}: expected sums that nothing divides before their backward, got max_items, a scaler or known_total; "
                "use loss()"
            )
        if self._window is None:
            self._check_ranks(name)
            self._window, self._left = Window(left=self._left), {}
        self._window.pending.discard(self._window.add(checked))

    @partial(checked, name="Accumulator.finish", names_errors=False)
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
        window = window or Window()
        self._check_finish(window, rescale, max_norm)
        parameters = self._parameters()
        packed = self._reduce(window)
        stats = window.unpack(packed)
        if is_count(window.known_total):
            self._check_total(window, packed)

        scale = self._factor * self._divisor / at_least_one(packed[TOTAL_WEIGHT])
        scale = torch.where(packed[KNOWN] > 0, torch.ones_like(scale), scale)
        grads = [p.grad for p in parameters if p.grad is not None]
        self.grad_norm = None
        if max_norm is not None:
            norm = norm_of(grads, scale.device) * scale
            self.grad_norm = norm.to(stats.loss_sum.dtype)
            scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: as torch.nn.utils.clip_grad_norm_
        self.scale = scale.to(stats.loss_sum.dtype)
        if rescale and (window.known_total is None or max_norm is not None):
            multiply_(grads, scale)
        self._multiply_others(parameters)
        self._window = None
        self._left = marks(parameters)
        return stats

    @partial(checked, name="Accumulator.reset", names_errors=False)
    def reset(self) -> None:
        """Drops an unfinished window, after an error in its middle, say. The caller zeroes the gradients."""
        self._window, self._left = None, {}

    # ------------------------------------------------------------------------------------------------ a micro-batch

    def _record(self, name: str, sums: Sums, num_items: Any, known_total: Any) -> torch.Tensor:
        checked = as_sums(name, sums, num_items)
        window = self._window
        if known_total is not None:
            check_count(name, "known_total", known_total)
        if window is None:
            self._check_ranks(name)
            window = Window(known_total, left=self._left)
        else:
            window.refuse_changes(name)
            window.check_known(name, known_total)

        loss_sum = checked.loss_sum
        if known_total is None:
            loss = loss_sum / self._divisor
        elif isinstance(known_total, torch.Tensor):
            total = known_total.detach().to(loss_sum.device, loss_sum.dtype, non_blocking=True).reshape(())
            loss = loss_sum * (self._factor / at_least_one(total))
        else:
            loss = loss_sum * (self._factor / max(known_total, 1))
        loss.register_hook(partial(_begin_backward, weakref.ref(self), window, window.add(checked)))
        self._window, self._left = window, {}
        return loss

    # -------------------------------------------------------------------------------------------------- a window

    def _parameters(self) -> list[torch.Tensor]:
        return parameters_of(self._owner) if isinstance(self._owner, torch.nn.Module) else self._owner

    def _check_ranks(self, name: str) -> None:
        ranks = size_of(self._groups) if is_distributed() else 1
        if ranks != self._ranks:
            raise RuntimeError(
                f"{name}: expected an Accumulator that was made after init_process_group, got one for {self._ranks} of {ranks} "
                "ranks; make it later"
            )

    def _check_finish(self, window: Window, rescale: bool, max_norm: float | None) -> None:
        name = "Accumulator.finish"
        if window.pending:
            raise RuntimeError(
                f"{name}: expected a backward of every loss, got none of {len(window.pending)} of {len(window.sums)}; "
                "back-propagate what loss() returns, or drop the window with reset()"
            )
        window.refuse_changes(name, is_finish=True, may_be_reduced=self._reduced_by_caller)
        if self._factors and not rescale:
            raise ValueError(
                f"{name}: expected rescale=True where units of FSDP lie on meshes of different sizes, whose gradients need "
                "different factors, got rescale=False"
            )
        if max_norm is None:
            return
        if not max_norm > 0:
            raise ValueError(f"{name}: expected max_norm > 0, got {max_norm!r}")
        if self._factors:
            raise ValueError(
                f"{name}: expected max_norm=None where units of FSDP lie on meshes of different sizes, over which there is no one "
                f"norm, got {max_norm!r}; call finish(), then clip each mesh's gradients"
            )
        if self._hides_norm:
            raise ValueError(
                f"{name}: expected max_norm=None with FullyShardedDataParallel, whose gradients are shards, got {max_norm!r}; "
                "call finish(), then model.clip_grad_norm_(max_norm)"
            )
        if self._scaler is not None and not has_unscaled(self._scaler):
            raise RuntimeError(
                f"{name}: expected scaler.unscale_(optimizer) before finish(max_norm={max_norm!r}), got scaled gradients"
            )

    def _reduce(self, window: Window) -> torch.Tensor:
        packed = window.pack(next((p.device for p in self._parameters()), torch.device("cpu")))
        if self._ranks > 1:
            for group in self._groups:  # one after the other, where they are dimensions of a mesh
                dist.all_reduce(packed, group=group)
        return packed

    def _multiply_others(self, parameters: list[torch.Tensor]) -> None:
        """Gradients that were averaged over fewer ranks than the others were multiplied by too many."""
        by_factor: dict[int, list[torch.Tensor]] = {}
        for parameter in parameters:
            factor = self._factors.get(id(parameter))
            if factor is not None and parameter.grad is not None:
                by_factor.setdefault(factor, []).append(parameter.grad)
        for factor, grads in by_factor.items():
            multiply_(grads, torch.tensor(factor / self._factor, dtype=torch.float64))

    def _check_engine(
        self, engine: Engine, process_group: dist.ProcessGroup | None, gradient_reduction: Reduction | None
    ) -> None:
        """Refuses what cannot be exact."""
        if engine.apart and process_group is None and not engine.reduction:
            raise ValueError(
                f"Accumulator: expected process_group, got None, and {engine.apart}; give the ranks whose micro-batches differ: "
                'mesh["dp"].get_group(), dist.group.WORLD for all, dist.new_group([rank], use_local_synchronization=True) for none'
            )
        if engine.apart and engine.reduction and gradient_reduction is None:
            raise ValueError(
                f"Accumulator: expected gradients that are all reduced alike, got a model of which {engine.apart}; have all "
                'gradients added up over the ranks and give gradient_reduction="sum"'
            )
        if process_group is not None and gradient_reduction is None and engine.reduction == "mean":
            ranks = size_of(engine.groups)
            if not engine.hides_norm and self._ranks != ranks:
                raise ValueError(
                    f"Accumulator: expected a process_group of the {ranks} ranks over which the gradients are averaged, got one of "
                    f'{self._ranks}; leave it out, or give gradient_reduction="sum" where the gradients are added up'
                )

    def _check_total(self, window: Window, packed: torch.Tensor) -> None:
        counted, known, micro_batches = packed[[TOTAL_WEIGHT, KNOWN, MICRO_BATCHES]].tolist()
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
        self._left.update(marks(ours))
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


def _begin_backward(accumulator: weakref.ref[Accumulator], window: Window, index: int, _: torch.Tensor) -> None:
    """A hook on the loss of a micro-batch: called when its backward begins, and calls when that has ended."""
    if torch.compiler.is_compiling():  # compiled autograd, which traces hooks and has no such calls
        window.pass_backward(index)
        return
    owner = accumulator()
    if owner is None or owner._window is not window or not window.begin_backward(index, owner._parameters()):
        return
    when_all_is_written(lambda: window.end_backward(owner._parameters()))


# The optimizers ---------------------------------------------------------------------------------------------------------


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
