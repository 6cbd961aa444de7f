"""The demo: one small Llama trained on real text at several accumulation depths, three ways.

Every optimizer step is taken by all runs in turn, on the same sequences. What differs is only how the window of sequences is
cut into micro-batches (the accumulation depth) and how the losses of the micro-batches become the loss of the step (the way):

    mean of means   (model(micro_batch).loss / depth).backward()                   each micro-batch weighs the same
    transformers    model(micro_batch, num_items_in_batch=n).loss.backward()       each token weighs the same
    accumloss       the same call, after model.loss_function = accumloss.causal_lm_loss

The window taken as one batch by transformers is the truth that the others are held against. Losses and weights are compared
after every step; times are medians over the steps; memory is taken in a pass of its own, after the training.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import importlib.util
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .functional import causal_lm_loss

PACKAGES = ("transformers", "tokenizers", "matplotlib", "rich")

MEAN_OF_MEANS = "mean of means"
TRANSFORMERS = "transformers"
ACCUMLOSS = "accumloss"
WAYS = (MEAN_OF_MEANS, TRANSFORMERS, ACCUMLOSS)
DEPTHS = (1, 4, 16)
FULL_BATCH = (TRANSFORMERS, 1)

WINDOW = 16  # sequences per optimizer step
MAX_TOKENS = 192  # of a sequence
VOCAB = 4096
LEARNING_RATE = 2e-3
PAD, START = 0, 1  # token ids
IGNORE = -100

# Okabe-Ito colours; each way also has its own dash and width, so that no reader depends on colour.
STYLES: dict[str, dict[str, Any]] = {
    MEAN_OF_MEANS: {"color": "#D55E00", "linestyle": "-", "linewidth": 1.6},
    TRANSFORMERS: {"color": "#56C9A0", "linestyle": "-", "linewidth": 3.4},
    ACCUMLOSS: {"color": "#0072B2", "linestyle": (0, (4, 1.5)), "linewidth": 1.5},
}

WHAT_A_ROW_SHOWS = {
    MEAN_OF_MEANS: "tokens of short sequences weigh more, the more so the more micro-batches",
    TRANSFORMERS: "divides by the items of the whole step; what remains is fp32 rounding in another order",
    ACCUMLOSS: "the same training; of the logits nothing is stored again but their gradient",
}


class DemoError(RuntimeError):
    """The demo cannot run here; the message is one line and says what to do."""


@dataclass(frozen=True)
class Settings:
    """What a run of the demo depends on."""

    out: Path = Path("accumloss-demo")
    steps: int = 24
    device: str = "cpu"
    seed: int = 0


@dataclass
class Run:
    """One model, trained one way at one accumulation depth."""

    way: str
    depth: int
    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # per step, nats per token
    loss_deviations: list[float] = field(default_factory=list)  # |loss - loss of the full batch|
    weight_deviations: list[float] = field(default_factory=list)  # relative to the distance the full batch has trained
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def is_full_batch(self) -> bool:
        return (self.way, self.depth) == FULL_BATCH


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    way: str
    accumulation: int
    last_loss: float  # nats per token, as the way itself reports it
    max_loss_deviation: float  # nats per token
    max_weight_deviation: float  # share of the distance trained
    step_ms: float  # median
    peak_mb: float | None  # of one forward and backward, above the process at rest


# --------------------------------------------------------------------------------------------------------------- data


def read_text() -> list[str]:
    """The paragraphs of the language reference that ships with Python, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoError(
            "demo: expected a Python with pydoc_data.topics, got one without: use a full Python installation"
        ) from None
    paragraphs = (p for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name]))
    return [p for p in paragraphs if p.strip()]


def tokenise(paragraphs: Sequence[str]) -> list[list[int]]:
    """Token ids of every paragraph, by a byte-level BPE trained on the paragraphs themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<start>"],  # PAD, START
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return [[START, *encoding.ids][:MAX_TOKENS] for encoding in tokenizer.encode_batch(list(paragraphs))]


def windows(sequences: Sequence[list[int]], steps: int) -> list[list[list[int]]]:
    """The sequences of every optimizer step; the text is started anew where it ends."""
    return [[sequences[(step * WINDOW + i) % len(sequences)] for i in range(WINDOW)] for step in range(steps)]


def collate(sequences: Sequence[list[int]], device: str) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T), padded to the longest sequence."""
    length = max(map(len, sequences))
    ids = torch.tensor([s + [PAD] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (length - len(s)) for s in sequences])
    labels = ids.masked_fill(mask == 0, IGNORE)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


# ----------------------------------------------------------------------------------------------------------- training


def make_model(seed: int, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train().to(torch.device(device))


def make_run(way: str, depth: int, settings: Settings) -> Run:
    model = make_model(settings.seed, settings.device)
    if way == ACCUMLOSS:
        model.loss_function = causal_lm_loss
    return Run(way, depth, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0))


