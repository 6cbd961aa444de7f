"""accumloss: exact gradient accumulation and cheap cross-entropy for PyTorch."""

from .functional import (
    causal_lm_loss,
    cross_entropy,
    masked_lm_loss,
    question_answering_loss,
    sequence_classification_loss,
    token_classification_loss,
)
from .ops import build_info, check
from .options import LossOptions
from .sums import TokenSums

__version__ = build_info()["version"]

__all__ = [
    "LossOptions",
    "TokenSums",
    "build_info",
    "causal_lm_loss",
    "check",
    "cross_entropy",
    "masked_lm_loss",
    "question_answering_loss",
    "sequence_classification_loss",
    "token_classification_loss",
]
