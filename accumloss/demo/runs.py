"""What the demo trains and what it keeps of it: settings, runs, deviations from the full batch, rows of the table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MEAN_OF_MEANS = "mean of means"
TRANSFORMERS = "transformers"
ACCUMLOSS = "accumloss"
DEPTHS = (1, 4, 16)  # micro-batches per optimizer step
FULL_BATCH = (TRANSFORMERS, 1)  # the truth that all runs are held against
WINDOW = 16  # sequences per optimizer step

MASKED_LM, CAUSAL_LM = "masked_lm", "causal_lm"
WAYS = {MASKED_LM: (TRANSFORMERS, ACCUMLOSS), CAUSAL_LM: (MEAN_OF_MEANS, TRANSFORMERS, ACCUMLOSS)}


class DemoError(RuntimeError):
    """The demo cannot run here; the message is one line and says what to do."""


@dataclass(frozen=True)
class Settings:
    """What a run of the demo depends on."""

    out: Path = Path("accumloss-demo")
    steps: int = 24
    device: str = "cpu"
    seed: int = 0


@dataclass
class Run:
    """One model, trained one way at one accumulation depth."""

    way: str
    depth: int
    model: Any
    optimizer: torch.optim.Optimizer | None = None  # None: Trainer makes it
    gradient_norm: float = math.nan  # of the first step
    losses: list[float] = field(default_factory=list)  # per step, as reported by the way: nats per token
    loss_deviations: list[float] = field(default_factory=list)  # |loss - loss of the full batch|
    weight_deviations: list[float] = field(default_factory=list)  # relative to the distance the full batch has trained
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def is_full_batch(self) -> bool:
        return (self.way, self.depth) == FULL_BATCH


@dataclass(frozen=True)
class Row:
    """One line of a table. What has become infinite or no number is shown as that."""

    way: str
    accumulation: int
    last_loss: float  # nats per token, as the way itself reports it
    gradient_ratio: float  # norm of the first step's gradient, of that of the full batch
    max_loss_deviation: float  # nats per token
    max_weight_deviation: float  # share of the distance trained
    step_ms: float  # median
    peak_mb: float | None  # of one step, above the process at rest


def gradient_norm(model: Any) -> float:
    return math.sqrt(sum(p.grad.double().pow(2).sum().item() for p in model.parameters() if p.grad is not None))


def flat_weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()


def weight_deviation(weights: torch.Tensor, truth: torch.Tensor, start: torch.Tensor) -> float:
    """Distance of weights (P,) from those of the full batch, as a share of the distance that the full batch has trained."""
    return float((weights - truth).norm() / (truth.double() - start).norm())


def largest(values: Iterable[float]) -> float:
    """max, where one NaN is the largest of all wherever it stands."""
    return max(values, key=lambda value: (math.isnan(value), value))


def full_batch_of(runs: Iterable[Run]) -> Run:
    return next(run for run in runs if run.is_full_batch)


def summarise(run: Run, full: Run) -> Row:
    return Row(
        way=run.way,
        accumulation=run.depth,
        last_loss=run.losses[-1],
        gradient_ratio=run.gradient_norm / full.gradient_norm,
        max_loss_deviation=largest(run.loss_deviations),
        max_weight_deviation=largest(run.weight_deviations),
        step_ms=1e3 * statistics.median(run.seconds),
        peak_mb=None if run.peak_bytes is None else run.peak_bytes / 1e6,
    )
