"""What is put into the places of transformers' own: methods of Trainer, its label smoother, a name in its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

originals: dict[str, Callable[..., Any]] = {}  # transformers' own methods, from the first time ours took their place
