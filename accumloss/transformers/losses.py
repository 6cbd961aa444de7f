"""The losses that take the place of transformers' own: its signatures, divided by what the step really holds.

Inside a Trainer step (step.py) the divisor is counted; anywhere else it is num_items_in_batch, or the items of the call.
They are plain functions: a model takes a Module that is assigned to ``loss_function`` for a submodule and goes on without.
A model calls them with whatever it has: what is no option of the loss is left out, as transformers' own leave it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import keywords, options
from .. import losses as core
from .._compat import not_compiled
from . import step as steps
from .deferred import DeferredLogits
from .settings import settings

Loss = Callable[..., Any]


def divisor(labels: torch.Tensor, given: Any, **rule: Any) -> Any:
    """num_items_in_batch inside a step; compiled code takes what it was given, so that its graph stays whole, but where it
    is to show its metrics."""
    is_compiled = torch.compiler.is_compiling()
    if not steps.is_counted() or (given is not None and is_compiled and not settings.metrics):
        return given
    return _counted(labels, given, is_compiled=is_compiled, **rule)


@not_compiled
def _counted(labels: torch.Tensor, given: Any, **rule: Any) -> Any:
    step = steps.current()
    return given if step is None else step.divisor(labels, given, **rule)


def known(count: Any) -> Any:
    """What divisor() found, as the losses of the core take it."""
    if not isinstance(count, steps.Divisor):
        return count
    return core.Known(count.value, count.expected_grad, count.observer is not None and count.observer.metrics)


def observed(count: Any, loss: core.Divided) -> torch.Tensor:
    """A loss of the core, or what takes its place where the step looks on. Of logits that are a DTensor it is a plain tensor:
    Trainer adds it to such."""
    loss = loss.whole()
    return count.observed(*loss) if isinstance(count, steps.Divisor) else loss.loss


def of_options(given: dict[str, Any], ignore_index: int = -100) -> options.LossOptions:
    named = {name: given[name] for name in options.NAMES if name in given}
    if not named and ignore_index == options.DEFAULT.ignore_index and type(ignore_index) is int:
        return options.DEFAULT
    return options.LossOptions(**{"ignore_index": ignore_index, **named})


def of_core(given: dict[str, Any], ignore_index: int = -100) -> tuple[options.LossOptions, Any, Any]:
    """Options of a loss as the core takes them: LossOptions, weight and inplace."""
    return of_options(given, ignore_index), given.get("weight"), given.get("inplace", False)


OPTIONS = ("weight", "inplace", *options.NAMES)  # of a loss over logits; each has those that mean something for it


@functools.cache
def options_named_by(kind: str) -> tuple[str, ...]:
    """The options of accumloss.<kind>_loss."""
    named = keywords.named_by(getattr(core, f"{kind}_loss"))
    return tuple(name for name in named if name in OPTIONS)


def _options_of(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in options_named_by(kind)}


def smoothed(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a cross-entropy, with Trainer's label smoothing where it has one and they have none."""
    if steps.is_counted() and not torch.compiler.is_compiling():
        step = steps.current()
        if step is not None and step.label_smoothing and "label_smoothing" not in options:
            options["label_smoothing"] = step.label_smoothing
            step.smoothed += 1
    return options


def _inplace(options: dict[str, Any]) -> dict[str, Any]:
    if settings.inplace_backward and not torch.compiler.is_compiling():  # a compiled graph manages its own buffers
        options.setdefault("inplace", "backward")
    return options


