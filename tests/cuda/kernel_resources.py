"""What nvcc makes of the kernels: registers, shared memory and spills. `make cuda-report` writes it into docs/performance.md."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- make cuda-report: begin -->", "<!-- make cuda-report: end -->"
CUDA = ROOT / "csrc" / "cuda"
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
    return [re.sub(r"^void |accumloss::cuda::|\(.*", "", line) for line in output.splitlines()]


def resources(log: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> registers, shared (static), stack, spills, from the output of ptxas -v.

    Functions that are called count as their kernel's.
    """
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
            shared = re.search(r"(\d+) bytes smem", line)
            table[kernel] = {
                "registers": int(found[1]),
                "shared": int(shared[1]) if shared else 0,
                "stack": int(stack[1]) if stack else 0,
                "spills": spills,
            }
            kernel, spills = None, 0
    return table


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


def report(compiler: str) -> str:
    """The two tables in Markdown."""
    import accumloss

    with tempfile.TemporaryDirectory() as folder:
        table = compile_all(compiler, pathlib.Path(folder))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    lines = [
        f"Registers a thread, nvcc {release[1] if release else '?'}. Template arguments: element type, general (transform, "
        "smoothing or metrics), with gradient, held or the group.",
        "",
        "| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " | static shared | stack | spills |",
        "|---|" + "---:|" * (len(ARCHITECTURES) + 3),
    ]
    for kernel in sorted({kernel for kernel, _ in table}):
        rows = [table.get((kernel, a)) for a in ARCHITECTURES]
        registers = " | ".join(str(row["registers"]) if row else "–" for row in rows)
        worst = [max(row[name] for row in rows if row) for name in ("shared", "stack", "spills")]
        lines.append(f"| `{kernel}` | {registers} | " + " | ".join(map(str, worst)) + " |")
    lines += [
        "",
        "Plans with gradient, `accumloss.plan(V, dtype, arch=...)`: kernel, threads × blocks of a cluster, dynamic shared "
        "memory of a block, bytes of device memory an element.",
        "",
        "| V, dtype | sm_80 | sm_90, sm_100 |",
        "|---|---|---|",
    ]
    import torch

    for V in (2, 1000, 4096, 32000, 50257, 128256, 151936, 262144):
        for name in ("bfloat16", "float32"):
            cells = []
            for arch in ("sm_80", "sm_90"):
                plan = accumloss.plan(V, getattr(torch, name), arch=arch)
                stages = f", {plan.stages} stages" if plan.stages else ""
                kib = plan.shared_bytes / 1024
                cells.append(
                    f"{plan.kernel} {plan.threads} × {plan.cluster}{stages}, {kib:.1f} KiB, {plan.bytes_per_element:g}"
                )
            lines.append(f"| {V}, {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("make cuda-report: expected nvcc on PATH, in CUDACXX or CUDA_HOME, found none")
    text = report(compiler)
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1])
    print(text)


if __name__ == "__main__":
    main()
