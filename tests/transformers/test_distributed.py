"""Two processes (gloo) with uneven ranks take the step of the one batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from training import COUNTS_POSITION_0, Step, error, loss_error, model_and_rows, train

import accumloss

HERE = Path(__file__).resolve().parent


def two_ranks(head, folder, register="register", average="average"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "distributed_training.py"), head, register, str(folder), average]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    return Step(torch.load(folder / "gradients.pt"), result["loss"], {}, None)


def one_batch(head):
    with accumloss.registered():
        return train(*model_and_rows(head), 1)


@pytest.mark.parametrize("head", ["causal", "token classes", "masked, own loss"])
def test_uneven_ranks(head, tmp_path):
    full, step = one_batch(head), two_ranks(head, tmp_path)
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_LOSS


def test_trap_11_ranks_that_count_for_themselves(tmp_path):
    """average_tokens_across_devices=False averages the ranks' means: inexact on uneven ranks, by the user's choice, and
    the same with accumloss as without it."""
    full = one_batch("causal")
    ours = two_ranks("causal", tmp_path, average="each")
    stock = two_ranks("causal", tmp_path, register="stock", average="each")
    assert COUNTS_POSITION_0 or error(ours, stock) <= TRAINER_GRADIENT
    assert error(ours, full) > 1e-2
