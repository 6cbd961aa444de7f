"""The model of head and loss together, and that the launches which it counts are those of a call."""

from __future__ import annotations

import collections

import cost_model
import head_model
import pytest
import recorded_gpu
import torch
from head_model import LIKELY, WORST, of_call, over_none, sum_bytes, times
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from accumloss import linear_plan
from accumloss.linear import device as devices
from accumloss.linear import plan as plans
from accumloss.losses import Known, linear_causal_lm
from accumloss.options import LossOptions

GOALS = ((8192, 4096, 128256), (4096, 2048, 50257), (16384, 4096, 151936))
SHARE = 0.95  # of the copy: what the loss is to reach by itself


@pytest.mark.parametrize("shape", GOALS, ids=str)
def test_head_takes_hardly_more_than_its_products(shape):
    assert of_call(*shape, SHARE).over_products <= 1.08
    assert of_call(*shape, SHARE, WORST).over_products <= 1.1
    assert max(over_none(*shape, SHARE, assumed) for assumed in (LIKELY, WORST)) <= 0.55


def test_plans_for_the_cpu_took_more():
    """What the head ran by on CUDA before it had plans of its own: more rounds over the weight's gradient, and launches."""
    for rows, H, V in (GOALS[0], GOALS[2]):  # the other parks rows, which the model knows nothing of
        before = linear_plan(rows, H, V)
        assert times(before, rows, rows, H, V, SHARE).over_products > of_call(rows, H, V, SHARE).over_products + 0.02


def test_bytes_of_the_sums():
    """One pass of so many gradients of 1000 elements, by hand: 2 bytes in bf16, 4 in fp32."""
    plan = linear_plan(16384, 4096, 151936, device="H200")
    assert (plan.num_chunks, plan.product) == (4, torch.float32)
    assert sum_bytes(plan, 1000) == (4 * 4000 + 3 * 4000 - 2000, 4000 + 2000)  # writes, reads, less the product's own
    assert sum_bytes(plan._replace(product=torch.bfloat16), 1000) == (
        3 * 2000,
        4 * 2000 + 4 * 4000 + 3 * 4000 + 4000 + 2000,
    )
    assert sum_bytes(plan._replace(num_chunks=1, accumulator=torch.bfloat16), 1000) == (0, 0)
    assert sum_bytes(plan._replace(num_chunks=3, accumulator=torch.bfloat16), 1000) == (2 * 4000, 0)


def test_times_of_a_call():
    plan = linear_plan(8192, 4096, 128256, device="H200")
    found = times(plan, 8192, 8192, 4096, 128256, 1.0)
    assert found.products == pytest.approx(32.7e-3, rel=1e-3)
    assert found.loss == pytest.approx(4 * 8192 * 128256 / 4.32e12)
    assert found.weight == found.rows == 0 and found.launches == pytest.approx(23 * 2e-6)
    assert found.over_products == pytest.approx(sum(found) / found.products)
    half = times(plan, 4096, 8192, 4096, 128256, 0.5)
    assert half.products == found.products / 2 and half.loss == pytest.approx(
        found.loss
    )  # half the rows at half the speed
    assert half.rows == pytest.approx((8 * 4096 + 2 * 8192) * 4096 / 4.32e12)
    assert times(plan, 8192, 8192, 4096, 128256, 1.0, WORST).launches == 2 * found.launches


def test_report_has_a_line_for_each_shape():
    lines = head_model.report(lambda V, parameters: SHARE if parameters is cost_model.NOMINAL else 0.9)
    assert len(lines) == 2 + len(head_model.SHAPES) and len({line.count("|") for line in lines}) == 1
    assert "| 19 × 864 | 4 × 4096, fp32 |" in lines[4]


class Launches(TorchDispatchMode):
    """The operations of a call that write something, by name: a kernel each. The loss has two, and one for its totals."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        returns = function._schema.returns
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in returns)
        if not is_view and "empty" not in name and "scratch" not in name:
            self.names[name] += 1 + ("add_cross_entropy_" in name)
        return result


@pytest.mark.parametrize("rows, chunks, counted", [(128, 1, None), (1024, 8, None), (1024, 6, 700)])
def test_launches_are_those_of_a_call(rows, chunks, counted, monkeypatch):
    recorded_gpu.install(monkeypatch)
    monkeypatch.setattr(plans, "CUDA_ROWS", 128)
    monkeypatch.setattr(plans, "CUDA_SCRATCH_BYTES", 1)
    monkeypatch.setattr(plans, "_FEWEST_ROWS", 1)
    hidden, weight = (torch.randn(n, 24).bfloat16().requires_grad_() for n in (rows, 211))
    labels = torch.randint(0, 211, (1, rows))
    labels[:, counted or rows :] = -100
    with Launches() as seen:
        add = devices.add_product_

        def one_launch(*args):
            seen.names["product into fp32"] += 1
            with _disable_current_modes():
                add(*args)

        with monkeypatch.context() as patched:
            patched.setattr(devices, "add_product_", one_launch)
            known = Known(torch.tensor(500.0, dtype=torch.float64), 0.5)  # as Trainer's steps give it
            linear_causal_lm(
                hidden[None], weight, labels, None, known, LossOptions(), num_valid=counted
            ).loss.backward()
    assert seen.names["accumloss.add_cross_entropy_.default"] == 2 * chunks
    assert seen.names["product into fp32"] == (chunks if chunks > 1 else 0)
    limit = head_model.OF_A_CALL + head_model.OF_A_CHUNK * chunks
    if counted:
        limit += head_model.GATHERED_OF_A_CALL + head_model.GATHERED_OF_A_CHUNK * chunks
    least = limit - (chunks == 1) - 10 * bool(counted)  # one chunk is not rounded in the end; a sort is several kernels
    assert least <= seen.names.total() <= limit, seen.names
