"""Any view of logits and labels gives what its contiguous copy gives, in place too where its rows lie apart; and the
memory around a tensor is neither read nor written."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES

ops = torch.ops.accumloss
GUARD = 37  # elements around the memory of a view, which nothing may read or write


def strides_of(generator: torch.Generator, sizes: list[int], innermost: int) -> list[int]:
    """Strides of dimensions whose entries are ``innermost`` elements: in any order, with gaps, expanded, equal, or any."""
    kind = int(torch.randint(0, 6, (), generator=generator))
    strides, step = [0] * len(sizes), innermost
    for i in torch.randperm(len(sizes), generator=generator) if kind in (1, 2) else reversed(range(len(sizes))):
        strides[i] = step
        step *= sizes[i]
        if kind == 2:
            step += int(torch.randint(0, 5, (), generator=generator))
    if kind == 3:  # some are expanded
        strides = [s if torch.rand((), generator=generator) < 0.5 else 0 for s in strides]
    elif kind == 4:  # two are equal
        i, j = torch.randint(0, len(sizes), (2,), generator=generator).tolist()
        strides[i] = strides[j]
    elif kind == 5:  # any, as as_strided gives: rows that overlap, interlock or lie apart
        strides = [int(torch.randint(0, 3 * innermost + 2, (), generator=generator)) for _ in sizes]
    return [
        int(torch.randint(0, 50, (), generator=generator)) if n == 1 else int(s)
        for n, s in zip(sizes, strides, strict=True)
    ]


def view(values: torch.Tensor, sizes: list[int], strides: list[int], guard) -> torch.Tensor:
    """A view of some of the values, in the middle of what is filled with ``guard``."""
    extent = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) if math.prod(sizes) else 0
    store = torch.full((extent + 2 * GUARD,), guard, dtype=values.dtype)
    store[GUARD : GUARD + extent] = values[:extent]
    return store.as_strided(sizes, strides, GUARD)


def overlap(rows: torch.Tensor) -> bool:
    """Whether two entries of a view are one."""
    at = torch.zeros(rows.shape, dtype=torch.int64)
    for i, (n, stride) in enumerate(zip(rows.shape, rows.stride(), strict=True)):
        at += (torch.arange(n) * stride).view(-1, *[1] * (rows.dim() - i - 1))
    return at.unique().numel() < at.numel()


def two_strides(rows: torch.Tensor) -> bool:
    """Whether all but the last two dimensions are one: torch's own view() says so."""
    if rows.dim() <= 3 or rows.numel() == 0:
        return True
    try:
        rows[..., 0, 0].view(-1)
    except RuntimeError:
        return False
    return True


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """A copy whose rows do not touch."""
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)
    wide[..., :-1] = x
    return wide[..., :-1]


