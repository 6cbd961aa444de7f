"""The build: one line where it cannot work, the right files in the sdist, a module inside the stable ABI."""

import ast
import concurrent.futures
import contextlib
import importlib.metadata
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "build_tools"


def run_python(code, **environment):
    """Runs code with build_tools on the path and the environment changed: None removes a variable."""
    unset = dict.fromkeys(["ACCUMLOSS_CUDA", "CXX", "CMAKE_ARGS", "UV"])
    merged = {**os.environ, **unset, **environment}
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TOOLS)!r})\n{code}"],
        capture_output=True,
        text=True,
        env={name: str(value) for name, value in merged.items() if value is not None},
        start_new_session=True,  # what is said to the terminal stays away from that of the tests
    )


def assert_one_line(result, *parts):
    """Failed, with one line on stderr that holds the parts: no traceback."""
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("accumloss: ")
    for part in parts:
        assert part in result.stderr


def make_program(folder, name, script):
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


def make_torch(folder, version, cuda=None):
    folder.mkdir()
    cuda = f"cuda: Optional[str] = {cuda!r}"  # as torch writes it
    (folder / "version.py").write_text(f"__version__ = '{version}'\n{cuda}\nhip: Optional[str] = None\n")
    return folder


REQUIRES = "import native; print(native.missing_requirements())"
BUILD = "import native, pathlib; native.build(pathlib.Path('/nowhere'))"


@pytest.mark.parametrize("code", [REQUIRES, BUILD])
@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cu128"])
def test_build_refuses_old_torch(tmp_path, code, version):
    torch = make_torch(tmp_path / "torch", version)
    assert_one_line(run_python(code, ACCUMLOSS_TORCH_DIR=torch), "torch 2.10 or newer", version, "pip install -U torch")


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0", "2.16.0a0+git1234567"])
def test_build_takes_new_torch(tmp_path, version):
    torch = make_torch(tmp_path / "torch", version)
    for given in (torch, tmp_path):
        code = "import native; print(native.torch_version(native.find_torch()))"
        result = run_python(code, ACCUMLOSS_TORCH_DIR=given)
        assert result.stdout.strip() == version, result.stderr


def test_build_refuses_torch_dir_without_torch(tmp_path):
    assert_one_line(run_python(REQUIRES, ACCUMLOSS_TORCH_DIR=tmp_path), "ACCUMLOSS_TORCH_DIR", str(tmp_path))


def test_build_without_torch_says_what_to_install():
    result = run_python(f"import native; native.find_torch = lambda: None; {BUILD}")
    assert_one_line(result, "torch 2.10 or newer", "pip install torch", "ACCUMLOSS_TORCH_DIR")


@pytest.mark.parametrize("code", [REQUIRES, BUILD])
def test_build_without_compiler_says_what_to_install(tmp_path, code):
    assert_one_line(run_python(code, PATH=tmp_path), "C++17 compiler", "apt install g++")
    assert_one_line(run_python(code, CXX="/nowhere/c++ -O1"), "CXX=/nowhere/c++ was not found")


@pytest.mark.parametrize("code", [REQUIRES, BUILD])
def test_build_says_in_one_line_what_is_wrong_with_a_compiler(code):
    assert_one_line(
        run_python(code, CXX="g++ 'unfinished"), "CXX=g++ 'unfinished is no command", "No closing quotation"
    )
    assert_one_line(
        run_python(code, CMAKE_ARGS="-DX='open"), "CMAKE_ARGS=-DX='open is no command", "No closing quotation"
    )
    assert_one_line(
        run_python(code, CUDACXX="/nowhere/nvcc"), "CUDACXX=/nowhere/nvcc was not found", "ACCUMLOSS_CUDA=OFF"
    )
    assert_one_line(run_python("import sys; sys.platform = 'darwin'; " + code), "Linux on x86_64 or aarch64", "darwin")


