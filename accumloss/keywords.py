"""What a user has to know of a call that went wrong: the keyword that the function has not, and the function's own name."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# What transformers' models call ``loss_function`` with besides the arguments of the loss: they hand on what their forward
# does not name. None of it says anything about the loss. A test reads the installed transformers and names what is missing.
FROM_MODELS = frozenset(
    {
        # written at the call
        "logits", "pad_token_id",
        # transformers.utils.TransformersKwargs, and what a forward took by name in older versions
        "attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "input_ids", "inputs_embeds", "is_causal",
        "logits_to_keep", "max_length_k", "max_length_q", "num_logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "past_key_values", "position_ids", "return_dict", "seq_idx",
        "token_type_ids", "use_cache",
        # what tokenizers, processors and collators make, for models that have no use for it
        "aspect_ratio_ids", "aspect_ratio_mask", "chunk_sample_lengths", "image_grid_hw", "image_grid_thw", "image_input_ids",
        "image_patch_indices_per_batch", "image_patch_indices_per_subsequence", "image_position_ids", "image_sizes", "images",
        "indices", "input_features", "input_features_mask", "input_values", "length", "mm_token_type_ids", "n_quantizers",
        "num_chunks_per_video", "num_crops", "num_frames_per_video", "num_soft_tokens_per_image", "num_tiles",
        "offset_mapping", "overflow_to_sample_mapping", "padding_mask", "pixel_mask", "pixel_values", "pixel_values_videos",
        "second_per_grid_ts", "special_tokens_mask", "video_grid_thw", "video_position_ids",
    }
)  # fmt: skip


# what PyTorch's losses take, and what is there for it
_INSTEAD = {
    "reduction": " (the sum is .loss_sum of cross_entropy, the mean .mean_loss, the loss of each row token_losses)",
    "size_average": " (the mean is .mean_loss of cross_entropy)",
    "input": " (what PyTorch calls input is logits)",
    "target": " (what PyTorch calls target is labels)",
}


def refuse(function: str, unknown: str, known: Collection[str], remedy: str = "") -> None:
    """Raises TypeError for a keyword that the function has not, and names the nearest that it has."""
    nearest = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
    hint = f" (the nearest is {nearest[0]!r})" if nearest else ""
    hint = hint or _INSTEAD.get(unknown, "")
    expected = f"keyword arguments {', '.join(known)}" if known else "no arguments"
    raise TypeError(f"{function}: expected {expected}, got {unknown!r}{hint}{remedy}")


def named_by(function: Callable[..., Any]) -> list[str]:
    """The names that a function takes as keywords."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds and name != "self"]


# an op, LossOptions, or another function of ours, which the caller did not call
_OF_ANOTHER = re.compile(r"(?:accumloss::)?[A-Za-z_]+(?=: expected )")


def name_error(error: Exception, name: str) -> None:
    """Puts the name of the function that was called before what an error expected, for that of what it calls in turn."""
    if torch.compiler.is_compiling():  # an exception that is traced takes no other text
        return
    text = error.args[0] if error.args else None
    if isinstance(text, str):
        renamed = _OF_ANOTHER.sub(name, text, count=1) if _OF_ANOTHER.match(text) else text
        error.args = (renamed, *error.args[1:])


def checked(
    function: Callable[P, R], name: str = "", also: Collection[str] = (), names_errors: bool = True
) -> Callable[P, R]:
    """The function, whose unknown keywords raise TypeError and name the nearest, and whose errors bear its name.

    Args:
        name: what errors call it; its own by default.
        also: further names, which it takes as **kwargs.
        names_errors: False for one that runs code of others, whose errors stay as they are.
    """
    known = dict.fromkeys((*named_by(function), *also))  # in their order
    name = name or function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for given in kwargs:
            if given not in known:
                refuse(name, given, known)
        if not names_errors:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            name_error(error, name)
            raise

    return call


def checked_loss(function: Callable[P, R], is_made: bool = True) -> Callable[P, R]:
    """checked for a loss that may be assigned to ``model.loss_function``: what every model passes along is left out.

    Args:
        is_made: whether accumloss.make_loss makes one of this kind.
    """
    known = dict.fromkeys(named_by(function))  # in their order
    name = function.__name__
    remedy = (
        "; where a model passes it to its loss_function, assign "
        f'accumloss.make_loss("{name.removesuffix("_loss")}"), which takes whatever a model has'
    )
    remedy = remedy if is_made else ""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        passed = [given for given in kwargs if given not in known]
        for given in passed:
            if given not in FROM_MODELS:
                refuse(name, given, known, remedy)
            del kwargs[given]
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            name_error(error, name)
            raise

    return call
