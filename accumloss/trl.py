"""In TRL: the functions by which its Trainers take log-probabilities and entropies of tokens, over ours. On the CPU only.

On a GPU, TRL has a kernel of its own. Registering with transformers touches nothing of this, and this nothing of that.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from .checks import FLOATS
from .keywords import checked
from .parallel import is_dtensor
from .per_token import token_log_probs, token_statistics

NAMES = ("selective_log_softmax", "selective_log_softmax_and_entropy", "entropy_from_logits")

_MASKED = -(2**63)  # an index that nobody has

# name -> TRL's function, and ours in its place, while they are registered
_registered: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}


@checked
def register_with_trl() -> None:
    """Puts ours in the places of TRL's ``selective_log_softmax``, ``selective_log_softmax_and_entropy``, ``entropy_from_logits``.

    Wherever a module that is loaded has one of them; what is imported from ``trl.trainer.utils`` later gets ours as well.
    Signatures are theirs, and values within 1e-5. Of 16-bit logits they are fp32, as those of TRL's kernel for GPUs are, where
    TRL's functions on the CPU have the 8 digits of bf16. Logits are read once in forward, and once in backward. What ours has no way for stays TRL's: indices
    (..., K), logits on another device, DTensors. Again: nothing happens. ``unregister_from_trl`` takes it back.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL has none of them under these names.

    Examples:
        >>> accumloss.register_with_trl()  # doctest: +SKIP
        >>> trl.trainer.utils.selective_log_softmax(logits, index)  # doctest: +SKIP
    """
    if _registered:
        return
    try:
        import trl.trainer.utils as utils
    except ImportError as error:
        raise ImportError(
            f"register_with_trl: expected trl, got: {error}; pip install 'accumloss[trainers]'"
        ) from error

    missing = [name for name in NAMES if not callable(vars(utils).get(name))]
    if missing:
        raise RuntimeError(
            f"register_with_trl: expected {', '.join(NAMES)} in trl.trainer.utils, got none of the name {missing[0]}; TRL 1.14 "
            "to 1.16 have them"
        )
    makers = (_selective_log_softmax, _selective_log_softmax_and_entropy, _entropy_from_logits)
    for name, make in zip(NAMES, makers, strict=True):
        theirs = vars(utils)[name]
        _registered[name] = theirs, functools.wraps(theirs)(make(theirs))
    _rebind({id(theirs): ours for theirs, ours in _registered.values()})


@checked
def unregister_from_trl() -> None:
    """Gives TRL its functions back, in every module. Nothing happens where none are registered.

    Examples:
        >>> accumloss.unregister_from_trl()
    """
    _rebind({id(ours): theirs for theirs, ours in _registered.values()})
    _registered.clear()


def _rebind(others: dict[int, Callable[..., Any]]) -> None:
    """Binds the names of all loaded modules that are bound to a key to its value."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name in NAMES:
            other = others.get(id(names.get(name)))
            if other is not None and module.__name__ != __name__:
                setattr(module, name, other)


def _takes(logits: Any, index: Any = None, row_mask: Any = None) -> bool:
    """Whether ours has a way for these: whatever else is given is TRL's, errors included."""
    if not isinstance(logits, torch.Tensor) or is_dtensor(logits) or not logits.is_cpu or logits.dtype not in FLOATS:
        return False
    rows = logits.shape[:-1]
    if logits.dim() < 2 or logits.shape[-1] < 1:
        return False
    for given in (index, row_mask):
        if given is not None and (not isinstance(given, torch.Tensor) or not given.is_cpu or given.shape != rows):
            return False
    return index is None or index.dtype == torch.int64


def _labels(index: torch.Tensor, row_mask: torch.Tensor | None) -> torch.Tensor:
    return index if row_mask is None else index.masked_fill(row_mask == 0, _MASKED)


def _selective_log_softmax(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def selective_log_softmax(
        logits: torch.Tensor,  # (..., V)
        index: torch.Tensor,  # (...), or (..., K)
        temperature: float = 1.0,
        row_mask: torch.Tensor | None = None,  # (...)
    ) -> torch.Tensor:
        if not _takes(logits, index, row_mask) or not temperature > 0:
            return theirs(logits, index, temperature=temperature, row_mask=row_mask)
        return token_log_probs(logits, _labels(index, row_mask), float(temperature), ignore_index=_MASKED)

    return selective_log_softmax


def _selective_log_softmax_and_entropy(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def selective_log_softmax_and_entropy(
        logits: torch.Tensor,  # (..., V)
        index: torch.Tensor,  # (...)
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: torch.Tensor | None = None,  # (...)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _takes(logits, index, row_mask) or not temperature > 0:
            return theirs(
                logits, index, entropy_requires_grad=entropy_requires_grad, temperature=temperature, row_mask=row_mask
            )
        found = token_statistics(logits, _labels(index, row_mask), float(temperature), ignore_index=_MASKED)
        entropy = found.entropy if entropy_requires_grad else found.entropy.detach()
        return found.log_prob, entropy

    return selective_log_softmax_and_entropy


def _entropy_from_logits(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def entropy_from_logits(logits: torch.Tensor, chunk_size: int = 128) -> torch.Tensor:
        if not _takes(logits):
            return theirs(logits, chunk_size=chunk_size)
        index = torch.zeros(logits.shape[:-1], dtype=torch.int64)  # whichever: the entropy has no label
        return token_statistics(logits, index).entropy

    return entropy_from_logits
