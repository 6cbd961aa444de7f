"""The command line: python -m accumloss audit | demo | env."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import accumloss

from . import demo, display
from .auditing import command as audit_command


def environment() -> dict[str, Any]:
    """What matters when a result is compared or a bug reported: versions, build, machine."""
    has_cuda = torch.cuda.is_available()
    return {
        "accumloss": accumloss.__version__,
        "torch": torch.__version__,
        "transformers": _version("transformers"),  # None: not installed
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_cuda else [],
        "build": accumloss.build_info(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def print_environment(as_json: bool = False) -> int:
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    build = facts.pop("build")
    lines = {**facts, **{f"build {name}": value for name, value in build.items()}}
    shown = {name.replace("_", " "): _text(value) for name, value in lines.items() if name != "accumloss"}
    print(display.answer(f"accumloss {accumloss.__version__}", display.facts(shown)))
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accumloss", description="Exact gradient accumulation and one-pass cross-entropy."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    env = commands.add_parser("env", help="versions, build, CPU capability, GPUs")
    env.add_argument("--json", action="store_true", help="print JSON")

    defaults = demo.Settings()
    show = commands.add_parser(
        "demo",
        help="train a small BERT and a small Llama on real text at several accumulation depths, with and without accumloss",
    )
    show.add_argument(
        "--out",
        type=Path,
        default=defaults.out,
        metavar="FOLDER",
        help="where the plots and the CSV go (default: %(default)s)",
    )
    show.add_argument(
        "--steps", type=int, default=defaults.steps, metavar="N", help="optimizer steps (default: %(default)s)"
    )
    show.add_argument("--device", default=defaults.device, help="cpu or cuda (default: %(default)s)")
    show.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="N",
        help="of the weights and the order of the text (default: %(default)s)",
    )
    show.add_argument("--json", action="store_true", help="print the table as JSON")
    audit_command.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == "env":
        return print_environment(options.json)
    if options.command == "audit":
        try:
            return audit_command.run(options)
        except KeyboardInterrupt:
            print("audit: interrupted; the census goes on where it stopped", file=sys.stderr)
            return 130
    if options.command == "demo":
        settings = demo.Settings(out=options.out, steps=options.steps, device=options.device, seed=options.seed)
        try:
            return demo.main(settings, as_json=options.json)
        except demo.DemoError as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("demo: interrupted", file=sys.stderr)
            return 130
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
