"""The report of an audit in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .measure import EXACT, SAME_LOSS, Report, StepResult


def show(report: Report, note: str = "") -> None:
    """Prints a table of the steps, and what it comes to."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report.model}: {report.rows} rows, one optimizer step", caption=note or None)
    for column in ("", "split"):
        table.add_column(column, no_wrap=True)
    for column in ("ratio", "gradient", "loss", "ms", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for step in report.steps:
        table.add_row(
            step.way,
            step.split,
            _number(step.ratio, ".4f"),
            _number(step.gradient_error, ".0e"),
            _number(step.loss_error, ".0e"),
            f"{step.seconds * 1e3:.0f}",
            f"{step.peak_mb:.0f}",
            "[green]exact[/green]" if step.is_exact else f"[red]{step.cause}[/red]",
        )
    console.print(table)
    if any(step.groups for step in report.steps):
        console.print(_groups(report))
    console.print(
        "ratio: size of the gradient, of that of the one batch; gradient, loss: relative errors; ms, MB: time and peak memory "
        "of the step"
    )
    console.print(verdict(report))


def verdict(report: Report) -> str:
    lines = []
    for way in dict.fromkeys(step.way for step in report.steps):
        worst = report.worst(way)
        if report.is_exact(way):
            lines.append(f"{way}: exact, within {EXACT:.0e} of the one batch")
        else:
            lines.append(f"{way}: not exact; worst at {worst.split}: {worst.cause}")
    for way, difference in report.evaluation.items():
        depends = "depends on the" if difference > SAME_LOSS else "is the same for every"
        lines.append(f"{way}: eval_loss {depends} batch size ({difference:.0e})")
    if report.reason:
        lines.append(f"why not with accumloss: {report.reason}")
    if report.remedy:
        lines.append(f"what to do: {report.remedy}")
    told = next((step.told for step in report.steps if step.told), "")
    if told:
        lines.append(f"a training is told: {told}")
    if report.noise > EXACT / 10:
        lines.append(f"rounding alone moves this gradient by {report.noise:.0e}: errors below that say nothing")
    return "\n".join(lines)


def _groups(report: Report) -> Any:
    from rich.table import Table

    table = Table(title="gradient error of each parameter group, at the worst split")
    table.add_column("parameters")
    worst: dict[str, StepResult] = {way: report.worst(way) for way in dict.fromkeys(s.way for s in report.steps)}
    for way, step in worst.items():
        table.add_column(f"{way}, {step.split}", justify="right")
    names: dict[str, None] = {}
    for step in worst.values():
        names.update(dict.fromkeys(step.groups))
    for name in names:
        table.add_row(name, *(_number(step.groups.get(name, math.nan), ".0e") for step in worst.values()))
    return table


def _number(value: float, form: str) -> str:
    return "nan" if math.isnan(value) else format(value, form)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Any]:
    """A progress bar on the standard error, where that is a terminal: yields advance(text)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)

        def advance(text: str, by: int = 1) -> None:
            bar.update(task, advance=by, description=text)

        yield advance
