"""The ops on CPU against float64: values, gradients, and the properties that any partition or order must keep."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import DTYPES, Case, sample_cases, short_cases
from oracle import check_sums, expected
from tolerances import (
    SUM,
    assert_mostly_correctly_rounded,
    assert_within,
    fp32_gradient_limit,
    row_loss_bound,
    ulp,
)

import accumloss
from accumloss import LossOptions

ops = torch.ops.accumloss


@functools.cache  # the oracle knows a case by its identity
def all_cases() -> list[tuple[torch.dtype, Case]]:
    return [(dtype, case) for dtype in DTYPES for case in (*sample_cases(dtype), *short_cases(dtype))]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        ids = [f"{str(dtype).removeprefix('torch.')}-{case.name}" for dtype, case in all_cases()]
        metafunc.parametrize("case", [case for _, case in all_cases()], ids=ids)


def accumulation(case: Case) -> torch.dtype:
    return torch.float64 if case.logits.dtype == torch.float64 else torch.float32


def test_values_match_float64(case):
    outputs = ops.cross_entropy(case.logits, case.labels, case.weight, metrics=True, **case.kwargs)
    check_sums(outputs, case, expected(case))


def test_values_without_metrics_are_the_same_bits(case):
    with_metrics = ops.cross_entropy(case.logits, case.labels, case.weight, metrics=True, **case.kwargs)
    without = ops.cross_entropy(case.logits, case.labels, case.weight, **case.kwargs)
    for i in (0, 1, 2, 3, 6):
        assert torch.equal(with_metrics[i].nan_to_num(), without[i].nan_to_num())
    assert without[4].item() == 0 and without[5].item() == 0


def gradients(case: Case, grad_loss_sum: float):
    """The gradient by each of the four ways, each from fresh logits."""
    g = torch.tensor(grad_loss_sum, dtype=accumulation(case))
    logits, labels, weight, kwargs = case.logits, case.labels, case.weight, case.kwargs
    _, _, _, lse, _, _, nll = ops.cross_entropy(logits, labels, weight, **kwargs)
    yield "backward", ops.cross_entropy_backward(g, logits, labels, lse, nll, weight, **kwargs)
    yield "with_grad", ops.cross_entropy_with_grad(g, logits, labels, weight, **kwargs)[-1]
    in_place = logits.clone(memory_format=torch.contiguous_format)
    ops.cross_entropy_backward_(g, in_place, labels, lse, nll, weight, **kwargs)
    yield "backward_", in_place
    in_place = logits.clone(memory_format=torch.contiguous_format)
    ops.cross_entropy_with_grad_(g, in_place, labels, weight, **kwargs)
    yield "with_grad_", in_place


def test_gradients_match_float64(case):
    for grad_loss_sum in (1.0, -0.37):
        wanted = expected(case, grad_loss_sum=float(torch.tensor(grad_loss_sum, dtype=accumulation(case))))
        found = dict(gradients(case, grad_loss_sum))
        for way, grad in found.items():
            assert grad.dtype == case.logits.dtype and grad.shape == case.logits.shape
            assert_within(grad, wanted.grad, wanted.grad_bound, f"{case.name}, {way}, {grad_loss_sum}")
            assert (grad[~wanted.rows.is_item] == 0).all(), f"{case.name}, {way}: ignored rows"
        if case.logits.is_contiguous():  # other strides may take another way
            assert torch.equal(found["backward"].nan_to_num(), found["backward_"].nan_to_num())
            assert torch.equal(found["with_grad"].nan_to_num(), found["with_grad_"].nan_to_num())


def test_sums_are_the_same_with_and_without_the_gradient(case):
    one = torch.ones((), dtype=accumulation(case))
    alone = ops.cross_entropy(case.logits, case.labels, case.weight, metrics=True, **case.kwargs)
    with_grad = ops.cross_entropy_with_grad(one, case.logits, case.labels, case.weight, metrics=True, **case.kwargs)
    for a, b in zip((alone[0], alone[1], alone[2], alone[4], alone[5]), with_grad[:5], strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_totals_are_added_to_in_double(case):
    """With the gradient in the place of the logits, or without one; what rounds to the sums of the call."""
    one = torch.ones((), dtype=accumulation(case))
    logits = case.logits.clone(memory_format=torch.contiguous_format)
    options = {**case.kwargs, "metrics": True}
    *sums, grad = ops.cross_entropy_with_grad(one, logits, case.labels, case.weight, **options)
    for factor in (None, one):
        totals, over = torch.zeros(5, dtype=torch.float64), logits.clone()
        ops.add_cross_entropy_(totals, factor, over, case.labels, case.weight, **options)
        for total, value in zip(totals, sums, strict=True):
            assert torch.equal(total.to(value.dtype).nan_to_num(), value.nan_to_num())
        assert torch.equal(over.nan_to_num(), (logits if factor is None else grad).nan_to_num())
        once = totals.clone()
        ops.add_cross_entropy_(totals, None, logits, case.labels, case.weight, **options)
        assert torch.equal(totals.nan_to_num(), 2 * once.nan_to_num())


@pytest.mark.parametrize("V, spread", [(5003, 3), (1000, 4), (1000, 12)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_is_correctly_rounded(dtype, V, spread):
    logits = (torch.randn(64, V, generator=torch.Generator().manual_seed(0)) * spread).to(dtype)
    case = Case("rounding", logits, torch.arange(64) * 78 % V)
    wanted = expected(case)
    for way, grad in gradients(case, 1.0):
        assert_within(grad, wanted.grad, wanted.grad_bound, way)
        assert_mostly_correctly_rounded(grad, wanted.grad)
        is_normal = wanted.grad.abs() >= torch.finfo(dtype).smallest_normal  # below, rounding is coarse
        assert_mostly_correctly_rounded(grad[is_normal], wanted.grad[is_normal])


def test_fp32_gradient_is_within_the_limit():
    logits = torch.randn(64, 5003, generator=torch.Generator().manual_seed(0)) * 4
    case = Case("limit", logits, torch.arange(64) * 78)
    wanted = expected(case)
    for way, grad in gradients(case, 1.0):
        assert_within(grad, wanted.grad, fp32_gradient_limit() * wanted.grad.abs(), way)


# Properties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [(1,) * 12, (5, 7), (1, 11), (3, 4, 5)])
def test_split_invariance(splits):
    """Any partition of the rows gives the same sums and the same gradient, to the last bit."""
    logits = torch.randn(12, 333, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 333, (12,), generator=torch.Generator().manual_seed(1))
    labels[[2, 3, 11]] = -100
    whole = accumloss.cross_entropy(logits, labels, metrics=True)
    parts = [
        accumloss.cross_entropy(x, y, metrics=True)
        for x, y in zip(logits.split(splits), labels.split(splits), strict=True)
    ]
    total = sum(parts)
    assert total.num_items == whole.num_items == 9
    assert total.num_correct == whole.num_correct
    assert_within(total.loss_sum, whole.loss_sum, 1e-6 * whole.loss_sum, "loss_sum")
    one = torch.ones(())
    whole_grad = ops.cross_entropy_with_grad(one, logits, labels)[-1]
    split_grad = [
        ops.cross_entropy_with_grad(one, x, y)[-1]
        for x, y in zip(logits.split(splits), labels.split(splits), strict=True)
    ]
    assert torch.equal(torch.cat(split_grad), whole_grad)


def test_vocabulary_permutation():
    logits = torch.randn(8, 1500, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.arange(8) * 180
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(1))
    permuted = Case("permuted", logits[:, order], order.argsort()[labels])
    check_sums(ops.cross_entropy(permuted.logits, permuted.labels, metrics=True), permuted,
               expected(Case("original", logits, labels)))  # fmt: skip


def test_constant_shift_of_the_logits_changes_nothing():
    logits = torch.randint(-8, 8, (8, 600), generator=torch.Generator().manual_seed(0)).float() / 4
    labels = torch.arange(8) * 70
    one = torch.ones(())
    base = ops.cross_entropy_with_grad(one, logits, labels)
    for shift in (-4096.0, 64.0, 100000.0):  # exact in fp32 with these logits
        moved = ops.cross_entropy_with_grad(one, logits + shift, labels)
        assert torch.equal(moved[0], base[0])
        assert torch.equal(moved[-1], base[-1])
        lse, nll = (ops.cross_entropy(logits + shift, labels)[i] for i in (3, 6))
        wanted = expected(Case("shifted", logits + shift, labels))
        two_calls = ops.cross_entropy_backward(one, logits + shift, labels, lse, nll)
        assert_within(two_calls, wanted.grad, wanted.grad_bound, f"shift {shift}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [0.0, 20.0, -7.0, 300.0])
def test_a_maximum_that_comes_late_costs_no_precision(dtype, base):
    """The exponentials are taken relative to what the first classes hold; a later one may be a little larger."""
    label = 1500
    for step in range(-40, 60):
        late = base + step / 8
        logits = torch.full((1, 1, 2048), base - 60.0)
        logits[..., 0], logits[..., 700], logits[..., label] = base, late, max(late, base) + 10
        logits = logits.to(dtype)
        z = logits.double().flatten()
        others = torch.cat([z[:label], z[label + 1 :]])
        wanted = torch.log1p((others - z[label]).exp().sum())
        found = accumloss.cross_entropy(logits, torch.tensor([[label]])).loss_sum
        assert_within(found, wanted, wanted * row_loss_bound(dtype, "cpu"), f"{late} after {base}")


@pytest.mark.parametrize("magnitude", [1e4, 2.0**20 - 4096, 2.0**20, 2.0**24, 1e30, 3e38, -3e38])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_equal_logits_of_any_magnitude(dtype, magnitude):
    logits = torch.full((2, 3000), magnitude).to(dtype)
    logits[1, 1000:] = -math.inf
    labels = torch.tensor([5, 7])
    wanted = torch.tensor(math.log(3000) + math.log(1000), dtype=torch.float64)
    for metrics in (False, True):
        found = ops.cross_entropy(logits, labels, metrics=metrics)
        assert_within(found[0], wanted, wanted * SUM, f"{magnitude}, metrics={metrics}")
    one = torch.ones(())
    *sums, grad = ops.cross_entropy_with_grad(one, logits, labels)
    assert_within(sums[0], wanted, wanted * SUM, f"{magnitude}, with the gradient")
    if abs(magnitude) > 2.0**40:
        return  # log(3000) is lost in a float64 lse
    backward = ops.cross_entropy_backward(one, logits, labels, found[3], found[6])
    for g in (grad, backward):
        p = torch.zeros(2, 3000, dtype=torch.float64)
        p[0], p[1, :1000] = 1 / 3000, 1 / 1000
        p[0, 5] -= 1
        p[1, 7] -= 1
        assert_within(g, p, ulp(p, dtype) + p.abs() * fp32_gradient_limit(), str(magnitude))


@pytest.mark.parametrize(
    ("V", "options"), [(32768, {}), (32800, {}), (33333, {}), (33333, {"softcap": 30.0, "label_smoothing": 0.1})]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_gradients_past_the_caches_are_the_same_bits(dtype, V, options):
    """From 32 MiB on rows are streamed where they are not in place; a third of these is less."""
    rows = 2**26 // (V * dtype.itemsize) + 1
    logits = (torch.randn(rows, V, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    labels = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(1))
    labels[::3] = -100
    g = torch.tensor(0.5)
    lse, nll = ops.cross_entropy(logits, labels, **options)[3:7:3]
    with_grad = ops.cross_entropy_with_grad(g, logits, labels, **options)[-1]
    backward = ops.cross_entropy_backward(g, logits, labels, lse, nll, **options)
    assert with_grad.nbytes >= 2**26
    for part in torch.arange(rows).chunk(3):
        of_part = logits[part], labels[part]
        lse, nll = ops.cross_entropy(*of_part, **options)[3:7:3]
        wanted = ops.cross_entropy_backward(g, *of_part, lse, nll, **options)
        assert torch.equal(backward[part], wanted)
        assert torch.equal(with_grad[part], ops.cross_entropy_with_grad(g, *of_part, **options)[-1])
    ops.cross_entropy_with_grad_(g, logits, labels, **options)
    assert torch.equal(with_grad, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_short_rows_write_nothing_beside_their_gradient(dtype):
    """Vectors reach past the end of a row; not past that of the last."""
    for rows in (1, 31, 32, 33, 64, 77):
        for V in (2, 10, 11, 15, 16, 17, 33, 100, 511):
            memory = torch.randn(rows * V + 96, generator=torch.Generator().manual_seed(V)).to(dtype)
            before, logits = memory.clone(), memory[32 : 32 + rows * V].view(rows, V)
            labels = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(rows))
            labels[::3] = -100
            wanted = ops.cross_entropy_with_grad(torch.tensor(0.5), logits, labels)
            found = ops.cross_entropy_with_grad_(torch.tensor(0.5), logits, labels)
            assert torch.equal(logits, wanted[-1]) and torch.equal(found[0], wanted[0]), (rows, V)
            assert torch.equal(memory[:32], before[:32]) and torch.equal(memory[-64:], before[-64:]), (rows, V)
            assert (logits[::3] == 0).all() and (logits != before[32:-64].view(rows, V)).any()


@pytest.mark.parametrize(("rows", "V"), [(1700, 600), (256, 4096), (200, 5001), (60, 33333), (20, 70000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_change_no_bit(dtype, rows, V):
    """Rows above the short ones are summed as if those that are ignored were not there; of 70000 classes, the few that
    count are split along them."""
    logits = (torch.randn(rows, V, generator=torch.Generator().manual_seed(V)) * 3).to(dtype)
    labels = torch.randint(0, V, (rows,), generator=torch.Generator().manual_seed(1))
    labels[torch.rand(rows, generator=torch.Generator().manual_seed(2)) < 0.7] = -100
    labels[0] = labels[-1] = -100
    kept = labels != -100
    g = torch.tensor(0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    everything, counted = (logits, labels), (logits[kept], labels[kept])
    sums, wanted = (ops.cross_entropy(*of, metrics=True) for of in (everything, counted))
    for i in (0, 1, 2, 4, 5):
        assert torch.equal(sums[i], wanted[i]), i
    assert torch.equal(sums[3][kept], wanted[3]) and (sums[3][~kept] == 0).all()
    found = [
        ops.cross_entropy_with_grad(g, *everything)[-1],
        ops.cross_entropy_backward(g, *everything, sums[3], sums[6]),
    ]
    expected_grads = [
        ops.cross_entropy_with_grad(g, *counted)[-1],
        ops.cross_entropy_backward(g, *counted, wanted[3], wanted[6]),
    ]
    for a, b in zip(found, expected_grads, strict=True):
        assert torch.equal(a[kept], b) and (a[~kept] == 0).all()
    in_place = logits.clone()
    ops.cross_entropy_with_grad_(g, in_place, labels)
    assert torch.equal(in_place, found[0])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_ignored_rows_are_never_read(poison):
    logits = torch.randn(4, 7, 65, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 65, (4, 7), generator=torch.Generator().manual_seed(1))
    labels[0, 3] = labels[2, 1] = -100
    clean = ops.cross_entropy(logits, labels, shift=1, metrics=True)
    logits[0, 2] = logits[2, 0] = poison  # the rows whose label is ignored
    logits[:, -1] = poison  # the rows without a label
    dirty = ops.cross_entropy(logits, labels, shift=1, metrics=True)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    grad = ops.cross_entropy_with_grad(torch.ones(()), logits, labels, shift=1)[-1]
    assert torch.isfinite(grad).all() and (grad[:, -1] == 0).all() and (grad[0, 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_distribution_gives_nan(dtype):
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, nan, 1.0], [nan, 0.0, 1.0], [inf, 0.0, 1.0], [0.0, inf, 1.0], [-inf, -inf, -inf],
                         [1.0, 2.0, 3.0]], dtype=dtype)  # fmt: skip
    labels = torch.zeros(6, dtype=torch.int64)
    outputs = ops.cross_entropy(rows, labels, metrics=True)
    assert torch.isnan(outputs[0])
    assert torch.isnan(outputs[6]).tolist() == [True] * 5 + [False]
    assert outputs[4].item() == 0
    one = torch.ones((), dtype=outputs[0].dtype)
    for grad in (
        ops.cross_entropy_backward(one, rows, labels, outputs[3], outputs[6]),
        ops.cross_entropy_with_grad(one, rows, labels)[-1],
    ):
        assert torch.isnan(grad[:5]).any(-1).all() and torch.isfinite(grad[5]).all()


def test_impossible_label_has_infinite_loss_and_a_finite_gradient():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    outputs = ops.cross_entropy(logits, torch.tensor([1]))
    assert outputs[0].item() == torch.inf and outputs[6].item() == torch.inf
    grad = ops.cross_entropy_with_grad(torch.ones(()), logits, torch.tensor([1]))[-1]
    p = torch.softmax(logits.double(), -1)
    assert_within(grad, p - torch.tensor([[0.0, 1.0, 0.0]]), 1e-7, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_correct_predictions_are_those_of_argmax(dtype):
    """Ties go to the first of the largest logits, as in torch.argmax; low precision makes many."""
    logits = torch.randint(0, 4, (500, 40), generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(1))
    labels[::2] = logits.argmax(-1)[::2]
    found = accumloss.cross_entropy(logits, labels, metrics=True, softcap=1.0)  # the cap makes further ties
    assert found.num_correct.item() == (logits.argmax(-1) == labels).sum().item()
    assert 250 <= found.num_correct.item() < 500


# Determinism ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "options"])
@pytest.mark.parametrize("shape", [(40, 5000), (1, 100_000), (7, 33_000), (5000, 9), (9000, 5), (3000, 120)])
def test_same_bits_for_any_number_of_threads(shape, options, threads):
    logits = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    labels = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(1))
    weight = torch.rand(shape[-1], generator=torch.Generator().manual_seed(2))
    options = LossOptions(**options).as_kwargs()
    one = torch.ones(())
    results = []
    for count in (1, 2, 3, 5, 2):
        threads(count)
        forward = ops.cross_entropy(logits, labels, weight, metrics=True, **options)
        grad = ops.cross_entropy_backward(one, logits, labels, forward[3], forward[6], weight, **options)
        fused = ops.cross_entropy_with_grad(one, logits, labels, weight, metrics=True, **options)
        results.append((*forward, grad, *fused))
    for result in results[1:]:
        for a, b in zip(results[0], result, strict=True):
            assert torch.equal(a, b)


CAPABILITY_PROGRAM = """
import sys, torch, accumloss
sys.path.insert(0, sys.argv[1])
import test_cross_entropy as t
assert accumloss.build_info()["cpu_capability"] == sys.argv[2], accumloss.build_info()
torch.set_num_threads(1)
x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)  # every half
scaled = x.clone()
t.ops.scale_(scaled, torch.tensor(0.625))
assert torch.equal(torch.nan_to_num(scaled), torch.nan_to_num((x.float() * 0.625).half()))
torch.save([t.everything(case) for _, case in t.all_cases()], sys.argv[3])
"""


def everything(case: Case) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """All sums of a case, and its gradient by each way."""
    sums = ops.cross_entropy(case.logits, case.labels, case.weight, metrics=True, **case.kwargs)
    return sums, dict(gradients(case, 1.0))


@pytest.fixture(scope="module")
def by_capability(tmp_path_factory):
    """Instruction set: everything() of every case, each computed once in a process of its own."""

    @functools.cache
    def run(name: str):
        path = tmp_path_factory.mktemp(name) / "bits.pt"
        command = [sys.executable, "-P", "-c", CAPABILITY_PROGRAM, str(Path(__file__).parent), name, str(path)]
        environment = {**os.environ, "ACCUMLOSS_CPU_CAPABILITY": name}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0 and "expected one of" in done.stderr:
            pytest.skip(f"this machine has no {name}: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        return torch.load(path)

    return run


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_instruction_set(name, by_capability):
    for (_, case), (sums, grads) in zip(all_cases(), by_capability(name), strict=True):
        wanted = expected(case)
        check_sums(sums, case, wanted)
        for way, grad in grads.items():
            assert_within(grad, wanted.grad, wanted.grad_bound, f"{case.name}, {way}")


def test_avx2_and_avx512_give_the_same_bits(by_capability):
    for (sums, grads), (others, other_grads) in zip(by_capability("avx2"), by_capability("avx512"), strict=True):
        for a, b in zip((*sums, *grads.values()), (*others, *other_grads.values()), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_unknown_instruction_set_is_refused():
    program = "import accumloss"
    environment = {**os.environ, "ACCUMLOSS_CPU_CAPABILITY": "mmx"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ACCUMLOSS_CPU_CAPABILITY: expected one of portable" in done.stderr and "got mmx" in done.stderr
    environment["ACCUMLOSS_CPU_CAPABILITY"] = "  "  # as good as not set
    subprocess.run([sys.executable, "-P", "-c", program], env=environment, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("V", [2, 9, 200, 512, 600, 5000])
@pytest.mark.parametrize("label", [0, 1], ids=["of the largest", "of the lowest"])
def test_rows_from_the_lowest_number_to_the_largest(label, V, dtype):
    """Their difference is beyond all numbers; a mask is often the lowest."""
    logits = torch.full((3, V), torch.finfo(dtype).min, dtype=dtype)
    logits[:, 0] = torch.finfo(dtype).max
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    labels = torch.full((3,), label)
    loss = accumloss.cross_entropy(ours, labels).loss_sum
    wanted = torch.nn.functional.cross_entropy(theirs, labels, reduction="sum")
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted.to(loss.dtype).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=2 * torch.finfo(dtype).eps, atol=0)
