"""The causal language model: a small Llama in a loop of one's own, three ways.

Every optimizer step is taken by all runs in turn, on the same sequences. What differs is only how the window of sequences is
cut into micro-batches (the accumulation depth) and how the losses of the micro-batches become the loss of the step (the way):

    mean of means   (model(micro_batch).loss / depth).backward()                   each micro-batch weighs the same
    transformers    model(micro_batch, num_items_in_batch=n).loss.backward()       each token weighs the same
    accumloss       the same call, after model.loss_function = accumloss.causal_lm_loss
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..losses import causal_lm_loss
from . import text
from .measure import peak_bytes, synchronize
from .runs import (
    ACCUMLOSS,
    CAUSAL_LM,
    DEPTHS,
    MEAN_OF_MEANS,
    WAYS,
    Run,
    Settings,
    flat_weights,
    full_batch_of,
    gradient_norm,
    largest,
    weight_deviation,
)

LEARNING_RATE = 2e-3  # AdamW


def make_model(seed: int, device: str) -> Any:
    config = LlamaConfig(
        vocab_size=text.VOCAB,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=text.MAX_TOKENS,
        pad_token_id=text.PAD,
        bos_token_id=text.START,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train().to(torch.device(device))


def make_run(way: str, depth: int, settings: Settings) -> Run:
    model = make_model(settings.seed, settings.device)
    if way == ACCUMLOSS:
        model.loss_function = causal_lm_loss
    return Run(way, depth, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0))


def collate(sequences: Sequence[list[int]], device: str) -> dict[str, torch.Tensor]:
    batch = text.collate([{"input_ids": sequence, "labels": sequence} for sequence in sequences])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def backward(run: Run, window: Sequence[list[int]], device: str) -> torch.Tensor:
    """Gradients of one optimizer step, accumulated over run.depth micro-batches; returns the loss that the way reports."""
    size = len(window) // run.depth
    micro_batches = [collate(window[i : i + size], device) for i in range(0, len(window), size)]
    num_items_in_batch = sum((batch["labels"][:, 1:] != text.IGNORE).sum() for batch in micro_batches)
    total = torch.zeros((), device=device)
    for batch in micro_batches:
        if run.way == MEAN_OF_MEANS:
            loss = run.model(**batch).loss / run.depth
        else:
            loss = run.model(**batch, num_items_in_batch=num_items_in_batch).loss
        loss.backward()
        total += loss.detach()
    return total


def train_step(run: Run, window: Sequence[list[int]], device: str) -> None:
    assert run.optimizer is not None
    synchronize(device)
    start = time.perf_counter()
    loss = backward(run, window, device)
    run.optimizer.step()
    synchronize(device)
    run.seconds.append(time.perf_counter() - start)
    if not run.losses:
        run.gradient_norm = gradient_norm(run.model)
    run.optimizer.zero_grad()
    run.losses.append(loss.item())


def compare(runs: Sequence[Run], start: torch.Tensor) -> None:
    """Appends the deviations of the step that every run has just taken."""
    full = full_batch_of(runs)
    truth = flat_weights(full.model)
    for run in runs:
        run.loss_deviations.append(abs(run.losses[-1] - full.losses[-1]))
        run.weight_deviations.append(weight_deviation(flat_weights(run.model), truth, start))


def measure_memory(runs: Sequence[Run], window: Sequence[list[int]], device: str) -> None:
    for run in runs:
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # exist in every step but the first
        run.peak_bytes = peak_bytes(partial(backward, run, window, device), device)
        run.model.zero_grad()


def train(windows: Sequence[list[list[int]]], settings: Settings, show: Callable[[int, str], None]) -> list[Run]:
    """Trains every way at every depth, step by step in turn; calls show(optimizer steps done, text)."""
    ways, device = WAYS[CAUSAL_LM], settings.device
    runs = [make_run(way, depth, settings) for way in ways for depth in DEPTHS]
    start = flat_weights(runs[0].model)
    for run in runs:  # what happens once (allocator, kernels, thread pools) is not part of a step
        backward(run, windows[0], device)
        run.model.zero_grad()
    turns = random.Random(settings.seed)
    for done, window in enumerate(windows, start=1):
        for run in turns.sample(runs, len(runs)):
            train_step(run, window, device)
        compare(runs, start)
        off = {way: largest(run.loss_deviations[-1] for run in runs if run.way == way) for way in ways}
        show(
            done * len(runs),
            f"Llama: the loss is off by {off[MEAN_OF_MEANS]:.0e} with the {MEAN_OF_MEANS}, by {off[ACCUMLOSS]:.0e} with {ACCUMLOSS}",
        )
    measure_memory(runs, max(windows, key=lambda window: max(map(len, window)) * len(window)), device)
    return runs
