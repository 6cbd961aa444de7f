"""Run by torchrun: one step of Trainer in each situation of many devices, by gloo on the CPU, and what rank 0 found.

    many_devices.py OUT SITUATION...

accelerate refuses meshes for ranks of CPUs: here gloo's ranks say that they are XPUs, and nothing else is changed. The ring
attention of torch has no rule for the CPU: keys and values are gathered over the context-parallel ranks instead.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torchrun import leave
from training import HEADS, build, make_trainer, rows
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import accumloss
from accumloss.auditing import inputs, measure, tiny
from accumloss.transformers import losses


class AllGather(torch.autograd.Function):
    """Rows of all ranks side by side in a dimension; the gradient of each goes back to where it came from."""

    @staticmethod
    def forward(ctx, values, dim, group):
        ctx.dim, ctx.group = dim, group
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group), ctx.dim)[dist.get_rank(ctx.group)], None, None


def gathered_attention(group: Any) -> Any:
    """Causal attention over the keys and values of all context-parallel ranks, whose shards are head and tail of the rows."""

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        length = query.shape[2] * size
        chunks = torch.arange(length).chunk(2 * size)
        held = [torch.cat([chunks[r], chunks[2 * size - 1 - r]]) for r in range(size)]
        key, value = AllGather.apply(key, 2, group), AllGather.apply(value, 2, group)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        is_seen = torch.cat(held)[None] <= held[rank][:, None]
        scores = (query @ key.transpose(2, 3) * scale).masked_fill(~is_seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return attention


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Whole(transformers.TrainerCallback):
    """Keeps the whole gradients that the first optimizer step finds."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {
                name.removeprefix("module."): whole(p.grad.detach()).clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }


