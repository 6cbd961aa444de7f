"""Sums over tokens: what leaves a kernel, and what is added up over a whole optimizer step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class TokenSums:
    """Sums over the items (non-ignored labels) of one or more calls. Add them with ``+``; take a mean once, at the end.

    Every field is a 0-dim tensor on the logits' device. ``loss_sum`` carries a gradient, and ``total_weight`` that of the
    tokens' weights where those want one.

    Attributes:
        loss_sum: sum of the row losses; fp32, or fp64 for fp64 logits.
        num_items: number of items, int64.
        total_weight: sum of the items' weights, of their class times of their token (ATen's name for the divisor of a
            weighted mean); equals ``num_items`` where there are no weights.
        num_correct: items whose label is the argmax of the logits, int64; None without ``metrics=True``.
        entropy_sum: sum of the rows' entropies in nats; None without ``metrics=True``.
        z_loss_sum: what of ``loss_sum`` is the z-loss, with a gradient of its own; None without ``z_loss``, and from hidden
            states or a vocabulary that processes share.

    Examples:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 1, 1])
        >>> parts = [accumloss.cross_entropy(logits[i:j], labels[i:j]) for i, j in ((0, 1), (1, 3))]
        >>> sums = sum(parts)  # of two micro-batches, one of 1 row and one of 2
        >>> sums.num_items.item(), round(sums.mean_loss.item(), 4), round(sums.perplexity.item(), 4)
        (3, 0.3778, 1.459)
    """

    loss_sum: torch.Tensor
    num_items: torch.Tensor
    total_weight: torch.Tensor
    num_correct: torch.Tensor | None = None
    entropy_sum: torch.Tensor | None = None
    z_loss_sum: torch.Tensor | None = None

    def __add__(self, other: TokenSums) -> TokenSums:
        if not isinstance(other, TokenSums):
            return NotImplemented
        return TokenSums(
            self.loss_sum + other.loss_sum,
            self.num_items + other.num_items,
            self.total_weight + other.total_weight,
            _add(self.num_correct, other.num_correct),
            _add(self.entropy_sum, other.entropy_sum),
            _add(self.z_loss_sum, other.z_loss_sum),
        )

    def __radd__(self, other: int) -> TokenSums:
        return self if other == 0 else NotImplemented  # the start value of sum()

    def __truediv__(self, other: object) -> TokenSums:
        raise TypeError(f"TokenSums: expected no division of sums, got one; a mean is taken once, at the end: {_MEANS}")

    def __getattr__(self, name: str) -> Any:
        """What sums have not, and a loss would: told, with what stands for it."""
        if name in _OF_A_LOSS:
            raise AttributeError(
                f"TokenSums: expected an attribute of sums, got {name!r}, which is a loss's; {_MEANS}",
                name=name,
                obj=self,
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def detach(self) -> TokenSums:
        """The same sums without the graph of the loss."""
        z_loss_sum = None if self.z_loss_sum is None else self.z_loss_sum.detach()
        loss_sum, total_weight = self.loss_sum.detach(), self.total_weight.detach()
        return replace(self, loss_sum=loss_sum, total_weight=total_weight, z_loss_sum=z_loss_sum)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> TokenSums:
        """The sums over all ranks of a process group, by one all_reduce in the widest dtype of their device, fp64 almost everywhere; the result carries no gradient.

        Without a process group, in a process by itself, these are the sums. Every rank must have metrics, or none. Counts
        are exact to 2**53.
        """
        if not is_distributed():
            return self.detach()
        present = {field.name: getattr(self, field.name) for field in fields(self)}
        present = {name: value for name, value in present.items() if value is not None}
        packed = torch.stack([widened(value.detach()) for value in present.values()])
        dist.all_reduce(packed, group=group)
        reduced = zip(present.items(), packed.unbind(), strict=True)
        return replace(self, **{name: total.to(value.dtype) for (name, value), total in reduced})

    @property
    def mean_loss(self) -> torch.Tensor:
        """``loss_sum / total_weight``, 0 where there is no item. 0-dim; carries the gradient of ``loss_sum``."""
        return self.loss_sum / at_least_one(self.total_weight)

    @property
    def perplexity(self) -> torch.Tensor:
        """``exp(mean_loss)``, 0-dim."""
        return self.mean_loss.exp()

    @property
    def accuracy(self) -> torch.Tensor:
        """Share of the items whose label is the argmax of the logits, 0-dim. Raises ValueError without metrics."""
        return self._metric(self.num_correct, "accuracy") / self.num_items.clamp(min=1)

    @property
    def mean_entropy(self) -> torch.Tensor:
        """Mean entropy of the predicted distributions, nats, 0-dim. Raises ValueError without metrics."""
        return self._metric(self.entropy_sum, "mean_entropy") / self.num_items.clamp(min=1)

    @staticmethod
    def _metric(value: torch.Tensor | None, name: str) -> torch.Tensor:
        if value is None:
            raise ValueError(f"TokenSums.{name}: expected sums from cross_entropy(..., metrics=True), got none")
        return value


_OF_A_LOSS = ("backward", "item", "loss", "mean", "grad_fn", "requires_grad")
_MEANS = (
    "sums.mean_loss is the mean of these items, sums.loss_sum their sum, and Accumulator.backward(sums) takes the sums of a "
    "micro-batch as they are"
)


def is_distributed() -> bool:
    """Whether this process is one of a group."""
    return dist.is_available() and dist.is_initialized()


# Types of devices on which torch has no float64 at all.
WITHOUT_FLOAT64 = {"mps"}


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device, in which sums are added up and lse is kept: float64, where there is one."""
    if device.type == "xpu":
        return torch.float64 if _xpu_has_float64(device.index) else torch.float32
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(wide_dtype(tensor.device))


@functools.cache
def _xpu_has_float64(index: int | None) -> bool:
    return torch.xpu.get_device_properties(index).has_fp64


def at_least_one(total: torch.Tensor) -> torch.Tensor:
    """What a sum may be divided by: the items or weights themselves, 1 where there are none and every sum is 0."""
    return torch.where(total == 0, torch.ones_like(total), total)


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a + b
