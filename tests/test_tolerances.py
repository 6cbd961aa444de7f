"""The tolerance helper must refuse wrong answers, also where they are small."""

import pytest
import torch
from cases import Case
from oracle import check_sums, expected
from tolerances import assert_mostly_correctly_rounded, assert_within, ulp

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture(params=[(torch.bfloat16, 128256), (torch.float32, 128256), (torch.float16, 1000), (torch.float64, 65)],
                ids=lambda p: f"{p[0]}-{p[1]}")  # fmt: skip
def case(request):
    dtype, V = request.param
    logits = (torch.randn(2, V, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    logits[1, 7] = 24.0  # a confident row
    return Case("planted", logits, torch.tensor([5, 7]))


def right_gradient(case):
    acc = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    return torch.ops.accumloss.cross_entropy_with_grad(torch.ones((), dtype=acc), case.logits, case.labels)[-1]


def wrong_gradients(case, grad):
    yield "zero", torch.zeros_like(grad)
    missing = grad.clone()
    missing[torch.arange(2), case.labels] = 0
    yield "label entry missing", missing
    softmax = torch.softmax(case.logits.double(), -1)
    yield "onehot not subtracted", softmax.to(grad.dtype)
    naive = softmax.clone()
    naive[torch.arange(2), case.labels] -= 1
    rounded = softmax.to(torch.bfloat16).double()
    rounded[torch.arange(2), case.labels] -= 1
    yield "label subtracted after rounding", rounded.to(grad.dtype)
    dropped = grad.clone()
    dropped[0, -1] = 0
    yield "last class dropped", dropped
    scaled = grad * 1.01
    yield "one percent too large", scaled
    nan = grad.clone()
    nan[0, 3] = torch.nan
    yield "one NaN", nan


def test_right_gradient_passes(case):
    wanted = expected(case)
    assert_within(right_gradient(case), wanted.grad, wanted.grad_bound, "right")


def test_wrong_gradients_are_refused(case):
    wanted = expected(case)
    for name, wrong in wrong_gradients(case, right_gradient(case)):
        with pytest.raises(AssertionError, match=f"{name}: .* out of bounds"):
            assert_within(wrong, wanted.grad, wanted.grad_bound, name)


def test_wrong_sums_are_refused(case):
    wanted = expected(case)
    right = torch.ops.accumloss.cross_entropy(case.logits, case.labels, metrics=True)
    check_sums(right, case, wanted)
    naive_nll = right[6].clone()
    z = case.logits.float()
    naive_nll[:] = torch.logsumexp(z, -1) - z[torch.arange(2), case.labels]
    for index, wrong in ((0, right[0] * (1 + 1e-5)), (1, right[1] - 1), (2, right[2] + 1), (3, right[3] * 1.001),
                         (4, right[4] + 1), (5, right[5] * 0.99), (6, naive_nll)):  # fmt: skip
        outputs = list(right)
        outputs[index] = wrong
        with pytest.raises(AssertionError, match="planted: "):
            check_sums(tuple(outputs), case, wanted)


def test_shape_and_nan_are_compared():
    with pytest.raises(AssertionError, match="shape"):
        assert_within(torch.zeros(2), torch.zeros(3), 1.0, "shape")
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_within(torch.tensor([0.0]), torch.tensor([torch.nan]), 1.0, "nan")
    assert_within(torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf]), 0.0, "same")


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp(dtype):
    for value in (1.0, 1.5, 0.3, 100.0, torch.finfo(dtype).tiny):
        v = torch.tensor(value, dtype=dtype)
        step = torch.nextafter(v, torch.tensor(torch.inf, dtype=dtype)).double() - v.double()
        assert ulp(v.double(), dtype).item() == step.item()


def test_truncation_is_not_correct_rounding():
    exact = torch.rand(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_mostly_correctly_rounded(exact.bfloat16(), exact)
    truncated = (exact.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError, match="correctly rounded"):
        assert_mostly_correctly_rounded(truncated, exact)
