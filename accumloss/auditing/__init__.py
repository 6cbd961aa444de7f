"""Whether gradient accumulation is exact: for a model, by real Trainer steps, and for every class of transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import transformers as integration
from ..keywords import checked
from . import measure
from .measure import EXACT, WAYS, AuditError, Report, StepResult

__all__ = ["EXACT", "AuditError", "Report", "StepResult", "audit"]


@functools.partial(checked, names_errors=False)
def audit(
    model: torch.nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    batch_sizes: Sequence[int] = (1, 2, 3),
    ways: Sequence[str] = WAYS,
    groups: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measures whether training this model over micro-batches equals training it over the one batch that holds them all.

    For each batch size, transformers' Trainer takes one optimizer step over all rows, with and without accumloss; its
    gradient and the loss that it logs are held against the model's own loss over all rows at once, in plain PyTorch. Then
    it evaluates them in batches of the same sizes and in one. The model is copied, and copies run in eval mode: dropout is random, and batch normalisation couples the rows.

    Args:
        model: a transformers model, or any module that returns a loss for the entries of the batches.
        batches: what one optimizer step trains on, as the model is called with it: entries of tensors (rows, ...). Rows of
            different lengths are padded, labels with -100 and anything else with 0. Uneven rows show the most.
        batch_sizes: rows of a micro-batch; 8 rows by 3 are 3+3+2.
        ways: of "stock" and "accumloss".
        groups: also report the gradient error of each parameter group, the first two parts of a parameter's name.
        progress: called with the name of each step before it is taken.

    Returns:
        Report; ``report.is_exact()`` says whether accumloss is, ``report.reason`` why where it is not.

    Raises:
        AuditError: the model returns no finite loss with a gradient for these rows, or one that is random.

    Examples:
        >>> report = accumloss.audit(model, [batch])  # batch: what model(**batch) takes, of several rows
        >>> report.is_exact(), report.is_exact("stock")
        (True, True)
    """
    unknown = set(ways) - set(WAYS)
    if unknown:
        raise AuditError(f"audit: expected ways of {', '.join(WAYS)}, got {', '.join(sorted(unknown))}")
    if not len(batches):
        raise AuditError("audit: expected batches of one optimizer step, got none")
    rows = measure.rows_of(batches)
    return audit_rows(model, rows, batch_sizes=batch_sizes, ways=ways, groups=groups, progress=progress)


def audit_rows(
    model: torch.nn.Module,
    rows: measure.Rows,
    *,
    batch_sizes: Sequence[int] = (1, 2, 3),
    ways: Sequence[str] = WAYS,
    groups: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """audit() of rows that a DataLoader would stack: entries without a batch dimension."""
    sizes = [size for size in batch_sizes if 0 < size < len(rows)]
    if not sizes:
        raise AuditError(
            f"audit: expected more rows than one micro-batch holds, got {len(rows)} for {list(batch_sizes)}"
        )
    say = progress or (lambda text: None)
    say("one batch")
    with integration.unregistered(), measure.prepared(model) as copied:
        batch = measure.collate(rows)
        loss, whole = measure.plain_loss(copied, batch)
        if not measure.is_deterministic(copied, batch):
            raise AuditError(
                f"audit: expected a loss of {type(model).__name__} that is the same every time, got a random one; pass what it "
                "draws (a mask, noise) as an entry of the batches"
            )
        parts = {size: measure.parts_of(copied, rows, size) for size in sizes}
        noise = measure.noise_of(copied, rows, whole)
    steps, evaluation = [], {}
    for way in ways:
        for size in sizes:
            name = measure.name_of(measure.sizes_of(len(rows), size))
            say(f"{way}, {name}")
            steps.append(measure.step_result(model, rows, size, way, name, loss, whole, parts[size], groups))
        say(f"{way}, evaluation")
        difference = measure.evaluation_difference(model, rows, sizes, way)
        if difference is not None:
            evaluation[way] = difference
    report = Report(type(model).__name__, len(rows), loss, noise, steps, evaluation=evaluation)
    if report.is_exact() or "accumloss" not in ways:
        return report
    return measure.explained(report, model, rows, whole, parts)
