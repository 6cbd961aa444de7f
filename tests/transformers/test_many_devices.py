"""Trainer on meshes and with many ranks: each situation of many_devices.py takes the step of the one batch."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from many_devices import OBJECTS, SITUATIONS, measure, objects
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from torchrun import torchrun
from training import Step, build, error, loss_error, loss_gap, model_and_rows, train

import accumloss

FAST = (
    "cp 2, GA 2",
    "cp 2, shifted",
    "cp 2, token classes",
    "cp 2, evaluation",
    "sharded by the dataloader",
    "fsdp2, by hand",
    "ddp, fused",
    "fsdp2, fused",
    "fsdp2, fused, freed",
    "tp 2, fused",
    "ddp, static graph, by hand",
    "boxes, uneven",
    "boxes, stock",
    "boxes and classes, uneven",
    "boxes, summed over ranks, uneven",
)
ON_FOUR = (
    "cp 2 x dp_shard 2",
    "cp 2 x dp_shard 2, GA 4",
    "cp 2 x dp_shard 2, evaluation",
    "hsdp",
    "tp 2 x fsdp 2",
    "hsdp by transformers",
)
ON_THREE = tuple(name for name in SITUATIONS if "three" in name or name == "cp 3")
ZERO = tuple(name for name in SITUATIONS if name.startswith("zero"))
STOCK = tuple(name for name in SITUATIONS if "stock" in name)
SLOW = tuple(name for name in SITUATIONS if name not in (*FAST, *ON_THREE, *ON_FOUR, *ZERO, *STOCK))


def found_by(ranks, names, folder):
    out = folder / "found.pt"
    torchrun(Path(__file__).parents[1] / "many_devices.py", out, *names, ranks=ranks, seconds=400)
    return torch.load(out)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    return found_by(2, FAST, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def more_of_two(tmp_path_factory):
    return found_by(2, (*SLOW, "boxes, summed over ranks, stock"), tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory):
    return found_by(3, ON_THREE, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def of_zero(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install --no-build-isolation deepspeed")
    return found_by(2, ZERO, tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return found_by(4, ON_FOUR, tmp_path_factory.mktemp("four"))


def kind_of(name):
    """The kind of objects that a situation is about; None of another."""
    return max((kind for kind in OBJECTS if name.startswith(f"{kind}, ")), key=len, default=None)


def one_batch(name, found):
    """The step of the one batch on one process, and its evaluation before it."""
    kind = kind_of(name)
    if kind is not None:
        model, examples = objects(kind, name.endswith(", even"))
        options = {"trainer_options": {"data_collator": measure.collate, "eval_dataset": examples}}
    else:
        model, examples = model_and_rows(found["head"])
        model = build("LlamaForCausalLM", tie_word_embeddings=True) if "tied" in name else model
        options = {"trainer_options": {"eval_dataset": examples}}
    if "evaluation" in found:
        options["learning_rate"] = 0.0
    with (
        accumloss.registered() if kind is None else contextlib.nullcontext()
    ):  # of objects, the one batch is right in stock
        step = train(model, examples[: found["rows"]], 1, **options)
        return step, step.trainer.evaluate()["eval_loss"] if "evaluation" in found else None


def check(name, found):
    assert "error" not in found, found["error"]
    full, evaluation = one_batch(name, found)
    step = Step(found["gradients"], found["loss"], {}, None)
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_LOSS
    if evaluation is not None:
        assert loss_gap(found["evaluation"], evaluation) <= TRAINER_LOSS


@pytest.mark.parametrize("name", [name for name in FAST if "stock" not in name])
def test_step_of_the_one_batch(name, of_two):
    check(name, of_two[name])
    if "fused" not in name:
        assert not of_two[name]["told"]


@pytest.mark.parametrize("name", ["ddp, fused", "fsdp2, fused"])
def test_heads_of_ranks_are_fused_and_know_their_labels(name, of_two):
    assert of_two[name]["fused"] == of_two[name]["counted"] == 2 and not of_two[name]["told"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "fsdp2, fused, freed",
            "FSDP frees its head after its forward: fully_shard(head, reshard_after_forward=False)",
        ),
        ("tp 2, fused", "its head's forward was replaced"),
    ],
)
def test_heads_that_are_not_fused_are_told_once(name, reason, of_two):
    assert of_two[name]["fused"] == 0
    (told,) = of_two[name]["told"]
    assert told.startswith("accumloss: fused_linear=True is not used for LlamaForCausalLM") and reason in told


def test_stock_divides_boxes_by_the_ranks_twice(of_two):
    found = of_two["boxes, stock"]
    full, _ = one_batch("boxes, uneven", found)
    assert error(Step(found["gradients"], found["loss"], {}, None), full) > 0.9


@pytest.mark.slow("the same kinds of situations as the fast tier's")
@pytest.mark.parametrize("name", SLOW)
def test_more_situations(name, more_of_two):
    check(name, more_of_two[name])


@pytest.mark.slow("beside test_more_situations")
def test_stock_sums_over_ranks_rightly(more_of_two):
    """With one micro-batch a rank they need no mending."""
    found = more_of_two["boxes, summed over ranks, stock"]
    full, _ = one_batch("boxes, summed over ranks, uneven", found)
    assert error(Step(found["gradients"], found["loss"], {}, None), full) <= TRAINER_GRADIENT


@pytest.mark.slow("three processes; the fast tier has two")
@pytest.mark.parametrize("name", ON_THREE)
def test_ranks_that_divide_nothing_evenly(name, of_three):
    check(name, of_three[name])
    assert not of_three[name]["told"]


@pytest.mark.slow("DeepSpeed, which the fast tier does not install")
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed(name, of_zero):
    check(name, of_zero[name])
    told = of_zero[name]["told"]
    if name == "zero 3, fused":  # it frees the head's weight
        assert len(told) == 1 and "fused_linear=True is not used for LlamaForCausalLM" in told[0]
    else:
        assert not told
    if name == "zero 2, fused":
        assert of_zero[name]["fused"] == 2


@pytest.mark.slow("four processes; the fast tier has one mesh at a time")
@pytest.mark.parametrize("name", ON_FOUR)
def test_products_of_meshes(name, of_four):
    check(name, of_four[name])
    assert not of_four[name]["told"]
