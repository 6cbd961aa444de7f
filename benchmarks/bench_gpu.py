"""Causal cross-entropy on a GPU: accumloss and its peers against what a copy and a read of the logits take.

    python benchmarks/bench_gpu.py [--first | --resume] [--seconds 300] [--dry-run] [--out FOLDER]

Measured by harness.py: correctness first, interleaved rounds, the L2 flushed, the ceilings in the same rounds. The cases
come in the order of their weight; those that the time does not suffice for are named. Writes gpu.csv, gpu.json and the
one-page gpu.md to --out after every case. --first takes accumloss alone at three vocabularies, --resume keeps what the
folder holds of cases that it does not come to measure again. --dry-run measures every case at 1/64 of its rows on the CPU, into figures that mean nothing,
and is refused the default folder; without a GPU it is the only way that this runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import devices
import harness
import peers
import record
import torch
from shapes import Shape

import accumloss

NAME = "gpu"
FIELDS = ("mode", "grad_output", "fraction_of_read", *harness.COLUMNS)
FORWARD, BOTH = "forward", "forward + backward"
IN_PLACE, OWN, TWO_VISITS = "accumloss forward", "accumloss", "accumloss mean"
OURS = [OWN, TWO_VISITS, IN_PLACE]
ALL = list(peers.GPU_PEERS)
# all but the compiler, which takes seconds for a shape
RIVALS = [peers.STOCK, "F.cross_entropy", "liger mean", "quack"]
FIRST_CLASSES = (32000, 128256, 8192)
CLASSES = (32000, 128256, 50257, 262144, 151936, 4096, 16384, 1000, 2)


class Case(NamedTuple):
    shape: Shape
    peers: list[str]
    mode: str = BOTH
    grad_output: float = 1.0


def cases() -> list[Case]:
    """Those first that the goals speak of."""
    found = [Case(Shape(8192, vocab, "bf16"), ALL) for vocab in CLASSES]
    found += [Case(Shape(8192, vocab, "bf16"), [*RIVALS, OWN], FORWARD) for vocab in CLASSES]
    for share in (0.5, 0.9):
        for vocab in (32000, 128256):
            found.append(Case(Shape(8192, vocab, "bf16", share), [*OURS, "liger mean", "quack"]))
    for dtype in ("fp32", "fp16"):
        for vocab in (32000, 128256):
            found.append(Case(Shape(8192, vocab, dtype), [*RIVALS, *OURS]))
    found += [Case(Shape(8192, vocab, "bf16"), [*OURS, "liger mean", "quack"], BOTH, 0.5) for vocab in (32000, 128256)]
    for rows in (4096, 32768):
        found += [Case(Shape(rows, vocab, "bf16"), [*RIVALS, *OURS]) for vocab in CLASSES]
    return found


def first_cases() -> list[Case]:
    """Whether the kernels move memory as fast as they should, for a GPU that is there for minutes."""
    own = [OWN, IN_PLACE, "F.cross_entropy"]
    sizes = [Shape(8192, vocab, "bf16") for vocab in FIRST_CLASSES]
    return [Case(shape, own) for shape in sizes] + [Case(shape, [OWN], FORWARD) for shape in sizes]


def small(case: Case) -> Case:
    return case._replace(shape=dataclasses.replace(case.shape, rows=max(case.shape.rows // 64, 2)))


def measure(case: Case, device: devices.Device, available: dict[str, peers.Peer | str], rounds: int) -> list[dict]:
    torch.compiler.reset()
    results = harness.measure(
        case.shape,
        {name: available[name] for name in case.peers},
        rounds,
        adaptive=False,
        device=device,
        grad_output=case.grad_output,
        is_forward_only=case.mode == FORWARD,
    )
    by_name = {result.peer: result for result in results}
    lines = []
    for line in harness.figures("", case.shape, results):
        line.update(mode=case.mode, grad_output=case.grad_output, fraction_of_read=None)
        if devices.READ in by_name:
            line["fraction_of_read"] = harness.ratio(by_name[devices.READ], by_name[str(line["peer"])])
        if case.mode == FORWARD and line["ms_median"]:
            line["gb_per_s"] = case.shape.logits_bytes * (1 - case.shape.ignored) / line["ms_median"] / 1e6
        lines.append(line)
    return lines


def case_of(line: dict) -> tuple:
    """What a line is of, beside the peer."""
    return tuple(line[name] for name in ("rows", "vocab", "dtype", "ignored", "mode", "grad_output"))


# ---------------------------------------------------------------------------------------------------------------- goals


def goals(lines: Sequence[dict]) -> list[tuple[str, str, str, bool]]:
    """What is measured, the goal, the measurement, whether it is reached. Only what was measured is there."""

    def of(peer: str, mode: str = BOTH, where: Callable[[dict], bool] = lambda line: True) -> list[dict]:
        return [
            line
            for line in lines
            if (line["peer"], line["mode"], line["dtype"]) == (peer, mode, "bf16")
            and line["grad_output"] == 1
            and not line["missing"]
            and where(line)
        ]

    found: list[tuple[str, str, str, bool]] = []

    def at_least(what: str, goal: float, values: Sequence[float | None]) -> None:
        known = [value for value in values if value is not None]
        if known:
            found.append((what, f">= {goal:g}", f"{min(known):.2f} to {max(known):.2f}", min(known) >= goal))

    def at_most(what: str, goal: float, values: Sequence[float | None]) -> None:
        known = [value for value in values if value is not None]
        if known:
            found.append((what, f"<= {goal:g}", f"{min(known):.3f} to {max(known):.3f}", max(known) <= goal))

    def key(line: dict) -> tuple:
        return line["rows"], line["vocab"]

    long = lambda line: line["vocab"] >= 32000 and line["ignored"] == 0  # noqa: E731
    medium = lambda line: 4000 <= line["vocab"] <= 16384 and line["ignored"] == 0  # noqa: E731
    fraction = lambda found: [line["fraction_of_copy"] for line in found]  # noqa: E731
    at_least("in place, of the copy, V >= 32000", 0.93, fraction(of(IN_PLACE, where=long)))
    at_least("in place, of the copy, V of 4096 to 16384", 0.85, fraction(of(IN_PLACE, where=medium)))
    at_least("own buffer, of the copy, V >= 32000", 0.93, fraction(of(OWN, where=long)))
    # two visits move 6 bytes of an element where the copy moves 4
    at_least(
        "two visits, of a copy of their bytes, V >= 32000",
        0.93,
        [1.5 * f for f in fraction(of(TWO_VISITS, where=long))],
    )
    at_least("forward alone, of the read, V >= 32000", 0.95, [l["fraction_of_read"] for l in of(OWN, FORWARD, long)])
    ours = {key(line): line["ms_median"] for line in of(IN_PLACE, where=long)}
    for peer, goal in ((peers.STOCK, 8), (peers.COMPILE, 1.4), ("liger mean", 1.4), ("liger sum", 1.4), ("quack", 1)):
        times = [line["ms_median"] / ours[key(line)] for line in of(peer, where=long) if key(line) in ours]
        at_least(f"in place over {peer}, V >= 32000", goal, times)
    half = of(IN_PLACE, where=lambda line: line["ignored"] == 0.5)
    at_most(
        "50 % ignored over none ignored, in place",
        0.78,
        [l["ms_median"] / ours[key(l)] for l in half if key(l) in ours],
    )
    at_most(
        "memory above the logits, in place, of their size",
        0.001,
        [l["peak_extra_over_logits"] for l in of(IN_PLACE, where=long)],
    )
    return found  # fmt: skip


def markdown(lines: Sequence[dict], facts: dict) -> str:
    """The page: machine, goals, the cases that the goals speak of, what is missing."""
    text = [
        "# accumloss on a GPU" if facts["device"] != "cpu" else "# Dry run on the CPU: no figure here means anything",
        "",
        f"{facts['device']}, driver {facts.get('driver')}, CUDA {facts.get('cuda')}, torch {facts['torch']}, "
        f"accumloss {facts['accumloss']} at {str(facts['commit'])[:9]}, `{facts['command']}`",
        "",
    ]
    text += record.goals_table(goals(lines), "bf16")
    text += ["", f"{facts['rows']} rows, bf16, forward + backward, none ignored: ms (fraction of the copy)", ""]
    shown = [
        line
        for line in lines
        if (line["mode"], line["dtype"], line["ignored"], line["grad_output"]) == (BOTH, "bf16", 0, 1)
        and line["rows"] == facts["rows"]
    ]
    vocabs = sorted({int(line["vocab"]) for line in shown})
    text += ["| V | " + " | ".join(map(str, vocabs)) + " |", "|---|" + "---:|" * len(vocabs)]
    for peer in dict.fromkeys(line["peer"] for line in shown):
        cells = []
        for vocab in vocabs:
            line = next((l for l in shown if (l["peer"], l["vocab"]) == (peer, vocab)), None)
            if line is None or line["missing"]:
                cells.append("–")
            else:
                cells.append(f"{line['ms_median']:.3f} ({line['fraction_of_copy']:.2f})")
        text.append(f"| {peer} | " + " | ".join(cells) + " |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line["missing"]:
            shape = f"{line['rows']}x{line['vocab']} {line['dtype']}"
            reasons.setdefault((line["peer"], str(line["missing"])[:200]), []).append(shape)
    text += ["", "Missing:", ""]
    text += [f"- {peer}: {why} ({len(where)} cases, first {where[0]})" for (peer, why), where in reasons.items()]
    text += [f"- not measured, the time was used up: {case}" for case in facts["not_measured"]]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="bench_gpu.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="no new case after this time; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", action="store_true", help="accumloss at 8192, 32000 and 128256 classes")
    which.add_argument("--resume", action="store_true", help="keep what --out holds of other cases")
    parser.add_argument("--dry-run", action="store_true", help="every case at 1/64 of its rows on the CPU")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.dry_run and options.out.resolve() == record.RESULTS:
        parser.error("--dry-run: expected --out FOLDER, since its figures mean nothing")
    if not options.dry_run:
        if not torch.cuda.is_available():
            parser.error("no GPU is here; --dry-run --out FOLDER checks everything else")
        if accumloss.build_info().get("cuda") is None:
            parser.error(
                "accumloss was built without CUDA; install it where nvcc is found: pip install --no-build-isolation ."
            )
    device: devices.Device = devices.Cpu() if options.dry_run else devices.Cuda()
    wanted = [small(case) if options.dry_run else case for case in (first_cases() if options.first else cases())]
    facts: dict = {**record.environment(), **device.facts(), **record.origin("bench_gpu.py", arguments)}
    facts["rows"] = wanted[0].shape.rows
    available = peers.available(sorted({name for case in wanted for name in case.peers}), peers.GPU_PEERS)
    lines: list[dict] = record.read_csv(options.out / f"{NAME}.csv") if options.resume else []
    page = ""

    def write(left: Sequence[str]) -> None:
        nonlocal page
        facts["not_measured"] = list(left)
        record.write(options.out, NAME, FIELDS, lines, facts)
        page = markdown(lines, facts)
        record.write_whole(options.out / f"{NAME}.md", page + "\n")

    left = [f"{case.shape}, {case.mode}, grad_output {case.grad_output:g}" for case in wanted]
    out_of_memory: list[str] = []
    start = time.monotonic()
    for case in wanted:
        if time.monotonic() - start > options.seconds:
            break
        described = left.pop(0)
        print(f"{time.monotonic() - start:5.0f} s  {described}", file=sys.stderr, flush=True)
        try:
            measured = measure(case, device, available, options.rounds)
            lines = [line for line in lines if case_of(line) != case_of(measured[0])] + measured
        except torch.OutOfMemoryError:  # the logits themselves; a peer's own is a line of the table
            out_of_memory.append(f"{described}: out of memory")
        write([*out_of_memory, *left])
        if not options.dry_run:
            torch.cuda.empty_cache()
    write([*out_of_memory, *left])
    print(page)
    wrong = [line for line in lines if str(line["missing"]).startswith("wrong result") and "accumloss" in line["peer"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
