"""Run by torchrun: windows of an Accumulator on meshes, on two ranks or four (gloo); every rank writes what it found."""

from __future__ import annotations

import faulthandler
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave
from windows import TinyLM, error, gradients, one_batch, split, targets, window

import accumloss
from accumloss import _compat

WINDOW = window()  # eight rows of very uneven numbers of labels
CASES: dict[str, Any] = {}  # of two ranks, or where the name says so of four


def case(function):
    CASES[function.__name__] = function
    return function


def dealt(index: int, ranks: int, sizes=None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of one of so many data-parallel ranks: every so-manieth row."""
    inputs, labels = (part[index::ranks] for part in WINDOW)
    return split(inputs, labels, list(sizes or [1, len(inputs) - 1]))


def sums_of(model, inputs, labels, **options):
    return accumloss.cross_entropy(model(inputs), labels, shift=1, **options)


def figures(found, stats, wanted=None) -> dict[str, Any]:
    wanted, loss = one_batch(TinyLM(), *WINDOW) if wanted is None else wanted
    return {
        "error": error(found, wanted),
        "loss error": abs(stats.mean_loss.item() - loss) / loss,
        "num_items": stats.num_items.item(),
    }


def refused(call) -> dict[str, str]:
    try:
        call()
    except (ValueError, RuntimeError) as raised:
        return {"raised": str(raised)}
    return {"raised": "nothing"}


def run(model, micro_batches, *, known_total=None, finish=None, **options):
    accumulator = accumloss.Accumulator(model, **options)
    for micro_batch in micro_batches:
        accumulator.backward(sums_of(model, *micro_batch), known_total=known_total)
    return accumulator.finish(**(finish or {}))


# ------------------------------------------------------------------------------------------------------ expert parallelism


class FromAll(torch.autograd.Function):
    """The rows of all ranks; a gradient goes back to where its rows came from."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class ToAll(torch.autograd.Function):
    """The sum over the ranks of what each has computed for all rows, of this rank's rows."""

    @staticmethod
    def forward(ctx, rows):
        rows = rows.contiguous()
        dist.all_reduce(rows)
        return rows.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, grad):
        parts = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, grad.contiguous())
        return torch.cat(parts)


