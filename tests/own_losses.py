"""Losses that people average by hand, build labels for, or call in other ways: what the tests of exactness train."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from training import CLASSES, COUNTS_POSITION_0, GIVES_THE_NUMBER, LABELS, build, make_trainer, rows
from transformers import Trainer

import accumloss


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


def fresh(examples):
    """Rows whose tensors may be written over."""
    return [{key: value.clone() for key, value in row.items()} for row in examples]


def of(kind):
    model, examples, options = kind()
    return model, examples, dict(options)


class Exact:
    """name -> model, examples, options of train(); the name says what people do."""

    def mean_of_accumloss():
        def loss(self, model, inputs, n):
            return accumloss.masked_lm_loss(model(**inputs).logits, inputs["labels"])

        return *tagger(), computes(loss)

    def mean_of_accumloss_beside_another():
        def loss(self, model, inputs, n):
            outputs = model(**inputs)
            weight = torch.linspace(0.5, 2, LABELS)
            shifted = accumloss.causal_lm_loss(outputs.logits, inputs["labels"], weight=weight)
            return outputs.loss + 0.3 * shifted

        return *tagger(), computes(loss)

    def sums_of_accumloss():
        def loss(self, model, inputs, n):
            return accumloss.cross_entropy(model(**inputs).logits, inputs["labels"], shift=1).mean_loss

        return *tagger(), computes(loss)

    def sums_of_accumloss_with_class_weights():
        def loss(self, model, inputs, n):
            weight = torch.linspace(0.5, 2, LABELS)
            return accumloss.cross_entropy(model(**inputs).logits, inputs["labels"], weight=weight).mean_loss

        return *tagger(), computes(loss)

    def sums_of_accumloss_over_the_number():
        def loss(self, model, inputs, n):
            return accumloss.cross_entropy(model(**inputs).logits, inputs["labels"]).loss_sum / n

        return *tagger(), computes(loss)

    def of_hidden_states():
        def loss(self, model, inputs, n):
            hidden = model.bert(**{name: value for name, value in inputs.items() if name != "labels"})[0]
            head = model.classifier
            mean = accumloss.linear_causal_lm_loss(hidden, head.weight, inputs["labels"], bias=head.bias)
            sums = accumloss.linear_cross_entropy(hidden, head.weight, inputs["labels"], bias=head.bias)
            return 0.5 * mean + sums.mean_loss

        return *tagger(), computes(loss)

    def chunks_of_accumloss_over_one_count():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits.chunk(3, 1), inputs["labels"].chunk(3, 1)
            return sum(map(accumloss.cross_entropy, logits, labels)).mean_loss

        return *tagger(), computes(loss)

    def chunks_over_one_count():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            parts = zip(logits.split(7), labels.split(7), strict=True)  # more of them where there are more rows
            return sum(F.cross_entropy(x, y, reduction="sum") for x, y in parts) / (labels != -100).sum().clamp(min=1)

        return *tagger(), computes(loss)

    def chunks_over_their_weights_beside_a_sum():
        weight = torch.linspace(0.5, 2, LABELS)

        def loss(self, model, inputs, n):
            logits, labels = flat(model(**inputs), inputs["labels"])
            of_all = F.cross_entropy(logits.roll(1, -1), labels, reduction="sum") / (labels != -100).sum()
            parts = zip(logits.split(5), labels.split(5), strict=True)
            total = sum(F.cross_entropy(x, y, weight, reduction="sum") for x, y in parts)
            is_item = labels != -100
            return 0.5 * of_all + total / weight[labels[is_item]].sum()

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means_by_hand_in_a_loop():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            total = 0
            for x, y in zip(logits, labels, strict=True):
                total = total + F.cross_entropy(x, y, reduction="sum") / (y != -100).sum()
            return total / len(labels)

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means_of_their_items_in_a_loop():
        def loss(self, model, inputs, n):
            rows = zip(model(**inputs).logits, inputs["labels"], strict=True)
            return sum(F.cross_entropy(x, y, reduction="none")[y != -100].mean() for x, y in rows) / len(
                inputs["labels"]
            )

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_sums_of_accumloss_in_a_loop():
        def loss(self, model, inputs, n):
            rows = zip(model(**inputs).logits, inputs["labels"], strict=True)
            return torch.stack([accumloss.cross_entropy(x, y).mean_loss for x, y in rows]).mean()

        return *tagger(), computes(loss)

    def mean_of_the_models_own_means_in_a_loop():
        def loss(self, model, inputs, n):
            rows = range(len(inputs["labels"]))
            return torch.stack([model(**{k: v[i][None] for k, v in inputs.items()}).loss for i in rows]).mean()

        return *tagger(), computes(loss)

    def sum_of_the_rows_own_means():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            return 0.1 * sum(F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True))

        return *tagger(), computes(loss)

    def sum_of_the_rows_own_means_beside_a_mean():
        def loss(self, model, inputs, n):
            outputs = model(**inputs)
            rows = zip(2 * outputs.logits, inputs["labels"], strict=True)
            return outputs.loss + torch.stack([F.cross_entropy(x, y) for x, y in rows]).sum()

        return *tagger(), computes(loss)

    def chunks_with_items_only():
        def loss(self, model, inputs, n):
            logits, labels = flat(model(**inputs), inputs["labels"])
            total = 0
            for x, y in zip(logits.split(4), labels.split(4), strict=True):
                if (y != -100).any():
                    total = total + F.cross_entropy(x, y, reduction="sum")
            return total / (labels != -100).sum()

        return *tagger(), computes(loss)

    def chunks_of_the_sequence_with_items_only():
        def loss(self, model, inputs, n):
            total = 0
            for x, y in zip(model(**inputs).logits.split(4, 1), inputs["labels"].split(4, 1), strict=True):
                if (y != -100).any():
                    total = total + accumloss.cross_entropy(x, y)
            return total.mean_loss

        return *tagger(), computes(loss)

    def chunks_from_behind():
        def loss(self, model, inputs, n):
            logits, labels = flat(model(**inputs), inputs["labels"])
            parts = reversed(list(zip(logits.split(5), labels.split(5), strict=True)))
            return sum(F.cross_entropy(x, y, reduction="sum") for x, y in parts) / (labels != -100).sum()

        return *tagger(), computes(loss)

    def chunks_with_a_stride():
        def loss(self, model, inputs, n):
            logits, labels = flat(model(**inputs), inputs["labels"])
            parts = [F.cross_entropy(logits[i::3], labels[i::3], reduction="sum") for i in range(3)]
            return 0.25 * sum(parts) / (labels != -100).sum()

        return *tagger(), computes(loss)

    def chunks_of_two_kinds():
        def loss(self, model, inputs, n):
            logits, labels = flat(model(**inputs), inputs["labels"])

            def mean(logits, size):
                parts = zip(logits.split(size), labels.split(size), strict=True)
                return sum(F.cross_entropy(x, y, reduction="sum") for x, y in parts) / (labels != -100).sum()

            return mean(logits, 5) + 0.3 * mean(2 * logits, 4)

        return *tagger(), computes(loss)

    def chunks_through_the_head():
        def loss(self, model, inputs, n):
            hidden = model.bert(**{name: value for name, value in inputs.items() if name != "labels"})[0].flatten(0, 1)
            labels = inputs["labels"].flatten()
            parts = zip(hidden.split(7), labels.split(7), strict=True)
            return (
                sum(F.cross_entropy(model.classifier(h), y, reduction="sum") for h, y in parts) / (labels != -100).sum()
            )

        return *tagger(), computes(loss)

    def values_of_chunks():
        def loss(self, model, inputs, n):
            logits, labels = flat(model(**inputs), inputs["labels"])
            parts = zip(logits.split(5), labels.split(5), strict=True)
            return torch.cat([F.cross_entropy(x, y, reduction="none") for x, y in parts]).sum() / (labels != -100).sum()

        return *tagger(), computes(loss)

    def rows_in_a_loop_beside_chunks():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            rows = torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]).mean()
            parts = zip(logits.split(5, 1), labels.split(5, 1), strict=True)
            chunks = sum(F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") for x, y in parts)
            return rows + 0.5 * chunks / (labels != -100).sum()

        return *tagger(), computes(loss)

    def rows_over_one_count():
        def loss(self, model, inputs, n):
            rows = zip(model(**inputs).logits, inputs["labels"], strict=True)
            return sum(F.cross_entropy(x, y, reduction="sum") for x, y in rows) / (inputs["labels"] != -100).sum()

        return *tagger(), computes(loss)

    def token_losses_over_their_items():
        def loss(self, model, inputs, n):
            losses = accumloss.token_losses(model(**inputs).logits, inputs["labels"], shift=1)
            return losses.sum() / (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)

        return *tagger(), computes(loss)

    def token_log_probs_of_the_items():
        def loss(self, model, inputs, n):
            log_probs = accumloss.token_log_probs(model(**inputs).logits, inputs["labels"])
            return -log_probs[inputs["labels"] != -100].mean()

        return *tagger(), computes(loss)

    def distillation_of_accumloss():
        def loss(self, model, inputs, n):
            logits = model(**inputs).logits
            return accumloss.distillation_loss(logits, (7 * logits.detach()).sin(), inputs["labels"])

        return *tagger(), computes(loss)

    def mean_of_accumloss_in_a_module():
        return Head(lambda self, logits, labels: accumloss.masked_lm_loss(logits, labels)), tagger()[1], {}

    def loss_function_of_accumloss():
        model = copy.deepcopy(tagger()[0])
        model.loss_function = accumloss.token_classification_loss
        return model, tagger()[1], {}

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

    def sum_over_its_own_items_times_a_weight():
        def loss(self, model, inputs, n):
            outputs = model(**inputs)
            logits, labels = flat(outputs, inputs["labels"])
            other = F.cross_entropy(logits.roll(1, -1), labels, reduction="sum")
            return outputs.loss + 0.37 * (other / (inputs["labels"] != -100).sum())

        return *tagger(), computes(loss)

    def none_over_the_mask_times_a_weight():
        def loss(self, model, inputs, n):
            outputs, mask = model(**inputs), (inputs["labels"] != -100).flatten().float()
            return outputs.loss + (per_token(outputs, inputs["labels"]) * mask * 0.5).sum() * (1.0 / mask.sum())

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means():
        def loss(self, model, inputs, n):
            logits = model(**{**inputs, "labels": None}).logits
            return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, inputs["labels"], strict=True)]).mean()

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means_by_hand():
        def loss(self, model, inputs, n):
            outputs, labels = model(**inputs), inputs["labels"]
            of_rows = per_token(outputs, labels).view(labels.shape).sum(1) / (labels != -100).sum(1)
            return outputs.loss + 0.3 * of_rows.mean()

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means_in_a_loop():
        def loss(self, model, inputs, n):
            logits, total = model(**inputs).logits, 0
            for i in range(len(logits)):
                total = total + F.cross_entropy(logits[i], inputs["labels"][i])
            return total / len(logits)

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means_of_accumloss_in_a_loop():
        def loss(self, model, inputs, n):
            outputs = model(**inputs)
            rows = zip(outputs.logits.roll(1, -1), inputs["labels"], strict=True)
            means = [accumloss.masked_lm_loss(x, y) for x, y in rows]
            return outputs.loss + 0.3 * sum(means) / len(means)

        return *tagger(), computes(loss)

    def mean_of_the_rows_own_means_in_a_module():
        def loss(self, logits, labels):
            values = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            return (values.sum(1) / (labels != -100).sum(1)).sum() / len(labels)

        class NoKeywords(Head):
            def forward(self, input_ids, attention_mask=None, labels=None):
                return super().forward(input_ids, labels=labels)

        return NoKeywords(loss), rows(), {}

    def sum_that_was_complex():
        def loss(self, model, inputs, n):
            total = F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum")
            return (total * torch.tensor(1 + 1j)).real / (inputs["labels"] != -100).sum()

        return *tagger(), computes(loss)

    def sum_over_twice_its_items():
        def loss(self, model, inputs, n):
            total = F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="sum")
            return total / (2 * (inputs["labels"] != -100).sum())

        return *tagger(), computes(loss)

    def mean_over_a_constant():
        def loss(self, model, inputs, n):
            logits = model(**inputs).logits
            return 2 * F.mse_loss(logits, logits.detach().flip(-1), reduction="none").mean() / 3

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

    def of_hidden_states_over_the_number():
        def loss(self, model, inputs, n):
            hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
            return accumloss.linear_causal_lm_loss(hidden, model.lm_head.weight, inputs["labels"], n)

        return build("LlamaForCausalLM"), rows(), computes(loss)

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


WANTS_THE_NUMBER = (
    "none_over_the_number",
    "mean_times_its_items_over_the_number",
    "mean_times_its_items_over_an_int",
    "sums_of_accumloss_over_the_number",
)


EXACT = [
    name
    for name in vars(Exact)
    if not name.startswith("_")
    and (GIVES_THE_NUMBER or name not in WANTS_THE_NUMBER)
    and not (COUNTS_POSITION_0 and name == "labels_made_in_prepare_inputs")  # the one batch of stock is wrong then
]


class Sum(Trainer):
    """Divides by nothing; DDP averages the gradients of the ranks."""

    factor = 0.3

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**inputs).logits, inputs["labels"]
        return self.factor * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


class SumTimesATenth(Sum):
    """By a factor that may be one over a count."""

    factor = 0.1


class SumTimesRanks(Sum):
    """Multiplies by the ranks by itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits, labels = model(**inputs).logits, inputs["labels"]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total * self.args.world_size