def _is_flattened(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one of two shapes comes from the other by folding neighbouring dimensions, so that their elements pair."""
    if math.prod(shape) != math.prod(other) or math.prod(shape) == 0:
        return math.prod(shape) == math.prod(other)
    coarse, fine = sorted(([size for size in shape if size > 1], [size for size in other if size > 1]), key=len)
    sizes = iter(fine)
    for wanted in coarse:
        size = next(sizes)
        while size < wanted:
            size *= next(sizes)
        if size != wanted:
            return False
    return True


def _in_shape_of(labels: torch.Tensor, logits: torch.Tensor, vocab_size: int | None) -> torch.Tensor:
    """The logits as (*labels.shape, V): some heads come flattened, or with several heads side by side."""
    V = logits.shape[-1] if vocab_size is None else vocab_size
    if logits.shape == (*labels.shape, V) or logits.numel() != labels.numel() * V:
        return logits
    heads = () if logits.shape[-1] == V else (logits.shape[-1] // V,)
    if not _is_flattened(labels.shape, (*logits.shape[:-1], *heads)):
        return logits  # refused by the loss, which names the shapes
    return logits.reshape(*labels.shape, V)


def _fused(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None,
    shift: int,
    num_items_in_batch: Any,
    ignore_index: int,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """The loss of logits that were not computed, from their hidden states; None where they have to be."""
    if not isinstance(logits, DeferredLogits):
        return None
    linear = logits.as_linear()
    if linear is None or (vocab_size is not None and vocab_size != logits.shape[-1]):
        return None
    given = linear.options(options)
    if given is None or not _is_flattened(labels.shape, linear.hidden.shape[:-1]):
        return None
    hidden = linear.hidden.reshape(*labels.shape, linear.hidden.shape[-1])  # some heads come flattened
    logits.root().is_fused = True
    unshifted, shifted = (labels, None) if shift else (None, labels)
    step = steps.current()
    num_valid = None if step is None else step.num_valid(labels, ignore_index)
    loss = core.linear_causal_lm(
        hidden, linear.weight, unshifted, shifted, known(num_items_in_batch), of_options(given, ignore_index),
        linear.bias, given["class_weight"], num_valid,
    )  # fmt: skip
    return observed(num_items_in_batch, loss)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """accumloss.causal_lm_loss in the place of ``ForCausalLMLoss``."""
    options = _inplace(smoothed(_options_of("causal_lm", kwargs)))
    targets, shift = (labels, 1) if shift_labels is None else (shift_labels, 0)
    if targets is not None:
        num_items_in_batch = divisor(
            targets,
            num_items_in_batch,
            shift=shift,
            ignore_index=ignore_index,
            weight=options.get("weight"),
            name="causal_lm_loss",
        )
        fused = _fused(logits, targets, vocab_size, shift, num_items_in_batch, ignore_index, options)
        if fused is not None:
            return fused
        logits = _in_shape_of(targets, logits, vocab_size)
    count, given = num_items_in_batch, of_core(options, ignore_index)
    return observed(count, core.causal_lm(logits, labels, vocab_size, shift_labels, known(count), *given))


def masked_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> torch.Tensor:
    """accumloss.masked_lm_loss in the place of ``ForMaskedLMLoss``."""
    options = _inplace(smoothed(_options_of("masked_lm", kwargs)))
    count = divisor(
        labels, num_items_in_batch, ignore_index=ignore_index, weight=options.get("weight"), name="masked_lm_loss"
    )
    fused = _fused(logits, labels, vocab_size, 0, count, ignore_index, options)
    if fused is not None:
        return fused
    logits = _in_shape_of(labels, logits, vocab_size)
    given = of_core(options, ignore_index)
    return observed(count, core.masked_lm(logits, labels, vocab_size, known(count), *given))


def token_classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: Any,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> torch.Tensor:
    """accumloss.token_classification_loss in the place of ``ForTokenClassification``."""
    options = _inplace(smoothed(_options_of("token_classification", kwargs)))
    count = divisor(
        labels,
        num_items_in_batch,
        ignore_index=ignore_index,
        weight=options.get("weight"),
        name="token_classification_loss",
    )
    given = of_core(options, ignore_index)
    logits = _in_shape_of(labels, logits, config.num_labels)
    return observed(count, core.token_classification(logits, labels, config, known(count), *given))


def sequence_classification_loss(
    labels: torch.Tensor,
    pooled_logits: torch.Tensor,
    config: Any,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> torch.Tensor:
    """accumloss.sequence_classification_loss in the place of ``ForSequenceClassificationLoss``."""
    core.set_problem_type(config, labels)
    is_single = config.problem_type == "single_label_classification"
    options = _options_of("sequence_classification", kwargs)
    options = smoothed(options) if is_single else options
    count = divisor(
        labels,
        num_items_in_batch,
        ignore_index=ignore_index if is_single else None,
        weight=options.get("weight") if is_single else None,
        name="sequence_classification_loss",
    )
    given = of_core(options, ignore_index)
    return observed(count, core.sequence_classification(labels, pooled_logits, config, known(count), *given))


def question_answering_loss(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    start_positions: torch.Tensor | None,
    end_positions: torch.Tensor | None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """accumloss.question_answering_loss in the place of ``ForQuestionAnsweringLoss``; each end has a count of its own."""
    if start_positions is None or end_positions is None:
        return None
    counts = tuple(
        divisor(positions, num_items_in_batch, length=logits.shape[1], name="question_answering_loss")
        for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
    )
    options, _, inplace = of_core(_options_of("question_answering", kwargs))
    ends = core.question_answering(
        start_logits, end_logits, start_positions, end_positions, tuple(map(known, counts)), options, inplace
    )
    start, end = map(observed, counts, ends)
    return (start + end) / 2


def semantic_segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = 255,
    num_items_in_batch: Any = None,
    auxiliary_logits: torch.Tensor | None = None,
    auxiliary_loss_weight: float = 0.4,
    **kwargs: Any,
) -> torch.Tensor:
    """accumloss.semantic_segmentation_loss in the place of ``ForSemanticSegmentationLoss``."""
    options = smoothed(_options_of("semantic_segmentation", kwargs))
    count = divisor(
        labels,
        num_items_in_batch,
        ignore_index=ignore_index,
        weight=options.get("weight"),
        name="semantic_segmentation_loss",
    )
    given = of_core(options, ignore_index)
    heads = core.semantic_segmentation(logits, labels, auxiliary_logits, known(count), *given)
    first, *auxiliary = (observed(count, head) for head in heads)
    return first + auxiliary_loss_weight * auxiliary[0] if auxiliary else first


# name in transformers.loss.loss_utils -> ours
REPLACEMENTS: dict[str, Loss] = {
    "ForCausalLMLoss": causal_lm_loss,
    "ForMaskedLMLoss": masked_lm_loss,
    "ForQuestionAnsweringLoss": question_answering_loss,
    "ForSequenceClassificationLoss": sequence_classification_loss,
    "ForTokenClassification": token_classification_loss,
    "ForSemanticSegmentationLoss": semantic_segmentation_loss,
}

_IDS = frozenset(map(id, REPLACEMENTS.values()))  # asked in every micro-batch

# what make_loss calls them
KINDS: dict[str, Loss] = {loss.__name__.removesuffix("_loss"): loss for loss in REPLACEMENTS.values()}


def underlying(loss: Any) -> Loss | None:
    """The loss of this module that a function is, or that make_loss built it from; None for any other."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss if id(loss) in _IDS else None


def make_loss(kind: str = "causal_lm", **given: Any) -> Loss:
    """A loss with options of its own, for one model or for transformers' LOSS_MAPPING.

    Equivalent to transformers' loss of that kind with, for example, a class-weighted or smoothed cross-entropy in it; its
    gradients are exact under accumulation like those of the others.

    Args:
        kind: causal_lm, masked_lm, token_classification, sequence_classification, question_answering or
            semantic_segmentation.
        **given: options of accumloss.<kind>_loss: ignore_index, label_smoothing, z_loss, softcap, logit_scale, weight (V,),
            inplace, as far as it has them. With ``weight``, the mean over a step is divided by the total weight of its
            labels, as in PyTorch.

    Returns:
        A function with transformers' signature; picklable.

    Raises:
        TypeError: an option that the loss has not.
        ValueError: an unknown kind, or an option out of range.

    Examples:
        >>> loss = make_loss("causal_lm", label_smoothing=0.1, z_loss=1e-4)
        >>> logits = torch.zeros(1, 3, 5)
        >>> round(loss(logits, torch.tensor([[0, 1, 2]]), 5, num_items_in_batch=2).item(), 4)
        1.6097
    """
    if kind not in KINDS:
        raise ValueError(f"make_loss: expected a kind of {', '.join(KINDS)}, got {kind!r}")
    known = options_named_by(kind)
    for name in given:
        if name not in known:
            keywords.refuse("make_loss", name, known, f"; these are the options of {kind}_loss")
    of_options(given)
    return functools.partial(KINDS[kind], **given)
