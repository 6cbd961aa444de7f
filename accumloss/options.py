"""The options of a cross-entropy: the one list of them in Python, validated once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from . import keywords


@dataclass(frozen=True)
class LossOptions:
    """What changes a row's loss, besides its logits and label. The list of ``csrc/options.h``, in its order.

    For logits ``x`` (V,), label ``y`` and class weights ``w`` (V,; 1 where none are given):

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
        TypeError: an unknown option.
        ValueError: an option is out of range.

    Examples:
        >>> accumloss.LossOptions(label_smoothing=0.1, softcap=30.0)
        LossOptions(ignore_index=-100, label_smoothing=0.1, z_loss=0.0, softcap=30.0, logit_scale=1.0)
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        is_int = isinstance(self.ignore_index, int) and not isinstance(self.ignore_index, bool)
        if not is_int or not -(2**63) <= self.ignore_index < 2**63:
            raise ValueError(f"LossOptions: expected an int for ignore_index (64 bits), got {self.ignore_index!r}")
        _check("label_smoothing", self.label_smoothing, 0.0, "a number in [0, 1]", maximum=1.0)
        _check("z_loss", self.z_loss, 0.0, "a finite number >= 0")
        _check("softcap", self.softcap, 0.0, "a finite number >= 0 (0 turns it off)")
        _check("logit_scale", self.logit_scale, _SMALLEST, "a finite number > 0")

    def check(self, function: str, dtype: torch.dtype) -> None:
        """Raises ValueError where the accumulation dtype, fp64 for fp64 logits and else fp32, does not hold an option.

        Nor may ``softcap / logit_scale``, where the cap begins, be beyond it: the kernels divide one by the other.
        """
        if self is DEFAULT:
            return
        info = torch.finfo(dtype)
        for name, value, is_off in (
            ("label_smoothing", self.label_smoothing, self.label_smoothing == 0),
            ("z_loss", self.z_loss, self.z_loss == 0),
            ("softcap", self.softcap, self.softcap == 0),
            ("logit_scale", self.logit_scale, False),
            ("softcap / logit_scale", self.softcap / self.logit_scale, self.softcap == 0),
        ):
            if not is_off and not info.tiny <= value <= info.max:
                raise ValueError(
                    f"{function}: expected {name} in [{info.tiny:.4g}, {info.max:.4g}], which {dtype} holds (fp64 logits are "
                    f"computed in fp64, all others in fp32), got {value!r}"
                )

    def as_kwargs(self) -> dict[str, Any]:
        """The options as the keyword arguments of the ops."""
        return {  # written out: the compiler of torch 2.10 does not look through vars()
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }

    def given(self) -> dict[str, Any]:
        """as_kwargs, without those of DEFAULT: the fewer an op is called with, the sooner it begins."""
        return {} if self is DEFAULT else self.as_kwargs()


NAMES = tuple(field.name for field in fields(LossOptions))
# As csrc/bindings.cpp writes them: for ops that are defined in Python.
SCHEMA = ", ".join(f"{field.type} {field.name}={field.default}" for field in fields(LossOptions))

_SMALLEST = 5e-324  # > 0
_LARGEST = 1.7976931348623157e308  # finite


def _check(name: str, value: Any, minimum: float, expected: str, maximum: float = _LARGEST) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum:
        raise ValueError(f"LossOptions: expected {expected} for {name}, got {value!r}")


DEFAULT = LossOptions()  # checked here, once; every dtype holds it


def options_of(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float
) -> LossOptions:
    """LossOptions, as they are given to a loss: DEFAULT itself where nothing else was."""
    is_default = (
        (type(ignore_index) is int and ignore_index == DEFAULT.ignore_index)
        and (type(label_smoothing) is float and label_smoothing == DEFAULT.label_smoothing)
        and (type(z_loss) is float and z_loss == DEFAULT.z_loss)
        and (type(softcap) is float and softcap == DEFAULT.softcap)
        and (type(logit_scale) is float and logit_scale == DEFAULT.logit_scale)
    )
    return DEFAULT if is_default else LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)


LossOptions.__init__ = keywords.checked(LossOptions.__init__, "LossOptions")  # type: ignore[method-assign]