@contextlib.contextmanager
def as_accelerators() -> Iterator[None]:
    """gloo's ranks as accelerate's of a device that may have a mesh."""
    prepare = PartialState.__init__

    def relabelled(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    PartialState.__init__ = relabelled
    try:
        yield
    finally:
        PartialState.__init__ = prepare


def clear_states() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def step(
    head: str = "causal",
    accumulation: int = 2,
    *,
    mesh: dict[str, int] | None = None,
    fsdp: bool = False,
    data: Any = None,
    model: Any = None,
    is_registered: bool = True,
    registered: dict[str, Any] | None = None,
    evaluate: bool = False,
    look: Any = None,
    data_ranks: int | None = None,
    num_rows: int = 8,
    trainer_options: dict[str, Any] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """One optimizer step over the eight rows, or so many of them, dealt to the data-parallel ranks, in so many micro-batches."""
    name, config, targets = HEADS.get(head, (head, {}, ""))
    parallel = None if mesh is None else ParallelismConfig(**mesh)
    has_mesh = mesh is not None or fsdp or data_ranks is not None
    if data_ranks is None:
        data_ranks = dist.get_world_size() if parallel is None else parallel.data_parallel_size
    if fsdp:
        arguments["fsdp"], arguments["fsdp_config"] = (
            "full_shard auto_wrap",
            {"version": 2, **arguments.pop("wrap", {})},
        )
    if parallel is not None:
        arguments["parallelism_config"] = parallel
    data = rows(targets) if data is None else data
    evaluated, data = data, data[:num_rows]
    batch_size = len(data) // data_ranks // accumulation
    kept, result = Whole(), {}
    is_cp = parallel is not None and parallel.cp_size > 1
    attention, environment = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(os.environ)
    context = accumloss.registered(**(registered or {})) if is_registered else contextlib.nullcontext()
    with (
        as_accelerators() if has_mesh else contextlib.nullcontext(),
        context,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        model = build(name, **config) if model is None else model
        trainer, recorder = make_trainer(
            model,
            data,
            accumulation,
            batch_size=batch_size,
            ddp_backend="gloo",
            ddp_find_unused_parameters=name in OBJECTS.values(),
            trainer_options={"eval_dataset": evaluated, **(trainer_options or {})},
            **arguments,
        )
        trainer.add_callback(kept)
        try:
            if is_cp:
                group = trainer.accelerator.torch_device_mesh["cp"].get_group()
                ALL_ATTENTION_FUNCTIONS["sdpa"] = gathered_attention(group)
            with contextlib.nullcontext() if look is None else look(trainer, result):
                trainer.train()
            if evaluate:
                result["evaluation"] = trainer.evaluate()["eval_loss"]
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
            os.environ.clear()
            os.environ.update(environment)  # accelerate's, of FSDP
    result["told"] = [str(w.message) for w in caught if "accumloss" in str(w.message)]
    result["head"], result["rows"], result["gradients"], result["loss"] = (
        head,
        num_rows,
        kept.gradients,
        recorder.losses[0],
    )
    clear_states()
    return result


@contextlib.contextmanager
def counting_fused(trainer: Any, result: dict[str, Any]) -> Iterator[None]:
    """How many losses are computed from the hidden states, and how many of them know the labels that count."""
    linear, result["fused"], result["counted"] = losses.core.linear_causal_lm, 0, 0

    def counted(hidden, weight, labels, shift_labels, *args):
        result["fused"] += 1
        targets = labels if shift_labels is None else shift_labels
        counts = [int(arg) for arg in args if isinstance(arg, accumloss.ValidCount)]
        result["counted"] += counts == [int((targets != -100).sum())]
        args = (hidden, weight, labels, shift_labels, *args)
        return linear(*args)

    losses.core.linear_causal_lm = counted
    try:
        yield
    finally:
        losses.core.linear_causal_lm = linear


def freeing_head(trainer: Any, result: dict[str, Any]) -> Any:
    """fully_shard frees the head's weight after its forward."""
    head = trainer.model.get_output_embeddings()
    torch.distributed.fsdp.fully_shard(head, reshard_after_forward=True)
    return counting_fused(trainer, result)


def with_shift_labels() -> list[dict[str, torch.Tensor]]:
    """Rows whose labels a collator has shifted already."""
    found = rows("tokens")
    for row in found:
        row["shift_labels"] = F.pad(row["labels"], (0, 1), value=-100)[1:]
        row["position_ids"] = torch.arange(len(row["labels"]))
    return found


class SumOverItsItems(transformers.Trainer):
    """Divides a sum by the items of the micro-batch, by hand."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**inputs).logits, inputs["labels"]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (labels != -100).sum()


class ShardedByDataloader(transformers.Trainer):
    """Sequence parallelism as transformers plans it: micro-batches arrive sharded, labels shifted before."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(map(self.sharded, epoch_iterator), num_batches, device)

    def sharded(self, batch):
        mesh = self.accelerator.torch_device_mesh["cp"]
        size, rank = mesh.size(), mesh.get_local_rank()
        batch["shift_labels"] = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])

        def shard(value):
            chunks = value.chunk(2 * size, 1)
            return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], 1).contiguous()

        return {key: shard(value) for key, value in batch.items()}

    def _prepare_context_parallel_inputs(self, model, inputs):
        return contextlib.nullcontext, inputs


OBJECTS = {
    "boxes": "DabDetrForObjectDetection",  # divides by the ranks twice
    "boxes and classes": "DetrForObjectDetection",  # and weighs the class of what is none
    "boxes, summed over ranks": "LwDetrForObjectDetection",  # divides once, which is right
    "masks": "MaskFormerForInstanceSegmentation",
}


def objects(kind: str, is_even: bool = False) -> tuple[Any, list]:
    """A tiny model of detection or segmentation, and rows of uneven numbers of boxes or masks."""
    model = tiny.build(tiny.loss_bearing_class(OBJECTS[kind]))
    for part in list(model.modules()):  # batch normalisation couples the rows
        for name, child in part.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                setattr(part, name, torch.nn.GroupNorm(1, child.num_features))
    data = inputs.rows(model)
    if is_even:
        of_first = {key: value for key, value in data[0].items() if "label" in key}
        data = [{**row, **of_first} for row in data]
    return model, data


def objects_step(kind: str, is_even: bool = False, **options: Any) -> dict[str, Any]:
    model, data = objects(kind, is_even)
    return step(OBJECTS[kind], model=model, data=data, trainer_options={"data_collator": measure.collate}, **options)


