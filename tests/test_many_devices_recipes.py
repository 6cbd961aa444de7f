"""Runs the recipes of docs/many-devices.md as they stand, each against the one batch of every optimizer step."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from distributed_meshes import MixtureLM
from tolerances import ACCUMULATED_GRADIENT, UNIT
from torchrun import torchrun
from windows import TinyLM, error, norm, targets, window

PAGE = Path(__file__).resolve().parents[1] / "docs" / "many-devices.md"
SECTIONS = dict(section.split("\n", 1) for section in PAGE.read_text().split("\n## ")[1:])
RECIPES = [name for name, text in SECTIONS.items() if "\ntorchrun " in text]
WINDOWS = 2
MINE = """
import os
os.environ["ACCELERATE_USE_CPU"] = "true"
import many_devices
from distributed_meshes import FirstHalf, MixtureLM, SecondHalf
from windows import TinyLM as make_model, split, window

ranks_of_devices = many_devices.as_accelerators()
ranks_of_devices.__enter__()


def make_stage(rank):
    return (FirstHalf, SecondHalf)[rank](make_model())


def make_mixture(rank):
    return MixtureLM(2, rank)


def windows(rank=None):
    for seed in range(2):
        inputs, labels = window(seed)
        if rank is None:
            yield inputs, labels
        else:
            yield split(inputs[rank::2], labels[rank::2], [1, 3] if seed else [2, 2])
"""


@pytest.mark.slow("two ranks of the fast tier run what the recipes call; each of these is a launch of its own")
@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, tmp_path):
    if "ParallelismConfig" in recipe:
        pytest.importorskip("accelerate", reason="needs accelerate")
    command = re.search(r"^torchrun --nproc-per-node=(\d) (.*)$", SECTIONS[recipe], re.M)
    (tmp_path / command[2]).write_text(SECTIONS[recipe].split("```python\n")[1].split("```")[0])
    (tmp_path / "mine.py").write_text(MINE)
    torchrun(command[2], ranks=int(command[1]), cwd=tmp_path)

    def make():
        return MixtureLM(2) if "Experts" in recipe else TinyLM()

    start, model = dict(make().named_parameters()), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(WINDOWS):
        inputs, labels = window(seed)
        F.cross_entropy(model(inputs).flatten(0, 1), targets(labels).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {}
    for rank in range(int(command[1])):
        for name, tensor in torch.load(tmp_path / f"weights{rank}.pt").items():
            name = name.replace("experts.0.", f"experts.{rank}.")
            assert name not in trained or torch.equal(trained[name], tensor)
            trained[name] = tensor
    moved, wanted = (
        {n: w[n].detach() - p.detach() for n, p in start.items()} for w in (trained, dict(model.named_parameters()))
    )
    rounding = 2 * WINDOWS * UNIT * norm(start) / norm(wanted)  # each step rounds the weights, in both
    assert error(moved, wanted) <= ACCUMULATED_GRADIENT[torch.float32] + rounding


def test_every_block_is_run():
    assert len(RECIPES) == PAGE.read_text().count("```python") == 4
