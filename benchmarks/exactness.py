"""Prints, head by head, a Trainer step over 4 micro-batches of 2 against the one batch of 8: stock and accumloss.

    python benchmarks/exactness.py [--accumulation 4]

Tiny random models, very uneven rows, fp32, CPU. README has some of its rows; results/exactness.csv keeps all.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import record
import torch
import transformers

import accumloss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from training import HEADS, error, loss_error, model_and_rows, ratio, train

FIELDS = (
    "class",
    "head",
    "way",
    "accumulation",
    "gradient_ratio",
    "gradient_error",
    "loss_error",
    "transformers",
    "torch",
)


def measure(head: str, accumulation: int, is_ours: bool) -> dict[str, object]:
    model, examples = model_and_rows(head)
    with accumloss.registered() if is_ours else contextlib.nullcontext():
        full, step = train(model, examples, 1), train(model, examples, accumulation)
    return {
        "class": HEADS[head][0],
        "head": head,
        "way": "accumloss" if is_ours else "stock",
        "accumulation": accumulation,
        "gradient_ratio": ratio(step, full),
        "gradient_error": error(step, full),
        "loss_error": loss_error(step, full),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "exactness.csv")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    lines = []
    print("| head | stock: ratio | gradient error | loss error | accumloss: ratio | gradient error | loss error |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for head in HEADS:
        pair = [measure(head, options.accumulation, is_ours) for is_ours in (False, True)]
        cells = (
            f"{line['gradient_ratio']:.4f} | {line['gradient_error']:.0e} | {line['loss_error']:.0e}" for line in pair
        )
        print(f"| {pair[0]['class']} ({head}) | {' | '.join(cells)} |", flush=True)
        lines += pair
    record.write_csv(options.out, FIELDS, lines)


if __name__ == "__main__":
    main()
