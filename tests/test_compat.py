"""What is private in torch and transformers and used here is still there; an import of accumloss brings nothing heavy."""

import subprocess
import sys

import accumloss
from accumloss import _compat


def test_not_compiled_runs_outside_of_the_graph():
    """Dropped by a torch where this import fails; until then the function is called with what the graph computed."""
    import torch

    seen = []

    @_compat.not_compiled
    def look(x):
        seen.append(type(x))
        return x + 1

    compiled = torch.compile(lambda x: look(x * 2) * 3, backend="eager")
    assert compiled(torch.ones(())).item() == 9
    assert seen == [torch.Tensor]  # while it is traced a tensor is not a torch.Tensor of numbers


def test_import_brings_no_compiler_no_audit_no_transformers():
    heavy = ["torch._dynamo", "torch._inductor", "sympy", "transformers", "accelerate", "rich", "accumloss.auditing"]
    program = "import torch, sys; before = set(sys.modules); import accumloss; "
    program += f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_audit_is_there_when_it_is_asked_for():
    assert "audit" in dir(accumloss) and accumloss.audit.__module__ == "accumloss.auditing"
    assert not hasattr(accumloss, "adit")
