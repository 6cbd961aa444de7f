"""The census: every class of the installed transformers that computes a loss, stock against accumloss.

Classes run in processes of their own, a few at a time, each within a time limit; what is done is kept in a file, so that a
census that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import queue
import select
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..transformers import coupled
from .measure import DEPENDS_ON_BATCH, EXACT, SAME_LOSS

Line = dict[str, Any]
COLUMNS = (
    "class",
    "module",
    "head",
    "verdict",
    "stock_exact",
    "stock_split",
    "stock_ratio",
    "stock_gradient_error",
    "stock_loss_error",
    "stock_cause",
    "accumloss_exact",
    "accumloss_split",
    "accumloss_ratio",
    "accumloss_gradient_error",
    "accumloss_loss_error",
    "stock_evaluation_difference",
    "accumloss_evaluation_difference",
    "distance_to_span",
    "noise",
    "dtype",
    "reason",
    "seconds",
)
EXACT_WITH, COUPLED, WRONG, NOT_RUN = "exact", "cannot be exact", "wrong", "not run"


# Running --------------------------------------------------------------------------------------------------------------


class Worker:
    """One worker process, started when it is first asked and again after it was killed."""

    def __init__(self, log: Path, program: str = "accumloss.auditing.worker"):
        self.log, self.program = log, program
        self.folder = tempfile.TemporaryDirectory()  # to run in: python -m looks for modules where it runs
        self.process: subprocess.Popen[str] | None = None

    def ask(self, module: str, name: str, time_limit: float) -> Line:
        if self.process is None or self.process.poll() is not None:
            environment = {
                **os.environ,
                "TRANSFORMERS_VERBOSITY": "error",
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "TRL_EXPERIMENTAL_SILENCE": "1",
                "OMP_NUM_THREADS": "1",
            }
            with self.log.open("a") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", self.program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    cwd=self.folder.name,
                )
        assert self.process.stdin is not None and self.process.stdout is not None
        failed: Line = {"module": module, "name": name, "head": "", "status": "not run", "seconds": time_limit}
        try:
            self.process.stdin.write(json.dumps({"module": module, "name": name}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return {**failed, "reason": "the process ended before it"}
        ready, _, _ = select.select([self.process.stdout], [], [], time_limit)
        if not ready:
            self.stop()
            return {**failed, "reason": f"took longer than {time_limit:g} s"}
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            self.stop()
            return {**failed, "reason": f"the process ended with status {status}"}
        return json.loads(answer)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run(
    classes: dict[str, str],
    state: Path,
    *,
    jobs: int,
    time_limit: float,
    on_line: Callable[[Line], None] = lambda line: None,
    program: str = "accumloss.auditing.worker",
) -> list[Line]:
    """The line of every class, those that ``state`` holds already included; name -> module in ``classes``.

    Args:
        program: the module that audits one of them for each line that it is given.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    done = {line["name"]: line for line in read(state)}
    waiting: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    for name, module in sorted(classes.items(), key=lambda item: (item[1], item[0])):
        if name not in done:
            waiting.put((name, module))
    lock = threading.Lock()

    def work() -> None:
        worker = Worker(state.with_suffix(".log"), program)
        try:
            while True:
                try:
                    name, module = waiting.get_nowait()
                except queue.Empty:
                    return
                line = worker.ask(module, name, time_limit)
                with lock:
                    done[name] = line
                    with state.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    on_line(line)
        finally:
            worker.stop()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [done[name] for name in sorted(classes) if name in done]


def read(state: Path) -> list[Line]:
    if not state.exists():
        return []
    return [json.loads(line) for line in state.read_text().splitlines()]


# What it found --------------------------------------------------------------------------------------------------------


def verdict(line: Line) -> str:
    if line["status"] != "run":
        return NOT_RUN
    if line["accumloss"]["exact"]:
        return EXACT_WITH
    return COUPLED if why_not_exact(line) else WRONG


def why_not_exact(line: Line) -> str:
    """Why a class that is not exact cannot be, or nothing."""
    if line["reason"].startswith(DEPENDS_ON_BATCH):
        return str(line["reason"])
    return coupled.why(line["name"]) or (coupled.CONTRASTIVE if line["head"] == "contrastive" else "")


