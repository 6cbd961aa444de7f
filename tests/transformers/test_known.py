"""What is written down of Trainers of known libraries: whose it is, and what its parts weigh. test_trainers.py trains them."""

from __future__ import annotations

import types

import pytest
import torch
from tolerances import TRAINER_GRADIENT
from training import LABELS, build, error, make_trainer, rows, train
from transformers import Trainer

import accumloss
from accumloss.transformers import known
from accumloss.transformers.counting import Rule, half_of
from accumloss.transformers.terms import ROWS_WEIGH


def trainer_of(cls, **attributes):
    trainer = cls.__new__(cls)
    trainer.compute_loss_func, trainer.args = None, types.SimpleNamespace(use_liger_kernel=False)
    trainer.loss_types, trainer.loss_weights = ["sigmoid", "sft"], [1.0, 0.5]
    vars(trainer).update(attributes)
    return trainer


@pytest.fixture
def dpo(monkeypatch):
    """A class under the name of TRL's."""
    monkeypatch.setattr(known, "_is_measured", lambda package: True)
    body = {"__module__": "trl.trainer.dpo_trainer", "compute_loss": lambda self, *args, **kwargs: None}
    return type("DPOTrainer", (Trainer,), body)


INPUTS = {"completion_mask": torch.ones(4, 5)}


def test_a_class_is_known_by_its_name_and_its_loss(dpo):
    found = known.look_up(trainer_of(dpo), INPUTS)
    assert found is not None
    assert found.over == ROWS_WEIGH
    assert dict(found.parts)["loss_weights"] == (ROWS_WEIGH, Rule("completion_mask", 1, 0, half=0))


def test_a_subclass_is_known_as_long_as_the_loss_is_its_parents(dpo):
    harmless = type("Mine", (dpo,), {"log": lambda self, logs: None})
    assert known.look_up(trainer_of(harmless), INPUTS) is not None
    for method in ("compute_loss", "_compute_loss", "get_batch_loss_metrics", "concatenated_forward"):
        mine = type("Mine", (dpo,), {method: lambda self, *args: None})
        assert known.look_up(trainer_of(mine), INPUTS) is None, method


def test_a_trainer_with_a_function_of_the_users_is_not_known(dpo):
    assert known.look_up(trainer_of(dpo, compute_loss_func=lambda *args: None), INPUTS) is None
    assert known.look_up(trainer_of(dpo, compute_loss=lambda *args: None), INPUTS) is None


def test_a_collator_without_the_entries_that_are_counted_makes_it_unknown(dpo):
    assert known.look_up(trainer_of(dpo), {"input_ids": torch.ones(4, 5)}) is None


def test_another_major_version_is_not_known(monkeypatch):
    monkeypatch.setattr(known.importlib.metadata, "version", lambda name: "2.0.0")
    known._is_measured.cache_clear()
    assert not known._is_measured("trl")
    known._is_measured.cache_clear()


def test_a_coupled_loss_has_a_reason(dpo):
    found = known.look_up(trainer_of(dpo, loss_types=["aot"], loss_weights=[1.0]), INPUTS)
    assert "sorts" in found.coupled


def test_a_factor_is_its_number_in_all_but_products_with_tensors():
    factor = known.Factor.of(0.5, ROWS_WEIGH, "entropy_coef")
    x = torch.arange(3.0, requires_grad=True)
    for value in (factor * x, x * factor, torch.mul(x, factor), torch.mul(factor, x)):  # outside of a step: the product
        assert torch.equal(value, 0.5 * x)
    assert torch.equal(x / factor, x / 0.5)
    assert torch.equal(torch.add(x, x, alpha=factor), 1.5 * x)
    assert factor * 3 == 1.5
    assert min(factor + 0.25, 2.0) == 0.75
    assert factor != 0.0


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_parts_are_put_back_and_an_adapted_one_stays():
    trainer = Holder(alpha=0.5, beta=0.25, args=Holder(weight=0.1), loss_weights=[1.0, 2.0])
    over = (
        ("alpha", ROWS_WEIGH),
        ("beta", ROWS_WEIGH),
        ("args.weight", ROWS_WEIGH),
        ("loss_weights", (ROWS_WEIGH,) * 2),
    )
    with known.parts(trainer, known.Known(parts=over)):
        assert isinstance(trainer.alpha, known.Factor)
        assert isinstance(trainer.args.weight, known.Factor)
        assert [type(weight) for weight in trainer.loss_weights] == [known.Factor] * 2
        trainer.beta = trainer.beta + 0.5
    assert (trainer.alpha, trainer.beta, trainer.args.weight) == (0.5, 0.75, 0.1)
    assert trainer.loss_weights == [1.0, 2.0]
    assert type(trainer.alpha) is float
    assert type(trainer.beta) is float


