"""Head and cross-entropy together, forward and backward: accumloss without the logits, and its peers.

    python benchmarks/bench_linear.py [--device cuda] [--quick] [--rounds 3] [--out FOLDER]

The ceiling is the three matrix products alone, in the same dtype, into tensors that exist: nothing that computes a head and
its gradients is faster. Every competitor's loss and gradients are held against float64 on fewer rows before it is timed.
Interleaved rounds, medians of ratios within a round (one round of calls that take seconds); peak memory above hidden states,
weight and gradients' own size is taken in a pass of its own, the second of two (of calls that take seconds, the first).
Writes linear_cpu.csv (or linear_gpu.csv) and .json to --out and prints a summary in Markdown.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import devices
import record
import torch
from peers import PeerMissing, gpu_function
from shapes import DTYPES
from torch.nn import functional as F

import accumloss
from accumloss.linear import MAX_SCRATCH_BYTES

NAMES = {"cpu": "linear_cpu", "cuda": "linear_gpu"}
FIELDS = (
    "rows", "hidden_size", "vocab", "dtype", "ignored", "peer", "rounds", "ms_median", "ms_q1", "ms_q3",
    "ratio_to_products", "peak_extra_bytes", "loss_error", "hidden_error", "weight_error", "missing",
)  # fmt: skip
SIZES = ((768, 50257), (2048, 32000), (1024, 128256))
ROWS, CHECKED_ROWS = 2048, 256
GPU_SIZES = (  # with their rows: all of one chunk but the last
    (8192, 4096, 32000), (8192, 4096, 128256), (8192, 2304, 262144), (8192, 768, 50257), (4096, 2048, 50257),
    (16384, 4096, 151936),
)  # fmt: skip
GPU_GOALS = {"most": 1.08, "ignored": 0.55, "peak": None}
SLOW_SECONDS = 10.0  # a call that takes longer, as F.linear_cross_entropy's do, is timed in one round only
PRODUCTS = "three products"


class Head(NamedTuple):
    hidden: torch.Tensor  # (1, N, H)
    weight: torch.Tensor  # (V, H)
    labels: torch.Tensor  # (1, N)
    num_items: torch.Tensor  # ()
    num_valid: int
    share: float = (
        1.0  # of the budget on the CPU, where it stands for more rows: their errors are those of as many chunks
    )

    @classmethod
    def make(
        cls, rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, ignored: float, device: str = "cpu"
    ) -> Head:
        on: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        hidden = torch.randn(1, rows, hidden_size, **on).to(dtype).requires_grad_()
        weight = (torch.randn(vocab, hidden_size, **on) / hidden_size**0.5).to(dtype).requires_grad_()
        labels = torch.randint(vocab, (1, rows), **on)
        labels[torch.rand(1, rows, **on) < ignored] = -100
        num_items = (labels[:, 1:] != -100).sum()
        return cls(hidden, weight, labels, num_items, int(num_items))

    def few(self, rows: int) -> Head:
        hidden = self.hidden.detach()[:, :rows].clone().requires_grad_()
        labels = self.labels[:, :rows]
        num_items = (labels[:, 1:] != -100).sum()
        return Head(hidden, self.weight, labels, num_items, int(num_items), rows / self.hidden.shape[1])


Loss = Callable[[Head], torch.Tensor]


def stock() -> Loss:
    """The head, then transformers' ForCausalLMLoss."""
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError as error:
        raise PeerMissing(f"needs transformers ({error})") from None

    def loss(head: Head) -> torch.Tensor:
        logits = F.linear(head.hidden, head.weight)
        return ForCausalLMLoss(logits, head.labels, logits.shape[-1], num_items_in_batch=head.num_items)

    return loss


def by_rows(function: Callable[..., torch.Tensor], **options: Any) -> Loss:
    """A peer's function (hidden (N, H), weight (V, H), labels (N,) shifted, reduction="sum"), divided by the items."""

    def loss(head: Head) -> torch.Tensor:
        labels = F.pad(head.labels, (0, 1), value=-100)[..., 1:].flatten()
        total = function(head.hidden.flatten(0, -2), head.weight, labels, reduction="sum", **options)
        return total / head.num_items

    return loss