class Experts(nn.Module):
    """A sum of experts for every token, one of them on each rank, or all of them on one."""

    def __init__(self, number: int, of: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        experts = [nn.Linear(16, 16) for _ in range(number)]
        self.is_parallel = of is not None
        self.experts = nn.ModuleList(experts if of is None else [experts[of]])

    def forward(self, rows):
        if not self.is_parallel:
            return sum(expert(rows) for expert in self.experts)
        return ToAll.apply(self.experts[0](FromAll.apply(rows)))


class MixtureLM(TinyLM):
    def __init__(self, number: int, of: int | None = None):
        super().__init__()
        self.mixture = Experts(number, of)

    def forward(self, inputs):
        return self.head(self.mixture(torch.tanh(self.hidden(self.embed(inputs)))))


def mixture_figures(model, stats):
    """Against one process that has all the experts; each rank compares its own."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    wanted, loss = one_batch(MixtureLM(ranks), *WINDOW)
    mine = {name: grad for name, grad in wanted.items() if ".experts." not in name}
    for name in ("weight", "bias"):
        mine[f"mixture.experts.0.{name}"] = wanted[f"mixture.experts.{rank}.{name}"]
    return figures(gradients(model), stats, (mine, loss))


def mixture(shards_experts=True) -> nn.Module:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = MixtureLM(ranks, rank)
    if shards_experts:
        mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "efsdp"))
        fully_shard(model.mixture.experts[0], mesh=mesh["efsdp"])
        return fully_shard(model)
    return fully_shard(model, ignored_params=set(model.mixture.parameters()))


@case
def experts_on_a_mesh_of_their_own():
    model = mixture()
    return mixture_figures(model, run(model, dealt(dist.get_rank(), dist.get_world_size())))


@case
def experts_of_a_known_total():
    model = mixture()
    total = int((targets(WINDOW[1]) != -100).sum())
    return mixture_figures(model, run(model, dealt(dist.get_rank(), dist.get_world_size()), known_total=total))


@case
def experts_clipped_by_one_norm():
    return refused(lambda: run(mixture(), dealt(dist.get_rank(), 2), finish={"max_norm": 1.0}))


@case
def experts_rescaled_by_the_caller():
    return refused(lambda: run(mixture(), dealt(dist.get_rank(), 2), finish={"rescale": False}))


@case
def experts_that_fsdp_ignores():
    return refused(lambda: accumloss.Accumulator(mixture(shards_experts=False)))


@case
def experts_that_ddp_ignores():
    model = MixtureLM(2, dist.get_rank())
    names = [f"mixture.experts.0.{name}" for name in ("weight", "bias")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return refused(lambda: accumloss.Accumulator(DistributedDataParallel(model)))


# ------------------------------------------------------------------------------------------------------ tensor parallelism


def tensor_parallel(mesh) -> nn.Module:
    plan = {"hidden": ColwiseParallel(use_local_output=False), "head": RowwiseParallel()}
    model = TinyLM()
    model.forward = lambda inputs: model.head(torch.tanh(model.hidden(model.embed(inputs))))
    return parallelize_module(model, mesh, plan)


@case
def tensor_parallel_without_a_group():
    model = tensor_parallel(init_device_mesh("cpu", (2,)))
    return refused(lambda: accumloss.Accumulator(model, gradient_reduction="sum"))


@case
def tensor_parallel_alone():
    model = tensor_parallel(init_device_mesh("cpu", (2,)))
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    stats = run(model, dealt(0, 1, [3, 5]), process_group=group)
    return figures(gradients(model), stats)


@case
def fsdp_with_the_group_of_all_on_four():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = fully_shard(tensor_parallel(mesh["tp"]), mesh=mesh["dp"])
    return refused(lambda: accumloss.Accumulator(model, process_group=dist.group.WORLD))


@case
def fsdp_of_tensor_parallel_on_four():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = fully_shard(tensor_parallel(mesh["tp"]), mesh=mesh["dp"])
    stats = run(model, dealt(mesh["dp"].get_local_rank(), 2))
    return figures(gradients(model), stats)


@case
def hsdp_on_four():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = TinyLM()
    fully_shard(model.hidden, mesh=mesh)
    fully_shard(model, mesh=mesh)
    stats = run(model, dealt(dist.get_rank(), 4), finish={"max_norm": 1e9})
    return figures(gradients(model), stats)


# ---------------------------------------------------------------------------------------------------- pipeline and context


class FirstHalf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.embed, self.hidden = model.embed, model.hidden

    def forward(self, inputs):
        return torch.tanh(self.hidden(self.embed(inputs)))


class SecondHalf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.head = model.head

    def forward(self, rows):
        return self.head(rows)


@case
def pipeline():
    rank = dist.get_rank()
    part = (FirstHalf, SecondHalf)[rank](TinyLM())
    accumulator = accumloss.Accumulator(part, gradient_reduction="sum")
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))

    def loss_fn(logits, labels):
        return accumloss.cross_entropy(logits, labels, shift=1).loss_sum

    schedule = ScheduleGPipe(stage, 4, loss_fn=loss_fn, scale_grads=False)
    inputs, labels = WINDOW
    if rank == 0:
        schedule.step(inputs)
    else:
        losses: list[torch.Tensor] = []
        schedule.step(target=labels, losses=losses)
        accumulator.add(torch.stack(losses).sum(), num_items=(targets(labels) != -100).sum())
    stats = accumulator.finish()
    wanted, loss = one_batch(TinyLM(), *WINDOW)
    found = gradients(part)
    return figures(found, stats, ({name: wanted[name] for name in found}, loss))


@case
def a_divisor_of_somebody_elses_backward():
    accumulator = accumloss.Accumulator([torch.nn.Parameter(torch.ones(()))], gradient_reduction="sum", max_items=8)
    return refused(lambda: accumulator.add(torch.ones(()), num_items=1))


@case
def context_parallel():
    """Each rank has half of every row, whose labels were shifted before."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs, labels = WINDOW[0], targets(WINDOW[1])
    model = fully_shard(TinyLM())
    accumulator = accumloss.Accumulator(model)
    for micro_batch in split(inputs.chunk(ranks, 1)[rank], labels.chunk(ranks, 1)[rank], [3, 5]):
        accumulator.backward(accumloss.cross_entropy(model(micro_batch[0]), micro_batch[1]))
    stats = accumulator.finish()
    return figures(gradients(model), stats)


# ------------------------------------------------------------------------------------- engines that a gradient does not wake


def looked_at(model) -> dict[str, Any]:
    """A step whose loss somebody takes apart by autograd before its backward."""
    of_ranks = WINDOW[0].chunk(2)
    wanted = TinyLM()
    (sum(wanted(inputs).square().sum() for inputs in of_ranks) / 2).backward()
    output = model(of_ranks[dist.get_rank()])
    loss = output.square().sum()
    inside = [torch.autograd.graph.GradientEdge(*edge) for edge in output.grad_fn.next_functions if edge[0] is not None]
    with _compat.engines_at_rest(model, loss):
        torch.autograd.grad(loss, inside, retain_graph=True, allow_unused=True)
    loss.backward()
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            found = {name.removeprefix("_fsdp_wrapped_module."): grad for name, grad in gradients(model).items()}
    else:
        found = gradients(model)
    return {"error": error(found, gradients(wanted))}


@case
def ddp_of_a_static_graph_looked_at():
    return looked_at(DistributedDataParallel(TinyLM(), static_graph=True))


@case
def fsdp1_looked_at():
    return looked_at(FullyShardedDataParallel(TinyLM(), use_orig_params=True, device_id=torch.device("cpu")))


@case
def fsdp2_looked_at():
    model = TinyLM()
    fully_shard([model.hidden, model.head], reshard_after_forward=False)
    return looked_at(fully_shard(model))


def main(out: str, *only: str) -> None:
    faulthandler.dump_traceback_later(200, exit=True)  # a collective that one rank waits for alone
    dist.init_process_group("gloo")
    is_of_four = dist.get_world_size() == 4
    results: dict[str, Any] = {}
    for name, function in CASES.items():
        if name.endswith("_on_four") == is_of_four and (not only or name in only):
            try:
                results[name] = function()
            except Exception:
                results[name] = {"failed": traceback.format_exc()}
    Path(out, f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