def test_blank_variables_are_as_if_they_were_not_set(tmp_path):
    """Here and in CMake, which inherits them: all that are read, with spaces or nothing in them."""
    code = "import native, os; print(native.missing_requirements(), sorted(os.environ), native.cuda_setting())"
    names = re.findall(
        r'"([A-Z][A-Z_]+)"', re.search(r"^ENVIRONMENT = .*\n.*", (TOOLS / "native.py").read_text(), re.M)[0]
    )
    assert {"CXX", "CUDACXX", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "ACCUMLOSS_CUDA"} <= set(names)
    names += ["ACCUMLOSS_TORCH_DIR", "CMAKE_ARGS"]
    bare = run_python(code, **dict.fromkeys(names))
    assert bare.returncode == 0, bare.stderr
    for blank in ("   ", "\t", ""):
        assert run_python(code, **dict.fromkeys(names, blank)).stdout == bare.stdout
    assert "'AUTO'" not in bare.stdout and bare.stdout.rstrip().endswith("AUTO")


def test_the_matrix_takes_a_python_by_a_relative_path(tmp_path):
    """make gives it that of .venv; each way runs in a folder of its own."""
    (tmp_path / "bin").mkdir()
    script = 'echo "$*" >> "$(dirname "$0")/asked"; case "$1" in *native.py) echo /nowhere/torch;; *) exit 1;; esac'
    make_program(tmp_path / "bin", "python", script)
    environment = {**os.environ, "PYTHON": "bin/python", "WHERE": str(tmp_path / "ways")}
    command = [str(TOOLS / "matrix.sh"), "uv"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1 and "| uv " in ran.stdout, ran
    asked = (tmp_path / "bin" / "asked").read_text().splitlines()
    assert asked[-1] == f"-m venv {tmp_path}/ways/uv/venv"
    environment["PYTHON"] = "no-such-python"
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == "matrix: PYTHON=no-such-python was not found\n"


def test_builds_of_one_folder_wait_for_each_other(tmp_path):
    code = f"""
import native, pathlib, time
seen = pathlib.Path({str(tmp_path)!r})
with native.alone():
    assert not (seen / "inside").exists()
    (seen / "inside").touch()
    time.sleep(0.5)
    (seen / "inside").unlink()"""
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda _: run_python(code, TMPDIR=tmp_path), range(3)))
    assert [result.returncode for result in results] == [0, 0, 0], [result.stderr for result in results]
    assert sum("waiting for another build" in result.stdout for result in results) >= 1


def test_a_read_only_source_folder_is_built_in_a_copy(tmp_path):
    (tmp_path / "csrc").mkdir()
    for name in ("setup.py", "csrc/row.h"):
        (tmp_path / name).write_text(name)
    code = f"""
import native, os, pathlib
native.ROOT = own = pathlib.Path({str(tmp_path)!r})
os.chdir(own)
os.access = lambda path, mode: False
with native.writable():
    assert native.ROOT != own and pathlib.Path.cwd() == native.ROOT
    assert (native.ROOT / "csrc" / "row.h").read_text() == "csrc/row.h"
    (native.ROOT / "build").mkdir()
assert native.ROOT == own and pathlib.Path.cwd() == own and not (own / "build").exists()"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_an_editable_install_of_a_read_only_folder_is_refused():
    code = """
