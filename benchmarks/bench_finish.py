"""What Accumulator.finish() costs an optimizer step, for a transformer of 100 M parameters in fp32.

    python benchmarks/bench_finish.py [--rounds 15] [--rows 4] [--tokens 64]

Against the forward and backward of one micro-batch, and against the clip that every training step has anyway. The ways take
turns within a round; medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import accumloss

VOCAB, HIDDEN, LAYERS = 10000, 768, 12


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, 12, 4 * HIDDEN, dropout=0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(inputs)))


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = LanguageModel()
    parameters = list(model.parameters())
    inputs = torch.randint(VOCAB, (options.rows, options.tokens))
    accumulator = accumloss.Accumulator(model)

    def micro_batch() -> None:
        accumulator.backward(accumloss.cross_entropy(model(inputs), inputs, shift=1))

    def plain_micro_batch() -> None:
        accumloss.causal_lm_loss(model(inputs), inputs).backward()

    def clip() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    finishes: dict[str, Callable[[], object]] = {
        "finish()": accumulator.finish,
        "finish(), then clip_grad_norm_": lambda: (accumulator.finish(), clip()),
        "finish(max_norm=1.0)": lambda: accumulator.finish(max_norm=1.0),
        "finish(rescale=False)": lambda: accumulator.finish(rescale=False),
    }
    times: dict[str, list[float]] = {}
    for round_ in range(options.rounds + 1):  # the first warms up
        taken = {}
        for name, finish in finishes.items():
            model.zero_grad(set_to_none=False)
            taken["forward and accumulator.backward()"] = milliseconds(micro_batch)
            taken[name] = milliseconds(finish)
        model.zero_grad(set_to_none=False)
        taken["forward and backward of causal_lm_loss"] = milliseconds(plain_micro_batch)
        taken["clip_grad_norm_ alone"] = milliseconds(clip)
        for name, ms in taken.items() if round_ else ():
            times.setdefault(name, []).append(ms)

    print(
        f"{sum(p.numel() for p in parameters) / 1e6:.0f} M parameters in fp32, {options.rows} x {options.tokens} tokens"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| | ms |")
    print("|---|---:|")
    for name, taken_ms in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        print(f"| {name} | {statistics.median(taken_ms):.1f} |")


if __name__ == "__main__":
    main()
