"""The cache of what tests compile: made once, by one process, by content; what is not used goes."""

import multiprocessing
import os
import time
from pathlib import Path

import build_cache
import pytest


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCUMLOSS_TEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(text):
    return lambda folder: (folder / "made").write_text(text)


def test_built_makes_once_for_the_same_contents(home):
    first = build_cache.built("kind", ("flags", b"source"), write("one"))
    assert first.parent == home and first.name.startswith("kind-")
    again = build_cache.built("kind", ("flags", b"source"), write("two"))
    assert again == first and (again / "made").read_text() == "one"
    other = build_cache.built("kind", ("flags", b"another"), write("two"))
    assert other != first and (other / "made").read_text() == "two"


def test_built_keeps_nothing_of_what_failed(home):
    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        build_cache.built("kind", 1, fail)
    assert [entry.name for entry in home.iterdir()] == ["locks"]
    assert (build_cache.built("kind", 1, write("one")) / "made").read_text() == "one"


def _build(home, log, barrier):
    os.environ["ACCUMLOSS_TEST_CACHE"] = str(home)

    def make(folder):
        with open(log, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        (folder / "made").write_text("one")

    barrier.wait()
    assert (build_cache.built("kind", "shared", make) / "made").read_text() == "one"


def test_built_is_made_by_one_of_several_processes(home, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_build, args=(home, tmp_path / "log", barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_built_prunes_what_nobody_has_used(home):
    old, used = (build_cache.built("kind", name, write(name)) for name in ("old", "used"))
    abandoned = home / ".making-of-a-killed-process"
    abandoned.mkdir()
    for entry, days in ((old, 15), (used, 13), (abandoned, 2)):
        os.utime(entry, (time.time() - days * 86400,) * 2)
    build_cache.built("kind", "new", write("new"))
    assert not old.exists() and not abandoned.exists() and used.exists()
    build_cache.built("kind", "used", write("again"))
    assert time.time() - used.stat().st_mtime < 3600  # a use counts


def test_directory_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("ACCUMLOSS_TEST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build_cache.directory() == tmp_path / "xdg" / "accumloss-tests"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build_cache.directory() == tmp_path / ".cache" / "accumloss-tests"


def test_sources_do_not_depend_on_where_they_lie(tmp_path):
    keys = []
    for clone in ("a", "b"):
        (tmp_path / clone / "csrc").mkdir(parents=True)
        (tmp_path / clone / "csrc" / "x.h").write_text("int x;")
        keys.append(build_cache.sources(tmp_path / clone / "csrc" / "x.h", root=Path(tmp_path / clone)))
    assert keys[0] == keys[1] == [("csrc/x.h", b"int x;")]
    build_cache.unpack(keys[0], tmp_path / "work")
    assert (tmp_path / "work" / "csrc" / "x.h").read_bytes() == b"int x;"
