"""Runs the recipes of docs/vocabulary-parallel.md as they stand, each against the one batch of every optimizer step."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import ACCUMULATED_GRADIENT, UNIT
from torchrun import torchrun
from windows import TinyLM, error, gradients, norm, targets, window

PAGE = Path(__file__).resolve().parents[1] / "docs" / "vocabulary-parallel.md"
SECTIONS = dict(section.split("\n", 1) for section in PAGE.read_text().split("\n## ")[1:])
MINE = """
import torch
from windows import TinyLM as make_model, split, window

DEALT = [[0, 2, 4, 7], [1, 3, 5, 6]]  # rows of few labels, and of many
torch.manual_seed(0)


def windows(rank=None):
    for seed, sizes in enumerate(([1, 2, 1, 4], [3, 1, 4])):
        inputs, labels = window(seed)
        if rank is None:
            yield split(inputs, labels, sizes)
        else:
            yield split(inputs[DEALT[rank]], labels[DEALT[rank]], [1, 3] if seed else [2, 1, 1])
"""


@pytest.mark.slow("two ranks of the fast tier run what the recipes call; each of these is a launch of its own")
@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("recipe", [name for name, text in SECTIONS.items() if "\ntorchrun " in text])
def test_recipe(recipe, tmp_path):
    command = re.search(r"^torchrun --nproc-per-node=(\d) (.*)$", SECTIONS[recipe], re.M)
    (tmp_path / command[2]).write_text(SECTIONS[recipe].split("```python\n")[1].split("```")[0])
    (tmp_path / "mine.py").write_text(MINE)
    torchrun(command[2], ranks=int(command[1]), cwd=tmp_path)

    start, model = dict(TinyLM().named_parameters()), TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        inputs, labels = window(seed)
        F.cross_entropy(model(inputs).flatten(0, 1), targets(labels).flatten()).backward()
        assert norm(gradients(model)) > 1  # so that it is clipped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = torch.load(tmp_path / "weights.pt")
    moved, wanted = (
        {n: w[n].detach() - p.detach() for n, p in start.items()} for w in (trained, dict(model.named_parameters()))
    )
    rounding = 2 * 2 * UNIT * norm(start) / norm(wanted)  # each step rounds the weights, in both
    assert error(moved, wanted) <= ACCUMULATED_GRADIENT[torch.float32] + rounding
