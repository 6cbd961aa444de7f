"""The competitors, one adapter each: loss(logits (1, N, V), labels (1, N), num_items ()) -> () with a gradient.

All compute the causal loss with the shift inside, as a sum divided by num_items, each in its best documented mode.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PeerMissing(RuntimeError):
    """A competitor that cannot run on this machine; the message is the reason."""


@dataclass(frozen=True)
class Peer:
    name: str
    loss: Loss
    # False: something before the last rounding has the logits' dtype already, and its result is held to that only
    computes_in_fp32: bool = True


def _stock_loss() -> Callable[..., torch.Tensor]:
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError as error:
        raise PeerMissing(f"needs transformers: pip install transformers ({error})") from None
    return ForCausalLMLoss


def stock() -> Peer:
    """transformers' ForCausalLMLoss."""
    loss = _stock_loss()
    return Peer("stock", lambda logits, labels, n: loss(logits, labels, logits.shape[-1], num_items_in_batch=n))


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()


def cross_entropy() -> Peer:
    """F.cross_entropy on the logits as they are, without the copy in fp32."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, -2), _shifted(labels), reduction="sum") / n

    return Peer("F.cross_entropy", loss, computes_in_fp32=False)


def compile() -> Peer:
    """torch.compile of transformers' ForCausalLMLoss, fixed shapes."""
    loss = _stock_loss()
    compiled = torch.compile(loss, dynamic=False, fullgraph=True)
    try:  # a machine without a compiler fails here, not in the middle of a measurement
        probe = torch.zeros(1, 8, 16, requires_grad=True)
        ones = torch.ones(1, 8, dtype=torch.int64)
        compiled(probe, ones, 16, num_items_in_batch=torch.tensor(7)).backward()
    except Exception as error:  # whatever the compiler raises is the reason
        reason = str(error).strip().splitlines() or [""]
        raise PeerMissing(f"torch.compile does not work here: {type(error).__name__}: {reason[0]}"[:300]) from None
    return Peer("compile", lambda logits, labels, n: compiled(logits, labels, logits.shape[-1], num_items_in_batch=n))


def accumloss(inplace: bool | str = False) -> Peer:
    """accumloss.causal_lm_loss: gradient in its own buffer, or over the logits in backward or in forward."""
    import accumloss as package

    def loss(logits: torch.Tensor, labels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return package.causal_lm_loss(logits, labels, num_items_in_batch=n, inplace=inplace)

    return Peer("accumloss" + (f" {inplace}" if inplace else ""), loss)


def accumloss_mean() -> Peer:
    """accumloss.causal_lm_loss without num_items_in_batch: the divisor is known after the forward only, so two visits."""
    import accumloss as package

    return Peer("accumloss mean", lambda logits, labels, n: package.causal_lm_loss(logits, labels))


def liger(reduction: str) -> Peer:
    """Liger's cross-entropy, which writes the gradient over the logits in forward.

    As a mean over the call nothing is left for its backward; as a sum that is divided, the way of exact accumulation,
    the gradient is visited again.
    """
    liger_cross_entropy = gpu_function("liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy")

    def loss(logits: torch.Tensor, labels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        value = liger_cross_entropy(logits.flatten(0, -2), _shifted(labels), reduction=reduction)
        return value / n if reduction == "sum" else value

    return Peer(f"liger {reduction}", loss, computes_in_fp32=False)


def quack() -> Peer:
    """quack's cross-entropy, its gradient over the logits in backward."""
    quack_cross_entropy = gpu_function("quack-kernels", "quack.cross_entropy", "cross_entropy")

    def loss(logits: torch.Tensor, labels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        rows = logits.flatten(0, -2)
        return quack_cross_entropy(rows, _shifted(labels), reduction="sum", inplace_backward=True) / n

    return Peer("quack", loss, computes_in_fp32=False)


def gpu_function(package: str, module: str, name: str) -> Callable[..., torch.Tensor]:
    """A function of a package whose kernels run on a GPU only."""
    if not torch.cuda.is_available():
        raise PeerMissing(f"{package} needs a GPU, and none is here")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise PeerMissing(f"needs {package} ({error})") from None


STOCK, COMPILE = "stock", "compile"  # what the ratios are taken to

PEERS: dict[str, Callable[[], Peer]] = {
    STOCK: stock,
    "F.cross_entropy": cross_entropy,
    COMPILE: compile,
    "accumloss": accumloss,
    "accumloss backward": partial(accumloss, "backward"),
    "accumloss forward": partial(accumloss, "forward"),
}

GPU_PEERS: dict[str, Callable[[], Peer]] = {
    **PEERS,
    "accumloss mean": accumloss_mean,
    "liger mean": partial(liger, "mean"),
    "liger sum": partial(liger, "sum"),
    "quack": quack,
}


def available(names: Iterable[str], peers: Mapping[str, Callable[[], Peer]]) -> dict[str, Peer | str]:
    """The competitors of these names, or why one is missing."""
    found: dict[str, Peer | str] = {}
    for name in names:
        try:
            found[name] = peers[name]()
        except PeerMissing as reason:
            found[name] = str(reason)
    return found
