"""Measures losses against each other: forward and backward together, correctness first.

- Every competitor's loss and gradient are held against float64 before it is timed; a wrong one is not timed.
- The competitors take turns, in another order every round; a figure is a median over the rounds, with quartiles, and a
  ratio is the median of the ratios within the rounds.
- The ceilings take their turns too: `copy` copies the logits to a buffer that exists (the floor's bytes: one read, one
  write); devices.py has the others.
- The logits are written anew before every call, outside the timed region, so that in-place competitors read the same
  values and all find the caches in the same state. The time ends when the gradient is there.
- Peak memory is taken in a pass of its own, above what was in use before the call; the logits are not counted.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from devices import COPY, Cpu, Device
from peers import COMPILE, STOCK, Peer
from shapes import Shape

SMALL_SHAPE_SECONDS = 2.0  # a shape that is done sooner than this gets more rounds, at most
MOST_ROUNDS = 300


class WrongResult(RuntimeError):
    """A competitor whose loss or gradient is not the float64 one, as closely as its dtype allows."""


@dataclass
class Result:
    """One competitor at one shape. Lists have one entry per round."""

    peer: str
    ms: list[float] = field(default_factory=list)
    page_faults: list[int] = field(default_factory=list)
    loss_error: float | None = None  # relative
    grad_error: float | None = None  # largest relative error of an element
    peak_bytes: int | None = None
    missing: str = ""  # why it was not timed


# --------------------------------------------------------------------------------------------------------------- a call


class Head(torch.autograd.Function):
    """Stands for the layer that made the logits: hands the buffer on as its output and takes the gradient."""

    @staticmethod
    def forward(ctx, anchor: torch.Tensor, buffer: torch.Tensor, received: list[torch.Tensor]) -> torch.Tensor:
        ctx.received = received
        # the same memory, but neither an input nor a view of one: in-place losses may write to it
        alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        return alias.set_(buffer.untyped_storage(), buffer.storage_offset(), buffer.size(), buffer.stride())

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.received.append(grad)
        return None, None, None


@dataclass
class Case:
    """The data of one shape."""

    shape: Shape
    source: torch.Tensor  # (1, N, V)
    logits: torch.Tensor  # (1, N, V), what the competitors are given and may overwrite
    labels: torch.Tensor  # (1, N)
    num_items: torch.Tensor  # ()
    anchor: torch.Tensor  # makes the head's output require a gradient
    grad_output: float = 1.0  # what comes back to the loss

    @classmethod
    def make(cls, shape: Shape, seed: int = 0, device: str = "cpu", grad_output: float = 1.0) -> Case:
        generator = torch.Generator(device).manual_seed(seed)
        size, factory = (1, shape.rows, shape.vocab), {"generator": generator, "device": device}
        source = torch.empty(size, dtype=shape.torch_dtype, device=device)
        for begin in range(0, shape.rows, 1024):  # the whole in fp32 would not fit beside the largest logits
            part = source[:, begin : begin + 1024]
            part.copy_(torch.randn(part.shape, dtype=torch.float32, **factory).mul_(2))
        labels = torch.randint(shape.vocab, (1, shape.rows), **factory)
        labels[torch.rand(1, shape.rows, **factory) < shape.ignored] = -100
        num_items = (labels[:, 1:] != -100).sum()
        anchor = torch.zeros((), requires_grad=True, device=device)
        return cls(shape, source, source.clone(), labels, num_items, anchor, grad_output)

    def refresh(self) -> None:
        self.logits.copy_(self.source)

    def call(self, peer: Peer) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss () and the gradient (1, N, V)."""
        received: list[torch.Tensor] = []
        loss = peer.loss(Head.apply(self.anchor, self.logits, received), self.labels, self.num_items)
        loss.backward(None if self.grad_output == 1 else torch.full_like(loss, self.grad_output))
        if not received:
            raise WrongResult(f"{peer.name} at {self.shape}: expected a gradient of the logits, got none")
        return loss.detach(), received[0]

    @torch.no_grad()
    def forward(self, peer: Peer) -> torch.Tensor:
        """The loss () alone."""
        return peer.loss(self.logits, self.labels, self.num_items)


