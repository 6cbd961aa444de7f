"""Run by torchrun: one step of Trainers of TRL and sentence-transformers over 8 rows on all ranks, and what rank 0 found."""

from __future__ import annotations

import faulthandler
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from torchrun import leave

import accumloss
from accumloss.auditing import trainer_cases

NAMES = (
    "SFTTrainer nll",
    "DPOTrainer MPO (sigmoid + bco_pair + sft)",
    "RewardTrainer sigmoid",
    "SentenceTransformerTrainer CosineSimilarityLoss",
)


class Recorder(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parameters = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
        self.gradients = {n: g.detach().clone() for n, g in parameters.items()}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = logs["loss"]


def step(name: str, batch_size: int, micro_batches: int, is_registered: bool) -> dict:
    recorder = Recorder()
    accumloss.unregister_from_transformers()
    if is_registered:
        accumloss.register_with_transformers()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        trainer = trainer_cases.find(name).build(trainer_cases.Split(batch_size, micro_batches, folder))
        trainer.add_callback(recorder)
        trainer.train()
        torch.distributed.barrier()
    return {"gradients": recorder.gradients, "loss": recorder.loss}


def main(out: str, batch_size: str, micro_batches: str) -> None:
    faulthandler.dump_traceback_later(250, exit=True)  # a collective that one rank waits for alone
    logging.disable(logging.WARNING)
    for seed in (0, 1):
        trainer_cases.causal_lm(seed)  # the tiny models are saved by each rank for itself, before it is one
    trainer_cases.dense_encoder()
    torch.distributed.init_process_group("gloo")
    split = int(batch_size), int(micro_batches)
    found = {name: [step(name, *split, is_registered) for is_registered in (True, False)] for name in NAMES}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(out))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
