"""What a case must give: accumloss.reference in float64, and the bounds that go with it."""

from __future__ import annotations

import math
import weakref
from typing import NamedTuple

import torch
from cases import Case
from tolerances import SUM, UNIT64, assert_close, assert_within, gradient_bound, row_loss_bound

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


class TokenExpected(NamedTuple):
    """What torch.ops.accumloss.token_statistics must give, row by row, in float64."""

    case: Case
    loss: torch.Tensor
    nll: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    argmax: torch.Tensor

    def gradient(self, grads: dict[str, torch.Tensor], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """(..., V) for gradients (...) that come back to loss, nll, lse and entropy; and its bound."""
        case = self.case
        options = case.options
        logits = case.logits.double().detach().requires_grad_()
        outputs = reference.token_statistics(logits, case.labels, case.weight, options, shift=case.shift)
        by_name = dict(zip(("loss", "nll", "lse", "entropy"), outputs, strict=False))
        if not logits.numel():
            return torch.zeros_like(logits), torch.zeros_like(logits)
        total = sum((by_name[name] * grad).sum() for name, grad in grads.items())
        (grad,) = torch.autograd.grad(total, logits)
        is_item = reference.rows(case.logits, case.labels, case.weight, options, shift=case.shift).is_item
        grad = torch.where(is_item.unsqueeze(-1), grad, torch.zeros_like(grad))
        # the magnitudes of which an entry is a sum: those of each of its gradients
        zero = torch.zeros(case.labels.shape, dtype=torch.float64)
        of = {name: grads[name].abs() if name in grads else zero for name in by_name}
        terms = _exact(case).terms * of["loss"].unsqueeze(-1)
        z = reference.transform(case.logits.double(), options)
        labels = reference.shift_labels(case.labels.long(), case.shift, options.ignore_index)
        y = torch.where(is_item, labels, torch.zeros_like(labels)).unsqueeze(-1)
        surprise = (self.lse.unsqueeze(-1) - z).scatter(-1, y, self.nll.unsqueeze(-1)).abs()
        p = torch.exp(z - self.lse.unsqueeze(-1)).scatter(-1, y, torch.exp(-self.nll).unsqueeze(-1))
        slope = torch.full_like(z, options.logit_scale)
        if options.softcap > 0:
            slope = slope / torch.cosh(options.logit_scale * case.logits.double() / options.softcap) ** 2
        of_nll = p.scatter(-1, y, -torch.expm1(-self.nll).unsqueeze(-1)) * of["nll"].unsqueeze(-1)
        of_lse = p * of["lse"].unsqueeze(-1)
        # the entropy that the backward reads has the error of entropy_bound
        inherited = self.entropy + torch.where(self.nll < math.log(2), 0.0, 1.0)
        of_entropy = torch.where(p == 0, p, p * (surprise + inherited.unsqueeze(-1))) * of["entropy"].unsqueeze(-1)
        terms = terms + (of_nll + of_lse + of_entropy) * slope
        terms = torch.where(is_item.unsqueeze(-1), terms, torch.zeros_like(terms))
        is_transformed = options.softcap > 0 or options.logit_scale != 1
        bound = gradient_bound(grad, z, self.lse, terms, case.logits.dtype, device, is_transformed)
        # the oracle's own rounding: of an entry it takes differences of what is not as small
        of_p = torch.where(p == 0, p, p * (1 + surprise + self.entropy.unsqueeze(-1))).scatter(
            -1, y, 1 + self.nll.unsqueeze(-1)
        )
        own = of_p * (of["lse"] + of["entropy"] * (1 + self.entropy)).unsqueeze(-1)
        return grad, bound + 8 * UNIT64 * torch.nan_to_num(own) * slope


def token_expected(case: Case) -> TokenExpected:
    outputs = reference.token_statistics(case.logits, case.labels, case.weight, case.options, shift=case.shift)
    return TokenExpected(case, *(output.detach() for output in outputs))
