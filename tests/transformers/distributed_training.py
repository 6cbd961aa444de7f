"""Run by torchrun: trains heads on two ranks with uneven rows, and writes what rank 0 found. One launch for all of them."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from own_losses import ON_RANKS, SumTimesATenth
from some_ranks import (
    ON_SOME_RANKS,
    FilledOnSomeRanks,
    OnSomeRanks,
    OnSomeRanksLater,
    OverTheNumber,
    OverTheNumberMeasured,
    PartlyOverTheNumber,
    PartlyOverTheNumberTimesTheRanks,
    rows_filled_on_second_rank,
    rows_of_second_rank,
)
from torchrun import leave
from training import HEADS, Recorder, build, make_trainer, rows

import accumloss
from accumloss.transformers import probe


class SumOverItsItems(transformers.Trainer):
    """Divides a sum by the items of the micro-batch, by hand."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**inputs).logits, inputs["labels"]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum()


class ByHand(transformers.Trainer):
    """A mean over the items by nothing that is known, which is measured."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        logits, labels = model(**{**inputs, "labels": None}).logits, inputs["labels"]
        taken = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return -(taken * (labels != -100)).sum() / (labels != -100).sum()


class AnotherOnOneRank(ByHand):
    """Measured to be something else on the second rank: what the first finds holds there too, and it is told."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        is_measured = probe.is_running and torch.distributed.get_rank() == 1
        return loss * len(inputs["labels"]) if is_measured else loss


class PartOfNothing(transformers.Trainer):
    """A mean over the items by nothing that is known, of one micro-batch on each rank."""

    accumulation = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return outputs.loss + 0.1 * outputs.logits[inputs["labels"] != -100].square().mean()


class PenaltyOnWeights(transformers.Trainer):
    """The same on all ranks."""

    accumulation = 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        penalty = sum(weight.square().mean() for weight in self.accelerator.unwrap_model(model).parameters())
        return model(**inputs).loss + 0.1 * penalty


class Last(Recorder):
    """Keeps the gradients that the last optimizer step finds."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {}
        super().on_pre_optimizer_step(args, state, control, model=model, **kwargs)


# name: head, whether accumloss is registered, whether the count is that of all ranks
RUNS = {
    "causal": ("causal", True, True),
    "token classes": ("token classes", True, True),
    "masked, own loss": ("masked, own loss", True, True),
    "causal, each for itself": ("causal", True, False),
    "causal, each for itself, stock": ("causal", False, False),
    "divided by hand": ("token classes", True, True, SumOverItsItems),
    "measured": ("token classes", True, True, ByHand),
    "measured to be another": ("token classes", True, True, AnotherOnOneRank),
    **{name: ("token classes", True, True, cls) for name, cls in ON_SOME_RANKS.items()},
    **{name: ("token classes", True, True, cls) for name, cls in ON_RANKS.items()},
    "a sum times a tenth": ("token classes", True, True, SumTimesATenth),
    "a part of nothing": ("token classes", True, True, PartOfNothing),
    "a penalty on the weights": ("token classes", True, True, PenaltyOnWeights),
    "filled": ("token classes", True, True, FilledOnSomeRanks),
    "over the number": ("token classes", True, True, OverTheNumber),
    "over the number, measured": ("token classes", True, True, OverTheNumberMeasured),
    "partly over the number": ("token classes", True, True, PartlyOverTheNumber),
    "partly over the number, times the ranks": ("token classes", True, True, PartlyOverTheNumberTimesTheRanks),
    "later": ("token classes", True, True, OnSomeRanksLater, 5),
}


def rows_of(cls: type, targets: str) -> list[dict[str, torch.Tensor]]:
    if issubclass(cls, OnSomeRanks):
        return rows_of_second_rank()
    return rows_filled_on_second_rank() if issubclass(cls, FilledOnSomeRanks) else rows(targets)


def train(head: str, is_registered: bool, average: bool, cls: type = transformers.Trainer, steps: int = 1) -> dict:
    name, config, targets = HEADS[head]
    registered = (
        accumloss.registered(verify=issubclass(cls, (ByHand, OverTheNumberMeasured)))
        if is_registered
        else contextlib.nullcontext()
    )
    with registered, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", accumloss.InexactWarning)
        accumulation = getattr(cls, "accumulation", 2)
        # dealt so that each rank takes two rows of every four: the ranks hold very different numbers of labels
        trainer, recorder = make_trainer(
            build(name, **config),
            rows_of(cls, targets),
            accumulation,
            steps=steps,
            trainer_class=cls,
            batch_size=4 // accumulation,
            ddp_backend="gloo",
            average_tokens_across_devices=average,
            ddp_find_unused_parameters=False,
        )
        if steps > 1:
            trainer.args.learning_rate = 0.0  # the same step over and over
            recorder = Last()
            trainer.add_callback(recorder)
        trainer.train()
    gradients = {n.removeprefix("module."): g for n, g in recorder.gradients.items()}
    told = [str(w.message) for w in caught if issubclass(w.category, accumloss.InexactWarning)]
    all_told: list = [None, None]
    torch.distributed.all_gather_object(all_told, told)
    return {"gradients": gradients, "loss": recorder.losses[-1], "told": all_told}


def main(out: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a collective that one rank waits for alone
    transformers.logging.set_verbosity_error()
    found = {name: train(*run) for name, run in RUNS.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(out))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
