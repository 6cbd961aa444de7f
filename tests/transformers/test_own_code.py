"""People's own code between Trainer and the loss: exact and silent, or told by name; never worse than stock."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import functools
import importlib
import pickle
import threading
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from torch import nn
from training import GIVES_THE_NUMBER, LABELS, build, error, loss_error, make_trainer, rows, train
from transformers import Trainer

import accumloss

WEIGHT = torch.linspace(0.2, 3, LABELS)
SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "3+3+2": (3, 3)}


@functools.cache
def tagger():
    return build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")


@functools.cache
def causal():
    return build("LlamaForCausalLM"), rows()


@functools.cache
def teacher():
    torch.manual_seed(1)
    model = build("LlamaForCausalLM")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def flat(outputs, labels):
    return flat_of(outputs.logits, labels)


def flat_of(logits, labels):
    return logits.flatten(0, 1), labels.flatten()


class Trainers:
    """Each a way in which people compute their loss; the name is the row."""

    class super_without_the_items(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    class super_with_the_items(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    class class_weights(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.CrossEntropyLoss(weight=WEIGHT)(*flat(outputs, labels))
            return (loss, outputs) if return_outputs else loss

    class functional(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = F.cross_entropy(*flat(outputs, inputs["labels"]))
            return (loss, outputs) if return_outputs else loss

    class spelled_in_full(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return torch.nn.functional.cross_entropy(*flat(outputs, inputs["labels"]))

    class criterion_held(Trainer):
        criteria = None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.held["loss"](*flat(model(**inputs), inputs["labels"]))

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.held = {"loss": nn.CrossEntropyLoss(ignore_index=-100, label_smoothing=0.1)}

    class without_return_outputs(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None):
            return model(**inputs).loss

    class plain_sum(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0.01 * F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum")

    class sum_over_the_items(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum")
            return loss / (num_items_in_batch if num_items_in_batch is not None else (inputs["labels"] != -100).sum())

    class sum_over_an_int(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum") / int(num_items_in_batch)

    class sum_by_hand_over_the_items(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logp = model(**inputs).logits.log_softmax(-1)
            labels = inputs["labels"]
            taken = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return -(taken * (labels != -100)).sum() / num_items_in_batch

    class logs_the_number(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.seen = int(num_items_in_batch) + num_items_in_batch.item()
            assert self.seen == 2 * int(self.seen / 2) > 0
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    class two_forwards(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            first = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            second = super().compute_loss(model, {**inputs}, num_items_in_batch=num_items_in_batch)
            return 0.5 * (first + second)

    class calls_itself(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, inside=False):
            if not inside:
                return self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, inside=True)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)

    class penalty_on_the_weights(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + 1e-3 * sum(p.pow(2).sum() for p in model.parameters())

    class divides_by_the_micro_batches(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = F.cross_entropy(*flat(model(**inputs), inputs["labels"]))
            return loss / self.args.gradient_accumulation_steps

    class annealed(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            weight = 0.3 + 0.1 * self.state.global_step
            values = F.mse_loss(outputs.logits[:, 0, 0], inputs["labels"][:, 0].float())
            return (1 - weight) * outputs.loss + weight * values

    class metric_under_no_grad(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            with torch.no_grad():
                self.logged = F.cross_entropy(*flat(outputs, inputs["labels"])).item()
                mean = -outputs.logits.log_softmax(-1).flatten(0, 1)[inputs["labels"].flatten() != -100]
                taken = mean.gather(1, inputs["labels"][inputs["labels"] != -100][:, None]).mean().item()
                assert abs(self.logged - taken) < 1e-5, "a metric is PyTorch's own mean"
            return outputs.loss

    class training_step_with_a_new_dict(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            return super().training_step(model, dict(inputs), *args, **kwargs)

    class training_step_with_more_arguments(Trainer):
        def _inner_training_loop(self, *args, **kwargs):
            step = self.training_step
            self.training_step = lambda *more, **named: step(*more, **named, extra=1)
            try:
                return super()._inner_training_loop(*args, **kwargs)
            finally:
                del self.training_step
                self.training_step = step

        def training_step(self, model, inputs, num_items_in_batch=None, *, extra=0):
            assert extra == 1
            return super().training_step(model, inputs, num_items_in_batch)

    class training_step_without_super(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = model(**self._prepare_inputs(inputs)).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class training_step_that_divides(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = F.cross_entropy(*flat(model(**inputs), inputs["labels"])) / self.args.gradient_accumulation_steps
            loss.backward()
            return loss.detach()

    class labels_popped_in_training_step(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.labels = inputs.pop("labels")
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(*flat(model(**inputs), self.labels))

    class own_get_batch_samples(Trainer):
        def get_batch_samples(self, iterator, num_batches, device):
            batches = [batch for _, batch in zip(range(num_batches), iterator, strict=False)]
            return batches, None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return F.cross_entropy(*flat(model(**inputs), inputs["labels"]))

    class padding_ignored_by_hand(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            outputs = model(**{**inputs, "labels": None})
            return F.cross_entropy(outputs.logits.flatten(0, 1), labels.masked_fill(labels == 3, -100).flatten())

    class labels_written_over(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            labels[labels == 3] = -100
            return F.cross_entropy(*flat(model(**{**inputs, "labels": None}), labels))


WANTS_THE_NUMBER = (
    "sum_over_an_int",
    "sum_by_hand_over_the_items",
    "logs_the_number",
    "takes_the_number_beside_a_mean",
)
EXACT = [
    name for name in vars(Trainers) if not name.startswith("_") and (GIVES_THE_NUMBER or name not in WANTS_THE_NUMBER)
]


def fresh(examples):
    """Rows whose tensors may be written over."""
    return [{key: value.clone() for key, value in row.items()} for row in examples]


@functools.cache
def one_batch(name):
    """The step over the one batch, by Trainer without accumloss."""
    model, examples = tagger()
    return train(model, fresh(examples), 1, trainer_class=getattr(Trainers, name))


# The first micro-batch holds nothing that is ignored besides, and fits as it is: told, and exact from the next window on.
SHOWS_LATE = [("padding_ignored_by_hand", (8, 1)), ("labels_written_over", (8, 1))]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", EXACT)
def test_own_code_is_exact_and_silent(name, split):
    model, examples = tagger()
    options = {"trainer_class": getattr(Trainers, name), "batch_size": split[1]}
    if (name, split) in SHOWS_LATE:
        with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match="no entry of the batch"):
            train(model, fresh(examples), split[0], **options)
        return
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), split[0], **options)
    assert error(step, one_batch(name)) <= TRAINER_GRADIENT
    if not name.startswith("training_step_"):  # what those return is what they say
        assert loss_error(step, one_batch(name)) <= TRAINER_LOSS


class Criterion:
    """A compute_loss_func that is an object, and holds its loss."""

    def __init__(self):
        self.criterion = nn.CrossEntropyLoss()

    def __call__(self, outputs, labels, num_items_in_batch=None):
        return self.criterion(*flat(outputs, labels))

    method = __call__


class CriterionModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"criterion": nn.CrossEntropyLoss()})

    def forward(self, outputs, labels, num_items_in_batch=None):
        return self.inner["criterion"](*flat(outputs, labels))


def with_criterion(outputs, labels, num_items_in_batch=None, criterion=None):
    return criterion(*flat(outputs, labels))


def closed_over(criterion):
    return lambda outputs, labels, num_items_in_batch=None: criterion(*flat(outputs, labels))


HOOKS = {
    "object": Criterion,
    "its method": lambda: Criterion().method,
    "module": CriterionModule,
    "partial": lambda: functools.partial(with_criterion, criterion=nn.CrossEntropyLoss()),
    "closure": lambda: closed_over(nn.CrossEntropyLoss()),
}


@pytest.mark.parametrize("how", HOOKS)
def test_a_compute_loss_func_that_holds_its_criterion_is_exact(how):
    model, examples = tagger()
    full = train(model, fresh(examples), 1)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 4, trainer_options={"compute_loss_func": HOOKS[how]()})
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_LOSS


def test_a_compute_loss_func_that_is_given_later_is_exact():
    model, examples = tagger()
    full = train(model, fresh(examples), 1)
    trainer, recorder = make_trainer(copy.deepcopy(model), fresh(examples), 4)
    weights = copy.deepcopy(trainer.model.state_dict())
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        trainer.train()
        trainer.model.load_state_dict(weights)
        trainer.compute_loss_func = Criterion()
        recorder.gradients = {}
        trainer.train()
    assert max(float((g - full.gradients[n]).abs().max()) for n, g in recorder.gradients.items()) <= 1e-5
    assert type(trainer.compute_loss_func.criterion) is nn.CrossEntropyLoss


NUMBERS = {
    "as it is": lambda n: n,
    "to the CPU": lambda n: n.cpu(),
    "no fewer than 1": lambda n: n.clamp(min=1),
    "no fewer than 1, by Python": lambda n: max(n, 1),
    "or 1": lambda n: n or 1,
    "a copy": copy.deepcopy,
    "a new tensor": lambda n: torch.zeros(1).new_tensor(n.tolist()),
    "its data": lambda n: n.data,
    "whole": lambda n: n // 1,
    "rounded up": torch.ceil,
    "an integer": lambda n: n.type(torch.long),
    "an integer of a copy": lambda n: int(n.cpu()),
    "an integer of a sum": lambda n: int(n.sum()),
    "an item of a copy": lambda n: n.float().item(),
    "an array": lambda n: float(n.cpu().numpy()),
    "an array by numpy": lambda n: float(numpy.asarray(n)),
    "bf16 and back": lambda n: n.bfloat16().float() / n.bfloat16().float() * n,
    "twice its inverse": lambda n: n.reciprocal().reciprocal(),
    "full": lambda n: torch.full((), float(n)),
}


@pytest.mark.skipif(not GIVES_THE_NUMBER, reason="this transformers gives no number to such a model")
@pytest.mark.parametrize("how", NUMBERS)
def test_whatever_is_made_of_the_number_is_exact_and_silent(how):
    """A sum over num_items_in_batch, by people's own ways of taking it: exact in stock, and so with accumloss."""

    class OverTheNumber(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(**{**inputs, "labels": None}).logits
            return F.cross_entropy(*flat_of(logits, inputs["labels"]), reduction="sum") / NUMBERS[how](
                num_items_in_batch
            )

    model, examples = tagger()
    full = train(model, fresh(examples), 1)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 4, trainer_class=OverTheNumber)
    assert error(step, full) <= TRAINER_GRADIENT


