"""Private names of torch and transformers that have no public twin. tests/test_compat.py says which version dropped one."""

from torch._compile import _disable_dynamo as not_compiled

__all__ = ["not_compiled"]

# not_compiled: torch.compiler.disable that imports torch._dynamo, a second and a half, when the function is first called
# and not when it is defined.
