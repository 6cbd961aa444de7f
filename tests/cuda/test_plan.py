"""accumloss.plan: the table of csrc/cuda/plan.h, without a GPU."""

import pytest
import torch

import accumloss

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SHARED = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
}  # KiB a block may have


@pytest.mark.parametrize(
    "V, dtype, arch, kernel, cluster",
    [
        (64, BF16, "sm_75", "packed", 1),
        (512, BF16, "sm_75", "packed", 1),
        (513, FP32, "sm_75", "warp", 1),
        (1024, BF16, "sm_80", "warp", 1),
        (1024, FP32, "sm_86", "warp", 1),
        (512, BF16, "sm_89", "packed", 1),
        (1024, BF16, "sm_120", "warp", 1),
        (32000, BF16, "sm_75", "held", 1),
        (32768, BF16, "sm_75", "partly_held", 1),
        (57344, BF16, "sm_75", "partly_held", 1),
        (57345, BF16, "sm_75", "block", 1),
        (20000, BF16, "sm_89", "held", 1),
        (49000, BF16, "sm_89", "partly_held", 1),
        (50257, BF16, "sm_89", "block", 1),
        (49000, BF16, "sm_120", "partly_held", 1),
        (151936, FP32, "sm_89", "partly_held", 1),
        (1, BF16, "sm_80", "packed", 1),
        (64, FP64, "sm_90", "packed", 1),
        (512, BF16, "sm_90", "packed", 1),
        (513, BF16, "sm_90", "warp", 1),
        (1024, FP32, "sm_100", "warp", 1),
        (1025, BF16, "sm_90", "staged", 1),
        (1025, BF16, "sm_80", "held", 1),
        (4096, BF16, "sm_90", "staged", 1),
        (32000, BF16, "sm_90", "staged", 1),
        (32000, BF16, "sm_80", "held", 1),
        (32000, BF16, "sm_86", "partly_held", 1),
        (40000, BF16, "sm_86", "held", 1),
        (50257, BF16, "sm_86", "partly_held", 1),
        (50257, BF16, "sm_90", "staged", 2),
        (50257, FP32, "sm_100", "staged", 4),
        (128256, BF16, "sm_90", "staged", 4),
        (40000, BF16, "sm_80", "held", 1),
        (50257, BF16, "sm_80", "partly_held", 1),
        (90000, BF16, "sm_80", "partly_held", 1),
        (90000, BF16, "sm_89", "block", 1),
        (128256, BF16, "sm_80", "partly_held", 1),
        (262144, BF16, "sm_80", "partly_held", 1),
        (128256, FP32, "sm_80", "partly_held", 1),
        (151936, FP32, "sm_80", "block", 1),
        (128256, BF16, "sm_120", "block", 1),
        (151936, BF16, "sm_90", "staged", 4),
        (262144, BF16, "sm_90", "staged", 8),
        (262144, FP32, "sm_90", "block", 1),
        (32000, FP64, "sm_90", "block", 1),
    ],
)
def test_plan_of_a_shape(V, dtype, arch, kernel, cluster):
    plan = accumloss.plan(V, dtype, arch=arch)
    assert (plan.kernel, plan.cluster) == (kernel, cluster)
    assert plan.stages == 0 or plan.groups < plan.stages <= 2 * plan.groups
    cache = {"sm_80": 379, "sm_89": 576, "sm_120": 576}.get(arch, 64) * 1024  # of the L2, a multiprocessor's share
    again = kernel == "block" and V * dtype.itemsize > cache
    assert plan.bytes_per_element == dtype.itemsize * (3 if again else 2)


