"""Logits that are computed when somebody reads them; a loss that takes them computes itself from the hidden states.

For the length of a training forward with labels, the output head of a model returns DeferredLogits instead of a product.
What a model does to logits before its loss (a cast, a scale, a softcap, a bias, a choice of rows) is recorded; our losses turn it into options
of linear_cross_entropy. Everything else that is done to them computes them first, in the graph, and is then what it was.
"""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import _compat, display
from .registration import ABSENT, Patches, own, registration
from .settings import settings

_Function = Callable[..., Any]
_plain = _compat.without_subclasses

# answered by the wrapper itself: what the logits would say
_METADATA: set[Any] = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_leaf")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size")
}
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_CASTS = {torch.Tensor.float, torch.Tensor.to, torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16}
_PRODUCTS = {torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_QUOTIENTS = {torch.Tensor.div, torch.div, torch.Tensor.__truediv__, torch.true_divide, torch.Tensor.true_divide}
_TANH = {torch.tanh, torch.Tensor.tanh}
_SUMS = {torch.Tensor.add, torch.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_VIEWS = {torch.Tensor.contiguous, torch.Tensor.view, torch.Tensor.reshape}


class DeferredLogits(torch.Tensor):
    """``F.linear(hidden, weight, bias)``, and what was done to it since, computed when it is read.

    hidden (..., H), weight (V, H), bias (V,) or None; in shape, dtype and device the logits (..., V).
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    # what was done to base: ("cast", dtype), ("mul", s), ("div", s), ("tanh", None), ("bias", (V,)), ("shape", (...)),
    # ("rows", slices)
    step: tuple[str, Any] | None
    base: DeferredLogits | None
    value: torch.Tensor | None  # once read
    versions: tuple[int, ...]
    is_fused: bool  # whether a loss was computed from the hidden states instead
    is_autocast: bool
    autocast_dtype: torch.dtype

    @staticmethod
    def __new__(cls, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> DeferredLogits:
        device = hidden.device.type
        is_autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if is_autocast else hidden.dtype
        self = _wrapper(cls, (*hidden.shape[:-1], weight.shape[0]), dtype, hidden.device)
        self.hidden, self.weight, self.bias, self.step, self.base, self.value = hidden, weight, bias, None, None, None
        self.versions, self.is_fused = _versions(self), False
        self.is_autocast, self.autocast_dtype = is_autocast, torch.get_autocast_dtype(device)
        return self

    @classmethod
    def __torch_function__(
        cls, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with _plain():
                return func(*args, **kwargs)
        if func == _REQUIRES_GRAD:  # of what was read. Engines hook the outputs that say so, which would compute them
            return args[0].value is not None and args[0].value.requires_grad
        if func is torch.Tensor.__repr__ and args[0].value is None:
            return f"DeferredLogits(shape={tuple(args[0].shape)}, dtype={args[0].dtype}, not computed yet)"
        if args and isinstance(args[0], DeferredLogits) and args[0].value is None:
            recorded = args[0]._recorded(func, args[1:], kwargs)
            if recorded is not None:
                return recorded
        elif len(args) == 2 and func in _PRODUCTS | _SUMS and isinstance(args[1], DeferredLogits):
            recorded = args[1]._recorded(func, args[:1], kwargs)
            if recorded is not None:
                return recorded
        args, kwargs = _compat.tree_map(materialized, args), _compat.tree_map(materialized, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # of the base, a class method too
        cls, func: _Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*_compat.tree_map(materialized, args), **_compat.tree_map(materialized, kwargs or {}))

    def _recorded(self, func: _Function, more: tuple[Any, ...], kwargs: dict[str, Any]) -> DeferredLogits | None:
        """The deferred result of an operation that can wait; None for any other."""
        if func in _CASTS:
            dtype = {torch.Tensor.float: torch.float32, torch.Tensor.double: torch.float64}.get(func)
            dtype = {torch.Tensor.half: torch.float16, torch.Tensor.bfloat16: torch.bfloat16}.get(func, dtype)
            if func is torch.Tensor.to:
                given = [*more, *kwargs.values()]
                if len(given) != 1 or not isinstance(given[0], torch.dtype):
                    return None
                dtype = given[0]
            elif more or kwargs:
                return None
            assert dtype is not None
            return self if dtype == self.dtype else self._with("cast", dtype, dtype=dtype)
        if kwargs:
            return None
        if func in _TANH and not more:
            return self._with("tanh", None)
        if func in _PRODUCTS | _QUOTIENTS and len(more) == 1:
            number = more[0]
            if isinstance(number, bool) or not isinstance(number, (int, float)) or number == 0:
                return None
            return self._with("div" if func in _QUOTIENTS else "mul", number)
        if func in _SUMS and len(more) == 1 and isinstance(more[0], torch.Tensor):
            added = more[0]
            is_row = added.numel() == self.shape[-1] and added.shape[-1:] == self.shape[-1:]
            if type(added) not in (torch.Tensor, nn.Parameter) or not is_row or added.dim() > self.dim():
                return None
            return self._with("bias", added.reshape(-1)) if added.dtype == self.dtype else None
        if func is torch.Tensor.__getitem__:  # some rows of all classes
            index = more[0] if isinstance(more[0], tuple) else (more[0],)
            leading = self.dim() - 1
            if not all(isinstance(i, slice) for i in index) or len(index) > self.dim():
                return None
            if len(index) == self.dim() and index[-1] != slice(None):
                return None
            kept = self.hidden.new_empty(self.shape[:-1])[index[:leading]]
            return self._with("rows", index[:leading], shape=(*kept.shape, self.shape[-1]))
        if func in _VIEWS:
            shape = more[0] if len(more) == 1 and not isinstance(more[0], int) else more
            if func is torch.Tensor.contiguous:
                return self if not more else None
            if not shape or not all(isinstance(n, int) for n in shape) or shape[-1] not in (-1, self.shape[-1]):
                return None
            try:
                viewed = self.hidden.new_empty(self.shape[:-1]).view(shape[:-1])
            except RuntimeError:
                return None
            if shape[-1] == -1 and viewed.numel() * self.shape[-1] != self.numel():
                return None
            return self._with("shape", tuple(viewed.shape), shape=(*viewed.shape, self.shape[-1]))
        return None

    def _with(self, kind: str, what: Any, **changed: Any) -> DeferredLogits:
        new = _wrapper(type(self), changed.get("shape", self.shape), changed.get("dtype", self.dtype), self.device)
        new.__dict__.update(self.__dict__)
        new.step, new.base, new.value = (kind, what), self, None
        return new

    def materialize(self) -> torch.Tensor:
        """The logits, computed once, in the graph of the hidden states and the weight."""
        if self.value is None:
            if self.base is not None and self.step is not None:
                with torch.enable_grad():  # who reads them first may not want a gradient, who does next may
                    self.value = _apply(self.base.materialize(), *self.step)
            else:
                if _versions(self) != self.versions:
                    raise RuntimeError(
                        "accumloss: expected logits to be read before the head's weight or the hidden states change (an "
                        "optimizer step), got a read after; with fused_linear=True they are computed when they are first "
                        "read: read outputs.logits before, or register without fused_linear"
                    )
                if self.weight.numel() and self.weight.untyped_storage().size() == 0:
                    raise RuntimeError(
                        "accumloss: expected logits to be read while the head's weight is there, got a read after FSDP has "
                        "freed it; with fused_linear=True they are computed when they are first read: keep the weight "
                        "(reshard_after_forward=False), or register without fused_linear"
                    )
                device = self.hidden.device.type
                with torch.enable_grad(), torch.autocast(device, self.autocast_dtype, enabled=self.is_autocast):
                    self.value = F.linear(self.hidden, self.weight, self.bias)
        return self.value

    def _chain(self) -> list[DeferredLogits]:
        """These logits, what they were made from, and so on."""
        chain: list[DeferredLogits] = [self]
        while chain[-1].base is not None:
            chain.append(chain[-1].base)
        return chain

    def root(self) -> DeferredLogits:
        """What the head returned."""
        return self._chain()[-1]

    def as_linear(self) -> Linear | None:
        """What linear_cross_entropy takes; None where the recorded steps are more than it can do, or are done already."""
        hidden, bias = self.hidden, self.bias
        scale, softcap, is_capped, is_open = 1.0, 0.0, False, False
        chain = self._chain()
        if any(node.value is not None for node in chain):
            return None
        product = chain[-1].dtype
        for kind, what in reversed([node.step for node in chain if node.step is not None]):
            if kind == "cast":
                if what not in (torch.float32, torch.float64, product):
                    return None
            elif kind == "shape":
                hidden = hidden.reshape(*what, hidden.shape[-1])
            elif kind == "rows":
                hidden = hidden[what]
            elif kind == "bias":
                if bias is not None or scale != 1 or is_capped or is_open:
                    return None
                bias = what.to(self.hidden.dtype)
            elif kind == "tanh" and not (is_capped or is_open):
                is_open = True
            elif kind in ("mul", "div") and what > 0 and not is_capped:
                factor = what if kind == "mul" else 1 / what
                scale *= factor
                if is_open:  # cap tanh(s x), whose s x is (scale / cap) x
                    is_open, is_capped, softcap = False, True, factor
            else:
                return None
        return None if is_open else Linear(hidden, self.weight, bias, scale, softcap)


@dataclass(frozen=True)
class Linear:
    """The arguments of linear_cross_entropy."""

    hidden: torch.Tensor  # (..., H)
    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    softcap: float

    def options(self, given: dict[str, Any]) -> dict[str, Any] | None:
        """The options of a loss together with those of the head; None where both have a transform."""
        has_own = given.get("softcap", 0.0) != 0 or given.get("logit_scale", 1.0) != 1
        if has_own and (self.softcap != 0 or self.logit_scale != 1):
            return None
        options = dict(given)
        options.pop("inplace", None)  # there are no logits to write to
        options["class_weight"] = options.pop("weight", None)
        if not has_own:
            options.update(softcap=self.softcap, logit_scale=self.logit_scale)
        return options


def _wrapper(cls: type, shape: Any, dtype: torch.dtype, device: torch.device) -> Any:
    return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)


def _versions(logits: DeferredLogits) -> tuple[int, ...]:
    return tuple(t._version for t in (logits.hidden, logits.weight, logits.bias) if t is not None)


def _apply(value: torch.Tensor, kind: str, what: Any) -> torch.Tensor:
    if kind == "cast":
        return value.to(what)
    if kind == "mul":
        return value * what
    if kind == "div":
        return value / what
    if kind == "tanh":
        return torch.tanh(value)
    if kind == "bias":
        return value + what
    if kind == "rows":
        return value[what]
    return value.reshape(*what, value.shape[-1])


def materialized(value: Any) -> Any:
    return value.materialize() if isinstance(value, DeferredLogits) else value


# Where heads defer -----------------------------------------------------------------------------------------------------


def head_of(model: Any) -> Any:
    """The module that makes the logits, None where a model names none."""
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def calls_loss_function(cls: Any) -> bool:
    """Whether the forward of a class takes its loss from model.loss_function."""
    return _names_loss_function(inspect.unwrap(cls.forward))


@functools.cache
def _names_loss_function(forward: Any) -> bool:
    try:
        return "loss_function" in inspect.getsource(forward)
    except (OSError, TypeError):
        return "loss_function" in forward.__code__.co_names


def why_not(model: Any) -> str | None:
    """Why the head of a model computes its logits; None where it defers them."""
    if not calls_loss_function(_compat.class_of(model)):
        return "its forward does not call loss_function"
    head = head_of(model)
    if head is None:
        return "the model names no output embeddings"
    cls = _compat.class_of(head)
    if cls is not nn.Linear:
        return f"its head is {cls.__module__}.{cls.__qualname__}, not torch.nn.Linear"
    if "forward" in vars(head) or _compat.is_offloaded(head):
        return "its head's forward was replaced"
    if _compat.has_hooks(head):
        return "its head has hooks"
    if _compat.global_hooks():
        return "there are hooks on all modules"
    if nn.utils.parametrize.is_parametrized(head):
        return "its head is parametrized"
    if _compat.is_fsdp_unit(head):
        if not _compat.keeps_weights(head):
            return "FSDP frees its head after its forward: fully_shard(head, reshard_after_forward=False) keeps it"
        return None  # its weight is whole from its forward to its backward
    if _compat.is_fsdp_unit(model):
        return None  # its forward begins by unsharding the head, which looks at its weight then
    return _why_not_weight(head)


def _why_not_weight(head: nn.Linear) -> str | None:
    for what, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is None:
            continue
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"its head's {what} is a {type(tensor).__name__}"
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            return f"its head's {what} is {tensor.dtype} on {tensor.device.type}"
    return None


def _why_not_input(head: nn.Linear, input: torch.Tensor) -> str | None:
    """Why the logits of these hidden states are computed at once."""
    if not (torch.is_grad_enabled() and (input.requires_grad or head.weight.requires_grad)):
        return "nothing before its loss is trained"
    if type(input) is not torch.Tensor or input.dim() < 2:
        return f"its hidden states are a {type(input).__name__} of {input.dim()} dimensions"
    if not torch.is_autocast_enabled(input.device.type) and input.dtype != head.weight.dtype:
        return f"its hidden states are {input.dtype}, its head is {head.weight.dtype}"
    return f"its hidden states are {input.dtype}" if input.dtype not in _DTYPES else _why_not_weight(head)


def _forward(head: nn.Linear, deferral: Deferral, input: torch.Tensor) -> torch.Tensor:
    """The forward of a head while it defers."""
    reason = _why_not_input(head, input)
    if reason is not None:
        deferral.reason = reason
        return F.linear(input, head.weight, head.bias)
    logits = DeferredLogits(input, head.weight, head.bias)
    deferral.made.append(logits)
    return logits


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Deferral:
    """What came of one call of a model whose head defers.

    Attributes:
        made: logits that were not computed when the head was called.
        reason: why its last logits were.
    """

    def __init__(self) -> None:
        self.made: list[DeferredLogits] = []
        self.reason = ""

    def why_unused(self) -> str:
        """Why no loss was computed from the hidden states; empty where one was, and where no head was called."""
        if not self.made:
            return self.reason
        if any(logits.is_fused for logits in self.made):
            return ""
        if any(logits.value is not None for logits in self.made):
            return "its logits are read before its loss takes them"
        return "its loss does not take them as its head makes them"


@contextmanager
def deferring(model: Any) -> Iterator[None]:
    """The head of a model defers, where it can, for the length of a with block; where it cannot, that is told once."""
    head = head_of(model)
    outer = vars(head).get("forward") if isinstance(head, nn.Module) else None
    if isinstance(outer, functools.partial) and outer.func is _forward:  # an outer block defers already
        yield
        return
    reason = why_not(model)
    if reason is not None:
        tell_unused(model, reason)
        yield
        return
    deferral = Deferral()
    head.__dict__["forward"] = functools.partial(_forward, head, deferral)
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)
    tell_unused(model, deferral.why_unused())


def tell_unused(model: Any, reason: str) -> None:
    """Warns once for each class of models that fused_linear=True does nothing for it."""
    name = _compat.class_of(model).__name__
    if reason and name not in registration.unfused:
        registration.unfused.add(name)
        warnings.warn(
            f"accumloss: fused_linear=True is not used for {name}, whose loss is computed from its logits: {reason}",
            UserWarning,
            stacklevel=3,
        )


def _wants(model: Any, kwargs: dict[str, Any]) -> bool:
    return (
        settings.fused_linear
        and kwargs.get("labels") is not None
        and model.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _call_of_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """nn.Module.__call__ of a model of transformers."""
    if not _wants(model, kwargs):
        return nn.Module.__call__(model, *args, **kwargs)
    with deferring(model):
        return nn.Module.__call__(model, *args, **kwargs)


def _call_of_peft(model: Any, *args: Any, **kwargs: Any) -> Any:
    """nn.Module.__call__ of a PeftModel, which calls the forward of the model inside, not the model."""
    if not _wants(model, kwargs):
        return nn.Module.__call__(model, *args, **kwargs)
    with deferring(model.get_base_model()):
        return nn.Module.__call__(model, *args, **kwargs)


def why_not_called(model: Any, base: Any) -> str | None:
    """Why a model would not be told to defer: PEFT calls the forward of the model inside itself."""
    call = _compat.class_of(model).__call__
    if model is not base:
        return None if call is _call_of_peft else "peft was imported after accumloss was registered: register again"
    return None if call is _call_of_model else "its class has a __call__ of its own"


def install(patches: Patches) -> None:
    """Has the models of transformers, and those of PEFT where it is imported, defer in training."""
    from transformers import PreTrainedModel

    peft = sys.modules.get("peft")
    calls = {PreTrainedModel: _call_of_model}
    if peft is not None and hasattr(peft, "PeftModel"):
        calls[peft.PeftModel] = _call_of_peft
    for owner, call in calls.items():
        if own(owner, "__call__") not in (ABSENT, call):
            raise RuntimeError(
                f"register_with_transformers: expected {owner.__name__} without a __call__ of its own where "
                "fused_linear=True, got one"
            )
    for owner, call in calls.items():
        patches.bind(owner, "__call__", call)


# What a user asks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """How the loss of a model is computed in training; ``str()`` says it.

    Attributes:
        model: name of the model's class.
        path: ``"fused"``: by accumloss, from the hidden states, chunk by chunk, without the logits; ``"logits"``: by
            accumloss, from the logits; or ``"stock"``: by what the model brings, transformers' own loss or its forward's.
        reason: why it is not fused; empty where it is.
        loss: qualified name of the loss function.
        heads: of each model of transformers inside of a module of one's own, by its name there.

    Examples:
        >>> found = accumloss.explain(model)
        >>> found.model, found.path, found.by
        ('LlamaForCausalLM', 'stock', 'stock')
    """

    model: str
    path: str
    reason: str
    loss: str
    heads: dict[str, Explanation] = field(default_factory=dict)

    @property
    def by(self) -> str:
        """Whose loss it is in training: ``"accumloss"`` or ``"stock"``."""
        return "stock" if self.path == "stock" else "accumloss"

    def __str__(self) -> str:
        described = {
            "fused": "accumloss, from the hidden states, without the logits",
            "logits": "accumloss, from the logits",
            "stock": "stock, by the loss that it brings",
        }[self.path]
        heads = (textwrap.indent(f"{name}, {head}", "  ") for name, head in self.heads.items())
        facts = display.facts({"why": self.reason, "loss": self.loss})
        return display.answer(f"{self.model}: {described}", "\n".join([*filter(None, [facts]), *heads]))
