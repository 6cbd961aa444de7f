"""The CUDA kernels, compiled by g++ and run by the emulator: values against float64, bad input."""

from __future__ import annotations

import math

import cases
import emulated
import oracle
import pytest
import row_oracle
import shards
import tolerances
import torch
from emulated_checks import (
    CASES,
    FLOATS,
    PLAN_CASES,
    U,
    assert_within,
    check,
    check_case,
    check_partly_held,
    check_strides,
    check_ties,
    inputs,
)

from accumloss import LossOptions, parallel

if reason := emulated.why_not():
    pytest.skip(f"the kernels cannot be emulated: {reason}", allow_module_level=True)


@pytest.fixture(scope="session")
def backend() -> emulated.Backend:
    return emulated.Backend(emulated.build())


PLANS = ["packed", "warp", "block", "held", "partly_held:1", "staged:1", "staged:2", "staged:4", "staged:8"]


def plan_cases(plan: str):
    limit = {"packed": 512, "warp": 1024}.get(plan, 1 << 30)
    return [name for name, case in PLAN_CASES.items() if case["shape"][2] <= limit]


OTHER_DTYPES = pytest.mark.slow("bfloat16 and float32 take these regimes, every dtype the sample cases")
TWO_FAST = [*FLOATS[::2], *(pytest.param(dtype, marks=OTHER_DTYPES) for dtype in FLOATS[1::2])]


