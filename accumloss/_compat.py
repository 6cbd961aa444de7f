"""Private names of torch, transformers and accelerate that have no public twin, and of no other file.

tests/test_compat.py holds what each of them is used for: it fails on the version that drops one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo as not_compiled
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.utils._pytree import tree_map

__all__ = [
    "LOSS_FUNCTION",
    "BatchNorm",
    "Dropout",
    "after_ad_inplace",
    "after_autograd",
    "all_gather_single",
    "at_the_end_of_backward",
    "below_ad_inplace",
    "below_autograd",
    "current_backward",
    "dataloaders_of",
    "direct_apply",
    "foreach_mul_",
    "foreach_norm",
    "global_hooks",
    "has_found_inf",
    "is_compiled",
    "is_forward_ad_open",
    "is_functorch_active",
    "is_mean_of_scalar",
    "is_offloaded",
    "local_of",
    "not_compiled",
    "tree_map",
    "uncompiled",
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
