"""Draws speed-ups over transformers' loss from the CSV of bench_cross_entropy.py; reads nothing else.

python benchmarks/plot.py [benchmarks/results/cross_entropy_cpu.csv]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

# Okabe-Ito colours with hatches; None: not drawn. The copy is the ceiling.
STYLES = {
    "stock": None,
    "F.cross_entropy": ("#E69F00", ""),
    "compile": ("#CC79A7", "//"),
    "accumloss": ("#56B4E9", ""),
    "accumloss backward": ("#0072B2", "\\\\"),
    "accumloss forward": ("#004A75", ""),
    "copy": ("#DDDDDD", ".."),
    "copy to new": None,
}
NAMES = {
    "compile": "torch.compile of stock",
    "accumloss": "accumloss, own buffer",
    "accumloss backward": "accumloss, in place in backward",
    "accumloss forward": "accumloss, in place in forward",
    "copy": "copy of the same bytes (ceiling)",
}


def draw(table: Path, path: Path) -> None:
    with table.open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["ratio_to_stock"] and STYLES[line["peer"]]]
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
            colour, hatch = STYLES[peer]
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
        axis.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xticks(range(len(shapes)), shapes)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Causal cross-entropy on the CPU, forward + backward", fontsize=11)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    results = Path(__file__).resolve().parent / "results"
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, nargs="?", default=results / "cross_entropy_cpu.csv")
    options = parser.parse_args(arguments)
    try:
        draw(options.table, options.table.with_suffix(".png"))
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 1
    print(options.table.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
