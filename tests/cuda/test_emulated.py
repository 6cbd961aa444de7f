"""The CUDA kernels, compiled by g++ and run by the emulator: values against float64, bad input, planted faults."""

from __future__ import annotations

import itertools
import math

import cases
import emulated
import pytest
import row_oracle
import torch

if reason := emulated.why_not():
    pytest.skip(f"the kernels cannot be emulated: {reason}", allow_module_level=True)

U = row_oracle.U
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5, "metrics": True}
# Regime: shape (B, T, V) and what is special. V <= 1024 takes the warps, more the blocks.
CASES = {
    "one_class": {"shape": (2, 3, 1)},
    "two_classes": {"shape": (3, 4, 2), "metrics": True},
    "less_than_a_vector": {"shape": (2, 3, 7), "offset": 5},
    "warp": {"shape": (2, 19, 130), "offset": 1},
    "warp_all_options": {"shape": (2, 5, 517), "shift": 1, "weight": True, "int32": True, **ALL},
    "warp_largest": {"shape": (1, 2, 1024), "confident": True},
    "block_smallest": {"shape": (1, 3, 1025), "offset": 3, "spread": 3.0},
    "block_metrics": {"shape": (2, 3, 2050), "metrics": True, "grad": -0.5},
    "block_all_options": {"shape": (1, 5, 4099), "shift": 1, "weight": True, "ignore_index": 3, "spread": 5.0, **ALL},
    "block_weight_z_loss": {"shape": (1, 3, 1100), "weight": True, "z_loss": 1e-2, "int32": True},
    "block_confident": {"shape": (1, 4, 16001), "offset": 7, "confident": True},
    "largest_block_uniform": {"shape": (1, 2, 50257), "spread": 0.1},
    "shift_past_the_end": {"shape": (2, 2, 33), "shift": 3},
    "all_ignored": {"shape": (2, 3, 1030), "ignored": 1.0},
    "no_rows": {"shape": (0, 3, 12)},
}
FORMAT = {"shape", "offset", "spread", "grad", "ignored", "weight", "int32", "confident"}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(scope="session")
def backend() -> emulated.Backend:
    return emulated.Backend(emulated.build())


