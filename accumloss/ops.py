"""The compiled ops: fake kernels, autograd formulas. The only module that touches ``torch.ops.accumloss``.

``cross_entropy`` differentiates like any op. Its gradient is a second visit of the logits, ``cross_entropy_backward``.
``cross_entropy_with_grad`` visits them once and writes the gradient at the same time; for that the divisor of the step
must be known in forward. The classes at the end of this file put the latter, and the two in-place variants, into the
graph: an op that overwrites its input cannot have a registered formula.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _C, checks, fallback, reference  # _C registers the ops
from ._compat import (
    after_ad_inplace,
    after_autograd,
    below_ad_inplace,
    below_autograd,
    direct_apply,
    is_functorch_active,
)
from .keywords import checked
from .options import LossOptions
from .sums import at_least_one, wide_dtype

_ops = torch.ops.accumloss

NO_SECOND_DERIVATIVE = (
    "accumloss: expected create_graph=False where processes share the vocabulary, got True; a second derivative needs the "
    "logits of all of them: gather them, and leave group= out"
)


def accumulation_dtype(logits: torch.Tensor) -> torch.dtype:
    """The dtype of the sums: fp64 for fp64 logits, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# Fake kernels --------------------------------------------------------------------------------------------------------


def _fake_sums(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    acc = accumulation_dtype(logits)
    dtypes = (acc, torch.int64, acc, torch.int64, acc)  # loss_sum, num_items, total_weight, num_correct, entropy_sum
    return tuple(logits.new_empty((), dtype=dtype) for dtype in dtypes)


@torch.library.register_fake("accumloss::cross_entropy")
def _(logits, labels, weight=None, **options):
    checks.check_call("cross_entropy", logits, labels, weight, options)
    loss_sum, num_items, total_weight, num_correct, entropy_sum = _fake_sums(logits)
    lse = logits.new_empty(labels.shape, dtype=wide_dtype(logits.device))
    nll = logits.new_empty(labels.shape, dtype=accumulation_dtype(logits))
    return loss_sum, num_items, total_weight, lse, num_correct, entropy_sum, nll


def _check_backward(function, grad_loss_sum, logits, labels, lse, nll, weight, options, shard=None):
    checks.check_call(function, logits, labels, weight, options, shard)
    checks.check_grad(function, grad_loss_sum, logits)
    checks.check_saved(function, "lse", lse, wide_dtype(logits.device), labels, logits)
    checks.check_saved(function, "nll", nll, accumulation_dtype(logits), labels, logits)


@torch.library.register_fake("accumloss::cross_entropy_backward")
def _(grad_loss_sum, logits, labels, lse, nll, weight=None, **options):
    _check_backward("cross_entropy_backward", grad_loss_sum, logits, labels, lse, nll, weight, options)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("accumloss::cross_entropy_backward_")
def _(grad_loss_sum, logits, labels, lse, nll, weight=None, **options):
    checks.check_in_place("cross_entropy_backward_", logits)
    _check_backward("cross_entropy_backward_", grad_loss_sum, logits, labels, lse, nll, weight, options)


@torch.library.register_fake("accumloss::cross_entropy_with_grad")
def _(grad_loss_sum, logits, labels, weight=None, **options):
    checks.check_call("cross_entropy_with_grad", logits, labels, weight, options)
    checks.check_grad("cross_entropy_with_grad", grad_loss_sum, logits)
    return *_fake_sums(logits), logits.new_empty(logits.shape)


@torch.library.register_fake("accumloss::cross_entropy_with_grad_")
def _(grad_loss_sum, logits, labels, weight=None, **options):
    checks.check_in_place("cross_entropy_with_grad_", logits)
    checks.check_call("cross_entropy_with_grad_", logits, labels, weight, options)
    checks.check_grad("cross_entropy_with_grad_", grad_loss_sum, logits)
    return _fake_sums(logits)


@torch.library.register_fake("accumloss::add_cross_entropy_")
def _(totals, grad_loss_sum, logits, labels, weight=None, **options):
    name = "add_cross_entropy_"
    if grad_loss_sum is not None:
        checks.check_in_place(name, logits)
    checks.check_call(name, logits, labels, weight, options)
    checks.check_totals(name, totals, logits)
    if grad_loss_sum is not None:
        checks.check_grad(name, grad_loss_sum, logits)


@torch.library.register_fake("accumloss::mean_with_grad")
def _(divisor, logits, labels, weight=None, expected_grad=1.0, **options):
    checks.check_call("mean_with_grad", logits, labels, weight, options)
    checks.check_divisor("mean_with_grad", divisor, logits, accumulation_dtype(logits))
    return logits.new_empty((), dtype=divisor.dtype), logits.new_empty(logits.shape)


@torch.library.register_fake("accumloss::token_statistics")
def _(logits, labels, weight=None, *, metrics=False, **options):
    checks.check_call("token_statistics", logits, labels, weight, options)
    acc = accumulation_dtype(logits)
    sizes = labels.shape if metrics else (0,)
    loss, nll = (logits.new_empty(labels.shape, dtype=acc) for _ in range(2))
    lse = logits.new_empty(labels.shape, dtype=wide_dtype(logits.device))
    return loss, nll, lse, logits.new_empty(sizes, dtype=acc), logits.new_empty(sizes, dtype=torch.int64)


def _check_tokens_backward(function, grads, logits, labels, nll, lse, entropy, weight, options):
    options = dict(options)
    shard = options.pop("class_offset", 0), options.pop("vocab_size", 0)
    checks.check_call(function, logits, labels, weight, options, shard)
    checks.check_saved(function, "lse", lse, wide_dtype(logits.device), labels, logits)
    checks.check_saved(function, "nll", nll, accumulation_dtype(logits), labels, logits)
    if grads[3] is not None:
        checks.check_saved(function, "entropy", entropy, accumulation_dtype(logits), labels, logits)
    checks.check_token_grads(function, grads, labels, logits)


@torch.library.register_fake("accumloss::token_statistics_backward")
def _(grad_loss, grad_nll, grad_lse, grad_entropy, logits, labels, nll, lse, entropy, weight=None, **options):
    grads = (grad_loss, grad_nll, grad_lse, grad_entropy)
    _check_tokens_backward("token_statistics_backward", grads, logits, labels, nll, lse, entropy, weight, options)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("accumloss::token_statistics_backward_")
def _(grad_loss, grad_nll, grad_lse, grad_entropy, logits, labels, nll, lse, entropy, weight=None, **options):
    name = "token_statistics_backward_"
    checks.check_in_place(name, logits)
    grads = (grad_loss, grad_nll, grad_lse, grad_entropy)
    _check_tokens_backward(name, grads, logits, labels, nll, lse, entropy, weight, options)


# Of rows of two tensors.


def _check_saved_rows(function, saved, labels, logits):
    for name, tensor in saved.items():
        checks.check_saved(function, name, tensor, wide_dtype(logits.device), labels, logits)


@torch.library.register_fake("accumloss::distillation")
def _(student_logits, teacher_logits, labels, **options):
    checks.check_distillation("distillation", student_logits, teacher_logits, labels, **options)
    loss = student_logits.new_empty(labels.shape, dtype=accumulation_dtype(student_logits))
    wide = wide_dtype(student_logits.device)
    return loss, *(student_logits.new_empty(labels.shape, dtype=wide) for _ in range(4))


def _check_distillation_backward(
    function, grad_loss, student, teacher, labels, lse, teacher_lse, of_student, of_teacher, options
):
    checks.check_distillation(function, student, teacher, labels, **options)
    checks.check_row_grad(function, "grad_loss", grad_loss, labels, student)
    saved = {"lse": lse, "teacher_lse": teacher_lse, "of_student": of_student, "of_teacher": of_teacher}
    _check_saved_rows(function, saved, labels, student)


@torch.library.register_fake("accumloss::distillation_backward")
def _(grad_loss, student_logits, teacher_logits, labels, loss, lse, teacher_lse, of_student, of_teacher, **options):
    given = (grad_loss, student_logits, teacher_logits, labels, lse, teacher_lse, of_student, of_teacher)
    _check_distillation_backward("distillation_backward", *given, options)
    return student_logits.new_empty(student_logits.shape)


@torch.library.register_fake("accumloss::distillation_backward_")
def _(grad_loss, student_logits, teacher_logits, labels, loss, lse, teacher_lse, of_student, of_teacher, **options):
    checks.check_in_place("distillation_backward_", student_logits)
    given = (grad_loss, student_logits, teacher_logits, labels, lse, teacher_lse, of_student, of_teacher)
    _check_distillation_backward("distillation_backward_", *given, options)


def _check_soft(function, logits, targets, weight, options):
    checks.require(logits.dim() >= 1, function, lambda: "logits of shape (..., V), got a 0-dim tensor")
    label = logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    checks.check_call(function, logits, label, weight, options)
    checks.check_like(function, "targets", targets, logits, "logits")
    return label


@torch.library.register_fake("accumloss::soft_cross_entropy")
def _(logits, targets, weight=None, **options):
    label = _check_soft("soft_cross_entropy", logits, targets, weight, options)
    loss, nll = (logits.new_empty(label.shape, dtype=accumulation_dtype(logits)) for _ in range(2))
    wide = wide_dtype(logits.device)
    lse, total, of_label = (logits.new_empty(label.shape, dtype=wide) for _ in range(3))
    return loss, nll, lse, total, of_label, label


@torch.library.register_fake("accumloss::soft_cross_entropy_backward")
def _(grad_loss, logits, targets, loss, nll, lse, total, of_label, label, weight=None, **options):
    name = "soft_cross_entropy_backward"
    labels = _check_soft(name, logits, targets, weight, options)
    checks.check_row_grad(name, "grad_loss", grad_loss, labels, logits)
    checks.check_saved(name, "nll", nll, accumulation_dtype(logits), labels, logits)
    _check_saved_rows(name, {"lse": lse, "total": total, "of_label": of_label}, labels, logits)
    checks.check_saved(name, "label", label, torch.int64, labels, logits)
    return logits.new_empty(logits.shape)


# Of logits that are a shard of the vocabulary: class_offset and vocab_size say which.


def shard_columns(label_smoothing: float, metrics: bool) -> int:
    """How many numbers a shard has to tell of a row: ShardColumns of csrc/row.h."""
    return 3 + (label_smoothing > 0) + 2 * metrics


@torch.library.register_fake("accumloss::cross_entropy_shard")
def _(logits, labels, weight=None, *, class_offset, vocab_size, metrics=False, **options):
    checks.check_call("cross_entropy_shard", logits, labels, weight, options, (class_offset, vocab_size))
    columns = shard_columns(options.get("label_smoothing", 0.0), metrics)
    return logits.new_empty((columns, *labels.shape), dtype=wide_dtype(logits.device))


@torch.library.register_fake("accumloss::cross_entropy_shard_backward")
def _(grad_loss_sum, logits, labels, lse, nll, weight=None, *, class_offset, vocab_size, **options):
    shard = (class_offset, vocab_size)
    name = "cross_entropy_shard_backward"
    _check_backward(name, grad_loss_sum, logits, labels, lse, nll, weight, options, shard)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("accumloss::cross_entropy_shard_backward_")
def _(grad_loss_sum, logits, labels, lse, nll, weight=None, *, class_offset, vocab_size, **options):
    shard = (class_offset, vocab_size)
    name = "cross_entropy_shard_backward_"
    checks.check_in_place(name, logits)
    _check_backward(name, grad_loss_sum, logits, labels, lse, nll, weight, options, shard)


@torch.library.register_fake("accumloss::scratch")
def _(like, rows, columns):
    checks.check_scratch(like, rows, columns)
    return like.new_empty(rows, columns)


@torch.library.register_fake("accumloss::scale_")
def _(values, factor):
    checks.check_scale(values, factor)


# Autograd ------------------------------------------------------------------------------------------------------------


class _RefusingForwardAD(torch.library.Library):
    """Registers kernels that refuse tangents before they do what they are for: below them a tangent is lost in silence."""

    def impl(self, op_name, fn, dispatch_key="", **kwargs):
        def kernel(keyset, *args, **options):
            checks.refuse_forward_ad(f"torch.ops.accumloss.{op_name}", *args)
            return fn(keyset, *args, **options)

        super().impl(op_name, kernel, dispatch_key, **kwargs)


_library = _RefusingForwardAD("accumloss", "IMPL")


def _pass_on(op: Any) -> Any:
    """A kernel for an op without a formula."""

    def kernel(keyset, *args, **options):
        return op.redispatch(keyset & after_ad_inplace, *args, **options)

    return kernel


for _name in (
    "cross_entropy_backward_", "cross_entropy_with_grad_", "add_cross_entropy_", "cross_entropy_shard_backward_", "scale_",
    "token_statistics_backward_", "distillation_backward_",
):  # fmt: skip
    _library.impl(_name, _pass_on(getattr(_ops, _name).default), "ADInplaceOrView", with_keyset=True)


class CrossEntropy(torch.autograd.Function):
    """cross_entropy, whose gradient is a second visit of the logits. loss_sum has one; with a z-loss lse has too."""

    apply = direct_apply

    @staticmethod
    def forward(ctx, logits, weight, call):
        num_outputs, keyset, labels, ctx.options = call
        outputs = _below_autograd(keyset, logits, labels, weight, ctx.options)
        ctx.save_for_backward(logits, labels, outputs[3], outputs[6], weight)
        outputs = outputs[:num_outputs]
        has_z_loss = ctx.options.get("z_loss", 0.0) > 0
        ctx.mark_non_differentiable(*(out for i, out in enumerate(outputs) if i > 0 and not (i == 3 and has_z_loss)))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, grad_loss_sum, *others):
        grad_lse = others[2] if len(others) > 2 else None
        if grad_loss_sum is None and grad_lse is None:
            return None, None, None
        logits, labels, lse, nll, weight = ctx.saved_tensors
        if grad_lse is not None:
            of_rows = None if grad_loss_sum is None else grad_loss_sum.expand(labels.shape)
            saved = (nll, lse.detach(), nll.new_empty(0))
            grad = _ops.token_statistics_backward(
                of_rows, None, grad_lse, None, logits, labels, *saved, weight, **{**ctx.options, "metrics": False}
            )
            return grad, None, None
        return _gradient(grad_loss_sum, logits, labels, lse, nll, weight, ctx.options), None, None


