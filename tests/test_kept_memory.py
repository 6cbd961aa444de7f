"""The memory of large gradients on the CPU is kept from call to call, and never serves two gradients at once."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import accumloss

ops = torch.ops.accumloss
HERE = Path(__file__).resolve().parent
V = 1000

pytestmark = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < "2.11", reason="torch_from_blob came with torch 2.11"
)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    accumloss.empty_cache()
    yield
    gc.collect()
    accumloss.empty_cache()


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(rows))


def grad_of(x: torch.Tensor) -> torch.Tensor:
    """(rows, V) fp32; 4 MB for 1000 rows."""
    labels = torch.arange(len(x)) % V
    labels[::2] = -100
    return ops.cross_entropy_with_grad(torch.ones(()), x, labels)[-1]


def wanted(x: torch.Tensor) -> torch.Tensor:
    x = x.double().requires_grad_()
    labels = torch.arange(len(x)) % V
    labels[::2] = -100
    torch.nn.functional.cross_entropy(x, labels, reduction="sum").backward()
    return x.grad


def check(grad: torch.Tensor, x: torch.Tensor) -> None:
    assert torch.allclose(grad.double(), wanted(x), rtol=1e-5, atol=1e-9)
    assert grad[::2].count_nonzero() == 0  # of the ignored rows, whatever the memory held


def test_the_next_gradient_takes_the_memory_of_the_last() -> None:
    x, y = logits(1000), logits(900)
    first = grad_of(x)
    address = first.data_ptr()
    check(first, x)
    del first
    second = grad_of(y)
    assert second.data_ptr() == address
    check(second, y)


def test_gradients_that_live_together_lie_apart() -> None:
    x, y = logits(1000), logits(1001)
    first, second = grad_of(x), grad_of(y)
    check(first, x)
    check(second, y)
    view = first[10:]
    del first
    third = grad_of(x)  # the first is still seen through its view
    assert third.data_ptr() not in (view.data_ptr() - 10 * V * 4, second.data_ptr())
    check(third, x)
    assert torch.equal(view, third[10:])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_the_two_largest_blocks_are_kept_and_given_back(order: tuple[int, ...]) -> None:
    live = [grad_of(logits(rows)) for rows in (1000, 2000, 3000)]
    addresses = [grad.data_ptr() for grad in live]
    for i in order:
        live[i] = None
    small = grad_of(logits(900))  # the smallest that will do
    large = grad_of(logits(2900))
    assert [small.data_ptr(), large.data_ptr()] == addresses[1:]
    del small, large
    assert accumloss.empty_cache() == 5000 * V * 4
    assert accumloss.empty_cache() == 0
    check(grad_of(logits(1000)), logits(1000))
    assert accumloss.empty_cache() == 1000 * V * 4


def test_a_small_gradient_is_left_to_malloc() -> None:
    grad_of(logits(10))
    assert accumloss.empty_cache() == 0


def test_the_gradient_of_a_loss_is_kept_once_the_head_has_used_it() -> None:
    x = logits(1000).requires_grad_()
    labels = torch.arange(1000)
    for num_items in (999, None):  # written in forward, and in backward
        accumloss.causal_lm_loss(x[None] * 2, labels[None], num_items_in_batch=num_items).backward()
        assert accumloss.empty_cache() == 1000 * V * 4


def test_threads_do_not_share_a_block() -> None:
    failed: list[str] = []

    def work(seed: int) -> None:
        x = logits(500 + seed)
        expected = wanted(x)
        for _ in range(20):
            if not torch.allclose(grad_of(x).double(), expected, rtol=1e-5, atol=1e-9):
                failed.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_the_gradient_is_an_ordinary_tensor() -> None:
    grad = grad_of(logits(1000))
    assert grad.device.type == "cpu" and grad.is_contiguous() and grad.untyped_storage().nbytes() == 1000 * V * 4
    grad.mul_(2).add_(1)
    clone = grad.clone()
    assert torch.equal(clone.share_memory_(), grad)


@pytest.mark.parametrize("setting, kept", [("0", 0), ("1", 1000 * V * 4)])
def test_the_environment_turns_it_off(setting: str, kept: int) -> None:
    code = (
        "import torch, accumloss\n"
        "torch.ops.accumloss.cross_entropy_with_grad(torch.ones(()), torch.zeros(1000, 1000), torch.zeros(1000).long())\n"
        "print(accumloss.empty_cache())"
    )
    environment = {**os.environ, "ACCUMLOSS_KEEP_MEMORY": setting}
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(kept), done.stderr


def test_a_larger_gradient_takes_the_place_of_the_largest_that_waits() -> None:
    grad_of(logits(1000))
    grad_of(logits(3000))
    assert accumloss.empty_cache() == 3000 * V * 4


def test_a_heads_gradient_and_its_scratch_are_kept_together() -> None:
    hidden = torch.randn(600, 500)
    weight = torch.randn(V, 500, requires_grad=True)
    labels = torch.arange(600)
    seen = []
    for _ in range(3):
        weight.grad = None
        accumloss.linear_causal_lm_loss(hidden[None], weight, None, 600, shift_labels=labels[None]).backward()
        seen.append(weight.grad.data_ptr())
    assert seen[0] == seen[1] == seen[2]
    weight.grad = None
    assert accumloss.empty_cache() == 4 * V * (600 + 500)
