"""The census of Trainers: what their steps and evaluations are over micro-batches, with stock transformers and accumloss.

The truth is the Trainer's own step over the one batch that holds all rows, with stock transformers. As a program it audits a
case for each line of its standard input, as worker.py does.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import gc
import importlib.metadata
import json
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import transformers as integration
from ..inexact import InexactWarning
from . import census, trainer_cases
from .measure import WAYS, AuditError, Gradients, difference, gradients_of, name_of, named_line, norm, sizes_of
from .trainer_cases import Case, Split

Line = dict[str, Any]

BATCH_SIZES = (2, 1, 3)  # of micro-batches: 4x2, 8x1, 3+3+2
EVALUATED = (8, 2, 1)
EXACT, SAME_LOSS = 1e-5, 2e-6  # relative, fp32: the gradient, the logged loss
SAME_EVALUATION = 1e-5
SMALL = 0.1  # the loss of a policy is a difference of terms around 1: below this an error is one of this


class Step:
    """What one optimizer step of a Trainer did: gradient, logged loss, what was told."""

    def __init__(self, case: Case, batch_size: int, way: str):
        import transformers

        recorder = self

        class Recorder(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                recorder.gradients = recorder.gradients or gradients_of(model)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if logs and "loss" in logs:
                    recorder.loss = float(logs["loss"])

        self.gradients: Gradients = {}
        self.loss = math.nan
        context = integration.registered() if way == "accumloss" else integration.unregistered()
        with tempfile.TemporaryDirectory() as folder, context, warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            trainer = case.build(Split(batch_size, len(sizes_of(trainer_cases.ROWS, batch_size)), folder))
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.add_callback(Recorder())
            gc.freeze()
            trainer.train()
        self.told = [str(one.message) for one in given if issubclass(one.category, InexactWarning)]


def evaluations(case: Case, way: str) -> tuple[list[float], list[str]]:
    """eval_loss by batch size, and what was told."""
    import transformers

    found, told = [], []
    for size in EVALUATED:
        if size < case.smallest:
            continue
        context = integration.registered() if way == "accumloss" else integration.unregistered()
        with tempfile.TemporaryDirectory() as folder, context, warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            trainer = case.build(Split(size, 1, folder))
            trainer.remove_callback(transformers.PrinterCallback)
            torch.manual_seed(0)
            found.append(float(trainer.evaluate()["eval_loss"]))
        told += [str(one.message) for one in given if issubclass(one.category, InexactWarning)]
    return found, told


def audit(name: str) -> Line:
    """The line of one case."""
    start = time.perf_counter()
    case = trainer_cases.find(name)
    line: Line = {"name": name, "module": case.library, "trainer": case.trainer, "loss": case.loss}
    line.update(status="run", reason="")
    try:
        if case.needs:
            raise AuditError(f"it needs {case.needs}")
        whole = Step(case, trainer_cases.ROWS, "stock")
        again = Step(case, trainer_cases.ROWS, "stock")
        noise = _error(again, whole)
        if not math.isfinite(whole.loss) or not norm(whole.gradients) > 0:
            raise ValueError(f"its loss is {whole.loss}, its gradient of size {norm(whole.gradients)}")
        line.update(value=whole.loss, noise=noise)
        for way in WAYS:
            line[way] = {"steps": {}, "told": []}
            for size in BATCH_SIZES:
                sizes = sizes_of(trainer_cases.ROWS, size)
                if size < case.smallest or (len(set(sizes)) > 1 and not case.can_be_uneven):
                    continue
                step = Step(case, size, way)
                line[way]["steps"][name_of(sizes)] = {
                    "gradient_error": _error(step, whole),
                    "loss_error": abs(step.loss - whole.loss) / max(abs(whole.loss), SMALL),
                    "told": bool(step.told),
                }
                line[way]["told"] += [message for message in step.told if message not in line[way]["told"]]
            if case.is_evaluated:
                line[way]["evaluation"], told = evaluations(case, way)
                line[way]["told_of_evaluation"] = list(dict.fromkeys(told))
    except Exception as error:  # a case that raises is a line of the census, and not its end
        line.update(status="not run", reason=str(error) if isinstance(error, AuditError) else named_line(error))
    line["seconds"] = round(time.perf_counter() - start, 2)
    return line


def _error(step: Step, whole: Step) -> float:
    return norm(difference(step.gradients, whole.gradients)) / norm(whole.gradients)


# What it found --------------------------------------------------------------------------------------------------------

EXACT_WITH, TOLD, SILENT, FALSE_ALARM, NOT_RUN = "exact", "told", "silent", "told though exact", "not run"
FAILURES = (SILENT, FALSE_ALARM)


def trains_exactly(line: Line, way: str) -> bool:
    steps = line[way]["steps"].values()
    return all(step["gradient_error"] <= EXACT and step["loss_error"] <= SAME_LOSS for step in steps)


def evaluation_difference(line: Line, way: str) -> float | None:
    """How much its eval_loss differs, relatively, from that in one batch; None: it is not evaluated."""
    found = line[way].get("evaluation")
    return max(abs(loss - found[0]) for loss in found) / max(abs(found[0]), SMALL) if found else None


def evaluates_exactly(line: Line, way: str) -> bool:
    return (evaluation_difference(line, way) or 0.0) <= SAME_EVALUATION


def verdict(line: Line) -> str:
    """Whether accumloss made a Trainer exact, or said that it is not."""
    if line["status"] != "run":
        return NOT_RUN
    trains, evaluates = trains_exactly(line, "accumloss"), evaluates_exactly(line, "accumloss")
    told = bool(line["accumloss"]["told"]), bool(line["accumloss"].get("told_of_evaluation"))
    if trains and evaluates:
        return FALSE_ALARM if any(told) else EXACT_WITH
    return TOLD if (trains or told[0]) and (evaluates or told[1]) else SILENT


def reason(line: Line) -> str:
    """Why it is not exact, as it was told, without what all say."""
    if line["status"] != "run":
        return str(line["reason"])
    told = [*line["accumloss"]["told"], *line["accumloss"].get("told_of_evaluation", [])]
    return told[0].split(": ", 2)[-1] if told else ""


SPLITS = ("4x2", "8x1", "3+3+2")
COLUMNS = (
    "library", "trainer", "loss", "verdict",
    *(f"{way}_{split}" for way in WAYS for split in (*SPLITS, "logged_loss", "eval_loss")),
    "told", "seconds",
)  # fmt: skip


def row(line: Line) -> dict[str, Any]:
    """One row of the CSV: gradient errors by split, the worst error of the logged loss, the difference of eval_loss."""
    found: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    found.update(library=line["module"], trainer=line.get("trainer", line["name"]), loss=line.get("loss", ""))
    found.update(verdict=verdict(line), told=reason(line), seconds=line["seconds"])
    for way in WAYS if line["status"] == "run" else ():
        for split, step in line[way]["steps"].items():
            found[f"{way}_{split}"] = _short(step["gradient_error"])
        found[f"{way}_logged_loss"] = _short(max(step["loss_error"] for step in line[way]["steps"].values()))
        found[f"{way}_eval_loss"] = _short(evaluation_difference(line, way))
    return found


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def write_csv(lines: Iterable[Line], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(row, lines))


def versions() -> str:
    found = []
    for library in ("trl", "sentence-transformers", "setfit", "datasets", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{library} {importlib.metadata.version(library)}")
    return ", ".join([*found, census.versions()])


def markdown(lines: Sequence[Line], minutes: float | None = None) -> str:
    """docs/trainers.md"""
    found = Counter(map(verdict, lines))
    ran = [line for line in lines if line["status"] == "run"]
    stock = [trains_exactly(line, "stock") and evaluates_exactly(line, "stock") for line in ran]
    took = f", {minutes:.0f} minutes" if minutes else ""
    text = [
        "# Trainers",
        "",
        *census.wrapped(
            "Every loss of every Trainer of TRL and sentence-transformers, and Seq2SeqTrainer: tiny random models, rows of uneven "
            f"lengths made on the spot. One optimizer step over {trainer_cases.ROWS} rows as 4 micro-batches of 2, 8 of 1, and "
            "3 + 3 + 2, against the Trainer's own step over the one batch of 8 with stock transformers; and its eval_loss in "
            "batches of 8, 2 and 1. `make trainers-census` (`python -m accumloss audit --trainers`) repeats it.",
            f"{versions()}, {datetime.date.today().isoformat()}{took}.",
        ),
        "",
        *census.wrapped(
            f"{len(ran)} run. Stock: {sum(stock)} exact in training and evaluation, {len(stock) - sum(stock)} not. accumloss: "
            f"{found[EXACT_WITH]} exact, of which nothing is said; {found[TOLD]} cannot be, and an `InexactWarning` says why, once; "
            f"{found[SILENT]} inexact without a word, {found[FALSE_ALARM]} told though exact. Exact: {EXACT:.0e} of the gradient, "
            f"{SAME_LOSS:.0e} of the logged loss and {SAME_EVALUATION:.0e} of the eval_loss, fp32.",
        ),
        "",
        *census.wrapped(
            "The columns are the relative error of the gradient by split, and how much eval_loss depends on the batch size."
        ),
    ]
    for library in trainer_cases.LIBRARIES:
        of = [line for line in ran if line["module"] == library]
        if not of:
            continue
        text += [
            "",
            f"## {library}",
            "",
            "| trainer | loss | stock 4x2 | 8x1 | 3+3+2 | eval | accumloss 4x2 | 8x1 | 3+3+2 | eval | |",
        ]
        text += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"]
        for line in of:
            cells = row(line)
            numbers = [_cell(cells[f"{way}_{of}"]) for way in WAYS for of in (*SPLITS, "eval_loss")]
            text.append(f"| {cells['trainer']} | {cells['loss']} | {' | '.join(numbers)} | {cells['verdict']} |")
    text += ["", "## What cannot be exact", "", "| trainer | loss | why |", "|---|---|---|"]
    text += [
        f"| {line['trainer']} | {line['loss']} | {reason(line)} |"
        for line in ran
        if verdict(line) in (TOLD, FALSE_ALARM)
    ]
    text += ["", "## Remarks"]
    for remark in REMARKS:
        text += [("- " if i == 0 else "  ") + part for i, part in enumerate(census.wrapped(remark, width=98))]
    not_run = [line for line in lines if verdict(line) == NOT_RUN]
    if not_run:
        text += ["", "## Not run", "", "| trainer | why |", "|---|---|"]
        text += [f"| {line['name']} | {reason(line).replace('|', '/')[:200]} |" for line in not_run]
    return "\n".join(text) + "\n"


REMARKS = (
    "What a loss of these classes averages over is written down in `accumloss/transformers/known.py`, by class and loss: "
    "nothing is measured in a run. A subclass that overrides the loss is none of them; `accumloss.verify(trainer)` measures it.",
    "A `-` is a split that a Trainer cannot make. Those that generate their rows (GRPO, RLOO, Distillation) split one batch of "
    "them evenly: an uneven last window does not exist. KTO takes no batch of one row.",
    "OnlineDPOTrainer has a training_step of its own, which does not divide by the micro-batches. With accumloss it does.",
    "GOLD and IW-OPD are handed the items of the whole batch once for each micro-batch by stock transformers, with accumloss "
    "once.",
    "SpladeLoss is exact in the first step, in which its regularizers weigh nothing, and not after it.",
    "GRPO's adaptive entropy bonus is 0 in the first step; the bonus is that of the rows above it.",
    "SetFit has no `gradient_accumulation_steps`, and so nothing to make exact.",
    "Metrics that a Trainer logs by itself (`mean_token_accuracy`, `rewards/chosen`) are means of the micro-batches' means. "
    "With `metrics=True`, `token_accuracy` and `token_entropy` over all tokens stand beside them in the logs of SFT.",
)


def _cell(value: str) -> str:
    return "-" if value == "" else "0" if float(value) == 0 else value


# Running --------------------------------------------------------------------------------------------------------------


def names(only: Sequence[str] | None = None) -> dict[str, str]:
    """Case -> library, of those that are asked for: by their names, or by those of their Trainers."""
    cases = list(trainer_cases.cases())
    missing = [name for name in only or () if not any(name in (case.name, case.trainer) for case in cases)]
    if missing:
        raise AuditError(
            f"audit: expected Trainers that are installed, or their losses, as in 'DPOTrainer sigmoid', got {', '.join(missing)}; "
            "pip install 'accumloss[trainers]'"
        )
    return {case.name: case.library for case in cases if not only or case.name in only or case.trainer in only}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a Trainer prints goes to the errors
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for line in sys.stdin:
        print(json.dumps(audit(json.loads(line)["name"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