def backward(run: Run, window: Sequence[list[int]], device: str) -> torch.Tensor:
    """Gradients of one optimizer step, accumulated over run.depth micro-batches; returns the loss that the way reports."""
    size = len(window) // run.depth
    micro_batches = [collate(window[i : i + size], device) for i in range(0, len(window), size)]
    num_items_in_batch = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in micro_batches)
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        if run.way == MEAN_OF_MEANS:
            loss = run.model(**batch).loss / run.depth
        else:
            loss = run.model(**batch, num_items_in_batch=num_items_in_batch).loss
        loss.backward()
        total += loss.detach()
    return total


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def train_step(run: Run, window: Sequence[list[int]], device: str) -> None:
    synchronize(device)
    start = time.perf_counter()
    loss = backward(run, window, device)
    run.optimizer.step()
    run.optimizer.zero_grad()
    synchronize(device)
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(loss.item())


def flat_weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in run.model.parameters()]).double()


def compare(runs: Sequence[Run], start: torch.Tensor) -> None:
    """Appends the deviations of the step that every run has just taken."""
    full = next(run for run in runs if run.is_full_batch)
    truth = flat_weights(full)
    trained = (truth - start).norm()
    for run in runs:
        run.loss_deviations.append(abs(run.losses[-1] - full.losses[-1]))
        run.weight_deviations.append(float((flat_weights(run) - truth).norm() / trained))


# ------------------------------------------------------------------------------------------------------------- memory


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def peak_bytes(work: Callable[[], object], device: str) -> int | None:
    """Peak memory of work() above what was in use before it; None where the system cannot tell (CPU outside Linux)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed must not serve this one unseen
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        work()
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError, TypeError):
        return None


def measure_memory(runs: Sequence[Run], window: Sequence[list[int]], device: str) -> None:
    for run in runs:
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # exist in every step but the first
        run.peak_bytes = peak_bytes(partial(backward, run, window, device), device)
        run.optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------- progress


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
        every = max(1, total // 10)

        def show(done: int, text: str) -> None:
            if done % every == 0 or done == total:
                print(f"step {done}/{total}  {text}", file=sys.stderr, flush=True)

        yield show


# ------------------------------------------------------------------------------------------------------------ results


def summarise(run: Run) -> Row:
    return Row(
        way=run.way,
        accumulation=run.depth,
        last_loss=run.losses[-1],
        max_loss_deviation=max(run.loss_deviations),
        max_weight_deviation=max(run.weight_deviations),
        step_ms=1e3 * statistics.median(run.seconds),
        peak_mb=None if run.peak_bytes is None else run.peak_bytes / 1e6,
    )


CURVE_COLUMNS = ("step", "way", "accumulation", "loss", "loss_deviation", "weight_deviation", "seconds")


def write_curves(runs: Sequence[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CURVE_COLUMNS)
        for run in runs:
            curves = zip(run.losses, run.loss_deviations, run.weight_deviations, run.seconds, strict=True)
            for step, values in enumerate(curves, start=1):
                writer.writerow([step, run.way, run.depth, *(repr(v) for v in values)])


def read_curves(path: Path) -> dict[tuple[str, int], dict[str, list[float]]]:
    """(way, accumulation) -> column -> values by step."""
    curves: dict[tuple[str, int], dict[str, list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            columns = curves.setdefault((row["way"], int(row["accumulation"])), {})
            for name in ("step", "loss", "loss_deviation", "weight_deviation"):
                columns.setdefault(name, []).append(float(row[name]))
    return curves


def plot_losses(curves_csv: Path, path: Path) -> None:
    """The loss curves, one panel per accumulation depth, over the full batch's."""
    from matplotlib.figure import Figure

    curves = read_curves(curves_csv)
    depths = [depth for depth in DEPTHS if depth > 1]
    figure = Figure(figsize=(5.2 * len(depths), 4.2), layout="constrained")
    axes = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for axis, depth in zip(axes, depths, strict=True):
        full = curves[FULL_BATCH]
        axis.plot(full["step"], full["loss"], color="#BBBBBB", linewidth=6, solid_capstyle="round", label="full batch")
        for way in WAYS:
            curve = curves[way, depth]
            axis.plot(curve["step"], curve["loss"], label=way, **STYLES[way])
        axis.set_title(f"{depth} micro-batches per step")
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reported loss (nats per token)")
    axes[-1].legend(frameon=False)
    figure.suptitle("The same sequences in every step: the loss that each way reports")
    figure.savefig(path, dpi=150)


