"""What is registered with transformers: the options, the models, and one list of all that was put into other people's places.

``registration`` is the only one. Its state says what shall be installed; ``Registration.sync()`` makes it so, by patches and
by their undoing, so that contexts nest: ``restore(snapshot())`` brings back what was installed before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from .._compat import LOSS_FUNCTION
from .settings import settings

ABSENT: Any = object()  # what an owner had under a name of which it had nothing of its own


class Patch:
    """A name of somebody else's object that is bound to an object of ours.

    Args:
        owner: a module, class or instance, whose attribute it is, or a dictionary, whose entry. It is not kept alive.
        name: of the attribute, ``__class__`` among them, or the key.
        ours: what it is bound to from now on.
    """

    def __init__(self, owner: Any, name: Any, ours: Any):
        self.owner: Callable[[], Any] = (lambda: owner) if isinstance(owner, dict) else weakref.ref(owner)
        self.name, self.ours = name, ours
        self.theirs = own(owner, name)
        _set(owner, name, ours)

    def undo(self) -> bool:
        """Gives the very same object back, unless somebody has bound the name anew since: then False."""
        owner = self.owner()
        if owner is None:
            return True
        if own(owner, self.name) is not self.ours:
            return False
        _set(owner, self.name, self.theirs)
        return True


def own(owner: Any, name: Any) -> Any:
    """What an owner itself has under a name, not what it inherits; ABSENT where it has nothing."""
    if name == "__class__":
        return type(owner)
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, ABSENT)


def _set(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        if value is ABSENT:
            del owner[name]
        else:
            owner[name] = value
    elif value is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


class Patches:
    """An undo list: what was patched last goes first. As a context manager it undoes them at its end.

    Attributes:
        stayed: names whose patch could not be undone, since somebody has put theirs around ours, which so stays in use.
    """

    def __init__(self) -> None:
        self._patches: list[Patch] = []
        self.stayed: set[Any] = set()

    def __bool__(self) -> bool:
        return bool(self._patches)

    def bind(self, owner: Any, name: Any, ours: Any) -> None:
        """Binds a name of an owner to ours, once."""
        if own(owner, name) is not ours:
            self._patches.append(Patch(owner, name, ours))

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def undo(self) -> None:
        while self._patches:
            patch = self._patches.pop()
            if not patch.undo():
                self.stayed.add(patch.name)


class Names(Patches):
    """Patches of modules and criteria, made when a Trainer first meets them.

    Attributes:
        modules: names of those that have been looked through.
        objects: models and Trainers that have been looked through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modules: set[str] = set()
        self.objects: weakref.WeakSet[Any] = weakref.WeakSet()

    def undo(self) -> None:
        super().undo()
        self.modules.clear()
        self.objects.clear()


class Part(NamedTuple):
    """Patches that belong together."""

    is_wanted: Callable[[Registration], bool]
    install: Callable[[Patches], None]  # raises RuntimeError where transformers lacks something; binds nothing twice


class Snapshot(NamedTuple):
    covers_all: bool
    models: tuple[tuple[Any, Any], ...]  # and what was assigned to their loss_function
    options: dict[str, Any]


class Registration:
    """The options, the models that are covered, and what is patched for them.

    Attributes:
        covers_all: every model, or only those of ``models``.
        models: registered one by one; each with the patch of its loss_function.
        names: see Names.
        trainers: what is known of each Trainer (trainer.State).
    """

    def __init__(self) -> None:
        self.covers_all = False
        self.models: weakref.WeakKeyDictionary[Any, Patches] = weakref.WeakKeyDictionary()
        self.names = Names()
        self.trainers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.unfused: set[str] = set()  # classes of models of which was told that fused_linear does nothing for them
        self._parts: list[tuple[Part, Patches]] = []

    def add(self, *parts: Part) -> None:
        self._parts += [(part, Patches()) for part in parts]

    @property
    def is_active(self) -> bool:
        return self.covers_all or bool(self.models)

    def sync(self) -> None:
        """Installs what the state asks for and takes away what it does not."""
        if not self.is_active:
            self.names.undo()
            settings.reset()
            self.unfused.clear()
        for part, patches in self._parts:
            if not part.is_wanted(self):
                patches.undo()
        for part, patches in self._parts:
            if part.is_wanted(self):
                part.install(patches)

    def cover_model(self, model: Any, loss: Any) -> None:
        """Assigns loss to the loss_function of a model, once."""
        self.models.setdefault(model, Patches()).bind(model, LOSS_FUNCTION, loss)

    def is_one_of(self, model: Any) -> bool:
        """Whether a model was registered by itself."""
        return model in self.models

    def uncover_model(self, model: Any) -> None:
        patches = self.models.pop(model, None)
        if patches is not None:
            patches.undo()

    def snapshot(self) -> Snapshot:
        models = tuple((model, own(model, LOSS_FUNCTION)) for model in self.models)
        return Snapshot(self.covers_all, models, vars(settings).copy())

    def restore(self, before: Snapshot) -> None:
        """The state of a snapshot, and what it asks for."""
        for model in list(self.models):
            if not any(model is other for other, _ in before.models):
                self.uncover_model(model)
        for model, loss in before.models:
            self.cover_model(model, loss)
        self.covers_all = before.covers_all
        vars(settings).update(before.options)
        self.sync()


registration = Registration()