import native, os
native.prerequisites = lambda: None
os.access = lambda path, mode: False
import accumloss_backend
accumloss_backend.build_editable(".")"""
    assert_one_line(run_python(code), "an editable install writes into", "read-only", "pip install .")


def test_build_without_cmake_says_what_to_install(tmp_path):
    make_program(tmp_path, "c++", "exit 0")
    hidden = f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}; "
    assert_one_line(run_python(hidden + BUILD, PATH=tmp_path), "cmake is needed: pip install cmake")


def test_isolated_build_requires_only_what_is_missing(tmp_path):
    make_program(tmp_path, "c++", "exit 0")
    torch = make_torch(tmp_path / "torch", "2.13.0")
    hidden = f"import sysconfig; sysconfig.get_path = lambda name: {str(tmp_path)!r}; "
    result = run_python(hidden + REQUIRES, PATH=tmp_path, ACCUMLOSS_TORCH_DIR=torch)
    assert result.stdout.strip() == "['cmake>=3.24', 'ninja>=1.10']", result.stderr
    make_program(tmp_path, "cmake", "echo cmake version 4.4.4")
    make_program(tmp_path, "ninja", "echo 1.11.1")
    result = run_python(hidden + REQUIRES, PATH=tmp_path, ACCUMLOSS_TORCH_DIR=torch)
    assert result.stdout.strip() == "[]", result.stderr
    result = run_python("import native; native.find_torch = lambda: None; " + hidden + REQUIRES, PATH=tmp_path)
    assert result.stdout.strip() == "['torch>=2.10']", result.stderr


# On a machine without nvcc, whose pip is a program of the test's.
NO_NVCC = "import native; native.DEFAULT_TOOLKIT = '/nowhere'; "
WHEELS_13_0 = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime")]
WHEELS_13_2 = [wheel.replace("13.0", "13.2") for wheel in WHEELS_13_0]


def without_nvcc(tmp_path, cuda, driver="", fetches=True):
    """The environment of a machine with a torch, perhaps a driver, and no nvcc."""
    programs = {"c++": "exit 0", "cmake": "echo cmake version 4.0.0", "ninja": "echo 1.11.1"}
    programs["uv"] = f"/bin/cat > {tmp_path}/asked; exit {int(not fetches)}"
    programs["nvidia-smi"] = f"echo {driver}"
    for name, script in programs.items():
        make_program(tmp_path, name, script)
    torch = make_torch(tmp_path / "torch", "2.13.0", cuda)
    unset = dict.fromkeys(["CUDACXX", "CUDA_HOME", "CUDA_PATH"])
    return {**unset, "PATH": tmp_path, "UV": tmp_path / "uv", "ACCUMLOSS_TORCH_DIR": torch}


@pytest.mark.parametrize(
    ("cuda", "setting", "driver", "expected"),
    [
        ("13.0", "AUTO", "", WHEELS_13_0),
        ("13.2", "AUTO", "", WHEELS_13_2),
        ("12.8", "AUTO", "580.65.06", WHEELS_13_0),  # runs CUDA 13's code beside a torch of CUDA 12
        ("12.8", "AUTO", "570.133.07", []),  # NVIDIA's wheels of CUDA 12 hold no nvcc
        (None, "AUTO", "580.65.06", []),
        (None, "ON", "", WHEELS_13_0),
        ("13.0", "OFF", "", []),
    ],
)
def test_isolated_build_requires_nvcc_where_torch_has_cuda(tmp_path, cuda, setting, driver, expected):
    environment = without_nvcc(tmp_path, cuda, driver)
    result = run_python(NO_NVCC + "print(native.missing_requirements())", **environment, ACCUMLOSS_CUDA=setting)
    assert result.returncode == 0, result.stderr
    *said, required = result.stdout.splitlines()
    wheels = [*expected, "nvidia-cuda-cccl==13.*"] if expected else []
    assert sorted(ast.literal_eval(required)) == sorted(wheels)
    assert len(said) == bool(wheels)
    if wheels:
        assert all(wheel in said[0] for wheel in wheels) and "ACCUMLOSS_CUDA=OFF" in said[0]
        assert sorted((tmp_path / "asked").read_text().split()) == sorted(wheels)


def test_isolated_build_requires_no_nvcc_that_is_there_or_cannot_be_had(tmp_path):
    code = NO_NVCC + "print(native.missing_requirements())"
    offline = without_nvcc(tmp_path, "13.0", fetches=False)
    assert run_python(code, **offline).stdout == "[]\n"
    make_program(tmp_path, "uv", "exit 0")
    assert "nvidia-cuda-nvcc" in run_python(code, **offline).stdout
    make_program(tmp_path, "nvcc", "exit 0")
    assert run_python(code, **offline).stdout == "[]\n"


def test_nvcc_of_wheels_is_found_beside_torch_where_they_are_complete(tmp_path):
    environment = without_nvcc(tmp_path, "13.0")
    files = ["bin/nvcc", "include/crt/host_config.h", "nvvm/bin/cicc", "include/nv/target", "lib/libcudart_static.a"]
    toolkit = tmp_path / "nvidia" / "cu13"
    code = NO_NVCC + "print(native.find_nvcc(native.find_torch()))"
    for name in files:
        assert run_python(code, **environment).stdout == "None\n"
        (toolkit / name).parent.mkdir(parents=True, exist_ok=True)
        (toolkit / name).touch()
    assert run_python(code, **environment).stdout == f"{toolkit}/bin/nvcc\n"


def test_pip_says_whether_it_can_fetch(tmp_path):
    """The installed pip, of a folder instead of an index."""
    # Neither imported nor searched for: setuptools would give up its distutils in this process.
    if not list(importlib.metadata.distributions(name="pip")):
        pytest.skip("pip is not installed")
    code = "import native; print(native.can_fetch(['accumloss-nowhere==13.0.*']))"
    pip = {"PIP_NO_INDEX": 1, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": tmp_path, "VIRTUAL_ENV": None}
    refused = run_python(code, **pip)
    assert refused.stdout.endswith("False\n"), refused.stderr
    with zipfile.ZipFile(tmp_path / "accumloss_nowhere-13.0.1-py3-none-any.whl", "w") as wheel:
        info = "accumloss_nowhere-13.0.1.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: accumloss-nowhere\nVersion: 13.0.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    assert run_python(code, **pip).stdout.endswith("True\n")


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [("13.0", "pip install 'nvidia-cuda-nvcc==13.0.*'"), ("12.8", "cuda-toolkit-12-8")],
)
def test_build_without_nvcc_goes_on_for_the_cpu_and_says_so(tmp_path, cuda, remedy):
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    environment = without_nvcc(tmp_path, cuda)
    code = f"""{NO_NVCC}
