"""A whole training step of real models on the CPU, stock transformers against accumloss: time, the loss's share, memory.

    python benchmarks/bench_training_step.py [--models llama-15M ...] [--rounds 5]

Forward, backward and SGD step of a causal or masked language model over one micro-batch, its loss by transformers' own
function or by accumloss, both divided by the items of the step as under Trainer. The loss's share is what the loss and its gradient take of the step, by the clock
around them: the forward of the loss function, and its backward from the loss to the logits. The ways take turns, in another
order every round; medians over the rounds. Losses of the ways are held against each other first. Writes
training_step_cpu.csv and .json to --out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from devices import Cpu
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import accumloss

NAME = "training_step_cpu"
FUSED = "accumloss fused"  # the loss with its head, from the hidden states: it has no time of its own
WAYS = ("stock", "accumloss", "accumloss in place", FUSED)
FIELDS = (
    "model", "parameters", "rows", "length", "vocab", "dtype", "ignored", "way", "rounds",
    "loss_ms", "step_ms", "loss_share", "step_ratio", "loss_ratio", "peak_extra_bytes", "loss",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    config: Any
    build: Callable[[Any], torch.nn.Module]
    rows: int
    length: int


def llama(hidden: int, layers: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64, vocab_size=vocab, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip


MODELS = {
    "llama-15M": Model(llama(256, 6, 32000), LlamaForCausalLM, 4, 256),
    "llama-100M": Model(llama(640, 10, 50257), LlamaForCausalLM, 4, 256),
    "bert-110M": Model(BertConfig(), BertForMaskedLM, 4, 256),
}


def batch_of(model: Model, ignored: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (model.rows, model.length)
    ids = torch.randint(5, model.config.vocab_size, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < ignored, -100, ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Clock:
    """Seconds of the loss: of its function, and of its backward from the loss to the logits."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, loss_function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def timed(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            began = [0.0]

            def logits_have_their_gradient(grad: torch.Tensor) -> None:
                self.seconds += time.perf_counter() - began[0]

            # an identity, so that the hook sees the gradient once it is complete and nothing is saved of the logits
            logits.register_hook(logits_have_their_gradient)
            start = time.perf_counter()
            loss = loss_function(logits, *args, **kwargs)
            self.seconds += time.perf_counter() - start

            def loss_has_its_gradient(grad: torch.Tensor) -> None:
                began[0] = time.perf_counter()

            loss.register_hook(loss_has_its_gradient)
            return loss

        return timed