def row(line: Line) -> dict[str, Any]:
    """One row of the CSV."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    found.update({"class": line["name"], "module": line["module"], "head": line["head"], "verdict": verdict(line)})
    found.update(reason=line["reason"], seconds=line["seconds"])
    if line["status"] == "run":
        found.update(distance_to_span=_short(line["distance"]), noise=_short(line["noise"]), dtype=line["dtype"])
        for way in ("stock", "accumloss"):
            result = line[way]
            found[f"{way}_exact"] = int(result["exact"])
            for key in ("split", "ratio", "gradient_error", "loss_error", "cause", "evaluation_difference"):
                if f"{way}_{key}" in found:
                    found[f"{way}_{key}"] = _short(result[key])
        if verdict(line) == COUPLED:
            found["reason"] = why_not_exact(line)
    return found


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value


def write_csv(lines: Iterable[Line], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row(line) for line in lines)


def versions() -> str:
    import accelerate  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import transformers

    return (
        f"transformers {transformers.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}"
    )


def summary(lines: Sequence[Line]) -> dict[str, int]:
    found = Counter(verdict(line) for line in lines)
    ran = [line for line in lines if line["status"] == "run"]
    return {
        "classes": len(lines),
        "run": len(ran),
        "stock_exact": sum(line["stock"]["exact"] for line in ran),
        "stock_wrong": sum(not line["stock"]["exact"] for line in ran),
        **{key: found[key] for key in (EXACT_WITH, COUPLED, WRONG, NOT_RUN)},
        **evaluated(ran),
    }


def evaluated(ran: Sequence[Line]) -> dict[str, int]:
    """The classes that Trainer gives an eval_loss of, and those where it depends on the batch size; the coupled ones aside."""
    lines = [line for line in ran if verdict(line) != COUPLED]
    lines = [line for line in lines if line["accumloss"]["evaluation_difference"] is not None]
    found = {"evaluated": len(lines)}
    for way in ("stock", "accumloss"):
        found[f"{way}_depends"] = sum(not (line[way]["evaluation_difference"] or 0) <= SAME_LOSS for line in lines)
    return found


def by_head(lines: Sequence[Line]) -> list[dict[str, Any]]:
    table = []
    for head in sorted({line["head"] for line in lines if line["head"]}):
        of = [line for line in lines if line["head"] == head]
        found = summary(of)
        table.append({"head": head, **found})
    return sorted(table, key=lambda entry: -entry["run"])


def wrapped(*sentences: str, width: int = 100) -> list[str]:
    """The lines of a paragraph of a page."""
    return textwrap.wrap(" ".join(sentences), width, break_long_words=False, break_on_hyphens=False)


def markdown(lines: Sequence[Line], minutes: float | None = None) -> str:
    """docs/census.md"""
    found = summary(lines)
    possible = found["run"] - found[COUPLED]
    text = [
        "# Census",
        "",
        *wrapped(
            "Every class of transformers that computes a loss, as a tiny random model, under the real Trainer: one optimizer step "
            "over 8 very uneven rows, split into 8 × 1, 4 × 2 and 3 + 3 + 2, against the model's own loss over the one batch of 8. "
            f"Exact: relative error of gradient and logged loss at most {EXACT:.0e}, fp32, in all three. "
            f"`python -m accumloss audit --all` repeats it. {versions()}, {datetime.date.today().isoformat()}"
            + (f", {minutes:.0f} minutes" if minutes else "")
            + "."
        ),
        "",
        *wrapped(
            f"{found['classes']} classes, {found['run']} run ({found['run'] / max(found['classes'], 1):.1%}). Stock: "
            f"{found['stock_exact']} exact, {found['stock_wrong']} wrong. accumloss: {found[EXACT_WITH]} of the {possible} that can "
            f"be exact, {found[COUPLED]} cannot be, {found[WRONG]} wrong."
        ),
        "",
        *wrapped(
            f"Evaluation: {found['evaluated']} of them, those that cannot be exact aside, give an eval_loss. In batches of 1, 2 "
            f"and 3 rows it differs by more than {SAME_LOSS:.0e} from that in one batch for {found['stock_depends']} with stock "
            f"transformers, and for {found['accumloss_depends']} with accumloss."
        ),
        "",
        "| head | run | stock exact | stock wrong | accumloss exact | cannot be exact | wrong | not run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in [*by_head(lines), {"head": "**all**", **found}]:
        text.append(
            f"| {entry['head']} | {entry['run']} | {entry['stock_exact']} | {entry['stock_wrong']} | {entry[EXACT_WITH]} "
            f"| {entry[COUPLED]} | {entry[WRONG]} | {entry[NOT_RUN]} |"
        )
    causes = Counter(line["stock"]["cause"] for line in lines if line["status"] == "run" and not line["stock"]["exact"])
    text += ["", "## What stock does instead", "", "| the step's gradient is | classes |", "|---|---:|"]
    text += [f"| {cause} | {count} |" for cause, count in causes.most_common()]
    text += [
        "",
        "## What cannot be exact",
        "",
        "| class | gradient error, stock | accumloss | why |",
        "|---|---:|---:|---|",
    ]
    text += [
        f"| {line['name']} | {line['stock']['gradient_error']:.1g} | {line['accumloss']['gradient_error']:.1g} | {row(line)['reason']} |"
        for line in lines
        if verdict(line) == COUPLED
    ]
    wrong = [line for line in lines if verdict(line) == WRONG]
    if wrong:
        text += [
            "",
            "## Wrong with accumloss",
            "",
            "| class | gradient error | loss error | what it is |",
            "|---|---:|---:|---|",
        ]
        text += [
            f"| {line['name']} | {line['accumloss']['gradient_error']:.1g} | {line['accumloss']['loss_error']:.1g} | {line['reason']} |"
            for line in wrong
        ]
    not_run = [line for line in lines if verdict(line) == NOT_RUN]
    if not_run:
        text += ["", "## Not run", "", "| class | why |", "|---|---|"]
        text += [f"| {line['name']} | {line['reason'].replace('|', '/')[:160]} |" for line in not_run]
    return "\n".join(text) + "\n"
