"""The demo's pictures, drawn from its curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .report import Curves
from .runs import ACCUMLOSS, CAUSAL_LM, DEPTHS, FULL_BATCH, MEAN_OF_MEANS, TRANSFORMERS, WAYS

# Okabe-Ito colours; each way also has its own dash and width, so that no reader depends on colour.
STYLES: dict[str, dict[str, Any]] = {
    MEAN_OF_MEANS: {"color": "#D55E00", "linestyle": "-", "linewidth": 1.6},
    TRANSFORMERS: {"color": "#56C9A0", "linestyle": "-", "linewidth": 3.4},
    ACCUMLOSS: {"color": "#0072B2", "linestyle": (0, (4, 1.5)), "linewidth": 1.5},
}
# The masked LM: the colour is the way, the marker the depth; those of lines that coincide take turns.
WAY_COLORS = {TRANSFORMERS: "#D55E00", ACCUMLOSS: "#0072B2"}
DEPTH_MARKERS = {1: "o", 4: "s", 16: "^"}


def plot_masked_lm(curves: Curves, path: Path) -> None:
    """The masked LM in Trainer: the logged loss, and how far the weights are from those of the one batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = {
        "loss": ("Logged loss", "nats per token"),
        "weight_deviation": ("Weights: distance from those of the one batch", "share of the distance trained"),
    }
    for axis, (name, (title, label)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, depth in enumerate(DEPTHS):
            for way, color in WAY_COLORS.items():
                curve = curves[way, depth]
                values = [v if v > 0 and math.isfinite(v) else math.nan for v in curve[name]]  # no others on a log axis
                style: dict[str, Any] = {"color": color, "marker": DEPTH_MARKERS[depth], "linewidth": 1.6}
                if (way, depth) == FULL_BATCH:  # a band, for the others to lie on
                    style.update(linewidth=8, alpha=0.3, marker="", solid_capstyle="round")
                elif way == ACCUMLOSS:
                    style.update(markevery=(min(i, len(values) - 1), len(DEPTHS)))
                axis.plot(curve["step"], values, markersize=5, label=label_of(way, depth), **style)
                mark_loss_of_numbers(axis, curve["step"], curve[name], color)
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), ncols=len(DEPTHS), frameon=False, loc="outside lower center")
    figure.savefig(path, dpi=170)


def label_of(way: str, depth: int) -> str:
    return f"{way}, {depth} micro-batch{'es' if depth > 1 else ''}"


def mark_loss_of_numbers(axis: Any, steps: list[float], values: list[float], color: str) -> None:
    """A cross at the last value before the first infinity or NaN, which a line would hide."""
    lost = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if lost:
        axis.plot(steps[lost - 1], values[lost - 1], color=color, marker="x", markersize=10, markeredgewidth=2.5)
        axis.annotate("not a number", (steps[lost - 1], values[lost - 1]), (6, -3), textcoords="offset points")


def plot_losses(curves: Curves, path: Path) -> None:
    """The loss curves, one panel per accumulation depth, over the full batch's."""
    from matplotlib.figure import Figure

    depths = [depth for depth in DEPTHS if depth > 1]
    figure = Figure(figsize=(5.2 * len(depths), 4.2), layout="constrained")
    axes = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for axis, depth in zip(axes, depths, strict=True):
        full = curves[FULL_BATCH]
        axis.plot(full["step"], full["loss"], color="#BBBBBB", linewidth=6, solid_capstyle="round", label="full batch")
        for way in WAYS[CAUSAL_LM]:
            curve = curves[way, depth]
            axis.plot(curve["step"], curve["loss"], label=way, **STYLES[way])
        axis.set_title(f"{depth} micro-batches per step")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reported loss (nats per token)")
    axes[-1].legend(frameon=False)
    figure.suptitle("The same sequences in every step: the loss that each way reports")
    figure.savefig(path, dpi=150)


def plot_deviations(curves: Curves, path: Path) -> None:
    """Deviation from the full batch on a log axis: the loss above, the weights below, one column per depth."""
    from matplotlib.figure import Figure

    depths = [depth for depth in DEPTHS if depth > 1]
    rows = {
        "loss_deviation": "loss: |difference|\n(nats per token)",
        "weight_deviation": "weights: distance\n(share of the distance trained)",
    }
    figure = Figure(figsize=(5.2 * len(depths), 6.6), layout="constrained")
    grid = figure.subplots(len(rows), len(depths), sharex=True, sharey="row", squeeze=False)
    for axes, (name, label) in zip(grid, rows.items(), strict=True):
        shown = [v for way in WAYS[CAUSAL_LM] for depth in depths for v in curves[way, depth][name] if v > 0]
        floor = min(shown, default=1e-9) / 2
        for axis, depth in zip(axes, depths, strict=True):
            for way in WAYS[CAUSAL_LM]:
                curve = curves[way, depth]
                axis.plot(curve["step"], [max(v, floor) for v in curve[name]], label=way, **STYLES[way])
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(label)
    for axis, depth in zip(grid[0], depths, strict=True):
        axis.set_title(f"{depth} micro-batches per step")
    for axis in grid[-1]:
        axis.set_xlabel("optimizer step")
    grid[0][-1].legend(frameon=False, loc="center right")
    figure.suptitle("Deviation from the full batch (exact equality is drawn at the lower edge)")
    figure.savefig(path, dpi=150)
