"""accumloss.plan: the table of csrc/cuda/plan.h, without a GPU."""

import pytest
import torch

import accumloss

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SHARED = {"sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}  # KiB a block may have


@pytest.mark.parametrize(
    "V, dtype, arch, kernel, cluster",
    [
        (1, BF16, "sm_80", "packed", 1),
        (64, FP64, "sm_90", "packed", 1),
        (65, BF16, "sm_90", "warp", 1),
        (1024, FP32, "sm_100", "warp", 1),
        (1025, BF16, "sm_80", "held", 1),
        (4096, BF16, "sm_90", "held", 1),
        (4097, BF16, "sm_90", "staged", 1),
        (32000, BF16, "sm_90", "staged", 1),
        (32000, BF16, "sm_80", "held", 1),
        (32000, BF16, "sm_86", "held", 1),
        (50257, BF16, "sm_90", "staged", 2),
        (50257, FP32, "sm_100", "staged", 4),
        (128256, BF16, "sm_90", "staged", 4),
        (128256, BF16, "sm_80", "block", 1),
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
    assert plan.stages == 0 or plan.stages >= 3
    assert plan.bytes_per_element == dtype.itemsize * (3 if kernel == "block" else 2)


def test_plan_fits_every_architecture():
    for arch, kib in SHARED.items():
        for V in [*range(1, 5000, 97), *range(5000, 700000, 4999)]:
            for dtype in (BF16, FP32, FP64):
                for call in ("forward", "backward", "with_grad"):
                    for aligned in (True, False):
                        plan = accumloss.plan(V, dtype, arch=arch, call=call, aligned=aligned)
                        assert plan.shared_bytes <= kib * 1024
                        assert plan.threads % 32 == 0 and plan.threads <= 512
                        assert aligned or call == "backward" or plan.kernel not in ("held", "staged")


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"logits": 0, "arch": "sm_90"}, "V >= 1"),
        ({"logits": 10, "dtype": torch.int64, "arch": "sm_90"}, "floating dtype"),
        ({"logits": 10, "arch": "hopper"}, 'such as "sm_90"'),
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
