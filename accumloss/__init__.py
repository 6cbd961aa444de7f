"""accumloss: exact gradient accumulation and cheap cross-entropy for PyTorch."""

from typing import TYPE_CHECKING, Any

from .accumulation import Accumulator
from .cuda import CudaPlan, check, plan
from .fallback import FallbackWarning
from .inexact import InexactError, InexactWarning
from .linear import LinearPlan, ValidCount, count_valid, linear_plan
from .losses import (
    causal_lm_loss,
    cross_entropy,
    linear_causal_lm_loss,
    linear_cross_entropy,
    masked_lm_loss,
    question_answering_loss,
    semantic_segmentation_loss,
    sequence_classification_loss,
    token_classification_loss,
)
from .ops import build_info, empty_cache
from .options import LossOptions
from .per_token import (
    TokenStatistics,
    distillation,
    distillation_loss,
    linear_distillation,
    linear_distillation_loss,
    linear_token_log_probs,
    token_log_probs,
    token_losses,
    token_statistics,
)
from .sums import TokenSums
from .transformers import (
    Explanation,
    Verification,
    compute_loss_func,
    explain,
    make_loss,
    register_with_transformers,
    registered,
    registered_losses,
    unregister_from_transformers,
    verify,
    vocabulary_parallel_plan,
)
from .trl import register_with_trl, unregister_from_trl

if TYPE_CHECKING:
    from .auditing import audit

__version__ = build_info()["version"]

__all__ = [
    "Accumulator",
    "CudaPlan",
    "Explanation",
    "FallbackWarning",
    "InexactError",
    "InexactWarning",
    "LinearPlan",
    "LossOptions",
    "TokenStatistics",
    "TokenSums",
    "ValidCount",
    "Verification",
    "audit",
    "build_info",
    "causal_lm_loss",
    "check",
    "compute_loss_func",
    "count_valid",
    "cross_entropy",
    "distillation",
    "distillation_loss",
    "empty_cache",
    "explain",
    "linear_causal_lm_loss",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_distillation_loss",
    "linear_plan",
    "linear_token_log_probs",
    "make_loss",
    "masked_lm_loss",
    "plan",
    "question_answering_loss",
    "register_with_transformers",
    "register_with_trl",
    "registered",
    "registered_losses",
    "semantic_segmentation_loss",
    "sequence_classification_loss",
    "token_classification_loss",
    "token_log_probs",
    "token_losses",
    "token_statistics",
    "unregister_from_transformers",
    "unregister_from_trl",
    "verify",
    "vocabulary_parallel_plan",
]


def __getattr__(name: str) -> Any:
    """The audit is imported when it is first asked for."""
    if name == "audit":
        from .auditing import audit

        return audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
