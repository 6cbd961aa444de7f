"""How frameworks on top of Trainer come by their loss: the idioms of LLaMA-Factory, ms-swift, axolotl and unsloth, in our words.

Each is exact without a word over any split, though it was written for the Trainer that it was written for.
"""

from __future__ import annotations

import functools
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from torch import nn
from training import build, error, loss_error, rows, train
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

import accumloss

SPLITS = {"8x1": (8, 1), "4x2": (4, 2), "3+3+2": (3, 3)}
IGNORED = -100


@functools.cache
def model_and_rows():
    """The last token of each row is no target, so that shifted and unshifted counts differ by row."""
    examples = rows()
    for i, example in enumerate(examples):
        example["labels"][1] = 5 + i  # a mean that is divided by hand is 0 / 0 where a row has no target
        example["loss_scale"] = torch.linspace(0.2, 1.5, example["labels"].numel()).roll(i)
    return build("LlamaForCausalLM"), examples


def without_scale(inputs):
    return {key: value for key, value in inputs.items() if key != "loss_scale"}


def per_token(outputs, labels):
    """(B, T) losses; 0 where there is no target."""
    shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    logits = outputs.logits.float()
    values = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=IGNORED, reduction="none")
    return values.view_as(shifted), shifted


class Processor:
    """What a multimodal framework hands in beside the tokenizer."""

    model_input_names = ("input_ids",)

    def save_pretrained(self, folder):
        raise AssertionError("nothing is saved here")


class Idioms:
    class processor_and_no_loss_kwargs(Trainer):
        """With a processor the model is taken for one that ignores num_items_in_batch."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.processor = Processor()
            self.model_accepts_loss_kwargs = False

        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, without_scale(inputs), *args, **kwargs)

    class smoother_without_the_items(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = without_scale(inputs)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = LabelSmoother(epsilon=0.1)(outputs, labels, shift_labels=True)
            return (loss, outputs) if return_outputs else loss

    class asks_for_the_signature(Trainer):
        """Calls the model's loss with what its signature names."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs = without_scale(inputs)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            names = inspect.signature(model.loss_function).parameters
            given = {"num_items_in_batch": num_items_in_batch} if "num_items_in_batch" in names else {}
            assert given or any(p.kind is p.VAR_KEYWORD for p in names.values())
            loss = model.loss_function(outputs.logits, labels, vocab_size=outputs.logits.shape[-1], **given)
            return (loss, outputs) if return_outputs else loss

    class scaled_tokens(Trainer):
        """Per-token weights that the dataset brings, over the items of the step, or of the batch where there is no number."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            scale = inputs["loss_scale"]
            outputs = model(**{k: v for k, v in without_scale(inputs).items() if k != "labels"})
            values, shifted = per_token(outputs, inputs["labels"])
            if num_items_in_batch is None:
                num_items_in_batch = (shifted != IGNORED).sum()
            loss = (values * F.pad(scale, (0, 1))[..., 1:]).sum() / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    class fetches_by_itself(Trainer):
        """An own get_batch_samples that counts in one go, and gives up where there are no labels."""

        def get_batch_samples(self, epoch_iterator, num_batches, device=None, *_):
            batches = list(itertools.islice(epoch_iterator, num_batches))
            counted = [(batch["labels"][..., 1:] != IGNORED).sum() for batch in batches if "labels" in batch]
            items = torch.stack(counted).sum() if counted else None
            return batches, items if items is None or device is None else items.to(device)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, without_scale(inputs), return_outputs, num_items_in_batch)

    class hands_the_items_to_the_model(Trainer):
        """Passes the number on itself, and divides by nothing."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**without_scale(inputs), num_items_in_batch=num_items_in_batch)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class criterion_by_hand(Trainer):
        """A criterion of its own that is a sum, divided by what was counted in the batch."""

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            outputs = model(**{k: v for k, v in without_scale(inputs).items() if k != "labels"})
            labels = inputs["labels"][..., 1:].contiguous()
            logits = outputs.logits[..., :-1, :].contiguous()
            total = nn.CrossEntropyLoss(reduction="sum")(logits.flatten(0, 1), labels.flatten())
            loss = total / (labels != IGNORED).sum()
            return (loss, outputs) if return_outputs else loss


def weighted_sum(outputs, labels, num_items_in_batch=None):
    """A compute_loss_func that sums over per-token weights: here by how likely the token is."""
    values, shifted = per_token(outputs, labels)
    weights = torch.exp(-values.detach()) * (shifted != IGNORED)
    items = (shifted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return (values * weights).sum() / items


IDIOMS = {name: {"trainer_class": cls} for name, cls in vars(Idioms).items() if isinstance(cls, type)}
IDIOMS["weighted_sum"] = {
    "trainer_class": Trainer,
    "trainer_options": {"compute_loss_func": weighted_sum},
    "remove_unused_columns": True,
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("idiom", IDIOMS)
def test_an_idiom_is_exact_and_nothing_is_said(idiom, split):
    model, examples = model_and_rows()
    options = IDIOMS[idiom]
    full = train(model, examples, 1, **options)
    with accumloss.registered():  # an InexactWarning would be an error
        step = train(model, examples, split[0], batch_size=split[1], **options)
    assert error(step, full) < TRAINER_GRADIENT
    assert loss_error(step, full) < TRAINER_LOSS


WRONG = ("processor_and_no_loss_kwargs", "smoother_without_the_items", "criterion_by_hand")


@pytest.mark.parametrize("idiom", WRONG)
def test_an_idiom_that_ignores_the_items_is_wrong_in_stock(idiom):
    model, examples = model_and_rows()
    full = train(model, examples, 1, **IDIOMS[idiom])
    step = train(model, examples, 4, batch_size=2, **IDIOMS[idiom])
    assert error(step, full) > 1000 * TRAINER_GRADIENT
