"""How answers look: a line that says it, facts, tables, what to do. Plain text, the same in a terminal, a log and a notebook."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

WIDTH = 100


def facts(pairs: Mapping[str, str], indent: int = 2) -> str:
    """A line for each name and its value; long values go on below themselves, at words. Empty ones are left out."""
    shown = {name: value for name, value in pairs.items() if value}
    width = indent + max(map(len, shown), default=0) + 2
    lines = []
    for name, value in shown.items():
        lines += textwrap.wrap(
            value, max(WIDTH, width + 20), initial_indent=f"{' ' * indent}{name}".ljust(width), subsequent_indent=" " * width,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), indent: int = 2) -> str:
    """Columns as wide as their cells, numbers (the columns ``right``) to the right, a rule under the headings."""
    rows, numbers = [list(row) for row in rows], set(right)
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.rjust(w) if i in numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return (" " * indent + "  ".join(placed)).rstrip()

    rule = " " * indent + "  ".join("-" * width for width in widths)
    return "\n".join([line(headings), rule, *map(line, rows)])


def answer(verdict: str, *parts: str) -> str:
    """The line that says it, and below what belongs to it, a line apart from each other."""
    return verdict + "\n" + "\n\n".join(part for part in parts if part) if any(parts) else verdict
