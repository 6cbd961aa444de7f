"""A process that audits classes of transformers, one for each line of its standard input: {"module": ..., "name": ...}.

It answers each with one line of JSON on its standard output. The census kills it where a class takes too long.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import audit_rows, tiny
from .measure import EXACT, WAYS, AuditError, Report, named_line, one_line


def audit_class(
    module: str, name: str, ways: Sequence[str] = WAYS, batch_sizes: Sequence[int] = (1, 2, 3)
) -> dict[str, Any]:
    """The line of the census of one class; ways and batch_sizes as for audit()."""
    start = time.perf_counter()
    cls = getattr(importlib.import_module(module), name)
    found: dict[str, Any] = {"module": module, "name": name, "head": tiny.head_of(cls), "reason": ""}
    try:
        model = tiny.build(cls)
        rows, dtype = tiny.rows(model), "fp32"
        report = audit_rows(model, rows, ways=ways, batch_sizes=batch_sizes)
        if not report.is_exact() and report.noise > EXACT / 10:  # a tiny random model may amplify rounding
            with contextlib.suppress(RuntimeError):  # a model that makes fp32 tensors of its own stays with fp32
                report = audit_rows(model.double(), in_double(rows), ways=ways, batch_sizes=batch_sizes)
                dtype = "fp64"
    except (tiny.CannotBuild, AuditError) as error:
        found.update(status="not run", reason=one_line(error))
    except Exception as error:  # a class that raises is a line of the census, and not its end
        found.update(status="not run", reason=named_line(error))
    else:
        found.update(status_of(report), dtype=dtype)
    found["seconds"] = round(time.perf_counter() - start, 2)
    return found


def in_double(value: Any) -> Any:
    """The floating tensors of rows in fp64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: in_double(entry) for key, entry in value.items()}
    return [in_double(entry) for entry in value] if isinstance(value, list) else value


def status_of(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = {
        "status": "run",
        "reason": report.reason,
        "distance": report.distance,
        "noise": report.noise,
    }
    for way in filter(report.of, WAYS):
        worst = report.worst(way)
        found[way] = {
            "exact": report.is_exact(way),
            "split": worst.split,
            "ratio": worst.ratio,
            "gradient_error": worst.gradient_error,
            "loss_error": worst.loss_error,
            "cause": worst.cause,
            "evaluation_difference": report.evaluation.get(way),
        }
    return found


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a model prints goes to the errors
    torch.set_num_threads(1)
    for line in sys.stdin:
        gc.collect()
        gc.freeze()  # Trainer collects garbage after each training: all that is imported takes most of that time
        print(json.dumps(audit_class(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