# ---------------------------------------------------------------------------------------------------------- correctness


def errors(case: Case, loss: torch.Tensor, grad: torch.Tensor) -> tuple[float, float, float]:
    """Relative error of the loss, largest relative error of an element of the gradient, largest |log p|.

    An element is held against its own size; the label's, p - 1, against |p - 1| + p. A gradient of an ignored row that
    is not zero has an infinite error.
    """
    rows, vocab = case.shape.rows, case.shape.vocab
    source, grad = case.source.view(rows, vocab), grad.reshape(rows, vocab)
    labels = torch.nn.functional.pad(case.labels.view(-1)[1:], (0, 1), value=-100)
    scale = 1.0 / max(int(case.num_items), 1)
    grad_scale = scale * case.grad_output
    half_tiny = torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps / 2
    total, worst, confidence = 0.0, 0.0, 0.0
    step = max(1, 2**17 // vocab)  # so few that what is computed of them stays in the cache
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        kept = labels[part] != -100
        if grad[part][~kept].count_nonzero() > 0:
            worst = float("inf")
        if not kept.any():
            continue
        y = labels[part][kept, None]
        log_p = torch.log_softmax(source[part][kept].double(), dim=-1)
        total -= float(log_p.gather(1, y).sum())
        confidence = max(confidence, float(-log_p.min()))
        size = log_p.exp_().mul_(grad_scale)
        expected = size.clone().scatter_add_(1, y, torch.full_like(y, -grad_scale, dtype=torch.float64))
        size.scatter_add_(1, y, expected.gather(1, y).abs())
        error = (grad[part][kept].double() - expected).abs_().sub_(half_tiny).clamp_(min=0).div_(size)
        worst = max(worst, float(error.max())) if not error.isnan().any() else float("inf")
    expected_loss = total * scale
    loss_error = abs(float(loss) - expected_loss) / abs(expected_loss) if expected_loss else abs(float(loss))
    return loss_error, worst, confidence


def check(case: Case, peer: Peer) -> tuple[float, float]:
    """Errors of the loss and of the gradient; raises WrongResult where they are larger than the precision allows."""
    case.refresh()
    loss, grad = case.call(peer)
    if grad.shape != case.source.shape or grad.dtype != case.source.dtype:
        raise WrongResult(
            f"{peer.name} at {case.shape}: expected a gradient {tuple(case.source.shape)} {case.source.dtype}, "
            f"got {tuple(grad.shape)} {grad.dtype}"
        )
    loss_error, grad_error, confidence = errors(case, loss, grad)
    output = torch.finfo(case.shape.torch_dtype).eps
    internal = min(output, torch.finfo(torch.float32).eps) if peer.computes_in_fp32 else output
    # log p has an absolute error of about internal * |log p|, which is a relative one of p; rounding adds output / 2
    grad_limit = 2 * internal * (4 + confidence) + 0.51 * output
    loss_limit = 32 * internal
    if not (loss_error <= loss_limit and grad_error <= grad_limit):
        raise WrongResult(
            f"{peer.name} at {case.shape}: expected relative errors of at most {loss_limit:.0e} (loss) and "
            f"{grad_limit:.0e} (gradient), got {loss_error:.1e} and {grad_error:.1e}"
        )
    return loss_error, grad_error


# ----------------------------------------------------------------------------------------------------------------- time


@functools.cache
def _freeze() -> None:
    """Takes what the imports made out of the garbage collector's sight: a collection takes 0.4 s with it."""
    gc.collect()
    gc.freeze()


def measure(
    shape: Shape,
    peers: Mapping[str, Peer | str],
    rounds: int,
    seed: int = 0,
    adaptive: bool = True,
    device: Device | None = None,
    grad_output: float = 1.0,
    is_forward_only: bool = False,
) -> list[Result]:
    """Results of all peers and of the ceilings. A peer given as a string is missing, for that reason.

    Correctness is that of forward and backward also where the forward alone is timed.
    """
    _freeze()
    device = device or Cpu()
    case = Case.make(shape, seed, device.name, grad_output)
    results = {name: Result(name) for name in peers}
    works: dict[str, Callable[[], object]] = {}
    for name, peer in peers.items():
        if isinstance(peer, str):
            results[name].missing = peer
            continue
        try:
            results[name].loss_error, results[name].grad_error = check(case, peer)
        except WrongResult as error:
            results[name].missing = f"wrong result: {error}"
            continue
        except torch.OutOfMemoryError:
            results[name].missing = "out of memory"
            continue
        except (ValueError, NotImplementedError) as error:
            results[name].missing = f"refused: {error}"
            continue
        works[name] = (lambda peer=peer: case.forward(peer)) if is_forward_only else lambda peer=peer: case.call(peer)
    for name, work in device.ceilings(case.source, case.logits).items():
        works[name], results[name] = work, Result(name)

    for name, work in works.items():
        case.refresh()
        results[name].peak_bytes = device.peak_bytes(work)

    order = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # warm-up: after the memory pass the heap is cold again
            start = time.perf_counter()
            for work in works.values():
                case.refresh()
                device.timed(work)
            seconds = time.perf_counter() - start
        if adaptive:
            rounds = max(rounds, min(MOST_ROUNDS, int(SMALL_SHAPE_SECONDS / seconds)))
        for _ in range(rounds):
            for name in order.sample(list(works), len(works)):
                case.refresh()
                ms, faults = device.timed(works[name])
                results[name].ms.append(ms)
                results[name].page_faults.append(faults)
    finally:
        gc.enable()
    return list(results.values())


# -------------------------------------------------------------------------------------------------------------- figures

COLUMNS = (
    "regime",
    "rows",
    "vocab",
    "dtype",
    "ignored",
    "peer",
    "rounds",
    "ms_median",
    "ms_q1",
    "ms_q3",
    "ratio_to_stock",
    "ratio_to_compile",
    "gb_per_s",
    "fraction_of_copy",
    "peak_extra_bytes",
    "peak_extra_over_logits",
    "page_faults",
    "loss_error",
    "grad_error",
    "missing",
)


def ratio(of: Result | None, to: Result) -> float | None:
    """Median over the rounds of the time of `of` over the time of `to`."""
    if of is None or not of.ms or not to.ms:
        return None
    return statistics.median(a / b for a, b in zip(of.ms, to.ms, strict=True))


def figures(regime: str, shape: Shape, results: list[Result]) -> list[dict[str, object]]:
    """One line of the CSV for every result."""
    by_name = {result.peer: result for result in results}
    lines = []
    for result in results:
        line: dict[str, object] = dict.fromkeys(COLUMNS)
        line.update(regime=regime, rows=shape.rows, vocab=shape.vocab, dtype=shape.dtype, ignored=shape.ignored)
        line.update(peer=result.peer, missing=result.missing, rounds=len(result.ms))
        line.update(loss_error=result.loss_error, grad_error=result.grad_error, peak_extra_bytes=result.peak_bytes)
        if result.peak_bytes is not None:
            line["peak_extra_over_logits"] = result.peak_bytes / shape.logits_bytes
        if result.ms:
            median = statistics.median(result.ms)
            quartiles = statistics.quantiles(result.ms, n=4, method="inclusive") if len(result.ms) > 1 else [median] * 3
            line.update(ms_median=median, ms_q1=quartiles[0], ms_q3=quartiles[2])
            line.update(gb_per_s=shape.floor_bytes / median / 1e6, page_faults=statistics.median(result.page_faults))
            line["ratio_to_stock"] = ratio(by_name.get(STOCK), result)
            line["ratio_to_compile"] = ratio(by_name.get(COMPILE), result)
            line["fraction_of_copy"] = ratio(by_name.get(COPY), result)
        lines.append(line)
    return lines
