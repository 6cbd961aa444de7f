"""Run by torchrun: evaluates heads on two ranks, and trains one with metrics; writes what rank 0 found."""

from __future__ import annotations

import copy
import faulthandler
import json
import sys
from pathlib import Path

import transformers
from test_evaluation import learnable, model_in_eval
from torchrun import leave
from training import make_trainer

import accumloss


def trainer_of(model, examples, size, accumulation=1, **options):
    return make_trainer(
        copy.deepcopy(model), examples, accumulation, batch_size=1, per_device_eval_batch_size=size,
        ddp_backend="gloo", ddp_find_unused_parameters=True, **options,
    )[0]  # fmt: skip


def main(out: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a collective that one rank waits for alone
    transformers.logging.set_verbosity_error()
    results = {}
    for head in ("causal", "masked and sentence order", "multi label", "regression"):
        model, examples = model_in_eval(head)
        for count in (8, 7, 5, 1):
            for size in (1, 2, 3):
                with accumloss.registered():
                    evaluated = trainer_of(model, examples, size).evaluate(examples[:count])
                results[f"{head} {count} {size}"] = evaluated["eval_loss"]
    model, examples = model_in_eval("causal")
    results["stock causal 7 2"] = trainer_of(model, examples, 2).evaluate(examples[:7])["eval_loss"]

    model, examples = learnable()
    with accumloss.registered(metrics=True):
        trainer = trainer_of(model, examples, 3, accumulation=4, learning_rate=0.0, steps=1)
        trainer.train()
        results["trained"] = trainer.state.log_history[0]
        results["evaluated"] = trainer.evaluate(examples[:8])
    if trainer.is_world_process_zero():
        Path(out, "result.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
