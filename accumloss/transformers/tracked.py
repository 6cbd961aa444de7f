"""Tensors that remember what they are made of where gradients are off: the terms of an evaluation's loss."""

from __future__ import annotations

from typing import Any

import torch

from .._compat import tree_map, without_subclasses


class Tracked(torch.Tensor):
    """A tensor whose operations record a graph, whatever the mode is: of a term of the loss, and of what is made of it.

    Only they do: the model's own operations record nothing, and need no memory for it. ``detach()`` leaves it as it is, since
    the loss of an evaluation is detached on its way.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(untracked, tuple(args)), tree_map(untracked, dict(kwargs or {}))
        if func is torch.Tensor.detach:
            return tracked(args[0])
        if func in _OUT_OF_TORCH:
            return func(args[0].detach(), *args[1:], **kwargs)
        with torch.enable_grad():
            result = func(*args, **kwargs)
        return tree_map(lambda value: tracked(value) if isinstance(value, torch.Tensor) else value, result)


_OUT_OF_TORCH = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist, torch.Tensor.item)


def leaf_and_tracked(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf that gradients are taken of, and what is handed out in the place of the value."""
    leaf = value.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, tracked(leaf.clone())


def tracked(value: torch.Tensor) -> torch.Tensor:
    """The same tensor, tracked where it has a graph."""
    if not value.requires_grad or type(value) is not torch.Tensor:
        return value
    with torch.enable_grad():
        return value.as_subclass(Tracked)


def untracked(value: Any) -> Any:
    """The same, as a plain tensor with its graph; anything else as it is."""
    if not isinstance(value, Tracked):
        return value
    with without_subclasses(), torch.enable_grad():
        return value.as_subclass(torch.Tensor)


def plain(value: Any) -> Any:
    """A value, or a container of values, without graphs."""
    return tree_map(lambda entry: untracked(entry).detach() if isinstance(entry, Tracked) else entry, value)
