"""Names that are bound to functions of ours, wherever the code of a training step lives.

That are the modules of the model's classes, of the Trainer's classes, of its compute_loss and compute_loss_func, and what
those import from their own package. torch itself stays as it is: patches of torch.nn.functional are bypassed by the
compiler for a loss that is made in forward, while a name that a module looks up is honoured everywhere. Where a module says
``torch.nn.functional.cross_entropy`` in full, its name ``torch`` is bound to a stand-in. A module is rebound when a Trainer
first trains with it, whenever it was imported, and gets its own objects back when accumloss is unregistered.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from .._compat import ASKS_FOR_RANKS
from . import heads
from . import step as steps
from .coupled import ROUTER_LOSSES
from .registration import registration

CRITERIA = "transformers.loss.loss_"  # of detection: classes that LOSS_MAPPING's functions make
# packages whose modules stay as they are: PyTorch, Trainer itself, and what computes no loss
LEFT_ALONE = ("torch", "accumloss", "accelerate", "peft", "numpy", "builtins", "typing", "abc", "functools", "pytest")
TRAINER = ("transformers.trainer", "transformers.trainer_pt_utils", "transformers.trainer_callback")


def rebind_for(trainer: Any, model: Any) -> None:
    """Rebinds what a Trainer's step computes its loss with: names in modules, and criteria that somebody holds."""
    given = trainer.compute_loss_func
    if trainer not in registration.names.objects or _given.get(trainer) is not given:
        registration.names.objects.add(trainer)
        _given[trainer] = given
        functions = [getattr(trainer, "compute_loss", None), getattr(trainer, "label_smoother", None)]
        functions += _parts_of(given)
        owners = [type(trainer), *functions, *map(type, functions)]
        members = [member for cls in type(trainer).__mro__ for member in vars(cls).values()]
        held = list(_closed_over(*members, *functions))
        _rebind_modules(_modules_of(*type(trainer).__mro__, *owners, *held))
        for value in (trainer, *functions, *held):
            if not isinstance(value, (FunctionType, type)):
                _rebind_held(value)
    rebind_modules_of(model)


_given: weakref.WeakKeyDictionary[Any, Any] = (
    weakref.WeakKeyDictionary()
)  # Trainer -> its compute_loss_func when it was looked at


def _parts_of(function: Any) -> list[Any]:
    """A function, and what it is put together from: of a partial its function and arguments, of a method its object."""
    parts: list[Any] = []
    waiting = [function]
    while waiting:
        part = waiting.pop()
        if part is None or len(parts) > MANY:
            continue
        parts.append(part)
        if isinstance(part, functools.partial):
            waiting += [part.func, *part.args, *part.keywords.values()]
        elif hasattr(part, "__self__") and not isinstance(part.__self__, ModuleType):
            waiting += [part.__self__, getattr(part, "__func__", None)]
    return parts


def _rebind_held(holder: Any) -> None:
    """Criteria and functions that an object holds, and that it is: a module with those of its parts."""
    if _is_left_alone(type(holder).__module__) and not isinstance(holder, torch.nn.Module):
        return
    for part in holder.modules() if isinstance(holder, torch.nn.Module) else [holder]:
        _replace_class(part)
        if hasattr(part, "__dict__"):
            _rebind_values(part, vars(part))


def rebind_modules_of(model: Any) -> None:
    """Rebinds the modules that a model's classes come from, those of its parts included, and the criteria in it."""
    names = registration.names
    if model in names.objects:
        return
    names.objects.add(model)
    _rebind_held(model)
    modules = _modules_of(*(cls for part in model.modules() for cls in type(part).__mro__))
    modules |= {name for name in sys.modules if name.startswith(CRITERIA) and not name.endswith(".loss_utils")}
    _rebind_modules(modules)


def _modules_of(*objects: Any) -> set[str]:
    """The modules that classes and functions were defined in."""
    found = (getattr(value, "__module__", None) for value in objects)
    return {name for name in found if isinstance(name, str)}


def _closed_over(*functions: Any) -> Iterator[Any]:
    """The functions and criteria that others hold from where they were defined: a loss that was handed to who makes a
    Trainer's class."""
    for function in functions:
        function = getattr(function, "__func__", function)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                held = cell.cell_contents
            except ValueError:  # it is not filled yet
                continue
            if isinstance(held, (FunctionType, torch.nn.Module)):
                yield held


