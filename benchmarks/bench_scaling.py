"""How the loss scales on the CPU: with the classes, the rows, the ignored rows, the threads, the metrics; and its smallest call.

    python benchmarks/bench_scaling.py [--quick]

Forward and backward of the causal loss, measured by harness.py as bench_cross_entropy.py does, with the heap as it comes.
Writes scaling_cpu.csv and .json to --out and prints the goals that belong here beside what was measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import harness
import peers
import record
import torch
from shapes import Shape

import accumloss
from accumloss.losses import Known, causal_lm

NAME = "scaling_cpu"
FIELDS = ("sweep", "threads", *harness.COLUMNS)
ELEMENTS = 2**25  # of the logits, along the classes
CLASSES = (9, 33, 100, 316, 1000, 4096, 16384, 32000, 50257, 128256, 262144)
ROWS = (2, 8, 32, 128, 512, 2048, 4096)
MOST_ROWS = 65536
FORWARD = "forward alone"


def with_metrics(is_on: bool) -> peers.Peer:
    """The loss as register_with_transformers(metrics=True) has Trainer call it, with or without the metrics."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return causal_lm(logits, labels, None, None, Known(n, metrics=is_on), accumloss.LossOptions()).loss

    return peers.Peer("metrics" if is_on else "no metrics", loss)


