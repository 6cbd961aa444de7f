"""Linear head and cross-entropy in one: sums, counts and gradients from hidden states, without ever holding the logits."""

from .count import ValidCount, count_each, count_valid
from .distillation import distillation_rows
from .op import LinearGradInForward, autocast, check, linear_cross_entropy, needs_of
from .plan import MAX_SCRATCH_BYTES, LinearPlan, linear_plan
from .tokens import token_rows

__all__ = [
    "MAX_SCRATCH_BYTES",
    "LinearGradInForward",
    "LinearPlan",
    "ValidCount",
    "autocast",
    "check",
    "count_each",
    "count_valid",
    "distillation_rows",
    "linear_cross_entropy",
    "linear_plan",
    "needs_of",
    "token_rows",
]
