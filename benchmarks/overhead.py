"""What the mechanism costs: a call that has nothing to compute, and an optimizer step of Trainer.

    python benchmarks/overhead.py [--rounds 5] [--only smallest | tiny | "110 M"]

The smallest call: one row of 9 classes, forward and backward, one thread, beside PyTorch's cross-entropy and beside what
PyTorch takes for a function, and for an op, that do nothing. The ways take turns after every few calls, and each is held
against PyTorch's of its own turn; the median over the turns.

An optimizer step, stock and with accumloss registered: a tiny BERT, where everything but bookkeeping is small, and one of 110 M parameters, both as masked LM (CrossEntropyLoss in
forward, labels recognised at every call) over 4 micro-batches. The ways take turns within a round; medians over the rounds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

import accumloss

MICRO_BATCHES = 4
SIZES = {
    "tiny": (
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32),
        2,
        12,
        60,
    ),
    "110 M": (BertConfig(), 1, 64, 3),  # bert-base
}  # configuration, rows of a micro-batch, tokens of a row, optimizer steps of a round


STOCK = '`F.cross_entropy(x, y, reduction="sum") / n`'
OURS = "`accumloss.masked_lm_loss(x, y, num_items_in_batch=n)`"
OUR_OP = "`torch.ops.accumloss.masked_lm(x, y)[0] / n`"
CALLS, TURNS = 20, 400  # of each way in a turn


class Nothing(torch.autograd.Function):
    """What any autograd function in Python costs."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0]), None


LIBRARY = torch.library.Library("accumloss_overhead", "DEF")
LIBRARY.define("nothing(Tensor x, Tensor y) -> Tensor")  # the same as an op with a registered formula
LIBRARY.impl("nothing", lambda x, y: x.new_empty(()), "CPU")
torch.library.register_autograd(
    "accumloss_overhead::nothing",
    lambda ctx, grad: (torch.empty_like(ctx.saved_tensors[0]), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    lib=LIBRARY,
)


def smallest_calls(turns: int = TURNS) -> dict[str, tuple[float, float]]:
    """way -> microseconds of a forward and backward, and their ratio to PyTorch's."""
    n, op, nothing = 5, torch.ops.accumloss.masked_lm, torch.ops.accumloss_overhead.nothing
    x, y = torch.randn(1, 9, requires_grad=True), torch.tensor([3])
    ways: dict[str, Callable[[], torch.Tensor]] = {
        STOCK: lambda: F.cross_entropy(x, y, reduction="sum") / n,
        "an autograd.Function that does nothing": lambda: Nothing.apply(x, y),
        "an op with register_autograd that does nothing": lambda: nothing(x, y),
        OURS: lambda: accumloss.masked_lm_loss(x, y, num_items_in_batch=n),
        OUR_OP: lambda: op(x, y)[0] / n,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20 + turns):
            for way, call in ways.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    x.grad = None
                    call().backward()
                seconds[way].append((time.perf_counter() - begin) / CALLS)
    finally:
        gc.enable()
        torch.set_num_threads(threads)
    found = {}
    for way, taken in seconds.items():
        ratios = [ours / stock for ours, stock in zip(taken[20:], seconds[STOCK][20:], strict=True)]
        found[way] = min(taken) * 1e6, statistics.median(ratios)
    return found


class Clock(TrainerCallback):
    """Seconds of each optimizer step, the first left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def rows(vocab: int, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = torch.randint(5, vocab, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.15, ids, -100)
        labels[i % length] = ids[i % length]
        found.append({"input_ids": ids, "attention_mask": torch.ones(length, dtype=torch.int64), "labels": labels})
    return found


def step_seconds(model: torch.nn.Module, data: list, batch_size: int, steps: int) -> float:
    """Median over the optimizer steps of one training."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_steps=steps + 1,
            learning_rate=0.0,
            optim="sgd",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return statistics.median(clock.seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["smallest", *SIZES])
    options = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    if options.only in (None, "smallest"):
        print("| smallest call, forward and backward | least µs | ratio |")
        print("|---|---:|---:|")
        for way, (microseconds, ratio) in smallest_calls().items():
            print(f"| {way} | {microseconds:.1f} | {ratio:.2f} |")
        print()
    if options.only == "smallest":
        return
    print("| BERT, masked LM | stock ms | accumloss ms | difference ms | ratio |")
    print("|---|---:|---:|---:|---:|")
    for size in [options.only] if options.only else SIZES:
        config, batch_size, length, steps = SIZES[size]
        torch.manual_seed(0)
        model = BertForMaskedLM(config)
        data = rows(config.vocab_size, length, batch_size * MICRO_BATCHES * (steps + 1))
        stock, ours = [], []
        for _ in range(options.rounds):
            stock.append(step_seconds(model, data, batch_size, steps))
            with accumloss.registered():
                ours.append(step_seconds(model, data, batch_size, steps))
        a, b = statistics.median(stock) * 1e3, statistics.median(ours) * 1e3
        print(
            f"| {size}, {MICRO_BATCHES} x {batch_size} x {length} | {a:.2f} | {b:.2f} | {b - a:+.2f} | {b / a:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