def _is_left_alone(name: str) -> bool:
    return name in TRAINER or name.partition(".")[0] in LEFT_ALONE


def _rebind_modules(names: set[str]) -> None:
    """Rebinds modules, and those of the same package that their functions and classes come from."""
    patches, waiting = registration.names, set(names)
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in patches.modules or module is None or _is_left_alone(name):
            continue
        patches.modules.add(name)
        package = name.partition(".")[0]
        spells_out = False
        for bound_as, theirs in list(vars(module).items()):
            if package == "transformers" and bound_as in ASKS_FOR_RANKS:  # of detection: the step counts over the ranks
                ours = ASKS_FOR_RANKS[bound_as](theirs, steps.is_counted)
            else:
                ours = _replacement(bound_as, theirs)
            if ours is not None:
                patches.bind(module, bound_as, ours)
                continue
            _replace_class(theirs)
            if isinstance(theirs, (type, FunctionType)):
                if theirs.__module__ == name:
                    spells_out = spells_out or any(_spells_out(code) for code in _codes(theirs))
                elif package != "transformers":  # modeling files are reached by the classes of a model
                    waiting |= {m for m in _modules_of(theirs) if m.partition(".")[0] == package}
            if isinstance(theirs, type) and theirs.__module__ == name and package.startswith("transformers"):
                for method, wrap in METHODS.items():
                    function = vars(theirs).get(method)
                    if function is not None and (method != "get_loss" or "num_boxes" in function.__code__.co_varnames):
                        patches.bind(theirs, method, wrap(function))
        if spells_out:
            for bound_as, theirs in list(vars(module).items()):
                if theirs is torch:
                    patches.bind(module, bound_as, _torch())


def _codes(value: Any) -> Iterator[CodeType]:
    """The code of a function, or of the methods of a class, and of what is defined inside."""
    if isinstance(value, type):
        members = [getattr(member, "__func__", member) for member in vars(value).values()]
        members = [getattr(member, "fget", member) for member in members]
        for member in members:
            if isinstance(member, type) and member.__module__ == value.__module__ and member is not value:
                yield from _codes(member)
        functions = [member for member in members if isinstance(member, FunctionType)]
    else:
        functions = [value]
    codes = [getattr(inspect.unwrap(function), "__code__", None) for function in functions]
    waiting = [code for code in codes if code is not None]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def losses_of(cls: type) -> tuple[str, ...]:
    """PyTorch's losses that the forward of a class names, or functions of its module that it calls."""
    known = {*heads.FUNCTIONS, *heads.CLASSES}
    functions = [vars(base)["forward"] for base in cls.__mro__ if "forward" in vars(base)][:1]
    found: set[str] = set()
    seen: set[Any] = set()
    while functions:
        function = inspect.unwrap(functions.pop())
        if function in seen or not isinstance(function, FunctionType):
            continue
        seen.add(function)
        names = {name for code in _codes(function) for name in code.co_names}
        found |= names & known
        module = vars(sys.modules.get(function.__module__, torch))
        functions += [module[name] for name in names if isinstance(module.get(name), FunctionType)]
        functions += [value for name in names if isinstance(value := getattr(cls, name, None), FunctionType)]
    return tuple(sorted(found))


def criteria_of(module: torch.nn.Module) -> set[str]:
    """PyTorch's losses that a module holds as parts of its own, by the names of their classes."""
    names = {
        type(part).__name__ for part in module.modules() if type(part) is getattr(torch.nn, type(part).__name__, None)
    }
    ours = {type(part).__name__ for part in module.modules() if type(part) in heads.CLASSES.values()}
    return (names & set(heads.CLASSES)) | ours


def _spells_out(code: CodeType) -> bool:
    """Whether code may say torch.nn.functional.cross_entropy, or torch.nn.CrossEntropyLoss."""
    names = set(code.co_names)
    return {"torch", "nn"} <= names and not names.isdisjoint({*heads.FUNCTIONS, *heads.CLASSES})


