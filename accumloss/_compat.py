"""Private names of torch, transformers and accelerate that have no public twin, and of no other file.

tests/test_compat.py holds what each of them is used for: it fails on the version that drops one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo as not_compiled
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.utils._pytree import tree_map

__all__ = [
    "ASKS_FOR_RANKS",
    "LOSS_FUNCTION",
    "NUM_GPUS",
    "BatchNorm",
    "Dropout",
    "after_ad_inplace",
    "after_autograd",
    "all_gather_single",
    "at_the_end_of_backward",
    "below_ad_inplace",
    "below_autograd",
    "class_of",
    "computed_kernel",
    "current_backward",
    "dataloaders_of",
    "direct_apply",
    "engines_at_rest",
    "foreach_mul_",
    "foreach_norm",
    "fsdp_meshes",
    "function_of",
    "global_hooks",
    "has_found_inf",
    "has_hooks",
    "has_steps_to_log",
    "is_compiled",
    "is_forward_ad_open",
    "is_fsdp_unit",
    "is_functorch_active",
    "is_mean_of_scalar",
    "is_offloaded",
    "keeps_weights",
    "labels_as_they_are",
    "local_of",
    "not_compiled",
    "prepared_inputs",
    "tree_map",
    "uncompiled",
    "when_cuda_starts",
    "without_autocast",
    "without_subclasses",
]

# torch.compiler.disable imports torch._dynamo, a second and a half, when a function is defined; not_compiled when it is
# first called.

# The apply of torch.autograd.Function, without what that does in Python for transforms of torch.func: 8 us. For functions
# that are not called inside of one.
direct_apply = torch._C._FunctionBase.__dict__["apply"]

# Guards: the autograd keys are skipped, whose kernels in Python would only find that no gradient is recorded, in 20 us.
below_autograd = torch._C._AutoDispatchBelowAutograd
below_ad_inplace = torch._C._AutoDispatchBelowADInplaceOrView

after_ad_inplace = torch._C._after_ADInplaceOrView_keyset  # the keys behind that one, for a kernel that passes on
after_autograd = torch._C._after_autograd_keyset  # and behind the autograd keys

current_backward = torch._C._current_graph_task_id  # which backward is running, -1 outside of one

is_functorch_active = torch._C._are_functorch_transforms_active


def is_forward_ad_open() -> bool:
    """Whether a level of forward-mode AD is open, outside of which no tensor has a tangent."""
    return forward_ad._current_level >= 0


def when_cuda_starts(call: Callable[[], None]) -> None:
    """Calls when torch starts CUDA in this process; now, where it has."""
    torch.cuda._lazy_call(call)


def computed_kernel(op: str, key: str) -> Callable[..., Any]:
    """The kernel that the dispatcher has for an op and a key now, to be called with a keyset first."""
    return torch.library.get_kernel(op, key).call_boxed


foreach_mul_, foreach_norm = torch._foreach_mul_, torch._foreach_norm  # many tensors at once, in one kernel on CUDA

# The name since torch 2.13, where the older one warns. None in a build without torch.distributed.
all_gather_single: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

without_subclasses = torch._C.DisableTorchFunctionSubclass  # a context in which __torch_function__ is not asked


def at_the_end_of_backward(call: Any) -> None:
    """Calls when the backward that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def local_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """What this rank holds of a DTensor: to_local(), a hundred times as fast. None of a tensor that is none."""
    return getattr(tensor, "_local_tensor", None)


def has_found_inf(scaler: Any) -> bool:
    """Whether a GradScaler has unscaled the gradients of an optimizer and looked for infinities in them."""
    return any(state["found_inf_per_device"] for state in scaler._per_optimizer_states.values())


def is_mean_of_scalar(node: Any) -> bool:
    """Whether a node of a graph is the mean of a 0-dim tensor, which is that tensor."""
    return getattr(node, "_saved_self_sym_sizes", None) == ()


def function_of(node: Any) -> type | None:
    """The class of torch.autograd.Function that a node of a graph is the backward of; None: it is none of Python's."""
    return getattr(node, "_forward_cls", None)


def is_compiled(model: Any) -> bool:
    """Whether torch.compile has wrapped a model."""
    return hasattr(model, "_orig_mod")


def uncompiled(model: Any) -> Any:
    """The model inside of what torch.compile has made of it."""
    return getattr(model, "_orig_mod", model)


def global_hooks() -> bool:
    """Whether there are hooks on all modules."""
    module = sys.modules["torch.nn.modules.module"]
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module, f"_global_{name}") for name in names)


