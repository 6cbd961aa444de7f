"""The options of a cross-entropy, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LossOptions:
    """What changes a row's loss, besides its logits and label. Mirrors ``csrc/options.h`` field by field.

    For logits ``x`` (V,), label ``y`` and class weights ``w`` (V,; 1 where none are given)::

        z = softcap * tanh(logit_scale * x / softcap) if softcap else logit_scale * x
        lse = logsumexp(z)
        loss = (1 - label_smoothing) * w[y] * (lse - z[y])
             + label_smoothing / V * sum(w * (lse - z))
             + z_loss * lse**2

    Args:
        ignore_index: rows with this label count nothing: no loss, no item, zero gradient. May lie inside [0, V).
        label_smoothing: share of the target spread evenly over the classes, in [0, 1]. As in
            ``torch.nn.functional.cross_entropy``, also where classes are weighted.
        z_loss: factor of ``lse**2``, >= 0; counted once per item, whatever its class weight. 1e-4 is usual.
        softcap: bound of the logits' magnitude, >= 0; 0 turns it off. Gemma 2 uses 30.
        logit_scale: multiplies the logits first, > 0. Cohere uses 0.0625.

    Raises:
        ValueError: an option is out of range.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"LossOptions: expected an int for ignore_index, got {self.ignore_index!r}")
        _check("label_smoothing", self.label_smoothing, 0.0, "a number in [0, 1]", maximum=1.0)
        _check("z_loss", self.z_loss, 0.0, "a finite number >= 0")
        _check("softcap", self.softcap, 0.0, "a finite number >= 0 (0 turns it off)")
        _check("logit_scale", self.logit_scale, _SMALLEST, "a finite number > 0")

    def as_kwargs(self) -> dict[str, Any]:
        """The options as the keyword arguments of the ops."""
        return {  # written out: the compiler of torch 2.10 does not look through vars()
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }


_SMALLEST = 5e-324  # > 0
_LARGEST = 1.7976931348623157e308  # finite


def _check(name: str, value: Any, minimum: float, expected: str, maximum: float = _LARGEST) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum:
        raise ValueError(f"LossOptions: expected {expected} for {name}, got {value!r}")
