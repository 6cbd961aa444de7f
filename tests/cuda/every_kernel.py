"""Calls every CUDA kernel once on small inputs, for compute-sanitizer, which is too slow for the whole suite.

    compute-sanitizer --tool racecheck python tests/cuda/every_kernel.py

With --list it names the calls and their kernels on sm_90, and needs no GPU.
"""

import os
import sys
from collections.abc import Iterator

import torch

import accumloss

PLANS = ("packed", "warp", "block", "held", "partly_held:1", "staged:1", "staged:2", "staged:8")
SIZES = {
    "packed": 61,
    "warp": 1000,
    "block": 5003,
    "held": 5003,
    "partly_held:1": 9001,
    "staged:1": 5003,
    "staged:2": 20000,
    "staged:8": 70001,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPTIONS = {"plain": {}, "general": {"label_smoothing": 0.1, "softcap": 30.0, "metrics": True}}
CALLS = ("forward", "backward", "with_grad")


def kernel_of(plan: str, dtype: torch.dtype, call: str, arch: str | None = None) -> str | None:
    """The kernel that serves a call where the plan is forced, None where it cannot be."""
    os.environ["ACCUMLOSS_CUDA_PLAN"] = plan
    try:
        return accumloss.plan(SIZES[plan], dtype, call=call, arch=arch).kernel
    except RuntimeError:
        return None
    finally:
        del os.environ["ACCUMLOSS_CUDA_PLAN"]


def calls(arch: str | None = None) -> Iterator[tuple[str, torch.dtype, str, str, str]]:
    """plan, dtype, options, call, kernel"""
    for plan in PLANS:
        for dtype in DTYPES:
            for options in OPTIONS:
                for call in CALLS:
                    kernel = kernel_of(plan, dtype, call, arch)
                    if kernel is not None:
                        yield plan, dtype, options, call, kernel


def run_shards() -> int:
    """The forward of a shard of the vocabulary, which has a kernel of its own, and its backward."""
    ops, done = torch.ops.accumloss, 0
    os.environ.pop("ACCUMLOSS_CUDA_PLAN", None)
    for dtype in DTYPES:
        for options in OPTIONS.values():
            V = SIZES["held"]
            logits = torch.randn(1, 7, V, device="cuda").to(dtype)
            labels = torch.tensor([[0, V - 1, -100, 3 * V - 1, V, 2 * V - 1, 1]], device="cuda")  # of three shards
            shard = {"class_offset": V, "vocab_size": 3 * V}
            columns = ops.cross_entropy_shard(logits, labels, **shard, **options)
            lse = torch.full((1, 7), 12.0, dtype=torch.float64, device="cuda")
            accumulated = torch.float64 if dtype == torch.float64 else torch.float32
            nll, one = (
                torch.ones(1, 7, dtype=accumulated, device="cuda"),
                torch.ones((), dtype=accumulated, device="cuda"),
            )
            of_loss = {name: value for name, value in options.items() if name != "metrics"}
            grad = ops.cross_entropy_shard_backward(one, logits, labels, lse, nll, **shard, **of_loss)
            assert columns[0].isfinite().all() and torch.isfinite(grad).all(), (dtype, options)
            done += 1
    return done


def run_tokens() -> int:
    """What is told of each row, and rows of two tensors, which have kernels of their own."""
    ops, done = torch.ops.accumloss, 0
    os.environ.pop("ACCUMLOSS_CUDA_PLAN", None)
    for dtype in DTYPES:
        for V in (SIZES["packed"], SIZES["warp"], SIZES["held"]):
            logits = torch.randn(1, 7, V, device="cuda").to(dtype)
            other = torch.randn(1, 7, V, device="cuda").softmax(-1).to(dtype)
            labels = torch.tensor([[0, V - 1, -100, 3, 5, -100, 1]], device="cuda")
            grad = torch.ones(1, 7, device="cuda")
            given = (grad, grad, grad, grad, logits, labels)
            loss, nll, lse, entropy, argmax = ops.token_statistics(logits, labels, metrics=True)
            found = [ops.token_statistics_backward(*given, nll, lse, entropy)]
            assert (argmax == logits.argmax(-1))[labels >= 0].all()
            for beta in (0.0, 0.5, 1.0):
                rows = ops.distillation(logits, other, labels, beta=beta)
                found.append(ops.distillation_backward(grad, logits, other, labels, *rows, beta=beta))
            rows = ops.soft_cross_entropy(logits, other)
            found.append(ops.soft_cross_entropy_backward(grad, logits, other, *rows))
            assert all(torch.isfinite(x).all() for x in (loss, *rows, *found)), (dtype, V)
            done += 1
    return done


def run() -> int:
    ops = torch.ops.accumloss
    one = torch.ones((), device="cuda")
    done = 0
    for plan, dtype, options, call, _ in calls():
        V = SIZES[plan]
        logits = torch.randn(1, 7, V, device="cuda").to(dtype)
        labels = torch.tensor([[0, V - 1, -100, 3, 5, -100, 1]], device="cuda")
        factor = one.double() if dtype == torch.float64 else one
        os.environ["ACCUMLOSS_CUDA_PLAN"] = plan
        if call == "with_grad":
            sums = ops.cross_entropy_with_grad(factor, logits, labels, **OPTIONS[options])
            grad = sums[-1]
        else:
            sums = ops.cross_entropy(logits, labels, **OPTIONS[options])
            grad = None
            if call == "backward":
                grad = ops.cross_entropy_backward(factor, logits, labels, sums[3], sums[6], **OPTIONS[options])
        if grad is not None:
            ops.scale_(grad, factor / 2)
            assert torch.isfinite(grad).all() and (grad[0, 0] != 0).any(), (plan, dtype, options, call)
        assert sums[1].item() == 5 and torch.isfinite(sums[0]), (plan, dtype, options, call)
        done += 1
    done += run_shards() + run_tokens()
    torch.cuda.synchronize()
    print(f"{done} calls")
    return 0


if __name__ == "__main__":
    if "--list" in sys.argv:
        for found in calls("sm_90"):
            print(*found)
    else:
        sys.exit(run())
