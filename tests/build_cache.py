"""What tests compile, kept by content in a directory of the user, so that the next run and a fresh clone find it.

``ACCUMLOSS_TEST_CACHE`` names the directory; default: accumloss-tests in ``$XDG_CACHE_HOME`` or ``~/.cache``.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KEPT_DAYS = 14  # since the last use
ABANDONED_DAYS = 1  # of a build that was killed


def directory() -> Path:
    """The directory of all that is kept; it is made where it is not there."""
    named = os.environ.get("ACCUMLOSS_TEST_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = Path(named) if named else Path(home) / "accumloss-tests"
    found.mkdir(parents=True, exist_ok=True)
    return found.resolve()


@functools.cache
def version_of(program: str) -> str:
    """What the program says of its version: part of the contents of what it makes."""
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def sources(*files: Path, root: Path) -> list[tuple[str, bytes]]:
    """Names relative to root, so that another clone has the same, and contents."""
    return sorted((str(file.relative_to(root)), file.read_bytes()) for file in files)


def unpack(files: list[tuple[str, bytes]], folder: Path) -> None:
    """Writes what sources() has read: what is compiled is what the key was made of, whatever is edited meanwhile."""
    for name, contents in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(exist_ok=True)
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # ends with the process at the latest
        yield


def _prune(home: Path) -> None:
    now = time.time()
    for entry in [*home.iterdir(), *home.glob("locks/*")]:
        days = ABANDONED_DAYS if entry.name.startswith(".making-") else KEPT_DAYS
        with contextlib.suppress(OSError):  # another process prunes too
            if entry.name == "locks" or now - entry.stat().st_mtime < days * 86400:
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def built(kind: str, contents: object, make: Callable[[Path], object]) -> Path:
    """The folder that make(folder) has filled for these contents, now or earlier.

    Args:
        kind: the beginning of the folder's name.
        contents: all that the result depends on; its repr is the key.
        make: fills an empty folder. Of several processes that ask at once, one makes and the others wait; a folder
            that could not be filled is not kept.
    """
    home = directory()
    name = f"{kind}-{hashlib.sha256(repr(contents).encode()).hexdigest()[:24]}"
    folder = home / name
    if not folder.is_dir():
        with _locked(home / "locks" / name):
            if not folder.is_dir():
                work = Path(tempfile.mkdtemp(prefix=".making-", dir=home))
                try:
                    make(work)
                    work.rename(folder)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
                _prune(home)
    os.utime(folder)
    return folder
