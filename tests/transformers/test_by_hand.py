"""Losses that people average by hand, build labels for, or call in other ways: exact and silent, or told; never worse."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from own_losses import EXACT, TOLD, WANTS_THE_NUMBER, Exact, Told, computes, flat, fresh, of, tagger
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from training import (
    Step,
    error,
    loss_error,
    make_trainer,
    train,
)

import accumloss

SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "3+3+2": (3, 3)}


@functools.cache
def one_batch(name):
    model, examples, options = of(getattr(Exact, name))
    return train(model, fresh(examples), 1, **options)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", EXACT)
def test_by_hand_is_exact_and_silent(name, split):
    full = one_batch(name)
    model, examples, options = of(getattr(Exact, name))
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), split[0], batch_size=split[1], **options)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


@pytest.mark.parametrize(
    "name",
    [n for n in EXACT if n in ("sum_over_its_own_items", "none_of_the_masked_ones", WANTS_THE_NUMBER[1])],
)
def test_what_was_learned_holds_in_later_windows(name):
    """What was found in the first window is used from then on."""
    model, examples, options = of(getattr(Exact, name))
    full = train(model, fresh(examples), 1, steps=3, **options)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 4, steps=3, **options)
    assert loss_error(step, full) <= 10 * TRAINER_LOSS
    for name, weight in full.weights.items():
        torch.testing.assert_close(step.weights[name], weight, rtol=1e-4, atol=1e-6)


def longer_later(lengths=(6, 6, 24)):
    """Rows of a window each, of so many tokens."""
    generator, rows = torch.Generator().manual_seed(0), []
    for length in lengths:
        for items in (1, length, 2, length - 1, 1, 3, length, 1):
            ids = torch.randint(2, 64, (length,), generator=generator)
            labels = torch.where(torch.arange(length) < items, ids % 5, -100)
            rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


@pytest.mark.parametrize("split", [(8, 1), (4, 2)], ids=("8x1", "4x2"))
@pytest.mark.parametrize(
    "name", ["chunks_from_behind", "chunks_of_two_kinds", "chunks_with_items_only", "values_of_chunks"]
)
def test_a_loop_may_have_more_turns_later(name, split):
    """In the third window, which is not looked at, a sequence has more chunks than any before had."""
    model, _, options = of(getattr(Exact, name))
    full = train(model, longer_later(), 1, batch_size=8, steps=3, **options)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, longer_later(), split[0], batch_size=split[1], steps=3, **options)
    for name, weight in full.weights.items():
        torch.testing.assert_close(step.weights[name], weight, rtol=1e-4, atol=1e-6)


def test_a_sum_that_nobody_has_looked_at_is_told():
    model, examples = tagger()

    def loss(self, model, inputs, n):
        outputs = model(**inputs)
        if self.state.global_step < 2:
            return outputs.loss
        logits, labels = flat(outputs, inputs["labels"])
        return outputs.loss + F.cross_entropy(2 * logits, labels, reduction="sum") / (labels != -100).sum()

    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match="that no step which was looked at had"):
        train(model, fresh(examples), 4, batch_size=2, steps=3, **computes(loss))


@pytest.mark.parametrize("split", [(4, 2), (3, 3)], ids=("4x2", "3+3+2"))
def test_rows_that_weigh_by_their_items_are_a_mean_over_items(split):
    """At one row a micro-batch, of one item, nothing says that it was multiplied by its items and divided by all."""
    model, examples = tagger()

    def loss(self, model, inputs, n):
        total = 0
        for logits, labels in zip(model(**inputs).logits, inputs["labels"], strict=True):
            total = total + F.cross_entropy(logits, labels) * (labels != -100).sum()
        return total / (inputs["labels"] != -100).sum()

    full = train(model, fresh(examples), 1, **computes(loss))
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), split[0], batch_size=split[1], **computes(loss))
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
    wanted = evaluated(model, examples, 8, computes(loss), register=False)
    assert abs(evaluated(model, examples, 3, computes(loss)) - wanted) <= 2 * TRAINER_LOSS * wanted


def test_iterable_dataset_with_an_incomplete_micro_batch():
    model, examples = tagger()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(fresh(examples))

    full = train(model, fresh(examples), 1)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        trainer, recorder = make_trainer(copy.deepcopy(model), examples, 3, batch_size=3)
        trainer.train_dataset, trainer._get_train_sampler = Stream(), lambda *_: None
        trainer.train()
    step = Step(recorder.gradients, recorder.losses[-1], {}, trainer)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


def evaluated(model, examples, size, options, register=True):
    options = {"prediction_loss_only": True, **options, "per_device_eval_batch_size": size}
    with accumloss.registered() if register else contextlib.nullcontext():
        trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 1, **options)
        return trainer.evaluate(fresh(examples))["eval_loss"]


TOLD_THOUGH_RIGHT = tuple(
    name for name in EXACT if name.startswith("mean_of_the_rows_own_means_") and not name.endswith("_in_a_loop")
)


@pytest.mark.parametrize("name", TOLD_THOUGH_RIGHT)
def test_evaluation_of_means_of_rows_is_left_to_trainer(name):
    """Who averages by rows: right, and told, since what it is made of is not followed there."""
    model, examples, options = of(getattr(Exact, name))
    wanted = evaluated(model, examples, 8, options, register=False)
    for size in (3, 2, 1):
        with pytest.warns(accumloss.InexactWarning, match="may depend on the batch size"):
            found = evaluated(model, examples, size, options)
        assert abs(found - wanted) <= 2 * TRAINER_LOSS * abs(wanted)


# a sum over one row looks like a mean, where no graph says that it is a row's
SUMS_OF_ROWS = tuple(name for name in EXACT if name.startswith("sum_of_the_rows"))
NO_MEANS = ("model_accepts_loss_kwargs_set", *SUMS_OF_ROWS, *TOLD_THOUGH_RIGHT)


@pytest.mark.parametrize("name", SUMS_OF_ROWS)
def test_evaluation_of_sums_over_rows_is_the_sum_over_the_set(name):
    model, examples, options = of(getattr(Exact, name))
    wanted = evaluated(model, examples, 8, options, register=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        for size in (8, 3, 2):
            assert abs(evaluated(model, examples, size, options) - wanted) <= 2 * TRAINER_LOSS * abs(wanted)


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith(NO_MEANS)])
def test_evaluation_is_that_of_the_one_batch(name):
    model, examples, options = of(getattr(Exact, name))
    wanted = evaluated(model, examples, 8, options, register=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        for size in (8, 3, 2, 1):
            assert abs(evaluated(model, examples, size, options) - wanted) <= 2 * TRAINER_LOSS * abs(wanted)


def test_an_evaluation_calls_nothing_of_the_users_twice():
    model, examples = tagger()
    seen = []

    def loss(self, model, inputs, n):
        outputs = model(**inputs)
        mean = F.cross_entropy(*flat(outputs, inputs["labels"]))
        seen.append(mean.item())
        by_hand = -outputs.logits.log_softmax(-1).flatten(0, 1)[inputs["labels"].flatten() != -100]
        assert (
            abs(by_hand.gather(1, inputs["labels"][inputs["labels"] != -100][:, None]).mean().item() - seen[-1]) < 1e-5
        )
        return 0.5 * outputs.loss + 0.5 * mean + 1

    evaluated(model, examples, 2, computes(loss))
    assert len(seen) == 4


def test_an_evaluation_needs_no_memory_for_a_graph_of_the_model():
    """The terms record what is made of them; the operations of the model record nothing."""
    model, examples = tagger()
    graphs = []

    def loss(self, model, inputs, n):
        outputs = model(**inputs)
        graphs.append((outputs.logits.requires_grad, torch.is_grad_enabled()))
        return 2 * outputs.loss

    evaluated(model, examples, 2, computes(loss))
    assert graphs == [(False, False)] * 4


# Told -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOLD)
def test_by_hand_is_told_and_never_worse_than_stock(name):
    says, model, examples, options, *splits = getattr(Told, name)()
    full = train(model, fresh(examples), 1, **options)
    for split in splits:
        stock = train(model, fresh(examples), split[0], batch_size=split[1], **options)
        with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match=says):
            step = train(model, fresh(examples), split[0], batch_size=split[1], **options)
        assert TRAINER_GRADIENT < error(step, full) <= error(stock, full) * (1 + 1e-6)


@pytest.mark.parametrize("verify", [False, True])
def test_what_is_not_understood_stays_stocks_in_later_windows(verify):
    _, model, examples, options, split = Told.sum_over_something_in_a_module()
    stock = train(model, fresh(examples), split[0], batch_size=split[1], steps=3, **options)
    with accumloss.registered(verify=verify), pytest.warns(accumloss.InexactWarning):
        step = train(model, fresh(examples), split[0], batch_size=split[1], steps=3, **options)
    for name, weight in stock.weights.items():
        torch.testing.assert_close(step.weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["contrastive", "focal", "sum_over_something", "compute_loss_func_by_hand"])
def test_evaluation_by_hand_is_told_and_stocks(name):
    _, model, examples, options, _ = getattr(Told, name)()
    for size in (2, 1):
        stock = evaluated(model, examples, size, options, register=False)
        with pytest.warns(accumloss.InexactWarning, match="on the batch size") as caught:
            ours = evaluated(model, examples, size, options)
        assert len(caught) == 1 and abs(ours - stock) <= TRAINER_LOSS * abs(stock)


@pytest.mark.parametrize("verify", [False, True])
def test_resuming_goes_on_as_the_one_batch_would(tmp_path, verify):
    """Three steps, interrupted after the first: what was learned of the loss is learned anew."""
    model, examples, options = of(Exact.sum_over_its_own_items)
    full = train(model, fresh(examples), 1, steps=3, **options)
    saved = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    with accumloss.registered(verify=verify), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        train(model, fresh(examples), 4, steps=1, **saved, **options)
        trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, steps=3, **saved, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 3
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight.detach(), full.weights[name], rtol=1e-4, atol=1e-6)


class HalfOfASum(transformers.Trainer):
    """At two rows a micro-batch its factor is one over the rows as well."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**{**inputs, "labels": None}).logits
        return 0.5 * F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")


def test_a_factor_of_its_own_that_fits_the_rows_is_taken_for_one_and_told():
    model, examples, _ = of(Exact.sum_over_its_own_items)
    full = train(model, fresh(examples), 1, trainer_class=HalfOfASum)
    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match="the factor of the cross_entropy"):
        step = train(model, fresh(examples), 4, trainer_class=HalfOfASum)
    assert error(step, full) <= TRAINER_GRADIENT
