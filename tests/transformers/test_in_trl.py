"""accumloss.register_with_trl: the same values, signatures and losses, and nothing that stays. In a process of its own."""

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import ACCUMULATED_GRADIENT, TRAINER_GRADIENT, TRAINER_LOSS

import accumloss
from accumloss import trl as ours

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl not installed: pip install 'accumloss[trainers]'"
)
SLOW = pytest.mark.slow("a process that imports TRL and trains; test_per_token.py has the functions below")
SAME = 1e-5  # docs/per-token.md: what is promised of TRL's values


@pytest.fixture(scope="module")
def in_trl():
    done = subprocess.run([sys.executable, HERE / "in_trl.py"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@SLOW
def test_the_names_are_ours_while_registered_and_theirs_after(in_trl):
    """Also in a module that has imported one before, and in one that does so meanwhile."""
    assert in_trl["before"] and not any(in_trl["before"].values())
    assert all(in_trl["registered"].values()) and len(in_trl["registered"]) > len(in_trl["before"])
    assert not any(in_trl["after"].values()) and in_trl["same"]
    assert in_trl["after"].keys() == in_trl["registered"].keys()
    assert not any(in_trl["registered_with_transformers"].values())


@SLOW
def test_values_and_gradients_are_theirs(in_trl):
    assert len(in_trl["calls"]) == 18
    for what, dtype, error, of_gradient, same_flow, output in in_trl["calls"]:
        is_rounded = dtype == "torch.bfloat16"
        assert same_flow, (what, dtype)
        if is_rounded and what == "(..., K)":  # stay theirs, rounding included
            assert output == dtype
            continue
        assert error <= SAME, (what, dtype)
        assert of_gradient <= (ACCUMULATED_GRADIENT[torch.bfloat16] if is_rounded else SAME), (what, dtype)
        assert output == ("torch.float32" if is_rounded else dtype), (what, dtype)


@SLOW
def test_trainers_train_the_same(in_trl):
    """DPO, GRPO with an entropy bonus, ORPO, TPO: loss and gradient of a step. In TRL 1.16 the first two fuse their head."""
    for name, (gradient, loss, calls) in in_trl["trained"].items():
        assert gradient <= TRAINER_GRADIENT and loss <= 10 * TRAINER_LOSS, (name, gradient, loss)
        module = f".{name.split('Trainer')[0].lower()}_trainer."  # one that fuses its head has none of the three names
        fuses = not any(module in key for key in in_trl["after_training"])
        assert (calls > 0) == (not fuses), (name, calls, in_trl["version"])


def test_signatures_are_theirs():
    """Read off the source: TRL is not imported here."""
    source = Path(importlib.util.find_spec("trl").origin).parent / "trainer" / "utils.py"
    makers = (ours._selective_log_softmax, ours._selective_log_softmax_and_entropy, ours._entropy_from_logits)
    for name, make in zip(ours.NAMES, makers, strict=True):
        text = source.read_text()
        begin = text.index(f"def {name}(")
        theirs = text[begin : text.index(":\n", text.index(")", begin))]
        for parameter in inspect.signature(make(None)).parameters.values():
            assert f"{parameter.name}:" in theirs
            if parameter.default is not inspect.Parameter.empty:
                assert f"= {parameter.default}" in theirs, (name, parameter)


def test_nothing_is_registered_by_itself():
    assert not ours._registered
    accumloss.unregister_from_trl()  # of nothing: nothing