def _below_autograd(keyset, logits, labels, weight, options):
    with below_autograd():
        if keyset is None:  # of an op that is not cross_entropy itself
            return _ops.cross_entropy(logits, labels, weight, **options)
        return _ops.cross_entropy.default.redispatch(keyset & after_autograd, logits, labels, weight, **options)


def _gradient(grad_loss_sum, logits, labels, lse, nll, weight, options):
    """cross_entropy_backward; below autograd where nobody differentiates it again."""
    if torch.is_grad_enabled():
        return _ops.cross_entropy_backward(grad_loss_sum, logits, labels, lse, nll, weight, **options)
    checks.refuse_forward_ad("torch.ops.accumloss.cross_entropy_backward", grad_loss_sum, logits, lse, nll, weight)
    with below_autograd():
        return _ops.cross_entropy_backward(grad_loss_sum, logits, labels, lse, nll, weight, **options)


def _first_outputs(num_outputs, keyset, logits, labels, weight, options):
    """The first outputs of cross_entropy, with a gradient where one is wanted."""
    checks.refuse_forward_ad("torch.ops.accumloss.cross_entropy", logits, labels, weight)
    is_recorded = torch.is_grad_enabled() and (logits.requires_grad or (weight is not None and weight.requires_grad))
    if not is_recorded:
        return _below_autograd(keyset, logits, labels, weight, options)[:num_outputs]
    if is_functorch_active():
        raise RuntimeError(
            "torch.ops.accumloss.cross_entropy: expected no torch.func transform (grad, vjp, vmap, ...) around tensors that "
            "require grad, got one; use torch.autograd.grad, which also gives second derivatives"
        )
    return CrossEntropy.apply(logits, weight, (num_outputs, keyset, labels, options))