@pytest.mark.parametrize("seed", range(8))
def test_random_views_give_what_their_copies_give(seed):
    generator = torch.Generator().manual_seed(seed)
    values = {dtype: (torch.randn(20000, generator=generator) * 3).to(dtype) for dtype in DTYPES}
    classes = torch.randint(0, 64, (20000,), generator=generator)
    count = {"written": 0, "refused: overlap": 0, "refused: strides": 0}
    for index in range(130):
        dtype = DTYPES[index % 4]
        V = (1, 3, 5, 12, 17)[int(torch.randint(0, 5, (), generator=generator))]
        dims = int(torch.randint(1, 5, (), generator=generator))
        sizes = torch.randint(0 if index % 25 == 0 else 1, 5, (dims,), generator=generator).tolist()
        if index % 10 == 0:  # rows of the kernels for long rows, which do not care how they lie
            V, sizes = 513, sizes[:2]
        unit = 2 if index % 15 == 1 else 1  # not contiguous along V
        x = view(values[dtype], [*sizes, V], [*strides_of(generator, sizes, V), unit], math.nan)
        y = view(classes % V, sizes, strides_of(generator, sizes, 1), 10**12)
        if index % 3 == 0:
            y = y.int() if index % 2 else torch.where(y % 4 == 1, -100, y)
        kwargs = {"shift": index % 7 % 3, "metrics": True, "label_smoothing": 0.1 * (index % 5 == 0)}
        what = (
            f"seed {seed}, view {index}: {dtype}, logits {tuple(x.shape)} of strides {x.stride()}, labels of strides "
            f"{y.stride()}, {kwargs}"
        )
        one = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        copies = [(c, y.contiguous().clone()) for c in (x.clone(memory_format=torch.contiguous_format), with_gaps(x))]

        def check(way, found, wanted, what=what):
            """The bits of a copy: of the contiguous one, which the kernels of short rows may serve, or of the other."""
            right = [all(map(torch.equal, found, each)) for each in wanted]
            assert any(right), f"{what}, {way}: {found} instead of {wanted[0]}"

        forward = [ops.cross_entropy(*copy, **kwargs) for copy in copies]
        check("forward", ops.cross_entropy(x, y, **kwargs), forward)
        saved = (forward[0][3], forward[0][6])
        backward = [[ops.cross_entropy_backward(one, *copy, *saved, **kwargs)] for copy in copies]
        both = [ops.cross_entropy_with_grad(one, *copy, **kwargs) for copy in copies]
        check("backward", [ops.cross_entropy_backward(one, x, y, *saved, **kwargs)], backward)
        check("with_grad", ops.cross_entropy_with_grad(one, x, y, **kwargs), both)

        may_write = (V == 1 or x.stride(-1) == 1) and two_strides(x) and not overlap(x)
        count["written" if may_write else "refused: overlap" if overlap(x) else "refused: strides"] += 1
        for way, wanted, call in (
            ("backward_", backward, lambda over: ops.cross_entropy_backward_(one, over, y, *saved, **kwargs)),  # noqa: B023
            ("with_grad_", [each[5:] for each in both],
             lambda over: ops.cross_entropy_with_grad_(one, over, y, **kwargs)),  # noqa: B023
        ):  # fmt: skip
            store = torch.empty(x.untyped_storage().size() // x.element_size(), dtype=dtype)
            store.copy_(x.as_strided(store.shape, (1,), 0))
            before, over = store.clone(), store.as_strided(x.shape, x.stride(), GUARD)
            if not may_write:
                with pytest.raises(RuntimeError, match=f"cross_entropy_{way}: expected logits .* that do not overlap"):
                    call(over)
                assert torch.equal(store.nan_to_num(1e4), before.nan_to_num(1e4)), what
                continue
            call(over)
            check(way, [over], wanted)
            over.copy_(before.as_strided(x.shape, x.stride(), GUARD))
            assert torch.equal(store.nan_to_num(1e4), before.nan_to_num(1e4)), f"{what}, {way}: wrote beside the rows"
    assert min(count.values()) > 5, count


@pytest.mark.parametrize("sizes, strides, apart", [
    ((3, 4), (20, 5), True), ((4, 3), (5, 20), True),  # in order, and transposed
    ((3, 4), (19, 5), False), ((3, 4), (20, 4), False),
    ((2, 3), (10, 25), True), ((2, 3), (12, 25), True), ((2, 3), (21, 25), False), ((2, 3), (25, 10), True),
    ((3, 3), (7, 10), False), ((3, 2), (11, 16), True), ((3, 2), (10, 16), False),  # interlocking
    ((1, 3), (0, 5), True), ((3, 1), (5, 0), True), ((3, 1), (0, 5), False), ((0, 3), (0, 0), True),
])  # fmt: skip
def test_rows_that_lie_apart_are_written_in_place(sizes, strides, apart):
    x = torch.randn(100).as_strided((*sizes, 5), (*strides, 1))
    assert apart == (not overlap(x))
    y = torch.zeros(sizes, dtype=torch.int64)
    if not apart:
        with pytest.raises(RuntimeError, match="rows that do not overlap.* got shape .* and strides"):
            ops.cross_entropy_with_grad_(torch.ones(()), x, y)
        return
    wanted = [ops.cross_entropy_with_grad(torch.ones(()), copy, y)[-1] for copy in (x.contiguous(), with_gaps(x))]
    ops.cross_entropy_with_grad_(torch.ones(()), x, y)
    assert any(torch.equal(x, each) for each in wanted)


def test_a_shift_of_any_size_finds_no_label():
    x, y = torch.randn(2, 3, 5, requires_grad=True), torch.full((2, 3), 4)
    for shift in (3, 4, 2**31, 2**62, 2**63 - 1):
        loss_sum, num_items, *_ = ops.cross_entropy(x, y, shift=shift)
        assert loss_sum.item() == 0 and num_items.item() == 0
        assert torch.autograd.grad(loss_sum, x)[0].count_nonzero() == 0
