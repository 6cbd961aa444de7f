"""`python -m accumloss audit`: one model, or the census of all classes."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import transformers as integration
from . import audit_rows, census, models, report, tiny
from .measure import REMEDIES, WAYS, AuditError


def add_parser(commands: Any) -> None:
    """The audit command's arguments."""
    parser = commands.add_parser(
        "audit",
        help="measure whether gradient accumulation is exact: for one model, or for every class of transformers",
        description="Takes optimizer steps of the real Trainer over micro-batches, with and without accumloss, and holds them "
        "against the model's own loss over the one batch. Exit status 1 where accumloss is not exact.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder, a hub id, a class (BertForMaskedLM), a configuration class or a model_type",
    )
    parser.add_argument(
        "--factory",
        metavar="PKG.MODULE:FUNCTION",
        help="a function of yours that returns (model, batches), or a Trainer",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that lies beside the weights of MODEL; never run otherwise",
    )
    parser.add_argument("--all", action="store_true", help="the census: every class of the installed transformers")
    parser.add_argument(
        "--trainers",
        action="store_true",
        help="the census of Trainers: every loss of every Trainer of the installed trl and sentence-transformers",
    )
    parser.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=[1, 2, 3],
        metavar="N",
        help="rows of a micro-batch (default: 1 2 3)",
    )
    parser.add_argument("--groups", action="store_true", help="also the gradient error of each parameter group")
    parser.add_argument("--json", action="store_true", help="print JSON")
    of_all = parser.add_argument_group("a census")
    of_all.add_argument(
        "--only", nargs="+", metavar="CLASS", help='these classes alone; with --trainers also "DPOTrainer sigmoid"'
    )
    of_all.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: %(default)s)"
    )
    of_all.add_argument(
        "--time-limit", type=float, default=60.0, metavar="SECONDS", help="of a class (default: %(default)s)"
    )
    of_all.add_argument(
        "--out",
        type=Path,
        default=Path("accumloss-census"),
        metavar="FOLDER",
        help="census.csv, census.md, or trainers.csv, trainers.md, and what is done so far (default: %(default)s)",
    )
    of_all.add_argument("--fresh", action="store_true", help="forget what an interrupted census has done")


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 exact, 1 not, 2 not measured."""
    if (options.model is not None) + (options.factory is not None) + options.all + options.trainers != 1:
        print("audit: expected one of MODEL, --factory, --all and --trainers", file=sys.stderr)
        return 2
    if options.trust_remote_code and options.model is None:
        print("audit: expected MODEL with --trust-remote-code", file=sys.stderr)
        return 2
    try:
        if options.trainers:
            return run_trainers(options)
        return run_census(options) if options.all else run_one(options)
    except AuditError as error:
        print(error, file=sys.stderr)
        return 2


def run_one(options: argparse.Namespace) -> int:
    _quiet()
    if options.factory:
        subject = models.from_factory(options.factory)
    else:
        subject = models.from_name(options.model, options.trust_remote_code)
    if subject.trainer is not None:
        return _verify(subject.trainer, options.json)
    gc.freeze()  # Trainer collects garbage after each training: all that is imported takes most of that time
    steps = 1 + len(WAYS) * len([size for size in options.batch_sizes if 0 < size < len(subject.rows)])
    with report.progress(steps, "steps") as advance:
        found = audit_rows(
            subject.model, subject.rows, batch_sizes=options.batch_sizes, groups=options.groups, progress=advance
        )
    if options.json:
        print(json.dumps({**found.to_dict(), "model": subject.name, "note": subject.note}, indent=2))
    else:
        report.show(found, f"{subject.name}: {subject.note}" if subject.note else "")
    return 0 if found.is_exact() else 1


def _verify(trainer: Any, as_json: bool) -> int:
    """The audit of a Trainer: its own compute_loss on its own rows."""
    found = integration.verification(trainer)
    if as_json:
        told = {name: value for name, value in vars(found).items() if name not in ("measured", "schemes")}
        print(json.dumps({**told, "terms": [vars(term) for term in found.terms]}, indent=2))
    else:
        print(found)
        if found.is_exact is False and not found.can_be_exact:
            print(f"what to do: {REMEDIES['coupled']}")
    return 2 if found.is_exact is None else 0 if found.is_exact else 1


def run_census(options: argparse.Namespace) -> int:
    _quiet()
    classes = tiny.loss_bearing_classes()
    if options.only:
        unknown = set(options.only) - set(classes)
        if unknown:
            raise AuditError(
                f"audit: expected classes of transformers that compute a loss, got {', '.join(sorted(unknown))}"
                f"{models.suggestion(min(unknown))}"
            )
        classes = {name: classes[name] for name in options.only}
    lines = _census(options, census, "census", classes, "classes")
    return 1 if census.summary(lines)[census.WRONG] else 0


def run_trainers(options: argparse.Namespace) -> int:
    from . import trainers

    _quiet()
    cases = trainers.names(options.only)
    lines = _census(options, trainers, "trainers", cases, "Trainers", program="accumloss.auditing.trainers")
    return 1 if any(trainers.verdict(line) in trainers.FAILURES for line in lines) else 0


def _census(
    options: argparse.Namespace, of: ModuleType, file: str, names: dict[str, str], what: str, **how: str
) -> list[census.Line]:
    """Audits all of the names, goes on where it was interrupted, and writes FILE.csv and FILE.md as the module ``of`` does."""
    state = options.out / f"{file}.jsonl"
    if options.fresh:
        state.unlink(missing_ok=True)
    start = time.perf_counter()
    done = len({line["name"] for line in census.read(state)} & set(names))
    with report.progress(len(names), what) as advance:
        advance("", by=done)
        lines = census.run(
            names,
            state,
            jobs=options.jobs,
            time_limit=options.time_limit,
            on_line=lambda line: advance(f"{line['name']}: {of.verdict(line)}"),
            **how,
        )
    minutes = None if done else (time.perf_counter() - start) / 60
    of.write_csv(lines, options.out / f"{file}.csv")
    text = of.markdown(lines, minutes)
    (options.out / f"{file}.md").write_text(text)
    print(json.dumps([of.row(line) for line in lines], indent=2) if options.json else text)
    return lines


def _quiet() -> None:
    """Tiny models make transformers warn of much that does not matter here."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
