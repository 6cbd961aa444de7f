"""The masked language model: a small BERT in transformers' Trainer, as it is and with accumloss registered.

BertForMaskedLM computes the mean of each micro-batch itself. Its forward takes ``**kwargs``, which Trainer reads as: this loss
has been divided by the items of the whole step already. So it does not divide by the k micro-batches, and both the gradient
and the logged loss are k means added up. Plain SGD without clipping shows it: Adam would divide the factor out of the update,
and clipping would hide it in another way.

    transformers    Trainer(...).train()
    accumloss       with accumloss.registered(): Trainer(...).train()
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..transformers import registered, unregistered
from . import text
from .measure import peak_bytes, synchronize
from .runs import (
    ACCUMLOSS,
    DEPTHS,
    MASKED_LM,
    WAYS,
    WINDOW,
    Run,
    Settings,
    flat_weights,
    full_batch_of,
    gradient_norm,
    weight_deviation,
)

LEARNING_RATE = 0.1  # SGD: 16 times as much diverges


class InOrder(Trainer):
    """Trainer without the shuffling: the same sequences in every step, however they are split."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return None  # to a DataLoader: in order


class Recorder(TrainerCallback):
    """Keeps what a run does, step by step, next to what the full batch did."""

    def __init__(self, run: Run, full: Run, truth: list[torch.Tensor], device: str, show: Callable[[str], None]):
        self.run, self.full, self.device, self.show = run, full, device, show
        self.truth = truth  # weights (P,) of the full batch before the first step and after each
        self.begin = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.truth:
            self.truth.append(flat_weights(self.run.model).float())
        synchronize(self.device)
        self.begin = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.run.losses:
            self.run.gradient_norm = gradient_norm(self.run.model)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.run.seconds.append(time.perf_counter() - self.begin)
        weights = flat_weights(self.run.model)
        if self.run is self.full:
            self.truth.append(weights.float())
        truth = self.truth[len(self.run.seconds)]
        self.run.weight_deviations.append(weight_deviation(weights, truth, self.truth[0]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.run.losses.append(logs["loss"])
            self.run.loss_deviations.append(abs(logs["loss"] - self.full.losses[len(self.run.losses) - 1]))
            self.show(f"BERT, {self.run.way}, {self.run.depth} micro-batches: loss {logs['loss']:.2f}")


def make_model(seed: int, device: str) -> Any:
    config = BertConfig(
        vocab_size=text.VOCAB + 1,  # and the mask
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=text.MAX_TOKENS,
        pad_token_id=text.PAD,
        hidden_dropout_prob=0.0,  # so that a step is the same however it is split
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config).train().to(torch.device(device))


def make_trainer(run: Run, examples: Sequence[dict[str, list[int]]], settings: Settings) -> Trainer:
    """A Trainer that takes the examples in order, WINDOW of them in every optimizer step."""
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        max_steps=len(examples) // WINDOW,
        per_device_train_batch_size=WINDOW // run.depth,
        gradient_accumulation_steps=run.depth,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # what has diverged is shown
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=settings.device == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would split each micro-batch once more
    trainer = InOrder(model=run.model, args=arguments, train_dataset=examples, data_collator=text.collate)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(windows: Sequence[list[list[int]]], settings: Settings, show: Callable[[int, str], None]) -> list[Run]:
    """Trains every way at every depth, the full batch first; calls show(optimizer steps done, text)."""
    generator = random.Random(settings.seed)
    examples = [[text.masked(sequence, generator) for sequence in window] for window in windows]
    largest = max(examples, key=lambda window: max(len(example["input_ids"]) for example in window))
    flat = [example for window in examples for example in window]
    runs = [Run(way, depth, make_model(settings.seed, settings.device)) for way in WAYS[MASKED_LM] for depth in DEPTHS]
    runs.sort(key=lambda run: not run.is_full_batch)
    full = full_batch_of(runs)
    truth: list[torch.Tensor] = []

    def show_step(message: str) -> None:
        show(sum(len(run.losses) for run in runs), message)

    for run in runs:
        with registered() if run.way == ACCUMLOSS else unregistered():
            trainer = make_trainer(run, flat, settings)
            trainer.add_callback(Recorder(run, full, truth, settings.device, show_step))
            trainer.train()
            run.peak_bytes = peak_bytes(make_trainer(run, largest, settings).train, settings.device)
    return runs
