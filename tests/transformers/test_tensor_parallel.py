"""Tensor parallelism of transformers with a head that gathers no logits, on two ranks."""

import json
import math
from pathlib import Path

import pytest
from tolerances import SUM, TRAINER_GRADIENT, TRAINER_LOSS
from torchrun import torchrun

import accumloss

HERE = Path(__file__).resolve().parent


def test_plan_is_a_rule_that_transformers_knows():
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    plan = accumloss.vocabulary_parallel_plan("score")
    assert list(plan) == ["score"]
    style = tensor_parallel.ALL_PARALLEL_STYLES[plan["score"]]
    assert not style.use_local_output
    assert style.output_layouts.is_shard(-1)


def test_plan_needs_tensor_parallelism_by_dtensors(monkeypatch):
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    monkeypatch.delattr(tensor_parallel, "ColwiseParallel")
    with pytest.raises(RuntimeError, match="expected a transformers whose tensor parallelism is by DTensors.*got 5"):
        accumloss.vocabulary_parallel_plan()


@pytest.mark.slow("a launch of two ranks; the fast tier has DTensor logits on two, and the rule of the plan")
@pytest.mark.xdist_group("torchrun")
def test_two_ranks_train_as_one(tmp_path):
    """Logits stay sharded, one collective is the loss's, and a step of Trainer over micro-batches is that of the one batch."""
    pytest.importorskip("transformers.distributed.tensor_parallel")
    torchrun(HERE / "distributed_tensor_parallel.py", tmp_path / "found", cwd=tmp_path)
    found = json.loads((tmp_path / "found").read_text())
    for tied in (False, True):
        call, trained = found[f"a call, tied {tied}"], found[f"Trainer, tied {tied}"]
        assert call["error"] <= TRAINER_GRADIENT
        assert call["evaluated"] <= SUM
        assert (call["logits"], call["loss"], call["collectives"]) == ("(Shard(dim=2),)", "Tensor", 1)
        assert trained["error"] <= TRAINER_GRADIENT
        assert trained["loss"] <= TRAINER_LOSS
        assert 0 < trained["entropy"] <= math.log(97)