def is_fsdp_unit(module: torch.nn.Module) -> bool:
    """Whether FSDP2's fully_shard has made a unit of a module, by itself or in a group."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported where nobody shards
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def class_of(module: torch.nn.Module) -> Any:
    """The class of a module before FSDP2 made a unit of it."""
    return type(module).__bases__[-1] if is_fsdp_unit(module) else type(module)


def keeps_weights(unit: Any) -> bool:
    """Whether the weights of a unit of FSDP2 stay whole between its forward and its backward."""
    return all(group.post_forward_mesh_info is None for group in _groups_of(unit))


def _groups_of(unit: Any) -> list[Any]:
    """The groups of parameters that a unit of FSDP2 shards; torch 2.13 may have several for one."""
    state = unit._get_fsdp_state()
    return list(filter(None, getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]))


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody watches the calls of a module, FSDP2 aside."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for name in names for hook in getattr(module, name).values()]
    is_unit = is_fsdp_unit(module)
    return any(not (is_unit and hook.__module__.startswith("torch.distributed.fsdp.")) for hook in hooks)


def fsdp_meshes(model: torch.nn.Module) -> Iterator[tuple[list[torch.Tensor], list[dist.ProcessGroup]]]:
    """The parameters that units of FSDP2 shard, and the groups over which the gradients of those are averaged: of the shards,
    and of the replicas."""
    groups = [group for module in model.modules() if is_fsdp_unit(module) for group in _groups_of(module)]
    for group in {id(group): group for group in groups}.values():  # modules that are one unit have the same
        info = group.mesh_info
        dims = [getattr(info, name, None) for name in ("shard_mesh_dim", "replicate_mesh_dim")]
        over = [info.mesh.get_group(dim) for dim in dims if dim is not None]
        yield [param.sharded_param for param in group.fsdp_params], over


@contextmanager
def engines_at_rest(model: Any, loss: torch.Tensor) -> Iterator[None]:
    """Inside, a gradient of loss that is asked for is no backward to FSDP, DDP and DeepSpeed, whose hooks are on what a model
    has returned.

    Such a hook has the engine end its backward with the gradient that was asked for: weights are freed and reductions
    begun, before the real backward. Here their state says that it has begun already, and is put back.
    """
    kept: list[tuple[Any, str, Any]] = []

    def pretend(owner: Any, name: str, value: Any) -> None:
        if owner is not None and hasattr(owner, name):
            kept.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    engine = model if _is_deepspeed(model) else None
    is_asked = False

    def asked() -> None:
        nonlocal is_asked
        is_asked = True

    try:
        if engine is not None:
            pretend(sys.modules["deepspeed.runtime.engine"], "is_functorch_transforming", lambda: True)
            if hasattr(engine, "_backward_prologue"):
                engine._backward_prologue = asked  # a hook calls it in the first backward, and in no other
        for module in (
            model.modules()
            if isinstance(model, torch.nn.Module) and dist.is_available() and dist.is_initialized()
            else ()
        ):
            if "applied_pre_backward_ref_cnt" in vars(module):  # DeepSpeed's ZeRO-3: no weights are fetched
                pretend(module, "applied_pre_backward_ref_cnt", 0)
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                pretend(module, "_static_graph_delay_allreduce_enqueued", True)
            elif is_fsdp_unit(module):
                state: Any = module._get_fsdp_state()  # type: ignore[operator]
                pretend(getattr(state, "_state_ctx", None), "post_backward_final_callback_queued", True)
                pretend(state, "_training_state", state._training_state)
                for group in _groups_of(module):
                    pretend(group, "_training_state", type(group._training_state).PRE_BACKWARD)
            elif hasattr(module, "_handle") and hasattr(module, "training_state"):  # FullyShardedDataParallel
                pretend(module, "_post_backward_callback_queued", True)
                pretend(module, "training_state", module.training_state)
                pretend(module._handle, "_ran_pre_backward_hook", True)
        yield
    finally:
        for owner, name, value in reversed(kept):
            setattr(owner, name, value)
        if engine is not None:
            vars(engine).pop("_backward_prologue", None)
        if is_asked:
            assert engine is not None
            prologue = engine._backward_prologue
            loss.register_hook(lambda grad: prologue())  # at the begin of the real backward


def _is_deepspeed(model: Any) -> bool:
    """Whether DeepSpeed has wrapped a model."""
    return any(cls.__module__ == "deepspeed.runtime.engine" for cls in type(model).__mro__)


# transformers and accelerate -----------------------------------------------------------------------------------------

LOSS_FUNCTION = "_loss_function"  # where a model of transformers keeps the loss_function that was assigned to it


def is_offloaded(module: torch.nn.Module) -> bool:
    """Whether accelerate has put a hook into a module: its weights may lie elsewhere."""
    return hasattr(module, "_hf_hook")


def without_autocast(module: torch.nn.Module) -> Any:
    """The forward of a module before accelerate has put it into autocast; None where it has not."""
    return vars(module).get("_original_forward")


def dataloaders_of(accelerator: Any) -> list[Any]:
    """The DataLoaders that an Accelerator has prepared: the list itself."""
    return accelerator._dataloaders


NUM_GPUS = "_n_gpu"  # what TrainingArguments.n_gpu answers with


def prepared_inputs(trainer: Any, batch: Any) -> Any:
    """A micro-batch as Trainer's compute_loss gets it."""
    return trainer._prepare_inputs(batch)


def has_steps_to_log(trainer: Any) -> bool:
    """Whether a Trainer has taken a step since it logged last."""
    return trainer.state.global_step > trainer._globalstep_last_logged


@contextmanager
def labels_as_they_are(trainer: Any) -> Iterator[None]:
    """Inside, Trainer counts all labels of a batch, and does not leave out the first of each row."""
    shifts = getattr(trainer, "_loss_shifts_labels", False)  # came with transformers 5.10
    trainer._loss_shifts_labels = False
    try:
        yield
    finally:
        trainer._loss_shifts_labels = shifts


class Ranks:
    """accelerate's PartialState, which says that it was never made while is_alone says so: a criterion that counts boxes over
    the ranks then counts its own."""

    def __init__(self, theirs: Any, is_alone: Callable[[], bool]):
        self.theirs, self.is_alone = theirs, is_alone

    @property
    def _shared_state(self) -> dict[str, Any]:
        return {} if self.is_alone() else self.theirs._shared_state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.theirs(*args, **kwargs)


def are_ranks(theirs: Callable[[], bool], is_alone: Callable[[], bool]) -> Callable[[], bool]:
    """Whether torch.distributed is initialized; not while is_alone says so."""
    return functools.wraps(theirs)(lambda: not is_alone() and theirs())


# names by which transformers' criteria ask for the other ranks -> what stands in for them
ASKS_FOR_RANKS: dict[str, Callable[[Any, Callable[[], bool]], Any]] = {
    "PartialState": Ranks,
    "_is_torch_distributed_initialized": are_ranks,
}