def _rebind_values(owner: Any, values: Mapping[str, Any]) -> None:
    """Criteria and functions that an object holds, in containers of its own too."""
    for name, value in list(values.items()):
        if isinstance(value, dict):
            held = list(value.values())
        elif isinstance(value, (list, tuple, set)):
            held = list(value) if len(value) <= MANY else []
        else:
            ours = _stand_in_for_function(value)
            if ours is not None:
                registration.names.bind(owner, name, ours)
            held = [value]
        for entry in held:
            _replace_class(entry)


MANY = 64  # a longer list of an object's holds its data and not its criteria


def _replace_class(loss: Any) -> None:
    ours = heads.CLASSES.get(type(loss).__name__)
    if ours is not None and type(loss) is getattr(torch.nn, ours.__name__):
        registration.names.bind(loss, "__class__", ours)


def _replacement(name: str, theirs: Any) -> Any:
    """What a name of a module is bound to instead; None where it stays."""
    if name in ROUTER_LOSSES and callable(theirs):
        return _weighted_by_tokens(theirs)
    if isinstance(theirs, ModuleType):
        return _nn() if theirs is torch.nn else _functional() if theirs is torch.nn.functional else None
    if isinstance(theirs, type):
        ours = heads.CLASSES.get(theirs.__name__)
        return ours if ours is not None and theirs is getattr(torch.nn, theirs.__name__, None) else None
    return _stand_in_for_function(theirs)


def _stand_in_for_function(theirs: Any) -> Any:
    """Ours for one of PyTorch's losses, or for a partial of one."""
    if isinstance(theirs, functools.partial):
        ours = _stand_in_for_function(theirs.func)
        return None if ours is None else functools.partial(ours, *theirs.args, **theirs.keywords)
    name = getattr(theirs, "__name__", None)
    ours = heads.FUNCTIONS.get(name) if isinstance(name, str) else None
    return ours if ours is not None and theirs is getattr(torch.nn.functional, ours.__name__) else None


@functools.cache
def _functional() -> ModuleType:
    """torch.nn.functional with our losses in it."""
    return _copy(torch.nn.functional, heads.FUNCTIONS)


@functools.cache
def _nn() -> ModuleType:
    """torch.nn with our losses in it."""
    return _copy(torch.nn, {**heads.CLASSES, "functional": _functional()})


@functools.cache
def _torch() -> ModuleType:
    """torch with our torch.nn in it."""
    return _copy(torch, {"nn": _nn()})


def _copy(module: ModuleType, changed: dict[str, Any]) -> ModuleType:
    """A module of the same names, but for those that are changed; what is imported into the original later is there too."""
    copy = ModuleType(module.__name__, module.__doc__)
    vars(copy).update(vars(module))
    vars(copy).update(changed)
    vars(copy)["__getattr__"] = functools.partial(getattr, module)
    return copy


def _times(share: Callable[[steps.Step], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a mean so that inside of a step its result is the part of it that share says."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def weighed(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            if not steps.is_counted() or not isinstance(value, torch.Tensor):
                return value
            return steps.part(value, share, function.__name__)

        return weighed

    return wrap


_weighted_by_tokens = _times(lambda step: step.share_of_tokens())


def _over_boxes(get_loss: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_loss)
    def over_boxes(self: Any, loss: Any, outputs: Any, targets: Any, indices: Any, num_boxes: Any, *more: Any) -> Any:
        if steps.is_counted():
            num_boxes = num_boxes * steps.share(lambda step: step.objects_of_the_step())
        return get_loss(self, loss, outputs, targets, indices, num_boxes, *more)

    return over_boxes


def _masks_of_the_step(get_num_masks: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_num_masks)
    def masks_of_the_step(*args: Any, **kwargs: Any) -> Any:
        num_masks = get_num_masks(*args, **kwargs)
        return num_masks * steps.share(lambda step: step.objects_of_the_step()) if steps.is_counted() else num_masks

    return masks_of_the_step


METHODS: dict[str, Callable[..., Any]] = {
    # detection and instance segmentation: sums over boxes or masks, divided by how many the micro-batch has
    "get_loss": _over_boxes,
    "get_num_masks": _masks_of_the_step,
    # TimesFM: a mean over rows of one size, beside a loss of PyTorch's
    "_quantile_loss": _times(lambda step: step.share_of_rows()),
}
