"""No kernel reads or writes beside a tensor, by a single byte: the pages there are inaccessible."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().with_name("guard_pages.py")
SETS = ["portable", "avx2", "avx512"]


def run(name: str, *arguments: object, **environment: str) -> None:
    """A process that a fault may kill; its last line names the case."""
    result = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, check=False, cwd="/",
        env={**os.environ, "ACCUMLOSS_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    if "expected one of" in result.stderr:
        pytest.skip(f"this machine has no {name}")
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0 and last == ["all of them"], f"{result.returncode}: {last}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("name", SETS)
def test_nothing_beside_a_tensor_is_touched(name):
    run(name, 150, 0)


def test_a_byte_beside_a_tensor_kills():
    """The guards guard: one byte before it and one after it."""
    for at_end, offset in ((True, 12), (False, -1)):
        script = (
            "import ctypes, sys; sys.path.insert(0, sys.argv[1])\n"
            "import torch, guard_pages\n"
            f"x = guard_pages.Guarded(torch.zeros(3), {at_end}).tensor\n"
            "print(x.sum().item(), flush=True)\n"
            f"ctypes.string_at(x.data_ptr() + {offset}, 1)\n"
        )
        command = [sys.executable, "-c", script, str(PROGRAM.parent)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.stdout == "0.0\n" and result.returncode == -signal.SIGSEGV, result


@pytest.mark.slow("2000 more draws of the same")
@pytest.mark.parametrize("name", SETS)
def test_nothing_beside_any_of_many_tensors_is_touched(name):
    run(name, 2000, 1)


@pytest.fixture(scope="session")
def guard_malloc(tmp_path_factory):
    """The environment of a process that guards what it allocates, and keeps no memory."""
    if shutil.which("gcc") is None:
        pytest.skip("this machine has no gcc")
    library = tmp_path_factory.mktemp("guard") / "guard_malloc.so"
    source = PROGRAM.with_name("guard_malloc.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return {"LD_PRELOAD": str(library), "ACCUMLOSS_KEEP_MEMORY": "0"}


@pytest.mark.slow("2000 more draws of the same, and what is allocated")
@pytest.mark.parametrize("name", SETS)
def test_nothing_beside_an_output_is_touched(name, guard_malloc):
    run(name, 2000, 2, **guard_malloc)


@pytest.mark.slow("gradients of 32 MiB in all dtypes")
@pytest.mark.parametrize("name", SETS)
def test_nothing_beside_a_large_gradient_is_touched(name, guard_malloc):
    run(name, 0, 0, "large", **guard_malloc)


@pytest.mark.slow("what the two above rest on")
def test_a_byte_beside_an_output_kills(guard_malloc):
    """A write into the bytes that alignment leaves, and one into the page behind."""
    for size, offset, signals in ((60, 60, -signal.SIGABRT), (64, 64, -signal.SIGSEGV), (64, -1, -signal.SIGABRT)):
        script = (
            "import ctypes, torch\n"
            "libc = ctypes.CDLL(None)\n"
            "before = libc.guard_malloc(1)\n"
            f"x = torch.empty({size}, dtype=torch.uint8)\n"
            "assert libc.guard_malloc(0) > before\n"
            "print('guarded', flush=True)\n"
            f"ctypes.memset(x.data_ptr() + {offset}, 0, 1)\n"
            "del x\n"
        )
        environment = {**os.environ, **guard_malloc}
        command = [sys.executable, "-c", script]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.stdout == "guarded\n" and result.returncode == signals, (size, offset, result)
