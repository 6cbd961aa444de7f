"""Private names of torch that have no public twin. tests/test_compat.py holds what each of them is used for."""

import torch
from torch._compile import _disable_dynamo as not_compiled
from torch.autograd import forward_ad

__all__ = [
    "after_ad_inplace",
    "after_autograd",
    "below_ad_inplace",
    "below_autograd",
    "current_backward",
    "direct_apply",
    "is_forward_ad_open",
    "is_functorch_active",
    "not_compiled",
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