# Kernels of their own and not register_autograd, whose wrappers take longer than a small call.


def _cross_entropy(keyset, logits, labels, weight=None, **options):
    checks.refuse_dtensor("cross_entropy", logits, labels)
    return _first_outputs(7, keyset, logits, labels, weight, options)


def _language_model(shift: int) -> Any:
    """A kernel that is cross_entropy with a shift, whose outputs it records itself. What traces sees only cross_entropy."""
    of_shift = {"shift": shift} if shift else {}

    def kernel(logits, labels, weight=None, **options):
        checks.refuse_dtensor("causal_lm" if shift else "masked_lm", logits, labels)
        return _first_outputs(2, None, logits, labels, weight, {**of_shift, **options})

    return kernel


_kernels = torch.library.Library("accumloss", "IMPL")
fallback.register(_kernels)
_kernels.impl("cross_entropy", _cross_entropy, "Autograd", with_keyset=True)
_kernels.impl("causal_lm", _language_model(1), "CompositeImplicitAutograd")
_kernels.impl("masked_lm", _language_model(0), "CompositeImplicitAutograd")


def _setup_backward(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: torch.Tensor) -> None:
    grad_loss_sum, logits, labels, _, _, weight = inputs
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(grad_loss_sum, logits, labels, weight)


def _double_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    """Differentiates the gradient again, by the reference in plain PyTorch: right, and as slow and large as that is."""
    grad_loss_sum, logits, labels, weight = ctx.saved_tensors
    options = dict(ctx.options)
    shift, _ = options.pop("shift"), options.pop("metrics")
    acc = accumulation_dtype(logits)
    with torch.enable_grad():
        x = logits.detach().to(acc).requires_grad_()
        g = grad_loss_sum.detach().to(acc).requires_grad_()
        loss_sum = reference.cross_entropy(x, labels, weight, LossOptions(**options), shift=shift, dtype=acc)[0]
        (grad,) = torch.autograd.grad(loss_sum * g, x, create_graph=True)
        grad_x, grad_g = torch.autograd.grad(grad, (x, g), grad_grad.to(acc))
    return grad_g.to(grad_loss_sum.dtype), grad_x.to(logits.dtype), None, None, None, None


