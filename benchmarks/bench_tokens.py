"""What is told of each token, and losses over it: accumloss against the PyTorch that people write for it.

    python benchmarks/bench_tokens.py [--rows 1024] [--vocab 32000 50257 128256] [--dtype bf16 fp32] [--rounds 5] [--out FOLDER]

Forward and backward together, from logits to their gradient, with a gradient of its own for each row; one thread. The ways of
a task take turns within a round, in another order every round. A time is CPU time of the process, user and system, and so is
little moved by what else a machine does; a ratio is the median of the ratios within the rounds. Peak memory is above the
logits, in a pass of its own; the gradient, as large as they are, is part of it. Before anything is timed, values and gradients
are held against float64. Writes tokens_cpu.csv and .json, and prints a table.

What cannot be gone below is measured in the same rounds: a copy of the logits into a new buffer, whose pages are made by that
(as those of every gradient of plain PyTorch), and into one that is there (as the kept memory of accumloss is). A row loss
reads the logits once more than that, a loss of two tensors three times more.

The plain ways are those in use: TRL's selective_log_softmax and entropy_from_logits as they stand (for a row of a batch at a
time), F.cross_entropy(reduction="none"), F.kl_div of log_softmax as GKD writes it.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import devices
import record
import torch
import torch.nn.functional as F

import accumloss

NAME = "tokens_cpu"
VOCABULARIES = (32000, 50257, 128256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FIELDS = (
    "task", "rows", "vocab", "dtype", "way", "rounds", "cpu_ms_median", "ratio_to_plain", "copy_fresh_cpu_ms", "copy_cpu_ms",
    "peak_extra_bytes", "peak_extra_over_logits", "value_error", "gradient_error",
)  # fmt: skip
LOGITS = (
    2**25
)  # of bf16 64 MiB: beyond what malloc keeps, so that every buffer is mapped anew, as large ones are in a training
BATCH = 4  # rows of logits (B, T, V): what TRL loops over


class Data(NamedTuple):
    logits: torch.Tensor  # (B, T, V)
    teacher: torch.Tensor  # (B, T, V)
    labels: torch.Tensor  # (B, T)
    grad: torch.Tensor  # (B, T)


Way = Callable[[torch.Tensor, Data], torch.Tensor]  # of logits that want a gradient: (B, T)


def selective_log_softmax(logits: torch.Tensor, data: Data) -> torch.Tensor:
    """TRL's."""
    index = data.labels.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        selected = torch.gather(logits, dim=-1, index=index)
        lse = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
        return (selected - lse.unsqueeze(-1)).squeeze(-1)
    rows = [F.log_softmax(row, dim=-1).gather(-1, y) for row, y in zip(logits, index, strict=True)]
    return torch.stack(rows).squeeze(-1)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """TRL's, in chunks of 128 rows."""
    found = []
    for chunk in logits.reshape(-1, logits.shape[-1]).split(128):
        log_p = F.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(found).view(logits.shape[:-1])


def log_prob_and_entropy(logits: torch.Tensor, data: Data) -> torch.Tensor:
    return selective_log_softmax(logits, data) + 0.1 * entropy_from_logits(logits)


def our_log_prob_and_entropy(logits: torch.Tensor, data: Data) -> torch.Tensor:
    found = accumloss.token_statistics(logits, data.labels)
    return found.log_prob + 0.1 * found.entropy


def row_losses(logits: torch.Tensor, data: Data) -> torch.Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), data.labels.flatten(), reduction="none").view(
        data.labels.shape
    )


def forward_kl(logits: torch.Tensor, data: Data) -> torch.Tensor:
    log_s, log_t = logits.log_softmax(-1), data.teacher.log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)


def jensen_shannon(logits: torch.Tensor, data: Data) -> torch.Tensor:
    """GKD's generalized_jsd_loss at beta 0.5, before it is summed up."""
    log_s, log_t = logits.log_softmax(-1), data.teacher.log_softmax(-1)
    beta = torch.tensor(0.5, dtype=log_s.dtype)
    log_m = torch.logsumexp(torch.stack([log_s + torch.log1p(-beta), log_t + torch.log(beta)]), dim=0)
    of_teacher = F.kl_div(log_m, log_t, reduction="none", log_target=True)
    of_student = F.kl_div(log_m, log_s, reduction="none", log_target=True)
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


def distilled(beta: float) -> Way:
    def rows(logits: torch.Tensor, data: Data) -> torch.Tensor:
        return torch.ops.accumloss.distillation(logits, data.teacher, torch.zeros_like(data.labels), beta=beta)[0]

    return rows


def soft_targets(logits: torch.Tensor, data: Data) -> torch.Tensor:
    V = logits.shape[-1]
    losses = F.cross_entropy(logits.reshape(-1, V), data.teacher.reshape(-1, V), reduction="none")
    return losses.view(data.labels.shape)


# task -> the plain way, ours
TASKS: dict[str, tuple[Way, Way]] = {
    "row losses": (row_losses, lambda x, data: accumloss.token_losses(x, data.labels)),
    "log-probabilities": (selective_log_softmax, lambda x, data: accumloss.token_log_probs(x, data.labels)),
    "log-probabilities and entropies": (log_prob_and_entropy, our_log_prob_and_entropy),
    "class probabilities": (soft_targets, lambda x, data: accumloss.token_losses(x, data.teacher)),
    "KL(teacher, student)": (forward_kl, distilled(0.0)),
    "Jensen-Shannon, beta 0.5": (jensen_shannon, distilled(0.5)),
}


