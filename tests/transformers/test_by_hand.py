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
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from torch import nn
from training import (
    CLASSES,
    COUNTS_POSITION_0,
    GIVES_THE_NUMBER,
    LABELS,
    Step,
    build,
    error,
    loss_error,
    make_trainer,
    rows,
    train,
)
from transformers import Trainer

import accumloss

SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "3+3+2": (3, 3)}


@functools.cache
def tagger():
    return build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")


def flat(outputs, labels):
    return outputs.logits.flatten(0, 1), labels.flatten()


def computes(loss):
    """A Trainer whose compute_loss is loss(trainer, model, inputs, num_items_in_batch)."""

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            value = loss(self, model, inputs, num_items_in_batch)
            return (value, {"loss": value}) if return_outputs else value

    return {"trainer_class": Own}


class Head(nn.Module):
    """A module of one's own, whose loss is loss(logits, labels, hidden)."""

    def __init__(self, loss, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.loss, self.norm = nn.Embedding(64, 8), nn.Linear(8, 64), loss, norm

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        hidden = self.embed(input_ids)
        hidden = hidden if self.norm is None else self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        logits = self.head(hidden)
        return {"loss": self.loss(self, logits, labels), "logits": logits}


def cross_entropy(self, logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def per_token(outputs, labels):
    return F.cross_entropy(*flat(outputs, labels), reduction="none")


def renamed(examples, **names):
    return [{names.get(key, key): value for key, value in row.items()} for row in examples]


class Exact:
    """name -> model, examples, options of train(); the name says what people do."""

    def none_over_the_mask():
        def loss(self, model, inputs, n):
            return per_token(model(**inputs), inputs["labels"]).sum() / (inputs["labels"] != -100).sum()

        return *tagger(), computes(loss)

    def none_of_the_masked_ones():
        def loss(self, model, inputs, n):
            mask = inputs["labels"].flatten() != -100
            return 0.5 * model(**inputs).loss + per_token(model(**inputs), inputs["labels"])[mask].mean()

        return *tagger(), computes(loss)

    def none_written_over():
        def loss(self, model, inputs, n):
            values, mask = per_token(model(**inputs), inputs["labels"]), inputs["labels"].flatten() != -100
            values *= mask
            return values.sum() / mask.sum()

        return *tagger(), computes(loss)

    def sum_over_its_own_items():
        def loss(self, model, inputs, n):
            total = F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum")
            return total / (inputs["labels"] != -100).sum()

        return *tagger(), computes(loss)

    def sum_beside_a_mean():
        def loss(self, model, inputs, n):
            outputs = model(**inputs)
            return outputs.loss + F.mse_loss(
                outputs.logits[..., 0], torch.ones_like(outputs.logits[..., 0]), reduction="sum"
            )

        return *tagger(), computes(loss)

    def values_of_one_length():
        def loss(self, model, inputs, n):
            logits = model(**inputs).logits
            return F.mse_loss(logits, logits.detach().flip(-1), reduction="none").mean(-1).mean()

        return *tagger(), computes(loss)

    def weighted_sum_over_the_weights():
        weight = torch.linspace(0.2, 3, LABELS)

        def loss(self, model, inputs, n):
            labels = inputs["labels"]
            total = F.cross_entropy(*flat(model(**inputs), labels), weight=weight, reduction="sum")
            return total / weight[labels[labels != -100]].sum()

        return *tagger(), computes(loss)

    def mean_times_its_items_over_the_number():
        def loss(self, model, inputs, n):
            return model(**inputs).loss * (inputs["labels"] != -100).sum() / n

        return *tagger(), computes(loss)

    def mean_times_its_items_over_an_int():
        def loss(self, model, inputs, n):
            return F.cross_entropy(*flat(model(**inputs), inputs["labels"])) * (inputs["labels"] != -100).sum() / int(n)

        return *tagger(), computes(loss)

    def none_over_the_number():
        def loss(self, model, inputs, n):
            return per_token(model(**inputs), inputs["labels"]).sum() / n

        return *tagger(), computes(loss)

    def smoother_by_hand():
        def loss(self, model, inputs, n):
            outputs = model(**{**inputs, "labels": None})
            return self.label_smoother({"logits": outputs.logits}, inputs["labels"], shift_labels=True)

        return build("LlamaForCausalLM"), rows(), {**computes(loss), "label_smoothing_factor": 0.1}

    def compute_loss_func_that_is_a_mean():
        def loss(outputs, labels, num_items_in_batch=None):
            return F.cross_entropy(*flat(outputs, labels))

        return *tagger(), {"trainer_options": {"compute_loss_func": loss}}

    def compute_loss_func_over_the_number():
        def loss(outputs, labels, num_items_in_batch=None):
            return F.cross_entropy(*flat(outputs, labels), reduction="sum") / num_items_in_batch

        return *tagger(), {"trainer_options": {"compute_loss_func": loss}}

    def target_by_label_names():
        class OfTargets(Head):
            def forward(self, input_ids, attention_mask=None, target=None):
                return super().forward(input_ids, labels=target)

        return OfTargets(cross_entropy), renamed(rows(), labels="target"), {"label_names": ["target"]}

    def scaled_sum_in_a_module():
        def loss(self, logits, labels):
            return 0.01 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

        class NoKeywords(Head):
            def forward(self, input_ids, attention_mask=None, labels=None):
                return super().forward(input_ids, labels=labels)

        return NoKeywords(loss), rows(), {}

    def forward_names_the_number():
        class Naming(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

            def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None):
                logits = self.head(self.embed(input_ids))
                total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
                n = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
                return {"loss": total / n, "logits": logits}

        return Naming(), rows(), {}

    def forward_names_the_number_by_hand():
        class Naming(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

            def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None):
                logits = self.head(self.embed(input_ids))
                taken = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
                n = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
                return {"loss": (taken * (labels != -100)).sum() / n, "logits": logits}

        return Naming(), rows(), {}

    def model_accepts_loss_kwargs_set():
        class Setting(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.model_accepts_loss_kwargs = True

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return F.cross_entropy(*flat(model(**inputs), inputs["labels"]))

        return *tagger(), {"trainer_class": Setting}

    def model_accepts_loss_kwargs_unset():
        class Setting(Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.model_accepts_loss_kwargs = False

        return build("LlamaForCausalLM"), rows(), {"trainer_class": Setting}

    def labels_made_in_prepare_inputs():
        class Making(Trainer):
            def _prepare_inputs(self, inputs):
                inputs = dict(super()._prepare_inputs(inputs))
                inputs["labels"] = torch.where(inputs.pop("keep") == 1, inputs["input_ids"], -100)
                return inputs

        examples = [{**row, "keep": (row.pop("labels") != -100).long()} for row in fresh(rows())]
        return build("LlamaForCausalLM"), examples, {"trainer_class": Making}

    def completion_mask():
        def loss(self, model, inputs, n):
            labels = torch.where(inputs["completion_mask"].bool(), inputs["input_ids"], -100)
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        examples = [{**row, "completion_mask": (row.pop("labels") != -100).long()} for row in fresh(rows())]
        return build("LlamaForCausalLM"), examples, computes(loss)

    def regularised_dropout():
        def loss(self, model, inputs, n):
            one, two = model(**inputs), model(**inputs)
            p, q = one.logits.log_softmax(-1), (1.1 * two.logits).log_softmax(-1)
            kl = F.kl_div(p, q, reduction="batchmean", log_target=True) + F.kl_div(
                q, p, reduction="batchmean", log_target=True
            )
            return one.loss + two.loss + kl

        return *tagger(), computes(loss)

    def batch_encoding():
        def collate(rows):
            return transformers.BatchEncoding({key: torch.stack([row[key] for row in rows]) for key in rows[0]})

        return *tagger(), {"trainer_options": {"data_collator": collate}}

    def positive_weights():
        def loss(self, model, inputs, n):
            labels = inputs.pop("labels")
            return nn.BCEWithLogitsLoss(pos_weight=torch.linspace(1, 3, LABELS))(model(**inputs).logits, labels)

        config = {**CLASSES, "problem_type": "multi_label_classification"}
        return build("LlamaForSequenceClassification", **config), rows("multi"), computes(loss)

    def batch_norm_that_is_frozen():
        class Frozen(Head):
            def train(self, mode=True):
                super().train(mode)
                self.norm.eval()
                return self

        return Frozen(cross_entropy, nn.BatchNorm1d(8)), rows(), {}


WANTS_THE_NUMBER = ("none_over_the_number", "mean_times_its_items_over_the_number", "mean_times_its_items_over_an_int")
EXACT = [
    name
    for name in vars(Exact)
    if not name.startswith("_")
    and (GIVES_THE_NUMBER or name not in WANTS_THE_NUMBER)
    and not (COUNTS_POSITION_0 and name == "labels_made_in_prepare_inputs")  # the one batch of stock is wrong then
]


def fresh(examples):
    """Rows whose tensors may be written over."""
    return [{key: value.clone() for key, value in row.items()} for row in examples]


def of(kind):
    model, examples, options = kind()
    return model, examples, dict(options)


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
    """After the first window nothing is looked at any more, and what was found is used."""
    model, examples, options = of(getattr(Exact, name))
    full = train(model, fresh(examples), 1, steps=3, **options)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 4, steps=3, **options)
    assert loss_error(step, full) <= 10 * TRAINER_LOSS
    for name, weight in full.weights.items():
        torch.testing.assert_close(step.weights[name], weight, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("name", [name for name in EXACT if not name.startswith("model_accepts_loss_kwargs_set")])
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


class Told:
    """name -> what the message says, model, examples, options, split."""

    def batch_norm():
        return "BatchNorm1d normalises by the statistics", Head(cross_entropy, nn.BatchNorm1d(8)), rows(), {}, (4, 2)

    def contrastive():
        def loss(self, model, inputs, n):
            pooled = model(**inputs).logits.mean(1)
            return F.cross_entropy(pooled @ pooled.T, torch.arange(len(pooled)))

        return "tells each row apart from the others", *tagger(), computes(loss), (4, 2)

    def focal():
        def loss(self, model, inputs, n):
            values, mask = per_token(model(**inputs), inputs["labels"]), inputs["labels"].flatten() != -100
            return ((1 - torch.exp(-values)) ** 2 * values)[mask].mean()

        return "without a reduction is averaged in a way that is not recognised", *tagger(), computes(loss), (4, 2)

    def sum_over_something():
        def loss(self, model, inputs, n):
            total = F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum")
            return total / (3.0 + (inputs["labels"] != -100).sum())

        return "divided by another number in each micro-batch", *tagger(), computes(loss), (4, 2)

    def sum_over_something_in_a_module():
        def loss(self, logits, labels):
            total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            return total / (3.0 + (labels != -100).sum())

        class NoKeywords(Head):
            def forward(self, input_ids, attention_mask=None, labels=None):
                return super().forward(input_ids, labels=labels)

        return "divided by another number in each micro-batch", NoKeywords(loss), rows(), {}, (4, 2)

    def part_of_the_mask():
        def loss(self, model, inputs, n):
            values, labels = per_token(model(**inputs), inputs["labels"]), inputs["labels"].flatten()
            return values[(labels != -100) & (labels != 2)].mean()

        return "a part of it|not recognised", *tagger(), computes(loss), (4, 2)

    def compute_loss_func_by_hand():
        def loss(outputs, labels, num_items_in_batch=None):
            taken = outputs.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return -(taken * (labels != -100)).sum() / (labels != -100).sum()

        return (
            "nothing that it computes was recognised",
            *tagger(),
            {"trainer_options": {"compute_loss_func": loss}},
            (4, 2),
        )

    def term_while_training():
        def loss(self, logits, labels):
            loss = cross_entropy(self, logits, labels)
            return loss + 0.1 * (logits.logsumexp(-1) ** 2).mean() if self.training else loss

        return "a part of it was computed by none", Head(loss), rows(), {}, (3, 3)


TOLD = [name for name in vars(Told) if not name.startswith("_")]


@pytest.mark.parametrize("name", TOLD)
def test_by_hand_is_told_and_never_worse_than_stock(name):
    says, model, examples, options, split = getattr(Told, name)()
    full = train(model, fresh(examples), 1, **options)
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
