"""Names inside of transformers' modeling modules that are bound to functions of ours.

torch itself stays as it is: patches of torch.nn.functional are bypassed by the compiler for a loss that is made in forward,
while a name that a modeling module looks up is honoured everywhere. A module is rebound when a Trainer first trains a model
of it, whenever it was imported, and gets its own objects back when accumloss is unregistered.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import heads
from . import step as steps
from .registration import Names, registration

# Means over the tokens that pass through a router, coupled over them: no split of them is exact. Each micro-batch's weighs
# as much as its tokens do in the step.
ROUTER_LOSSES = ("load_balancing_loss_func", "router_z_loss_func")

CRITERIA = "transformers.loss.loss_"  # of detection: classes that LOSS_MAPPING's functions make
PREFIXES = ("transformers.", "transformers_modules.")  # the latter: code that comes with a checkpoint


def rebind_modules_of(model: Any) -> None:
    """Rebinds the modeling modules that a model's classes come from, those of its parts included."""
    patches = registration.names
    if model in patches.objects:
        return
    patches.objects.add(model)
    for part in model.modules():
        _replace_class(patches, part)
        for value in vars(part).values():
            for entry in value.values() if isinstance(value, dict) else ():
                _replace_class(patches, entry)  # losses by name, in a dictionary that is no ModuleDict
    names = {cls.__module__ for part in model.modules() for cls in type(part).__mro__}
    names |= {name for name in sys.modules if name.startswith(CRITERIA) and not name.endswith(".loss_utils")}
    for name in names - patches.modules:
        patches.modules.add(name)
        module = sys.modules.get(name)
        if module is None or not name.startswith(PREFIXES):
            continue
        for bound_as, theirs in list(vars(module).items()):
            ours = _replacement(bound_as, theirs)
            if ours is not None:
                patches.bind(module, bound_as, ours)
            elif isinstance(theirs, type) and theirs.__module__ == name:
                for method, wrap in METHODS.items():
                    function = vars(theirs).get(method)
                    if function is not None and (method != "get_loss" or "num_boxes" in function.__code__.co_varnames):
                        patches.bind(theirs, method, wrap(function))


def _replace_class(patches: Names, loss: Any) -> None:
    ours = heads.CLASSES.get(type(loss).__name__)
    if ours is not None and type(loss) is getattr(torch.nn, ours.__name__):
        patches.bind(loss, "__class__", ours)


def _replacement(name: str, theirs: Any) -> Any:
    """What a name of a modeling module is bound to instead; None where it stays."""
    if name in ROUTER_LOSSES and callable(theirs):
        return _weighted_by_tokens(theirs)
    if isinstance(theirs, ModuleType):
        return _nn() if theirs is torch.nn else _functional() if theirs is torch.nn.functional else None
    for classes, owner in ((heads.CLASSES, torch.nn), (heads.FUNCTIONS, torch.nn.functional)):
        for their_name, ours in classes.items():
            if theirs is getattr(owner, their_name):
                return ours
    return None


@functools.cache
def _functional() -> ModuleType:
    """torch.nn.functional with our losses in it."""
    return _copy(torch.nn.functional, heads.FUNCTIONS)


@functools.cache
def _nn() -> ModuleType:
    """torch.nn with our losses in it."""
    return _copy(torch.nn, {**heads.CLASSES, "functional": _functional()})


def _copy(module: ModuleType, changed: dict[str, Any]) -> ModuleType:
    copy = ModuleType(module.__name__, module.__doc__)
    vars(copy).update(vars(module))
    vars(copy).update(changed)
    return copy


def _times(share: Callable[[steps.Step], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a mean so that inside of a step its result is the part of it that share says."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def weighed(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            return steps.part(value, share) if steps.is_active and isinstance(value, torch.Tensor) else value

        return weighed

    return wrap


_weighted_by_tokens = _times(lambda step: step.share_of_tokens())


def _over_boxes(get_loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_loss)
    def over_boxes(self: Any, loss: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any, *more: Any) -> Any:
        if steps.is_active:
            num_boxes = num_boxes * steps.share(lambda step: step.objects_of_the_step())
        return get_loss(self, loss, outputs, targets, indices, num_boxes, *more)

    return over_boxes


def _masks_of_the_step(get_num_masks: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_num_masks)
    def masks_of_the_step(*args: Any, **kwargs: Any) -> Any:
        num_masks = get_num_masks(*args, **kwargs)
        return num_masks * steps.share(lambda step: step.objects_of_the_step()) if steps.is_active else num_masks

    return masks_of_the_step


METHODS: dict[str, Callable[..., Any]] = {
    # detection and instance segmentation: sums over boxes or masks, divided by how many the micro-batch has
    "get_loss": _over_boxes,
    "get_num_masks": _masks_of_the_step,
    # TimesFM: a mean over rows of one size, beside a loss of PyTorch's
    "_quantile_loss": _times(lambda step: step.share_of_rows()),
}