@pytest.mark.parametrize(
    ("half", "of", "wanted"), [(0, 2, [0, 1, 2]), (1, 2, [3, 4, 5]), (1, 3, [2, 3]), (2, 3, [4, 5])]
)
def test_a_part_of_the_rows(half, of, wanted):
    assert half_of(torch.arange(6), half, of).tolist() == wanted


class Weighted(Trainer):
    """A part over labels and a part over rows, by factors of its own, and nothing that is recognised."""

    row_weight = 0.5
    label_weight = 2.0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**{**inputs, "labels": None}).logits, inputs["labels"]
        taken = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        mask = labels != -100
        loss = self.label_weight * (-(taken * mask).sum() / mask.sum())
        loss = loss + self.row_weight * logits.logsumexp(-1).pow(2).sum(-1).mean()
        return (loss, {"logits": logits}) if return_outputs else loss


@pytest.fixture
def weighted(monkeypatch):
    over = (("label_weight", Rule("labels")), ("row_weight", ROWS_WEIGH))
    written = known.Known(ROWS_WEIGH, parts=over)
    monkeypatch.setattr(known, "look_up", lambda trainer, inputs: written)
    return Weighted


@pytest.mark.parametrize("split", [(8, 1), (4, 2), (3, 3)], ids=["8x1", "4x2", "3+3+2"])
def test_parts_are_those_of_the_one_batch(weighted, split):
    model, examples = build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")
    full = train(model, examples, 1, trainer_class=weighted)
    stock = train(model, examples, split[0], batch_size=split[1], trainer_class=weighted)
    with accumloss.registered():  # an InexactWarning would be an error
        step = train(model, examples, split[0], batch_size=split[1], trainer_class=weighted)
    assert error(step, full) < TRAINER_GRADIENT
    assert error(stock, full) > 100 * TRAINER_GRADIENT


def test_parts_are_those_of_the_evaluation_set_too(weighted):
    model, examples = build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")
    found = []
    with accumloss.registered():
        for size in (8, 2, 1, 3):
            trainer, _ = make_trainer(model, examples, 1, trainer_class=weighted, per_device_eval_batch_size=size)
            found.append(trainer.evaluate(examples)["eval_loss"])
    assert found == pytest.approx([found[0]] * 4, rel=TRAINER_GRADIENT)


def test_a_coupled_one_is_told_once_with_its_reason(monkeypatch):
    written = known.Known(ROWS_WEIGH, coupled="its rows are coupled")
    monkeypatch.setattr(known, "look_up", lambda trainer, inputs: written)
    model, examples = build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")
    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match="its rows are coupled") as told:
        train(model, examples, 4, batch_size=2, trainer_class=Weighted)
    assert len(told) == 1
    with accumloss.registered():  # nothing is accumulated, nothing is said
        train(model, examples, 1, trainer_class=Weighted)


class Times(Trainer):
    """Logs once for each window, as GRPO does: it asks for the micro-batches after its parent's step."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen = [*vars(self).get("seen", []), self.current_gradient_accumulation_steps]
        return loss


class DoesItItself(Trainer):
    """Divides by the micro-batches by itself, of a loss that is a part of the step's: for it there is one."""

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        loss = model(**inputs).loss
        self.seen = [*vars(self).get("seen", []), self.args.gradient_accumulation_steps]
        self.accelerator.backward(loss / self.seen[-1])
        return loss.detach() / self.seen[-1]


@pytest.mark.parametrize(("cls", "read"), [(Times, 4), (DoesItItself, 1)])
def test_what_a_training_step_reads_as_its_micro_batches(cls, read):
    model, examples = build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")
    full = train(model, examples, 1, trainer_class=cls)
    with accumloss.registered():
        step = train(model, examples, 4, batch_size=2, trainer_class=cls)
    assert step.trainer.seen == [read] * 4
    assert error(step, full) < TRAINER_GRADIENT


def test_verify_measures_by_what_is_written_down(weighted):
    model, examples = build("BertForTokenClassification", num_labels=LABELS), rows("tags")
    trainer, _ = make_trainer(model, examples, 4, batch_size=2, trainer_class=weighted)
    found = accumloss.verify(trainer)  # an InexactWarning would be an error
    assert found.is_exact
    assert {term.name for term in found.terms} == {"label_weight", "row_weight"}


def test_verify_finds_what_is_written_down_wrongly(monkeypatch):
    over = (("label_weight", ROWS_WEIGH), ("row_weight", Rule("labels")))
    monkeypatch.setattr(known, "look_up", lambda trainer, inputs: known.Known(ROWS_WEIGH, parts=over))
    model, examples = build("BertForTokenClassification", num_labels=LABELS), rows("tags")
    trainer, _ = make_trainer(model, examples, 4, batch_size=2, trainer_class=Weighted)
    with pytest.warns(accumloss.InexactWarning):
        assert accumloss.verify(trainer).is_exact is False
