"""Run by torchrun: windows dealt unevenly to two ranks (gloo), under each engine; rank 0 writes what it found."""

from __future__ import annotations

import faulthandler
import json
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave
from windows import TinyLM, error, gradients, norm, one_batch, split, window

import accumloss

WINDOW = window()  # rank 0 has its rows of few labels, rank 1 those of many
DEALT = ([0, 2, 4, 7], [1, 3, 5, 6])
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def mine(sizes=(1, 2, 1), seed=0):
    """Micro-batches of this rank."""
    rows = DEALT[dist.get_rank()]
    inputs, labels = window(seed)
    return split(inputs[rows], labels[rows], list(sizes))


def sums_of(model, inputs, labels, **options):
    return accumloss.cross_entropy(model(inputs), labels, shift=1, **options)


def figures(model, stats, accumulator, wanted=None):
    found = gradients(model)
    wanted, loss = one_batch(TinyLM(), *WINDOW) if wanted is None else wanted
    return {
        "error": error(found, wanted),
        "ratio": norm(found) / norm(wanted),
        "loss error": abs(stats.mean_loss.item() - loss) / loss,
        "num_items": stats.num_items.item(),
        "accuracy": None if stats.num_correct is None else stats.accuracy.item(),
        "scale": accumulator.scale.item(),
        "grad_norm": None if accumulator.grad_norm is None else accumulator.grad_norm.item(),
        "norm": norm(found),
    }


# ------------------------------------------------------------------------------------------------------------------ DDP


def ddp(last_only=False, micro_batches=None, known_total=None, max_norm=None, view=False, **options):
    model = DistributedDataParallel(TinyLM(), gradient_as_bucket_view=view)
    accumulator = accumloss.Accumulator(model, **options)
    micro_batches = micro_batches or mine()
    for i, micro_batch in enumerate(micro_batches):
        with model.no_sync() if last_only and i + 1 < len(micro_batches) else nullcontext():
            accumulator.backward(sums_of(model, *micro_batch), known_total=known_total)
    return figures(model, accumulator.finish(max_norm=max_norm), accumulator)


@case
def ddp_every_backward_reduces():
    return ddp()


@case
def ddp_last_backward_reduces():
    return ddp(last_only=True)


@case
def ddp_bucket_views():
    return ddp(view=True)


@case
def ddp_divisor():
    return ddp(max_items=64)


@case
def ddp_known_total():
    return ddp(known_total=39)


@case
def ddp_known_total_as_tensor():
    return ddp(known_total=torch.tensor(39))


@case
def ddp_fused_clip():
    return ddp(max_norm=1e-3)


@case
def ddp_own_group():
    """Items are counted over the group of DDP: here, a rank by itself."""
    groups = [dist.new_group([rank]) for rank in range(2)]
    model = DistributedDataParallel(TinyLM(), process_group=groups[dist.get_rank()])
    accumulator = accumloss.Accumulator(model)
    for micro_batch in split(*WINDOW, [3, 5]):
        accumulator.backward(sums_of(model, *micro_batch))
    return figures(model, accumulator.finish(), accumulator)


@case
def ddp_compiled():
    model = torch.compile(DistributedDataParallel(TinyLM()), backend="eager")
    accumulator = accumloss.Accumulator(model)
    for micro_batch in mine():
        accumulator.backward(sums_of(model, *micro_batch))
    return figures(model._orig_mod, accumulator.finish(), accumulator)


@case
def ddp_without_the_world_factor():
    return ddp(gradient_reduction="sum")


@case
def ddp_rank_without_items():
    model = DistributedDataParallel(TinyLM())
    accumulator = accumloss.Accumulator(model)
    inputs, labels = WINDOW
    labels = torch.full_like(labels, -100) if dist.get_rank() == 0 else labels
    for micro_batch in split(inputs, labels, [3, 5]):
        accumulator.backward(sums_of(model, *micro_batch))
    return figures(model, accumulator.finish(), accumulator)


@case
def ddp_wrong_known_total():
    try:
        ddp(known_total=40)
    except ValueError as raised:
        return {"raised": str(raised)}


