"""One step of Trainers of TRL and sentence-transformers over 8 rows, with LoRA, in bf16, with gradient checkpointing, compiled.

    mixed_trainers.py OUT

Each as the one batch in stock, and as four micro-batches with accumloss and without it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import accumloss
from accumloss.auditing import trainer_cases

WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


# the compiler takes a minute for each
RUNS = (
    *(("SFTTrainer nll", way) for way in WAYS),
    *(("DPOTrainer MPO (sigmoid + bco_pair + sft)", way) for way in ("LoRA", "bf16", "gradient checkpointing")),
    *(("RewardTrainer sigmoid", way) for way in ("LoRA", "bf16", "gradient checkpointing")),
    ("SentenceTransformerTrainer CosineSimilarityLoss", "bf16"),
)


class Recorder(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = logs["loss"]


@contextlib.contextmanager
def told(way: str) -> Iterator[None]:
    """What every Trainer is told, and this besides."""
    arguments = trainer_cases.arguments
    more = lambda split, **given: arguments(split, **{**given, **WAYS[way]})  # noqa: E731
    with mock.patch.object(trainer_cases, "arguments", more):
        yield


def built(name: str, way: str, split: trainer_cases.Split) -> Any:
    build = trainer_cases.find(name).build
    if way == "LoRA":  # the reference is the model without its adapters
        build = functools.partial(build, keywords=lambda: {"peft_config": adapters(name)})
    return build(split)


def adapters(name: str) -> Any:
    config = trainer_cases.lora()
    config.task_type = "SEQ_CLS" if name.startswith("Reward") else config.task_type
    return config


def step(name: str, way: str, batch_size: int, micro_batches: int, is_registered: bool) -> dict[str, Any]:
    recorder = Recorder()
    torch._dynamo.reset()
    registered = accumloss.registered() if is_registered else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), registered, told(way):
        warnings.simplefilter("error", accumloss.InexactWarning)
        trainer = built(name, way, trainer_cases.Split(batch_size, micro_batches, folder))
        trainer.add_callback(recorder)
        trainer.train()
    return {"gradients": recorder.gradients, "loss": recorder.loss}


def main(out: str) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found = {}
    for name, way in RUNS:
        started = time.monotonic()
        try:
            found[name, way] = [step(name, way, *split) for split in ((8, 1, False), (2, 4, True), (2, 4, False))]
        except Exception:
            found[name, way] = traceback.format_exc()
        print(f"{name}, {way}: {time.monotonic() - started:.1f} s", flush=True)
    torch.save(found, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
