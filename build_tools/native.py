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
for _name in [*ENVIRONMENT, "ACCUMLOSS_TORCH_DIR", "CMAKE_ARGS"]:  # a blank one is as good as none, here and in CMake
    if not os.environ.get(_name, "set").strip():
        del os.environ[_name]
# NVIDIA's wheels that make a compiler together, beside a host compiler. Those of CUDA 12 hold ptxas and no nvcc.
COMPILER_WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
COMPILER_FILES = (
    "bin/nvcc",
    "include/crt/host_config.h",
    "nvvm/bin/cicc",
    "include/nv/target",
    "lib/libcudart_static.a",
)
FIRST_WHEELS = "13.0"
DEFAULT_TOOLKIT = "/usr/local/cuda"
DRIVER_OF_13 = 580  # the first driver that runs what CUDA 13 has compiled, whatever CUDA torch has


def fail(message: str) -> NoReturn:
    sys.stdout.flush()  # the message comes last, also where both streams end in one pipe
    raise SystemExit(f"accumloss: {message}")


def notice(message: str) -> None:
    """A line for the user. pip and uv show what a build prints only where it fails, so the terminal gets it as well."""
    print(f"accumloss: {message}", flush=True)
    if not sys.stdout.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w", encoding="utf-8") as terminal:
            terminal.write(f"\naccumloss: {message}\n")


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


def torch_cuda(torch: Path) -> str | None:
    """The CUDA version that the torch package in that folder was built for; None of a build for the CPU or for ROCm."""
    found = re.search(r"^cuda\b[^=]*= ['\"](\d+\.\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


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
    for name in ("CXX", "CMAKE_ARGS"):
        try:
            shlex.split(os.environ.get(name, ""))
        except ValueError as error:
            fail(f"{name}={os.environ[name]} is no command: {error}")
    chosen = shlex.split(os.environ.get("CXX", ""))[:1]
    setting, nvcc = cuda_setting(), os.environ.get("CUDACXX", "")
    if nvcc and setting != "OFF" and not shutil.which(nvcc):
        fail(f"CUDACXX={nvcc} was not found: name an nvcc, or set ACCUMLOSS_CUDA=OFF to build for CPU only")
    if not any(map(shutil.which, chosen or ["c++", "g++", "clang++"])):
        found = f"CXX={chosen[0]} was not found" if chosen else "none was found"
        fail(f"a C++17 compiler is needed, {found}: apt install g++ (conda: cxx-compiler), or set CXX to one")


def cmake_argument(name: str) -> str | None:
    """What CMAKE_ARGS sets a variable to."""
    found = re.findall(rf"(?:^|\s)['\"]?-D{name}(?::\w+)?=(\S*)", os.environ.get("CMAKE_ARGS", ""))
    return found[-1].strip("'\"") if found else None


def cuda_setting() -> str:
    setting = cmake_argument("ACCUMLOSS_CUDA") or os.environ.get("ACCUMLOSS_CUDA") or "AUTO"
    if setting not in ("AUTO", "ON", "OFF"):
        fail(f"ACCUMLOSS_CUDA is AUTO, ON or OFF, got {setting}")
    return setting


def find_nvcc(torch: Path | None) -> Path | None:
    """The nvcc of this machine; else that of NVIDIA's wheels, in this Python or beside torch, where they are complete."""
    given = cmake_argument("CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX")
    if given:
        return Path(shutil.which(given) or given)
    toolkits = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in [*os.get_exec_path(), *toolkits, f"{DEFAULT_TOOLKIT}/bin"]:
        found = shutil.which("nvcc", path=str(folder))
        if found:
            return Path(found)
    sites = [*map(Path, filter(None, sys.path)), *([torch.parent] if torch else [])]
    for toolkit in (toolkit for site in sites for toolkit in sorted(site.glob("nvidia/cu*"))):
        if all((toolkit / name).exists() for name in COMPILER_FILES):
            return toolkit / "bin" / "nvcc"
    return None


def missing_cuda(torch: Path | None) -> str | None:
    """The CUDA version of which an nvcc is wanted and not found; None: it is found, or nobody wants it."""
    setting = cuda_setting()
    if setting == "OFF" or find_nvcc(torch):
        return None
    return (torch_cuda(torch) if torch else None) or (FIRST_WHEELS if setting == "ON" else None)


def compiler_wheels(cuda: str) -> list[str]:
    """What pip has to install for an nvcc of a CUDA version, or for one whose code this machine's driver runs as well.

    Empty where there is none.
    """
    if int(cuda.split(".")[0]) < int(FIRST_WHEELS.split(".")[0]):
        if (parse_version(query_gpus("driver_version")) or (0, 0)) < (DRIVER_OF_13, 0):
            return []
        cuda = FIRST_WHEELS
    major = cuda.split(".")[0]
    # of cccl only headers are used; since 13.3 its wheels are numbered by releases of its own
    return [f"{name}=={major if name == 'nvidia-cuda-cccl' else cuda}.*" for name in COMPILER_WHEELS]


def can_fetch(requirements: list[str]) -> bool:
    """Whether the installer would find them, which alone knows its indices. Where it cannot be asked: yes."""
    text = "\n".join(requirements)
    # with dependencies: offline uv would else be content with the list of versions in its cache
    commands = [[os.environ["UV"], "pip", "compile", "--quiet", "-"]] if os.environ.get("UV") else []
    pip = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--no-input", "--quiet"]
    pythons = [sys.executable, *([f"{os.environ['VIRTUAL_ENV']}/bin/python"] if os.environ.get("VIRTUAL_ENV") else [])]
    # -E: inside of pip's isolated build its own pip is hidden by PYTHONPATH
    commands += [[python, "-E", *pip, "--retries=1", "--timeout=15", *requirements] for python in pythons]
    for command in filter(lambda command: shutil.which(command[0]), commands):
        answer = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tempfile.gettempdir())
        if answer.returncode == 0:
            return True
        if answer.returncode == 1 and "No module named" not in answer.stderr:
            print(answer.stderr, end="", flush=True)
            return False
    return True


