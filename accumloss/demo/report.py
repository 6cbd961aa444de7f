"""What the demo says: progress, the curves as CSV, the tables."""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runs import ACCUMLOSS, CAUSAL_LM, MASKED_LM, MEAN_OF_MEANS, TRANSFORMERS, WAYS, WINDOW, Row, Run, largest

Results = dict[str, list[Run]]  # task -> its runs
Curves = dict[tuple[str, int], dict[str, list[float]]]  # (way, accumulation) -> column -> values by step

TITLES = {MASKED_LM: "masked LM, SGD in Trainer", CAUSAL_LM: "causal LM, AdamW in a loop of one's own"}
WHAT_A_ROW_SHOWS = {
    MASKED_LM: {
        TRANSFORMERS: "Trainer adds the micro-batches' means up instead of averaging them: k times the gradient and loss",
        ACCUMLOSS: "the same Trainer and model inside of accumloss.registered()",
    },
    CAUSAL_LM: {
        MEAN_OF_MEANS: "tokens of short sequences weigh more, the more so the more micro-batches",
        TRANSFORMERS: "divides by the items of the whole step; what remains is fp32 rounding in another order",
        ACCUMLOSS: "the same training; of the logits nothing is stored again but their gradient",
    },
}


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields show(steps done, text): a bar on a terminal, a line every tenth of the way elsewhere. On stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left;"),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, text: bar.update(task, completed=done, description=text)
    else:
        shown = 0  # tenths of the way

        def show(done: int, text: str) -> None:
            nonlocal shown
            if 10 * done // total > shown:
                shown = 10 * done // total
                print(f"step {done}/{total}  {text}", file=sys.stderr, flush=True)

        yield show


TRAINS_ALIKE = 1e-3  # of the distance trained: AdamW divides by gradients near 0, whose rounding shows

CURVE_COLUMNS = ("step", "loss", "loss_deviation", "weight_deviation", "seconds")


def write_curves(results: Mapping[str, Sequence[Run]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "way", "accumulation", *CURVE_COLUMNS))
        for task, runs in results.items():
            for run in runs:
                curves = zip(run.losses, run.loss_deviations, run.weight_deviations, run.seconds, strict=True)
                for step, values in enumerate(curves, start=1):
                    writer.writerow([task, run.way, run.depth, step, *(repr(v) for v in values)])


def read_curves(path: Path) -> dict[str, Curves]:
    """task -> its curves."""
    tasks: dict[str, Curves] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            columns = tasks.setdefault(row["task"], {}).setdefault((row["way"], int(row["accumulation"])), {})
            for name in CURVE_COLUMNS:
                columns.setdefault(name, []).append(float(row[name]))
    return tasks


def number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if abs(value) < 1e5 else f"{value:.1e}"


def print_table(console: Any, rows: Sequence[Row]) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("way")
    for name in (
        "micro-\nbatches",
        "loss at\nlast step",
        "first\ngradient",
        "max loss\ndeviation",
        "max weight\ndeviation",
        "step\nms",
        "peak\nMB",
    ):
        table.add_column(name, justify="right")
    for i, row in enumerate(rows):
        table.add_row(
            row.way,
            str(row.accumulation),
            number(row.last_loss, 5),
            f"{number(row.gradient_ratio, 3)} ×",
            f"{row.max_loss_deviation:.1e}",
            f"{row.max_weight_deviation:.1e}",
            f"{row.step_ms:.0f}",
            "n/a" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            end_section=i + 1 == len(rows) or rows[i + 1].way != row.way,
        )
    console.print(table)


def print_tables(result: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=True)
    text = result["text"]
    console.print(
        f"{result['steps']} optimizer steps of {WINDOW} sequences ({text['min_tokens']} to {text['max_tokens']} tokens), "
        f"vocabulary {text['vocabulary']}, fp32, {result['device']}"
    )
    for task in WAYS:
        own = result[task]
        console.print(f"\n{own['model']} ({TITLES[task]}), {own['parameters'] / 1e6:.1f} M parameters:")
        print_table(console, [Row(**row) for row in own["rows"]])
        for way, shows in WHAT_A_ROW_SHOWS[task].items():
            console.print(f"{way}: {shows}")
    console.print(
        f"\nHeld against the same sequences as one batch in {TRANSFORMERS}: size of the first step's gradient, loss in nats per\n"
        "token, weights as a share of the distance trained. Step: median. Peak: of one step, above the process at rest.\n"
    )
    for task, way in (
        (MASKED_LM, TRANSFORMERS),
        (CAUSAL_LM, MEAN_OF_MEANS),
        (MASKED_LM, ACCUMLOSS),
        (CAUSAL_LM, ACCUMLOSS),
    ):
        deviations = [row["max_weight_deviation"] for row in result[task]["rows"] if row["way"] == way]
        if deviations:
            off = largest(deviations)
            alike = "all splits train alike" if off < TRAINS_ALIKE else "the splits train apart"
            console.print(
                f"{task.replace('_', ' ')}, {way}: {alike}; weights off by at most {off:.0e} of the distance trained"
            )
    console.print("Is your own model exact? python -m accumloss audit MODEL")
    console.print(
        f"{result['seconds']:.0f} s; written to {Path(result['files'][0]).parent}: {', '.join(Path(f).name for f in result['files'])}"
    )
