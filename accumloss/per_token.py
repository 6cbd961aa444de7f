"""What a model says of each token, and losses over it: for reinforcement learning, weighting and distillation.

``token_losses``, ``token_log_probs`` and ``token_statistics`` have one number for each row, of any incoming gradient. The
logits are read once in forward, and once in backward, which writes their gradient; nothing of their size is made besides.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from . import inside, linear, ops, reference
from .arguments import (
    NumItems,
    check_in_place,
    check_shift,
    check_tensors,
    check_vocab_size,
    divisor_of,
    of_op,
    refuse_functorch,
)
from .keywords import checked, checked_loss
from .options import LossOptions, options_of
from .parallel import Overwritten, VocabParallelRows, checked_part_of, is_dtensor, is_parallel
from .sums import TokenSums
from .weighting import check_token_weight, shifted, soft_losses, sums_of_losses

InPlace = Literal[False, "backward"]


class TokenStatistics(NamedTuple):
    """What token_statistics says of each row, in the shape of labels. Rows that are ignored: 0, and -1 for argmax.

    Attributes:
        log_prob: (...) log-probability of the label, nats; fp32, or fp64 for fp64 logits. Carries a gradient.
        entropy: (...) of the distribution, nats; as log_prob. Carries a gradient.
        lse: (...) logsumexp of the logits over the temperature; fp64. Carries a gradient.
        argmax: (...) int64, the first of the largest logits.

    Examples:
        >>> found = accumloss.token_statistics(torch.tensor([[2.0, 0.0]]), torch.tensor([-100]))
        >>> found.log_prob.item(), found.argmax.item()  # ignored
        (0.0, -1)
    """

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
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """The loss of each row, differentiable for any incoming gradient.

    Equivalent to, without the copies:

        F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, of any strides.
        labels: (...) int64 or int32, class indices or ignore_index; or (..., V) of logits' dtype, class probabilities as in
            F.cross_entropy, for which shift and inplace have no meaning.
        weight: (V,) class weights of any floating dtype, or None.
        shift: row (..., t) reads label (..., t + shift); its loss stands at (..., t).
        inplace: "backward" writes the gradient over the logits, which saves a buffer of their size.
        ignore_index, label_smoothing, z_loss, softcap, logit_scale: see LossOptions.
        group, vocab_size: as in cross_entropy, where processes share the vocabulary. Logits that are a DTensor need none:
            what is told of the rows is one then, placed as they are.

    Returns:
        (...) fp32, or fp64 for fp64 logits; 0 where a row is ignored, which is not read. A row to which the gradient 0 comes
        back is not read in backward.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as cross_entropy.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> [round(loss, 4) for loss in token_losses(logits, torch.tensor([0, 1, -100])).tolist()]
        [0.1269, 0.3133, 0.0]
    """
    options = options_of(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if isinstance(labels, torch.Tensor) and labels.is_floating_point():
        check_tensors("token_losses", ("logits (..., V)", logits))
        refuse_functorch("token_losses", logits, labels, weight)
        refuse_dtensors("token_losses", logits, labels, weight)
        options.check("token_losses", ops.accumulation_dtype(logits))
        given = {"shift": shift, "inplace": inplace, "group": group, "vocab_size": vocab_size}
        return soft_losses("token_losses", logits, labels, weight, options, given)
    shared = group, vocab_size
    losses = _statistics("token_losses", logits, labels, weight, shift, options, inplace, False, shared)[0]
    return inside.seen_rows("token_losses", losses, labels, shift, ignore_index, weight)


@checked
def token_log_probs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    *,
    shift: int = 0,
    inplace: InPlace = False,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """The log-probability of each label, to 8 units relative at any confidence.

    Equivalent to, without the copies:

        (logits.float() / temperature).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    Args:
        logits: (..., V) bf16, fp16, fp32 or fp64, of any strides.
        labels: (...) int64 or int32, class indices or ignore_index.
        temperature: the logits are divided by it, > 0.
        shift, inplace, group, vocab_size: see token_losses.
        ignore_index: rows with this label have a log-probability of 0 and no gradient, and are not read.

    Returns:
        (...) fp32, or fp64 for fp64 logits. In bf16 two of them would not tell a policy from its update.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as cross_entropy.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 60.0]])
        >>> [f"{value:.4g}" for value in token_log_probs(logits, torch.tensor([1, 1])).tolist()]
        ['-2.127', '-8.757e-27']
    """
    options = _at_temperature("token_log_probs", temperature, ignore_index)
    shared = group, vocab_size
    nll = _statistics("token_log_probs", logits, labels, None, shift, options, inplace, False, shared)[1]
    # -nll would have -0 in rows that are ignored
    return 0.0 - inside.seen_rows("token_log_probs", nll, labels, shift, ignore_index, None)


@checked
def token_statistics(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    *,
    shift: int = 0,
    inplace: InPlace = False,
    ignore_index: int = -100,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TokenStatistics:
    """Log-probability of the label, entropy, lse and argmax of each row, from one visit of the logits.

    Equivalent to, without the copies:

        z = logits.float() / temperature
        log_p = z.log_softmax(-1)
        log_prob = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        lse, argmax = z.logsumexp(-1), z.argmax(-1)

    Any of the first three may be differentiated, and all of them cost one backward.

    Args:
        logits, labels, shift, inplace, ignore_index, group, vocab_size: see token_log_probs.
        temperature: the logits are divided by it, > 0, for all four.

    Returns:
        TokenStatistics.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as cross_entropy. DTensors are refused.

    Examples:
        >>> found = token_statistics(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
        >>> round(found.entropy.item(), 4), round(found.lse.item(), 4), found.argmax.item()
        (0.3653, 2.1269, 0)
    """
    options = _at_temperature("token_statistics", temperature, ignore_index)
    shared = group, vocab_size
    _, nll, lse, entropy, argmax = _statistics(
        "token_statistics", logits, labels, None, shift, options, inplace, True, shared
    )
    return TokenStatistics(0.0 - nll, entropy, lse, argmax)


@checked
def distillation(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    *,
    token_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
) -> TokenSums:
    """Sum of the divergences of a student from its teacher and count of the items, from both logits as they are.

    Of each row, with probabilities s, t and their mixture m = (1 - beta) s + beta t: ``beta KL(t | m) + (1 - beta) KL(s | m)``,
    the generalized Jensen-Shannon divergence of trl's GKD. Equivalent to, without the copies:

        log_s = (student_logits.float() / temperature).log_softmax(-1)
        log_t = (teacher_logits.float() / temperature).log_softmax(-1)
        if beta == 0: rows = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)   # KL(t | s), forward
        if beta == 1: rows = F.kl_div(log_t, log_s, reduction="none", log_target=True).sum(-1)   # KL(s | t), reverse
        else:
            log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
            rows = beta * kl(log_m, log_t) + (1 - beta) * kl(log_m, log_s)

    Args:
        student_logits, teacher_logits: (..., V) of one shape and dtype, bf16, fp16, fp32 or fp64, of any strides. The
            gradient goes to whichever requires one; a teacher that does not costs none.
        labels: (...) int64 or int32 that say which rows count: all but those with ignore_index. None: all rows.
        temperature: both logits are divided by it, > 0. The loss is not multiplied by its square.
        beta: share of the teacher in the mixture, in [0, 1].
        token_weight: (...) a weight for each label, as in cross_entropy.
        shift: row (..., t) counts where label (..., t + shift) does.
        ignore_index: of labels that count nothing.

    Returns:
        TokenSums without metrics. A class of which both have probability 0 adds nothing.

    Raises:
        TypeError, ValueError, RuntimeError: as cross_entropy. DTensors are refused.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> sums = distillation(student, teacher, beta=0.0)
        >>> sums.num_items.item(), round(sums.loss_sum.item(), 4)
        (2, 0.4338)
    """
    name = "distillation"
    check_tensors(name, ("student_logits (..., V)", student_logits), ("teacher_logits (..., V)", teacher_logits))
    if teacher_logits.layout != torch.strided:
        raise RuntimeError(
            f"{name}: expected teacher_logits of dense layout, got {teacher_logits.layout}; pass teacher_logits.to_dense()"
        )
    refuse_functorch(name, student_logits, teacher_logits, token_weight)
    refuse_dtensors(name, student_logits, teacher_logits, labels, token_weight)
    options = _distillation_options(name, temperature, beta, student_logits)
    mask = _mask_of(name, labels, student_logits, shift, ignore_index)
    losses = ops.distillation(student_logits, teacher_logits, mask, **options)[0]
    sums = _sums_of_mask(name, losses, mask, token_weight, shift)
    return sums if labels is None else inside.seen(name, sums, labels, shift, ignore_index, None)


@functools.partial(checked_loss, is_made=False)
def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    num_items_in_batch: NumItems = None,
    *,
    token_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """distillation, divided by the items of the whole optimizer step; None: by those of the call, or their weights.

    With labels it is trl's ``GKDTrainer.generalized_jsd_loss``, whose arguments it has.

    Args:
        num_items_in_batch: see causal_lm_loss.
        student_logits, teacher_logits, labels, temperature, beta, token_weight, shift, ignore_index: see distillation.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError: as distillation, and where num_items_in_batch does not fit.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> round(accumloss.distillation_loss(student, teacher, beta=0.0, num_items_in_batch=4).item(), 4)
        0.1084
    """
    sums = distillation(
        student_logits, teacher_logits, labels, temperature, beta, token_weight=token_weight, shift=shift,
        ignore_index=ignore_index,
    )  # fmt: skip
    return divided("distillation_loss", sums, num_items_in_batch)


@checked
def linear_distillation(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    max_scratch_bytes: int | None = None,
) -> TokenSums:
    """distillation of ``F.linear`` of both hidden states, chunk by chunk: neither logits ever exist as a whole.

    Forward is a product of each; backward makes both again, and two products of the student's gradient.

    Args:
        student_hidden, teacher_hidden: (..., H) of one dtype, each of its own H.
        student_weight, teacher_weight: (V, H) of the heads, of one vocabulary. The teacher's must need no gradient.
        student_bias, teacher_bias: (V,) or None.
        labels, temperature, beta, token_weight, shift, ignore_index: see distillation.
        max_scratch_bytes: memory beside inputs and gradients, half of it for the teacher's logits. None: 256 MiB.

    Returns:
        TokenSums without metrics.

    Raises:
        TypeError, ValueError, RuntimeError: as linear_cross_entropy. DTensors and torch.compile are refused.

    Examples:
        >>> student, teacher = torch.randn(3, 4), torch.randn(3, 8)
        >>> heads = torch.zeros(5, 4), torch.zeros(5, 8)
        >>> sums = accumloss.linear_distillation(student, heads[0], teacher, heads[1])
        >>> sums.num_items.item(), round(sums.loss_sum.item(), 4)  # both say the same of 5 classes
        (3, 0.0)
    """
    name = "linear_distillation"
    tensors = {
        "student_hidden (..., H)": student_hidden, "student_weight (V, H)": student_weight,
        "teacher_hidden (..., H)": teacher_hidden, "teacher_weight (V, H)": teacher_weight,
    }  # fmt: skip
    check_tensors(name, *tensors.items())
    refuse_functorch(name, *tensors.values(), token_weight)
    refuse_dtensors(name, *tensors.values(), labels, token_weight)
    options = _distillation_options(name, temperature, beta, student_hidden)
    mask = _mask_of(name, labels, student_hidden, shift, ignore_index)
    student = (student_hidden, student_weight, student_bias)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    losses = linear.distillation_rows(name, student, teacher, mask, options, max_scratch_bytes)
    sums = _sums_of_mask(name, losses, mask, token_weight, shift)
    return sums if labels is None else inside.seen(name, sums, labels, shift, ignore_index, None)


@checked
def linear_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    num_items_in_batch: NumItems = None,
    *,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    shift: int = 0,
    ignore_index: int = -100,
    max_scratch_bytes: int | None = None,
) -> torch.Tensor:
    """linear_distillation, divided by the items of the whole optimizer step; None: by those of the call, or their weights.

    Args:
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, beta: see linear_distillation.
        num_items_in_batch: see causal_lm_loss.
        student_bias, teacher_bias, token_weight, shift, ignore_index, max_scratch_bytes: see linear_distillation.

    Returns:
        0-dim loss, fp32 (fp64 for fp64 hidden states).

    Raises:
        TypeError, ValueError, RuntimeError: as linear_distillation, and where num_items_in_batch does not fit.

    Examples:
        >>> student, teacher = torch.randn(3, 4), torch.randn(3, 8)
        >>> heads = torch.zeros(5, 4), torch.zeros(5, 8)
        >>> round(accumloss.linear_distillation_loss(student, heads[0], teacher, heads[1], num_items_in_batch=3).item(), 4)
        0.0
    """
    sums = linear_distillation(
        student_hidden, student_weight, teacher_hidden, teacher_weight, labels, temperature, beta,
        student_bias=student_bias, teacher_bias=teacher_bias, token_weight=token_weight, shift=shift,
        ignore_index=ignore_index, max_scratch_bytes=max_scratch_bytes,
    )  # fmt: skip
    return divided("linear_distillation_loss", sums, num_items_in_batch)


def divided(name: str, sums: TokenSums, num_items_in_batch: NumItems) -> torch.Tensor:
    divisor = divisor_of(name, num_items_in_batch, sums.loss_sum)
    return sums.mean_loss if divisor is None else sums.loss_sum / divisor


def _distillation_options(name: str, temperature: float, beta: float, like: torch.Tensor) -> dict[str, Any]:
    is_number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    if not is_number or not 0 <= beta <= 1:
        raise ValueError(f"{name}: expected beta in [0, 1], got {beta!r}")
    options = _at_temperature(name, temperature, -100)
    options.check(name, ops.accumulation_dtype(like))
    return {"beta": float(beta), "logit_scale": options.logit_scale}


def _mask_of(
    name: str, labels: torch.Tensor | None, logits: torch.Tensor, shift: int, ignore_index: int
) -> torch.Tensor:
    """(...) int64: 0 for a row that counts, else -100; what the labels are beyond that is of no interest here."""
    check_shift(name, shift)
    LossOptions(ignore_index=ignore_index)  # refuses what is none
    rows = logits.shape[:-1]
    if labels is None:
        labels = torch.zeros(rows, dtype=torch.int64, device=logits.device)
    check_tensors(name, ("labels (...)", labels))
    if labels.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"{name}: expected labels of dtype int64 or int32, got {labels.dtype}")
    if labels.shape != rows or logits.dim() < 1:
        raise RuntimeError(f"{name}: expected labels of shape {tuple(rows)}, got {tuple(labels.shape)}")
    labels = reference.shift_labels(labels, shift, ignore_index) if labels.dim() else labels
    return torch.where(labels.to(logits.device) == ignore_index, -100, 0)


def _sums_of_mask(
    name: str, losses: torch.Tensor, mask: torch.Tensor, token_weight: torch.Tensor | None, shift: int
) -> TokenSums:
    if token_weight is not None:
        check_token_weight(name, token_weight, mask)
        token_weight = shifted(token_weight, shift)
    return sums_of_losses(losses, mask == 0, token_weight)


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
    max_scratch_bytes: int | None = None,
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

    Examples:
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
    shared: tuple[dist.ProcessGroup | None, int | None],
) -> tuple[torch.Tensor, ...]:
    """The outputs of the op of that name, entropy and argmax where metrics. shared: group and vocab_size."""
    check_tensors(name, ("logits (..., V)", logits), ("labels (...)", labels))
    if weight is not None:
        check_tensors(name, ("weight (V,), or None", weight))
    check_shift(name, shift)
    refuse_functorch(name, logits, labels, weight)
    options.check(name, ops.accumulation_dtype(logits))
    if inplace not in (False, "backward"):
        raise ValueError(f'{name}: expected False or "backward" for inplace, got {inplace!r}')
    is_in_place = bool(inplace) and torch.is_grad_enabled() and logits.requires_grad
    if is_in_place:
        check_in_place(name, logits, inplace)
    group, vocab_size = shared
    if not is_parallel(logits, labels, group):
        check_vocab_size(name, logits, vocab_size)
        return _of_rows(logits, labels, weight, of_op(options, shift, metrics), is_in_place)
    part = checked_part_of(name, logits, labels, weight, shift, options, group, vocab_size)
    local = part.logits
    if is_in_place and part.mesh is not None:
        local = Overwritten.apply(local, logits.detach())
    if part.shard is None:
        found = _of_rows(local, part.labels, part.weight, of_op(options, 0, metrics), is_in_place)
    else:
        found = VocabParallelRows.apply(
            local, part.labels, part.weight, name, part.shard, options, metrics, is_in_place
        )
    return tuple(part.wrap_rows(value) for value in found[: 5 if metrics else 3])


def _of_rows(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, kwargs: dict[str, Any], in_place: bool
) -> tuple[torch.Tensor, ...]:
    if in_place:
        return ops.TokenStatisticsInPlace.apply(logits, labels, weight, kwargs)
    return ops.token_statistics(logits, labels, weight, **kwargs)


def refuse_dtensors(name: str, *tensors: Any) -> None:
    for tensor in tensors:
        if tensor is not None and is_dtensor(tensor):
            raise ValueError(
                f"{name}: expected plain tensors, got a DTensor; pass logits.to_local() and the labels of its rows where "
                "rows are shared out, logits.full_tensor() where classes are"
            )