# of own_losses.py, where ranks make another difference
OWN = (
    "sum_beside_a_mean",
    "sum_of_the_rows_own_means",
    "sum_of_the_rows_own_means_beside_a_mean",
    "mean_of_the_rows_own_means_by_hand_in_a_loop",
    "mean_of_the_models_own_means_in_a_loop",
    "chunks_of_two_kinds",
    "chunks_with_items_only",
    "rows_in_a_loop_beside_chunks",
)
ON_RANKS = {name: of(getattr(Exact, name))[2]["trainer_class"] for name in OWN} | {
    "sum": Sum,
    "sum_times_the_ranks": SumTimesRanks,
}


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

    def one_row_by_its_index():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            return (F.cross_entropy(logits[0], labels[0]) + F.cross_entropy(logits[-1], labels[-1])) / 2

        return (
            "of one row was called by its index|come from no entry",
            *tagger(),
            computes(loss),
            (8, 1),
            (4, 2),
            (3, 3),
        )

    def largest_of_the_rows():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            return torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)]).max()

        return "of single rows is averaged in a way that", *tagger(), computes(loss), (8, 1), (4, 2), (3, 3)

    def mean_of_the_rows_that_are_long():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            rows = zip(logits, labels, strict=True)
            found = [F.cross_entropy(x, y) for x, y in rows if (y != -100).sum() > 1]
            return sum(found) / len(found) if found else 0 * logits.sum()

        says = "may be a mean over the rows that have one|in a micro-batch before|in a way that is not recognised"
        return says, *tagger(), computes(loss), (8, 1), (4, 2), (3, 3)

    def rows_weighed_by_something():
        def loss(self, model, inputs, n):
            rows = zip(model(**inputs).logits, inputs["labels"], strict=True)
            weight = 1.0 + inputs["input_ids"][:, 0] % 3
            return (torch.stack([F.cross_entropy(x, y) for x, y in rows]) * weight).sum() / weight.sum()

        says = "of single rows is averaged in a way that|over something else in a micro-batch before"
        return says, *tagger(), computes(loss), (8, 1), (4, 2), (3, 3)

    def a_loss_in_some_micro_batches():
        def loss(self, model, inputs, n):
            outputs = model(**inputs)
            is_short = int((inputs["labels"] != -100).sum()) < 8
            shifted = accumloss.causal_lm_loss(outputs.logits, inputs["labels"]) if is_short else 0
            return outputs.loss + shifted

        return (
            "is computed in some micro-batches alone, and others have items",
            *tagger(),
            computes(loss),
            (8, 1),
            (4, 2),
        )

    def halves_of_the_rows():
        def loss(self, model, inputs, n):
            logits, labels = model(**inputs).logits, inputs["labels"]
            half = (len(labels) + 1) // 2
            parts = list(zip(logits.split(half), labels.split(half), strict=True))
            return sum(F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in parts) / len(parts)

        says = "may be a mean over the first or the second half|no entry of the batch"
        return says, *tagger(), computes(loss), (8, 1), (4, 2), (3, 3)

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


