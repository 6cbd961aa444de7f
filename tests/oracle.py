"""What a case must give: accumloss.reference in float64, and the bounds that go with it."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from cases import Case
from tolerances import SUM, assert_close, assert_within, gradient_bound, row_loss_bound

from accumloss import reference


class Expected(NamedTuple):
    sums: tuple[torch.Tensor, ...]  # of torch.ops.accumloss.cross_entropy(..., metrics=True)
    rows: reference.Rows
    grad: torch.Tensor  # (..., V) of grad_loss_sum * loss_sum
    grad_bound: torch.Tensor  # (..., V)


class _Exact(NamedTuple):
    """What does not depend on the incoming gradient, in which the gradient is linear."""

    sums: tuple[torch.Tensor, ...]
    rows: reference.Rows
    grad: torch.Tensor  # (..., V) of loss_sum
    z: torch.Tensor  # (..., V)
    terms: torch.Tensor  # (..., V) sum of the magnitudes that an entry of grad is the difference of


_known: weakref.WeakKeyDictionary[Case, _Exact] = weakref.WeakKeyDictionary()


def expected(case: Case, device: str = "cpu", grad_loss_sum: float = 1.0) -> Expected:
    """The float64 answer for the case's (rounded) logits, on CPU; computed once for each case."""
    if case not in _known:
        _known[case] = _exact(case.to("cpu"))
    sums, rows, grad, z, terms = _known[case]
    options = case.options
    grad, terms = grad * grad_loss_sum, terms * abs(grad_loss_sum)
    is_transformed = options.softcap > 0 or options.logit_scale != 1
    bound = gradient_bound(grad, z, rows.lse, terms, case.logits.dtype, device, is_transformed)
    return Expected(sums, rows, grad, bound)


def _exact(case: Case) -> _Exact:
    options = case.options
    logits = case.logits.double().detach().requires_grad_()
    rows = reference.rows(logits, case.labels, case.weight, options, shift=case.shift)
    sums = reference.cross_entropy(logits, case.labels, case.weight, options, shift=case.shift)
    if case.logits.numel():
        (grad,) = torch.autograd.grad(sums[0], logits)
    else:
        grad = torch.zeros_like(logits)
    grad = torch.where(rows.is_item.unsqueeze(-1), grad, torch.zeros_like(grad))

    with torch.no_grad():
        V = logits.shape[-1]
        weight = torch.ones(V, dtype=torch.float64) if case.weight is None else case.weight.double()
        z = reference.transform(logits, options)
        share = options.label_smoothing / V
        hard = ((1 - options.label_smoothing) * rows.weight).unsqueeze(-1)
        soft = (share * weight.sum() + 2 * options.z_loss * rows.lse.abs()).unsqueeze(-1)
        p = torch.exp(z - rows.lse.unsqueeze(-1))
        p_label = torch.exp(-rows.nll).unsqueeze(-1)
        terms = (hard + soft) * p + share * weight
        labels = reference.shift_labels(case.labels.long(), case.shift, options.ignore_index)
        y = torch.where(rows.is_item, labels, torch.zeros_like(labels)).unsqueeze(-1)
        at_label = soft * p_label - hard * torch.expm1(-rows.nll).unsqueeze(-1) + share * weight[y]
        terms = terms.scatter(-1, y, at_label)
        slope = options.logit_scale
        if options.softcap > 0:
            slope = options.logit_scale / torch.cosh(options.logit_scale * logits / options.softcap) ** 2
        if logits.dtype == case.logits.dtype:  # the oracle's own rounding: its smoothing gradient is a sum over V
            terms = terms + share * weight.sum()
        detached = reference.Rows(*(value.detach() for value in rows))
        return _Exact(tuple(value.detach() for value in sums), detached, grad, z, terms * slope)


def z_scale(case: Case) -> float:
    """Largest |z| where the logits are transformed, for row_loss_bound."""
    if (case.options.softcap == 0 and case.options.logit_scale == 1) or case.logits.numel() == 0:
        return 0.0
    z = reference.transform(case.logits.double(), case.options)
    return z[torch.isfinite(z)].abs().max().item()


def check_sums(outputs: tuple[torch.Tensor, ...], case: Case, wanted: Expected, device: str = "cpu") -> None:
    """The seven outputs of torch.ops.accumloss.cross_entropy(..., metrics=True)."""
    loss_sum, num_items, total_weight, lse, num_correct, entropy_sum, nll = outputs
    e = wanted.sums
    bound = row_loss_bound(case.logits.dtype, device, z_scale(case))
    assert_close(loss_sum, e[0], SUM + bound, f"{case.name}: loss_sum")
    assert num_items.item() == e[1].item(), f"{case.name}: num_items"
    assert_close(total_weight, e[2], SUM, f"{case.name}: total_weight")
    assert num_correct.item() == e[4].item(), f"{case.name}: num_correct"
    # H = lse - sum p z: the terms may be larger than their difference
    magnitude = wanted.rows.entropy.detach().abs().sum() + wanted.rows.nll.detach().sum()
    assert_within(entropy_sum, e[5], (SUM + bound) * magnitude, f"{case.name}: entropy_sum")
    assert_close(nll, e[6], bound, f"{case.name}: nll")
    assert_within(lse, e[3], bound * (e[3].abs() + e[6]).detach(), f"{case.name}: lse")
