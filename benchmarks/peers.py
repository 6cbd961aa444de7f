"""The competitors, one adapter each: loss(logits (1, N, V), labels (1, N), num_items ()) -> () with a gradient.

All compute the causal loss with the shift inside, as a sum divided by num_items, each in its best documented mode.
"""

from __future__ import annotations

from collections.abc import Callable
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
    # False: softmax and sums are rounded to the logits' dtype, and its result is held to that precision only
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


def cross_entropy() -> Peer:
    """F.cross_entropy on the logits as they are, without the copy in fp32."""

    def loss(logits: torch.Tensor, labels: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
        return F.cross_entropy(logits.flatten(0, -2), shifted.flatten(), reduction="sum") / n

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


STOCK, COMPILE = "stock", "compile"  # what the ratios are taken to

PEERS: dict[str, Callable[[], Peer]] = {
    STOCK: stock,
    "F.cross_entropy": cross_entropy,
    COMPILE: compile,
    "accumloss": accumloss,
    "accumloss backward": partial(accumloss, "backward"),
    "accumloss forward": partial(accumloss, "forward"),
}
