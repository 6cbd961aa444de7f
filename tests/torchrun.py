"""Runs a script of the tests on several ranks (gloo), one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def torchrun(*command: object, ranks: int = 2, seconds: float = 300, cwd: Path | None = None) -> None:
    """torchrun --nproc-per-node=ranks command, whose own flags go before that; what a rank said where it fails."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-3000:]


def leave() -> None:
    """The end of a rank's script: when all have come to it, and without the destructors of gloo and of DDP, whose threads
    sometimes wait for each other for ever."""
    import torch.distributed

    torch.distributed.barrier()
    os._exit(0)
