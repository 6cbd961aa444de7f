"""No op indexes by a label that it has not compared, whichever way the label came and wherever it is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DTYPES

import accumloss

ops = torch.ops.accumloss
BAD = (-(2**63), -(10**12), -1, 0, 103, 10**12, 2**63 - 1)  # 0: V itself
MESSAGE = r"cross_entropy: expected labels in \[0, {}\) or ignore_index -100, got {} for row {} of "


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 7, 100, 512, 513, 3000])
def test_every_op_refuses_a_bad_label(dtype, V):
    """Short and long rows, few and many of them, class weights, int32, a shift, split rows, metrics; lse and nll are
    any numbers. In place nothing is written."""
    generator = torch.Generator().manual_seed(V)
    one = torch.ones((), dtype=accumulation(dtype))
    for index, bad in enumerate(b or V for b in BAD):
        rows = (2, 40) if index % 2 else (1, 3)
        x = torch.randn(*rows, V, generator=generator).to(dtype)
        y = torch.randint(0, V, rows, generator=generator)
        if index % 3 == 0:
            y[0, 0] = -100
        weight = torch.rand(V, generator=generator) if index % 3 else None
        shift = index % 2
        at = (rows[0] - 1, rows[1] - 1)
        y[at] = bad
        if bad in range(V):
            continue
        if -(2**31) <= bad < 2**31 and index % 2:
            y = y.int()
        kwargs = {"shift": shift, "metrics": index % 2 == 0, "label_smoothing": 0.1 * (index == 2)}
        lse = torch.tensor([np.inf, np.nan, 1e300, -5.0], dtype=torch.float64)[torch.arange(y.numel()) % 4].view(rows)
        nll = lse.to(one.dtype)
        before = x.clone()
        for call in (
            lambda: ops.cross_entropy(x, y, weight, **kwargs),  # noqa: B023
            lambda: ops.cross_entropy_backward(one, x, y, lse, nll, weight, **kwargs),  # noqa: B023
            lambda: ops.cross_entropy_backward_(one, x, y, lse, nll, weight, **kwargs),  # noqa: B023
            lambda: ops.cross_entropy_with_grad(one, x, y, weight, **kwargs),  # noqa: B023
            lambda: ops.cross_entropy_with_grad_(one, x, y, weight, **kwargs),  # noqa: B023
            lambda: ops.add_cross_entropy_(torch.zeros(5).double(), one, x, y, weight, **kwargs),  # noqa: B023
        ):
            row = y.numel() - 1 - shift
            with pytest.raises(IndexError, match=MESSAGE.format(V, bad, row)):
                call()
            assert torch.equal(x, before)


@pytest.mark.parametrize("V", [7, 100, 3000])
@pytest.mark.parametrize("in_place", [False, "backward"])
def test_labels_that_change_before_the_backward(V, in_place):
    """torch does not see it: the memory is another's. The backward raises what the forward would have."""
    n = np.zeros((2, 40), np.int64)
    y = torch.from_numpy(n)
    for weight in (None, torch.rand(V)):
        for requires in (torch.float32, torch.bfloat16):
            leaf = torch.randn(2, 40, V).to(requires).requires_grad_()
            n[:] = 0
            if in_place:
                loss = accumloss.masked_lm_loss(leaf * 1, y, weight=weight, inplace=in_place)
            else:
                loss = accumloss.cross_entropy(leaf, y, weight=weight).loss_sum
            n[1, 5] = V
            with pytest.raises(IndexError, match=MESSAGE.format(V, V, 45)):
                loss.backward()


@pytest.mark.parametrize("V", [2, 9, 100, 512, 600])
def test_labels_in_the_memory_that_is_written_over(V):
    """The gradient of the first rows overwrites the labels of the last: what is used has been compared."""
    store = torch.zeros(64, V)
    y = store.view(torch.int32).view(-1)[:64]  # 0.0 is 0
    if V <= 512:  # in groups, each of whose labels is read when its turn comes
        with pytest.raises(IndexError, match=r"expected labels in \[0, "):
            ops.cross_entropy_with_grad_(torch.ones(()), store, y)
    else:
        ops.cross_entropy_with_grad_(torch.ones(()), store, y)
    assert store[0].count_nonzero() == V


@pytest.mark.parametrize("V", [7, 100, 3000])
def test_lse_and_nll_of_any_value_are_never_an_index(V):
    x, y = torch.randn(8, V), torch.arange(8) % V
    for value in (0.0, 1e300, -1e300, np.inf, -np.inf, np.nan):
        lse = torch.full((8,), value, dtype=torch.float64)
        for dtype in DTYPES:
            given = lse.to(accumulation(dtype))
            one = torch.ones((), dtype=accumulation(dtype))
            grad = ops.cross_entropy_backward(one, x.to(dtype), y, lse, given, metrics=True, label_smoothing=0.1)
            assert grad.shape == x.shape
            ops.cross_entropy_backward_(one, x.to(dtype), y, lse, given)


def test_threads_raise_too(threads):
    threads(2)
    for V in (50, 2000):
        x, y = torch.randn(4000, V), torch.zeros(4000, dtype=torch.int64)
        y[3999] = V
        lse, nll = torch.zeros(4000, dtype=torch.float64), torch.zeros(4000)
        for call in (
            lambda: ops.cross_entropy(x, y),  # noqa: B023
            lambda: ops.cross_entropy_backward(torch.ones(()), x, y, lse, nll),  # noqa: B023
            lambda: ops.cross_entropy_with_grad(torch.ones(()), x, y),  # noqa: B023
        ):
            with pytest.raises(IndexError, match=MESSAGE.format(V, V, 3999)):
                call()
