"""The divergence of a student from a teacher, each from its hidden states: logits of both exist a chunk at a time.

Forward makes both chunks, a product each. Backward makes them once more, turns the student's into their gradient where they
lie, and takes that to the student's hidden states and weight. The teacher has no gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import checks, ops
from . import compute
from .compute import Needs, Place
from .op import autocast, check, check_kinds, needs_of
from .plan import MAX_SCRATCH_BYTES
from .tokens import run_rows


def distillation_rows(
    name: str,
    student: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],  # hidden (..., H), weight (V, H), bias (V,)
    teacher: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],  # the same, of an H of its own
    labels: torch.Tensor,  # (...) 0, or -100 for a row that counts nothing
    options: dict[str, Any],  # of the op distillation: beta, logit_scale
    max_scratch_bytes: int | None,
) -> torch.Tensor:
    """The loss of each row (...)."""
    hidden, weight, bias = student
    check(name, hidden, weight, labels, bias, None, None, max_scratch_bytes, of="student_")
    check(name, teacher[0], teacher[1], labels, teacher[2], None, None, max_scratch_bytes, of="teacher_")
    if teacher[1].shape[0] != weight.shape[0]:
        raise RuntimeError(
            f"{name}: expected student_weight and teacher_weight of one vocabulary, got {tuple(weight.shape)} and "
            f"{tuple(teacher[1].shape)}; cut both to the classes that they share"
        )
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in teacher):
        raise RuntimeError(
            f"{name}: expected a teacher that needs no gradient, got one that does; run it under torch.no_grad(), freeze its "
            "head, or give both logits to distillation_loss, which has a gradient for either"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: expected no torch.compile around it, got one; call it outside of what is compiled")
    hidden, weight, bias = autocast(hidden, weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = autocast(*teacher)
    teacher = (teacher_hidden, teacher_weight, teacher_bias)
    if teacher[0].dtype != hidden.dtype:
        raise RuntimeError(
            f"{name}: expected teacher_hidden of the dtype of student_hidden, {hidden.dtype}, got {teacher[0].dtype}; "
            "convert one of them"
        )
    if teacher[0].device != hidden.device:
        raise RuntimeError(
            f"{name}: expected teacher_hidden on student_hidden's device {hidden.device}, got {teacher[0].device}"
        )
    check_kinds(name, hidden, weight, labels, bias, of="student_")
    check_kinds(name, *teacher[:2], labels, teacher[2], of="teacher_")
    needs = needs_of(hidden, weight, bias)
    return LinearDistillation.apply(hidden, weight, bias, teacher, labels, needs, options, max_scratch_bytes)


def half_of(max_scratch_bytes: int | None) -> int:
    """Of the memory for two heads."""
    return (MAX_SCRATCH_BYTES if max_scratch_bytes is None else max_scratch_bytes) // 2


class LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher, labels, needs, options, max_scratch_bytes):
        ctx.needs, ctx.options, ctx.max_scratch_bytes = needs, options, max_scratch_bytes
        ctx.save_for_backward(hidden, weight, bias, labels, *teacher)
        losses = torch.zeros(labels.numel(), dtype=ops.accumulation_dtype(hidden), device=hidden.device)
        of_teacher = _Logits(teacher)

        def turn(logits: torch.Tensor, targets: torch.Tensor, place: Place) -> None:
            losses[place] = ops.distillation(logits, of_teacher(place), targets, **options)[0]

        run_rows(
            turn, hidden, weight, labels, bias, None, Needs(False, False, False), _ROWS, half_of(max_scratch_bytes)
        )
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx, grad_loss):
        checks.refuse_forward_ad("accumloss", grad_loss)
        hidden, weight, bias, labels, *teacher = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs
        if torch.is_grad_enabled():
            with torch.no_grad():
                t = torch.nn.functional.linear(*teacher)
            losses = ops.distillation(torch.nn.functional.linear(hidden, weight, bias), t, labels, **options)[0]
            wanted = [x for x, needed in zip((hidden, weight, bias), needs, strict=True) if needed]
            graph = iter(torch.autograd.grad(losses, wanted, grad_loss, create_graph=True))
            return *(next(graph) if needed else None for needed in needs), *(None,) * 5
        grad = grad_loss.reshape(-1)
        labels = torch.where(grad_loss != 0, labels, -100)  # a row to which nothing comes back takes no part
        of_teacher = _Logits(tuple(teacher))

        def turn(logits: torch.Tensor, targets: torch.Tensor, place: Place) -> None:
            of_chunk = of_teacher(place)
            found = ops.distillation(logits, of_chunk, targets, **options)  # of these very logits
            ops.distillation_backward_(grad[place], logits, of_chunk, targets, *found, **options)

        found = run_rows(turn, hidden, weight, labels, bias, None, needs, _ROWS, half_of(ctx.max_scratch_bytes))
        of_hidden = None if found.hidden is None else found.hidden.view(hidden.shape)
        of_weight = None if found.weight is None else found.weight.to(weight.dtype)
        of_bias = None if found.bias is None else found.bias.to(bias.dtype)
        return of_hidden, of_weight, of_bias, *(None,) * 5


_ROWS = {"ignore_index": -100}  # what compute.run has to know of the labels


class _Logits:
    """Logits of some rows of a head, in a buffer that is reused."""

    def __init__(self, head: tuple[Any, ...]):
        hidden, weight, bias = head
        self.hidden = hidden.detach().reshape(-1, hidden.shape[-1])
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.buffer = self.hidden.new_empty(0, self.weight.shape[0])

    def __call__(self, place: Place) -> torch.Tensor:
        rows = self.hidden[place]
        if self.buffer.shape[0] < rows.shape[0]:
            self.buffer = ops.scratch(rows, rows.shape[0], self.weight.shape[0])
        logits = self.buffer[: rows.shape[0]]
        compute.product_of_logits(logits, rows, self.weight, self.bias)
        return logits
