"""What a bug report needs: versions, the build, which kernels or what else serves each device, and what registering does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

from . import display
from .missing import Problem

SCHEMA = 1  # of environment(): raised where a key goes or changes its meaning, not where one comes
PACKAGES = ("transformers", "accelerate", "peft", "trl", "numpy")
VOCABULARIES = (32000, 128256)  # for which the kernels of a GPU are named


def report(as_json: bool = False, problem: Problem | None = None) -> int:
    """Prints all of it. Exit status: 1 where accumloss does not import, for the reason in ``problem``."""
    facts = environment(problem)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        shown = {name: text for name, text in lines(facts) if name != "accumloss"}
        first = f"accumloss {facts['accumloss']}" + ("" if problem is None else ", which does not import")
        print(display.answer(first, display.facts(shown)))
    return 0 if problem is None else 1


def environment(problem: Problem | None = None) -> dict[str, Any]:
    """All of it, as JSON has it; with a problem what can be known without the compiled module."""
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    return {
        "schema": SCHEMA,
        "accumloss": _version("accumloss") or "not installed" if problem is not None else _build()["version"],
        "import_error": None if problem is None else problem._asdict(),
        "python": platform.python_version(),
        "torch": torch and torch.__version__,
        "torch_cuda": torch and torch.version.cuda,
        "torch_hip": torch and torch.version.hip,
        "packages": {name: _version(name) for name in PACKAGES},  # None: not installed
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()) or None,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch and torch.get_num_threads(),
        "torch_cpu_capability": torch and torch.backends.cpu.get_cpu_capability(),
        "build": _build() if problem is None else {},
        "devices": [_cpu(problem), *(_accelerator(device, problem) for device in _accelerators())] if torch else [],
        "transformers": _registration(problem),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ACCUMLOSS_")},
    }


def _build() -> dict[str, Any]:
    from .ops import build_info

    return build_info()


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same to read: a name and a text for each line."""
    found: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name == "schema":
            continue
        if name == "devices":
            found += [(f"device {device['device']}", _device_line(device)) for device in value]
        elif name == "import_error":
            found += [(f"import {key}", text) for key, text in (value or {}).items()]
        elif name == "transformers":
            found.append(("registering", value["said"]))
        elif isinstance(value, dict):
            of_build = name == "build"
            found += [
                (f"build {key.replace('_', ' ')}" if of_build else key, _text(text)) for key, text in value.items()
            ]
        else:
            found.append((name.replace("_", " "), _text(value)))
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {text}" for key, text in value.items()) or "none"
    return "none" if value is None else str(value)


def _device_line(device: dict[str, Any]) -> str:
    name = f"{device['name']}" + (f", {device['capability']}" if device["capability"] else "")
    if device["served_by"] == "kernels":
        kernels = ", ".join(f"{kernel} for {of}" for of, kernel in device["kernels"].items())
        served = f"kernels ({kernels})"
    else:
        by = "plain PyTorch" if device["served_by"] == "fallback" else "nothing"
        served = f"{by}: {device['why']}; {device['remedy']}"
    free, total = device["free_bytes"], device["total_bytes"]
    memory = f"; {free / 2**30:.1f} of {total / 2**30:.1f} GiB free" if free is not None and total is not None else ""
    return f"{name}: {served}{memory}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or None


def _cpu(problem: Problem | None) -> dict[str, Any]:
    free = total = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(memory[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    return {
        "device": "cpu",
        "name": _cpu_model() or platform.machine(),
        "capability": None,
        "served_by": "kernels" if problem is None else "nothing",
        "kernels": {"any row": _build()["cpu_capability"]} if problem is None else {},
        "why": None if problem is None else _NOT_IMPORTED,
        "remedy": None if problem is None else problem.remedy,
        "free_bytes": free,
        "total_bytes": total,
    }


def _accelerators() -> list[Any]:
    """The devices that torch sees beside the CPU."""
    import torch

    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not torch.accelerator.is_available():
        return []
    current = torch.accelerator.current_accelerator()
    assert current is not None
    return [torch.device(current.type, index) for index in range(torch.accelerator.device_count())]


def _accelerator(device: Any, problem: Problem | None) -> dict[str, Any]:
    import torch

    name, capability = device.type, None
    free = total = None
    kernels: dict[str, str] = {}
    why = remedy = None
    of_type: Any = None
    try:
        of_type = torch.get_device_module(device)
        if problem is None:
            from . import fallback

            why, remedy = fallback.reason(device) or (None, None)
    except Exception as error:  # a GPU that is busy, or fell off
        why, remedy, of_type = f"{type(error).__name__}: {error}", "torch itself cannot ask it", None
    if problem is not None:
        why, remedy = _NOT_IMPORTED, problem.remedy
    with contextlib.suppress(
        Exception
    ):  # what a driver or a backend does not tell must not cost the rest of the report
        name = of_type.get_device_name(device)
    with contextlib.suppress(Exception):
        free, total = of_type.mem_get_info(device)
    if device.type == "cuda" and torch.version.hip is None and of_type is not None:
        major, minor = torch.cuda.get_device_capability(device)
        capability = f"sm_{major}{minor}"
        if why is None:
            from . import cuda

            kernels = {f"V = {V}": cuda.plan(V, arch=capability).kernel for V in VOCABULARIES}
    return {
        "device": str(device),
        "name": name,
        "capability": capability,
        "served_by": "nothing" if problem is not None else "kernels" if why is None else "fallback",
        "kernels": kernels,
        "why": why,
        "remedy": remedy,
        "free_bytes": free,
        "total_bytes": total,
    }


_NOT_IMPORTED = "accumloss does not import"


def _registration(problem: Problem | None) -> dict[str, Any]:
    """What register_with_transformers does in this environment: it is done, and taken back."""
    if problem is not None:
        installed = _version("transformers")
        return {
            "installed": installed,
            "tested": "not known",
            "losses": [],
            "warnings": [],
            "error": _NOT_IMPORTED,
            "said": f"not possible: {_NOT_IMPORTED}",
        }
    from .transformers import registered, registered_losses
    from .transformers.versions import TESTED

    facts: dict[str, Any] = {
        "installed": _version("transformers"),
        "tested": TESTED,
        "losses": [],
        "warnings": [],
        "error": None,
        "said": "",
    }
    if facts["installed"] is None:
        facts["error"] = "transformers is not installed"
    else:
        try:
            with warnings.catch_warnings(record=True) as told, registered():
                warnings.simplefilter("always")
                losses = registered_losses()
        except Exception as error:  # whatever a transformers that nobody has tried raises is the report
            facts["error"] = f"{type(error).__name__}: {error}"
        else:
            facts["losses"] = sorted(name for name, loss in losses.items() if loss.startswith("accumloss."))
            facts["warnings"] = [str(warning.message) for warning in told if "accumloss" in str(warning.message)]
    if facts["error"] is not None:
        facts["said"] = f"not possible: {facts['error']} ({TESTED} are tested)"
    else:
        facts["said"] = "; ".join(
            [
                f"replaces {', '.join(facts['losses'])} of transformers {facts['installed']} ({TESTED} are tested)",
                *facts["warnings"],
            ]
        )
    return facts