torch.library.register_autograd(
    "accumloss::cross_entropy_backward", _double_backward, setup_context=_setup_backward, lib=_library
)


def _setup_refused(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    pass


def _refuse_backward_of(name: str) -> Any:
    def refuse_backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"torch.ops.accumloss.{name}: expected no backward through it, since it returns the gradient itself; "
            "use torch.ops.accumloss.cross_entropy, or the functions of the accumloss package"
        )

    return refuse_backward


for _name in (
    "cross_entropy_with_grad", "mean_with_grad", "cross_entropy_shard", "cross_entropy_shard_backward",
):  # fmt: skip
    torch.library.register_autograd(
        f"accumloss::{_name}", _refuse_backward_of(_name), setup_context=_setup_refused, lib=_library
    )


# Row by row ----------------------------------------------------------------------------------------------------------


def _setup_tokens(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    logits, labels, weight = inputs
    _, nll, lse, entropy, _ = output
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(logits, labels, nll, lse, entropy, weight)
    ctx.set_materialize_grads(False)


def _tokens_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
    grads = grads[:4]
    if all(grad is None for grad in grads):
        return None, None, None
    if not ctx.options["metrics"]:
        grads = (*grads[:3], None)
    logits, labels, nll, lse, entropy, weight = ctx.saved_tensors
    # nll, lse and entropy are outputs: what a second derivative needs of them is in the formula of the op below
    saved = (nll.detach(), lse.detach(), entropy.detach())
    return _ops.token_statistics_backward(*grads, logits, labels, *saved, weight, **ctx.options), None, None


torch.library.register_autograd(
    "accumloss::token_statistics", _tokens_backward, setup_context=_setup_tokens, lib=_library
)


def _setup_tokens_backward(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: torch.Tensor) -> None:
    *grads, logits, labels, _, _, _, weight = inputs
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*grads, logits, labels, weight)