def tensor_parallel(head: str = "causal", **distributed: Any) -> Any:
    """A model that transformers loads in pieces, by its own plan."""
    name, config, _ = HEADS[head]
    with tempfile.TemporaryDirectory() as folder:
        if dist.get_rank() == 0:
            build(name, **config).save_pretrained(folder)
        shared = [folder]
        dist.broadcast_object_list(shared)
        cls = getattr(transformers, name)
        model = cls.from_pretrained(shared[0], distributed_config=transformers.DistributedConfig(**distributed))
        dist.barrier()
    return model.train()


def zero(stage: int, head: str = "token classes", **options: Any) -> dict[str, Any]:
    """A step under DeepSpeed, whose gradients are what the weights have changed by: the engine has used them up."""
    import deepspeed

    name, config, _ = HEADS[head]
    before = {key: value.detach().clone() for key, value in build(name, **config).named_parameters()}
    kept: dict[str, Any] = {}

    @contextlib.contextmanager
    def changes(trainer: Any, result: dict[str, Any]) -> Iterator[None]:
        with counting_fused(trainer, result):
            yield
        for key, value in trainer.model.named_parameters():
            with deepspeed.zero.GatheredParameters([value], enabled=stage == 3):
                kept[key.removeprefix("module.")] = before[key.removeprefix("module.")] - value.detach()

    # "auto" is what Trainer has been given
    config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0, "train_batch_size": "auto"}
    config |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    result = step(head, deepspeed=config, learning_rate=1.0, look=changes, **options)
    return {**result, "gradients": kept}


SITUATIONS: dict[str, Any] = {
    "ddp": lambda: step(),
    "ddp, static graph": lambda: step(ddp_static_graph=True, accumulation=1),
    "ddp, static graph, stock": lambda: step(ddp_static_graph=True, accumulation=1, is_registered=False),
    "ddp, static graph, stock, GA 2": lambda: step(ddp_static_graph=True, accumulation=2, is_registered=False),
    "ddp, static graph, by hand": lambda: step(
        "token classes", ddp_static_graph=True, accumulation=1, trainer_class=SumOverItsItems
    ),
    "fsdp2, by hand": lambda: step(
        "token classes", mesh={"dp_shard_size": 2}, fsdp=True, trainer_class=SumOverItsItems
    ),
    "sharded by the dataloader": lambda: step(mesh={"cp_size": 2}, fsdp=True, trainer_class=ShardedByDataloader),
    "cp 2": lambda: step(mesh={"cp_size": 2}, fsdp=True, accumulation=1),
    "cp 2, GA 2": lambda: step(mesh={"cp_size": 2}, fsdp=True, accumulation=2),
    "cp 2, GA 4": lambda: step(mesh={"cp_size": 2}, fsdp=True, accumulation=4),
    "cp 2, shifted": lambda: step(mesh={"cp_size": 2}, fsdp=True, accumulation=2, data=with_shift_labels()),
    "cp 2, token classes": lambda: step("token classes", mesh={"cp_size": 2}, fsdp=True),
    "cp 2, evaluation": lambda: step(mesh={"cp_size": 2}, fsdp=True, evaluate=True, learning_rate=0.0),
    "fsdp2": lambda: step(mesh={"dp_shard_size": 2}, fsdp=True),
    "ddp, fused": lambda: step(registered={"fused_linear": True}, look=counting_fused),
    "fsdp2, fused": lambda: step(
        mesh={"dp_shard_size": 2}, fsdp=True, registered={"fused_linear": True}, look=counting_fused
    ),
    "fsdp2, fused, tied": lambda: step(
        model=build("LlamaForCausalLM", tie_word_embeddings=True),
        mesh={"dp_shard_size": 2},
        fsdp=True,
        registered={"fused_linear": True},
        look=counting_fused,
    ),
    "fsdp2, fused, freed": lambda: step(
        mesh={"dp_shard_size": 2}, fsdp=True, registered={"fused_linear": True}, look=freeing_head
    ),
    "fsdp2, fused, by transformers": lambda: step(
        model=tensor_parallel(fsdp_size=2), data_ranks=2, registered={"fused_linear": True}, look=counting_fused
    ),
    "tp 2, fused": lambda: step(
        model=tensor_parallel(tp_plan="auto", tp_size=2),
        data_ranks=1,
        registered={"fused_linear": True},
        look=counting_fused,
    ),
    "cp 2, fused": lambda: step(mesh={"cp_size": 2}, fsdp=True, registered={"fused_linear": True}, look=counting_fused),
    "fsdp2, no mesh": lambda: step(fsdp=True),
    "tp 2": lambda: step(model=tensor_parallel(tp_plan="auto", tp_size=2), data_ranks=1),
    "tp 2, token classes": lambda: step(
        "token classes", model=tensor_parallel("token classes", tp_plan="auto", tp_size=2), data_ranks=1
    ),
}

