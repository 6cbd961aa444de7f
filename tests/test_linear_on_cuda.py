"""The head by its plans for CUDA, run on the CPU: the bodies there of what CUDA alone has mean the same."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import linear_gradient_bound

import accumloss
from accumloss import linear_cross_entropy, linear_plan, ops, reference
from accumloss.linear import compute
from accumloss.linear import device as devices
from accumloss.linear import plan as plans
from accumloss.linear.plan import chunks
from accumloss.options import LossOptions

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SHAPES = (
    (8192, 4096, 128256), (4096, 2048, 50257), (16384, 4096, 151936), (4096, 4096, 128256), (32768, 2560, 262144),
    (2048, 768, 50257),
)  # fmt: skip
GIB = 2**30


@pytest.mark.parametrize("shape, wanted", list(zip(SHAPES, (
    ((1024, 8, BF16, 262668288, 0, 0, False), (512, 16, FP32, 262668288), (256, 32, FP32, 2167013376)),
    ((2432, 2, BF16, 261227264, 1664, 2048, True), (1024, 4, FP32, 205852672), (256, 16, FP32, 437436928)),
    ((864, 19, BF16, 262545408, 0, 0, False), (432, 38, FP32, 262545408), (256, 64, FP32, 2567110656)),
    ((960, 5, BF16, 263028736, 3136, 2048, True), (512, 8, FP32, 262668288), (256, 16, FP32, 2167013376)),
    ((504, 66, BF16, 264241152, 0, 0, False), (252, 131, FP32, 264241152), (256, 128, FP32, 2818572288)),
    ((2048, 1, BF16, 222629888, 0, 4096, True), (1024, 2, FP32, 205852672), (1024, 2, FP32, 257315840)),
), strict=True)), ids=str)  # fmt: skip
def test_plans_on_the_cpu_are_what_they_were(shape, wanted):
    """Before there were any for CUDA: bf16, fp32 and fp16."""
    for dtype, fields in zip((BF16, FP32, FP16), wanted, strict=True):
        plan = linear_plan(*shape, dtype)
        assert plan[: len(fields)] == fields
        assert plan == linear_plan(*shape, dtype, device=torch.device("cpu"), free_bytes=1)
        assert plan.row_stride == shape[2]
        assert plan.product == (BF16 if dtype == BF16 else FP32)


@pytest.mark.parametrize("shape, wanted", list(zip(SHAPES, (
    (8192, 1, BF16, BF16), (4096, 1, BF16, BF16), (4096, 4, FP32, FP32), (4096, 1, BF16, BF16), (4096, 8, FP32, FP32),
    (2048, 1, BF16, BF16),
), strict=True)), ids=str)  # fmt: skip
def test_plans_on_cuda(shape, wanted):
    """One chunk where chunks with an accumulator would take as much; else chunks of 4096 rows, added up in fp32."""
    _, H, V = shape
    for device in ("H200", "A100", "sm_90", "cuda", "cuda:1", torch.device("cuda", 1)):
        plan = linear_plan(*shape, device=device)
        assert (plan.chunk_rows, plan.num_chunks, plan.accumulator, plan.product) == wanted
        assert plan.row_stride % 64 == 0 and 0 <= plan.row_stride - V < 64
        assert plan.scratch_bytes <= max(GIB, 4096 * 2 * plan.row_stride) + 4 * H * V
        assert plan.parked_rows == plan.block_classes == 0 and not plan.has_buffer


CALLS = [
    (rows, *size, dtype, budget, free, weight_grad, gathered, device)
    for rows in (0, 1, 100, 1100, 8192, 65536)
    for size in ((768, 50257), (4096, 128256), (64, 300))
    for dtype in (BF16, FP16, FP32, FP64)
    for budget, free in ((None, None), (None, 80 * GIB), (None, 3 * GIB), (None, 0), (2**22, None), (GIB, None))
    for weight_grad, gathered in ((True, False), (True, True), (False, True))
    for device in ("H200", "T4")
]


def test_plans_on_cuda_keep_to_their_rules():
    kinds = set()
    for rows, H, V, dtype, budget, free, weight_grad, gathered, device in CALLS:
        plan = linear_plan(
            rows, H, V, dtype, weight_grad=weight_grad, gathered=gathered, max_scratch_bytes=budget, device=device,
            free_bytes=free,
        )  # fmt: skip
        parts = list(chunks(rows, plan))
        assert len(parts) == plan.num_chunks and sum(part.stop - part.start for part in parts) == rows
        row_bytes = plan.row_stride * dtype.itemsize + 2 * H * dtype.itemsize * gathered
        accumulator = 4 * H * V * (plan.accumulator not in (None, dtype))
        assert plan.scratch_bytes == plan.chunk_rows * row_bytes + accumulator
        assert (plan.accumulator is None) == (plan.product is None) == (not weight_grad)
        is_narrow = dtype in (BF16, FP16)
        if plan.accumulator == BF16:  # each chunk is rounded once
            assert plan.num_chunks <= (3 if device == "T4" or budget or free is not None else 1)
        elif is_narrow and weight_grad:
            assert plan.accumulator == FP32
            assert plan.product == (FP32 if device == "H200" or dtype == FP16 else BF16)
        if budget is None and free is None and plan.num_chunks > 1:
            least = min(4096, GIB // (V * dtype.itemsize))
            assert plan.chunk_rows >= least // 2 and plan.num_chunks <= -(-rows // least)
        if free is not None:
            budget = max(free // 2, 2**28)
        elif budget is None:
            budget = max(GIB, 4096 * row_bytes) + 4 * H * V * (is_narrow and weight_grad)
        if plan.scratch_bytes > budget and plan.chunk_rows > 1:  # by as little as keeps to three roundings, or to fp32
            assert is_narrow and weight_grad
            thirds = -(-rows // 3) * row_bytes
            assert dtype == FP16 or plan.scratch_bytes <= min(thirds, 4 * H * V + 256 * row_bytes)
            assert accumulator == 0 or plan.chunk_rows <= 256
            kinds.add("beyond")
        kinds.add((plan.accumulator, plan.product, plan.num_chunks > 1))
    assert {"beyond", (BF16, BF16, True), (FP32, BF16, True), (FP32, FP32, True), (None, None, True)} <= kinds


def test_plans_on_cuda_without_a_product_into_fp32(monkeypatch):
    """Larger chunks, so that there are no more than three roundings; ROCm has none either."""
    plan = linear_plan(16384, 4096, 151936, device="T4")
    assert (plan.num_chunks, plan.accumulator, plan.product) == (2, BF16, BF16)
    plan = linear_plan(32768, 2560, 262144, device="sm_75")
    assert (plan.num_chunks, plan.accumulator, plan.product) == (8, FP32, BF16)
    assert linear_plan(16384, 4096, 151936, FP16, device="T4").product == FP32
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert linear_plan(16384, 4096, 151936, device="cuda").product == BF16


def test_plans_for_no_device_are_refused():
    for device in ("gpu", "H2000", "sm_", "meta"):
        with pytest.raises(ValueError, match=r"linear_plan: expected a device of torch .* or a name with one of A100"):
            linear_plan(1, 1, 1, device=device)
    with pytest.raises(ValueError, match="linear_plan: expected rows and free_bytes >= 0"):
        linear_plan(1, 1, 1, device="cuda", free_bytes=-1)


# Run ------------------------------------------------------------------------------------------------------------------

N, H, V = 700, 24, 211


class Calls:
    """What a head calls of the device, in its order."""

    def __init__(self, monkeypatch):
        self.order = []
        for owner, name in ((devices, "add_product_"), (ops, "add_cross_entropy_"), (compute.torch, "mm")):
            monkeypatch.setattr(owner, name, self.recording(name, getattr(owner, name)))

    def recording(self, name, function):
        def call(*args, **kwargs):
            self.order.append((name, [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
            inner, self.order = self.order, []  # what a body on the CPU calls is its own
            try:
                return function(*args, **kwargs)
            finally:
                self.order = inner

        return call


@pytest.fixture
def on_cuda(monkeypatch):
    """Plans for an H200, of chunks of 128 rows, where the host would have to wait for a value."""
    monkeypatch.setattr(
        compute, "linear_plan", lambda *args, device, **kwargs: linear_plan(*args, device="H200", **kwargs)
    )
    scratch = ops.scratch

    def padded(like, rows, columns):
        """oneDNN's bf16 product on AMX reads beyond the end of a row, times zero: NaN where that memory holds one."""
        found = scratch(like, rows, columns)
        found[:, V:] = 0
        return found

    monkeypatch.setattr(ops, "scratch", padded)
    monkeypatch.setattr(devices, "waits", lambda device: True)
    monkeypatch.setattr(plans, "CUDA_ROWS", 128)
    monkeypatch.setattr(plans, "CUDA_SCRATCH_BYTES", 1)
    monkeypatch.setattr(plans, "_FEWEST_ROWS", 1)


