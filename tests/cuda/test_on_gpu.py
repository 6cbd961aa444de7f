"""The CUDA kernels on a GPU: values, counts equal to the CPU's, graphs, streams, bad labels. The arbiter of the emulator."""

from __future__ import annotations

import math

import pytest
import row_oracle
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

import accumloss

if accumloss.build_info().get("cuda") is None:
    pytest.skip("accumloss was built without CUDA", allow_module_level=True)

OPS = torch.ops.accumloss
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5, "metrics": True}
CASES = {
    "one_class": {"shape": (2, 3, 1)},
    "two_classes": {"shape": (3, 400, 2), "metrics": True},
    "warp": {"shape": (2, 190, 130), "metrics": True},
    "warp_all_options": {"shape": (2, 50, 517), "shift": 1, "weight": True, **ALL},
    "warp_largest": {"shape": (1, 20, 1024), "metrics": True},
    "block_smallest": {"shape": (1, 30, 1025), "spread": 3.0, "metrics": True},
    "block_all_options": {"shape": (2, 5, 4099), "shift": 1, "weight": True, "ignore_index": 3, "spread": 5.0, **ALL},
    "block_confident": {"shape": (2, 20, 16001), "confident": True},
    "block_odd": {"shape": (2, 20, 50257), "metrics": True},
    "block_large": {"shape": (1, 16, 262144)},
    "all_ignored": {"shape": (2, 3, 1030), "ignored": 1.0},
    "no_rows": {"shape": (0, 3, 12)},
}
FORMAT = {"shape", "spread", "ignored", "weight", "confident"}