def _tokens_double_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    """By the reference in plain PyTorch, as that of cross_entropy_backward."""
    *grads, logits, labels, weight = ctx.saved_tensors
    options = dict(ctx.options)
    shift, _ = options.pop("shift"), options.pop("metrics")
    if options.pop("vocab_size") not in (0, logits.shape[-1]) or options.pop("class_offset"):
        raise RuntimeError(NO_SECOND_DERIVATIVE)
    acc = accumulation_dtype(logits)
    with torch.enable_grad():
        x = logits.detach().to(acc).requires_grad_()
        given = {i: grad.detach().to(acc).requires_grad_() for i, grad in enumerate(grads) if grad is not None}
        outputs = reference.token_statistics(x, labels, weight, LossOptions(**options), shift=shift, dtype=acc)
        (grad,) = torch.autograd.grad([outputs[i] for i in given], x, list(given.values()), create_graph=True)
        grad_x, *of_grads = torch.autograd.grad(
            grad, (x, *given.values()), grad_grad.to(acc), allow_unused=True, materialize_grads=True
        )
    found = dict(zip(given, of_grads, strict=True))
    returned = [None if grad is None else found[i].to(grad.dtype) for i, grad in enumerate(grads)]
    return *returned, grad_x.to(logits.dtype), None, None, None, None, None


torch.library.register_autograd(
    "accumloss::token_statistics_backward", _tokens_double_backward, setup_context=_setup_tokens_backward, lib=_library
)


