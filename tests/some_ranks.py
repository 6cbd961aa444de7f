"""Trainers whose loss has a term that only some ranks compute, for the tests and for the ranks that they launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from training import rows


class OnSomeRanks(transformers.Trainer):
    """A second loss, of rows that only the second rank has: the first never calls it."""

    factor = 0.7

    def second(self, logits, labels):
        return F.cross_entropy(logits, labels)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("more_labels")
        outputs = model(**inputs)
        if bool((labels != -100).any()):
            return outputs.loss + self.factor * self.second(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs.loss


class OnSomeRanksByHand(OnSomeRanks):
    factor = 1.0

    def second(self, logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum") / (labels != -100).sum()


class OnSomeRanksWeighted(OnSomeRanks):
    def second(self, logits, labels):
        weight = torch.linspace(0.2, 3, logits.shape[-1])
        return F.cross_entropy(logits, labels, weight) + F.cross_entropy(logits.roll(1, -1), labels, weight.flip(0))


class OnSomeRanksLater(OnSomeRanks):
    """From the third window on: the ranks do not meet in it, and do in the fifth."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.state.global_step < 2:
            inputs["more_labels"] = torch.full_like(inputs["labels"], -100)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class FilledOnSomeRanks(transformers.Trainer):
    """Labels of one value are ignored by hand, of which the first rank has none: its labels are the entry as it is."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"].masked_fill(inputs["labels"] == FILLED, -100)
        logits = model(**{**inputs, "labels": None}).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class OverTheNumber(transformers.Trainer):
    """The number of all ranks, whose gradients are averaged: stock is half of the one batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**{**inputs, "labels": None}).logits, inputs["labels"]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


class PartlyOverTheNumber(transformers.Trainer):
    """Beside a mean, with a weight of its own; multiplied by the ranks where they are several, or not."""

    is_multiplied = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, labels = model(**inputs), inputs["labels"].flatten()
        total = F.cross_entropy(outputs.logits.flatten(0, 1).roll(1, -1), labels, reduction="sum")
        part = 0.3 * (total / num_items_in_batch)
        if self.is_multiplied:
            part = part * self.accelerator.num_processes
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels) + part


class PartlyOverTheNumberTimesTheRanks(PartlyOverTheNumber):
    is_multiplied = True


class OverTheNumberMeasured(OverTheNumber):
    """The same, with verify=True."""


FILLED = 3


def rows_filled_on_second_rank():
    examples = rows("tags")
    for index, example in enumerate(examples):
        labels = example["labels"]
        labels[labels == FILLED] = FILLED + 1
        if index in (2, 3, 6):
            labels[0] = FILLED
            labels[1] = 1
    return examples


ON_SOME_RANKS = {cls.__name__: cls for cls in (OnSomeRanks, OnSomeRanksByHand, OnSomeRanksWeighted)}


def rows_of_second_rank():
    """Rows of tags, of which the second rank's have more of them."""
    examples = rows("tags")
    for index, example in enumerate(examples):
        example["more_labels"] = torch.full_like(example["labels"], -100)
        if index in (2, 6, 7):
            example["more_labels"][: index + 1] = example["labels"][0].roll(1)
    return examples