def inputs(case, dtype):
    options = {name: value for name, value in case.items() if name not in FORMAT}
    B, T, V = case["shape"]
    generator = torch.Generator().manual_seed(B * 7 + T * 11 + V)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * case.get("spread", 1.0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    if case.get("confident"):
        gap = torch.linspace(0, 25, B * T, dtype=torch.float64).view(B, T, 1)
        logits.scatter_(2, labels[..., None], logits.amax(2, keepdim=True) + gap)
    labels[torch.rand(B, T, generator=generator) < case.get("ignored", 0.25)] = options.get("ignore_index", -100)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    weight = (torch.rand(V, generator=generator) + 0.1).to(accumulator) if case.get("weight") else None
    return logits.to(dtype), labels, weight, options


def assert_within(name, got, want, bound):
    got = got.double().cpu()
    wrong = ~((got - want).abs() <= bound) & ~(got.isnan() & want.isnan()) & (got != want)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        pytest.fail(f"{name}{at}: {got[at]:.9g}, expected {want[at]:.9g} within {bound[at]:.3g}; {wrong.sum()} such")


def check_case(case, dtype):
    """Values within the bounds of float64, counts equal to the CPU's."""
    logits, labels, weight, options = inputs(case, dtype)
    grad = -0.5
    want = row_oracle.rows(logits, labels, weight, grad, **options)
    u = row_oracle.U[dtype]
    moved = [t if t is None else t.cuda() for t in (logits, labels, weight)]
    loss_sum, num_items, total_weight, lse, num_correct, entropy_sum, nll = OPS.cross_entropy(*moved, **options)
    on_cpu = OPS.cross_entropy(logits, labels, weight, **options)
    assert num_items.item() == on_cpu[1].item() == want.items.sum()
    assert num_correct.item() == on_cpu[4].item()
    assert_within("nll", nll, want.nll, want.nll_bound + u * want.nll)
    assert_within("loss_sum", loss_sum, want.loss.sum(), want.loss_bound.sum() + 2 * u * want.loss.sum())
    assert_within("total_weight", total_weight, want.weight.sum(), 2 * u * want.weight.sum())
    if options.get("metrics"):
        bound = (32 * u * (1 + want.lse.abs() + want.entropy) * want.items).sum()
        assert_within("entropy_sum", entropy_sum, want.entropy.sum(), bound)
    scale = torch.tensor(grad, dtype=loss_sum.dtype, device="cuda")
    x, y, w = moved
    gradient = OPS.cross_entropy_backward(scale, x, y, lse, nll, w, **options)
    assert_within("backward", gradient, want.grad, want.grad_bound)
    over = x.clone()
    OPS.cross_entropy_backward_(scale, over, y, lse, nll, w, **options)
    assert torch.equal(over, gradient)
    *sums, both = OPS.cross_entropy_with_grad(scale, x, y, w, **options)
    assert_within("with_grad", both, want.grad, want.grad_bound)
    over = x.clone()
    in_place = OPS.cross_entropy_with_grad_(scale, over, y, w, **options)
    assert torch.equal(over, both)
    for a, b in zip(sums, in_place, strict=True):
        assert torch.equal(a, b)
    assert_within("loss_sum", sums[0], want.loss.sum(), want.loss_bound.sum() + 2 * u * want.loss.sum())
    assert torch.equal(sums[1], num_items)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cuda_matches_float64_and_counts_of_the_cpu(name, dtype):
    check_case(CASES[name], dtype)


PLANS = ["packed", "warp", "block", "held", "staged:1", "staged:2", "staged:4", "staged:8"]
PLAN_CASES = {
    "tiny": {"shape": (2, 300, 61), "metrics": True},
    "small": {"shape": (3, 500, 1000), "confident": True, "metrics": True},
    "odd": {"shape": (3, 700, 5003), "metrics": True, "ignored": 0.6},
    "all_options": {"shape": (2, 350, 4099), "shift": 1, "weight": True, **ALL},
}


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("name", PLAN_CASES)
@pytest.mark.parametrize("plan", PLANS)
def test_cuda_plan_matches_float64(monkeypatch, plan, name, dtype):
    case = PLAN_CASES[name]
    monkeypatch.setenv("ACCUMLOSS_CUDA_PLAN", plan)
    try:
        accumloss.plan(case["shape"][2], dtype)
    except RuntimeError as error:
        pytest.skip(str(error))
    check_case(case, dtype)


@pytest.mark.parametrize("V", [130, 50257], ids=["warp", "staged"])
def test_cuda_repeats_its_bits(V):
    logits = torch.randn(4, 500, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, V, (4, 500), device="cuda")
    first = OPS.cross_entropy(logits, labels, metrics=True)
    for _ in range(5):
        again = OPS.cross_entropy(logits, labels, metrics=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("V", [40, 130, 1500, 5003, 50257], ids=["packed", "warp", "held", "staged", "cluster"])
def test_cuda_graph_replays(V):
    logits = torch.randn(2, 64, V, device="cuda")
    labels = torch.randint(0, V, (2, 64), device="cuda")
    one = torch.ones((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # without a warm-up: also the first call may be captured
        captured = OPS.cross_entropy_with_grad(one, logits, labels)
    for _ in range(2):
        logits.normal_()
        graph.replay()
        eager = OPS.cross_entropy_with_grad(one, logits, labels)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_cuda_runs_on_the_current_stream():
    logits = torch.zeros(8, 512, 8192, device="cuda")
    labels = torch.zeros(8, 512, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits[..., 0] = 1000.0
        loss_sum = OPS.cross_entropy(logits, labels)[0]
    stream.synchronize()
    assert loss_sum.item() == 0  # on another stream it would have seen the zeros


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_cuda_runs_on_the_device_of_the_logits():
    logits = torch.randn(2, 3, 1500, device="cuda:1")
    labels = torch.randint(0, 1500, (2, 3), device="cuda:1")
    assert torch.cuda.current_device() == 0
    got = OPS.cross_entropy(logits, labels)
    assert all(t.device == logits.device for t in got)
    assert torch.cuda.current_device() == 0
    want = row_oracle.rows(logits.cpu(), labels.cpu())
    assert_within("nll", got[6], want.nll, want.nll_bound)


@pytest.mark.parametrize("V", [40, 500, 1500, 5000, 50257], ids=["packed", "warp", "held", "staged", "cluster"])
def test_cuda_bad_label_is_reported_by_check(V):
    accumloss.check()
    logits = torch.randn(1, 6, V, device="cuda")
    labels = torch.tensor([[1, 2, 3, V, -100, V - 1]], device="cuda")
    loss_sum, _num_items, _, lse, _, _, nll = OPS.cross_entropy(logits, labels)
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match=rf"{V}"):
        accumloss.check()
    accumloss.check()
    assert loss_sum.isnan()
    assert nll[0].isnan().tolist() == [False, False, False, True, False, False]
    gradient = OPS.cross_entropy_backward(torch.ones((), device="cuda"), logits, labels, lse, nll)
    assert (gradient[0, 3:5] == 0).all()
    assert (gradient[0, [0, 1, 2, 5]] != 0).all()
    OPS.cross_entropy(logits, labels)
    torch.cuda.synchronize()
    with pytest.raises(IndexError):
        OPS.cross_entropy(logits, labels.clamp(max=V - 1))


def test_cuda_scale():
    values = torch.randn(3, 5, 4099, device="cuda", dtype=torch.bfloat16)
    for factor in (1.0, 0.3):
        scaled = values.clone()
        OPS.scale_(scaled, torch.tensor(factor, device="cuda"))
        assert torch.equal(scaled, (values.float() * torch.tensor(factor, device="cuda")).bfloat16())


def test_cuda_offsets_beyond_int32():
    rows, V = 20000, 262144  # 5.2e9 elements
    if torch.cuda.mem_get_info()[0] < rows * V * 2 * 1.1:
        pytest.skip(f"{rows * V * 2 / 2**30:.0f} GiB of device memory are not free")
    logits = torch.zeros(1, rows, V, device="cuda", dtype=torch.bfloat16)
    labels = torch.zeros(1, rows, dtype=torch.int64, device="cuda")
    logits[0, -1, 0] = 20.0
    nll = OPS.cross_entropy(logits, labels)[6]
    others = V - 1
    assert nll[0, 0].item() == pytest.approx(math.log(V), rel=2e-6)
    assert nll[0, -1].item() == pytest.approx(math.log1p(others * math.exp(-20.0)), rel=2e-6)
