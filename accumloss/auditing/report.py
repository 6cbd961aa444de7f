"""The report of an audit in the terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .. import display
from .measure import EXACT, SAME_LOSS, Report, StepResult

LEAST_MB = 10  # of a step's peak: what is below is the allocator's


def show(report: Report, note: str = "") -> None:
    """Prints a table of the steps, what it comes to, and what to do."""
    with_memory = any(step.peak_mb >= LEAST_MB for step in report.steps)
    headings = ["", "split", "gradient", "its error", "loss's error", *(["peak MB"] if with_memory else []), ""]
    rows = [
        [
            step.way,
            step.split,
            _number(step.ratio, ".4f"),
            _number(step.gradient_error, ".0e"),
            _number(step.loss_error, ".0e"),
            *([f"{step.peak_mb:.0f}"] if with_memory else []),
            "exact" if step.is_exact else step.cause,
        ]
        for step in report.steps
    ]
    columns = {
        "split": "rows of each micro-batch",
        "gradient": "its size, of that of the one batch: 1 is right",
        "errors": "relative, of the gradient and of the logged loss, against the one batch",
        "peak MB": "memory of the step" if with_memory else "",
    }
    told = note.removeprefix(f"{report.model}: ")
    print(
        display.answer(
            f"{report.model}: {report.rows} rows, one optimizer step" + (f" ({told})" if told else ""),
            display.table(headings, rows, right=range(2, len(headings) - 1)),
            display.facts(columns),
            _groups(report) if any(step.groups for step in report.steps) else "",
        )
    )
    print()
    print(verdict(report))


def verdict(report: Report) -> str:
    """What the steps come to, and what to do."""
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
    told = next((step.told for step in report.steps if step.told), "")
    if told:
        lines.append(f"a training is told: {told}")
    if report.noise > EXACT / 10:
        lines.append(f"rounding alone moves this gradient by {report.noise:.0e}: errors below that say nothing")
    wrapped = [textwrap.fill(line, display.WIDTH, subsequent_indent="  ", break_long_words=False) for line in lines]
    return "\n".join(
        [*wrapped, "", textwrap.fill(f"what to do: {what_to_do(report)}", display.WIDTH, subsequent_indent="  ")]
    )


def what_to_do(report: Report) -> str:
    """For whoever trains this model."""
    ways = {step.way for step in report.steps}
    evaluates = all(difference <= SAME_LOSS for way, difference in report.evaluation.items() if way == "stock")
    if "accumloss" in ways and not report.is_exact():
        return report.remedy
    if "stock" in ways and report.is_exact("stock"):
        again = "audit it again after an upgrade of transformers"
        if evaluates:
            return f"nothing: this model trains exactly as it is; {again}"
        return f"training is exact as it is; accumloss.register_with_transformers() makes its eval_loss so; {again}"
    return "call accumloss.register_with_transformers() before trainer.train()"


def _groups(report: Report) -> str:
    worst: dict[str, StepResult] = {way: report.worst(way) for way in dict.fromkeys(s.way for s in report.steps)}
    names: dict[str, None] = {}
    for step in worst.values():
        names.update(dict.fromkeys(step.groups))
    rows = [[name, *(_number(step.groups.get(name, math.nan), ".0e") for step in worst.values())] for name in names]
    headings = ["parameters", *(f"{way}, {step.split}" for way, step in worst.items())]
    return "  gradient's error of each parameter group, at the worst split\n\n" + display.table(
        headings, rows, right=range(1, len(headings))
    )


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
