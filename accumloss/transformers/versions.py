"""Which versions of transformers the tests run with."""

from __future__ import annotations

import functools
import re
import warnings

OLDEST, NEWEST = (4, 57), (5, 24)
TESTED = f"transformers {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


@functools.cache  # once for a version
def warn_where_newer(version: str) -> None:
    """Says of a transformers that is newer than all that were tested how to find out whether a step is exact with it."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and tuple(map(int, found.groups())) > NEWEST:
        warnings.warn(
            f"register_with_transformers: {TESTED} are tested, this is {version}, which is newer; "
            "python -m accumloss audit YourModelClass measures whether a step is exact with it",
            UserWarning,  # of the version, and of no step
            stacklevel=5,
        )