@pytest.mark.skipif(not GIVES_THE_NUMBER, reason="this transformers gives no number to such a model")
@pytest.mark.parametrize("how", ["no fewer than 1", "no fewer than 1, by Python"])
def test_a_bound_on_the_number_is_one_on_that_of_the_step(how):
    """Two labels in four micro-batches: half a label each, of which no bound of 1 is meant."""
    model, examples = tagger()
    examples = fresh(examples)
    for index, row in enumerate(examples):
        row["labels"][(1 if index in (0, 5) else 0) :] = -100

    class OverTheNumber(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(**{**inputs, "labels": None}).logits
            return F.cross_entropy(*flat_of(logits, inputs["labels"]), reduction="sum") / NUMBERS[how](
                num_items_in_batch
            )

    full = train(model, fresh(examples), 1, trainer_class=OverTheNumber)
    with accumloss.registered():
        step = train(model, fresh(examples), 4, trainer_class=OverTheNumber)
    assert error(step, full) <= TRAINER_GRADIENT


# Told -------------------------------------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """Frees what its backward needs."""

    @staticmethod
    def forward(ctx, loss):
        ctx.kept = [torch.full_like(loss, 0.5)]
        return loss * 0.5

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.kept.pop()


class Told:
    """Each with what the message says."""

    class not_recognised(Trainer):
        """A mean over its own items by hand: stock adds the means up, and so it stays."""

        says = "nothing that it computes was recognised"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logp, labels = model(**{**inputs, "labels": None}).logits.log_softmax(-1), inputs["labels"]
            taken = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return -(taken * (labels != -100)).sum() / (labels != -100).sum()

    class sum_not_recognised(Trainer):
        """A plain sum by hand is exact with stock, and not touched."""

        says = "nothing that it computes was recognised"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0.01 * model(**{**inputs, "labels": None}).logits.pow(2).sum()

    class imported_inside(Trainer):
        says = "nothing that it computes was recognised"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            from torch.nn.functional import cross_entropy

            return cross_entropy(*flat(model(**{**inputs, "labels": None}), inputs["labels"]))

    class distilled(Trainer):
        """One term is known, the other is not: their ratio stays."""

        says = "a part of it was computed by none of the losses"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            with torch.no_grad():
                target = outputs.logits.flip(-1).softmax(-1)
            kl = (target * (target.log() - outputs.logits.log_softmax(-1))).sum(-1).mean()
            return 0.5 * outputs.loss + 0.5 * kl

    class takes_the_number_beside_a_mean(Trainer):
        """A sum over a Python number beside a recognised mean: each would be divided by another."""

        says = "a part of it was computed by none of the losses"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return outputs.loss + 1e-3 * outputs.logits.pow(2).sum() / int(num_items_in_batch)

    class exponential(Trainer):
        says = "a part of it was computed by none of the losses"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss.exp()

    class runs_once(Trainer):
        says = "Once, an autograd.Function of its own, stands between the loss and its terms"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return Once.apply(loss)

    class number_for_a_log(Trainer):
        """The number is looked at, and the loss does not depend on it."""

        says = "a part of it was computed by none of the losses"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen = inputs["labels"] != -100
            self.share = seen.sum() / num_items_in_batch
            return model(**{**inputs, "labels": None}).logits.pow(2).sum(-1)[seen].mean()

    class a_factor_of_the_micro_batch(Trainer):
        says = "multiplied by another number in each micro-batch"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss * (inputs["labels"] != -100).float().mean()

    class weights_of_the_micro_batch(Trainer):
        says = "class weights of cross_entropy are others in each micro-batch"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"]
            counts = labels[labels != -100].bincount(minlength=LABELS)
            return F.cross_entropy(*flat(model(**{**inputs, "labels": None}), labels), weight=1 / (1.0 + counts))

    class positives_of_the_micro_batch(Trainer):
        says = "class weights of binary_cross_entropy_with_logits are others in each micro-batch"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            target = inputs["labels"].clamp(min=0).gt(2).float()
            logits = model(**{**inputs, "labels": None}).logits[..., 0]
            weight = ((1 - target).sum() / (1 + target.sum())).reshape(1)
            return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight)

    class pairs_of_rows(Trainer):
        says = "compares the rows of its micro-batch with each other"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rows = model(**{**inputs, "labels": None}).logits.mean(1)
            return F.binary_cross_entropy_with_logits(rows @ rows.T, torch.eye(len(rows)))

    class pairs_of_rows_by_hand(Trainer):
        says = "compares the rows of its micro-batch with each other"

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            rows = model(**{**inputs, "labels": None}).logits.mean(1)
            wanted = torch.eye(len(rows))
            return F.binary_cross_entropy_with_logits(rows @ rows.T, wanted, reduction="none").mean()

    class in_training_step(Trainer):
        says = "training_step computes it without compute_loss"

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**{**inputs, "labels": None}).logits.pow(2).mean()
            loss.backward()
            return loss.detach()