class TokenStatisticsInPlace(torch.autograd.Function):
    """token_statistics, whose gradient overwrites the logits in backward."""

    @staticmethod
    def forward(ctx, logits, labels, weight, options):
        outputs = _ops.token_statistics(logits, labels, weight, **options)
        _, nll, lse, entropy, argmax = outputs
        ctx.save_for_backward(logits, labels, nll, lse, entropy, weight)
        ctx.options = options
        ctx.mark_non_differentiable(argmax)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        checks.refuse_forward_ad("accumloss", *grads)
        if all(grad is None for grad in grads[:4]):
            return None, None, None, None
        logits, labels, nll, lse, entropy, weight = ctx.saved_tensors  # raises where the logits changed since
        data = logits.detach()
        _ops.token_statistics_backward_(*grads[:4], data, labels, nll, lse, entropy, weight, **ctx.options)
        torch.autograd.graph.increment_version(logits)
        return data, None, None, None


# Rows of two tensors -------------------------------------------------------------------------------------------------


def _setup_distillation(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _distillation_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return None, None, None
    student, teacher, labels, *found = ctx.saved_tensors
    loss, lse, teacher_lse, of_student, of_teacher = (value.detach() for value in found)
    options = ctx.options
    of_student_logits = of_teacher_logits = None
    if ctx.needs_input_grad[0]:
        of_student_logits = _ops.distillation_backward(
            grad_loss, student, teacher, labels, loss, lse, teacher_lse, of_student, of_teacher, **options
        )
    if ctx.needs_input_grad[1]:  # the divergence is its own mirror image
        mirrored = {**options, "beta": 1 - options["beta"]}
        of_teacher_logits = _ops.distillation_backward(
            grad_loss, teacher, student, labels, loss, teacher_lse, lse, of_teacher, of_student, **mirrored
        )
    return of_student_logits, of_teacher_logits, None


torch.library.register_autograd(
    "accumloss::distillation", _distillation_backward, setup_context=_setup_distillation, lib=_library
)


def _setup_distillation_backward(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: torch.Tensor) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs[:4])


def _second_derivatives(grad_grad: torch.Tensor, loss_of: Any, grad_loss: torch.Tensor, *inputs: torch.Tensor) -> Any:
    """Of grad_loss and inputs, through d loss_of(inputs) / d inputs[0], by plain PyTorch."""
    acc = accumulation_dtype(inputs[0])
    with torch.enable_grad():
        leaves = [tensor.detach().to(acc).requires_grad_() for tensor in (grad_loss, *inputs)]
        (grad,) = torch.autograd.grad(loss_of(*leaves[1:], acc), leaves[1], leaves[0], create_graph=True)
        found = torch.autograd.grad(grad, leaves, grad_grad.to(acc), allow_unused=True, materialize_grads=True)
    return [value.to(tensor.dtype) for value, tensor in zip(found, (grad_loss, *inputs), strict=True)]


