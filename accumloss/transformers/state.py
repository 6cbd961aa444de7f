"""What is known of each Trainer, from its first step on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .._compat import not_compiled
from ..sums import TokenSums, wide_dtype, widened
from . import counting, known, losses, mapping, objective, probe, terms
from . import step as steps
from .exchange import Exchange
from .models import base_model, counted_rule, shifts_labels
from .ranks import is_of_ulysses, sum_over_ranks
from .registration import registration
from .settings import settings


class Window:
    """The micro-batches of one optimizer step on this rank, and what has been counted in them.

    Attributes:
        batches: their entries as they were when they were fetched; a forward may write over its labels.
        is_sharded: whether they are split along the sequence before they are used. Then batches hold the whole, and what
            is used is a part.
        counts: how many of their labels count, where heads run from hidden states: asked for when one does.
    """

    def __init__(self, fetched: Sequence[Any], is_sharded: bool = False):
        self.fetched = fetched
        self.is_sharded = is_sharded
        # before the copies, which the host takes its time for
        self.counts = counting.counted(fetched) if settings.fused_linear and not is_sharded else []
        self.batches = [counting.whole(batch) if is_sharded else counting.kept(batch) for batch in fetched]
        self.totals: dict[Any, Any] = {}
        self.shift: int | None = None  # of the labels that Trainer counts, once asked for
        self.items: tuple[Any, int, torch.Tensor] | None = None  # see share_of_items
        self.seen = 0  # micro-batches that have been trained on

    def share_of_items(self, given: Any, micro_batches: int) -> torch.Tensor:
        """The items per micro-batch: () fp32, computed once for the number that all micro-batches are given."""
        if self.items is None or self.items[0] is not given or self.items[1] != micro_batches:
            self.items = given, micro_batches, objective.per_micro_batch(given, micro_batches)
        return self.items[2].clone()

    def find(self, inputs: Any) -> int | None:
        """The index of the micro-batch that inputs are, or were made from: one that shares a tensor's memory with them."""
        for index, batch in enumerate(self.fetched):
            if batch is inputs:
                return index
        mine = {v.data_ptr() for v in counting.entries_of(inputs).values() if isinstance(v, torch.Tensor) and v.numel()}
        for index, batch in enumerate(self.fetched):
            theirs = counting.entries_of(batch).values()
            if any(isinstance(v, torch.Tensor) and v.numel() and v.data_ptr() in mine for v in theirs):
                return index
        return None


class State:
    """What is known of one Trainer."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self.origins: dict[Any, counting.Origin] = {}  # of the labels of earlier calls
        self.metrics: Metrics | None = None
        self.warned: set[str] = set()
        self.check = objective.Check()
        self.windows = 0  # that have been trained on
        self.measured = terms.Measured()
        self.verification: probe.Verification | None = None
        self.doubts: set[str] | None = None  # about a loss that was measured, in the first window after that
        self.schemes = terms.Schemes()
        self.known: known.Known | None = None  # what is written down of its class
        self.is_looked_up = False
        self.exchange = Exchange()
        self.methods: dict[str, Callable[..., Any]] = {}  # its own, which ours are around while it trains

    def end_window(self) -> None:
        """The window after this one is looked at again where it is the second, fourth, eighth, ...: a loss may change in the
        course of a training."""
        self.windows += 1
        if self.known is None and self.windows & (self.windows + 1) == 0:
            self.check = objective.Check()

    def look_up(self, trainer: Any, inputs: Any) -> known.Known | None:
        """What is written down of a Trainer's class, by a micro-batch as compute_loss gets it: asked once."""
        if not self.is_looked_up and isinstance(inputs, Mapping):
            self.is_looked_up = True
            self.known = known.look_up(trainer, inputs)
            if self.known is not None:
                self.check.is_done, self.measured = True, self.known.measured
        return self.known


def state_of(trainer: Any) -> State:
    state = registration.trainers.get(trainer)
    if state is None:
        state = registration.trainers[trainer] = State()
    return state


class Metrics:
    """Observes the losses of a Trainer: the metrics of the tokens that were trained on since the last log."""

    metrics = True

    def __init__(self) -> None:
        self.sums: Any = None  # items, correct ones, entropy: (3,) float64
        self.to_log: dict[str, float] = {}

    @not_compiled
    def __call__(self, loss: torch.Tensor, sums: TokenSums | None) -> torch.Tensor:
        step = steps.current()
        if sums is not None and step is not None and step.observer is self:
            step.observer = None  # the first cross-entropy of a micro-batch is its main one; the others need no metrics
            values = (sums.num_items, sums.num_correct, sums.entropy_sum)
            added = torch.stack([widened(value) for value in values if value is not None])
            self.sums = added if self.sums is None else self.sums + added.to(self.sums.device)
        return loss

    def collect(self, trainer: Any) -> None:
        """Adds the sums up over the ranks, for the log that follows. Every rank calls it."""
        device = trainer.args.device
        sums = torch.zeros(3, dtype=wide_dtype(device), device=device) if self.sums is None else self.sums
        items, correct, entropy = sum_over_ranks(trainer, sums).tolist()
        self.sums = None
        self.to_log = {"token_accuracy": correct / items, "token_entropy": entropy / items} if items else {}


def is_covered(trainer: Any) -> bool:
    """Whether the step of this Trainer is ours to count."""
    if not registration.is_active:
        return False
    if is_of_ulysses(trainer):
        return False  # DeepSpeed counts its own tokens, and divides by them
    if registration.covers_all:
        return True
    return registration.is_active and losses.underlying(mapping.loss_of(base_model(trainer))) is not None


def counted_in_step(trainer: Any, window: Window | None, batch: Mapping[str, Any]) -> counting.Rule:
    """counted_rule, whose shift is asked for once a window."""
    if window is None or "shift_labels" in batch:
        return counted_rule(trainer, batch)
    if window.shift is None:
        window.shift = int(shifts_labels(base_model(trainer)))
    return counting.Rule("labels", window.shift)


def begin(trainer: Any, state: State, step: steps.Step, inputs: Any) -> None:
    step.begin(counting.entries_of(inputs))
    if isinstance(step.inputs.get("labels"), torch.Tensor) and isinstance(inputs, Mapping):
        step.main = counted_in_step(trainer, state.window, inputs)