import pathlib, unittest.mock
native.ROOT, native.run = pathlib.Path({str(tmp_path)!r}), unittest.mock.Mock()
(native.ROOT / "build" / f"{{sys.implementation.cache_tag}}-torch2.13.0").mkdir(parents=True, exist_ok=True)
native.build(native.ROOT)
print(native.run.call_count, "-DACCUMLOSS_NVCC=" in native.run.call_args_list[0].args[0])"""
    result = run_python(code, **environment)
    said, calls = result.stdout.splitlines()
    assert calls == "3 True", result.stderr  # configured, built, installed
    assert f"torch has CUDA {cuda}, but nvcc was not found: this build is for the CPU alone" in said
    assert remedy in said and "ACCUMLOSS_CUDA=OFF" in said
    assert_one_line(run_python(code, **environment, ACCUMLOSS_CUDA="ON"), "ACCUMLOSS_CUDA=ON, but nvcc", remedy)


def test_what_pip_hides_reaches_the_terminal():
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import native; native.notice('built for the CPU')"
    child, terminal = pty.fork()
    if child == 0:
        with open(os.devnull, "w") as pipe:  # as pip runs a backend
            os.dup2(pipe.fileno(), 1)
        os.execv(sys.executable, [sys.executable, "-c", code])
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while read := os.read(terminal, 1024):
            seen += read
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert b"\naccumloss: built for the CPU" in seen, seen


def test_a_build_without_kernels_says_so_at_import_and_once(monkeypatch):
    import torch

    from accumloss import cuda, fallback

    def facts(without_cuda):
        return types.SimpleNamespace(build_info=lambda: {"without_cuda": without_cuda, "cuda_architectures": None})

    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(cuda, "_C", facts("nvcc was not found"))
    monkeypatch.setattr(fallback, "_C", facts("nvcc was not found"))
    monkeypatch.setattr(fallback, "announced", set())
    monkeypatch.setattr(fallback, "served", {})
    cuda.warn_without_kernels()  # a warning would be an error
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    said = "nvcc was not found; torch has CUDA 13.0 and sees a GPU"
    with pytest.warns(fallback.FallbackWarning, match=said) as caught:
        importlib.reload(sys.modules["accumloss"])
    assert len(caught) == 1
    gpu = torch.device("cuda", 0)
    fallback._announce("cross_entropy", gpu)  # the first use: a warning would be an error
    assert "nvcc was not found" in fallback.served["cuda"]
    monkeypatch.setenv("ACCUMLOSS_FALLBACK", "error")
    cuda.warn_without_kernels()  # the first use raises
    with pytest.raises(RuntimeError, match="ACCUMLOSS_FALLBACK=error, got cuda:0"):
        fallback._announce("cross_entropy", gpu)
    monkeypatch.setenv("ACCUMLOSS_FALLBACK", "  ")
    fallback._announce("cross_entropy", gpu)  # as good as not set
    monkeypatch.delenv("ACCUMLOSS_FALLBACK")
    for others in ("ACCUMLOSS_CUDA=OFF", None):
        monkeypatch.setattr(cuda, "_C", facts(others))
        cuda.warn_without_kernels()
    fallback.announced.clear()
    fallback.served.clear()
    with pytest.warns(fallback.FallbackWarning, match="built without CUDA"):  # of which nothing was said at import
        fallback._announce("cross_entropy", gpu)


def test_find_tool_passes_over_broken_and_old(tmp_path):
    scripts = {"broken": "exit 1", "old": "echo cmake version 3.18.4", "good": "echo cmake version 3.24.0"}
    for name, script in scripts.items():
        (tmp_path / name).mkdir()
        make_program(tmp_path / name, "cmake", script)
    path = os.pathsep.join(str(tmp_path / name) for name in scripts)
    result = run_python("import native; print(native.find_tool('cmake'))", PATH=path)
    assert result.stdout.strip() == str(tmp_path / "good" / "cmake"), result.stderr


def configure(tmp_path, *arguments, **environment):
    """CMake's configuration of this project, by the function that the build uses, into a folder of its own."""
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    code = f"""
import native, pybind11
cmake, ninja = native.find_tool("cmake"), native.find_tool("ninja")
native.run([
    cmake, "-S", {str(ROOT)!r}, "-B", {str(tmp_path / "build")!r}, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={{ninja}}",
    f"-DPython_EXECUTABLE={{sys.executable}}", f"-Dpybind11_DIR={{pybind11.get_cmake_dir()}}",
    f"-DACCUMLOSS_TORCH_DIR={{native.find_torch()}}", *{list(arguments)!r}])"""
    unset = dict.fromkeys(["CUDACXX", "CUDAHOSTCXX", "CUDAARCHS", "TORCH_CUDA_ARCH_LIST"])
    return run_python(code, **{**unset, **environment})


