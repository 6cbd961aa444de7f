"""Why some losses cannot be exact under accumulation, by class: what the census and the audit say of them."""

from __future__ import annotations

REASONS: list[tuple[str, str]] = []


def why_not_exact(name: str) -> str:
    """The reason, or nothing where a class has none and is owed exactness."""
    return ""
