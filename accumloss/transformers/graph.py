"""What the graph of autograd says of a loss: what is between it and the values that it was made of."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from .._compat import function_of, is_mean_of_scalar
from ..parallel import is_dtensor

TRUSTED = ("torch", "accumloss", "accelerate", "transformers", "deepspeed")  # whose functions' backward may run twice
# the beginnings of the names of nodes
LINEAR = (
    "Add", "Sub", "Rsub", "Neg", "Mul", "Div", "Sum", "Mean", "Stack", "Cat", "Squeeze", "Unsqueeze", "View", "Reshape",
    "UnsafeView", "Expand", "Select", "Slice", "Index", "Masked", "Where", "Clone", "Alias", "ToCopy", "Copy", "Unbind",
    "Split", "Permute", "Transpose", "TBackward", "AsStrided", "torch::autograd::CopySlices",
)  # fmt: skip


def node_of(value: torch.Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(value).node


class Graph:
    """The graph of a loss, walked from it to these values, and elsewhere no further than to so many nodes.

    Attributes:
        values: what the loss was made of, as far as it is known.
    """

    def __init__(self, loss: torch.Tensor, values: Sequence[torch.Tensor], most: int = 2000):
        self.values = values
        ends = {node_of(value) for value in values}
        root: Any = loss.grad_fn
        self._users: dict[Any, list[Any]] = {root: []}
        self._places: dict[Any, int] = {}
        waiting = deque([root])
        while waiting and len(self._places) < most:
            node = waiting.popleft()
            self._places[node] = len(self._places)
            for following, _ in node.next_functions if node not in ends else ():
                if following is None:
                    continue
                if following not in self._users:
                    waiting.append(following)
                self._users.setdefault(following, []).append(node)

    def way_to(self, value: torch.Tensor) -> list[Any] | None:
        """The nodes between the loss and a value, the loss's first; None: the value was not reached."""
        wanted = node_of(value)
        if wanted not in self._users:
            return None
        found: set[Any] = set()
        waiting = [wanted]
        while waiting:
            for node in self._users[waiting.pop()]:
                if node not in found:
                    found.add(node)
                    waiting.append(node)
        return sorted(found, key=self._places.__getitem__)

    def is_averaged(self, value: torch.Tensor) -> bool:
        """Whether there is a division or a mean on the way to a value: with a single row or item it cannot be seen from its
        coefficient."""
        way = self.way_to(value)
        return way is None or any(_is_division(node) for node in way)

    def divisors(self, value: torch.Tensor) -> list[float]:
        """The numbers that a value is divided by on its way to the loss, or multiplied by one over; the last first."""
        return [number for node in self.way_to(value) or () for number in _divisors_of(node)]

    def multipliers(self, value: torch.Tensor) -> list[float]:
        """The numbers that a value is multiplied by on its way to the loss."""
        return [
            number
            for node in self.way_to(value) or ()
            if node.name().startswith("Mul")
            for name in ("_saved_other", "_saved_self")
            for number in _saved(node, name)
        ]

    def is_divided_by(self, value: torch.Tensor, number: Any) -> bool:
        """Whether the graph shows a division of a value by this number."""
        return any(is_near(divisor, float(number)) for divisor in self.divisors(value))

    def divisors_of_itself(self, value: torch.Tensor) -> list[float]:
        """The numbers that a value is divided by before it is put beside others like it."""
        found: list[float] = []
        for node in reversed(self.way_to(value) or ()):
            if node.name().startswith(("Add", "Stack", "Cat")):
                break
            found += _divisors_of(node)
        return found

    def is_linear(self, value: torch.Tensor) -> bool:
        """Whether nothing on the way from a value to the loss does more than to weigh, to add and to arrange."""
        return all(node.name().startswith(LINEAR) for node in self.way_to(value) or ())

    def is_added_up(self, value: torch.Tensor) -> bool:
        """Whether the graph shows that a value is put beside others like it, or is the first and only one of them: it is added
        to a number (``total = 0``, ``sum()``), or one of a stack."""
        return any(
            node.name().startswith(("Stack", "Cat"))
            or (node.name().startswith("Add") and any(following is None for following, _ in node.next_functions))
            for node in self.way_to(value) or ()
        )

    def function_between(self) -> type | None:
        """An autograd.Function of somebody's own that a gradient of the loss by the values would run through."""
        for value in self.values:
            for node in reversed(self.way_to(value) or ()):  # the nearest to the value first
                function = function_of(node)
                if function is not None and function.__module__.partition(".")[0] not in TRUSTED:
                    return function
        return None


def is_near(number: float, other: float) -> bool:
    return abs(number - other) <= 1e-6 * abs(other)


def _divisors_of(node: Any) -> list[float]:
    if node.name().startswith("Div"):
        return _saved(node, "_saved_other")
    if node.name().startswith("Mul"):
        return [1 / number for name in ("_saved_other", "_saved_self") for number in _saved(node, name, True)]
    return [_size_of_mean(node)] if _is_division(node) else []


def _is_division(node: Any) -> bool:
    return node.name().startswith(("Div", "Mean")) and not is_mean_of_scalar(node)


def _saved(node: Any, name: str, is_tensor: bool = False) -> list[float]:
    """A number that a node has kept for its backward; none where it was written over since. is_tensor: only one that was a
    tensor, and no number of Python's, which autograd keeps in fp64."""
    try:
        kept = getattr(node, name, None)
    except RuntimeError:
        return []
    # of a DTensor the ranks would have to meet
    if not isinstance(kept, torch.Tensor) or is_dtensor(kept) or kept.is_complex() or kept.numel() != 1:
        return []
    if is_tensor and kept.dtype == torch.float64:
        return []
    number = float(kept.detach())
    return [number] if math.isfinite(number) and number != 0 else []


def _size_of_mean(node: Any) -> float:
    """How many numbers a mean is of."""
    sizes = tuple(getattr(node, "_saved_self_sym_sizes", ()))
    dims = getattr(node, "_saved_dim", None) or range(len(sizes))
    signed = [dim - 2**64 if dim >= 2**63 else dim for dim in dims]  # autograd keeps a negative one so
    return float(math.prod(int(sizes[dim]) for dim in signed))