def test_configure_broken_nvcc_is_an_error_that_names_the_way_out(tmp_path):
    nvcc = make_program(tmp_path, "nvcc", "echo this nvcc is broken; exit 3")
    result = configure(tmp_path, ACCUMLOSS_CUDA="AUTO", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert_one_line(result, f"{nvcc} cannot compile", "ACCUMLOSS_CUDA=OFF")
    assert "this nvcc is broken" in result.stdout


def test_configure_cuda_on_needs_nvcc(tmp_path):
    hidden = [folder for folder in [*os.get_exec_path(), "/usr/local/cuda/bin"] if Path(folder, "nvcc").exists()]
    result = configure(
        tmp_path, f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}", ACCUMLOSS_CUDA="ON", CUDA_HOME=None, CUDA_PATH=None
    )
    assert_one_line(result, "ACCUMLOSS_CUDA=ON", "nvcc was not found", "CUDACXX")
    # what native.py has not found CMake does not look for, in places of its own
    result = configure(tmp_path, "-DACCUMLOSS_CUDA=AUTO", "-DACCUMLOSS_NVCC=", "-DCMAKE_IGNORE_PATH=")
    assert "CPU only: nvcc was not found" in result.stdout, result.stdout + result.stderr


def test_configure_cuda_off_ignores_nvcc(tmp_path):
    make_program(tmp_path, "nvcc", "exit 3")
    result = configure(tmp_path, ACCUMLOSS_CUDA="OFF", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU only: ACCUMLOSS_CUDA=OFF" in result.stdout


def test_configure_takes_a_comma_and_a_space_in_the_path_of_torch(tmp_path):
    import torch

    place = tmp_path / "a, b" / "torch"
    place.parent.mkdir()
    place.symlink_to(Path(torch.__file__).parent)
    result = configure(tmp_path, f"-DACCUMLOSS_TORCH_DIR={place}", ACCUMLOSS_CUDA="OFF")
    assert result.returncode == 0, result.stdout + result.stderr
    (flags,) = re.findall(r"LINK_FLAGS = .*libtorch\.so.*", (tmp_path / "build" / "build.ninja").read_text())
    words = shlex.split(flags.replace("$ ", " "))
    assert f"{place}/lib/libtorch.so" in words and f"{place}/lib/libtorch_cpu.so" in words
    assert words[words.index("--push-state") - 1] == "-Xlinker"


def test_configure_refuses_unknown_cuda_setting(tmp_path):
    assert_one_line(configure(tmp_path, ACCUMLOSS_CUDA="yes"), "ACCUMLOSS_CUDA is AUTO, ON or OFF, got yes")


CUDA_13 = "compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_103 compute_120"
CUDA_12_4 = "compute_50 compute_70 compute_75 compute_80 compute_86 compute_89 compute_90"


@pytest.mark.parametrize(
    ("listed", "known", "gpus", "expected"),
    [
        (None, CUDA_13, "", "75-real;80-real;89-real;90-real;100;120-real"),
        (None, CUDA_12_4, "", "75-real;80-real;89-real;90"),
        (None, CUDA_13, "9.0", "90"),
        (None, CUDA_13, "8.9 12.0 8.9", "89;120"),
        (None, CUDA_12_4, "12.0", "75-real;80-real;89-real;90"),  # a GPU that is newer than nvcc takes the PTX
        ("8.0;9.0a+PTX", CUDA_13, "8.9", "80-real;90a"),
        ("8.6 12.0", CUDA_13, "", "86-real;120-real"),
    ],
)
def test_configure_cuda_architectures(tmp_path, listed, known, gpus, expected):
    # passes for a compiler until CMake asks it for its version
    make_program(tmp_path, "nvcc", f"printf '%s\\n' {known}")
    make_program(tmp_path, "nvidia-smi", f"printf '%s\\n' {gpus}" if gpus else "echo no devices were found; exit 6")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = configure(tmp_path, PATH=path, TORCH_CUDA_ARCH_LIST=listed)
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert f"CMAKE_CUDA_ARCHITECTURES:STRING={expected}\n" in cache, result.stdout


@pytest.fixture(scope="module")
def module():
    """The compiled module that is under test."""
    import torch  # noqa: F401  its libraries come first

    spec = importlib.util.find_spec("accumloss._C")
    assert spec
    assert spec.origin
    return Path(spec.origin)


def output_of(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_module_needs_libtorch_itself(module):
    needed = re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "-d", str(module)))
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)  # libtorch.so: the weak CUDA symbol is found through it
    unwanted = ("libc10", "libtorch_cuda", "libtorch_python", "libcudart", "libpython")
    assert [name for name in needed if name.startswith(unwanted)] == []