def windows_by_loss(model, scaler=None):
    """Two windows whose backward is not ours; what the second one's gradients are."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulator = accumloss.Accumulator(model, scaler=scaler, max_items=1)
    for _ in range(2):
        optimizer.zero_grad()
        for micro_batch in mine():
            loss = accumulator.loss(sums_of(model, *micro_batch))
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
            scaler.update()
        stats = accumulator.finish()
        found = figures(model, stats, accumulator)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    return found


@case
def ddp_windows_by_loss():
    return windows_by_loss(DistributedDataParallel(TinyLM()))


@case
def ddp_bucket_views_windows_by_loss():
    return windows_by_loss(DistributedDataParallel(TinyLM(), gradient_as_bucket_view=True))


@case
def ddp_windows_unscaled():
    return windows_by_loss(DistributedDataParallel(TinyLM()), scaler=torch.amp.GradScaler("cpu"))


def spoilt(model, spoil, in_the_middle):
    """What is said of gradients that were spoilt before finish(), or in mid-window."""
    accumulator = accumloss.Accumulator(model)
    accumulator.loss(sums_of(model, *WINDOW)).backward()
    spoil(model)
    try:
        if in_the_middle:
            accumulator.loss(sums_of(model, *WINDOW))
        else:
            accumulator.finish()
    except RuntimeError as raised:
        return {"raised": str(raised)}
    return {"raised": "nothing"}


def clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_one_by_one(model):
    """Not by a foreach, which raises no version of a DTensor on the CPU."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=False)


def zero_the_second(model):
    module = model.module if isinstance(model, DistributedDataParallel) else model
    torch.optim.SGD(module.head.parameters(), lr=0.1).zero_grad()


@case
def ddp_clipped_before_finish():
    return spoilt(DistributedDataParallel(TinyLM()), clip, in_the_middle=False)


@case
def ddp_bucket_views_clipped_before_finish():
    return spoilt(DistributedDataParallel(TinyLM(), gradient_as_bucket_view=True), clip, in_the_middle=False)


@case
def ddp_second_optimizer_zeroed():
    return spoilt(DistributedDataParallel(TinyLM()), zero_the_second, in_the_middle=True)


@case
def fsdp_clipped_before_finish():
    return spoilt(sharded(), clip_one_by_one, in_the_middle=False)


@case
def fsdp_second_optimizer_zeroed():
    return spoilt(sharded(), zero_the_second, in_the_middle=True)


@case
def fsdp_windows_by_loss():
    return windows_by_loss(sharded())


@case
def fsdp_windows_unscaled():
    return windows_by_loss(sharded(), scaler=torch.amp.GradScaler("cpu"))


@case
def hand_mean_before_finish():
    return by_hand("mean", True, mine())


@case
def ddp_zeroed_in_the_middle():
    model = DistributedDataParallel(TinyLM())
    accumulator = accumloss.Accumulator(model)
    accumulator.backward(sums_of(model, *WINDOW))
    model.zero_grad(set_to_none=False)
    try:
        accumulator.backward(sums_of(model, *WINDOW))
    except RuntimeError as raised:
        return {"raised": str(raised)}


# ----------------------------------------------------------------------------------------------------------------- FSDP


def sharded(sum_reduction=False):
    model = TinyLM()
    for layer in (model.embed, model.hidden, model.head):
        fully_shard(layer)
    fully_shard(model)
    if sum_reduction:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
    return model


def fsdp(last_only=False, sum_reduction=False, max_norm=None, **options):
    model = sharded(sum_reduction)
    accumulator = accumloss.Accumulator(model, **options)
    micro_batches = mine()
    for i, micro_batch in enumerate(micro_batches):
        model.set_requires_gradient_sync(not last_only or i + 1 == len(micro_batches))
        accumulator.backward(sums_of(model, *micro_batch))
    return figures(model, accumulator.finish(max_norm=max_norm), accumulator)


@case
def fsdp_every_backward_reduces():
    return fsdp()


@case
def fsdp_last_backward_reduces():
    return fsdp(last_only=True)


@case
def fsdp_sums():
    return fsdp(sum_reduction=True, gradient_reduction="sum")


@case
def fsdp_fused_clip():
    return fsdp(max_norm=1e-3)


@case
def fsdp_zeroed_in_the_middle():
    model = sharded()
    accumulator = accumloss.Accumulator(model)
    accumulator.backward(sums_of(model, *WINDOW))
    model.zero_grad(set_to_none=False)
    try:
        accumulator.backward(sums_of(model, *WINDOW))
    except RuntimeError as raised:
        return {"raised": str(raised)}


@case
def fsdp_backward_of_another_loss():
    model = sharded()
    accumulator = accumloss.Accumulator(model)
    accumulator.backward(sums_of(model, *WINDOW))
    model(WINDOW[0]).square().mean().backward()
    try:
        accumulator.backward(sums_of(model, *WINDOW))
    except RuntimeError as raised:
        return {"raised": str(raised)}


