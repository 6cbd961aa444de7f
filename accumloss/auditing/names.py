"""Model classes of transformers by name, found in the text of its sources: only what is asked for is imported."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path


@functools.cache
def sources(kind: str) -> dict[str, str]:
    """Module -> its text, of all ``modeling`` or ``configuration`` files."""
    from transformers import models

    return {
        f"{models.__name__}.{path.parent.name}.{path.stem}": path.read_text(encoding="utf-8")
        for path in sorted(Path(models.__path__[0]).glob(f"*/{kind}_*.py"))
    }


@functools.cache
def modules() -> dict[str, str]:
    """Class -> module, of every class in the modeling files."""
    return {
        name: module
        for module, text in sources("modeling").items()
        for name in re.findall(r"^class (\w+)\(", text, re.MULTILINE)
    }


def model_class(name: str, is_exported: bool = False) -> type | None:
    """A model class, whether it computes a loss or not; None where transformers has none of that name, or does not export it."""
    import transformers

    try:
        cls = getattr(transformers, name, None)
        if cls is None and not is_exported and name in modules():
            cls = getattr(importlib.import_module(modules()[name]), name)
    except ImportError:  # an optional package that is missing: it cannot be built either
        return None
    return cls if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) else None


def configurations(name: str) -> set[str]:
    """The configuration classes that a name stands for: itself, or those of that model_type."""
    is_type = re.compile(rf"""^\s+model_type(?:: \w+)? = ["']{re.escape(name)}["']""", re.MULTILINE)
    found = {name} if name.endswith("Config") else set()
    for text in sources("configuration").values():
        for part in re.split(r"^(?=class )", text, flags=re.MULTILINE):
            head = re.match(r"class (\w+)\(", part)
            if head and is_type.search(part):
                found.add(head[1])
    return found


def with_configuration(name: str) -> list[str]:
    """The classes in the modeling files that name a configuration class, or one of that model_type."""
    wanted = configurations(name)
    if not wanted:
        return []
    named = re.compile(rf"\b(?:{'|'.join(map(re.escape, wanted))})\b")
    files = {module for module, text in sources("modeling").items() if named.search(text)}
    return [known for known, module in modules().items() if module in files]