def sweeps(quick: bool) -> Iterable[tuple[str, int, Shape, list[str]]]:
    """sweep, threads, shape, peers"""
    most = torch.get_num_threads()
    elements = ELEMENTS // 64 if quick else ELEMENTS
    classes = CLASSES[::4] if quick else CLASSES
    ours = ["accumloss", "accumloss forward"]
    for dtype in ("bf16", "fp32"):
        for vocab in classes:
            rows = min(max(elements // vocab, 2), MOST_ROWS)
            for ignored in (0.0, 0.5, 0.9):
                competitors = [peers.STOCK, peers.COMPILE] if ignored == 0 else []
                yield "classes", most, Shape(rows, vocab, dtype, ignored), [*competitors, *ours]
    for dtype in ("bf16", "fp32"):
        for vocab in (4096, 128256):
            for ignored in (0.0, 0.9):
                yield FORWARD, most, Shape(max(elements // vocab, 2), vocab, dtype, ignored), ["accumloss"]
    for rows in ROWS[::3] if quick else ROWS:
        yield "rows", most, Shape(rows, 32000, "bf16"), [peers.STOCK, *ours]
    for threads in sorted({1, 2, most}):
        for dtype in ("bf16", "fp32"):
            yield "threads", threads, Shape(64 if quick else 1024, 32000, dtype), [peers.STOCK, *ours]
            yield "one row", threads, Shape(2, 262144, dtype), [peers.STOCK, *ours]
    for dtype in ("bf16", "fp32"):
        for vocab in (9, 1000, 32000, 128256):
            rows = min(max(elements // vocab, 2), MOST_ROWS)
            yield "metrics", most, Shape(rows, vocab, dtype), ["no metrics", "metrics"]


def smallest_call(rounds: int = 2000) -> float:
    """Median microseconds of loss and backward at one row of nine classes that counts."""
    logits, labels = torch.randn(1, 2, 9), torch.tensor([[0, 1]])

    def call() -> None:
        leaf = logits.detach().requires_grad_()
        accumloss.causal_lm_loss(leaf, labels, num_items_in_batch=1).backward()

    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


def straight_line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Intercept, slope and largest relative distance of points from the line through them that fits relatively best."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    design = torch.stack([torch.ones_like(x), x], dim=1) / y[:, None]
    intercept, slope = torch.linalg.lstsq(design, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    return intercept, slope, float(((intercept + slope * x) / y - 1).abs().max())


def goals(lines: Sequence[dict]) -> list[tuple[str, str, str, bool]]:
    """What is measured, the goal, the measurement, whether it is reached."""

    def of(sweep: str, peer: str, where: Callable[[dict], bool] = lambda line: True) -> list[dict]:
        found = [line for line in lines if (line["sweep"], line["peer"]) == (sweep, peer) and where(line)]
        return [line for line in found if not line["missing"]]

    found: list[tuple[str, str, str, bool]] = []

    def at_least(what: str, goal: float, values: list[float], unit: str = "×") -> None:
        if values:
            found.append(
                (what, f">= {goal:g}{unit}", f"{min(values):.2f} to {max(values):.2f}{unit}", min(values) >= goal)
            )

    def at_most(what: str, goal: float, values: list[float], unit: str) -> None:
        if values:
            found.append(
                (what, f"<= {goal:g}{unit}", f"{min(values):.1f} to {max(values):.1f}{unit}", max(values) <= goal)
            )

    small = lambda line: line["vocab"] <= 1000 and line["ignored"] == 0  # noqa: E731
    for dtype in ("bf16", "fp32"):
        heads = of("classes", "accumloss", lambda line, d=dtype: small(line) and line["dtype"] == d)
        at_least(f"heads of 9 to 1000 classes over stock, {dtype}", 3, [line["ratio_to_stock"] for line in heads])
        at_least(
            f"heads of 9 to 1000 classes over torch.compile, {dtype}",
            1,
            [l["ratio_to_compile"] for l in heads if l["ratio_to_compile"]],
        )
    pairs: list[float] = []
    for line in of("metrics", "metrics"):
        key = (line["rows"], line["vocab"], line["dtype"])
        without = next(l for l in of("metrics", "no metrics") if (l["rows"], l["vocab"], l["dtype"]) == key)
        pairs.append(100 * (line["ms_median"] / without["ms_median"] - 1))
    if pairs:
        mean = statistics.fmean(pairs)
        found.append(
            ("metrics add, on average", "<= 5 %", f"{mean:.1f} % ({min(pairs):.1f} to {max(pairs):.1f})", mean <= 5)
        )
    for sweep, peer in (("classes", "accumloss"), ("classes", "accumloss forward"), (FORWARD, "accumloss")):
        faster = []
        for full in of(sweep, peer, lambda line: line["vocab"] >= 4096 and line["ignored"] == 0):
            ignored = of(
                sweep,
                peer,
                lambda l, f=full: l["ignored"] == 0.9 and (l["vocab"], l["dtype"]) == (f["vocab"], f["dtype"]),
            )
            faster += [full["ms_median"] / line["ms_median"] for line in ignored]
        what = "without a gradient" if sweep == FORWARD else peer
        at_least(f"90 % ignored over none ignored, V >= 4096, {what}", 5, faster)
    by_rows = [(line["rows"], line["ms_median"]) for line in of("rows", "accumloss forward") if line["rows"] >= 128]
    if len(by_rows) > 2:
        intercept, slope, distance = straight_line(by_rows)
        text = f"{intercept:.2f} ms + {1e3 * slope:.2f} µs per row, within {distance:.0%}"
        found.append(("time against rows, V = 32000 bf16", "a straight line", text, distance <= 0.15))
    memory = [
        line["peak_extra_over_logits"] for line in of("classes", "accumloss forward", lambda l: l["vocab"] >= 1000)
    ]
    memory = [value for value in memory if value is not None]
    at_most("memory above the logits, in place in forward", 0.05, memory, " of their size")
    at_most(
        "smallest call, loss and backward", 60, [line["ms_median"] * 1e3 for line in of("call", "accumloss")], " µs"
    )
    return found


def markdown(lines: Sequence[dict]) -> str:
    return "\n".join(record.goals_table(goals(lines)))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="bench_scaling.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1/64 of the elements, 3 rounds, every fourth size")
    parser.add_argument(
        "--rounds", type=int, help="default: 5 along the classes, 40 with and without metrics, 15 elsewhere"
    )
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    facts = {**record.environment(), **record.origin("bench_scaling.py", arguments)}
    rounds = options.rounds or (3 if options.quick else 5)
    available: dict[str, peers.Peer | str] = {"no metrics": with_metrics(False), "metrics": with_metrics(True)}
    lines: list[dict] = []
    most = torch.get_num_threads()
    for sweep, threads, shape, names in sweeps(options.quick):
        print(f"{sweep}: {shape}, {threads} threads", file=sys.stderr, flush=True)
        available.update(peers.available((name for name in names if name not in available), peers.PEERS))
        torch.compiler.reset()
        torch.set_num_threads(threads)
        more = {"classes": 1, "metrics": 8}.get(sweep, 3) if options.rounds is None else 1  # what is compared closely
        results = harness.measure(
            shape,
            {name: available[name] for name in names},
            more * rounds,
            adaptive=False,
            is_forward_only=sweep == FORWARD,
        )
        torch.set_num_threads(most)
        lines += [{"sweep": sweep, "threads": threads, **line} for line in harness.figures("fresh", shape, results)]
    call = dict.fromkeys(FIELDS)
    call.update(
        sweep="call",
        threads=most,
        regime="fresh",
        rows=2,
        vocab=9,
        dtype="fp32",
        ignored=0.0,
        peer="accumloss",
        missing="",
    )
    call["ms_median"] = smallest_call(100 if options.quick else 2000) / 1e3
    lines.append(call)
    record.write(options.out, NAME, FIELDS, lines, facts)
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
