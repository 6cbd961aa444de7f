"""Run by torchrun: trains heads on two ranks with uneven rows, and writes what rank 0 found. One launch for all of them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
from pathlib import Path

import torch
import transformers
from training import HEADS, build, make_trainer, rows

import accumloss

# name: head, whether accumloss is registered, whether the count is that of all ranks
RUNS = {
    "causal": ("causal", True, True),
    "token classes": ("token classes", True, True),
    "masked, own loss": ("masked, own loss", True, True),
    "causal, each for itself": ("causal", True, False),
    "causal, each for itself, stock": ("causal", False, False),
}


def train(head: str, is_registered: bool, average: bool) -> dict:
    name, config, targets = HEADS[head]
    with accumloss.registered() if is_registered else contextlib.nullcontext():
        # dealt so that each rank takes two rows of every four: the ranks hold very different numbers of labels
        trainer, recorder = make_trainer(
            build(name, **config),
            rows(targets),
            accumulation=2,
            batch_size=2,
            ddp_backend="gloo",
            average_tokens_across_devices=average,
            ddp_find_unused_parameters=False,
        )
        trainer.train()
    gradients = {n.removeprefix("module."): g for n, g in recorder.gradients.items()}
    return {"gradients": gradients, "loss": recorder.losses[-1]}


def main(out: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a collective that one rank waits for alone
    transformers.logging.set_verbosity_error()
    found = {name: train(*run) for name, run in RUNS.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(out))
    torch.distributed.barrier()
    os._exit(0)  # without the destructors of gloo and of DDP, whose threads sometimes wait for each other for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
