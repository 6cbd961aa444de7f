"""Exact gradient accumulation and cheap cross-entropy for PyTorch.

What leaves a loss is a sum and a count. They are added up over micro-batches and processes, and
divided once: an optimizer step is that of the one batch that holds them all. help(accumloss.NAME)
says all of a name, with an example that runs.

Sums
    TokenSums                     what a loss returns: sum of the losses, number of items; add up, divide once

In a training loop of your own
    Accumulator                   makes the gradients of micro-batches those of the one batch, over all ranks

With transformers
    register_with_transformers    makes every model and every Trainer exact, in training and in evaluation
    unregister_from_transformers  gives the very same objects back
    registered                    the former, for the length of a with block
    registered_losses             what computes each loss_type of transformers now
    explain                       how the loss of a model is computed, and why so
    verify                        measures a Trainer's own loss on a few of its own rows
    audit                         measures whether steps over micro-batches are that of the one batch
    make_loss                     a loss with options, for model.loss_function
    compute_loss_func             Trainer's own hook, where nothing is to be registered
    vocabulary_parallel_plan      a head that leaves its logits sharded, for tensor parallelism
    Explanation                   what explain returns
    Verification                  what verify returns
    InexactWarning                a step that is not exact, or not known to be
    InexactError                  the same, where an error was asked for

Losses over logits
    cross_entropy                 sum of the losses and count of the items, in one pass over the logits
    causal_lm_loss                of a causal language model
    masked_lm_loss                of a masked language model, and of any head with a label for each position
    token_classification_loss     of a token classification head
    sequence_classification_loss  of a sequence classification head: classes, values, several labels
    question_answering_loss       of a question answering head
    semantic_segmentation_loss    of a semantic segmentation head
    LossOptions                   what changes a row's loss: smoothing, z-loss, softcap, scale

Losses over hidden states, without the logits
    linear_cross_entropy          cross_entropy of a head and its loss together, chunk by chunk
    linear_causal_lm_loss         causal_lm_loss of a head and its loss together
    linear_plan                   the chunks of a call, from its shapes and a budget of memory
    LinearPlan                    what linear_plan returns
    count_valid                   counts the labels that matter, without a wait for the GPU
    ValidCount                    what count_valid returns

Per token
    token_losses                  the loss of each row
    token_log_probs               the log-probability of each label
    token_statistics              log-probability, entropy, lse and argmax of each row
    TokenStatistics               what token_statistics returns
    linear_token_log_probs        token_log_probs from hidden states
    distillation                  divergences of a student from a teacher, as sums
    distillation_loss             the same, divided by the items of the step
    linear_distillation           distillation of two heads, from hidden states
    linear_distillation_loss      the same, divided by the items of the step
    register_with_trl             puts these functions into the places of TRL's
    unregister_from_trl           gives TRL its own back

The machine
    build_info                    what this build was made from, and the instruction set in use
    empty_cache                   returns the memory that is kept between calls
    plan                          the CUDA kernel that serves a call
    CudaPlan                      what plan returns
    check                         raises where a call on a GPU has met a bad label
    FallbackWarning               a device without kernels: plain PyTorch serves it, and why
"""

import sys
from typing import TYPE_CHECKING, Any

try:
    import torch  # noqa: F401  # whose libraries the compiled module finds loaded

    from . import _C  # noqa: F401
except ImportError as error:
    from . import missing

    problem, arguments = missing.problem_of(error), missing.command_line()
    if arguments[:1] == ["env"]:  # which says what can be known, for whoever asks why
        from .environment import report

        sys.exit(report(as_json="--json" in arguments, problem=problem))
    raise ImportError(str(problem)) from error

from .accumulation import Accumulator
from .cuda import CudaPlan, check, plan, warn_without_kernels
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
warn_without_kernels()

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
    # with name and obj Python says what was meant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
