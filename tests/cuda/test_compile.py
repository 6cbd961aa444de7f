"""nvcc takes the CUDA sources for every architecture without a warning, and no kernel spills registers."""

from __future__ import annotations

import re

import pytest
from kernel_resources import BEGIN, END, PAGE, compile_all, nvcc, resources


def test_resources_reads_the_log_of_ptxas():
    log = """ptxas info    : Compiling entry function '_Zk' for 'sm_90'
ptxas info    : Function properties for _Zk
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size"""
    assert resources(log) == {("_Zk", "90"): {"registers": 64, "shared": 0, "stack": 16, "spills": 12}}


def test_kernels_compile_without_spills(tmp_path):
    compiler = nvcc()
    if compiler is None:
        pytest.skip("no nvcc")
    table = compile_all(compiler, tmp_path)
    assert all("staged" not in name for name, a in table if a == "80")
    assert any("staged" in name for name, _ in table)
    spilled = {kernel: row for kernel, row in table.items() if row["spills"]}
    assert not spilled, spilled
    listed = PAGE.read_text().split(BEGIN)[1].split(END)[0]
    assert set(re.findall(r"^\| `(.+?)` \|", listed, re.MULTILINE)) == {k for k, _ in table}, "make cuda-report"
