"""What `python -m accumloss audit MODEL` may name: a folder, a hub id, a class or a configuration class, or one's own function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measure, tiny
from .measure import AuditError


class Subject(NamedTuple):
    """A model to audit and the rows of one optimizer step."""

    name: str
    model: torch.nn.Module
    rows: measure.Rows
    note: str = ""


def from_name(name: str) -> Subject:
    """The subject that a name stands for.

    Args:
        name: a folder with a config.json, a hub id, an architecture (BertForMaskedLM), a configuration class (BertConfig: its
            first architecture that computes a loss), or a model_type (bert).
    """
    if Path(name).is_dir():
        return _from_checkpoint(name)
    cls = tiny.loss_bearing_class(name)
    if cls is not None:
        return _tiny(cls)
    classes = tiny.loss_bearing_classes()
    if name in classes:
        return _tiny(_class(classes, name))
    of_configuration = _of_configuration(classes, name)
    if of_configuration:
        return _tiny(of_configuration[0], note=f"{name}: the first of its classes that computes a loss")
    if "/" in name:
        return _from_checkpoint(name)
    near = sorted(classes, key=lambda known: _distance(known, name))[:3]
    raise AuditError(
        f"audit: expected a folder, a hub id, or a class of transformers that computes a loss, got {name!r}; near: {', '.join(near)}"
    )


def from_factory(path: str) -> Subject:
    """pkg.module:function, which returns (model, batches) as audit() takes them."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise AuditError(f"audit: expected --factory pkg.module:function, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: the module may lie in the working directory
    try:
        function: Callable[[], tuple[torch.nn.Module, Sequence[Mapping[str, Any]]]]
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise AuditError(f"audit: expected --factory {path} to import, got: {error}") from error
    made = function()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise AuditError(f"audit: expected {path}() to return (model, batches), got {type(made).__name__}")
    model, batches = made
    return Subject(type(model).__name__, model, measure.rows_of(list(batches)))


def _tiny(cls: type, note: str = "") -> Subject:
    try:
        model = tiny.build(cls)
        return Subject(cls.__name__, model, tiny.rows(model), note or "tiny, random weights")
    except tiny.CannotBuild as error:
        raise AuditError(
            f"audit: {cls.__name__} could not be built: {error}; give a model of your own by --factory"
        ) from error


def _from_checkpoint(path: str) -> Subject:
    """The model of a folder or of the hub, with its own weights, and random rows that fit its configuration."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise AuditError(
            f"audit: expected {path} to be a folder with a config.json or a model of the hub, got: {measure.one_line(error)}"
        ) from error
    names = [n for n in getattr(config, "architectures", None) or [] if n in tiny.loss_bearing_classes()]
    if not names:
        raise AuditError(
            f"audit: expected an architecture of transformers that computes a loss in {path}, got {config.architectures}"
        )
    cls = _class(tiny.loss_bearing_classes(), names[0])
    try:
        model = cls.from_pretrained(path, dtype=torch.float32)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise AuditError(f"audit: expected the weights of {path}, got: {measure.one_line(error)}") from error
    try:
        return Subject(f"{cls.__name__} ({path})", model, tiny.rows(model), "its own weights, random rows")
    except tiny.CannotBuild as error:
        raise AuditError(
            f"audit: no rows could be made for {cls.__name__}: {error}; give batches of your own by --factory"
        ) from error


def _class(classes: Mapping[str, str], name: str) -> type:
    return getattr(importlib.import_module(classes[name]), name)


def _of_configuration(classes: Mapping[str, str], name: str) -> list[type]:
    """The classes of a configuration class or a model_type, language models first."""
    found = []
    for known in classes:
        cls = _class(classes, known)
        config_class = cls.config_class  # type: ignore[attr-defined]
        if name in (config_class.__name__, getattr(config_class, "model_type", None)):
            found.append(cls)
    order = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel")
    return sorted(
        found, key=lambda cls: next((i for i, end in enumerate(order) if cls.__name__.endswith(end)), len(order))
    )


def _distance(a: str, b: str) -> float:
    import difflib

    return -difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()
