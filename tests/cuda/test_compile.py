"""nvcc takes the CUDA sources for every architecture without a warning, and no kernel spills registers."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest

CUDA = pathlib.Path(__file__).resolve().parents[2] / "csrc" / "cuda"
ARCHITECTURES = ["80", "90", "100"]


def nvcc() -> str | None:
    places = [os.environ.get("CUDACXX")]
    places += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    places += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    output = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void (accumloss::cuda::)?|\(.*", "", line) for line in output.splitlines()]


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> registers, stack, spills, from the output of ptxas -v. Functions called count as theirs."""
    table: dict[tuple[str, str], dict[str, int]] = {}
    kernel = None
    spills = 0
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel, spills = found.groups(), 0
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills += int(found[2]) + int(found[3])
        elif kernel and (found := re.search(r"Used (\d+) registers", line)):
            stack = re.search(r"(\d+) bytes cumulative stack", line)
            table[kernel] = {"registers": int(found[1]), "stack": int(stack[1]) if stack else 0, "spills": spills}
            kernel, spills = None, 0
    return table


def test_resources_reads_the_log_of_ptxas():
    log = """ptxas info    : Compiling entry function '_Zk' for 'sm_90'
ptxas info    : Function properties for _Zk
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size"""
    assert resources(log) == {("_Zk", "90"): {"registers": 64, "stack": 16, "spills": 12}}


SOURCES = {"cross_entropy.cu": ARCHITECTURES, "staged.cu": ["90", "100"]}


def compile_all(compiler: str, folder: pathlib.Path) -> dict[tuple[str, str], dict[str, int]]:
    """resources() of every kernel for every architecture that the compiler knows; fails at a warning."""
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    table = {}
    for source, wanted in SOURCES.items():
        architectures = [a for a in wanted if f"compute_{a}" in known]
        for missing in sorted(set(wanted) - set(architectures)):
            print(f"{compiler} does not know sm_{missing}")
        command = [compiler, "-std=c++17", "-O3", "--threads", "2", "--ptxas-options=-v", "-Xcompiler=-Wall,-Wextra"]
        command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
        command += ["-c", str(CUDA / source), "-o", str(folder / "kernels.o")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        log = result.stdout + result.stderr
        assert "warning" not in log, log
        found = resources(log)
        kernels = {kernel for kernel, _ in found}
        assert len(found) == len(kernels) * len(architectures) > 0
        table.update(found)
    names = sorted({kernel for kernel, _ in table})
    short = dict(zip(names, demangle(names), strict=True))
    return {(short[kernel], a): row for (kernel, a), row in table.items()}


def test_kernels_compile_without_spills(tmp_path):
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc")
    table = compile_all(compiler, tmp_path)
    assert all("staged" not in name for name, a in table if a == "80")
    assert any("staged" in name for name, _ in table)
    spilled = {kernel: row for kernel, row in table.items() if row["spills"]}
    assert not spilled, spilled