def data(dtype, rows=N, ignored=0.3):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, H, generator=generator, dtype=FP64)
    weight = torch.randn(V, H, generator=generator, dtype=FP64) / H**0.5 * 2
    labels = torch.randint(0, V, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_head_on_cuda_matches_float64(on_cuda, dtype, counted):
    """As closely as one chunk does: nothing is rounded before the last chunk."""
    hidden, weight, labels = data(dtype)
    count = int((labels != -100).sum())
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    sums = reference.cross_entropy(F.linear(*exact), labels, None, LossOptions(), shift=0)
    wanted = torch.autograd.grad(sums[0] * 0.01, exact)
    stock = torch.autograd.grad(
        accumloss.cross_entropy(F.linear(hidden, weight), labels).loss_sum * 0.01, (hidden, weight)
    )
    found = linear_cross_entropy(hidden, weight, labels, num_valid=count if counted else None)
    assert int(found.num_items) == count
    got = torch.autograd.grad(found.loss_sum * 0.01, (hidden, weight))
    for a, b, want in zip(got, stock, wanted, strict=True):
        assert relative(a, want) <= linear_gradient_bound(relative(b, want), dtype, 0)
    assert got[0][labels == -100].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_head_on_cuda_calls_five_kernels_a_chunk_and_no_more(on_cuda, monkeypatch, dtype):
    """Logits, loss (two launches: rows, and their sums), weight's gradient, hidden states' gradient; in this order."""
    hidden, weight, labels = data(dtype, rows=1000, ignored=0)
    calls = Calls(monkeypatch)
    linear_cross_entropy(hidden, weight, labels)
    plan = linear_plan(1000, H, V, dtype, device="H200")
    assert plan.num_chunks == 8
    names = [name for name, _ in calls.order]
    adds = "add_product_" if dtype == BF16 else "mm"
    assert names[:4] == ["mm", "add_cross_entropy_", adds, "mm"]
    if dtype == BF16:
        assert names == names[:4] * 8
    else:  # addmm_ into the gradient itself, but for the first
        assert names[4:] == ["mm", "add_cross_entropy_", "mm"] * 7
    rows = [shapes[-1][0] for name, shapes in calls.order if name == "add_cross_entropy_"]
    assert sum(rows) == 1000 and max(rows) == plan.chunk_rows == 128


def test_head_on_cuda_pads_the_rows_of_logits(on_cuda, monkeypatch):
    hidden, weight, labels = data(BF16)
    seen = []
    add = ops.add_cross_entropy_
    monkeypatch.setattr(
        ops, "add_cross_entropy_", lambda t, f, x, *a, **k: (seen.append(x.stride()), add(t, f, x, *a, **k))
    )
    linear_cross_entropy(hidden, weight, labels)
    assert set(seen) == {(256, 1)}


@pytest.mark.parametrize("num_valid", [0, 1, 490, 500, 699, 700, 5000])
def test_head_on_cuda_computes_no_logits_of_ignored_rows(on_cuda, monkeypatch, num_valid):
    hidden, weight, labels = data(BF16, ignored=0)
    labels[torch.randperm(N, generator=torch.Generator().manual_seed(1))[: max(N - num_valid, 0)]] = -100
    wanted = linear_cross_entropy(hidden, weight, labels)
    calls = Calls(monkeypatch)
    found = linear_cross_entropy(hidden, weight, labels, num_valid=num_valid)
    rows = sum(shapes[-1][0] for name, shapes in calls.order if name == "add_cross_entropy_")
    assert rows == min(-(-num_valid // 64) * 64, N)
    assert int(found.num_items) == min(num_valid, N)
    assert found.loss_sum.item() == pytest.approx(wanted.loss_sum.item(), rel=1e-6, abs=1e-6)
    if 0 < num_valid < N:
        assert linear_cross_entropy(hidden, weight, labels, num_valid=num_valid - 1).loss_sum.isnan()


def test_head_on_cuda_that_is_frozen_has_no_product_for_its_weight(on_cuda, monkeypatch):
    hidden, weight, labels = data(BF16)
    weight.requires_grad_(False)
    calls = Calls(monkeypatch)
    linear_cross_entropy(hidden, weight, labels).loss_sum.backward()
    assert {name for name, _ in calls.order} == {"mm", "add_cross_entropy_"}
    assert [name for name, _ in calls.order][:3] == ["mm", "add_cross_entropy_", "mm"]
    with torch.no_grad():
        calls.order.clear()
        linear_cross_entropy(hidden, weight, labels)
    assert [name for name, _ in calls.order][:3] == ["mm", "add_cross_entropy_", "mm"]
    assert len(calls.order) == 2 * linear_plan(N, H, V, weight_grad=False, device="H200").num_chunks


def test_head_asks_for_the_free_memory_where_the_plan_may_differ(monkeypatch):
    """Not where a budget is given, nor of processes that have to go through the same chunks."""
    asked, planned = [], []
    monkeypatch.setattr(devices, "free_bytes", lambda device: asked.append(device) or 3 * GIB)
    plan = compute.linear_plan
    monkeypatch.setattr(compute, "linear_plan", lambda *a, **k: (planned.append(k["free_bytes"]), plan(*a, **k))[1])
    hidden, weight, labels = data(BF16, rows=9)
    linear_cross_entropy(hidden, weight, labels)
    linear_cross_entropy(hidden, weight, labels, max_scratch_bytes=10**6)
    assert planned == [3 * GIB, None] and asked == [torch.device("cpu")]


def test_free_bytes_are_nobodys_question_on_the_cpu():
    assert devices.free_bytes(torch.device("cpu")) is None


def test_product_into_fp32_rounds_nothing():
    generator = torch.Generator().manual_seed(0)
    for dtype in (BF16, FP16):
        left = torch.randn(300, 256, generator=generator).to(dtype)[:, :211]  # rows that are padded
        right = torch.randn(300, 24, generator=generator).to(dtype)
        accumulator = torch.full((211, 24), float("nan"))
        with torch.autocast("cpu", dtype):
            devices.add_product_(accumulator, left, right, True)
            devices.add_product_(accumulator, left, right, False)
        wanted = 2 * (left.double().t() @ right.double())
        assert relative(accumulator, wanted) < 300**0.5 * torch.finfo(FP32).eps
        assert (
            relative(torch.mm(left.t(), right), wanted / 2) > 8 * 300**0.5 * torch.finfo(FP32).eps
        )  # what rounding costs


@pytest.mark.parametrize("has_product", [True, False])
def test_product_into_fp32_of_a_gpu(monkeypatch, has_product):
    """By torch's product into fp32 where there is one; on ROCm, which has none, as on the CPU."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked = []

    def into_fp32(name, product):
        def call(*args, out_dtype=None, out):
            asked.append((name, out_dtype))
            *added, a, b = [arg.float() for arg in args]
            return product(*added, a, b, out=out)

        return call

    monkeypatch.setattr(devices, "has_product_into_fp32", lambda device, dtype: has_product and dtype == BF16)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, into_fp32(name, getattr(torch, name)))
    left, right = torch.randn(30, 17).bfloat16(), torch.randn(30, 5).bfloat16()
    accumulator = torch.empty(17, 5).as_subclass(OnGpu)
    for is_first in (True, False):
        devices.add_product_(accumulator, left, right, is_first)
    assert asked == ([("mm", FP32), ("addmm", FP32)] if has_product else [("mm", None)] * 2)
    torch.testing.assert_close(accumulator.as_subclass(torch.Tensor), 2 * left.float().t() @ right.float())


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda of a process whose GPU has so much memory; or one that captures a graph."""
    state = {"free": 5 * GIB, "capturing": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state["free"], 80 * GIB))
    stats = {"reserved_bytes": {"all": {"current": 3 * GIB}}, "allocated_bytes": {"all": {"current": GIB}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    return state


def test_free_bytes_of_a_gpu_hold_what_torch_keeps(fake_cuda):
    assert devices.free_bytes(torch.device("cuda")) == 7 * GIB
    fake_cuda["capturing"] = True
    assert devices.free_bytes(torch.device("cuda")) is None


def test_product_into_fp32_needs_tensor_cores_of_the_dtype(monkeypatch):
    assert devices.has_product_into_fp32("cuda", BF16)  # of a GPU of which nothing is known
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, of_bf16 in (((7, 5), False), ((8, 6), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert devices.has_product_into_fp32(torch.device("cuda", 0), BF16) == of_bf16
        assert devices.has_product_into_fp32("cuda:0", FP16)
    assert not devices.has_product_into_fp32("cpu", BF16)
