"""Where figures come from, and how they are kept: a CSV, and a JSON of the same name with the environment."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def environment() -> dict[str, object]:
    """Where the figures come from."""
    import torch

    import accumloss

    try:
        import transformers

        transformers_version = transformers.__version__
    except ImportError:
        transformers_version = None
    model = platform.processor()
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), model)
    return {
        "device": "cpu",
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "accumloss": accumloss.__version__,
        "build": accumloss.build_info(),
    }


def refuse_fallback(device: str) -> None:
    """SystemExit where no kernel of ours serves a device: figures of plain PyTorch in their place are none of ours."""
    from accumloss import fallback

    found = fallback.reason(device)
    if found is not None:
        raise SystemExit(f"benchmarks: expected a device with kernels, got {device}: {found.why}; {found.remedy}")


def commit() -> str | None:
    """The commit that is checked out, marked where files differ from it; None outside a repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def origin(script: str, arguments: Sequence[str]) -> dict[str, object]:
    """The commit, the command and the hour of a run that begins."""
    return {
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{script}", *arguments]),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_csv(file: Path, fields: Sequence[str], lines: Iterable[Mapping[str, object]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_whole(file, text.getvalue())


def write_whole(file: Path, text: str) -> None:
    """All of the text or nothing, also where the process is killed: what was there before stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text)
    part.replace(file)


def write(
    folder: Path, name: str, fields: Sequence[str], lines: Iterable[Mapping[str, object]], facts: Mapping[str, object]
) -> tuple[Path, Path]:
    """The table and the notes.

    Raises:
        RuntimeError: plain PyTorch has stood in for a kernel in this process.
    """
    from accumloss import fallback

    if fallback.served:
        raise RuntimeError(f"benchmarks: expected kernels alone, got plain PyTorch on {', '.join(fallback.served)}")
    table, notes = folder / f"{name}.csv", folder / f"{name}.json"
    write_csv(table, fields, lines)
    write_whole(notes, json.dumps(facts, indent=2) + "\n")
    return table, notes


def read_csv(file: Path) -> list[dict]:
    """The lines of a table that write_csv() has written, numbers as numbers; an empty cell is None, `missing` a text."""

    def value(key: str, cell: str) -> object:
        if key == "missing":
            return cell
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(cell)
        return cell or None

    with file.open(newline="") as stream:
        return [{key: value(key, cell) for key, cell in line.items()} for line in csv.DictReader(stream)]


def goals_table(goals: Iterable[tuple[str, str, str, bool]], title: str = "") -> list[str]:
    """Lines of Markdown: what is measured, the goal, the measurement, whether it is reached."""
    head = f"| {title} | goal | measured | |" if title else "| | goal | measured | |"
    lines = [f"| {what} | {goal} | {got} | {'reached' if ok else 'missed'} |" for what, goal, got, ok in goals]
    return [head, "|---|---|---|---|", *lines]