def torch_linear() -> Loss:
    """F.linear_cross_entropy with its chunked path, where torch has it."""
    if not hasattr(F, "linear_cross_entropy"):
        raise PeerMissing(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return by_rows(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def on_logits() -> Loss:
    """The head, then accumloss.causal_lm_loss, over the logits in backward."""

    def loss(head: Head) -> torch.Tensor:
        logits = F.linear(head.hidden, head.weight)
        return accumloss.causal_lm_loss(logits, head.labels, num_items_in_batch=head.num_items, inplace="backward")

    return loss


def fused(is_counted: bool = False) -> Loss:
    """accumloss from the hidden states. is_counted: the caller knows how many labels count, as a collator does; on a GPU
    rows are dropped only then."""

    def loss(head: Head) -> torch.Tensor:
        return accumloss.linear_causal_lm_loss(
            head.hidden,
            head.weight,
            head.labels,
            head.num_items,
            num_valid=head.num_valid if is_counted else None,
            max_scratch_bytes=None if head.hidden.is_cuda else int(MAX_SCRATCH_BYTES * head.share),
        )

    return loss


def theirs(package: str, module: str, name: str) -> Loss:
    return by_rows(gpu_function(package, module, name))


PEERS: dict[str, Callable[[], Loss]] = {
    "stock": stock,
    "F.linear_cross_entropy": torch_linear,
    "accumloss on logits": on_logits,
    "accumloss linear": fused,
}
GPU_PEERS = {
    **PEERS,
    "accumloss linear, num_valid": partial(fused, is_counted=True),
    "liger": partial(
        theirs, "liger-kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    ),
    # with its default filter of small gradients
    "cut-cross-entropy": partial(theirs, "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy"),
    "quack": partial(theirs, "quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
}


def call(loss: Loss, head: Head) -> torch.Tensor:
    head.hidden.grad = head.weight.grad = None
    value = loss(head)
    value.backward()
    return value.detach()


def products_of(head: Head) -> Callable[[], None]:
    """Logits, gradient of the hidden states, gradient of the weight."""
    rows, weight = head.hidden.detach()[0], head.weight.detach()
    logits = rows.new_zeros(rows.shape[0], weight.shape[0])
    grad_hidden, grad_weight = torch.zeros_like(rows), torch.zeros_like(weight)

    def work() -> None:
        torch.mm(rows, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.t(), rows, out=grad_weight)

    return work


def errors(loss: Loss, head: Head, exact: tuple[float, torch.Tensor, torch.Tensor]) -> tuple[float, float, float]:
    """Relative errors of the loss and, as wholes, of the two gradients."""
    value, hidden, weight = exact
    got = float(call(loss, head))
    assert head.hidden.grad is not None and head.weight.grad is not None
    distance = [
        float((grad.double() - wanted).norm() / wanted.norm())
        for grad, wanted in ((head.hidden.grad, hidden), (head.weight.grad, weight))
    ]
    return abs(got - value) / abs(value), distance[0], distance[1]


def exact_of(head: Head) -> tuple[float, torch.Tensor, torch.Tensor]:
    hidden, weight = (t.detach().double().requires_grad_() for t in (head.hidden, head.weight))
    logits = F.linear(hidden, weight)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, head.labels[:, 1:].flatten(), reduction="sum") / head.num_items
    grads = torch.autograd.grad(loss, (hidden, weight))
    return float(loss.detach()), *grads


def measure(
    rows: int, size: tuple[int, int], dtype: str, ignored: float, rounds: int, device: devices.Device | None = None
) -> list[dict[str, object]]:
    device = device or devices.Cpu()
    head = Head.make(rows, *size, DTYPES[dtype], ignored, device.name)
    few = head.few(min(rows, CHECKED_ROWS))
    exact = exact_of(few)
    lines: dict[str, dict[str, object]] = {}
    works: dict[str, Callable[[], object]] = {}
    limit = 0.05 if DTYPES[dtype].itemsize == 2 else 1e-5
    for name, make in (GPU_PEERS if device.name == "cuda" else PEERS).items():
        if ignored and device.name == "cpu" and name == "F.linear_cross_entropy":
            continue  # no goal speaks of it
        line = lines[name] = dict.fromkeys(FIELDS)
        line.update(rows=rows, hidden_size=size[0], vocab=size[1], dtype=dtype, ignored=ignored, peer=name, missing="")
        try:
            loss = make()
        except PeerMissing as reason:
            line["missing"] = str(reason)
            continue
        try:
            found = errors(loss, few, exact)
        except torch.OutOfMemoryError:
            line["missing"] = "out of memory"
            continue
        line.update(loss_error=found[0], hidden_error=found[1], weight_error=found[2])
        if not max(found) < limit:
            line["missing"] = f"wrong result: errors {found}"
            continue
        works[name] = lambda loss=loss: call(loss, head)
    del few, exact
    seconds: dict[str, float] = {}  # of the pass that takes the memory, which warms up as well
    own = (head.hidden.numel() + head.weight.numel()) * head.hidden.element_size()  # of the gradients
    for name, work in list(works.items()):
        head.hidden.grad = head.weight.grad = None
        start = time.perf_counter()
        try:
            peak = device.peak_bytes(work)
            if time.perf_counter() - start < SLOW_SECONDS:  # what only a first call allocates is not the call's
                head.hidden.grad = head.weight.grad = None
                start = time.perf_counter()
                peak = device.peak_bytes(work)
        except torch.OutOfMemoryError:
            lines[name]["missing"] = "out of memory"
            del works[name]
            continue
        seconds[name] = time.perf_counter() - start
        lines[name]["peak_extra_bytes"] = None if peak is None else max(0, peak - own)
    head.hidden.grad = head.weight.grad = None
    works[PRODUCTS] = products_of(head)
    lines[PRODUCTS] = {**dict.fromkeys(FIELDS), "rows": rows, "hidden_size": size[0], "vocab": size[1], "dtype": dtype}
    lines[PRODUCTS].update(ignored=ignored, peer=PRODUCTS, missing="")
    milliseconds: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        works[PRODUCTS]()
        for i in range(rounds):
            for name in order.sample(list(works), len(works)):
                if i == 0 or seconds.get(name, 0.0) < SLOW_SECONDS:
                    milliseconds[name].append(device.timed(works[name])[0])
    finally:
        gc.enable()
    for name, ms in milliseconds.items():
        low, middle, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
        ratio = statistics.median(a / b for a, b in zip(ms, milliseconds[PRODUCTS], strict=False))
        lines[name].update(rounds=len(ms), ms_median=middle, ms_q1=low, ms_q3=high, ratio_to_products=ratio)
    return list(lines.values())


def goals(
    lines: Sequence[dict], most: float = 1.05, ignored: float = 0.6, peak: int | None = 256
) -> list[tuple[str, str, str, bool]]:
    """What is measured, the goal, the measurement, whether it is reached."""

    def of(peer: str, ignored: float = 0.0) -> dict[tuple, dict]:
        found = [l for l in lines if l["peer"] == peer and l["ignored"] == ignored and not l["missing"]]
        return {(l["hidden_size"], l["vocab"], l["dtype"]): l for l in found}

    ours = of("accumloss linear")
    half = of("accumloss linear, num_valid", 0.5) or of("accumloss linear", 0.5)
    found: list[tuple[str, str, str, bool]] = []

    def add(what: str, goal: float, values: list[float], is_most: bool, unit: str = "") -> None:
        if values:
            ok = max(values) <= goal if is_most else min(values) >= goal
            found.append(
                (
                    what,
                    f"{'<=' if is_most else '>='} {goal:g}{unit}",
                    f"{min(values):.2f} to {max(values):.2f}{unit}",
                    ok,
                )
            )

    for dtype in ("bf16", "fp32"):
        add(
            f"time over the three products, {dtype}",
            most,
            [l["ratio_to_products"] for k, l in ours.items() if k[2] == dtype],
            True,
        )
    for peer in ("stock", "F.linear_cross_entropy"):
        times = [l["ms_median"] / ours[k]["ms_median"] for k, l in of(peer).items() if k in ours]
        add(f"faster than {peer}", 1, times, False, "×")
    add(
        "50 % ignored over none",
        ignored,
        [l["ms_median"] / ours[k]["ms_median"] for k, l in half.items() if k in ours],
        True,
    )
    peaks = [l["peak_extra_bytes"] / 2**20 for l in ours.values() if l["peak_extra_bytes"] is not None]
    if peak is not None:
        add("peak memory beside inputs and gradients", peak, peaks, True, " MiB")
    logits = of("accumloss on logits")
    for which in ("hidden_error", "weight_error"):
        add(
            f"{which.replace('_', ' ')} over that on logits",
            1.05,
            [l[which] / logits[k][which] for k, l in ours.items()],
            True,
        )
    return found  # fmt: skip


def markdown(lines: Sequence[dict], **limits: Any) -> str:
    text = [
        "| head (H, V), rows | peer | ms (quartiles) | × three products | extra MiB | error loss | hidden | weight |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    shape = None
    for line in lines:
        name = f"({line['hidden_size']}, {line['vocab']}) {line['dtype']}, {line['rows']}"
        if line["ignored"]:
            name += f", {line['ignored']:.0%} ignored"
        shown, shape = ("" if name == shape else name), name
        if line["missing"]:
            text.append(f"| {shown} | {line['peer']} | missing: {line['missing']} ||||||")
            continue
        peak = "" if line["peak_extra_bytes"] is None else f"{line['peak_extra_bytes'] / 2**20:.0f}"
        found = ["" if line[k] is None else f"{line[k]:.1e}" for k in ("loss_error", "hidden_error", "weight_error")]
        text.append(
            f"| {shown} | {line['peer']} | {line['ms_median']:.0f} ({line['ms_q1']:.0f}-{line['ms_q3']:.0f}) "
            f"| {line['ratio_to_products']:.2f} | {peak} | " + " | ".join(found) + " |"
        )
    text += ["", *record.goals_table(goals(lines, **limits))]
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="bench_linear.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1/16 of each size")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--device", choices=NAMES, default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU, found none")
    device: devices.Device = devices.Cuda() if options.device == "cuda" else devices.Cpu()
    sizes = GPU_SIZES if options.device == "cuda" else [(ROWS, *size) for size in SIZES]
    facts = {**record.environment(), **device.facts(), **record.origin("bench_linear.py", arguments)}
    lines: list[dict[str, object]] = []
    for dtype in options.dtypes:
        for case in sizes:
            for ignored in (0.0, 0.5):
                rows, *size = (number // 16 for number in case) if options.quick else case
                print(f"({size[0]}, {size[1]}) {dtype}, {ignored:.0%} ignored", file=sys.stderr, flush=True)
                lines += measure(rows, (size[0], size[1]), dtype, ignored, options.rounds, device)
                record.write(
                    options.out, NAMES[options.device], FIELDS, lines, facts
                )  # what it is killed in leaves these
    print(markdown(lines, **(GPU_GOALS if options.device == "cuda" else {})))
    return 1 if any(str(line["missing"]).startswith("wrong result") for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