@case
def fsdp_not_zeroed():
    model = sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = accumloss.Accumulator(model)
    accumulator.backward(sums_of(model, *WINDOW))
    try:
        optimizer.step()
    except RuntimeError as raised:
        early = str(raised)
    accumulator.finish()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    try:
        accumulator.backward(sums_of(model, *WINDOW))
    except RuntimeError as raised:
        return {"raised": str(raised), "early": early}


@case
def fsdp1_with_its_own_clip():
    model = FullyShardedDataParallel(TinyLM(), use_orig_params=True, device_id=torch.device("cpu"))
    accumulator = accumloss.Accumulator(model)
    for micro_batch in mine():
        accumulator.backward(sums_of(model, *micro_batch))
    try:
        accumulator.finish(max_norm=1.0)
    except ValueError as raised:
        refused = str(raised)
    stats = accumulator.finish()
    wanted, loss = one_batch(TinyLM(), *WINDOW)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        found = {name.removeprefix("_fsdp_wrapped_module."): grad for name, grad in gradients(model).items()}
    return {
        "error": error(found, wanted),
        "loss error": abs(stats.mean_loss.item() - loss) / loss,
        "num_items": stats.num_items.item(),
        "refused": refused,
    }


# -------------------------------------------------------------------------------------------------------- reduced by hand


def reduce_by_hand(model, mean):
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size() if mean else 1


def by_hand(reduction, before, micro_batches, known_total=None):
    """The first finish() with metrics, the last rank with nothing to do."""
    model = TinyLM()
    accumulator = accumloss.Accumulator(model.parameters(), gradient_reduction=reduction)
    for micro_batch in micro_batches:
        accumulator.backward(sums_of(model, *micro_batch, metrics=True), known_total=known_total)
    if before:
        reduce_by_hand(model, reduction == "mean")
    stats = accumulator.finish()
    if not before:
        reduce_by_hand(model, reduction == "mean")
    return figures(model, stats, accumulator)


def all_on_rank_0():
    return [WINDOW] if dist.get_rank() == 0 else []


@case
def hand_sum_before_finish():
    return by_hand("sum", True, mine())


@case
def hand_mean_after_finish():
    return by_hand("mean", False, mine())


@case
def hand_rank_without_micro_batches():
    return by_hand("sum", True, all_on_rank_0())


@case
def hand_mean_rank_without_micro_batches():
    return by_hand("mean", True, all_on_rank_0())


@case
def hand_known_total_rank_without_micro_batches():
    return by_hand("mean", True, all_on_rank_0(), known_total=39)


@case
def hand_nothing_on_any_rank():
    model = TinyLM()
    accumulator = accumloss.Accumulator(model, gradient_reduction="sum")
    stats = accumulator.finish()
    return {"num_items": stats.num_items.item(), "mean_loss": stats.mean_loss.item(), "scale": accumulator.scale.item()}


@case
def hand_known_on_one_rank():
    model = TinyLM()
    accumulator = accumloss.Accumulator(model, gradient_reduction="sum")
    accumulator.backward(sums_of(model, *WINDOW), known_total=78 if dist.get_rank() == 0 else None)
    try:
        accumulator.finish()
    except ValueError as raised:
        return {"raised": str(raised)}
    return {}


@case
def hand_reduction_not_told():
    try:
        accumloss.Accumulator(TinyLM())
    except ValueError as raised:
        return {"raised": str(raised)}


EARLY = accumloss.Accumulator(TinyLM())


@case
def hand_made_too_early():
    try:
        EARLY.loss(sums_of(TinyLM(), *WINDOW))
    except RuntimeError as raised:
        return {"raised": str(raised)}


@case
def one_all_reduce():
    model = DistributedDataParallel(TinyLM())
    accumulator = accumloss.Accumulator(model)
    for micro_batch in mine():
        accumulator.backward(sums_of(model, *micro_batch, metrics=True))
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(args[0].shape) or real(*args, **kwargs)
    try:
        stats = accumulator.finish(max_norm=1.0)
    finally:
        dist.all_reduce = real
    return {"calls": len(calls), "accuracy": stats.accuracy.item(), "mean_entropy": stats.mean_entropy.item()}


def main(out: str) -> None:
    faulthandler.dump_traceback_later(100, exit=True)  # a collective that one rank waits for alone
    dist.init_process_group("gloo")
    results = {name: function() for name, function in CASES.items()}
    path = Path(out, f"rank{dist.get_rank()}.json")
    path.write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
