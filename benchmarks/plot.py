"""Draws the pictures of the benchmarks from their CSV files, and the captions from the JSON beside them; reads nothing else.

    python benchmarks/plot.py [TABLE.csv ...]

Without arguments: every table of benchmarks/results that it knows. Each picture is written as PNG and SVG.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "accumloss", "svg.fonttype": "none"})

# Okabe-Ito colours with hatches and marks; None: not drawn as bars. The copy is the ceiling.
STYLES: dict[str, tuple[str, str, str] | None] = {
    "stock": None,
    "F.cross_entropy": ("#E69F00", "", "s"),
    "compile": ("#CC79A7", "//", "^"),
    "accumloss": ("#56B4E9", "", "o"),
    "accumloss backward": ("#0072B2", "\\\\", "v"),
    "accumloss forward": ("#004A75", "", "D"),
    "accumloss mean": ("#009E73", "", "P"),
    "liger mean": ("#999999", "", "<"),
    "liger sum": ("#555555", "", ">"),
    "quack": ("#F0E442", "", "p"),
    "copy": ("#DDDDDD", "..", ""),
    "copy to new": None,
    "read": None,
}
STOCK = ("#D55E00", "", "x")
NAMES = {
    "stock": "stock transformers",
    "compile": "torch.compile of stock",
    "accumloss": "accumloss, own buffer",
    "accumloss backward": "accumloss, in place in backward",
    "accumloss forward": "accumloss, in place in forward",
    "accumloss in place": "accumloss, in place in forward",
    "accumloss fused": "accumloss, fused with the head",
    "accumloss mean": "accumloss, two visits",
    "liger mean": "Liger, mean",
    "liger sum": "Liger, sum / n",
    "copy": "copy of the same bytes (ceiling)",
}
WAYS = {
    "stock": STOCK,
    "accumloss": STYLES["accumloss"],
    "accumloss in place": STYLES["accumloss forward"],
    "accumloss fused": ("#009E73", "//", "P"),
}
CEILINGS = ("copy", "copy to new", "read")
IGNORED = {0.0: "-", 0.5: "--", 0.9: ":"}

Lines = list[dict[str, str]]


def style(peer: str) -> tuple[str, str, str]:
    return STYLES.get(peer) or STOCK


def caption(table: Path) -> str:
    """The machine and the versions, from the JSON beside a table."""
    notes = table.with_suffix(".json")
    if not notes.exists():
        return ""
    facts = json.loads(notes.read_text())
    if "cpu" not in facts:
        return ""
    if "capability" in facts:
        return (
            f"{facts['device']}, driver {facts['driver']}, CUDA {facts['cuda']}, torch {facts['torch']}, "
            f"accumloss {facts['accumloss']} at {str(facts.get('commit'))[:9]}"
        )
    return (
        f"{facts['cpu']}, {facts['threads']} threads ({facts['build'].get('cpu_capability')}), torch {facts['torch']}, "
        f"transformers {facts['transformers']}, accumloss {facts['accumloss']} at {str(facts.get('commit'))[:9]}"
    )


def legend(figure: Figure, table: Path, entries: dict[str, Any], ncols: int) -> None:
    """Below the picture: the caption, and what is what."""
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=ncols,
        frameon=False,
        fontsize=8,
        title=caption(table) or None,
        title_fontsize=7,
    )


def entries_of(axis: Axes) -> dict[str, Any]:
    handles, labels = axis.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def save(figure: Figure, table: Path, suffix: str = "") -> list[Path]:
    paths = [table.with_name(f"{table.stem}{suffix}.{kind}") for kind in ("png", "svg")]
    figure.savefig(paths[0], dpi=150)
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


# Speed-ups ------------------------------------------------------------------------------------------------------------


def draw_speedups(table: Path, lines: Lines) -> list[Path]:
    """Bars of the speed-up over stock, for each shape and heap."""
    lines = [line for line in lines if line["ratio_to_stock"] and STYLES[line["peer"]]]
    if not lines:
        raise ValueError(
            f"{table}: expected lines with ratio_to_stock, got none: run the benchmark with the peer 'stock'"
        )
    regimes = list(dict.fromkeys(line["regime"] for line in lines))
    drawn = [peer for peer in STYLES if any(line["peer"] == peer for line in lines)]

    def shape(line: dict[str, str]) -> str:
        ignored = f"\n{float(line['ignored']):.0%} ignored" if float(line["ignored"]) else ""
        return f"{line['rows']} × {line['vocab']}\n{line['dtype']}{ignored}"

    shapes = list(dict.fromkeys(map(shape, lines)))
    figure = Figure(figsize=(max(6.5, 2 + 1.25 * len(shapes)), 0.8 + 3.4 * len(regimes)), layout="constrained")
    grid = figure.subplots(len(regimes), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.84 / len(drawn)
    for axis, regime in zip(grid, regimes, strict=True):
        for i, peer in enumerate(drawn):
            heights = {
                shape(line): float(line["ratio_to_stock"])
                for line in lines
                if (line["regime"], line["peer"]) == (regime, peer)
            }
            places = [shapes.index(name) + (i - (len(drawn) - 1) / 2) * width for name in heights]
            colour, hatch, _ = style(peer)
            bars = axis.bar(
                places,
                heights.values(),
                width,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.4,
                label=NAMES.get(peer, peer),
            )
            axis.bar_label(
                bars,
                [f"{height:.0f}" if height >= 10 else f"{height:.2g}" for height in heights.values()],
                fontsize=6,
                padding=1,
            )
        axis.axhline(1, color="#444444", linewidth=0.8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_ylabel("speed-up over stock (×)")
        axis.set_title(f"heap {regime}", fontsize=10)
        plain(axis)
    grid[-1].set_xticks(range(len(shapes)), shapes)
    legend(figure, table, entries_of(grid[0]), 3)
    figure.suptitle("Causal cross-entropy on the CPU, forward + backward", fontsize=11)
    return save(figure, table)


# Scaling --------------------------------------------------------------------------------------------------------------


def along_classes(axis: Axes, lines: Lines, dtype: str, value: Callable[[dict[str, str]], float | None]) -> None:
    """A curve over V for each peer, of no ignored rows; of ours also with ignored ones."""
    for peer in ("stock", "compile", "accumloss", "accumloss forward", "copy"):
        for ignored, dash in IGNORED.items():
            of = [l for l in lines if (l["peer"], l["dtype"], float(l["ignored"])) == (peer, dtype, ignored)]
            if peer == "copy" and ignored:
                continue
            points = [(int(line["vocab"]), value(line)) for line in of if not line["missing"]]
            points = [(x, y) for x, y in points if y is not None]
            if not points:
                continue
            colour, _, mark = style(peer) if peer != "copy" else ("#888888", "", "")
            label = NAMES[peer] if ignored == 0 else f"{NAMES[peer]}, {ignored:.0%} ignored"
            axis.plot(
                *zip(*points, strict=True), dash, color=colour, marker=mark, markersize=4, label=label, linewidth=1.3
            )
    axis.set_xscale("log")
    axis.set_xlabel("classes V")
    plain(axis)


def per_logit(line: dict[str, str]) -> float:
    return float(line["ms_median"]) * 1e6 / (int(line["rows"]) * int(line["vocab"]))


def number(name: str) -> Callable[[dict[str, str]], float | None]:
    return lambda line: float(line[name]) if line[name] else None


def draw_scaling(table: Path, lines: Lines) -> list[Path]:
    """Time, fraction of the ceiling, memory and error along V; time along N."""
    classes = [line for line in lines if line["sweep"] == "classes"]
    paths = []

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for (time_axis, share_axis), dtype in zip(grid.T, ("bf16", "fp32"), strict=True):
        along_classes(time_axis, classes, dtype, per_logit)
        time_axis.set_yscale("log")
        time_axis.set_title(dtype, fontsize=10)
        along_classes(
            share_axis,
            [l for l in classes if float(l["ignored"]) == 0 and l["peer"] != "copy"],
            dtype,
            number("fraction_of_copy"),
        )
        share_axis.axhline(1, color="#888888", linewidth=0.8)
        share_axis.set_ylim(0, None)
        time_axis.set_xlabel("")
    grid[0, 0].set_ylabel("forward + backward (ns per logit)")
    grid[1, 0].set_ylabel("fraction of the speed of a copy")
    legend(figure, table, entries_of(grid[0, 0]), 3)
    figure.suptitle("Time along the classes, up to 34 million logits, heap as it comes", fontsize=11)
    paths += save(figure, table)

    figure = Figure(figsize=(9, 6.6), layout="constrained")
    (memory_axis, rows_axis), (loss_axis, grad_axis) = figure.subplots(2, 2)
    none_ignored = [line for line in classes if float(line["ignored"]) == 0]
    along_classes(
        memory_axis,
        [l for l in none_ignored if l["peer"] != "copy" and int(l["vocab"]) >= 1000],
        "bf16",
        number("peak_extra_over_logits"),
    )
    memory_axis.set_ylabel("peak above the logits (× their size)")
    memory_axis.set_title("memory, bf16", fontsize=10)
    for peer in ("stock", "accumloss", "accumloss forward"):
        points = [
            (int(l["rows"]), float(l["ms_median"]))
            for l in lines
            if l["sweep"] == "rows" and l["peer"] == peer and l["ms_median"]
        ]
        colour, _, mark = style(peer)
        rows_axis.plot(
            *zip(*points, strict=True), "-", color=colour, marker=mark, markersize=4, label=NAMES[peer], linewidth=1.3
        )
    rows_axis.set_xscale("log")
    rows_axis.set_yscale("log")
    rows_axis.set_xlabel("rows N")
    rows_axis.set_ylabel("forward + backward (ms)")
    rows_axis.set_title("rows, V = 32000 bf16", fontsize=10)
    plain(rows_axis)
    for axis, name, title in (
        (loss_axis, "loss_error", "loss"),
        (grad_axis, "grad_error", "gradient, largest of an element"),
    ):
        along_classes(
            axis,
            [l for l in none_ignored if l["peer"] != "copy"],
            "fp32",
            lambda l, n=name: max(float(l[n]), 1e-10) if l[n] else None,
        )
        axis.set_yscale("log")
        axis.set_ylabel("relative error against float64")
        axis.set_title(f"error of the {title}, fp32", fontsize=10)
    legend(figure, table, entries_of(memory_axis), 4)
    return paths + save(figure, table, "_memory_rows_errors")


# Training steps -------------------------------------------------------------------------------------------------------


def draw_training(table: Path, lines: Lines) -> list[Path]:
    """The step of each model, its loss apart, for each way and share of ignored labels."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    shares = sorted({float(line["ignored"]) for line in lines})
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    grid = figure.subplots(1, len(models), squeeze=False)[0]
    width = 0.84 / len(WAYS)
    for axis, model in zip(grid, models, strict=True):
        for i, (way, described) in enumerate(WAYS.items()):
            assert described is not None
            for place, ignored in enumerate(shares):
                line = next(
                    (l for l in lines if (l["model"], l["way"], float(l["ignored"])) == (model, way, ignored)), None
                )
                if line is None:
                    continue
                at = place + (i - (len(WAYS) - 1) / 2) * width
                loss, whole = float(line["loss_ms"] or 0), float(line["step_ms"])
                if not line["loss_ms"]:
                    axis.bar(
                        at, whole, width, color="#DDDDDD", hatch=described[1], edgecolor=described[0], linewidth=0.4,
                        label=f"whole step, {NAMES[way]}",
                    )  # fmt: skip
                    continue
                axis.bar(
                    at, whole - loss, width, color="#DDDDDD", edgecolor="white", linewidth=0.4, label="rest of the step"
                )
                axis.bar(
                    at,
                    loss,
                    width,
                    bottom=whole - loss,
                    color=described[0],
                    edgecolor="white",
                    linewidth=0.4,
                    label=f"loss, {NAMES[way]}",
                )
                axis.text(at, whole, f"{loss / whole:.0%}", ha="center", va="bottom", fontsize=6)
        axis.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
        axis.set_xlabel("labels ignored")
        axis.set_title(f"{model}, {lines[0]['dtype']}", fontsize=10)
        plain(axis)
    grid[0].set_ylabel("forward + backward + step (ms)")
    legend(figure, table, entries_of(grid[0]), 3)
    figure.suptitle("A training step on the CPU; above each bar the loss's share", fontsize=11)
    return save(figure, table)


