"""Classes masked by the lowest number of their dtype, as models do it, where -inf would do: they have probability 0, and
take no digit from anything else. The label may be one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Case
from oracle import expected, z_scale
from tolerances import SUM, assert_close, assert_within, row_loss_bound, ulp

from accumloss import LossOptions

ops = torch.ops.accumloss
OPTIONS = {
    "plain": LossOptions(), "label smoothing": LossOptions(label_smoothing=0.1), "z-loss": LossOptions(z_loss=1e-3),
    "softcap": LossOptions(softcap=30.0), "smaller": LossOptions(logit_scale=0.5),
    "larger": LossOptions(logit_scale=1.5), "softcap, smoothing": LossOptions(label_smoothing=0.1, softcap=30.0),
    "larger, smoothing": LossOptions(label_smoothing=0.1, logit_scale=1.5),
    "everything": LossOptions(-100, 0.1, 1e-3, 20.0, 1.5),
}  # fmt: skip
SIZES = (40, 513, 1100)
FAR = 1024.0  # csrc/row.h: a label further below the largest logit has no digit in lse and entropy


def masked_cases(dtype: torch.dtype, V: int):
    """Rows of one item each, so that sums fit: the first or the second half of the classes masked, or all but one."""
    generator = torch.Generator().manual_seed(V)
    x = (torch.randn(3, V, generator=generator) * 3).to(dtype)
    lowest = torch.finfo(dtype).min
    x[0, : V // 2] = lowest
    x[1, V // 2 :] = lowest
    x[2, 1:] = lowest
    for row in range(3):
        for label in (0, V // 2, V - 1):
            yield row, label, x[row : row + 1].contiguous(), torch.tensor([label])


def fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a number is finite as a result."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return bool(torch.isfinite(value.detach().to(acc)).all())


def check(dtype: torch.dtype, V: int, name: str, weighted: bool) -> int:
    options = OPTIONS[name]
    weight = torch.linspace(0.5, 2.0, V) if weighted else None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=acc)
    count = 0
    for row, label, x, y in masked_cases(dtype, V):
        case = Case(f"{name}, {dtype}, V={V}, row {row}, label {label}, weights {weighted}", x, y, weight, options)
        wanted = expected(case)
        z = wanted.rows.lse - wanted.rows.nll
        if not fits(z, dtype):
            continue  # the label's z itself is beyond the computation: -inf, an infinite loss
        count += 1
        kwargs = {**case.kwargs, "metrics": True}
        with_metrics = ops.cross_entropy(x, y, weight, **kwargs)
        loss_sum, _, _, lse, num_correct, entropy_sum, nll = with_metrics
        scale = z_scale(case) if options.softcap else abs(float(wanted.rows.lse.detach()))
        bound = row_loss_bound(dtype, "cpu", scale)
        e = wanted.sums
        if fits(e[0], dtype):
            assert_close(loss_sum, e[0], SUM + bound + 4 * row_loss_bound(dtype, "cpu"), f"{case.name}: loss_sum")
        if fits(e[6], dtype):
            assert_close(nll, e[6], bound, f"{case.name}: nll")
        near = e[6].detach().clamp(max=FAR)
        assert_within(lse, e[3], bound * (e[3].abs().detach() + near + 1), f"{case.name}: lse")
        magnitude = wanted.rows.entropy.detach().abs().sum() + near.sum() + 1
        assert_within(entropy_sum, e[5], (SUM + bound) * magnitude, f"{case.name}: entropy_sum")
        assert num_correct.item() == e[4].item(), case.name
        ways = {
            "backward": ops.cross_entropy_backward(one, x, y, lse, nll, weight, **kwargs),
            "with_grad": ops.cross_entropy_with_grad(one, x, y, weight, **kwargs)[-1],
            "with_grad without metrics": ops.cross_entropy_with_grad(one, x, y, weight, **case.kwargs)[-1],
        }
        for way in ("backward_", "with_grad_"):
            ways[way] = x.clone()
            if way == "backward_":
                ops.cross_entropy_backward_(one, ways[way], y, lse, nll, weight, **kwargs)
            else:
                sums = ops.cross_entropy_with_grad_(one, ways[way], y, weight, **kwargs)
                for a, b in zip(sums, (*with_metrics[:3], *with_metrics[4:6]), strict=True):
                    assert torch.equal(a, b), f"{case.name}: sums of {way}"
        for way, grad in ways.items() if torch.isfinite(wanted.grad).all() else ():
            assert_within(grad, wanted.grad, wanted.grad_bound, f"{case.name}: {way}")
    return count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_masked_classes_match_float64(name, dtype):
    if dtype == torch.float64 and OPTIONS[name].label_smoothing and not OPTIONS[name].softcap:
        return  # the oracle's own sum over the classes is beyond float64
    for V in SIZES:
        assert check(dtype, V, name, weighted=V % 2 == 0) >= 3


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_masked_classes_in_every_instruction_set(name):
    """In a process of its own, which the choice belongs to."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_masked_classes as t, torch\n"
        "for dtype in (torch.bfloat16, torch.float16, torch.float32):\n"
        "    for option in ('plain', 'label smoothing', 'larger, smoothing', 'z-loss'):\n"
        "        for V in (40, 513, 1100):\n"
        "            assert t.check(dtype, V, option, V == 40) >= 3\n"
    )
    environment = {**os.environ, "ACCUMLOSS_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).resolve().parent)
    result = subprocess.run(
        [sys.executable, "-c", script, here], env=environment, capture_output=True, text=True, check=False, cwd="/"
    )
    if "expected one of" in result.stderr:
        pytest.skip(f"this machine has no {name}")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_logits_after_blocks_of_minus_infinity(dtype, scale):
    """The first of them that is a number is the reference of exponentials, however far below 0 it is."""
    options = {"logit_scale": scale}
    for shift in (-100.0, -1000.0):
        x = (torch.randn(3, 2300, generator=torch.Generator().manual_seed(0)) + shift).to(dtype)
        x[0, :1100] = x[1, :600] = x[2, 600:] = -torch.inf
        y = torch.tensor([1200, 2299, 5])
        wide = x.double().requires_grad_()
        log_p = (wide * scale).log_softmax(-1)
        nll = -log_p.gather(-1, y[:, None])[:, 0]
        (wanted,) = torch.autograd.grad(nll.sum(), wide)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        one = torch.ones((), dtype=acc)
        loss, _, _, entropy, argmax = ops.token_statistics(x, y, None, **options, metrics=True)
        bound = row_loss_bound(dtype, "cpu", 0.0 if scale == 1.0 else abs(shift))
        assert_close(loss, nll, bound, "losses")
        exact = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1).detach()
        assert_within(entropy, exact, 2 * bound * (1 + exact), "entropy")
        assert torch.equal(argmax, x.argmax(-1)), "argmax"
        found = ops.cross_entropy(x, y, **options)
        assert_close(found[0], nll.sum(), SUM + bound, "sum")
        over = {"backward_": x.clone(), "with_grad_": x.clone()}
        ops.cross_entropy_backward_(one, over["backward_"], y, found[3], found[6], **options)
        ops.cross_entropy_with_grad_(one, over["with_grad_"], y, **options)
        for name, grad in {
            "backward": ops.cross_entropy_backward(one, x, y, found[3], found[6], **options),
            "with_grad": ops.cross_entropy_with_grad(one, x, y, **options)[-1],
            **over,
        }.items():
            rounding = ulp(wanted, dtype) + bound * wanted.abs() * (8 + (wanted != 0) * 32)
            assert_within(grad, wanted, rounding, name)