def inputs(case: dict, dtype: torch.dtype):
    """logits, labels, weight, grad, options of a case; the same for every call."""
    options = {name: value for name, value in case.items() if name not in FORMAT}
    shift, ignore_index = options.get("shift", 0), options.get("ignore_index", -100)
    B, T, V = case["shape"]
    generator = torch.Generator().manual_seed(B * 7 + T * 11 + V)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * case.get("spread", 1.0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    if labels.numel() > 1 and case.get("ignored", 0.25) < 1:
        labels[-1, -1], labels[0, min(1, T - 1)] = 0, V - 1  # the edges of the vocabulary
    if case.get("confident"):
        gap = torch.linspace(0, 25, B * T, dtype=torch.float64).view(B, T, 1)
        logits.scatter_(2, labels[..., None], logits.amax(2, keepdim=True) + gap)
    ignored = torch.rand(B, T, generator=generator) < case.get("ignored", 0.25)
    ignored[..., -1] &= case.get("ignored", 0.25) == 1
    labels[ignored] = ignore_index
    if shift == 0:
        logits[ignored] = math.nan  # an ignored row is not read
    weight = torch.rand(V, generator=generator) + 0.1 if case.get("weight") else None
    if case.get("int32"):
        labels = labels.int()
    return emulated.guarded(logits.to(dtype), case.get("offset", 0)), labels, weight, case.get("grad", 1.0), options


def assert_within(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
    got = got.double()
    wrong = ~((got - want).abs() <= bound) & ~(got.isnan() & want.isnan()) & (got != want)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        pytest.fail(f"{name}{at}: {got[at]:.9g}, expected {want[at]:.9g} within {bound[at]:.3g}; {wrong.sum()} such")


def check_case(backend: emulated.Backend, case: dict, dtype: torch.dtype) -> None:
    check(backend, *inputs(case, dtype), offset=case.get("offset", 0))


def check(backend: emulated.Backend, logits, labels, weight, grad: float, options: dict, offset: int = 0) -> None:
    """Forward, backward and both in one, out of place and in place, against float64."""
    dtype = logits.dtype
    pristine = logits.clone()
    want = row_oracle.rows(logits.nan_to_num(0.0), labels, weight, grad, **options)
    u = U[dtype]
    got = backend.forward(logits, labels, weight, **options)
    assert_within("nll", got["nll"], want.nll, want.nll_bound + u * want.nll)
    assert_within("lse", got["lse"], want.lse, want.nll_bound + u * (16 + want.lse.abs()))

    def check_sums(sums: dict[str, torch.Tensor]) -> None:
        assert_within("loss_sum", sums["loss_sum"], want.loss.sum(), want.loss_bound.sum() + 2 * u * want.loss.sum())
        assert_within("total_weight", sums["total_weight"], want.weight.sum(), 2 * u * want.weight.sum())
        assert sums["num_items"] == want.items.sum()
        if options.get("metrics"):
            assert sums["num_correct"] == want.correct.sum()
            bound = (32 * u * (1 + want.lse.abs() + want.entropy) * want.items).sum()
            assert_within("entropy_sum", sums["entropy_sum"], want.entropy.sum(), bound)
        else:
            assert sums["num_correct"] == 0
            assert sums["entropy_sum"] == 0

    check_sums(got)

    def fresh() -> torch.Tensor:
        return emulated.guarded(logits, offset)

    def check_gradient(name: str, gradient: torch.Tensor) -> None:
        assert_within(name, gradient, want.grad, want.grad_bound)
        emulated.check_guards(gradient)

    arguments = (labels, got["lse"], got["nll"], grad, weight)
    gradient = backend.backward(logits, *arguments, **options)
    check_gradient("backward", gradient)
    assert torch.equal(logits.nan_to_num(0.0), pristine.nan_to_num(0.0))
    over = fresh()
    check_gradient("backward in place", backend.backward(over, *arguments, out=over, **options))
    both = backend.forward_with_grad(logits, labels, grad, weight, **options)
    check_gradient("forward_with_grad", both["grad_logits"])
    same = emulated.guarded(torch.full_like(logits, 7.0).contiguous(), offset)
    backend.forward_with_grad(logits, labels, grad, weight, out=same, **options)
    check_gradient("forward_with_grad, aligned as the logits", same)
    over = fresh()
    in_place = backend.forward_with_grad(over, labels, grad, weight, out=over, **options)
    check_gradient("forward_with_grad in place", over)
    check_sums(both)
    check_sums(in_place)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


@pytest.mark.parametrize("plan", ["packed", "warp", "block", "held", "staged:1", "staged:2", "staged:4", "staged:8"])
def test_emulated_sample_cases_by_every_plan(backend, plan):
    limit = {"packed": 64, "warp": 1024}.get(plan, 1 << 30)
    for seed, dtype in ((32, torch.bfloat16), (33, torch.float32)):
        backend.seed(seed)
        with backend.plan(plan, clusters=1 + seed % 2):
            for case in cases.sample_cases(dtype, large=False):
                if case.logits.shape[-1] <= limit:
                    check(backend, *rows_of(case))


# Each plan by force, on rows that it need not be meant for: more of them than it has stages (one cluster walks over
# all of them on a device that has room for one), rows without a vector,
# vectors that do not reach all blocks, other rows between.
PLAN_CASES = {
    "ring": {"shape": (3, 9, 1037), "offset": 1, "spread": 3.0},
    "ring_all_options": {"shape": (2, 12, 1100), "shift": 1, "weight": True, "int32": True, **ALL},
    "ring_metrics_ignored": {"shape": (1, 30, 600), "metrics": True, "ignored": 0.6, "offset": 3},
    "few_vectors": {"shape": (2, 5, 61), "confident": True, "metrics": True},
    "no_vector": {"shape": (1, 4, 3), "offset": 1, "metrics": True},
}
PLANS = ["packed", "warp", "block", "held", "staged:1", "staged:2", "staged:4", "staged:8"]


def plan_cases(plan: str):
    limit = {"packed": 64, "warp": 1024}.get(plan, 1 << 30)
    return [name for name, case in PLAN_CASES.items() if case["shape"][2] <= limit]


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("plan, name", [(plan, name) for plan in PLANS for name in plan_cases(plan)])
def test_emulated_plan_matches_float64(backend, plan, name, dtype):
    for seed in (21, 22):
        backend.seed(seed)
        backend.bulk_copies()
        with backend.plan(plan, clusters=1 + seed % 2):
            check_case(backend, PLAN_CASES[name], dtype)
        assert (backend.bulk_copies() > 0) == (plan.startswith("staged") and name != "no_vector")


def test_emulated_held_rows_of_sm_80(backend):
    backend.seed(23)
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


# Softcap makes equal z of different x; equal x decide by the index. The winner is torch.argmax of the raw logits.
@pytest.mark.parametrize("V", [40, 500, 1500, 5000], ids=["packed", "warp", "held", "staged"])
def test_emulated_num_correct_ties(backend, V):
    backend.seed(6)
    rows = []
    for (a, x_a), (b, x_b) in itertools.product([(2, 900.0), (V // 2, 1000.0), (V - 1, 1000.0)], repeat=2):
        row = torch.zeros(V)
        row[a], row[b] = x_a, x_b
        rows += [(row, a), (row, b)]
    rows += [(torch.zeros(V), 0), (torch.zeros(V), 1)]
    logits = torch.stack([row for row, _ in rows])[None]
    labels = torch.tensor([label for _, label in rows])[None]
    expected = (logits.argmax(2) == labels).sum()
    for options in ({"metrics": True}, {"metrics": True, "softcap": 5.0}):
        assert backend.forward(logits, labels, **options)["num_correct"] == expected
        over = emulated.guarded(logits)
        assert backend.forward_with_grad(over, labels, out=over, **options)["num_correct"] == expected


@pytest.mark.parametrize("V", [40, 500, 1500, 5000], ids=["packed", "warp", "held", "staged"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_emulated_infinities_and_nan(backend, V, dtype):
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
    got = backend.forward(logits, labels, metrics=True)
    nll = got["nll"][0]
    assert nll[0].isfinite()
    assert nll[1].isnan()
    assert nll[2] == inf
    assert nll[3] == 0
    assert nll[4:].isnan().all()
    assert got["num_correct"] <= 2
    gradient = backend.backward(logits, labels, got["lse"], got["nll"])[0]
    assert (gradient[0, 6:] == 0).all()
    assert gradient[0, :6].isfinite().all()
    assert gradient[1].isnan().all()
    assert gradient[4:].isnan().all()
    assert gradient[2, 5] == -1
    assert gradient[2].isfinite().all()
    assert (gradient[3] == 0).all()
    both = backend.forward_with_grad(logits, labels, metrics=True)["grad_logits"][0]
    assert torch.equal(both.nan_to_num(9.0), gradient.nan_to_num(9.0))


@pytest.mark.parametrize("V", [40, 500, 1500, 5000], ids=["packed", "warp", "held", "staged"])
def test_emulated_strides(backend, V):
    backend.seed(9)
    generator = torch.Generator().manual_seed(10)
    store = torch.randn(3, 4, V + 3, generator=generator)
    labels = torch.randint(0, V, (4, 3), generator=generator).T  # stride along T
    for logits in (store[..., :V], store[..., 3:], store[:, ::2, 1 : V + 1], store.transpose(0, 1)[..., 2 : V + 2]):
        y = labels[: logits.shape[0], : logits.shape[1]] if logits.shape[0] == 3 else labels.T
        got, want = backend.forward(logits, y), backend.forward(logits.contiguous(), y.contiguous())
        gradient = backend.forward_with_grad(logits, y)["grad_logits"]
        reference = row_oracle.rows(logits, y)
        assert_within("nll", got["nll"], reference.nll, reference.nll_bound)
        assert_within("gradient", gradient, reference.grad, reference.grad_bound)
        assert_within("lse", got["lse"], want["lse"], 16 * U[torch.float32] * want["lse"].abs())


@pytest.mark.parametrize("V", [40, 500, 1500, 5000], ids=["packed", "warp", "held", "staged"])
def test_emulated_bad_labels(backend, V):
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


FAULTS = {
    "merge_without_barrier": [
        ("cuda/group.cuh", "    __syncthreads();\n    state = RowState<Acc>();", "    state = RowState<Acc>();")
    ],
    "once_without_barrier": [("cuda/group.cuh", "*shared = compute();\n    __syncthreads();", "*shared = compute();")],
    "barrier_in_a_branch": [
        ("cuda/group.cuh", "    __syncthreads();\n    state =", "    if (lane < 16) __syncthreads();\n    state =")
    ],
    "shared_memory_used_twice": [
        ("cuda/group.cuh", "kOnceOffset = 4 * kWarp * sizeof(double)", "kOnceOffset = 0 * kWarp * sizeof(double)"),
        ("cuda/group.cuh", "kSharedBytes = kOnceOffset + 128", "kSharedBytes = 4 * kWarp * sizeof(double) + 128"),
    ],
    "shared_memory_too_small": [
        (
            "cuda/plan.h",
            "plan.threads = block_threads(request.V);\n    plan.shared_bytes = kHeldHeader;",
            "plan.threads = block_threads(request.V);\n    plan.shared_bytes = 16;",
        )
    ],
    "warp_sum_skips_a_step": [
        (
            "cuda/group.cuh",
            "for (int lane = kLanes / 2; lane > 0; lane /= 2) value +=",
            "for (int lane = kLanes / 4; lane > 0; lane /= 2) value +=",
        )
    ],
    "shuffle_mask_without_a_lane": [("cuda/group.cuh", "kAllLanes = 0xffffffffu", "kAllLanes = 0x7fffffffu")],
    "maximum_without_rescale": [
        ("cuda/cross_entropy.cuh", "state.sum = state.sum * scale + pairwise", "state.sum = state.sum + pairwise")
    ],
    "label_in_the_sum": [("cuda/cross_entropy.cuh", "if (i == label_at) z[i] =", "if (false) z[i] =")],
    "label_gradient_missing": [("cuda/cross_entropy.cuh", "if (i == label_at) dz = grad.target;", "")],
    "tail_one_short": [("cuda/element.cuh", "return V - vectors * kWidth;", "return V - vectors * kWidth - 1;")],
    "tail_one_long": [("cuda/element.cuh", "return V - vectors * kWidth;", "return V - vectors * kWidth + 1;")],
    "vectors_not_aligned": [("cuda/element.cuh", "head = static_cast<int64_t>((", "head = 0 * static_cast<int64_t>((")],
    "output_alignment_ignored": [("cuda/element.cuh", "|| in_offset != out_offset ?", "?")],
    "ties_after_the_gradient": [
        (
            "cuda/cross_entropy.cuh",
            "  if (kGeneral && inputs.options.metrics && z_label == state.max) wins = wins_tie(group, x, V, label);\n",
            "",
        ),
        (
            "cuda/cross_entropy.cuh",
            "    write_gradient<kGeneral, kHeld>(group, x, out, label, grad, inputs, held);\n  } else if",
            "    write_gradient<kGeneral, kHeld>(group, x, out, label, grad, inputs, held);\n"
            "    if (z_label == state.max && wins_tie(group, x, V, label) && first) ++total->correct;\n  } else if",
        ),
    ],
    "last_warp_not_added": [("cuda/cross_entropy.cuh", "other < Group::kGroups;", "other < Group::kGroups - 1;")],
    "int32_labels_read_as_int64": [("cuda/cross_entropy.cuh", "return labels.is_int32 ?", "return false ?")],
    "ignored_rows_read": [
        (
            "cuda/cross_entropy.cuh",
            "  return label != inputs.options.ignore_index && label >= 0",
            "  return label >= 0",
        )
    ],
}


# Of the staged kernels and the plans around them: the check that runs, and what is changed.
MERGE = "    barrier_of(blocks);\n    state = RowState<Acc>();"
STAGED_FAULTS = {
    "wait_missing": [
        ("cuda/staged.cuh", "    mbarrier_wait(&shared.full[item % shape.stages], (item / shape.stages) & 1);\n", "")
    ],
    "parity_of_the_phase_before": [("cuda/staged.cuh", "(item / shape.stages) & 1", "(item / shape.stages + 1) & 1")],
    "parity_by_row": [("cuda/staged.cuh", "(item / shape.stages) & 1", "item & 1")],
    "stage_refilled_before_the_gradient": [("cuda/staged.cuh", "kGrad ? item : item + 1", "item + 1")],
    "stage_refilled_before_the_barrier": [
        ("cuda/staged.cuh", MERGE, "    if (first) ring.refill(inputs, item + 1);\n" + MERGE)
    ],
    "stage_of_another_row": [("cuda/staged.cuh", "ring.stage(item)", "ring.stage(item + 1)")],
    "copy_not_of_16_bytes": [("cuda/staged.cuh", "(slice.count) * kVectorBytes;", "(slice.count) * kVectorBytes - 4;")],
    "copy_not_aligned": [("cuda/staged.cuh", "x + slice.index(0), bytes", "x + slice.index(0) + 1, bytes")],
    "copy_of_the_ends": [("cuda/staged.cuh", "x + slice.index(0), bytes", "x, bytes")],
    "expects_too_little": [
        ("cuda/staged.cuh", "mbarrier_expect(barrier, bytes)", "mbarrier_expect(barrier, bytes / 2)")
    ],
    "expects_too_much": [
        ("cuda/staged.cuh", "mbarrier_expect(barrier, bytes)", "mbarrier_expect(barrier, bytes + 16)")
    ],
    "expects_nothing": [("cuda/staged.cuh", "      mbarrier_expect(barrier, bytes);\n", "")],
    "mbarrier_for_two_arrivals": [
        ("cuda/staged.cuh", "mbarrier_init(&shared.full[s], 1)", "mbarrier_init(&shared.full[s], 2)")
    ],
    "mbarriers_not_fenced": [("cuda/staged.cuh", "    mbarrier_init_fence();\n", "")],
    "no_barrier_after_the_start": [("cuda/staged.cuh", "  barrier_of(blocks);  // from here", "  // from here")],
    "cluster_waits_as_blocks": [("cuda/staged.cuh", "    cluster_barrier();\n", "    __syncthreads();\n")],
    "cluster_barrier_in_a_branch": [("cuda/staged.cuh", MERGE, "    if (lane < 16)" + MERGE)],
    "rank_outside_the_cluster": [
        ("cuda/staged.cuh", "if (lane < blocks) cluster_store", "if (lane <= blocks) cluster_store")
    ],
    "sums_to_the_own_block_alone": [("cuda/staged.cuh", "kWarp], lane, state);", "kWarp], rank, state);")],
    "sums_of_two_rows_in_one_place": [("cuda/staged.cuh", "shared.states[item % 2]", "shared.states[0]")],
    "ties_without_a_barrier": [
        ("cuda/staged.cuh", "static_cast<int>(beaten));\n      barrier_of(blocks);", "static_cast<int>(beaten));")
    ],
    "ties_of_one_block": [("cuda/staged.cuh", "wins &= shared.beaten[block] == 0", "wins &= shared.beaten[0] == 0")],
    "gradient_without_a_barrier": [
        (
            "cuda/staged.cuh",
            "      __syncthreads();\n      const RowGrad<Acc> grad =",
            "      const RowGrad<Acc> grad =",
        )
    ],
    "slices_rounded_down": [("cuda/staged.cuh", "(vectors + blocks - 1) / blocks", "vectors / blocks")],
    "ends_in_every_block": [("cuda/staged.cuh", "scalars = rank == blocks - 1 ?", "scalars = true ?")],
    "walk_without_carry": [("cuda/staged.cuh", "if (at.t >= T)", "if (at.t > T)")],
    "ignored_rows_copied": [
        ("cuda/staged.cuh", "      if (!is_item(inputs, row_label(inputs, next.at))) continue;\n", "")
    ],
    "stages_overlap": [
        (
            "cuda/staged.cuh",
            "(item % shape.stages) * shape.stage_bytes",
            "(item % shape.stages) * (shape.stage_bytes / 2)",
        )
    ],
    "stages_over_the_mbarriers": [("cuda/staged.cuh", "dynamic_shared() + kStagedHeader", "dynamic_shared()")],
    "stages_past_the_end": [
        ("cuda/plan.h", "kStagedHeader + plan.stages * plan.stage_bytes", "plan.stages * plan.stage_bytes")
    ],
    "shared_memory_not_asked_for": [
        ("cuda/launch.cuh", "most - static_cast<int>(attributes.sharedSizeBytes)", "48 * 1024")
    ],
    "shared_memory_of_each_launch": [
        (
            "cuda/launch.cuh",
            "  check(cudaLaunchKernelEx(",
            "  if (grid.shared_bytes > 48 * 1024) cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), "
            "cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes));\n"
            "  check(cudaLaunchKernelEx(",
        )
    ],
    "a_cluster_too_many": [("cuda/staged.cu", "std::min(rows, plan.resident)", "std::min(rows, plan.resident + 1)")],
    "a_row_left_out": [("cuda/staged.cuh", "for (; walk.row < rows; walk.advance())", "for (; walk.row < rows - 1; walk.advance())")],
    "label_read_after_the_exchange": [
        (
            "cuda/staged.cuh",
            "finish_row(state, z_label, weights, inputs)",
            "finish_row(state, Element<T>::widen(row_start<T>(inputs.logits, walk.at)[this_label]), weights, inputs)",
        )
    ],
    "store_to_a_block_that_left": [
        (
            "cuda/staged.cuh",
            "    ++item;\n  }\n",
            "    ++item;\n  }\n  if (first) cluster_store(&shared.beaten[0], blocks - 1 - rank, 0);\n",
        )
    ],
    "held_ends_over_the_vectors": [
        ("cuda/cross_entropy.cuh", "held[span.vectors * RowSpan<T>::kWidth + s] = element", "held[s] = element")
    ],
    "held_row_past_the_end": [
        ("cuda/plan.h", "kHeldHeader + round_up(request.V * size, 16)", "round_up(request.V * size, 16)")
    ],
    "packed_mask_of_the_first_group": [("cuda/group.cuh", " << (index() % (kWarp / kLanes) * kLanes)", "")],
    "packed_merges_the_whole_warp": [("cuda/group.cuh", "warp_merge<kGeneral, kLanes>", "warp_merge<kGeneral, kWarp>")],
}


def check_faulty(library, staged: bool = True) -> None:
    backend = emulated.Backend(library)
    cases = {**CASES, **PLAN_CASES, "ignored_class": {"shape": (2, 3, 1030), "ignore_index": 7}}
    for seed in (1, 2):
        backend.seed(seed)
        if staged:
            for plan, name in (
                ("staged:1", "ring"),
                ("staged:2", "ring_all_options"),
                ("staged:4", "ring"),
                ("held", "ring"),
                ("packed", "few_vectors"),
            ):
                with backend.plan(plan, clusters=1):
                    check_case(backend, cases[name], torch.float32)
            with backend.plan("staged:2", clusters=1):
                test_emulated_num_correct_ties(backend, 1500)
                check_case(backend, {"shape": (1, 2, 12003)}, torch.float32)
            continue
        with backend.plan("block"):
            for name in ("block_smallest", "block_metrics", "block_all_options", "ignored_class"):
                check_case(backend, cases[name], torch.float32)
            test_emulated_strides(backend, 1500)
            test_emulated_num_correct_ties(backend, 1500)
        for name in ("warp", "warp_all_options"):
            check_case(backend, cases[name], torch.float32)


NO_FAULT = (("cuda/group.cuh", "constexpr int kWarp = 32;", "constexpr int kWarp = 16 + 16;"),)


@pytest.mark.parametrize("staged", [False, True])
def test_emulated_accepts_no_fault(staged):
    check_faulty(emulated.build(NO_FAULT), staged)


@pytest.mark.parametrize("fault", [*FAULTS, *STAGED_FAULTS])
def test_emulated_catches_planted_fault(fault):
    patches = tuple({**FAULTS, **STAGED_FAULTS}[fault])
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)) as caught:
        check_faulty(emulated.build(patches), fault in STAGED_FAULTS)
    print(f"{fault}: {str(caught.value).splitlines()[0]}")


@pytest.mark.parametrize("sanitizer", emulated.SANITIZERS)
def test_emulated_sanitizer_finds_nothing(sanitizer):
    result = emulated.run_sanitized(sanitizer)
    assert result.returncode == 0, result.stdout + result.stderr


# What the values can miss: whether a race shows in them is chance.
@pytest.mark.parametrize(
    "sanitizer, fault, message",
    [
        ("thread", "sums_of_two_rows_in_one_place", "data race"),
        ("thread", "stage_refilled_before_the_gradient", "data race"),
        ("address", "tail_one_long", "heap-buffer-overflow"),
    ],
)
def test_emulated_sanitizer_catches_planted_fault(sanitizer, fault, message):
    result = emulated.run_sanitized(sanitizer, tuple({**FAULTS, **STAGED_FAULTS}[fault]))
    assert result.returncode != 0
    assert message in result.stderr
