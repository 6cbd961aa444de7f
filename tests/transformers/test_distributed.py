"""Two processes (gloo) with uneven ranks take the step of the one batch."""

from pathlib import Path

import pytest
import torch
from own_losses import ON_RANKS
from some_ranks import (
    ON_SOME_RANKS,
    FilledOnSomeRanks,
    OnSomeRanks,
    PartlyOverTheNumber,
    rows_filled_on_second_rank,
    rows_of_second_rank,
)
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from torchrun import torchrun
from training import COUNTS_POSITION_0, Step, error, loss_error, model_and_rows, train

import accumloss


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The step of each run of distributed_training.py."""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    torchrun(Path(__file__).with_name("distributed_training.py"), out)
    found = torch.load(out)
    return {name: Step(run["gradients"], run["loss"], run["told"], None) for name, run in found.items()}


def one_batch(head):
    with accumloss.registered():
        return train(*model_and_rows(head), 1)


@pytest.mark.parametrize("head", ["causal", "token classes", "masked, own loss"])
def test_uneven_ranks(head, two_ranks):
    full, step = one_batch(head), two_ranks[head]
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_LOSS


@pytest.mark.parametrize("name", ["divided by hand", "measured", "measured to be another"])
def test_losses_by_hand_on_uneven_ranks(name, two_ranks):
    full, step = one_batch("token classes"), two_ranks[name]
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_LOSS
    on_first, on_second = step.weights  # what each rank was told
    assert not on_first
    if name == "measured to be another":
        assert len(on_second) == 1 and "on rank 1 it was measured to be another" in on_second[0]
    else:
        assert not on_second


@pytest.mark.parametrize("name", ON_RANKS)
def test_own_losses_on_uneven_ranks(name, two_ranks):
    """Trainer leaves sums as they are, of which DDP takes the mean over the ranks."""
    model, examples = model_and_rows("token classes")
    full = train(model, examples, 1, trainer_class=ON_RANKS[name])
    assert error(two_ranks[name], full) <= TRAINER_GRADIENT
    assert loss_error(two_ranks[name], full) <= TRAINER_LOSS
    assert not any(two_ranks[name].weights)  # told


def test_a_sum_with_a_factor_that_is_not_recognised_is_told(two_ranks):
    for told in two_ranks["a sum times a tenth"].weights:
        assert len(told) == 1 and "a sum with a factor that is not recognised stays what Trainer makes of it" in told[0]


@pytest.mark.parametrize("name", ON_SOME_RANKS)
def test_a_loss_that_only_some_ranks_compute_keeps_none_waiting(name, two_ranks):
    """Stock averages the ranks' means, of which one has none."""
    model, _ = model_and_rows("token classes")
    full = train(model, rows_of_second_rank(), 1, trainer_class=ON_SOME_RANKS[name])
    assert error(two_ranks[name], full) <= TRAINER_GRADIENT
    assert not any(two_ranks[name].weights)  # told


@pytest.mark.parametrize("name", ["filled", "over the number", "over the number, measured"])
def test_losses_whose_labels_or_divisor_are_those_of_all_ranks(name, two_ranks):
    model, examples = model_and_rows("token classes")
    if name == "filled":
        full = train(model, rows_filled_on_second_rank(), 1, trainer_class=FilledOnSomeRanks)
    else:
        full = train(model, examples, 1)
    assert error(two_ranks[name], full) <= TRAINER_GRADIENT
    assert not any(two_ranks[name].weights)  # told


@pytest.mark.parametrize("name", ["partly over the number", "partly over the number, times the ranks"])
def test_a_part_that_is_divided_by_the_number_of_all_ranks(name, two_ranks):
    """Without the ranks' factor stock has half of that part."""
    model, examples = model_and_rows("token classes")
    full = train(model, examples, 1, trainer_class=PartlyOverTheNumber)
    assert error(two_ranks[name], full) <= TRAINER_GRADIENT
    assert not any(two_ranks[name].weights)  # told


def test_a_loss_that_some_ranks_compute_later_is_told_and_then_exact(two_ranks):
    model, _ = model_and_rows("token classes")
    full = train(model, rows_of_second_rank(), 1, trainer_class=OnSomeRanks)
    assert error(two_ranks["later"], full) <= TRAINER_GRADIENT
    on_first, on_second = two_ranks["later"].weights
    assert not on_first
    assert len(on_second) == 1 and "no window before had on any rank" in on_second[0]


def test_a_part_that_nothing_recognises_is_compared_between_the_ranks(two_ranks):
    """One micro-batch a step on each of them: only the other rank has another."""
    for told in two_ranks["a part of nothing"].weights:
        assert len(told) == 1 and "none of the losses that accumloss knows, and is averaged over the ranks" in told[0]
    assert not any(two_ranks["a penalty on the weights"].weights)


def test_trap_11_ranks_that_count_for_themselves(two_ranks):
    """average_tokens_across_devices=False averages the ranks' means: inexact on uneven ranks, by the user's choice, and
    the same with accumloss as without it."""
    full = one_batch("causal")
    ours, stock = two_ranks["causal, each for itself"], two_ranks["causal, each for itself, stock"]
    assert COUNTS_POSITION_0 or error(ours, stock) <= TRAINER_GRADIENT
    assert error(ours, full) > 1e-2
