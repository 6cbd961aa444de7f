"""What `python -m accumloss audit MODEL` may name: a folder, a hub id, a class or a configuration class, or one's own function."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import measure, names, tiny
from .measure import AuditError

HUB_SECONDS = 5.0  # in which the hub has to answer at all


class Subject(NamedTuple):
    """A model to audit and the rows of one optimizer step."""

    name: str
    model: torch.nn.Module
    rows: measure.Rows
    note: str = ""
    trainer: Any = None  # whose own step is to be measured


def from_name(name: str, trust_remote_code: bool = False) -> Subject:
    """The subject that a name stands for.

    Args:
        name: a folder with a config.json, a hub id, an architecture (BertForMaskedLM), a configuration class (BertConfig: its
            first architecture that computes a loss), or a model_type (bert).
        trust_remote_code: whether code that lies beside the weights may run.
    """
    if Path(name).is_dir():
        return _from_checkpoint(name, trust_remote_code)
    cls = tiny.loss_bearing_class(name)
    if cls is not None:
        return _tiny(cls)
    if _is_path(name):
        raise AuditError(f"audit: expected MODEL to be a folder, got {name}, where there is none")
    of_configuration = _of_configuration(name)
    if of_configuration:
        return _tiny(of_configuration[0], note=f"{name}: the first of its classes that computes a loss")
    if not name.isidentifier():  # as bert-base-uncased: the oldest models of the hub have no owner
        return _from_checkpoint(name, trust_remote_code)
    raise AuditError(
        f"audit: expected a folder, a hub id, or a class of transformers that computes a loss, got {name!r}{suggestion(name)}"
    )


def from_factory(path: str) -> Subject:
    """pkg.module:function, which returns (model, batches) as audit() takes them, or a Trainer."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise AuditError(f"audit: expected --factory pkg.module:function, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: the module may lie in the working directory
    try:
        function: Callable[[], Any]
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise AuditError(f"audit: expected --factory {path} to import, got: {error}") from error
    try:
        made = function()
    except Exception as error:  # whatever somebody's code raises: nothing was measured
        raise AuditError(f"audit: --factory {path} raised {type(error).__name__}: {error}") from error
    if any(cls.__module__ == "transformers.trainer" for cls in type(made).__mro__):
        return Subject(type(made).__name__, made.model, [], trainer=made)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise AuditError(f"audit: expected {path}() to return (model, batches) or a Trainer, got {type(made).__name__}")
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


def _from_checkpoint(path: str, trust_remote_code: bool) -> Subject:
    """The model of a folder or of the hub, with its own weights, and random rows that fit its configuration."""
    import transformers

    why_offline = None if Path(path).is_dir() else _why_offline()
    is_local = why_offline is not None
    with _read(path, "be a folder with a config.json or a model of the hub", why_offline):
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=is_local
        )
    loader = _loader(config, path, trust_remote_code)
    with _read(path, "hold weights that fit its config.json", why_offline):
        model = loader.from_pretrained(
            path, dtype=torch.float32, trust_remote_code=trust_remote_code, weights_only=True,
            local_files_only=is_local,
        )  # fmt: skip
    name = type(model).__name__
    try:
        return Subject(f"{name} ({path})", model, tiny.rows(model), "its own weights, random rows")
    except tiny.CannotBuild as error:
        raise AuditError(
            f"audit: no rows could be made for {name}: {error}; give batches of your own by --factory"
        ) from error


def _why_offline() -> str | None:
    """Why the hub is not asked; None where it answers. Its own client would try for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever client this version has
        return f"{constants.ENDPOINT} cannot be reached ({measure.one_line(error)})"
    return None


def _loader(config: Any, path: str, trust_remote_code: bool) -> Any:
    """What loads the model: its class in transformers, or where the code beside it may run, the auto class that names it."""
    import transformers

    names = getattr(config, "architectures", None) or []
    beside = {
        str(reference).rpartition(".")[2]: auto
        for auto, reference in (getattr(config, "auto_map", None) or {}).items()
        if auto.startswith("AutoModel")
    }
    for name in names:
        if trust_remote_code and name in beside:
            return getattr(transformers, beside[name])
        cls = tiny.loss_bearing_class(name, is_exported=name in beside)
        if cls is not None:
            return cls
    hint = f"; {_OWN_CODE}" if beside.keys() & set(names) else ""
    raise AuditError(
        f"audit: expected an architecture of transformers that computes a loss in {path}, got {names}{hint}"
    )


_OWN_CODE = "its code lies beside its weights: read it, and give --trust-remote-code where it may run"
_PICKLE = (
    "a pickle that does not hold tensors alone, and is not read because it may run code; load it with the program that made it, "
    "where you trust it, and write safetensors by model.save_pretrained(folder)"
)


@contextlib.contextmanager
def _read(path: str, expected: str, why_offline: str | None = None) -> Iterator[None]:
    """Whatever transformers and torch raise about the files of a checkpoint, in one line; their questions have no answer.

    transformers asks on standard input whether code of the checkpoint may run wherever it is not told; what it is told here
    does not reach every section of a configuration.
    """
    try:
        with _nobody_to_ask():
            yield
    except Exception as error:
        causes = list(_causes(error))
        if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
            got = _PICKLE
        elif any("trust_remote_code" in str(cause) for cause in causes):
            got = f"a model that transformers does not have; {_OWN_CODE}"
        elif why_offline is not None and isinstance(error, OSError):
            got = f"nothing of it in the cache of this machine, and {why_offline}; give a folder, where you have it in one"
        else:
            got = measure.one_line(error) if isinstance(error, OSError | ValueError) else measure.named_line(error)
        raise AuditError(f"audit: expected {path} to {expected}, got: {got}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Standard input at its end, and questions unseen, for as long as files of others are read."""
    before, sys.stdin = sys.stdin, io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        sys.stdin = before


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _of_configuration(name: str) -> list[type]:
    """The classes of a configuration class or a model_type that compute a loss, language models first."""
    found = []
    for known in sorted(names.with_configuration(name)):
        cls: Any = tiny.loss_bearing_class(known)
        if cls is not None and name in (cls.config_class.__name__, getattr(cls.config_class, "model_type", None)):
            found.append(cls)
    order = ("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel")
    return sorted(
        found, key=lambda cls: next((i for i, end in enumerate(order) if cls.__name__.endswith(end)), len(order))
    )


def suggestion(name: str) -> str:
    """What a name that no class bears, or one that computes no loss, may have been meant to be."""
    known: Any = names.model_class(name)
    family = _of_configuration(known.config_class.__name__) if known is not None and known.config_class else []
    if family:
        return f", which computes none; those of its family do: {', '.join(cls.__name__ for cls in family[:4])}"
    if "Trainer" in name:
        return f"; a Trainer of a library is audited by --trainers --only {name}"
    near: list[str] = []
    lower = {known.lower(): known for known in names.modules()}
    begin = [known for known in sorted(lower) if known.startswith(name.lower())]
    for close in difflib.get_close_matches(name.lower(), lower, n=20, cutoff=0.6) + begin:
        if len(near) < 3 and tiny.loss_bearing_class(lower[close]) is not None:
            near.append(lower[close])
    return f"; near: {', '.join(near)}" if near else "; python -m accumloss audit --help says what MODEL may be"