# What nothing recognises, and measuring finds ----


def by_hand_over_rows(self, model, inputs, n):
    """A penalty by hand, a mean over rows, beside a mean over labels."""
    outputs = model(**inputs)
    return outputs.loss + 0.1 * outputs.logits.logsumexp(-1).pow(2).sum(-1).mean()


def by_hand_over_labels(self, model, inputs, n):
    outputs, labels = model(**{**inputs, "labels": None}), inputs["labels"]
    taken = outputs.logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(taken * (labels != -100)).sum() / (labels != -100).sum()


def focal(self, model, inputs, n):
    values = F.cross_entropy(*flat(model(**inputs), inputs["labels"]), reduction="none")
    mask = inputs["labels"].flatten() != -100
    return ((1 - torch.exp(-values)) ** 2 * values)[mask].mean()


def distilled(self, model, inputs, n):
    outputs = model(**inputs)
    target = outputs.logits.detach().flip(-1).softmax(-1)
    return 0.5 * outputs.loss + 0.5 * (target * (target.log() - outputs.logits.log_softmax(-1))).sum(-1).mean()


MEASURED = {"rows": by_hand_over_rows, "labels": by_hand_over_labels, "focal": focal, "distilled": distilled}


class ByHandTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return by_hand_over_labels(self, model, inputs, num_items_in_batch)


def make_own():
    return make_trainer(copy.deepcopy(tagger()[0]), rows("tags"), 4, trainer_class=ByHandTrainer)[0]


def make_stock():
    return make_trainer(build("LlamaForCausalLM"), rows(), 4)[0]
