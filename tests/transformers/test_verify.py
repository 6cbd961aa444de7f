"""accumloss.verify and register_with_transformers(verify=True): what a loss averages over, measured; nothing is changed."""

from __future__ import annotations

import collections
import copy
import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from own_losses import (
    EXACT,
    MEASURED,
    WANTS_THE_NUMBER,
    Exact,
    Head,
    Told,
    by_hand_over_labels,
    computes,
    cross_entropy,
    distilled,
    fresh,
    of,
    tagger,
)
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from torch import nn
from training import build, error, loss_error, make_trainer, rows, train
from transformers import Trainer

import accumloss

SPLITS = {"8x1": (8, 1), "3+3+2": (3, 3)}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", MEASURED)
def test_what_nothing_recognises_is_measured_and_then_exact(name, split):
    model, examples = tagger()
    options = computes(MEASURED[name])
    full = train(model, fresh(examples), 1, **options)
    with accumloss.registered(verify=True), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), split[0], batch_size=split[1], **options)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in EXACT
        if n in ("sum_over_its_own_items", "none_of_the_masked_ones", WANTS_THE_NUMBER[2], "completion_mask")
    ],
)
def test_what_is_exact_stays_so_and_is_silent(name):
    model, examples, options = of(getattr(Exact, name))
    full = train(model, fresh(examples), 1, **options)
    with accumloss.registered(verify="error"), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 8, **options)
    assert error(step, full) <= TRAINER_GRADIENT
    with warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, **options)
        found = accumloss.verify(trainer)
    assert found.is_exact and found.forwards == 9 and found.error <= TRAINER_LOSS


@pytest.mark.parametrize("name", ["batch_norm", "contrastive", "sum_over_something"])
def test_what_is_coupled_is_told_or_raised(name):
    _, model, examples, options, split = getattr(Told, name)()
    stock = train(model, fresh(examples), split[0], batch_size=split[1], **options)
    full = train(model, fresh(examples), 1, **options)
    with accumloss.registered(verify=True), pytest.warns(accumloss.InexactWarning, match="differs from that") as caught:
        step = train(model, fresh(examples), split[0], batch_size=split[1], steps=2, **options)
    assert len([w for w in caught if issubclass(w.category, accumloss.InexactWarning)]) == 1
    assert TRAINER_GRADIENT < error(step, full) <= error(stock, full) * (1 + 1e-6)
    with accumloss.registered(verify="error"), pytest.raises(accumloss.InexactError, match="differs from that"):
        train(model, fresh(examples), split[0], batch_size=split[1], **options)
    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, **options)
    with pytest.warns(accumloss.InexactWarning, match="differs from that"):
        assert accumloss.verify(trainer).is_exact is False


def part_of_nothing(self, outputs, inputs):
    return outputs.logits.square().mean()


def another_divisor(self, outputs, inputs):
    total = F.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
    return total / ((inputs["labels"] != -100).sum() + 3)


def weights_of_the_micro_batch(self, outputs, inputs):
    labels = inputs["labels"].flatten()
    weight = 1.0 + labels[labels != -100].bincount(minlength=outputs.logits.shape[-1])
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels, weight)


@pytest.mark.parametrize("later", [part_of_nothing, another_divisor, weights_of_the_micro_batch])
def test_a_loss_that_changes_after_it_was_measured_is_told(later):
    model, examples = tagger()

    def loss(self, model, inputs, n):
        outputs = model(**inputs)
        return outputs.loss + (later(self, outputs, inputs) if self.state.global_step > 0 else 0.0)

    with accumloss.registered(verify=True), pytest.warns(accumloss.InexactWarning, match="has changed since"):
        train(model, fresh(examples), 8, steps=3, **computes(loss))
    with accumloss.registered(verify="error"), pytest.raises(accumloss.InexactError, match="has changed since"):
        train(model, fresh(examples), 8, steps=3, **computes(loss))