def missing_requirements() -> list[str]:
    """What an isolated build has to install; fails first where no build could succeed."""
    check_compiler()
    torch = find_torch()
    if torch:
        torch_version(torch)
    missing = [] if torch else ["torch"]
    missing += [name for name in ("cmake", "ninja") if not find_tool(name)]
    required = ["{}>={}.{}".format(name, *MINIMUM[name]) for name in missing]
    cuda = missing_cuda(torch)
    wheels = compiler_wheels(cuda) if cuda else []
    if wheels and can_fetch(wheels):  # else the build itself says what it lacks
        notice(
            f"nvcc was not found: this build fetches NVIDIA's, {' '.join(wheels)} (105 MB); "
            "ACCUMLOSS_CUDA=OFF builds for the CPU alone, without it"
        )
        required += wheels
    return required


def how_to_get_nvcc(cuda: str) -> str:
    wheels = compiler_wheels(cuda)
    if wheels:
        return f"pip install {' '.join(map(shlex.quote, wheels))}"
    return (
        f"install that of CUDA {cuda}, which no wheel holds (conda's cuda-nvcc={cuda}, or NVIDIA's package "
        f"cuda-toolkit-{cuda.replace('.', '-')}), "
        f"or a driver of {DRIVER_OF_13} or newer, whose nvcc is fetched"
    )


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs a command and shows its output; where it fails, our own message in that output becomes the last line."""
    output = ""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, encoding="utf-8", env=environment) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output += line
    if process.returncode:
        own = re.search(r"^\s*accumloss:\s+(.+?)(\n\s*\n|\Z)", output, re.DOTALL | re.MULTILINE)  # CMake wraps it
        remedy = "" if cuda_setting() == "OFF" else "; ACCUMLOSS_CUDA=OFF builds without CUDA"
        message = own[1] if own else f"the build failed, the reason is above{remedy}"
        fail(" ".join(message.split()))


def query_gpus(field: str) -> str:
    """What nvidia-smi says of the GPUs here, a line for each; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={field}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout


class Prerequisites(NamedTuple):
    torch: Path
    torch_version: str
    cmake: str
    ninja: str
    pybind11: str  # the folder of its CMake configuration
    nvcc: Path | None
    missing_cuda: str | None  # where there is no nvcc, though torch has CUDA


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
    nvcc = None if cuda_setting() == "OFF" else find_nvcc(torch)
    cuda = missing_cuda(torch)
    if cuda and cuda_setting() == "ON":
        fail(f"ACCUMLOSS_CUDA=ON, but nvcc was not found: {how_to_get_nvcc(cuda)}, or set CUDACXX to one")
    return Prerequisites(torch, version, cmake, ninja, pybind11.get_cmake_dir(), nvcc, cuda)


def build(destination: Path) -> None:
    """Builds _C and puts it into a folder. A second build with the same settings is incremental."""
    torch, version, cmake, ninja, pybind11, nvcc, cuda = prerequisites()
    if cuda:
        notice(
            f"torch has CUDA {cuda}, but nvcc was not found: this build is for the CPU alone. For CUDA kernels "
            f"{how_to_get_nvcc(cuda)}, then install again; ACCUMLOSS_CUDA=OFF, where none are wanted"
        )
    environment = dict(os.environ)
    if nvcc and nvcc.parents[2].name == "nvidia":  # a wheel's, which looks into lib64 for what lies in lib
        libraries = [str(nvcc.parents[1] / "lib"), os.environ.get("LIBRARY_PATH", "")]
        environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    directory = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{version}"
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja"),
        # All paths are given, so that none is remembered from an isolated build whose folder is gone.
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11}",
        f"-DACCUMLOSS_TORCH_DIR={torch}",
        f"-DACCUMLOSS_NVCC={nvcc or ''}",
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    programs = [shutil.which(name) for name in ("c++", "nvcc")]
    settings = json.dumps(
        [configure, version, programs, query_gpus("compute_cap"), {name: os.environ.get(name) for name in ENVIRONMENT}]
    )
    previous = directory / "settings.json"
    same = previous.is_file() and previous.read_text() == settings
    run([*configure, *([] if same else ["--fresh"])], environment)
    previous.write_text(settings)
    run([cmake, "--build", str(directory)], environment)
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