def make(task: str, rows: int, vocab: int, dtype: torch.dtype) -> Data:
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, rows // BATCH, vocab)
    logits, teacher = (torch.randn(shape, generator=generator).mul_(2) for _ in range(2))
    if task == "class probabilities":
        teacher = teacher.softmax(-1)
    labels = torch.randint(vocab, shape[:2], generator=generator)
    return Data(logits.to(dtype), teacher.to(dtype), labels, torch.randn(shape[:2], generator=generator))


def run(way: Way, data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = data.logits.detach().requires_grad_()
    values = way(leaf, data)
    (grad,) = torch.autograd.grad(values, leaf, data.grad.to(values.dtype))
    return values.detach(), grad


def errors(way: Way, data: Data, plain: Way) -> tuple[float, float]:
    """Relative errors of all values and of the gradient, against the plain way in float64 on some rows."""
    part = Data(*(tensor[:, :2] for tensor in data))
    wide = Data(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in part))
    wanted, found = run(plain, wide), run(way, part)
    return tuple(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))  # type: ignore[return-value]


def measure(task: str, rows: int, vocab: int, dtype: str, rounds: int) -> list[dict[str, Any]]:
    data = make(task, rows, vocab, DTYPES[dtype])
    plain, ours = TASKS[task]
    ways = {"plain": plain, "accumloss": ours}
    limit = 4 * torch.finfo(DTYPES[dtype]).eps if dtype == "bf16" else 1e-5
    lines, device, order = [], devices.Cpu(), random.Random(0)
    for name, way in ways.items():
        value, gradient = errors(way, data, plain)
        if name == "accumloss" and not (value <= 1e-6 and gradient <= limit):
            raise RuntimeError(
                f"bench_tokens: expected errors of at most 1e-6 and {limit:.0e} of {task} at {vocab} {dtype}, got {value:.1e} "
                f"and {gradient:.1e}"
            )
        peak = device.peak_bytes(lambda way=way: run(way, data))  # type: ignore[misc]
        over = None if peak is None else peak / (data.logits.numel() * data.logits.element_size())
        lines.append({
            "task": task, "rows": rows, "vocab": vocab, "dtype": dtype, "way": name, "rounds": rounds,
            "peak_extra_bytes": peak, "peak_extra_over_logits": over, "value_error": value, "gradient_error": gradient,
        })  # fmt: skip
    buffer = torch.zeros_like(data.logits)
    turns: dict[str, Callable[[], object]] = {
        **{name: functools.partial(run, way, data) for name, way in ways.items()},
        "copy_fresh": data.logits.clone,
        "copy": lambda: buffer.copy_(data.logits),
    }
    times: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name in order.sample(list(turns), len(turns)):
            start = time.process_time()
            turns[name]()
            if turn > 0:  # the first warms up
                times[name].append((time.process_time() - start) * 1e3)
    for line in lines:
        of_way = times[line["way"]]
        line["cpu_ms_median"] = statistics.median(of_way)
        ratios = [plain / own for plain, own in zip(times["plain"], of_way, strict=True)]
        line["ratio_to_plain"] = statistics.median(ratios)
        for name in ("copy_fresh", "copy"):
            line[f"{name}_cpu_ms"] = statistics.median(times[name])
    return lines


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    text = [
        "| task | V | dtype | plain, CPU ms | accumloss | times | copy, fresh | copy | peak / logits, plain | accumloss "
        "| value error, plain | accumloss |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for plain, ours in zip(lines[::2], lines[1::2], strict=True):
        peaks = [
            "" if x["peak_extra_over_logits"] is None else f"{x['peak_extra_over_logits']:.2f}" for x in (plain, ours)
        ]
        text.append(
            f"| {plain['task']} | {plain['vocab']} | {plain['dtype']} | {plain['cpu_ms_median']:.0f} "
            f"| {ours['cpu_ms_median']:.1f} | {ours['ratio_to_plain']:.1f} | {ours['copy_fresh_cpu_ms']:.1f} "
            f"| {ours['copy_cpu_ms']:.1f} | {peaks[0]} | {peaks[1]} "
            f"| {plain['value_error']:.0e} | {ours['value_error']:.0e} |"
        )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, help=f"a multiple of {BATCH}; default: as many as make {LOGITS / 1e6:.0f} million logits"
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--note", help="said in the environment of the result: what else the machine did, say")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args(arguments)
    if options.rows is not None and (options.rows < 2 * BATCH or options.rows % BATCH):
        parser.error(f"expected --rows as a multiple of {BATCH}, at least {2 * BATCH}, got {options.rows}")
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for vocab in options.vocab:
        for dtype in options.dtype:
            rows = options.rows or LOGITS // vocab // BATCH * BATCH
            for task in TASKS:
                lines += measure(task, rows, vocab, dtype, options.rounds)
                print(markdown(lines[-2:]).splitlines()[-1], flush=True)
    facts = {
        **record.origin("bench_tokens.py", list(sys.argv[1:] if arguments is None else arguments)),
        **record.environment(),
    }
    if options.note:
        facts["note"] = options.note
    record.write(record.Path(options.out), NAME, FIELDS, lines, facts)
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
