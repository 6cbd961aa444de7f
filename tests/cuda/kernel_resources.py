"""What nvcc makes of the kernels: registers, shared memory and spills. `make cuda-report` writes it into docs/internals/cuda-model.md."""

from __future__ import annotations

import functools
import os
import pathlib
import re
import shutil
import subprocess
import textwrap
from typing import NamedTuple

import build_cache
import cost_model
import head_model
import ptx
import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "internals" / "cuda-model.md"
BEGIN, END = "<!-- make cuda-report: begin -->", "<!-- make cuda-report: end -->"
HEAD_BEGIN, HEAD_END = "<!-- make cuda-report, head: begin -->", "<!-- make cuda-report, head: end -->"
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ["75", "80", "90", "100", "120"]


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


SOURCES = {"cross_entropy.cu": ARCHITECTURES, "staged.cu": ["90", "100"], "pairs.cu": ARCHITECTURES}


def source_of(kernel: str) -> str:
    return {"staged": "staged.cu", "distil": "pairs.cu", "target": "pairs.cu"}.get(kernel[:6], "cross_entropy.cu")


class Compiled(NamedTuple):
    """What nvcc and ptxas make of one source for one architecture; names as they are demangled."""

    ptx: dict[str, ptx.Kernel]
    resources: dict[str, dict[str, int]]
    cubin: pathlib.Path

    def sass(self) -> dict[str, sass.Kernel]:
        """The machine code, where there is a disassembler."""
        found = sass.kernels(sass.disassembled(self.cubin))
        return dict(zip(demangle(list(found)), found.values(), strict=True))


def architectures(compiler: str) -> list[str]:
    """Those that the compiler knows: "75", "80", ..."""
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"compute_(\w+)", known)


@functools.cache  # of one process: what it reports is of one version of the sources
def compiled(compiler: str, source: pathlib.Path, architecture: str) -> Compiled:
    """PTX and resources of the kernels of a source, from the cache or made; fails at a warning, the host's included."""
    flags = ["-std=c++17", "-O3", "-Xcompiler=-Wall,-Wextra", "-Icsrc/cuda"]
    flags.append(f"-gencode=arch=compute_{architecture},code=compute_{architecture}")
    files = build_cache.sources(source, *ROOT.glob("csrc/*.h"), *CUDA.iterdir(), root=ROOT)
    assembler = pathlib.Path(compiler).resolve().parent / "ptxas"

    def make(folder: pathlib.Path) -> None:
        build_cache.unpack(files, folder / "sources")
        command = [compiler, *flags, "--keep", "--keep-dir", str(folder), "-c", str(source.relative_to(ROOT))]
        command += ["-o", str(folder / "host.o")]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder / "sources")
        assert made.returncode == 0, made.stderr
        assert "warning" not in made.stdout + made.stderr, made.stdout + made.stderr
        (text,) = folder.glob("*.ptx")
        for file in folder.iterdir():
            if file.is_file() and file != text:
                file.unlink()
        shutil.rmtree(folder / "sources")
        text.rename(folder / "kernels.ptx")
        command = [str(assembler), "-v", "-O3", f"-arch=sm_{architecture}", str(folder / "kernels.ptx")]
        command += ["-o", str(folder / "kernels.cubin")]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        assert "warning" not in made.stdout + made.stderr, made.stdout + made.stderr
        (folder / "ptxas.txt").write_text(made.stdout + made.stderr)

    contents = (build_cache.version_of(compiler), flags, source.name, files)
    folder = build_cache.built("nvcc-cubin", contents, make)
    kernels = ptx.kernels((folder / "kernels.ptx").read_text())
    used = {kernel: row for (kernel, _), row in resources((folder / "ptxas.txt").read_text()).items()}
    names = dict(zip(kernels, demangle(list(kernels)), strict=True))
    assert set(used) == set(kernels) and len(set(names.values())) == len(names)
    by_name = {names[k]: kernel for k, kernel in kernels.items()}
    return Compiled(by_name, {names[k]: row for k, row in used.items()}, folder / "kernels.cubin")


