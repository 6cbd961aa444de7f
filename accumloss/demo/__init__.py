"""The demo: two small models trained on real text at several accumulation depths.

A BERT in transformers' Trainer, as it is and with accumloss (masked.py), and a Llama in a loop of one's own, three ways
(causal.py). All runs of a model see the same sequences in every optimizer step; the window taken as one batch by transformers
is the truth that the others are held against. Losses and weights are compared after every step; times are medians over the
steps; memory is taken in a pass of its own, after the training.
"""

from __future__ import annotations

import importlib.util
import json
import random
import time
from dataclasses import asdict
from typing import Any

import torch

from . import pictures, report, text
from .runs import CAUSAL_LM, DEPTHS, MASKED_LM, WAYS, DemoError, Settings, full_batch_of, summarise

__all__ = ["DemoError", "Settings", "main"]

PACKAGES = ("transformers", "accelerate", "tokenizers", "matplotlib", "rich")


def check(settings: Settings) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"demo: needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if settings.steps < 1:
        raise DemoError(f"demo: expected --steps of at least 1, got {settings.steps}")
    try:
        device = torch.empty(0, device=settings.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(
            f"demo: expected a --device that this torch can use, got {settings.device!r} ({reason})"
        ) from None
    if device.index:
        raise DemoError(
            f"demo: expected --device cpu or cuda, got {settings.device!r}: Trainer takes the first GPU; set "
            f"CUDA_VISIBLE_DEVICES={device.index} instead"
        )
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"demo: expected --out to be a folder that can be written, got {str(settings.out)!r} ({error.strerror})"
        ) from None


def train(settings: Settings) -> tuple[report.Results, dict[str, int]]:
    """Trains both models, every way at every depth; returns their runs, and what the text was."""
    from . import causal, masked  # they need transformers, which check() has found

    trainings = {MASKED_LM: masked.train, CAUSAL_LM: causal.train}
    sequences = text.tokenise(text.read_text())
    random.Random(settings.seed).shuffle(sequences)
    windows = text.windows(sequences, settings.steps)
    steps = {task: len(WAYS[task]) * len(DEPTHS) * len(windows) for task in trainings}
    results: report.Results = {}
    with report.progress(sum(steps.values())) as show:
        for task, train_task in trainings.items():
            before = sum(steps[earlier] for earlier in results)

            def show_after(done: int, message: str, before: int = before) -> None:
                show(before + done, message)

            results[task] = train_task(windows, settings, show_after)
    lengths = [len(sequence) for window in windows for sequence in window]
    facts = {"min_tokens": min(lengths), "max_tokens": max(lengths), "vocabulary": text.VOCAB}
    return results, facts


def facts_of(results: report.Results) -> dict[str, Any]:
    """task -> its model and the rows of its table."""
    facts = {}
    for task, runs in results.items():
        full = full_batch_of(runs)
        facts[task] = {
            "model": type(full.model).__name__,
            "parameters": sum(p.numel() for p in full.model.parameters()),
            "rows": [asdict(summarise(run, full)) for run in runs],
        }
    return facts


def main(settings: Settings, as_json: bool = False) -> int:
    """Runs the demo, writes its files to settings.out and prints the tables (or the same as JSON)."""
    check(settings)
    begin = time.perf_counter()
    results, text_facts = train(settings)
    curves, masked_lm, losses, deviations, summary = (
        settings.out / name for name in ("curves.csv", "masked_lm.png", "loss.png", "deviation.png", "summary.json")
    )
    report.write_curves(results, curves)
    shown = report.read_curves(curves)
    pictures.plot_masked_lm(shown[MASKED_LM], masked_lm)
    pictures.plot_losses(shown[CAUSAL_LM], losses)
    pictures.plot_deviations(shown[CAUSAL_LM], deviations)
    result = {
        "steps": settings.steps,
        "seed": settings.seed,
        "device": settings.device,
        "text": text_facts,
        **facts_of(results),
        "seconds": time.perf_counter() - begin,
        "files": [str(path) for path in (curves, masked_lm, losses, deviations, summary)],
    }
    summary.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        report.print_tables(result)
    return 0