def plot_deviations(curves_csv: Path, path: Path) -> None:
    """Deviation from the full batch on a log axis: the loss above, the weights below, one column per depth."""
    from matplotlib.figure import Figure

    curves = read_curves(curves_csv)
    depths = [depth for depth in DEPTHS if depth > 1]
    rows = {
        "loss_deviation": "loss: |difference|\n(nats per token)",
        "weight_deviation": "weights: distance\n(share of the distance trained)",
    }
    figure = Figure(figsize=(5.2 * len(depths), 6.6), layout="constrained")
    grid = figure.subplots(len(rows), len(depths), sharex=True, sharey="row", squeeze=False)
    for axes, (name, label) in zip(grid, rows.items(), strict=True):
        shown = [v for way in WAYS for depth in depths for v in curves[way, depth][name] if v > 0]
        floor = min(shown, default=1e-9) / 2
        for axis, depth in zip(axes, depths, strict=True):
            for way in WAYS:
                curve = curves[way, depth]
                axis.plot(curve["step"], [max(v, floor) for v in curve[name]], label=way, **STYLES[way])
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel(label)
    for axis, depth in zip(grid[0], depths, strict=True):
        axis.set_title(f"{depth} micro-batches per step")
    for axis in grid[-1]:
        axis.set_xlabel("optimizer step")
    grid[0][-1].legend(frameon=False, loc="center right")
    figure.suptitle("Deviation from the full batch (exact equality is drawn at the lower edge)")
    figure.savefig(path, dpi=150)


def print_table(rows: Sequence[Row], result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("way")
    for name in (
        "micro-\nbatches",
        "loss at\nlast step",
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
            f"{row.last_loss:.5f}",
            f"{row.max_loss_deviation:.1e}",
            f"{row.max_weight_deviation:.1e}",
            f"{row.step_ms:.0f}",
            "n/a" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            end_section=i + 1 == len(rows) or rows[i + 1].way != row.way,
        )
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=True)
    console.print(
        f"{result['steps']} optimizer steps of {WINDOW} sequences ({result['min_tokens']} to {result['max_tokens']} tokens); "
        f"{result['parameters'] / 1e6:.1f} M parameters, vocabulary {VOCAB}, fp32, {result['device']}"
    )
    console.print(table)
    for way in WAYS:
        console.print(f"{way}: {WHAT_A_ROW_SHOWS[way]}")
    console.print(
        f"Deviations are from the same sequences as one batch in {TRANSFORMERS}: of the loss in nats per token, of the\n"
        "weights as a share of the distance trained. Step: median. Peak: of one forward and backward, above the process at rest."
    )
    console.print(
        f"{result['seconds']:.0f} s; written to {Path(result['files'][0]).parent}: {', '.join(Path(f).name for f in result['files'])}"
    )


# --------------------------------------------------------------------------------------------------------------- main


def check(settings: Settings) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"demo: needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if settings.steps < 1:
        raise DemoError(f"demo: expected --steps of at least 1, got {settings.steps}")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(
            f"demo: expected a --device that this torch can use, got {settings.device!r} ({reason})"
        ) from None
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"demo: expected --out to be a folder that can be written, got {str(settings.out)!r} ({error.strerror})"
        ) from None


def train(settings: Settings) -> tuple[list[Run], dict[str, Any]]:
    """Trains every way at every depth, step by step in turn."""
    device = settings.device
    sequences = tokenise(read_text())
    random.Random(settings.seed).shuffle(sequences)
    steps = windows(sequences, settings.steps)

    runs = [make_run(way, depth, settings) for way in WAYS for depth in DEPTHS]
    start = flat_weights(runs[0])
    for run in runs:  # what happens once (allocator, kernels, thread pools) is not part of a step
        backward(run, steps[0], device)
        run.optimizer.zero_grad()
    turns = random.Random(settings.seed)
    with progress(len(steps)) as show:
        for done, window in enumerate(steps, start=1):
            for run in turns.sample(runs, len(runs)):
                train_step(run, window, device)
            compare(runs, start)
            off = {way: max(run.loss_deviations[-1] for run in runs if run.way == way) for way in WAYS}
            show(done, f"off: {MEAN_OF_MEANS} {off[MEAN_OF_MEANS]:.0e}, {ACCUMLOSS} {off[ACCUMLOSS]:.0e}")
    measure_memory(runs, max(steps, key=lambda window: max(map(len, window)) * len(window)), device)
    lengths = [len(sequence) for window in steps for sequence in window]
    facts = {
        "parameters": sum(p.numel() for p in runs[0].model.parameters()),
        "min_tokens": min(lengths),
        "max_tokens": max(lengths),
    }
    return runs, facts


def main(settings: Settings, as_json: bool = False) -> int:
    """Runs the demo, writes its files to settings.out and prints the table (or the same as JSON)."""
    check(settings)
    begin = time.perf_counter()
    runs, facts = train(settings)
    rows = [summarise(run) for run in runs]
    curves, losses, deviations, summary = (
        settings.out / name for name in ("curves.csv", "loss.png", "deviation.png", "summary.json")
    )
    write_curves(runs, curves)
    plot_losses(curves, losses)
    plot_deviations(curves, deviations)
    result = {
        "steps": settings.steps,
        "seed": settings.seed,
        "device": settings.device,
        **facts,
        "rows": [asdict(row) for row in rows],
        "seconds": time.perf_counter() - begin,
        "files": [str(path) for path in (curves, losses, deviations, summary)],
    }
    summary.write_text(json.dumps(result, indent=2) + "\n")
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_table(rows, result)
    return 0