TOLD = [name for name in vars(Told) if not name.startswith("_") and (GIVES_THE_NUMBER or name not in WANTS_THE_NUMBER)]


@pytest.mark.parametrize("name", TOLD)
def test_own_code_is_told_once_and_is_never_worse_than_stock(name):
    model, examples = tagger()
    trainer_class = getattr(Told, name)
    full = train(model, fresh(examples), 1, trainer_class=trainer_class)
    stock = train(model, fresh(examples), 4, trainer_class=trainer_class)
    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match=trainer_class.says) as caught:
        step = train(model, fresh(examples), 4, trainer_class=trainer_class, steps=3)
    assert len([w for w in caught if issubclass(w.category, accumloss.InexactWarning)]) == 1
    assert name in str(caught[0].message)
    assert error(step, full) <= max(error(stock, full), TRAINER_GRADIENT) * (1 + 1e-6)


class TurnsLater(Trainer):
    """Adds something in its second step that nothing recognises."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step:
            labels = inputs["labels"]
            logits = model(**{**inputs, "labels": None}).logits
            loss = loss + logits.softmax(-1).square().sum(-1)[labels != -100].mean()
        return loss


def test_what_a_loss_turns_to_later_is_told():
    options = {"trainer_class": TurnsLater, "batch_size": 2}
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        train(*tagger(), 4, **options)
    with (
        accumloss.registered(),
        pytest.warns(accumloss.InexactWarning, match="none of the losses that accumloss knows"),
    ):
        train(*tagger(), 4, steps=2, **options)


def changing(change, where):
    """A Trainer that changes its micro-batches after they were fetched."""

    class Changing(Trainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            return change(inputs) if where == "prepared" else inputs

        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, change(inputs) if where == "loss" else inputs, *args, **kwargs)

    return Changing


def twice(inputs):
    return {key: torch.cat([value, value]) for key, value in inputs.items()}


def masked(inputs):
    return {**inputs, "labels": inputs["labels"].masked_fill(inputs["input_ids"] % 3 == 0, -100)}


@pytest.mark.parametrize("where", ["prepared", "loss"])
def test_rows_that_are_repeated_after_they_were_fetched_are_exact(where):
    cls = changing(twice, where)
    full = train(*tagger(), 1, trainer_class=cls)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        for accumulation in (1, 4):
            step = train(*tagger(), accumulation, trainer_class=cls)
            assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


@pytest.mark.parametrize("where", ["prepared", "loss"])
def test_labels_that_are_masked_after_they_were_fetched_are_exact_or_told(where):
    cls = changing(masked, where)
    full, stock = (train(*tagger(), accumulation, trainer_class=cls) for accumulation in (1, 4))
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        whole = train(*tagger(), 1, trainer_class=cls)
    assert error(whole, full) <= TRAINER_GRADIENT
    with accumloss.registered(), pytest.warns(accumloss.InexactWarning, match="labels were changed after"):
        step = train(*tagger(), 4, trainer_class=cls)
    assert error(step, full) < error(stock, full) / 4


def test_trainers_in_two_threads_have_steps_of_their_own():
    meet = threading.Barrier(2, timeout=60)

    class Interleaved(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            meet.wait()  # both have entered their step
            outputs = model(**inputs)
            meet.wait()  # and none has left it
            return outputs.loss

    model, examples = tagger()
    first, second = fresh(examples), fresh(examples[::-1][:6] + examples[:2])
    full = [train(model, rows, 1) for rows in (first, second)]
    with accumloss.registered(), warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(2) as threads:
        warnings.simplefilter("error", accumloss.InexactWarning)
        made = [make_trainer(copy.deepcopy(model), rows, 4, trainer_class=Interleaved) for rows in (first, second)]
        for training in [threads.submit(trainer.train) for trainer, _ in made]:
            training.result()
    for (_, recorder), one in zip(made, full, strict=True):
        assert max(float((g - one.gradients[n]).abs().max()) for n, g in recorder.gradients.items()) <= 1e-5


def test_one_micro_batch_is_told_nothing():
    model, examples = tagger()
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        train(model, fresh(examples), 1, trainer_class=Told.not_recognised, steps=2)


def test_nothing_of_the_users_is_called_twice():
    model, examples = tagger()
    calls = []

    class Counting(Trainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(1)
            return super().compute_loss(*args, **kwargs)

    with accumloss.registered():
        train(model, fresh(examples), 4, trainer_class=Counting, steps=2)
    assert len(calls) == 8


def test_methods_and_arguments_are_as_they_were_afterwards():
    model, examples = tagger()
    with accumloss.registered():
        trainer = train(model, fresh(examples), 4).trainer
        assert not {"compute_loss", "training_step", "get_batch_samples"} & set(vars(trainer))
        assert trainer.args.gradient_accumulation_steps == 4


class Batch(dict):
    pass


@pytest.mark.parametrize("kind", ["tuple", "list", "namedtuple", "UserDict"])
def test_batches_of_any_kind_train_and_evaluate(kind):
    """What Trainer hands to an own compute_loss need be no dict."""
    import collections

    model, examples = tagger()
    Named = collections.namedtuple("Named", "ids mask tags")
    make = {
        "tuple": lambda *v: v, "list": lambda *v: list(v), "namedtuple": Named,
        "UserDict": lambda *v: collections.UserDict(zip(("ids", "mask", "tags"), v, strict=True)),
    }[kind]  # fmt: skip

    def collate(rows):
        return make(*(torch.stack([row[key] for row in rows]) for key in ("input_ids", "attention_mask", "labels")))

    class OfTuples(Trainer):
        def _prepare_inputs(self, inputs):
            return inputs

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            values = tuple(inputs.values()) if kind == "UserDict" else inputs
            outputs = model(input_ids=values[0], attention_mask=values[1])
            loss = F.cross_entropy(*flat(outputs, values[2]))
            return (loss, outputs) if return_outputs else loss

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            with torch.no_grad():
                return self.compute_loss(model, inputs).detach(), None, None

    options = {"trainer_class": OfTuples, "trainer_options": {"data_collator": collate}}
    full = train(model, fresh(examples), 1, **options)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(model, fresh(examples), 4, **options)
        whole, parts = (
            train(model, fresh(examples), 1, per_device_eval_batch_size=size, **options).trainer.evaluate(examples)
            for size in (8, 3)
        )
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
    assert abs(whole["eval_loss"] - parts["eval_loss"]) <= TRAINER_LOSS * whole["eval_loss"]


class OwnModule(nn.Module):
    """A module of one's own, in no package that is known."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embed, self.head = how, nn.Embedding(64, 8), nn.Linear(8, 64)
        self.loss = nn.CrossEntropyLoss()
        self.partial = functools.partial(F.cross_entropy, ignore_index=-100)

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        logits = self.head(self.embed(input_ids))
        flat = logits.flatten(0, 1), labels.flatten()
        if self.how == "F":
            loss = F.cross_entropy(*flat)
        elif self.how == "torch.nn.functional":
            loss = torch.nn.functional.cross_entropy(*flat)
        elif self.how == "made in forward":
            loss = nn.CrossEntropyLoss()(*flat)
        elif self.how == "made in __init__":
            loss = self.loss(*flat)
        elif self.how == "partial":
            loss = self.partial(*flat)
        elif self.how == "prompt":
            front = torch.full((len(labels), 3), -100)
            more = torch.cat([logits[:, :1].expand(-1, 3, -1), logits], 1)
            loss = F.cross_entropy(more.flatten(0, 1), torch.cat([front, labels], 1).flatten())
        elif self.how == "two ahead":
            loss = F.cross_entropy(logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())
        elif self.how == "last left out":
            loss = F.cross_entropy(logits[:, :-3].flatten(0, 1), labels[:, :-3].flatten())
        else:
            loss = F.cross_entropy(
                F.pad(logits, (0, 0, 0, 2)).flatten(0, 1), F.pad(labels, (0, 2), value=-100).flatten()
            )
        return {"loss": loss, "logits": logits}