@pytest.mark.parametrize("later", [0.5, "a mean of its own"])
def test_a_loss_that_changes_and_stays_exact_is_not_told(later):
    """A weight that is annealed, or a term that is recognised and comes later."""
    model, examples = tagger()

    def loss(self, model, inputs, n):
        outputs = model(**inputs)
        if later == 0.5:
            return outputs.loss * later**self.state.global_step
        labels = inputs["labels"].flatten()
        other = F.cross_entropy(outputs.logits.roll(1, -1).flatten(0, 1), labels, reduction="sum")
        return outputs.loss + (other / (labels != -100).sum() if self.state.global_step > 0 else 0.0)

    options = computes(loss)
    full = train(model, fresh(examples), 1, steps=3, **options)
    with accumloss.registered(verify="error"), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 8, steps=3, **options)
    assert loss_error(step, full) <= 10 * TRAINER_LOSS


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_silent_in_later_windows(name):
    model, examples = tagger()
    with accumloss.registered(verify=True), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        train(model, fresh(examples), 8, steps=4, **computes(MEASURED[name]))


def test_verify_says_what_would_make_it_exact(capsys):
    model, examples = tagger()
    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, **computes(distilled))
    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match=r"verify=True\) makes it so"):
        found = accumloss.verify(trainer)
    printed = capsys.readouterr().out
    assert printed.strip() == str(found)
    assert found.is_exact is False and found.can_be_exact
    assert [(t.name, t.known_by, t.is_exact) for t in found.terms] == [
        ("cross_entropy", "a recognised call", True), ("the rest", "measured", False),
    ]  # fmt: skip
    assert found.terms[0].coefficient == 0.5 and found.terms[0].averages_over == "the labels in 'labels'"
    assert "rows" in found.terms[1].averages_over


def test_terms_say_how_they_are_known():
    trainer, _ = make_trainer(build("LlamaForCausalLM"), rows(), 4)
    found = accumloss.verify(trainer)
    (term,) = found.terms
    assert (term.name, term.known_by) == ("causal_lm_loss", "LOSS_MAPPING")
    assert term.averages_over == "the labels in 'labels', without the first 1 of each row"
    model, examples, options = of(Exact.sum_over_its_own_items)
    trainer, _ = make_trainer(model, fresh(examples), 4, **options)
    assert [term.known_by for term in accumloss.verify(trainer).terms] == ["its coefficient"]


def test_verify_registers_for_its_own_length_only():
    before = accumloss.registered_losses()
    trainer, _ = make_trainer(build("LlamaForCausalLM"), rows(), 4)
    assert accumloss.verify(trainer).is_exact
    assert accumloss.registered_losses() == before and Trainer.train.__module__ == "transformers.trainer"


# Nothing is changed ---------------------------------------------------------------------------------------------------