def test_plan_fits_every_architecture():
    for arch, kib in SHARED.items():
        for V in [*range(1, 5000, 97), *range(5000, 700000, 4999)]:
            for dtype in (BF16, FP32, FP64):
                for call in ("forward", "backward", "with_grad"):
                    for aligned in (True, False):
                        plan = accumloss.plan(V, dtype, arch=arch, call=call, aligned=aligned)
                        assert plan.shared_bytes <= kib * 1024
                        most = {"staged": 640}.get(plan.kernel, 512)
                        assert plan.threads % 32 == 0 and plan.threads <= most
                        if plan.kernel in ("packed", "warp"):  # the row is in the registers of its lanes
                            assert 32 * plan.threads // plan.groups >= V
                        if plan.kernel == "staged":  # a warp besides the groups'; a parity tells two rows apart
                            assert (plan.threads - 32) % (32 * plan.groups) == 0
                            assert plan.groups < plan.stages <= 2 * plan.groups
                        assert aligned or call == "backward" or plan.kernel not in ("held", "partly_held", "staged")
                        if plan.kernel == "partly_held":  # whole passes of the block
                            assert call == "with_grad" and dtype != FP64
                            assert (plan.shared_bytes - 1024) % (64 * plan.threads) == 0 < plan.shared_bytes - 1024


@pytest.mark.parametrize("gpu, cache", [("A100", 108 * 379), ("RTX 4090", 128 * 576), ("RTX 5090", 170 * 576)])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_plan_has_no_more_long_rows_at_once_than_are_in_the_cache(gpu, cache, dtype):
    """KiB: two rows for each multiprocessor, or one, so that what of it is visited again is in the L2."""
    on_chip = {"A100": 163, "RTX 4090": 99, "RTX 5090": 99}[gpu]
    for V in (20000, 40000, 82000, 97000, 100000, 128256, 151936, 262144, 500000):
        row = V * dtype.itemsize / 1024
        plan = accumloss.plan(V, dtype, arch=gpu)
        assert plan.kernel in ("held", "partly_held", "block")
        multiprocessors = {"A100": 108, "RTX 4090": 128, "RTX 5090": 170}[gpu]
        if plan.kernel == "block":
            alone = 2 * multiprocessors * row > cache >= multiprocessors * row
            assert plan.resident == multiprocessors * (1 if alone else 2)
            assert (plan.bytes_per_element == 2 * dtype.itemsize) == (plan.resident * row <= cache)
            assert dtype == FP64 or not alone
        if plan.kernel == "partly_held":
            rest = plan.resident * (row - (plan.shared_bytes - 1024) / 1024)
            of_two = row < on_chip  # which would be held alone
            assert plan.resident == multiprocessors * (2 if of_two else 1)
            assert 0 < rest <= (cache / 2 if of_two else cache)
            assert plan.bytes_per_element == 2 * dtype.itemsize


# Of a cluster of 4 an H200 holds 32, not 132 / 4: a GPC has 16 or 18 multiprocessors.
@pytest.mark.parametrize(
    "arch, V, cluster, resident",
    [
        ("H100", 6000, 1, 132),
        ("H100", 32000, 1, 132),
        ("H200", 50257, 2, 66),
        ("H200", 128256, 4, 32),
        ("H200", 262144, 8, 16),
        ("B200", 32000, 1, 148),
        ("B200", 128256, 4, 34),
        ("B200", 262144, 8, 16),
        ("T4", 32000, 1, 40),
        ("A100", 32000, 1, 216),
        ("RTX 4090", 20000, 1, 256),
        ("RTX 4090", 32000, 1, 256),
        ("A100", 262144, 1, 108),
        ("RTX 5090", 4096, 1, 170 * 4),
        ("RTX 5090", 128256, 1, 170 * 2),
    ],
)
def test_plan_shows_how_many_clusters_a_gpu_runs_at_once(arch, V, cluster, resident):
    plan = accumloss.plan(V, arch=arch)
    assert (plan.cluster, plan.resident) == (cluster, resident)


def test_plan_of_a_gpu_is_that_of_its_architecture():
    archs = {"T4": 75, "A100": 80, "RTX 4090": 89, "H100": 90, "H200": 90, "B200": 100, "RTX 5090": 120}
    for gpu, arch in archs.items():
        for V in (50, 1000, 4096, 32000, 128256, 262144):
            for call in ("forward", "backward", "with_grad"):
                of_arch = accumloss.plan(V, arch=f"sm_{arch}", call=call)
                assert of_arch.resident is None
                of_gpu = accumloss.plan(V, arch=gpu, call=call)
                assert of_gpu._replace(resident=None) == of_arch
                assert of_gpu.resident > 0