def compile_all(compiler: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> resources of all that the compiler knows."""
    known = architectures(compiler)
    table = {}
    for source, wanted in SOURCES.items():
        for architecture in wanted:
            if architecture not in known:
                print(f"{compiler} does not know sm_{architecture}")
                continue
            for kernel, row in compiled(compiler, CUDA / source, architecture).resources.items():
                table[kernel, architecture] = row
    return table


def compiled_by(compiler: str):
    """(source, architecture) -> Compiled, or None where it is not compiled for that."""
    known = architectures(compiler)

    def compiled_of(source: str, architecture: str) -> Compiled | None:
        if architecture not in SOURCES[source] or architecture not in known:
            return None
        return compiled(compiler, CUDA / source, architecture)

    return compiled_of


def head_report(compiler: str) -> str | None:
    """What head and loss together can reach, by the model of the loss kernels; None without a disassembler."""
    import accumloss

    if sass.nvdisasm() is None:
        return None
    compiled_of = compiled_by(compiler)
    of_gpu = str(cost_model.CODE_OF[cost_model.CHIPS[head_model.GPU].capability])
    found = cost_model.works(
        lambda source, architecture: compiled_of(source, architecture) if architecture == of_gpu else None
    )

    def share_of(V: int, parameters: cost_model.Parameters) -> float:
        return cost_model.share(found, cost_model.CHIPS[head_model.GPU], V, "with_grad", accumloss.plan, parameters)

    return "\n".join(head_model.report(share_of))


SHOWN = ("T4", "A100", "RTX 4090", "H200", "B200", "RTX 5090")


def report(compiler: str) -> str:
    """The two tables in Markdown."""
    import accumloss

    table = compile_all(compiler)
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
        "memory of a block, bytes of device memory an element, clusters (of one block: blocks) at once.",
        "",
        "| V, dtype | " + " | ".join(SHOWN) + " |",
        "|---|" + "---|" * len(SHOWN),
    ]
    import torch

    for V in (2, 1000, 4096, 32000, 50257, 128256, 151936, 262144):
        for name in ("bfloat16", "float32"):
            cells = []
            for gpu in SHOWN:
                plan = accumloss.plan(V, getattr(torch, name), arch=gpu)
                stages = f", {plan.stages} stages" if plan.stages else ""
                kib = plan.shared_bytes / 1024
                cells.append(
                    f"{plan.kernel} {plan.threads} × {plan.cluster}{stages}, {kib:.1f} KiB, {plan.bytes_per_element:g}, "
                    f"{plan.resident}"
                )
            lines.append(f"| {V}, {name} | " + " | ".join(cells) + " |")
    compiled_of = compiled_by(compiler)
    lines += ["", *(cost_model.report(compiled_of, accumloss.plan) if sass.nvdisasm() else ptx_report(compiled_of))]
    return "\n".join(lines)


def ptx_report(compiled_of) -> list[str]:
    """Where there is no disassembler: the loops as the compiler hands them to ptxas."""
    lines = [
        "PTX, as there was no nvdisasm to read the machine code (`pip install nvidia-cuda-nvdisasm`): instructions an "
        "element in the loops over a row, bf16 without options. ptxas makes more or fewer of them.",
        "",
        "| kernel, sm | reduces | writes |",
        "|---|---:|---:|",
    ]
    for architecture in cost_model.ARCHITECTURES:
        for kernel in cost_model.KERNELS:
            if (made := compiled_of(kernel.source, architecture)) is not None:
                reduces, writes = ptx.row_loops(made.ptx[kernel.entry], kernel.call == "with_grad")
                cells = f"{reduces:.2f} | {writes:.2f}" if writes else f"{reduces:.2f} | "
                lines.append(f"| {kernel.name}, {kernel.call}, {architecture} | {cells} |")
    return lines


def wrapped(text: str) -> str:
    """The paragraphs of a page at 100 columns; tables as they are."""
    parts = [
        part
        if part.startswith("|")
        else textwrap.fill(" ".join(part.split()), 100, break_long_words=False, break_on_hyphens=False)
        for part in text.split("\n\n")
    ]
    return "\n\n".join(parts)


def main() -> None:
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("make cuda-report: expected nvcc on PATH, in CUDACXX or CUDA_HOME, found none")
    for begin, text, end in (
        (BEGIN, report(compiler), END),
        (HEAD_BEGIN, head_report(compiler), HEAD_END),
    ):
        if text is None:
            print("no nvdisasm: what was said of the head stays")
            continue
        page = PAGE.read_text()
        before, rest = page.split(begin)
        text = wrapped(text)
        PAGE.write_text(before + begin + "\n" + text + "\n" + end + rest.split(end)[1])
        print(text)


if __name__ == "__main__":
    main()
