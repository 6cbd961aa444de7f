"""Statistics of each row from hidden states, without ever holding the logits.

Forward makes the logits chunk by chunk, one product. Backward makes a chunk's logits once more, turns them into their
gradient where they lie, for whatever has come back to each row, and takes that to hidden states and weight: three products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .. import checks, ops
from ..sums import wide_dtype
from . import compute
from .compute import Needs, Place
from .op import autocast, check, check_kinds, needs_of


def token_rows(
    name: str,
    hidden: torch.Tensor,  # (..., H)
    weight: torch.Tensor,  # (V, H)
    labels: torch.Tensor,  # (...) shifted
    bias: torch.Tensor | None,  # (V,)
    class_weight: torch.Tensor | None,  # (V,)
    options: dict[str, Any],  # of token_statistics, without shift
    max_scratch_bytes: int | None,
) -> tuple[torch.Tensor, ...]:
    """The outputs of ``torch.ops.accumloss.token_statistics`` for the logits of a head; all but argmax carry gradients."""
    check(name, hidden, weight, labels, bias, class_weight, None, max_scratch_bytes)
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: expected no torch.compile around it, got one; call it outside of what is compiled")
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_kinds(name, hidden, weight, labels, bias, class_weight)
    needs = needs_of(hidden, weight, bias)
    found = LinearTokens.apply(hidden, weight, labels, bias, class_weight, needs, options, max_scratch_bytes)
    return found if options["metrics"] else (*found[:3], *(value.detach() for value in found[3:]))


class LinearTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, class_weight, needs, options, max_scratch_bytes):
        ctx.needs, ctx.options, ctx.max_scratch_bytes = needs, options, max_scratch_bytes
        ctx.save_for_backward(hidden, weight, labels, bias, class_weight)
        ctx.set_materialize_grads(False)
        N, acc, device = labels.numel(), ops.accumulation_dtype(hidden), hidden.device
        of_metrics = N if options["metrics"] else 0
        outputs = [torch.zeros(N, dtype=dtype, device=device) for dtype in (acc, acc, wide_dtype(device))]
        outputs += [torch.zeros(of_metrics, dtype=acc, device=device), torch.full((of_metrics,), -1, device=device)]

        def turn(logits: torch.Tensor, targets: torch.Tensor, place: Place) -> None:
            found = ops.token_statistics(logits, targets, class_weight, **options)
            for output, value in zip(outputs, found, strict=True):
                if value.numel() == targets.numel():
                    output[place] = value

        run_rows(
            turn, hidden, weight, labels, bias, class_weight, Needs(False, False, False), options, max_scratch_bytes
        )
        outputs = [output.view(labels.shape) if output.numel() == N else output for output in outputs]
        ctx.mark_non_differentiable(outputs[4])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        checks.refuse_forward_ad("accumloss", *grads)
        hidden, weight, labels, bias, class_weight = ctx.saved_tensors
        grads, needs, options = grads[:4], ctx.needs, ctx.options
        if all(grad is None for grad in grads):
            return (None,) * 8
        if torch.is_grad_enabled():
            graph = _differentiable(grads, (hidden, weight, bias), needs, labels, class_weight, options)
            return graph[0], graph[1], None, graph[2], *(None,) * 4
        given = [None if grad is None else grad.reshape(-1) for grad in grads]
        # a row to which nothing comes back takes no part in the products
        is_used = torch.stack([grad != 0 for grad in given if grad is not None]).any(0)
        labels = torch.where(is_used.view(labels.shape), labels, options["ignore_index"])

        def turn(logits: torch.Tensor, targets: torch.Tensor, place: Place) -> None:
            # of these very logits: a product of other rows may round differently than in forward
            _, nll, lse, entropy, _ = ops.token_statistics(logits, targets, class_weight, **options)
            of_rows = [None if grad is None else grad[place] for grad in given]
            ops.token_statistics_backward_(*of_rows, logits, targets, nll, lse, entropy, class_weight, **options)

        found = run_rows(turn, hidden, weight, labels, bias, class_weight, needs, options, ctx.max_scratch_bytes)
        grad_hidden = found.hidden if found.hidden is None else found.hidden.view(hidden.shape)
        grad_weight = found.weight if found.weight is None else found.weight.to(weight.dtype)
        grad_bias = found.bias if bias is None or found.bias is None else found.bias.to(bias.dtype)
        return grad_hidden, grad_weight, None, grad_bias, *(None,) * 4


def run_rows(
    turn: compute.Turn,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    needs: Needs,
    options: dict[str, Any],
    max_scratch_bytes: int | None,
) -> compute.Outputs:
    """compute.run for hidden (..., H) and labels (...)."""
    one = torch.ones((), dtype=ops.accumulation_dtype(hidden), device=hidden.device)
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    bias = bias if bias is None else bias.detach()
    with torch.no_grad():
        return compute.run(
            one, rows, weight.detach(), labels.reshape(-1), bias, class_weight, needs, options, None, max_scratch_bytes,
            turn=turn,
        )  # fmt: skip


def _differentiable(
    grads: Sequence[torch.Tensor | None],
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    needs: Needs,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None,
    options: dict[str, Any],
) -> list[Any]:
    """The gradients by way of the logits, as a graph: for a backward of the backward."""
    outputs = ops.token_statistics(F.linear(*inputs), labels, class_weight, **options)
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=False) if grad is not None]
    wanted = [tensor for tensor, needed in zip(inputs, needs, strict=True) if tensor is not None and needed]
    found = torch.autograd.grad([o for o, _ in given], wanted, [g for _, g in given], create_graph=True)
    of_wanted = iter(found)
    return [next(of_wanted) if needed else None for needed in needs]