def test_a_whole_evaluation_survives_one_masked_label():
    """One label on a masked class among many rows: the entropies of all others keep their digits."""
    for V in (100, 2000):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(300, V, generator=torch.Generator().manual_seed(0)).to(dtype)
            x[:, ::2] = torch.finfo(dtype).min
            y = torch.arange(300) % (V // 2) * 2 + 1
            clean = ops.cross_entropy(x[1:], y[1:], metrics=True)[5]
            y[0] = 0
            spoilt = ops.cross_entropy(x, y, metrics=True)[5]
            own = ops.cross_entropy(x[:1], torch.tensor([1]), metrics=True)[5]
            assert_close(spoilt, clean + own, SUM + row_loss_bound(dtype, "cpu"), f"{dtype}, V={V}")


@pytest.mark.slow("other lengths of the same")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OPTIONS)
def test_masked_classes_of_every_length_match_float64(name, dtype):
    for V in (2, 9, 10, 11, 64, 511, 512, 1024, 1025, 3000, 40001):
        check(dtype, V, name, weighted=V % 2 == 1)


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(softcap=300.0)], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 20])  # one is shared by the threads
def test_a_row_may_begin_with_masked_classes_and_lie_far_below_zero(dtype, rows, options):
    """-inf for more classes than a block has, and logits of -200 after them: the sums' origin is not 0."""
    x = torch.full((rows, 20000), -200.0, dtype=dtype)
    x[:, :9000] = -torch.inf
    x[:, -1] = -190
    case = Case(f"{dtype}", x, torch.full((rows,), 19000), None, options)
    wanted = expected(case)
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    kwargs = options.as_kwargs()
    found = ops.cross_entropy(x, case.labels, **kwargs)
    assert_close(found[0], wanted.rows.loss.sum(), SUM, "loss_sum")
    backward = ops.cross_entropy_backward(one, x, case.labels, found[3], found[6], **kwargs)
    assert_within(backward, wanted.grad, wanted.grad_bound, "backward")
    assert_within(
        ops.cross_entropy_with_grad(one, x, case.labels, **kwargs)[5], wanted.grad, wanted.grad_bound, "in forward"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rows_of_nothing_but_the_lowest_number(dtype):
    """All classes alike: nll is log(V), each has its share of the gradient, and smoothing changes nothing."""
    V = 2051
    x, label = torch.full((1, V), torch.finfo(dtype).min, dtype=dtype), torch.tensor([700])
    one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for options in (LossOptions(), LossOptions(label_smoothing=0.1)) if dtype != torch.float64 else (LossOptions(),):
        kwargs = options.as_kwargs()
        found = ops.cross_entropy(x, label, **kwargs)
        assert_close(found[0], torch.tensor(V, dtype=torch.float64).log(), SUM, "loss_sum")
        exact = torch.full((1, V), (1 - options.label_smoothing) / V, dtype=torch.float64)
        exact[0, 700] -= 1 - options.label_smoothing
        backward = ops.cross_entropy_backward(one, x, label, found[3], found[6], **kwargs)
        with_grad = ops.cross_entropy_with_grad(one, x, label, **kwargs)[5]
        for grad in (backward, with_grad):
            assert_within(grad, exact, torch.finfo(dtype).eps * exact.abs() + 1e-6 / V, "gradient")