class SideEffects(Trainer):
    """As TRL's: counts, collects, logs, draws, and writes over what it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.collected, self.seen = 0, collections.defaultdict(list), {"tokens": [0]}
        self.recent = collections.deque(maxlen=3)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        self.collected["length"].append(inputs["input_ids"].numel())
        self.recent.append(self.calls)
        self.seen["tokens"][0] += 1
        self.late = self.calls
        self.state.global_step += 0
        self.state.best_metric = self.calls
        self.log({"seen": self.calls})
        inputs["labels"][inputs["labels"] == 0] = 1
        random.random(), numpy.random.rand(), torch.rand(1)  # noqa: NPY002
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def everything(trainer):
    return copy.deepcopy(
        {
            "attributes": {
                k: v for k, v in vars(trainer).items() if isinstance(v, (int, dict, list, collections.deque))
            },
            "state": vars(trainer.state),
            "flags": [part.training for part in trainer.model.modules()],
            "tensors": {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())},
            "python": random.getstate(),
            "numpy": numpy.random.get_state()[1].tolist(),  # noqa: NPY002
            "torch": torch.get_rng_state(),
        }
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict) and key in ("tensors",):
            for name, value in a[key].items():
                assert torch.equal(value, b[key][name]) and value.dtype == b[key][name].dtype, name
        elif isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key])
        elif key != "attributes":
            assert a[key] == b[key], key
    assert {k: str(v) for k, v in a["attributes"].items()} == {k: str(v) for k, v in b["attributes"].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_as_it_was(dtype):
    model = Head(cross_entropy, nn.BatchNorm1d(8)).to(dtype)
    trainer, recorder = make_trainer(model, fresh(rows()), 4, trainer_class=SideEffects)
    trainer.model.eval()
    trainer.model.embed.weight.grad = torch.ones_like(trainer.model.embed.weight)
    before = everything(trainer)
    with pytest.warns(accumloss.InexactWarning, match="BatchNorm1d"):
        accumloss.verify(trainer)
    assert_same(everything(trainer), before)
    assert not hasattr(trainer, "late") and recorder.losses == [] and trainer.accelerator._dataloaders == []
    assert torch.equal(trainer.model.embed.weight.grad, torch.ones_like(trainer.model.embed.weight))


def test_measuring_in_a_training_changes_nothing_of_it():
    """The same weights, logs and counters as without; 9 calls more of compute_loss, once."""
    model = build("LlamaForCausalLM", attention_dropout=0.3).train()
    found = []
    for verify in (False, True):
        with accumloss.registered(verify=verify):
            step = train(model, fresh(rows()), 4, steps=3, trainer_class=SideEffects)
        found.append((step.weights, step.trainer.calls, step.trainer.collected, step.trainer.state.log_history))
    (weights, calls, collected, history), (weights_2, calls_2, collected_2, history_2) = found
    assert calls == calls_2 == 12 and collected == collected_2
    assert all(torch.equal(weights[name], weights_2[name]) for name in weights)
    assert [entry.get("loss") for entry in history] == [entry.get("loss") for entry in history_2]


def test_it_is_measured_once():
    model, examples = tagger()
    calls = []

    def counting(self, model, inputs, n):
        calls.append(len(inputs["labels"]))
        return model(**inputs).loss

    with accumloss.registered(verify=True):
        train(model, fresh(examples), 4, steps=3, **computes(counting))
    assert len(calls) == 9 + 12
    calls.clear()
    with accumloss.registered(verify=True):
        train(model, fresh(examples), 1, steps=3, **computes(counting))
    assert len(calls) == 3, "nothing is accumulated"


# What cannot be measured ----------------------------------------------------------------------------------------------


def test_a_random_loss_is_told_as_random():
    model, examples = tagger()

    def noisy(self, model, inputs, n):
        return model(**inputs).loss * (1 + torch.rand(()))

    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, **computes(noisy))
    with pytest.warns(accumloss.InexactWarning, match="it is random"):
        assert accumloss.verify(trainer).is_exact is None


def test_dropout_is_no_randomness():
    model = build("BertForMaskedLM", hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4).train()
    trainer, _ = make_trainer(model, fresh(rows()), 4)
    assert accumloss.verify(trainer).is_exact


def test_random_masks_are_cut_and_not_collated_anew():
    examples = fresh(rows())

    def collate(chosen):
        batch = {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}
        keep = torch.rand(batch["labels"].shape) < 0.5
        return {**batch, "labels": batch["labels"].masked_fill(~keep, -100)}

    options = {"trainer_options": {"data_collator": collate}}
    trainer, _ = make_trainer(build("BertForMaskedLM"), examples, 4, **options)
    assert accumloss.verify(trainer).is_exact


def test_an_error_of_its_code_is_told_and_the_training_goes_on():
    model, examples = tagger()

    def fails(self, model, inputs, n):
        if len(inputs["labels"]) > 2:
            raise KeyError("something of the user's")
        return by_hand_over_labels(self, model, inputs, n)

    options = computes(fails)
    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, **options)
    with pytest.warns(accumloss.InexactWarning, match="it raised KeyError: 'something of the user's'|raised KeyError"):
        assert accumloss.verify(trainer).is_exact is None
    with (
        accumloss.registered(verify=True),
        pytest.warns(accumloss.InexactWarning, match="could not be measured") as caught,
    ):
        train(model, fresh(examples), 4, steps=2, **options)
    assert len([w for w in caught if issubclass(w.category, accumloss.InexactWarning)]) == 1
    with accumloss.registered(verify="error"), pytest.raises(accumloss.InexactError, match="could not be measured"):
        train(model, fresh(examples), 4, **options)


def test_an_iterable_dataset_is_measured_on_its_first_micro_batch():
    model, examples = tagger()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(fresh(examples))

    def trained(verify):
        trainer, recorder = make_trainer(copy.deepcopy(model), examples, 2, **computes(distilled))
        trainer.train_dataset, trainer._get_train_sampler = Stream(), lambda *_: None
        with accumloss.registered(verify=verify):
            trainer.train()
        return trainer, recorder.gradients

    full = train(model, fresh(examples), 1, **computes(distilled))
    with warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        trainer, gradients = trained(True)
    assert error(full._replace(gradients=gradients), full) <= TRAINER_GRADIENT
    with pytest.warns(accumloss.InexactWarning, match="can only be iterated"):
        assert accumloss.verify(trainer).is_exact is None


class InTrainingStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**{**inputs, "labels": None}).logits.pow(2).mean()
        loss.backward()
        return loss.detach()


def test_too_few_rows_and_a_training_step_of_its_own_are_told():
    model, examples = tagger()
    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples)[:2], 1)
    with pytest.warns(accumloss.InexactWarning, match="its dataset has 2 rows, and 3 are needed"):
        assert accumloss.verify(trainer).is_exact is None
    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples), 4, trainer_class=InTrainingStep)
    with pytest.warns(accumloss.InexactWarning, match="training_step computes the loss itself"):
        accumloss.verify(trainer)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_few_rows_are_enough(count):
    model, examples = tagger()
    trainer, _ = make_trainer(copy.deepcopy(model), fresh(examples)[:count], 1)
    assert accumloss.verify(trainer).is_exact
    with accumloss.registered(verify=True), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples)[:count], count, **computes(distilled))
    full = train(model, fresh(examples)[:count], 1, **computes(distilled))
    assert error(step, full) <= TRAINER_GRADIENT


def test_what_fits_several_rules_is_told_where_they_differ():
    """The rows that are measured have one label each, so that rows and labels weigh alike; a later row has more."""
    model, examples = tagger()
    examples = fresh(examples)
    for index in (0, 1, 3, 4, 6, 7):
        examples[index]["labels"][1:] = -100
    with accumloss.registered(verify=True), pytest.warns(accumloss.InexactWarning, match="fits several rules"):
        train(model, examples, 4, steps=2, **computes(by_hand_over_labels))


# Models of other kinds -------------------------------------------------------------------------------------------------


def test_lora_and_gradient_checkpointing():
    import peft

    model = peft.get_peft_model(
        build("LlamaForCausalLM"), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    trainer, _ = make_trainer(model, rows(), 4, gradient_checkpointing=True)
    assert accumloss.verify(trainer).is_exact
    assert accumloss.verify(trainer).terms[0].name == "causal_lm_loss"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_fp32(dtype):
    trainer, _ = make_trainer(build("LlamaForCausalLM").to(dtype), rows(), 4, **computes(distilled))
    with pytest.warns(accumloss.InexactWarning, match="verify=True"):
        found = accumloss.verify(trainer)
    assert found.can_be_exact and {p.dtype for p in trainer.model.parameters()} == {dtype}


def test_autocast_is_measured_in_fp32():
    model = build("LlamaForCausalLM")
    full = train(model, rows(), 1, bf16=True, **computes(distilled))
    with accumloss.registered(verify="error"):
        step = train(model, rows(), 4, bf16=True, **computes(distilled))
    assert error(step, full) <= 4 * 2.0**-8


def test_fused_linear_is_measured():
    with accumloss.registered(fused_linear=True):
        trainer, _ = make_trainer(build("LlamaForCausalLM"), rows(), 4)
        found = accumloss.verify(trainer)
    assert found.is_exact and [term.averages_over for term in found.terms] == [
        "the labels in 'labels', without the first 1 of each row"
    ]


@pytest.mark.slow("compiles a model, and asks whether a compiled one is measured uncompiled")
def test_a_compiled_model_is_measured_uncompiled():
    with accumloss.registered(verify="error"):
        step = train(build("LlamaForCausalLM"), rows(), 4, torch_compile=True, torch_compile_backend="aot_eager")
    assert step.loss > 0


def test_refuses_what_is_no_trainer_and_other_options():
    with pytest.raises(TypeError, match="verify: expected a transformers Trainer, got dict"):
        accumloss.verify({})
    with pytest.raises(ValueError, match="expected verify to be False, True or"):
        accumloss.register_with_transformers(verify="warn")
