"""Finds what the build of accumloss._C needs and runs CMake. Standard library only: nothing is installed yet.

Whatever a user can mend ends in fail(): one line, the last of the output, that says what to do.
For the Makefile, `python build_tools/native.py missing` prints what pip has to install first, and
`python build_tools/native.py torch` where torch is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[1]
MINIMUM = {"torch": (2, 10), "cmake": (3, 24), "ninja": (1, 10)}  # cmake: --fresh
# What CMake reads from the environment only once: a change asks for a fresh configuration.
ENVIRONMENT = ["ACCUMLOSS_CUDA", "CC", "CXX", "CXXFLAGS", "LDFLAGS"]
ENVIRONMENT += ["CUDACXX", "CUDAHOSTCXX", "CUDAFLAGS", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"]


def fail(message: str) -> NoReturn:
    sys.stdout.flush()  # the message comes last, also where both streams end in one pipe
    raise SystemExit(f"accumloss: {message}")


def parse_version(text: str) -> tuple[int, ...] | None:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else None


def find_torch() -> Path | None:
    """The torch package to build against. It is not imported: only its headers and two of its libraries are used."""
    given = os.environ.get("ACCUMLOSS_TORCH_DIR")
    if given:
        for directory in (Path(given), Path(given) / "torch"):
            if (directory / "version.py").is_file():
                return directory.resolve()
        fail(f"ACCUMLOSS_TORCH_DIR={given} holds no torch: name the folder that `import torch; torch.__path__` shows")
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    # pip isolates a build through PYTHONPATH, which -E ignores. A build in a venv of its own (python -m build, uv)
    # leaves only the active environment to look at.
    pythons = [Path(sys.executable)]
    if os.environ.get("VIRTUAL_ENV"):
        pythons.append(Path(os.environ["VIRTUAL_ENV"]) / "bin" / "python")
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    for python in filter(Path.exists, pythons):
        answer = subprocess.run([python, "-E", "-c", probe], capture_output=True, text=True, cwd=sys.prefix)
        if answer.stdout.strip():
            return Path(answer.stdout.strip()).parent
    return None


def torch_version(torch: Path) -> str:
    """The version of the torch package in that folder; fails where it is too old."""
    found = re.search(r"^__version__ = ['\"](.+)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    version = found[1] if found else "unknown"
    if (parse_version(version) or (0, 0)) < MINIMUM["torch"]:
        fail(f"torch 2.10 or newer is needed, found {version} in {torch}: pip install -U torch")
    return version


def find_tool(name: str) -> str | None:
    """A cmake or ninja that is new enough and runs: inside an isolated build the environment's own launcher may not."""
    for directory in [*os.get_exec_path(), sysconfig.get_path("scripts")]:
        program = shutil.which(name, path=directory)
        if program:
            answer = subprocess.run([program, "--version"], capture_output=True, text=True)
            if answer.returncode == 0 and (parse_version(answer.stdout) or (0, 0)) >= MINIMUM[name]:
                return program
    return None


def check_compiler() -> None:
    if not sys.platform.startswith("linux"):
        fail(f"Linux on x86_64 or aarch64 is supported, this is {sys.platform}: use a container, or WSL 2 on Windows")
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))[:1]
    except ValueError as error:
        fail(f"CXX={os.environ['CXX']} is no command: {error}")
    nvcc = os.environ.get("CUDACXX", "")
    if nvcc and os.environ.get("ACCUMLOSS_CUDA") != "OFF" and not shutil.which(nvcc):
        fail(f"CUDACXX={nvcc} was not found: name an nvcc, or set ACCUMLOSS_CUDA=OFF to build for CPU only")
    if not any(map(shutil.which, chosen or ["c++", "g++", "clang++"])):
        found = f"CXX={chosen[0]} was not found" if chosen else "none was found"
        fail(f"a C++17 compiler is needed, {found}: apt install g++ (conda: cxx-compiler), or set CXX to one")