OWN = [
    "F",
    "torch.nn.functional",
    "made in forward",
    "made in __init__",
    "partial",
    "prompt",
    "two ahead",
    "last left out",
    "padded",
]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("how", OWN)
def test_own_module_is_exact(how, split):
    examples = rows()
    for row in examples:
        row["labels"][:4] = row["input_ids"][:4]  # every micro-batch has an item two ahead, and none at the end
    full = train(OwnModule(how), fresh(examples), 1)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        step = train(OwnModule(how), fresh(examples), split[0], batch_size=split[1])
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


def evaluated(model, examples, size, trainer_class, register=True):
    with accumloss.registered() if register else contextlib.nullcontext():
        step = train(model, fresh(examples), 1, trainer_class=trainer_class, per_device_eval_batch_size=size)
        return step.trainer.evaluate(fresh(examples))["eval_loss"]


class Evaluated:
    class functional(Trainers.functional):
        pass

    class two_terms(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = 0.7 * outputs.loss - 1e-3 * F.mse_loss(outputs.logits[:, 0, 0], inputs["labels"][:, 0].float()) + 2
            return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("name", ["functional", "two_terms"])
def test_evaluation_with_an_own_compute_loss_is_that_of_the_one_batch(name):
    model, examples = tagger()
    trainer_class = getattr(Evaluated, name)
    wanted = evaluated(model, examples, 8, trainer_class, register=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        for size in (8, 3, 2, 1):
            assert abs(evaluated(model, examples, size, trainer_class) - wanted) <= 2 * TRAINER_LOSS * abs(wanted)


def test_evaluation_of_a_perplexity_is_stocks_and_told():
    model, examples = tagger()

    class Perplexity(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss.exp(), outputs) if return_outputs else outputs.loss.exp()

    for size in (8, 2, 1):
        stock = evaluated(model, examples, size, Perplexity, register=False)
        with pytest.warns(accumloss.InexactWarning, match="evaluation loss of Perplexity depends on the batch size"):
            ours = evaluated(model, examples, size, Perplexity)
        assert abs(ours - stock) <= TRAINER_LOSS * stock


def test_criteria_copy_and_pickle_as_pytorchs():
    theirs = importlib.import_module(
        "torch.nn"
    ).CrossEntropyLoss  # the names of this module are bound to ours meanwhile
    model = OwnModule("made in __init__")
    with accumloss.registered():
        trainer = train(model, fresh(rows()), 2).trainer
        held = trainer.model.loss
        assert type(held) is not theirs and isinstance(held, theirs)
        assert type(copy.deepcopy(held)) is theirs
        assert type(pickle.loads(pickle.dumps(held))) is theirs
        assert b"accumloss" not in pickle.dumps(held)
    assert type(held) is theirs is nn.CrossEntropyLoss


def test_a_training_step_outside_of_train_is_stocks():
    """A loop of somebody's own that calls Trainer's training_step: Trainer has counted no micro-batches there."""
    model, examples = causal()
    batch = {key: torch.stack([row[key] for row in examples]) for key in examples[0]}
    found = []
    for context in (contextlib.nullcontext, accumloss.registered):
        with context():
            trainer, _ = make_trainer(copy.deepcopy(model), examples, 4)
            trainer.create_optimizer()
            assert not hasattr(trainer, "current_gradient_accumulation_steps")
            loss = trainer.training_step(trainer.model, dict(batch), torch.tensor(35))
            assert not hasattr(trainer, "current_gradient_accumulation_steps")
            assert trainer.args.gradient_accumulation_steps == 4
            found.append((loss, [p.grad.clone() for p in trainer.model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=TRAINER_GRADIENT, atol=TRAINER_GRADIENT)