def test_module_stays_inside_the_stable_abi(module):
    import torch

    symbols = [line.split() for line in output_of("nm", "-D", "--undefined-only", str(module)).splitlines()]
    names = {symbol: kind for kind, symbol in symbols}
    assert [name for name in names if re.search(r"c10|2at[0-9]|N5torch", name)] == []
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    shims = "".join((include / p).read_text() for p in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h"))
    torch_names = [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
    assert torch_names
    assert [name for name in torch_names if not re.search(rf"\b{name}\b", shims)] == []
    # a build of torch for CPU has no other symbol of CUDA
    strong = {name for name, kind in names.items() if "cuda" in name and kind != "w"}
    assert strong <= {"aoti_torch_device_type_cuda"}


def test_module_exports_its_init_function_only(module):
    exported = output_of("nm", "-D", "--defined-only", str(module))
    assert " T PyInit__C" in exported
    assert "accumloss" not in exported
    assert not re.search(r" [TDB] (?!PyInit__C$|__bss_start$|_edata$|_end$)", exported, re.MULTILINE), exported


def test_instruction_sets_share_no_code():
    """A function that the linker may take from the AVX-512 object would end a run on a machine without AVX-512."""
    objects = sorted(ROOT.glob("build/*/CMakeFiles/row_kernels_*/csrc/cpu/rows/table.cpp.o"))
    if not objects:
        pytest.skip("no object files in build/: accumloss was built elsewhere")
    for path in objects:
        symbols = output_of("nm", "-C", "--defined-only", str(path))
        shared = re.findall(r"^.* [WVuT] .*$", symbols, re.MULTILINE)
        assert len(shared) == 1, (path, shared)  # its table of kernels


def test_every_source_is_built():
    description = (ROOT / "CMakeLists.txt").read_text()
    sources = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu"}
    ]
    assert sources
    assert [source for source in sources if source not in description] == []


def test_version_has_one_source():
    import accumloss

    in_pyproject = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert in_pyproject
    assert in_pyproject[1] == importlib.metadata.version("accumloss") == accumloss.build_info()["version"]


def test_every_error_of_the_build_is_in_its_documentation():
    cmake = re.findall(r'FATAL_ERROR "accumloss: ([^"]*)"', (ROOT / "CMakeLists.txt").read_text())
    messages = [[part for part in re.split(r"\$\{\w+\}", message) if part] for message in cmake]
    for path in TOOLS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("fail", "native.fail"):
                messages.append([part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)])
    # of each its first words that are more than a name, up to what is no longer the same in every case
    parts = [next((part for part in message if len(part) > 7), "") for message in messages]
    heads = {re.split("[:,(]", part)[0].strip() for part in parts} - {""}
    assert len(heads) > 12, heads
    documented = (ROOT / "docs" / "install.md").read_text()
    assert [head for head in heads if head not in documented] == []


