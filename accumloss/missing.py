"""What is said where accumloss does not import: why its compiled module cannot be loaded, and what to do."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

_FOLDER = Path(__file__).parent
_INSTALL_AGAIN = "install accumloss again beside this torch: 'pip install --force-reinstall --no-cache-dir --no-deps .' in its sources"


class Problem(NamedTuple):
    """Why accumloss does not import, and the remedy."""

    error: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"accumloss: expected the compiled module accumloss._C beside {_FOLDER}, got: {self.error}; {self.remedy}"
        )


def problem_of(error: ImportError) -> Problem:
    """What an error that came of importing torch or the compiled module means to whoever installed accumloss."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return Problem(text, "install torch 2.10 or newer ('pip install torch'), then accumloss")
    built = sorted(path.name for path in _FOLDER.glob("_C.*.so"))
    if "_C" in text and re.search(r"cannot import name|No module named", text):
        if built:
            here = sys.implementation.cache_tag
            return Problem(f"{text} ({', '.join(built)} is there, which {here} does not load)", _INSTALL_AGAIN)
        return Problem(
            text,
            "install it with 'pip install .', and leave the folder of the sources, which hides the installed package",
        )
    if "GLIBC" in text or "CXXABI" in text:
        return Problem(text, f"it was built on a newer system: {_INSTALL_AGAIN}")
    if "undefined symbol" in text or "libtorch" in text or "libc10" in text:
        return Problem(
            text, f"torch 2.10 or newer is needed, and this one does not fit what was built: {_INSTALL_AGAIN}"
        )
    return Problem(text, _INSTALL_AGAIN)


def command_line() -> list[str]:
    """The arguments of ``python -m accumloss``; empty where Python was started in another way."""
    given = sys.orig_argv[1:]
    for index, argument in enumerate(given):
        if argument == "-m" or not argument.startswith("-"):
            is_ours = argument == "-m" and given[index + 1 : index + 2] == ["accumloss"]
            return given[index + 2 :] if is_ours else []
    return []