@pytest.mark.parametrize("dtype", TWO_FAST, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_emulated_matches_float64(backend, name, dtype):
    backend.seed(1)
    check_case(backend, CASES[name], dtype)


def rows_of(case: cases.Case):
    """What the op hands to a kernel: logits (B, T, V) with V contiguous, labels (B, T), weight, grad, options."""
    logits, labels = case.logits, case.labels
    while logits.dim() < 3:
        logits, labels = logits[None], labels[None]
    logits, labels = logits.flatten(0, -3), labels.flatten(0, -2)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    return logits, labels, case.weight, -0.5, {**case.kwargs, "metrics": True}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_emulated_sample_cases(backend, dtype):
    backend.seed(31)
    for case in cases.sample_cases(dtype):
        check(backend, *rows_of(case))


@pytest.mark.slow("every plan takes cases of its own, the sample cases take the plans that are meant for them")
@pytest.mark.parametrize("plan", PLANS)
def test_emulated_sample_cases_by_every_plan(backend, plan):
    limit = {"packed": 512, "warp": 1024}.get(plan, 1 << 30)
    for seed, dtype in ((32, torch.bfloat16), (33, torch.float32)):
        backend.seed(seed)
        with backend.plan(plan, clusters=1 + seed % 2):
            for case in cases.sample_cases(dtype, large=False):
                if case.logits.shape[-1] <= limit:
                    check(backend, *rows_of(case))


def plan_parameters():
    """Every case of every plan in the fast tier with one dtype and order of threads; all of them in the slow one."""
    slow = pytest.mark.slow("another dtype or order of threads takes this case through this plan")
    for i, plan in enumerate(PLANS):
        for j, name in enumerate(plan_cases(plan)):
            for k, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
                for seed in (21, 22):
                    marks = [] if k == (i + j) % 2 and seed == 21 + j % 2 else [slow]
                    marks.append(pytest.mark.xdist_group(f"emulator-plans-{i % 2}"))
                    yield pytest.param(plan, name, dtype, seed, marks=marks)


@pytest.mark.parametrize("plan, name, dtype, seed", list(plan_parameters()))
def test_emulated_plan_matches_float64(backend, plan, name, dtype, seed):
    backend.seed(seed)
    backend.bulk_copies()
    with backend.plan(plan, clusters=1 + seed % 2):
        check_case(backend, PLAN_CASES[name], dtype)
    assert (backend.bulk_copies() > 0) == plan.startswith("staged")


def test_emulated_rows_that_are_held_in_part(backend):
    for seed in (24, 25):
        backend.seed(seed)
        check_partly_held(backend)


@pytest.mark.parametrize("V", [50257, 262144], ids=["two", "one"])
def test_emulated_rows_that_an_a100_holds_in_part(backend, V):
    """By the table: of two rows at once, of one, the most that fits."""
    backend.seed(26)
    with backend.on(80):
        check_case(backend, {"shape": (1, 2, V), "offset": 1, "ignored": 0.0}, torch.bfloat16)


def test_emulated_held_rows_of_sm_80(backend):
    backend.seed(23)
    backend.bulk_copies()  # from here on
    backend.device(80)
    try:
        for dtype in FLOATS:
            check_case(backend, CASES["block_all_options"], dtype)
            check_case(backend, {"shape": (1, 2, 20011), "metrics": True}, dtype)
        assert backend.bulk_copies() == 0
    finally:
        backend.device()


def test_emulated_sums_of_staged_rows_do_not_depend_on_the_device(backend):
    logits, labels, weight, grad, options = inputs(PLAN_CASES["ring_all_options"], torch.float32)
    results = []
    for seed, clusters in ((24, 1), (25, 3), (26, 40)):
        backend.seed(seed)
        with backend.plan("staged:2", clusters=clusters):
            results.append([*backend.forward_with_grad(logits, labels, grad, weight, **options).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_emulated_totals_are_added_to(backend):
    """What rounds to the sums of the call, on top of what was there."""
    backend.seed(27)
    for dtype in (torch.bfloat16, torch.float64):
        logits, labels, weight, grad, options = inputs(CASES["block_all_options"], dtype)
        sums = backend.forward_with_grad(logits, labels, grad, weight, **options)
        totals = torch.zeros(5, dtype=torch.float64)
        backend.add(totals, logits, labels, None, weight, **options)
        for total, name in zip(totals, emulated.SUMS, strict=True):
            assert torch.equal(total.to(sums[name].dtype), sums[name]), name
        once, over = totals.clone(), logits.clone()
        backend.add(totals, over, labels, grad, weight, **options)
        assert torch.equal(totals, 2 * once)
        assert torch.equal(over, sums["grad_logits"])


def test_emulated_plan_that_does_not_fit_is_an_error(backend):
    logits, labels = torch.zeros(1, 2, 2000), torch.zeros(1, 2, dtype=torch.int64)
    for plan in ("packed", "warp", "staged:3", "held:2", "fast"):
        with backend.plan(plan), pytest.raises(RuntimeError, match="ACCUMLOSS_CUDA_PLAN: expected"):
            backend.forward(logits, labels)
    with backend.plan("staged", capability=80), pytest.raises(RuntimeError, match="V = 2000"):
        backend.forward(logits, labels)


@pytest.mark.parametrize("name", ["warp_all_options", "block_metrics", "block_confident"])
def test_emulated_bits_do_not_depend_on_the_order_of_threads(backend, name):
    logits, labels, weight, grad, options = inputs(CASES[name], torch.bfloat16)
    results = []
    for seed in (2, 3):
        backend.seed(seed)
        got = backend.forward(logits, labels, weight, **options)
        results.append([*got.values(), *backend.forward_with_grad(logits, labels, grad, weight, **options).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_emulated_rounding_of_half_types(backend):
    backend.seed(4)
    for dtype in (torch.bfloat16, torch.float16):
        logits = torch.randn(1, 2, 50257, generator=torch.Generator().manual_seed(5)).to(dtype)
        labels = torch.tensor([[3, 50256]])
        want = row_oracle.rows(logits, labels, None, 1024.0).grad.to(dtype)
        got = backend.forward_with_grad(logits, labels, 1024.0)["grad_logits"]
        assert (got == want).double().mean() >= 0.999
        assert torch.equal(got.gather(2, labels[..., None]), want.gather(2, labels[..., None]))


SHIFTS = (0.0, 1000.0, -30000.0, 30000.0)
# Plan, dtype, and by how much the exponential of the device is off (see Backend.exp_error).
ROUNDING = [
    *(
        (plan, dtype, 2)
        for plan in ("warp", "held", "partly_held:1", "block", "staged:1", "staged:2")
        for dtype in FLOATS[:2]
    ),
    *(("staged:1", dtype, error) for dtype in FLOATS[:2] for error in (1, -1)),
    *((plan, torch.float32, error) for plan in ("held", "staged:1", "staged:2") for error in (0, 2)),
]


@pytest.mark.parametrize("plan, dtype, error", ROUNDING)
def test_emulated_promises_at_any_shift_and_confidence(backend, plan, dtype, error):
    """docs/numerics.md: row losses, entries within an ulp and 99.9 % of them the nearest number, the label's too."""
    V = 5003 if plan.startswith("partly") else 1000  # so that there is a rest
    generator = torch.Generator().manual_seed(6)
    spreads = torch.tensor([0.02, 1.0, 4.0, 12.0] if dtype == torch.float32 else [1.0, 4.0, 50.0, 300.0])
    backend.seed(51)
    right, all_entries = 0, 0
    for shift in SHIFTS:
        logits = (torch.randn(2, len(spreads), V, generator=generator) * spreads[:, None] + shift).to(dtype)
        labels = torch.randint(0, V, logits.shape[:2], generator=generator)
        leads = logits[1].amax(-1) + torch.tensor([1.0, 8.0, 16.0, 32.0]).to(dtype) * (1 + abs(shift) / 500)
        logits[1].scatter_(1, labels[1, :, None], leads[:, None])  # and so confident
        want = row_oracle.rows(logits, labels, None, 1024.0)
        with backend.plan(plan, clusters=2), backend.exp_error(error):
            got = backend.forward_with_grad(logits, labels, 1024.0)["grad_logits"]
            nll = backend.forward(logits, labels)["nll"].double()
        assert_within("nll", nll, want.nll, 2e-6 * want.nll + 1e-37)
        least = max(torch.finfo(dtype).smallest_normal, 1024 * torch.finfo(torch.float32).smallest_normal)
        normal = want.grad.abs() >= least  # so that its probability is a normal number too; others may be 0
        if dtype == torch.float32:
            assert_within("gradient", got.where(normal, 0.0), want.grad.where(normal, 0.0), want.grad_bound)
            continue
        nearest = want.grad.to(dtype)
        right += (got == nearest)[normal].sum()
        all_entries += normal.sum()
        ulp = want.grad.abs() * torch.finfo(dtype).eps + least
        assert_within("gradient", got, want.grad, ulp)
        assert torch.equal(got.gather(2, labels[..., None]), nearest.gather(2, labels[..., None]))
    assert right >= 0.999 * all_entries


# By the table: 1500 on a device without clusters.
BY_TABLE = pytest.mark.parametrize(
    "V, capability", [(40, 90), (700, 90), (1500, 80), (5000, 90)], ids=["packed", "warp", "held", "staged"]
)


@BY_TABLE
def test_emulated_num_correct_ties(backend, V, capability):
    with backend.on(capability):
        check_ties(backend, V)


@BY_TABLE
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_emulated_infinities_and_nan(backend, V, capability, dtype):
    backend.seed(7)
    inf, nan = math.inf, math.nan
    logits = torch.randn(1, 7, V, generator=torch.Generator().manual_seed(8)).to(dtype)
    labels = torch.full((1, 7), 5)
    logits[0, 0, 6:] = -inf  # a masked vocabulary
    logits[0, 1, :] = -inf
    logits[0, 2, 5] = -inf
    logits[0, 3, :5] = logits[0, 3, 6:] = -inf  # the label alone
    logits[0, 4, V - 1] = nan
    logits[0, 5, 5] = nan
    logits[0, 6, V - 2] = inf
    with backend.on(capability):
        got = backend.forward(logits, labels, metrics=True)
        gradients = [
            backend.backward(logits, labels, got["lse"], got["nll"]),
            backend.forward_with_grad(logits, labels, metrics=True)["grad_logits"],
            backend.forward_with_grad(logits, labels)["grad_logits"],
        ]
    nll = got["nll"][0]
    assert nll[0].isfinite()
    assert nll[1].isnan()
    assert nll[2] == inf
    assert nll[3] == 0
    assert nll[4:].isnan().all()
    assert got["num_correct"] <= 2
    for gradient in (gradient[0] for gradient in gradients):
        assert (gradient[0, 6:] == 0).all()
        assert gradient[0, :6].isfinite().all()
        assert gradient[1].isnan().all()
        assert gradient[4:].isnan().all()
        assert gradient[2, 5] == -1
        assert gradient[2].isfinite().all()
        assert (gradient[3] == 0).all()
        want = row_oracle.rows(logits[:, :1], labels[:, :1])
        assert_within("gradient", gradient[:1], want.grad[0], want.grad_bound[0])


@BY_TABLE
def test_emulated_strides(backend, V, capability):
    with backend.on(capability):
        check_strides(backend, V)


@BY_TABLE
def test_emulated_bad_labels(backend, V, capability):
    with backend.on(capability):
        backend.seed(11)
        logits = torch.randn(1, 6, V, generator=torch.Generator().manual_seed(12))
        assert backend.take_bad_label() is None
        for label in (V, -1, 2**62, -(2**62)):
            labels = torch.tensor([[1, 2, 3, label, -100, V - 1]])
            got = backend.forward(logits, labels)
            assert got["nll"][0].isnan().tolist() == [False, False, False, True, False, False]
            assert got["loss_sum"].isnan()
            assert got["num_items"] == 5
            assert backend.take_bad_label() == (3, label)
            assert backend.take_bad_label() is None
            gradient = backend.backward(logits, labels, got["lse"], got["nll"])
            both = backend.forward_with_grad(logits, labels)["grad_logits"]
            assert backend.take_bad_label() == (3, label)
            for g in (gradient, both):
                assert (g[0, 3:5] == 0).all()
                assert (g[0, [0, 1, 2, 5]] != 0).all()


def three_dimensional(x: torch.Tensor, dims: int) -> torch.Tensor:
    while x.dim() < dims:
        x = x[None]
    return x.flatten(0, -dims)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_emulated_shards_match_float64(backend, dtype):
    """The sample cases, the vocabulary cut in three: merged, and the gradient put together; no guard is written."""
    backend.seed(51)

    def columns_of(logits, labels, weight, shard, options, metrics):
        given = {**options.as_kwargs(), **shard.kwargs, "metrics": metrics}
        found = backend.forward_shard(emulated.guarded(three_dimensional(logits, 3), 1), three_dimensional(labels, 2),
                                      weight, **given)  # fmt: skip
        return found.view(-1, *labels.shape)

    for case in cases.sample_cases(dtype, large=False):
        if case.logits.shape[-1] < 5 or case.logits.numel() == 0:
            continue  # a shard without classes calls no kernel
        rows, labels, parts = shards.merged(case, 3, columns_of)
        wanted = oracle.expected(case, "cuda")
        oracle.check_sums(shards.seven_outputs(rows), case, wanted, "cuda")
        found = []
        for shard in parts:
            local = three_dimensional(shards.part(case.logits, shard), 3)
            flat = [three_dimensional(x, 2).contiguous() for x in (labels, rows.lse, rows.nll)]
            out = emulated.guarded(torch.full_like(local, 7.0), 3)
            given = {**case.options.as_kwargs(), **shard.kwargs}
            backend.backward(local, *flat, weight=case.weight, out=out, **given)
            emulated.check_guards(out)
            found.append(out.view(*labels.shape, -1))
        tolerances.assert_within(torch.cat(found, -1), wanted.grad, wanted.grad_bound, f"{case.name}: gradient")
    assert backend.take_bad_label() is None


def test_emulated_shards_of_rows_with_ties_and_bad_labels(backend):
    """The label is the argmax where it is the first of equals in all shards; a label outside of the vocabulary is told."""
    backend.seed(52)
    V = 2100
    logits = torch.zeros(1, 8, V)
    labels = torch.tensor([[0, 699, 700, 1400, 2099, 5, V, -1]])
    for row, winners in enumerate(([0, 2099], [699, 700], [699, 700], [1400], [3, 2099], [5, 1500])):
        logits[0, row, winners] = 900.0 + torch.arange(len(winners)) * (row == 4)
    for options in ({}, {"softcap": 5.0}):
        columns = [
            backend.forward_shard(shards.part(logits, s), labels, metrics=True, **options, **s.kwargs)
            for s in shards.shards_of(V, 3)
        ]
        for column in columns:
            assert column[:, 0, 6:].isnan().all()
        assert backend.take_bad_label() in ((6, V), (7, -1))
        shard = shards.shards_of(V, 3)[0]
        rows = parallel.merge(torch.stack(columns), labels, None, shard, LossOptions(**options), True, torch.float32)
        assert rows.sums[0].isnan()
        assert rows.sums[1] == 8
        right = logits[:, :6].argmax(-1) == labels[:, :6]
        assert right.tolist() == [[True, True, False, True, True, True]]
        assert rows.sums[3] == right.sum()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_emulated_scale(backend, dtype):
    backend.seed(13)
    for shape, offset in (((2, 3, 5), 0), ((1, 3, 4099), 3)):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(14)).to(dtype)
        for factor in (0.3, 1.0):
            scaled = emulated.guarded(values, offset)
            backend.scale(scaled, factor)
            emulated.check_guards(scaled)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert torch.equal(scaled, (values.to(wide) * torch.tensor(factor, dtype=wide)).to(dtype))
    backend.scale(torch.zeros(0, 3, 5, dtype=dtype), 2.0)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize(
    "plan, V", [("packed", 40), ("warp", 600), ("block", 1100), ("held", 1100), ("staged:2", 1100)]
)
def test_emulated_masked_classes(backend, plan, V, dtype):
    """Half of the classes masked by the lowest number of the dtype, one label among them: see tests/test_masked_classes.py."""
    backend.seed(41)
    x = torch.randn(1, 3, V, generator=torch.Generator().manual_seed(V)) * 3
    x[0, 0, V // 2 :] = x[0, 1:, : V // 2] = torch.finfo(dtype).min
    labels = torch.tensor([[1, V - 1, 2]])  # the last is masked
    for options in ({}, {"z_loss": 1e-3}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "logit_scale": 1.5}):
        if "label_smoothing" in options:
            labels = torch.tensor([[1, V - 1, -100]])  # with a masked label the sum would be beyond float
        logits, options = emulated.guarded(x.to(dtype)), {**options, "metrics": True}
        with backend.plan(plan):
            got = backend.forward(logits, labels, **options)
            want = row_oracle.rows(logits, labels, **options)
            near = 64 * U[dtype] * (1 + want.lse.abs())
            assert_within("lse", got["lse"], want.lse, near * options.get("logit_scale", 1.0))
            if "logit_scale" not in options:  # whose rounding row_oracle counts for masked classes too
                check(backend, logits, labels, None, 1.0, options)
                continue
            loss = want.loss.sum()
            assert_within("loss_sum", got["loss_sum"], loss, 64 * U[dtype] * loss)
            assert_within("entropy_sum", got["entropy_sum"], want.entropy.sum(), (near + near * want.entropy).sum() * 4)
