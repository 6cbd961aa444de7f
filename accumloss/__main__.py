"""The command line: python -m accumloss audit | demo | env."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import demo
from .auditing import command as audit_command
from .environment import report
from .ops import build_info


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accumloss", description="Exact gradient accumulation and one-pass cross-entropy."
    )
    parser.add_argument("--version", action="version", version=f"accumloss {build_info()['version']}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    env = commands.add_parser("env", help="what a bug report needs: versions, build, what serves each device")
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
        return report(options.json)
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
