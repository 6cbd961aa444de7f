"""Runs a script of several ranks (gloo), one thread each.

As a script, one of those ranks: `torchrun.py SCRIPT arguments` runs SCRIPT as it stands, and then leaves the process
without the destructors of gloo and of DDP. Their threads sometimes wait for each other for ever, or end the process by
"terminate called without an active exception": one that drops a tensor which Python knows asks for the interpreter's
lock, which a finishing interpreter refuses (pytorch/pytorch#179291, #190489).
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def torchrun(*command: object, ranks: int = 2, seconds: float = 300, cwd: Path | None = None) -> str:
    """torchrun --nproc-per-node=ranks command, whose own flags go before that: what it printed; where a rank fails, what it
    said."""
    words = [str(word) for word in command]
    script = next(i for i, word in enumerate(words) if not word.startswith("-"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *words[:script], __file__, *words[script:]],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def leave() -> None:
    """The end of a rank's script that saves what others wait for: when all have come to it."""
    import torch.distributed

    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