class MaskedLM(torch.nn.Module):
    """BertForMaskedLM with the loss that it computes in its forward, as a function that the clock can see."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.loss_function = stock_masked

    def forward(self, labels: torch.Tensor, **inputs: Any) -> Any:
        outputs = self.model(**inputs)
        outputs.loss = self.loss_function(outputs.logits, labels, outputs.logits.shape[-1])
        return outputs


def stock_masked(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


@contextlib.contextmanager
def way_of(way: str, model: torch.nn.Module, clock: Clock, num_items: torch.Tensor) -> Iterator[None]:
    """The model's loss computed in one of the ways, under the clock; num_items () as Trainer passes it."""
    before = model.loss_function
    if way == FUSED:
        fused = accumloss.make_loss("causal_lm")
        with accumloss.registered(fused_linear=True):
            model.loss_function = lambda logits, labels, vocab_size, **kwargs: fused(
                logits, labels, vocab_size, num_items_in_batch=num_items
            )
            try:
                yield
            finally:
                model.loss_function = before
        return
    is_bert = isinstance(model, MaskedLM)
    inplace: Any = "forward" if way == "accumloss in place" else False
    ours = accumloss.masked_lm_loss if is_bert else accumloss.causal_lm_loss
    if way != "stock":
        loss = functools.partial(ours, num_items_in_batch=num_items, inplace=inplace)
    else:
        loss = before if is_bert else functools.partial(before, num_items_in_batch=num_items)
    timed = clock.around(loss)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: timed(logits, labels, vocab_size)
    try:
        yield
    finally:
        model.loss_function = before


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def measure(name: str, ignored: float, rounds: int, dtype: torch.dtype) -> list[dict[str, object]]:
    described = MODELS[name]
    torch.manual_seed(0)
    model = described.build(described.config).to(dtype).train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    parameters = sum(p.numel() for p in model.parameters())
    if isinstance(model, BertForMaskedLM):
        model = MaskedLM(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # every step begins with the same weights
    batch = batch_of(described, ignored)
    first = 0 if isinstance(model, MaskedLM) else 1  # a causal model predicts no first label
    num_items = (batch["labels"][:, first:] != -100).sum()
    ways = [way for way in WAYS if way != FUSED or not isinstance(model, MaskedLM)]  # whose head is not a plain one
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    losses, peaks = {}, {}
    for way in ways:
        with way_of(way, model, Clock(), num_items):
            loss = step(model, optimizer, batch)
            losses[way] = float(loss)
            if way == "stock":  # a head that calls PyTorch's loss on bf16 logits has a bf16 loss
                precision = max(1e-5, torch.finfo(loss.dtype).eps)
            peaks[way] = Cpu().peak_bytes(lambda: step(model, optimizer, batch))
    for way in ways:
        if abs(losses[way] - losses["stock"]) > precision * abs(losses["stock"]):
            raise SystemExit(f"{name}, {way}: expected the loss of stock, {losses['stock']}, got {losses[way]}")
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for way in order.sample(ways, len(ways)):
                clock = Clock()
                with way_of(way, model, clock, num_items):
                    start = time.perf_counter()
                    step(model, optimizer, batch)
                    seconds[way].append((clock.seconds, time.perf_counter() - start))
    finally:
        gc.enable()

    def ratio(way: str, which: int) -> float:
        return statistics.median(
            a[which] / max(b[which], 1e-9) for a, b in zip(seconds["stock"], seconds[way], strict=True)
        )

    lines = []
    for way in ways:
        loss_ms, step_ms = (1e3 * statistics.median(pair[which] for pair in seconds[way]) for which in (0, 1))
        values = (
            name, parameters, described.rows, described.length, described.config.vocab_size, str(dtype).removeprefix("torch."),
            ignored, way, rounds, loss_ms, step_ms, loss_ms / step_ms, ratio(way, 1), ratio(way, 0), peaks[way], losses[way],
        )  # fmt: skip
        line: dict[str, object] = dict(zip(FIELDS, values, strict=True))
        if way == FUSED:
            line.update(loss_ms="", loss_share="", loss_ratio="")
        lines.append(line)
    return lines


def markdown(lines: Sequence[dict[str, object]]) -> str:
    text = [
        "| model | ignored | way | loss ms | loss's share | loss × stock | step ms | step × stock | peak MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        loss = "| | | "
        if line["loss_ms"] != "":
            loss = f"| {line['loss_ms']:.1f} | {line['loss_share']:.1%} | {line['loss_ratio']:.2f} "
        peak = line["peak_extra_bytes"]
        megabytes = "" if peak is None else f"{peak / 1e6:.0f}"  # type: ignore[operator]
        text.append(
            f"| {line['model']} {line['dtype']} | {line['ignored']:.0%} | {line['way']} {loss}"
            f"| {line['step_ms']:.0f} | {line['step_ratio']:.2f} | {megabytes} |"
        )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="bench_training_step.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--ignored", nargs="+", type=float, default=[0.0, 0.5, 0.9], metavar="SHARE")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    facts = {**record.environment(), **record.origin("bench_training_step.py", arguments)}
    lines: list[dict[str, object]] = []
    for name in options.models:
        for ignored in options.ignored:
            print(f"{name}, {ignored:.0%} ignored", file=sys.stderr, flush=True)
            lines += measure(name, ignored, options.rounds, getattr(torch, options.dtype))
    record.write(options.out, NAME, FIELDS, lines, facts)
    print(markdown(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