# GPU ------------------------------------------------------------------------------------------------------------------


def draw_gpu(table: Path, lines: Lines) -> list[Path]:
    """Fraction of the ceiling along V, of all and of the forward alone; peak memory; ignored rows."""
    plain_lines = [l for l in lines if l["dtype"] == "bf16" and float(l["grad_output"]) == 1 and l["ms_median"]]
    rows = plain_lines[0]["rows"]
    full = [l for l in plain_lines if l["rows"] == rows]
    figure = Figure(figsize=(9, 7), layout="constrained")
    (all_axis, forward_axis), (memory_axis, ignored_axis) = figure.subplots(2, 2)

    def curves(axis: Axes, mode: str, name: str) -> None:
        of = [l for l in full if l["mode"] == mode and float(l["ignored"]) == 0 and l["peer"] not in CEILINGS]
        for peer in dict.fromkeys(l["peer"] for l in of):
            points = sorted((int(l["vocab"]), float(l[name])) for l in of if l["peer"] == peer and l[name])
            if points:
                colour, _, mark = style(peer)
                label = NAMES.get(peer, peer)
                axis.plot(
                    *zip(*points, strict=True), "-", color=colour, marker=mark, markersize=4, label=label, linewidth=1.3
                )
        axis.set_xscale("log")
        axis.set_xlabel("classes V")
        plain(axis)

    curves(all_axis, "forward + backward", "fraction_of_copy")
    all_axis.set_ylabel("fraction of the speed of a copy")
    all_axis.set_title("forward + backward", fontsize=10)
    curves(forward_axis, "forward", "fraction_of_read")
    forward_axis.set_ylabel("fraction of the speed of a read")
    forward_axis.set_title("forward alone", fontsize=10)
    for axis in (all_axis, forward_axis):
        axis.axhline(1, color="#888888", linewidth=0.8)
        axis.set_ylim(0, None)
    curves(memory_axis, "forward + backward", "peak_extra_over_logits")
    memory_axis.set_ylabel("peak memory above the logits (× their size)")
    memory_axis.set_title("memory", fontsize=10)
    shares = [l for l in full if l["mode"] == "forward + backward" and l["peer"] == "accumloss forward"]
    for vocab in dict.fromkeys(l["vocab"] for l in shares if float(l["ignored"]) > 0):
        points = sorted((100 * float(l["ignored"]), float(l["ms_median"])) for l in shares if l["vocab"] == vocab)
        line = "-" if vocab == "32000" else "--"
        colour, _, mark = style("accumloss forward")
        ignored_axis.plot(*zip(*points, strict=True), line, color=colour, marker=mark, markersize=4)
        ignored_axis.annotate(f"V = {vocab}", points[0], xytext=(4, 4), textcoords="offset points", fontsize=8)
    ignored_axis.set_ylim(0, None)
    ignored_axis.set_xlabel("labels ignored (%)")
    ignored_axis.set_ylabel("forward + backward (ms)")
    ignored_axis.set_title("ignored rows, accumloss in place in forward", fontsize=10)
    plain(ignored_axis)
    legend(figure, table, entries_of(all_axis), 3)
    figure.suptitle(f"Causal cross-entropy on a GPU, {rows} rows, bf16", fontsize=11)
    return save(figure, table)


KINDS: dict[str, Callable[[Path, Lines], list[Path]]] = {  # by a column that only this kind of table has
    "grad_output": draw_gpu,
    "sweep": draw_scaling,
    "loss_share": draw_training,
    "ratio_to_stock": draw_speedups,
}


def draw(table: Path) -> list[Path]:
    with table.open(newline="") as file:
        lines: Any = list(csv.DictReader(file))
    for column, kind in KINDS.items():
        if lines and column in lines[0]:
            return kind(table, lines)
    raise ValueError(
        f"{table}: expected a table of bench_cross_entropy, bench_scaling, bench_training_step or bench_gpu, got another"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    results = Path(__file__).resolve().parent / "results"
    parser = argparse.ArgumentParser(prog="plot.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="*", metavar="TABLE")
    options = parser.parse_args(arguments)
    known = [results / f"{name}.csv" for name in ("cross_entropy_cpu", "scaling_cpu", "training_step_cpu", "gpu")]
    try:
        for table in options.tables or [table for table in known if table.exists()]:
            for path in draw(table):
                print(path)
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
