"""Run by torchrun: trains a head on two ranks with uneven rows, and writes what rank 0 found."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path

import torch
import transformers
from training import HEADS, build, make_trainer, norm, rows

import accumloss


def main(head: str, register: str, out: str, average: str) -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # a collective that one rank waits for alone
    transformers.logging.set_verbosity_error()
    if register == "register":
        accumloss.register_with_transformers()
    name, config, targets, _ = HEADS[head]
    # dealt so that each rank takes two rows of every four: the ranks hold very different numbers of labels
    trainer, recorder = make_trainer(
        build(name, **config),
        rows(targets),
        accumulation=2,
        batch_size=2,
        ddp_backend="gloo",
        average_tokens_across_devices=average == "average",
        ddp_find_unused_parameters=False,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        gradients = {n.removeprefix("module."): g for n, g in recorder.gradients.items()}
        torch.save(gradients, Path(out) / "gradients.pt")
        Path(out, "result.json").write_text(json.dumps({"loss": recorder.losses[-1], "norm": norm(gradients)}))
    torch.distributed.barrier()
    os._exit(0)  # without the destructors of gloo and of DDP, whose threads sometimes wait for each other for ever


if __name__ == "__main__":
    main(*sys.argv[1:])