def test_readme_for_an_index_has_nothing_relative():
    """By the metadata that setuptools makes."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 is not installed")
    code = "import runpy, setuptools; d = []; setuptools.setup = lambda **k: d.append(k); runpy.run_path('setup.py'); "
    made = subprocess.run(
        [sys.executable, "-c", code + "print(d[0]['long_description'])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", made, flags=re.MULTILINE | re.DOTALL)
    assert len(text) > 1000
    targets = re.findall(r"\]\(([^)]+)\)|(?:src|href)=[\"']([^\"']+)", text)
    assert [
        target for pair in targets for target in pair if target and not re.match(r"https?://|#|mailto:", target)
    ] == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("see [the `x`](docs/x.md#y).", "see the `x` (docs/x.md#y)."),
        ("[docs/x.md](docs/x.md), [`x.md`](x.md)", "docs/x.md, `x.md`"),
        ("[w](https://a.b/c) [t](#top)", "[w](https://a.b/c) [t](#top)"),
        ("a![p](a.png)b<img width=3 src='b.png'>c", "abc"),
        (
            '![p](https://a.b/c.png) <img src="https://a.b/d.png">',
            '![p](https://a.b/c.png) <img src="https://a.b/d.png">',
        ),
        ("`x[i](j)`\n```python\nx[i](j)\n```\n[x](j)", "`x[i](j)`\n```python\nx[i](j)\n```\nx (j)"),
    ],
)
def test_readme_for_an_index(monkeypatch, written, shown):
    monkeypatch.syspath_prepend(str(TOOLS))
    assert importlib.import_module("readme").for_an_index(written) == shown


def test_workflow_of_the_wheels_agrees_with_the_project(tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    path = ROOT / ".github" / "workflows" / "wheels.yml"
    jobs = yaml.safe_load(path.read_text())["jobs"]
    kinds = jobs["wheels"]["strategy"]["matrix"]["include"]
    assert {kind["contents"]: (kind["environment"], kind["label"]) for kind in kinds} == {
        "cuda13": ("ACCUMLOSS_CUDA=ON", ""),
        "cpu": ("ACCUMLOSS_CUDA=OFF", "+cpu"),
    }
    assert "Not run:" in path.read_text().partition("\nname:")[0]
    # its label is a version that CMake and setuptools read
    (relabel,) = [step["run"] for step in jobs["wheels"]["steps"] if step.get("name") == "Label the version"]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(relabel.replace("${{ matrix.label }}", "+cpu"), shell=True, check=True, cwd=tmp_path)
    labelled = (tmp_path / "pyproject.toml").read_text()
    assert re.search(r'^version = "[0-9.]+\+cpu"$', labelled, re.MULTILINE)
    assert labelled.replace("+cpu", "") == (ROOT / "pyproject.toml").read_text().replace("+cpu", "")
    # the Pythons of the wheels are those of the classifiers
    (built,) = re.findall(r'^build = "cp3\{([0-9,]+)\}-manylinux_x86_64"$', labelled, re.MULTILINE)
    assert built.split(",") == re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', labelled)


def test_no_dependency_has_an_upper_bound():
    """A release that is out cannot take one back; what the tests need is theirs."""
    for requirement in importlib.metadata.requires("accumloss"):
        wanted, _, marker = requirement.partition(";")
        if not re.search(r"extra == .(test|dev|wheel|bench|cuda-report).", marker):
            assert "<" not in wanted and "==" not in wanted, requirement


def test_sdist_holds_what_a_build_needs(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 is not installed")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = "import sys; sys.path.insert(0, 'build_tools'); import accumloss_backend as b; b.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=source)
    (archive,) = (source / "dist").glob("accumloss-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("accumloss", "build_tools", "csrc", "docs", "examples", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so"}
    }
    wanted |= {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "Makefile", "CHANGELOG.md"}
    wanted |= {"zensical.toml"}
    assert wanted - held == set()
    assert [name for name in held if name.endswith((".so", ".pyc", ".o"))] == []