def missing_requirements() -> list[str]:
    """What an isolated build has to install; fails first where no build could succeed."""
    check_compiler()
    torch = find_torch()
    if torch:
        torch_version(torch)
    missing = [] if torch else ["torch"]
    missing += [name for name in ("cmake", "ninja") if not find_tool(name)]
    return ["{}>={}.{}".format(name, *MINIMUM[name]) for name in missing]


def run(command: list[str]) -> None:
    """Runs a command and shows its output; where it fails, our own message in that output becomes the last line."""
    output = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output += line
    if process.returncode:
        own = re.search(r"^\s*accumloss:\s+(.+?)(\n\s*\n|\Z)", output, re.DOTALL | re.MULTILINE)  # CMake wraps it
        message = own[1] if own else "the build failed, the reason is above; ACCUMLOSS_CUDA=OFF builds without CUDA"
        fail(" ".join(message.split()))


def gpus() -> str:
    """Compute capabilities of the GPUs here: CMake builds for them where nothing else is asked for."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout


class Prerequisites(NamedTuple):
    torch: Path
    torch_version: str
    cmake: str
    ninja: str
    pybind11: str  # the folder of its CMake configuration


def prerequisites() -> Prerequisites:
    """All that a build needs; fails at the first that is missing."""
    check_compiler()
    torch = find_torch() or fail("torch 2.10 or newer is needed: pip install torch, or set ACCUMLOSS_TORCH_DIR to one")
    version = torch_version(torch)
    cmake, ninja = (find_tool(name) or fail(f"{name} is needed: pip install {name}") for name in ("cmake", "ninja"))
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is needed: pip install pybind11")
    return Prerequisites(torch, version, cmake, ninja, pybind11.get_cmake_dir())


def build(destination: Path) -> None:
    """Builds _C and puts it into a folder. A second build with the same settings is incremental."""
    torch, version, cmake, ninja, pybind11 = prerequisites()
    directory = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{version}"
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        # All paths are given, so that none is remembered from an isolated build whose folder is gone.
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
        f"-DACCUMLOSS_TORCH_DIR={torch}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    programs = [shutil.which(name) for name in ("c++", "nvcc")]
    settings = json.dumps([configure, version, programs, gpus(), {name: os.environ.get(name) for name in ENVIRONMENT}])
    previous = directory / "settings.json"
    same = previous.is_file() and previous.read_text() == settings
    run([*configure, *([] if same else ["--fresh"])])
    previous.write_text(settings)
    run([cmake, "--build", str(directory)])
    run([cmake, "--install", str(directory), "--prefix", str(destination), "--strip"])


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One build of this folder at a time, whoever's it is: what setuptools writes into it has one name for all."""
    import fcntl  # not on Windows, which is told what is supported

    place = Path(tempfile.gettempdir()) / f"accumloss-build-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:16]}"
    try:
        file = place.open("a")
    except OSError as error:  # another user's, who may build here too
        fail(f"{place} cannot be opened ({error.strerror}): remove it, or set TMPDIR to a folder of your own")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"accumloss: waiting for another build of {ROOT}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def writable() -> Iterator[None]:
    """Goes on in a copy of the sources where they cannot be written to: setuptools and CMake build below them."""
    global ROOT
    if os.access(ROOT, os.W_OK):
        yield
        return
    own, folder = ROOT, Path.cwd()
    with tempfile.TemporaryDirectory(prefix="accumloss-") as copy:
        ROOT = Path(copy) / "accumloss"
        kept_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__")
        shutil.copytree(own, ROOT, ignore=kept_out, copy_function=shutil.copyfile)
        for entry in (ROOT, *ROOT.rglob("*")):
            entry.chmod(0o755 if entry.is_dir() else 0o644)
        os.chdir(ROOT)
        try:
            yield
        finally:
            os.chdir(folder)
            ROOT = own


def remove_previous_package() -> None:
    """setuptools packs all that lies in build/lib*, also modules that are gone from the sources."""
    for directory in (ROOT / "build").glob("lib*"):
        shutil.rmtree(directory)


if __name__ == "__main__":
    print(*(missing_requirements() if sys.argv[1:] == ["missing"] else filter(None, [find_torch()])))
