"""What a model says of each token, and losses over it: for reinforcement learning, weighting and distillation.

``token_losses``, ``token_log_probs`` and ``token_statistics`` have one number for each row, of any incoming gradient. The
logits are read once in forward, and once in backward, which writes their gradient; nothing of their size is made besides.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch

from . import linear, ops, reference
from .arguments import check_in_place, check_shift, check_tensors, of_op, refuse_functorch
from .keywords import checked
from .options import LossOptions, options_of
from .parallel import is_dtensor

InPlace = Literal[False, "backward"]


class TokenStatistics(NamedTuple):
    """Of each row, in the shape of labels; the first three carry gradients. Rows that are ignored: 0, and -1 for argmax."""

    log_prob: torch.Tensor  # (...) of the label, nats; fp32, or fp64 for fp64 logits
    entropy: torch.Tensor  # (...) of the distribution, nats; as log_prob
    lse: torch.Tensor  # (...) logsumexp of the logits over the temperature; fp64
    argmax: torch.Tensor  # (...) int64, the first of the largest logits


@checked
def token_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    shift: int = 0,
    inplace: InPlace = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """The loss of each row, differentiable for any incoming gradient.

    Equivalent to, without the copies::

        F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, of any strides.
        labels: (...) int64 or int32, class indices or ignore_index.
        weight: (V,) class weights of any floating dtype, or None.
        shift: row (..., t) reads label (..., t + shift); its loss stands at (..., t).
        inplace: "backward" writes the gradient over the logits, which saves a buffer of their size.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.

    Returns:
        (...) fp32, or fp64 for fp64 logits; 0 where a row is ignored, which is not read. A row to which the gradient 0 comes
        back is not read in backward.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as cross_entropy. DTensors are refused.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> [round(loss, 4) for loss in token_losses(logits, torch.tensor([0, 1, -100])).tolist()]
        [0.1269, 0.3133, 0.0]
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return _statistics("token_losses", logits, labels, weight, shift, options, inplace, metrics=False)[0]


@checked
def token_log_probs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    *,
    shift: int = 0,
    inplace: InPlace = False,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The log-probability of each label, to 8 units relative at any confidence.

    Equivalent to, without the copies::

        (logits.float() / temperature).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, of any strides.
        labels: (...) int64 or int32, class indices or ignore_index.
        temperature: the logits are divided by it, > 0.
        shift, inplace: see token_losses.
        ignore_index: rows with this label have a log-probability of 0 and no gradient, and are not read.

    Returns:
        (...) fp32, or fp64 for fp64 logits. In bf16 two of them would not tell a policy from its update.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as cross_entropy. DTensors are refused.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 60.0]])
        >>> token_log_probs(logits, torch.tensor([1, 1])).tolist()
        [-2.1269280910491943, -8.756510562294064e-27]
    """
    options = _at_temperature("token_log_probs", temperature, ignore_index)
    nll = _statistics("token_log_probs", logits, labels, None, shift, options, inplace, metrics=False)[1]
    return 0.0 - nll  # -nll would have -0 in rows that are ignored


@checked
def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    *,
    shift: int = 0,
    inplace: InPlace = False,
    ignore_index: int = -100,
) -> TokenStatistics:
    """Log-probability of the label, entropy, lse and argmax of each row, from one visit of the logits.

    Equivalent to, without the copies::

        z = logits.float() / temperature
        log_p = z.log_softmax(-1)
        log_prob = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        lse, argmax = z.logsumexp(-1), z.argmax(-1)

    Any of the first three may be differentiated, and all of them cost one backward. The temperature concerns all of them.
    Arguments and errors are those of token_log_probs.

    Example:
        >>> found = token_statistics(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
        >>> round(found.entropy.item(), 4), round(found.lse.item(), 4), found.argmax.item()
        (0.3655, 2.1269, 0)
    """
    options = _at_temperature("token_statistics", temperature, ignore_index)
    _, nll, lse, entropy, argmax = _statistics(
        "token_statistics", logits, labels, None, shift, options, inplace, metrics=True
    )
    return TokenStatistics(0.0 - nll, entropy, lse, argmax)


@checked
def linear_token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    *,
    bias: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    max_scratch_bytes: int = linear.MAX_SCRATCH_BYTES,
) -> torch.Tensor:
    """token_log_probs of ``F.linear(hidden, weight, bias)``, chunk by chunk: the logits never exist as a whole.

    Forward is one product. Backward makes the logits of a chunk again and three products of it; rows that are ignored, and
    those to which the gradient 0 comes back, take part in none. A weight, bias or hidden that needs no gradient costs none.

    Args:
        hidden: (..., H) bf16, fp16, fp32 or fp64.
        weight: (V, H) of hidden's dtype: the head's.
        labels, temperature, shift, ignore_index: see token_log_probs.
        bias: (V,) of hidden's dtype, or None.
        max_scratch_bytes: memory beside inputs and gradients; see linear_cross_entropy.

    Returns:
        (...) fp32, or fp64 for fp64 hidden states.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as linear_cross_entropy. DTensors and torch.compile are refused.

    Example:
        >>> hidden, head = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> [round(value, 4) for value in linear_token_log_probs(hidden, head, torch.tensor([0, -100])).tolist()]
        [-0.1269, 0.0]
    """
    name = "linear_token_log_probs"
    check_tensors(name, ("hidden (..., H)", hidden), ("weight (V, H)", weight), ("labels (...)", labels))
    check_shift(name, shift)
    refuse_functorch(name, hidden, weight, labels, bias)
    refuse_dtensors(name, hidden, weight, labels, bias)
    options = _at_temperature(name, temperature, ignore_index)
    options.check(name, ops.accumulation_dtype(hidden))
    labels = reference.shift_labels(labels, shift, ignore_index) if labels.dim() else labels
    kwargs = {**options.as_kwargs(), "metrics": False}
    return 0.0 - linear.token_rows(name, hidden, weight, labels, bias, None, kwargs, max_scratch_bytes)[1]


def _at_temperature(name: str, temperature: float, ignore_index: int) -> LossOptions:
    is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not is_number or not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{name}: expected a finite number > 0 for temperature, got {temperature!r}")
    return options_of(ignore_index, 0.0, 0.0, 0.0, 1.0 / temperature)


def _statistics(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    shift: int,
    options: LossOptions,
    inplace: InPlace,
    metrics: bool,
) -> tuple[torch.Tensor, ...]:
    """The outputs of the op of that name."""
    check_tensors(name, ("logits (..., V)", logits), ("labels (...)", labels))
    check_shift(name, shift)
    refuse_functorch(name, logits, labels, weight)
    refuse_dtensors(name, logits, labels, weight)
    options.check(name, ops.accumulation_dtype(logits))
    kwargs = of_op(options, shift, metrics)
    if inplace not in (False, "backward"):
        raise ValueError(f'{name}: expected False or "backward" for inplace, got {inplace!r}')
    if inplace and torch.is_grad_enabled() and logits.requires_grad:
        check_in_place(name, logits, inplace)
        return ops.TokenStatisticsInPlace.apply(logits, labels, weight, kwargs)
    return ops.token_statistics(logits, labels, weight, **kwargs)


def refuse_dtensors(name: str, *tensors: Any) -> None:
    for tensor in tensors:
        if tensor is not None and is_dtensor(tensor):
            raise ValueError(
                f"{name}: expected plain tensors, got a DTensor; pass logits.to_local() and the labels of its rows where "
                "rows are shared out, logits.full_tensor() where classes are"
            )
