"""nn.DataParallel: replicas that call losses on chunks of a micro-batch, in threads of their own."""

import warnings

import pytest
import replicas
import torch
import training
import transformers
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from training import HEADS, error, loss_error, model_and_rows, train

import accumloss


@pytest.fixture
def two_devices(monkeypatch):
    """Trainers made here believe in two devices, which nn.DataParallel uses."""
    monkeypatch.setattr(training, "TrainingArguments", replicas.OnTwoDevices)
    monkeypatch.setattr(torch.nn, "DataParallel", replicas.DataParallel)


def step_of(model, examples, accumulation, **options):
    step = train(model, examples, accumulation, batch_size=len(examples) // 2 // accumulation, **options)
    return step._replace(gradients={n.removeprefix("module."): g for n, g in step.gradients.items()})


def one_batch(head):
    """The step of the one batch on one device; the model has run once."""
    model, examples = model_and_rows(head)
    with torch.no_grad():  # transformers installs hooks in a first forward, and threads would do so twice
        model(**{key: torch.stack([example[key] for example in examples]) for key in examples[0]})
    with accumloss.registered():
        return train(model, examples, 1)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("head", HEADS)
def test_replicas_take_the_step_of_the_one_batch(head, accumulation, request):
    full = one_batch(head)
    request.getfixturevalue("two_devices")
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = step_of(*model_and_rows(head), accumulation)
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_LOSS


def test_stock_averages_the_replicas(request):
    full = one_batch("masked, own loss")
    request.getfixturevalue("two_devices")
    assert error(step_of(*model_and_rows("masked, own loss"), 1), full) > 0.1


class Outside(transformers.Trainer):
    """Computes its loss on the logits of all replicas."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**{**inputs, "labels": None}).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())


def mean_of_labels(outputs, labels, num_items_in_batch=None):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{"trainer_class": Outside}, {"trainer_options": {"compute_loss_func": mean_of_labels}}],
    ids=["compute_loss", "compute_loss_func"],
)
def test_a_loss_outside_of_the_replicas(options, accumulation, request):
    full = one_batch("masked, own loss")
    request.getfixturevalue("two_devices")
    with accumloss.registered():
        step = step_of(*model_and_rows("masked, own loss"), accumulation, **options)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


class OwnStep(transformers.Trainer):
    """A training_step that does everything by itself."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss.mean()
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_training_step_of_its_own(request):
    full = one_batch("masked, own loss")
    request.getfixturevalue("two_devices")
    with accumloss.registered():
        step = step_of(*model_and_rows("masked, own loss"), 1, trainer_class=OwnStep)
    assert error(step, full) <= TRAINER_GRADIENT


class Averaging(torch.nn.Module):
    """A model of somebody's own whose replicas divide a sum by hand."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return transformers.modeling_outputs.MaskedLMOutput(loss=loss / (labels != -100).sum(), logits=logits)


def test_what_replicas_average_by_hand_is_told(two_devices):
    model, examples = model_and_rows("masked, own loss")
    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match="DataParallel"):
        step_of(Averaging(model), examples, 1)
