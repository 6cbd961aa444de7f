"""Prints the eval_loss of Trainer at several batch sizes, on one process and on two: stock and accumloss.

    python benchmarks/evaluation.py

Tiny random models, 7 very uneven rows, so that two processes fill their last batches up; fp32, CPU. results/evaluation.csv
keeps it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import record
import torch
import transformers

import accumloss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from training import HEADS, build, make_trainer, rows

HERE = Path(__file__).resolve()
EVALUATED = ("causal", "masked, own loss", "masked and sentence order", "question answering, own loss")
BATCH_SIZES = (8, 2, 1)
FIELDS = ("class", "head", "way", "processes", "batch_size", "eval_loss", "transformers", "torch")


def evaluations(processes: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for head in EVALUATED:
        name, config, targets = HEADS[head]
        model, examples = build(name, **config).eval(), rows(targets)[:7]
        for way in ("stock", "accumloss"):
            for size in BATCH_SIZES:
                with accumloss.registered() if way == "accumloss" else contextlib.nullcontext():
                    trainer, _ = make_trainer(
                        copy.deepcopy(model), examples, 1, batch_size=1, per_device_eval_batch_size=size,
                        ddp_backend="gloo" if processes > 1 else None,
                    )  # fmt: skip
                    loss = trainer.evaluate(examples)["eval_loss"]
                line = (name, head, way, processes, size, loss, transformers.__version__, torch.__version__)
                found.append(dict(zip(FIELDS, line, strict=True)))
    return found


def on_two_processes() -> list[dict[str, object]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "two.csv")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(HERE), "--rank-of-two", str(file)], check=True, env=environment)
        with file.open() as stream:
            return list(csv.DictReader(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "evaluation.csv")
    parser.add_argument("--rank-of-two", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.rank_of_two is not None:
        lines = evaluations(2)
        if torch.distributed.get_rank() == 0:
            record.write_csv(options.rank_of_two, FIELDS, lines)
        torch.distributed.barrier()
        os._exit(0)  # gloo's destructors sometimes wait for each other
    lines = evaluations(1) + on_two_processes()
    columns = [(processes, size) for processes in (1, 2) for size in BATCH_SIZES]
    print("| head | | " + " | ".join(f"{processes} × {size}" for processes, size in columns) + " |")
    print("|---|---|" + "---:|" * len(columns))
    for head in EVALUATED:
        for way in ("stock", "accumloss"):
            of = {
                (int(l["processes"]), int(l["batch_size"])): l for l in lines if l["head"] == head and l["way"] == way
            }
            cells = " | ".join(f"{float(of[column]['eval_loss']):.6f}" for column in columns)
            print(f"| {HEADS[head][0]} | {way} | {cells} |")
    record.write_csv(options.out, FIELDS, lines)


if __name__ == "__main__":
    main()
