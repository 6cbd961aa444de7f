"""LOSS_MAPPING: which of transformers' losses have a replacement, and the way back."""

from __future__ import annotations

from typing import Any, cast

from .._compat import LOSS_FUNCTION
from ..keywords import checked
from .losses import REPLACEMENTS, Loss, underlying
from .registration import Patches
from .versions import TESTED

REQUIRED = ("ForCausalLMLoss", "ForMaskedLMLoss", "ForSequenceClassificationLoss")  # the others came, or may go

_stock: dict[str, Loss] = {}  # name in loss_utils -> transformers' own, from the first look on


def loss_mapping() -> dict[Any, Loss]:
    """transformers' LOSS_MAPPING itself; modeling_utils and trainer hold the same object."""
    from transformers.loss import loss_utils

    return cast(dict[Any, Loss], loss_utils.LOSS_MAPPING)


def stock_losses() -> dict[str, Loss]:
    """transformers' own losses that have a replacement, by name. Raises RuntimeError where one that must be there is not."""
    if not _stock:
        from transformers.loss import loss_utils

        found = {name: getattr(loss_utils, name) for name in REPLACEMENTS if hasattr(loss_utils, name)}
        missing = [name for name in REQUIRED if name not in found]
        if missing:
            raise RuntimeError(
                f"register_with_transformers: expected transformers.loss.loss_utils to define {', '.join(missing)}, "
                f"got a transformers that does not; {TESTED} are supported"
            )
        _stock.update(found)
    return _stock


def install(patches: Patches) -> None:
    """Puts ours in the place of transformers' own, under every key, in place: no key is added and none moves.

    A function that somebody else put there stays.
    """
    ours = {id(stock): REPLACEMENTS[name] for name, stock in stock_losses().items()}
    mapping = loss_mapping()
    for key, loss in list(mapping.items()):
        if id(loss) in ours:
            patches.bind(mapping, key, ours[id(loss)])


def loss_of(model: Any) -> Loss | None:
    """What ``model.loss_function`` gives, the fallback included, without its warning; None for a model without one."""
    if not hasattr(type(model), "loss_function"):
        return None
    own = getattr(model, LOSS_FUNCTION, None)
    if own is not None:
        return own
    mapping = loss_mapping()
    loss_type = getattr(model, "loss_type", None)
    return mapping.get(loss_type) or mapping["ForCausalLM"]


def replacement_for(loss: Loss | None) -> Loss | None:
    """Ours for one of transformers' own (or for one of ours); None where there is none."""
    for name, stock in stock_losses().items():
        if loss is stock:
            return REPLACEMENTS[name]
    return loss if underlying(loss) else None


@checked
def registered_losses() -> dict[str, str]:
    """Every loss_type of transformers and the function that computes it now; ours are those of accumloss.

    Returns:
        loss_type -> qualified name of the function.

    Raises:
        ImportError: transformers is not installed.

    Examples:
        >>> with accumloss.registered():
        ...     losses = accumloss.registered_losses()
        >>> losses["ForCausalLM"], losses["ForCTC"]
        ('accumloss.transformers.losses.causal_lm_loss', 'transformers.loss.loss_ctc.ForCTCLoss')
    """
    return {key: qualified_name(loss) for key, loss in loss_mapping().items()}


def qualified_name(loss: Any) -> str:
    function = underlying(loss) or loss
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
