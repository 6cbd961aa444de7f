"""accumloss in transformers: register, unregister, and what is registered. Imports transformers when it is asked to."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._compat import LOSS_FUNCTION, class_of, is_compiled, uncompiled
from ..keywords import checked, named_by
from . import deferred, losses, mapping, objective, own, rebind, watch
from .deferred import Explanation
from .hook import compute_loss_func
from .losses import make_loss
from .mapping import registered_losses
from .models import base_model, unwrapped
from .patches import loss_names, trainer_methods
from .probe import MeasuredTerm, Verification
from .registration import Part, registration
from .settings import settings
from .tensor_parallel import vocabulary_parallel_plan
from .versions import warn_where_newer

__all__ = [
    "Explanation",
    "MeasuredTerm",
    "Verification",
    "compute_loss_func",
    "explain",
    "make_loss",
    "register_with_transformers",
    "registered",
    "registered_losses",
    "unregister_from_transformers",
    "unregistered",
    "verify",
    "vocabulary_parallel_plan",
]

registration.add(
    Part(lambda state: state.is_active, trainer_methods.install),
    Part(lambda state: state.is_active, loss_names.install_smoother),
    Part(lambda state: state.is_active, own.install),
    Part(lambda state: state.covers_all, mapping.install),
    Part(lambda state: state.covers_all, loss_names.install_name),
    Part(lambda state: state.is_active and settings.fused_linear, deferred.install),
)


@checked
def register_with_transformers(
    model: Any = None,
    *,
    inplace_backward: bool = False,
    evaluation: bool = True,
    metrics: bool = False,
    fused_linear: bool = False,
    verify: bool | str = False,
) -> None:
    """Makes the losses of transformers exact under gradient accumulation, for every model and every Trainer, or for one model.

    The losses in LOSS_MAPPING that are means over items (registered_losses() lists them) are computed by accumloss, and
    Trainer counts what they use and divides once. Models, Trainers and subclasses of either that exist already are covered.
    Call it at any time, before or after other imports, and as often as you like: the last call's options hold.

    Args:
        model: a transformers model whose loss_function alone is to be replaced; PEFT models are looked into. None: all.
        inplace_backward: write the gradient of the logits over them, which saves a buffer of their size; after backward
            ``outputs.logits`` holds the gradient. Not under torch.compile, which manages its own buffers.
        evaluation: the losses of Trainer's evaluate and predict are means over the items of the whole set: the same for
            every batch size, order and number of processes. False: Trainer's own, means of the batches' means.
        metrics: Trainer logs ``token_accuracy`` and ``token_entropy`` (nats) of the tokens trained on since its last log,
            and ``eval_token_accuracy`` and ``eval_token_entropy`` of an evaluation set, over all ranks. They come from
            the pass that computes the loss; of several losses, from the first. In a compiled model they break the graph.
        fused_linear: in training, language models compute their loss from the hidden states, chunk by chunk, without
            ever holding the logits; ``outputs.logits`` computes them when it is read, before the next optimizer step.
            explain(model) says whether a model does, and why not. Register after importing peft, if you use it.
        verify: before its first step, what a Trainer's loss averages over is measured (see verify()), and what was found is
            made use of from then on. "error": InexactError is raised where the step is not exact, in the place of the
            InexactWarning. False: nothing of yours is called twice.

    Raises:
        RuntimeError: transformers is missing, or lacks something that has to be replaced. Nothing is changed then.
        TypeError: model is no transformers model.
        ValueError: model has a loss of its own, or one that accumloss does not replace; verify is something else.

    Examples:
        >>> accumloss.register_with_transformers()
        >>> accumloss.explain(model).path
        'logits'
        >>> accumloss.unregister_from_transformers()
        >>> accumloss.explain(model).path
        'stock'
    """
    if verify not in (False, True, "error"):
        raise ValueError(f'register_with_transformers: expected verify to be False, True or "error", got {verify!r}')
    _check_transformers()
    before = registration.snapshot()
    if model is None:
        registration.covers_all = True
    else:
        base = _base(model, "register_with_transformers")
        loss = mapping.loss_of(base)
        replacement = mapping.replacement_for(loss)
        if replacement is None:
            raise ValueError(
                f"register_with_transformers: expected a model whose loss accumloss replaces, got {class_of(base).__name__} "
                f"with {mapping.qualified_name(loss)}; make_loss() gives one that can be assigned to model.loss_function"
            )
        registration.cover_model(base, replacement)
    settings.inplace_backward, settings.evaluation, settings.metrics = inplace_backward, evaluation, metrics
    settings.fused_linear, settings.verify = fused_linear, verify
    try:
        registration.sync()
    except BaseException:
        registration.restore(before)
        raise


@checked
def unregister_from_transformers(model: Any = None) -> None:
    """Undoes register_with_transformers: the very same objects are back in their places.

    Args:
        model: one that was registered by itself. None: everything, the models included.

    Raises:
        TypeError: model is no transformers model.

    Examples:
        >>> accumloss.register_with_transformers(model)  # one model alone
        >>> accumloss.unregister_from_transformers(model)
    """
    if model is not None:
        registration.uncover_model(_base(model, "unregister_from_transformers"))
    else:
        for registered_model in list(registration.models):
            registration.uncover_model(registered_model)
        registration.covers_all = False
    registration.sync()


@functools.partial(checked, also=named_by(register_with_transformers))
@contextmanager
def registered(model: Any = None, **options: Any) -> Iterator[None]:
    """register_with_transformers for the length of a with block; afterwards everything is as it was before.

    Args:
        model: a model, or None: all; see register_with_transformers.
        **options: of register_with_transformers.

    Returns:
        A context manager. What is registered around the block is so again behind it.

    Raises:
        RuntimeError, TypeError, ValueError: as register_with_transformers.

    Examples:
        >>> with accumloss.registered(fused_linear=True):
        ...     print(accumloss.explain(model).path)
        fused
    """
    before = registration.snapshot()
    register_with_transformers(model, **options)
    try:
        yield
    finally:
        registration.restore(before)


@checked
def explain(model: Any) -> Explanation:
    """How the loss of a model is computed in a Trainer: by accumloss, from the hidden states or the logits, or by stock; and why.

    Args:
        model: a transformers model, or a module of your own. What torch.compile, PEFT and DDP have wrapped is looked into.

    Returns:
        Explanation; print it.

    Raises:
        TypeError: model is no module.

    Examples:
        >>> with accumloss.registered():
        ...     print(accumloss.explain(model).reason)
        registered without fused_linear=True
    """
    wrapped = model
    while isinstance(uncompiled(wrapped), (DataParallel, DistributedDataParallel)):
        wrapped = uncompiled(wrapped).module
    if not isinstance(wrapped, torch.nn.Module):
        remedy = "; explain(trainer.model) explains its model" if hasattr(wrapped, "compute_loss") else ""
        got = f"the class {wrapped.__name__}" if isinstance(wrapped, type) else f"a {type(wrapped).__name__}"
        raise TypeError(f"explain: expected a model, a torch.nn.Module, got {got}{remedy}")
    base = unwrapped(wrapped)
    if not hasattr(type(base), "loss_function"):
        return _explain_own(base)
    loss = mapping.loss_of(base)
    ours = losses.underlying(loss)
    reason = ""
    by_itself = rebind.losses_of(class_of(base)) if not deferred.calls_loss_function(class_of(base)) else None
    if by_itself is not None:
        path, reason = "logits", f"its forward calls {', '.join(by_itself)} itself, and no loss_function"
        if by_itself and not registration.is_active:
            path, reason = "stock", _NOT_REGISTERED
        if not by_itself:
            path = "stock"
            reason = "its forward calls no loss that accumloss knows; accumloss.verify(trainer) measures what it averages over"
        if getattr(base, LOSS_FUNCTION, None) is not None and not registration.is_one_of(base):
            reason += "; the loss_function that was assigned to it has no effect"
        return Explanation(class_of(base).__name__, path, reason, _forward_of(base))
    if ours is None:
        path = "stock"
        reason = _NOT_REGISTERED if mapping.replacement_for(loss) else "accumloss does not replace its loss"
    elif ours not in (losses.causal_lm_loss, losses.masked_lm_loss):
        path, reason = "logits", "its loss is that of no language model"
    elif not settings.fused_linear:
        path, reason = "logits", "registered without fused_linear=True"
    elif is_compiled(model):
        path, reason = "logits", "it is compiled"
    else:
        found = deferred.why_not(base) or deferred.why_not_called(wrapped, base)
        path, reason = ("fused", "") if found is None else ("logits", found)
    return Explanation(class_of(base).__name__, path, reason, mapping.qualified_name(loss))


_NOT_REGISTERED = "accumloss is not registered"


def _explain_own(module: torch.nn.Module) -> Explanation:
    """Of a module that transformers does not know: by the losses of PyTorch in its forward, and the models inside of it."""
    cls = class_of(module)
    heads = {
        name: explain(part)
        for name, part in module.named_modules()
        if name and hasattr(type(part), "loss_function") and _bears_loss(part)
    }
    called = sorted({*rebind.losses_of(cls), *rebind.criteria_of(module)})
    if called and registration.is_active:
        path = "logits"
        reason = (
            f"its forward calls {', '.join(called)}, which a Trainer divides by the items of the step. A loop of your own "
            "takes accumloss.cross_entropy and accumloss.Accumulator instead"
        )
    elif called:
        path = "stock"
        reason = (
            f"{_NOT_REGISTERED}: its forward calls {', '.join(called)}. accumloss.register_with_transformers() covers it in a "
            "Trainer; a loop of your own takes accumloss.cross_entropy and accumloss.Accumulator instead"
        )
    elif heads:
        path = "stock" if all(head.path == "stock" for head in heads.values()) else "logits"
        reason = "its forward calls no loss that accumloss knows; the models inside of it have one each"
    else:
        path = "stock"
        reason = (
            "its forward calls no loss that accumloss knows. In a Trainer accumloss.verify(trainer) measures what its loss "
            "averages over; a loop of your own takes accumloss.cross_entropy and accumloss.Accumulator"
        )
    return Explanation(cls.__name__, path, reason, _forward_of(module), heads)


def _bears_loss(model: Any) -> bool:
    """Whether a model of transformers computes a loss: a body without a head does not."""
    return deferred.calls_loss_function(class_of(model)) or bool(rebind.losses_of(class_of(model)))


def _forward_of(module: torch.nn.Module) -> str:
    return f"{class_of(module).__module__}.{class_of(module).__qualname__}.forward"


@functools.partial(checked, names_errors=False)
def verify(trainer: Any) -> Verification:
    """Measures whether a Trainer's step over micro-batches is that of the one batch, and prints it term by term.

    Its own compute_loss is called on 3 to 6 rows of its own train_dataset, collated whole and in parts, in fp32, in the mode
    of training but without dropout: 9 times, or 18. Random numbers, buffers, flags and the attributes of the Trainer are put
    back, nothing is logged, no weight is changed. Where accumloss is not registered, it is for the length of the call.

    Args:
        trainer: a transformers Trainer of any class, before, between or after its trainings.

    Returns:
        Verification, which is printed on the first rank. An InexactWarning is given where the step is not exact, and where
        that cannot be measured.

    Raises:
        TypeError: trainer is no Trainer.

    Examples:
        >>> accumloss.verify(trainer).is_exact
        accumloss: ...
        True
    """
    _check_transformers()
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise TypeError(f"verify: expected a transformers Trainer, got {type(trainer).__name__}")
    found = verification(trainer)
    if trainer.is_world_process_zero():
        print(found)
    if found.is_exact is None:
        objective.tell(trainer, set(), f"it could not be measured: {found.reason}")
    elif not found.is_exact:
        objective.tell(trainer, set(), found.reason, may="differs")
    return found


def verification(trainer: Any) -> Verification:
    """verify() of a Trainer, without a word."""
    with contextlib.nullcontext() if registration.is_active else registered():
        rebind.rebind_for(trainer, base_model(trainer))
        return watch.measure(trainer)


@contextmanager
def unregistered() -> Iterator[None]:
    """transformers as it is without accumloss, for the length of a with block; afterwards everything is as it was before."""
    before = registration.snapshot()
    unregister_from_transformers()
    try:
        yield
    finally:
        registration.restore(before)


def _base(model: Any, function: str) -> Any:
    model = unwrapped(model)
    if not hasattr(type(model), "loss_function"):
        raise TypeError(f"{function}: expected a transformers model, got {type(model).__name__}")
    return model


def _check_transformers() -> None:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            f"register_with_transformers: expected transformers, got: {error}; pip install 'accumloss[transformers]'"
        ) from error
    warn_where_newer(transformers.__version__)
