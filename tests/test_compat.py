"""What is private in torch and transformers and used here is still there; an import of accumloss brings nothing heavy."""

import subprocess
import sys

import torch

import accumloss
from accumloss import _compat


def test_not_compiled_runs_outside_of_the_graph():
    """Dropped by a torch where this import fails; until then the function is called with what the graph computed."""
    seen = []

    @_compat.not_compiled
    def look(x):
        seen.append(type(x))
        return x + 1

    compiled = torch.compile(lambda x: look(x * 2) * 3, backend="eager")
    assert compiled(torch.ones(())).item() == 9
    assert seen == [torch.Tensor]  # while it is traced a tensor is not a torch.Tensor of numbers


def test_guards_and_keys_of_the_dispatcher():
    """Below autograd nothing is recorded; a kernel on ADInplaceOrView is skipped below it, and else passes the call on."""
    leaf = torch.zeros(2, 3, requires_grad=True)
    labels = torch.tensor([0, 1])
    with _compat.below_autograd():
        assert not torch.ops.accumloss.cross_entropy(leaf, labels)[0].requires_grad
    assert torch.ops.accumloss.cross_entropy(leaf, labels)[0].requires_grad
    values, two = torch.ones(2, 3), torch.tensor(2.0)
    with _compat.below_ad_inplace():
        torch.ops.accumloss.scale_(values, two)
    assert (values == 2).all()
    torch.ops.accumloss.scale_(values, two)
    assert (values == 4).all()
    for keys in (_compat.after_ad_inplace, _compat.after_autograd):
        assert isinstance(keys, torch._C.DispatchKeySet)


def test_a_function_is_applied_without_what_torch_does_in_python():
    class Double(torch.autograd.Function):
        apply = _compat.direct_apply

        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    leaf = torch.ones((), requires_grad=True)
    doubled = Double.apply(leaf)
    assert doubled.grad_fn.name() == "DoubleBackward"
    doubled.backward()
    assert leaf.grad.item() == 2


def test_a_backward_and_the_levels_of_transforms_are_known():
    seen = []
    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(lambda grad: seen.append(_compat.current_backward()))
    for _ in range(2):
        (leaf * 2).backward()
    assert seen[0] != seen[1] and min(seen) >= 0 and _compat.current_backward() == -1
    assert not _compat.is_forward_ad_open() and not _compat.is_functorch_active()
    with torch.autograd.forward_ad.dual_level():
        assert _compat.is_forward_ad_open()
    torch.func.grad(lambda x: seen.append(_compat.is_functorch_active()) or x.sum())(torch.ones(2))
    assert seen[-1] is True


def test_import_brings_no_compiler_no_audit_no_transformers():
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "transformers", "accelerate", "rich", "accumloss.auditing"]
    program = "import torch, sys; before = set(sys.modules); import accumloss; "
    program += f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_audit_is_there_when_it_is_asked_for():
    assert "audit" in dir(accumloss) and accumloss.audit.__module__ == "accumloss.auditing"
    assert not hasattr(accumloss, "adit")