def test_plan_of_logits():
    logits = torch.zeros(2, 3, 32000, dtype=BF16)
    assert accumloss.plan(logits, arch="sm_90") == accumloss.plan(32000, arch="sm_90")
    assert accumloss.plan(logits.view(-1)[1:32001], arch="sm_90").kernel == "block"


def test_plan_can_be_forced(monkeypatch):
    monkeypatch.setenv("ACCUMLOSS_CUDA_PLAN", "staged:8")
    assert accumloss.plan(1000, arch="sm_90").cluster == 8
    assert accumloss.plan(1000, arch="sm_90", call="backward").kernel == "block"
    with pytest.raises(RuntimeError, match="V = 1000"):
        accumloss.plan(1000, arch="sm_80")


HOPPER = ("sm_90", "SM90", "90", "90a", "sm_90a", "compute_90", "9.0", 90, 9.0, (9, 0))
NOT_KNOWN = ("hopper", "", "sm_", "GH200", "L40", "H1000", "cuda", 35, "sm_52", "7.0", True, 9.05, (9, 0, 0), [90])


def test_plans_take_what_a_user_writes():
    """Capabilities as torch, nvcc and CMake write them; names in any case, and as torch has them."""
    for arch in HOPPER:
        assert accumloss.plan(128256, arch=arch) == accumloss.plan(128256, arch="sm_90"), arch
        assert accumloss.linear_plan(9999, 64, 32000, device=arch) == accumloss.linear_plan(
            9999, 64, 32000, device="sm_90"
        )
    for name in ("H100", "h100", "NVIDIA H100 80GB HBM3", "nvidia-h100"):
        assert (
            accumloss.plan(128256, arch=name) == accumloss.plan(128256, arch="H100") != accumloss.plan(128256, arch=90)
        )
        assert accumloss.linear_plan(9999, 64, 32000, device=name) == accumloss.linear_plan(
            9999, 64, 32000, device="sm_90"
        )
    for name in ("RTX4090", "rtx 4090", "RTX-4090", "NVIDIA GeForce RTX 4090"):
        assert accumloss.plan(32000, arch=name) == accumloss.plan(32000, arch="RTX 4090"), name
    assert accumloss.plan(32000, arch="12.0") == accumloss.plan(32000, arch="sm_120")


def test_linear_plan_refuses_what_nobody_knows_with_the_list_of_what_works():
    for device in set(map(str, NOT_KNOWN)) - {"cuda", "True"} | {"meta"}:
        with pytest.raises(
            ValueError, match=r'linear_plan: expected a device of torch .*"sm_90", "90", "9.0", 90.*one of A100'
        ):
            accumloss.linear_plan(10, 8, 100, device=device)
    for device in (None, True, [90], 70, -1):
        with pytest.raises(ValueError, match="linear_plan: expected a device of torch"):
            accumloss.linear_plan(10, 8, 100, device=device)
    assert accumloss.linear_plan(10, 8, 100, device=0) == accumloss.linear_plan(10, 8, 100, device="cuda:0")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"logits": 0, "arch": "sm_90"}, "V >= 1"),
        ({"logits": 10, "dtype": torch.int64, "arch": "sm_90"}, "floating dtype"),
        *(
            ({"logits": 10, "arch": arch}, r'from 75 on .*"sm_90", "90", "9.0", 90.*one of A100, B200, H100')
            for arch in NOT_KNOWN
        ),
        ({"logits": 10, "arch": "sm_90", "call": "both"}, "one of forward"),
    ],
)
def test_plan_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        accumloss.plan(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_plan_without_a_gpu_needs_an_architecture():
    with pytest.raises(ValueError, match="expected arch"):
        accumloss.plan(10)
