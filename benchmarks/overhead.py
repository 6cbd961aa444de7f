"""What the mechanism costs: seconds of an optimizer step of Trainer, stock and with accumloss registered.

    python benchmarks/overhead.py [--rounds 5] [--large-only | --tiny-only]

A tiny BERT, where everything but bookkeeping is small, and one of 110 M parameters, both as masked LM (CrossEntropyLoss in
forward, labels recognised at every call) over 4 micro-batches. The ways take turns within a round; medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
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
    parser.add_argument("--only", choices=SIZES)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
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