for KIND in OBJECTS:
    SITUATIONS[f"{KIND}, uneven"] = functools.partial(objects_step, KIND)
    SITUATIONS[f"{KIND}, even"] = functools.partial(objects_step, KIND, is_even=True)
    SITUATIONS[f"{KIND}, evaluation"] = functools.partial(objects_step, KIND, evaluate=True, learning_rate=0.0)
SITUATIONS["boxes, stock"] = functools.partial(objects_step, "boxes", is_registered=False)
SITUATIONS["boxes, summed over ranks, stock"] = functools.partial(
    objects_step, "boxes, summed over ranks", accumulation=1, is_registered=False
)
SITUATIONS.update(  # on four ranks
    {
        "cp 2 x dp_shard 2": lambda: step(mesh={"cp_size": 2, "dp_shard_size": 2}, fsdp=True),
        "cp 2 x dp_shard 2, evaluation": lambda: step(
            mesh={"cp_size": 2, "dp_shard_size": 2}, fsdp=True, evaluate=True, learning_rate=0.0
        ),
        "cp 2 x dp_shard 2, GA 4": lambda: step(mesh={"cp_size": 2, "dp_shard_size": 2}, fsdp=True, accumulation=4),
        "hsdp": lambda: step(mesh={"dp_replicate_size": 2, "dp_shard_size": 2}, fsdp=True, accumulation=2),
        "tp 2 x fsdp 2": lambda: step(
            model=tensor_parallel(tp_plan="auto", tp_size=2, fsdp_size=2), data_ranks=2, accumulation=2
        ),
        "hsdp by transformers": lambda: step(
            model=tensor_parallel(fsdp_size=2, dp_replicate_size=2), data_ranks=4, accumulation=2
        ),
    }
)


SITUATIONS.update(  # on three ranks, which no dimension of a weight is a multiple of
    {
        "ddp, three": lambda: step(num_rows=6, evaluate=True, learning_rate=0.0),
        "fsdp2, three": lambda: step(mesh={"dp_shard_size": 3}, fsdp=True, num_rows=6),
        "fsdp2, fused, three": lambda: step(
            mesh={"dp_shard_size": 3}, fsdp=True, num_rows=6, registered={"fused_linear": True}, look=counting_fused
        ),
        "cp 3": lambda: step(mesh={"cp_size": 3}, fsdp=True, num_rows=6, evaluate=True, learning_rate=0.0),
        "boxes, uneven, three": functools.partial(objects_step, "boxes", num_rows=6),
        "masks, uneven, three": functools.partial(objects_step, "masks", num_rows=6),
    }
)


SITUATIONS.update(  # where DeepSpeed is installed
    {
        "zero 0": lambda: zero(0),
        "zero 1": lambda: zero(1),
        "zero 2": lambda: zero(2),
        "zero 3": lambda: zero(3),
        "zero 2, by hand": lambda: zero(2, trainer_class=SumOverItsItems),
        "zero 3, by hand": lambda: zero(3, trainer_class=SumOverItsItems),
        "zero 2, fused": lambda: zero(2, "causal", registered={"fused_linear": True}),
        "zero 3, fused": lambda: zero(3, "causal", registered={"fused_linear": True}),
    }
)


def main(out: str, *names: str) -> None:
    faulthandler.dump_traceback_later(400, exit=True)  # a collective that one rank waits for alone
    transformers.logging.set_verbosity_error()
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's
    dist.init_process_group("gloo")
    found = {}
    for name in names:
        try:
            found[name] = SITUATIONS[name]()
        except Exception:
            found[name] = {"error": traceback.format_exc()}
            clear_states()
    if dist.get_rank() == 0:
        torch.save(found, Path(out))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