def _distillation_double_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad_loss, student, teacher, labels = ctx.saved_tensors

    def loss_of(s: torch.Tensor, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return reference.distillation(s, t, labels, **ctx.options, dtype=dtype)

    return *_second_derivatives(grad_grad, loss_of, grad_loss, student, teacher), *(None,) * 6


torch.library.register_autograd(
    "accumloss::distillation_backward",
    _distillation_double_backward,
    setup_context=_setup_distillation_backward,
    lib=_library,
)


def _setup_soft(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    logits, targets, weight = inputs
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(logits, targets, weight, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _soft_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return None, None, None
    if ctx.needs_input_grad[1]:
        raise RuntimeError(
            "torch.ops.accumloss.soft_cross_entropy: expected targets that need no gradient, got some that do; detach them, "
            "or use distillation_loss, which has a gradient for both"
        )
    logits, targets, weight, *found = ctx.saved_tensors
    saved = [value.detach() for value in found]
    return _ops.soft_cross_entropy_backward(grad_loss, logits, targets, *saved, weight, **ctx.options), None, None


torch.library.register_autograd(
    "accumloss::soft_cross_entropy", _soft_backward, setup_context=_setup_soft, lib=_library
)


def _setup_soft_backward(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: torch.Tensor) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs[:3], inputs[9])


def _soft_double_backward(ctx: Any, grad_grad: torch.Tensor) -> tuple:
    grad_loss, logits, targets, weight = ctx.saved_tensors

    def loss_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return reference.soft_cross_entropy(x, targets, weight, LossOptions(**ctx.options), dtype=dtype)

    return *_second_derivatives(grad_grad, loss_of, grad_loss, logits), *(None,) * 8


torch.library.register_autograd(
    "accumloss::soft_cross_entropy_backward", _soft_double_backward, setup_context=_setup_soft_backward, lib=_library
)


# The gradient in forward, and in place -------------------------------------------------------------------------------


class GradInForward(torch.autograd.Function):
    """``loss_sum / divisor``, its gradient written in the same visit of the logits, into a buffer of its own.

    It is written for ``expected_grad`` as the incoming gradient, handed out by the first backward, and scaled in place
    where another comes; a repeated backward (retain_graph=True) computes it again, and one with create_graph=True
    computes it by an op that can be differentiated. bf16 and fp32 only: a gradient already divided by the number of
    items would underflow in fp16, before a GradScaler's factor reaches it.
    """

    apply = direct_apply

    @staticmethod
    def forward(ctx, logits, call):
        # logits (..., V), labels (...), weight (V,) or None, divisor ()
        labels, weight, divisor, ctx.expected_grad, ctx.options = call
        ctx.save_for_backward(logits, labels, weight, divisor)
        with below_autograd():
            if logits.is_cpu and "metrics" not in ctx.options:
                loss, ctx.grad = _ops.mean_with_grad(divisor, logits, labels, weight, ctx.expected_grad, **ctx.options)
                return (loss,)
            factor = expected_factor(ctx.expected_grad, divisor)
            *sums, ctx.grad = _ops.cross_entropy_with_grad(factor, logits, labels, weight, **ctx.options)
        return _loss_and_sums(ctx, sums, divisor)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        checks.refuse_forward_ad("accumloss", grad_loss)
        grad, ctx.grad = ctx.grad, None
        if torch.is_grad_enabled():
            logits, labels, weight, divisor = ctx.saved_tensors
            _, _, _, lse, _, _, nll = _ops.cross_entropy(logits.detach(), labels, weight, **ctx.options)
            grad = _ops.cross_entropy_backward(grad_loss / divisor, logits, labels, lse, nll, weight, **ctx.options)
        elif grad is None:
            logits, labels, weight, divisor = ctx.saved_tensors
            grad = _ops.cross_entropy_with_grad(grad_loss / divisor, logits, labels, weight, **ctx.options)[-1]
        else:
            _scale_to(grad, grad_loss, ctx.expected_grad)
        return grad, None


class InPlaceForward(torch.autograd.Function):
    """GradInForward whose gradient overwrites the logits: one read, one write, no memory."""

    @staticmethod
    def forward(ctx, logits, labels, weight, divisor, expected_grad, options):
        data = logits.detach()
        sums = _ops.cross_entropy_with_grad_(expected_factor(expected_grad, divisor), data, labels, weight, **options)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits for its own backward must notice
        ctx.grad, ctx.expected_grad, ctx.options = data, expected_grad, options
        return _loss_and_sums(ctx, sums, divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        return gradient_handed_out(ctx, grad_loss), None, None, None, None, None


def gradient_handed_out(ctx: Any, grad_loss: torch.Tensor) -> torch.Tensor:
    """The gradient that took the place of the logits, ctx.grad, scaled to what has come back; once."""
    checks.refuse_forward_ad("accumloss", grad_loss)
    grad, ctx.grad = ctx.grad, None
    if grad is None:
        raise RuntimeError(
            'accumloss: expected one backward with inplace="forward", got a second one; the gradient took the '
            "place of the logits and was handed out; leave inplace off where the graph is retained"
        )
    _scale_to(grad, grad_loss, ctx.expected_grad)
    return grad


def expected_factor(expected_grad: float, divisor: torch.Tensor) -> torch.Tensor:
    """expected_grad / divisor: by one kernel where it is 1, the same bits."""
    return divisor.reciprocal() if expected_grad == 1 else expected_grad / divisor


def _loss_and_sums(ctx: Any, sums: Sequence[torch.Tensor], divisor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the functions here return: the loss, and with metrics the fields of TokenSums, which sums are."""
    loss = sums[0] / divisor
    if "metrics" not in ctx.options:
        return (loss,)
    ctx.mark_non_differentiable(*sums)
    return loss, *sums


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


def _scale_to(grad: torch.Tensor, grad_loss: torch.Tensor, expected_grad: float) -> None:
    """Scales a gradient that was written for one incoming gradient to another; nothing is visited where they are equal.

    Both are rounded to the dtype of the loss before they are divided, so that equal ones give exactly 1.
    """
    if grad_loss.is_cpu and not is_functorch_active() and grad_loss.item() == _rounded(expected_grad, grad_loss.dtype):
        return  # asked on the host, which waits for no device here
    factor = grad_loss if expected_grad == 1 else grad_loss / torch.full_like(grad_loss, expected_grad)
    with below_ad_inplace():
        if grad.is_contiguous():
            _ops.scale_(grad, factor)
        else:  # over logits as they lay
            grad.mul_(factor)


class InPlaceBackward(torch.autograd.Function):
    """``loss_sum / divisor``; the gradient overwrites the logits in backward."""

    @staticmethod
    def forward(ctx, logits, labels, weight, divisor, options):
        loss_sum, num_items, total_weight, lse, *metrics, nll = _ops.cross_entropy(logits, labels, weight, **options)
        if divisor is None:
            divisor = mean_divisor(num_items, total_weight, weight, loss_sum.dtype)
        ctx.save_for_backward(logits, labels, lse, nll, weight, divisor)
        ctx.options = options
        return _loss_and_sums(ctx, [loss_sum, num_items, total_weight, *metrics], divisor)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        checks.refuse_forward_ad("accumloss", grad_loss)
        logits, labels, lse, nll, weight, divisor = ctx.saved_tensors  # raises where the logits changed since
        data = logits.detach()
        _ops.cross_entropy_backward_(grad_loss / divisor, data, labels, lse, nll, weight, **ctx.options)
        torch.autograd.graph.increment_version(logits)
        return data, None, None, None, None


def mean_divisor(
    num_items: torch.Tensor, total_weight: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The divisor of the mean over one call, 0-dim: its items, or their total weight; 1 where there is none."""
    total = num_items.to(dtype) if weight is None else total_weight
    return at_least_one(total)


# Python names of the ops for the rest of the package ------------------------------------------------------------------

cross_entropy = _ops.cross_entropy
cross_entropy_with_grad_ = _ops.cross_entropy_with_grad_
add_cross_entropy_ = _ops.add_cross_entropy_
cross_entropy_shard = _ops.cross_entropy_shard
cross_entropy_shard_backward = _ops.cross_entropy_shard_backward
cross_entropy_shard_backward_ = _ops.cross_entropy_shard_backward_
token_statistics = _ops.token_statistics
token_statistics_backward = _ops.token_statistics_backward
token_statistics_backward_ = _ops.token_statistics_backward_
distillation = _ops.distillation
distillation_backward_ = _ops.distillation_backward_
soft_cross_entropy = _ops.soft_cross_entropy
scale_ = _ops.scale_
scratch = _ops.scratch


@checked
def build_info() -> dict[str, Any]:
    """What this build of accumloss was made from and with, and the CPU instruction set in use.

    Returns:
        dict with ``version``, ``torch`` (the version whose headers it was built with), ``compiler``, ``cuda`` (version,
        or None in a build without CUDA), ``cuda_architectures``, ``without_cuda`` (why the build has no CUDA kernels:
        ``"ACCUMLOSS_CUDA=OFF"`` or ``"nvcc was not found"``; None where it has them), ``cpu_capability``, and
        ``fallback``: the types of devices that plain PyTorch has served in this process so far, each with the reason.

    Examples:
        >>> accumloss.build_info()["version"] == accumloss.__version__
        True
    """
    return {**_C.build_info(), "fallback": dict(fallback.served)}


@checked
def empty_cache() -> int:
    """Returns the memory that waits for the next gradient on the CPU to the system, and its bytes to the caller.

    torch's allocator on the CPU, unlike the one on CUDA, keeps nothing: each large gradient would be mapped anew, which
    takes longer than the loss. Two blocks are kept, the largest so far, both together at most an eighth of the machine's
    memory, or of what the control groups of the process (a container's, say) leave of their limits.
    ``ACCUMLOSS_KEEP_MEMORY=0`` in the environment turns that off. torch 2.10 has no way to keep it.

    Returns:
        The bytes that waited.

    Examples:
        >>> accumloss.empty_cache() >= 0 and accumloss.empty_cache() == 0
        True
    """
    return _C.empty_cache()
