"""Causal cross-entropy, forward and backward, on the CPU: accumloss and its peers.

    python benchmarks/bench_cross_entropy.py [--shapes 2048x32000:bf16 ...] [--rounds 7] [--threads 2] [--quick]

Each of the two heap regimes runs in a process of its own:
    fresh    malloc as it comes: large buffers are mapped anew by every call, which page-faults all of them
    warmed   malloc keeps what is freed: buffers are reused, as in a loop whose allocator has been told to
Writes cross_entropy_cpu.csv and cross_entropy_cpu.json (the environment) to --out and prints a summary in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import record

HERE = Path(__file__).resolve().parent
KEEP = str(1 << 36)  # bytes; more than any buffer here
REGIMES = {
    "fresh": {},
    # the thresholds alone are capped at 32 MB by older versions of glibc
    "warmed": {"MALLOC_MMAP_THRESHOLD_": KEEP, "MALLOC_TRIM_THRESHOLD_": KEEP, "MALLOC_MMAP_MAX_": "0"},
}
NAME = "cross_entropy_cpu"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    import peers
    import shapes

    parser = argparse.ArgumentParser(prog="bench_cross_entropy.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", metavar="ROWSxVOCAB[:DTYPE]", help=f"default: {' '.join(shapes.DEFAULT)}"
    )
    parser.add_argument(
        "--ignored", nargs="+", type=float, default=[0.0], metavar="SHARE", help="of the rows: 0 0.5 0.9"
    )
    parser.add_argument("--peers", nargs="+", choices=peers.PEERS, default=list(peers.PEERS), metavar="PEER")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--rounds", type=int, help="default: 7, more where a round is short")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--quick", action="store_true", help=f"3 rounds; by default of {' '.join(shapes.QUICK)}")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--child", nargs=2, metavar=("REGIME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.shapes or (shapes.QUICK if options.quick else shapes.DEFAULT)
    try:
        options.parsed = [shapes.Shape.parse(name, ignored) for name in names for ignored in options.ignored]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    if not all(0 <= ignored < 1 for ignored in options.ignored):
        parser.error(f"--ignored: expected shares in [0, 1), got {options.ignored}")
    return options


# --------------------------------------------------------------------------------------------- one regime, in its process


def run_regime(regime: str, file: Path, options: argparse.Namespace) -> None:
    import harness
    import peers
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    competitors = peers.available(options.peers, peers.PEERS)
    lines = []
    rounds = options.rounds or (3 if options.quick else 7)
    for shape in options.parsed:
        print(f"{regime}: {shape}", file=sys.stderr, flush=True)
        torch.compiler.reset()  # each shape and dtype is compiled for itself, and for none before it
        adaptive = not options.quick and options.rounds is None
        lines += harness.figures(regime, shape, harness.measure(shape, competitors, rounds, adaptive=adaptive))
    file.write_text(json.dumps({"lines": lines, "environment": record.environment()}))


# ------------------------------------------------------------------------------------------------------------ all regimes


def run_all(arguments: Sequence[str], options: argparse.Namespace) -> tuple[list[dict], dict]:
    lines: list[dict] = []
    facts: dict = {}
    origin = record.origin("bench_cross_entropy.py", arguments)
    load = os.getloadavg()[0]
    for regime in options.regimes:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "lines.json"
            command = [sys.executable, str(HERE / Path(__file__).name), *arguments, "--child", regime, str(file)]
            subprocess.run(command, env={**inherited, **REGIMES[regime]}, check=True)
            part = json.loads(file.read_text())
        lines += part["lines"]
        facts = part["environment"]
    facts.update(origin, load_before=load, regimes={name: REGIMES[name] for name in options.regimes})
    return lines, facts


def write(lines: list[dict], facts: dict, folder: Path) -> tuple[Path, Path]:
    from harness import COLUMNS

    return record.write(folder, NAME, COLUMNS, lines, facts)


# regime apart: peer, dtype, column, goal; from 32,000 classes on
GOALS = (
    ("accumloss forward", "bf16", "ratio_to_stock", 18),
    ("accumloss forward", "bf16", "ratio_to_compile", 5),
    ("accumloss forward", "bf16", "fraction_of_copy", 0.6),
    ("accumloss forward", "fp32", "ratio_to_stock", 10),
    ("accumloss forward", "fp32", "ratio_to_compile", 6),
    ("accumloss forward", "fp32", "fraction_of_copy", 0.85),
    ("accumloss", "bf16", "ratio_to_stock", 10),
    ("accumloss", "bf16", "ratio_to_compile", 3.5),
    ("accumloss", "fp32", "ratio_to_stock", 5),
    ("accumloss", "fp32", "ratio_to_compile", 3),
)
GOAL_NAMES = {
    "ratio_to_stock": "over stock",
    "ratio_to_compile": "over torch.compile",
    "fraction_of_copy": "of the copy",
}


def goals(lines: list[dict]) -> str:
    """What was aimed at beside what was measured, in each regime."""
    regimes = list(dict.fromkeys(line["regime"] for line in lines))
    text = ["| V >= 32000, none ignored | goal | " + " | ".join(f"heap {name}" for name in regimes) + " |"]
    text.append("|---|---|" + "---|" * len(regimes))
    for peer, dtype, column, goal in GOALS:
        cells = []
        for regime in regimes:
            found = [
                line[column]
                for line in lines
                if (line["regime"], line["peer"], line["dtype"], line["ignored"]) == (regime, peer, dtype, 0)
                and line["vocab"] >= 32000
                and line[column] is not None
            ]
            verdict = "" if not found else ", reached" if min(found) >= goal else ", missed"
            cells.append(f"{min(found):.2f} to {max(found):.2f}{verdict}" if found else "not measured")
        text.append(f"| {peer}, {dtype}, {GOAL_NAMES[column]} | >= {goal:g} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def markdown(lines: list[dict], facts: dict) -> str:
    """One table for each regime."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    text = [
        f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"accumloss {facts['accumloss']} ({facts['build'].get('cpu_capability')}), `{facts['command']}`",
    ]
    for regime in dict.fromkeys(line["regime"] for line in lines):
        text += [
            "",
            f"Heap {regime}; forward + backward; × are medians of the ratios within a round",
            "",
            "| logits | peer | ms (quartiles) | × stock | × compile | GB/s | of copy | extra memory / logits | error loss | error gradient |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        shape = None
        for line in (line for line in lines if line["regime"] == regime):
            name = f"{line['rows']} × {line['vocab']} {line['dtype']}"
            if line["ignored"]:
                name += f", {line['ignored']:.0%} ignored"
            shown, shape = ("" if name == shape else name), name
            if line["missing"]:
                text.append(f"| {shown} | {line['peer']} | missing: {line['missing']} ||||||||")
                continue
            digits = ".1f" if line["ms_median"] >= 10 else ".3f"
            text.append(
                f"| {shown} | {line['peer']} | {line['ms_median']:{digits}} ({line['ms_q1']:{digits}}-{line['ms_q3']:{digits}}) "
                f"| {number(line['ratio_to_stock'], '.2f')} | {number(line['ratio_to_compile'], '.2f')} "
                f"| {number(line['gb_per_s'], '.2f')} | {number(line['fraction_of_copy'], '.2f')} "
                f"| {number(line['peak_extra_over_logits'], '.2f')} | {number(line['loss_error'], '.0e')} | {number(line['grad_error'], '.0e')} |"
            )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.child:
        run_regime(options.child[0], Path(options.child[1]), options)
        return 0
    try:
        lines, facts = run_all(arguments, options)
    except subprocess.CalledProcessError as error:
        print(
            f"bench_cross_entropy: a measurement failed (exit status {error.returncode}); its message is above",
            file=sys.stderr,
        )
        return 1
    table, notes = write(lines, facts, options.out)
    print(markdown(lines, facts))
    print(f"\n{goals(lines)}")
    print(f"\nwritten: {table}, {notes}", file=sys.stderr)
    wrong = [line for line in lines if str(line["missing"]).startswith("wrong result")]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
