"""The examples run as they stand, and train the same whatever the size of their micro-batches."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import TRAINER_GRADIENT
from torchrun import torchrun

import accumloss

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
IN_FAST_TIER = {"own_loop", "finetune_trainer"}
ON_TWO_RANKS = {"own_loop_ddp", "fsdp2_fused_head"}
NEEDS = {"finetune_lora_trl": ("trl", "peft", "datasets")}
LEARN = ("masked_lm_bert", "own_loop", "distillation", "class_weighted_tokens")  # within the steps that they take
WHY_SLOW = "two examples of the fast tier, and the recipes, are of the same kinds"
PRINTED = 1e-4  # four decimals of losses of 1 and more
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow(WHY_SLOW)] * (name not in IN_FAST_TIER), id=name)
    for name in sorted(path.stem for path in EXAMPLES.glob("*.py"))
]


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a Trainer writes
    before = torch.get_rng_state()
    yield
    accumloss.unregister_from_transformers()
    torch.set_rng_state(before)


def losses_of(printed):
    return [float(word) for word in re.search(r"^losses (.*)$", printed, re.M)[1].split() if word[0].isdigit()]


def run(name, rows, capsys, source=None):
    """What an example prints. Those of several ranks, and those that need libraries with patches of their own, in processes."""
    file = EXAMPLES / f"{name}.py"
    if name in ON_TWO_RANKS:
        return torchrun(file, rows)
    if name in NEEDS:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, str(file), str(rows)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    if source is not None:
        file = Path("changed.py")
        file.write_text(source)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [file.name, str(rows)])
        runpy.run_path(str(file), run_name="__main__")
    accumloss.unregister_from_transformers()
    return capsys.readouterr().out


@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("name", NAMES)
def test_example(name, capsys):
    if name not in ("own_loop", "own_loop_ddp", "fsdp2_fused_head", "distillation", "audit_my_model"):
        pytest.importorskip("transformers", reason="needs transformers")
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"needs {package}")
    if name == "audit_my_model":
        printed = run(name, 1, capsys)
        assert "stock exact: False" in printed and "accumloss exact: True" in printed
        return
    few, many = (losses_of(run(name, rows, capsys)) for rows in (2, 8))
    assert len(few) >= 1 and len(set(few)) == len(few)  # it trains
    if name in LEARN:
        assert few[-1] < 0.9 * few[0], few
    assert few == pytest.approx(many, rel=PRINTED, abs=TRAINER_GRADIENT)


@pytest.mark.slow("the disease is pinned in the fast tier, by test_exactness.py")
def test_example_without_accumloss_differs(capsys):
    pytest.importorskip("transformers", reason="needs transformers")
    source = (EXAMPLES / "finetune_trainer.py").read_text()
    assert source.count("accumloss.register_with_transformers()") == 1
    stock = source.replace("accumloss.register_with_transformers()", "")
    few, many = (losses_of(run("finetune_trainer", rows, capsys, stock)) for rows in (2, 8))
    assert few[0] > 3 * many[0]  # 8 micro-batches whose means are added up, and 2


def test_examples_are_short_and_listed():
    listed = re.findall(r"^\| \[(\S+)\.py\]\(\1\.py\)", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert len(listed) == 10
    for name in listed:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 60
