"""Plain PyTorch in the place of the kernels, as on a device that has none, against PyTorch's own loss: time and memory.

    python benchmarks/bench_fallback.py [--rows N] [--vocab V ...] [--rounds N]

Forward and backward of a mean over the items. The kernels of the CPU are passed over. The two take turns; times are medians
of CPU time, which other processes disturb less than the clock. Memory is the peak above what was there before the call.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import devices
import torch
import torch.nn.functional as F

import accumloss
from accumloss import fallback

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stock(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: of all logits in fp32."""
    return F.cross_entropy(logits.float(), labels)


def backward_of(loss: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    def work() -> torch.Tensor:
        leaf = logits.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss(leaf, labels), leaf)
        return grad

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore", accumloss.FallbackWarning)
    library = torch.library.Library("accumloss", "IMPL")
    fallback.pass_over(library, "CPU", lambda device: True)
    device = devices.Cpu()
    ways = {
        "PyTorch": stock,
        "fallback": lambda x, y: accumloss.masked_lm_loss(x, y),
        "fallback, divisor given": lambda x, y: accumloss.masked_lm_loss(x, y, num_items_in_batch=options.rows),
    }
    print(
        "| logits | way | CPU seconds | of PyTorch's | peak MB | of the logits' bytes |\n|---|---|---:|---:|---:|---:|"
    )
    for name, dtype in DTYPES.items():
        for V in options.vocab:
            logits = torch.randn(options.rows, V).to(dtype)
            labels = torch.randint(0, V, (options.rows,))
            works = {way: backward_of(loss, logits, labels) for way, loss in ways.items()}
            seconds: dict[str, list[float]] = {way: [] for way in works}
            for _ in range(options.rounds):
                for way, work in works.items():
                    start = time.process_time()
                    work()
                    seconds[way].append(time.process_time() - start)
            for way, work in works.items():
                ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["PyTorch"], strict=True))
                peak = device.peak_bytes(work)
                memory = ("", "") if peak is None else (f"{peak / 1e6:.0f}", f"{peak / logits.nbytes:.2f}")
                print(
                    f"| {name} {options.rows} x {V} | {way} | {statistics.median(seconds[way]):.2f} | {ratio:.2f} | "
                    f"{memory[0]} | {memory[1]} |"
                )
    library._destroy()


if __name__ == "__main__":
    main()
