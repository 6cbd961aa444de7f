"""Which GPU somebody means: by its name, or by its compute capability as torch, nvcc and CMake write it."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from . import _C

OLDEST = 75  # of what kernels are compiled for


class GPU(NamedTuple):
    name: str  # of _C.gpus(); empty where a capability was given
    capability: int  # 90


def gpu_of(given: Any) -> GPU | None:
    """What a user wrote, None where it says nothing known.

    A name in any spelling ("H100", "rtx4090", "NVIDIA H100 80GB HBM3"), or a capability: "sm_90", "90a", "compute_90", "9.0",
    90, 9.0, (9, 0).
    """
    if isinstance(given, tuple) and len(given) == 2 and all(type(part) is int for part in given):
        given = f"{given[0]}.{given[1]}"
    if isinstance(given, bool) or not isinstance(given, (str, int, float)):
        return None
    text = str(given).strip().lower()
    found = re.fullmatch(r"(?:sm_?|compute_?)?(\d{2,3})[af]?", text) or re.fullmatch(r"(\d{1,2}\.\d)[af]?", text)
    if found:
        capability = int(found[1].replace(".", ""))
        return GPU("", capability) if capability >= OLDEST else None
    named = [name for name in _C.gpus() if re.search(rf"(?<![a-z0-9]){_letters(name)}(?![a-z0-9])", text)]
    return GPU(name, _C.gpus()[name]) if (name := max(named, key=len, default="")) else None


def _letters(name: str) -> str:
    """The pattern of a name, whatever stands between its words."""
    return r"[\s_-]?".join(map(re.escape, name.lower().split()))


def known() -> str:
    """What works, for an error."""
    names = ", ".join(sorted(_C.gpus()))
    return f'a capability from {OLDEST} on ("sm_90", "90", "9.0", 90), or a name with one of {names} in it'
