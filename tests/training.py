"""Tiny random models and real Trainers: one batch of eight very uneven rows, whole and in pieces."""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from typing import Any, NamedTuple

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

# What stock does wrong is asserted for the versions it was measured on; what ours does right, for all.
IS_CURRENT = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
COUNTS_POSITION_0 = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 10)  # stock, of causal losses
# older ones count nothing for a model whose forward takes no keyword arguments, as BertForTokenClassification's then
GIVES_THE_NUMBER = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 0)
LOG_ROUNDING = 0.0 if IS_CURRENT else 1e-4  # older Trainers log four decimals
ROWS, LENGTH, VOCAB, LABELS = 8, 12, 64, 5
SIZES = {  # of the smallest model that each configuration allows
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
NO_DROPOUT = {
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "classifier_dropout": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "activation_dropout": 0.0,
}


def build(name: str, **config: Any) -> Any:
    """A tiny model of a transformers class, the same weights every time: a copy of one that is built once."""
    key = repr((name, config))
    if key not in _built:
        _built[key] = _build(name, config)
    torch.manual_seed(0)
    return copy.deepcopy(_built[key])


_built: dict[str, Any] = {}


def _build(name: str, config: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    sizes = {**SIZES, **NO_DROPOUT, **config}
    if name.startswith("GPT2"):
        sizes.update(n_embd=16, n_layer=1, n_head=2, n_positions=32, n_inner=32)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes))
    for part in list(model.modules()):  # batch normalisation couples the rows: no split of it is exact, with any loss
        for name, child in part.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                setattr(part, name, torch.nn.GroupNorm(1, child.num_features))
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that logits differ, and rows are easy and hard
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def rows(targets: str = "tokens", seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Eight examples whose numbers of labels run from 1 to 12.

    targets: tokens (labels at positions), tags (of LABELS classes), class, value, multi (of LABELS), span, choice
        (of three), pretraining (tokens and sentence order), image or pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [1, 12, 2, 11, 1, 3, 12, 1]  # labels of each row
    examples = []
    for count in kept:
        ids = torch.randint(2, VOCAB, (LENGTH,), generator=generator)
        example = {"input_ids": ids, "attention_mask": torch.ones(LENGTH, dtype=torch.int64)}
        labels = ids.clone()
        labels[count:] = -100
        if targets == "tokens":
            example["labels"] = labels
        elif targets == "tags":
            example["labels"] = torch.where(labels == -100, labels, labels % LABELS)
        elif targets == "class":
            example["labels"] = ids[0] % LABELS
        elif targets == "value":
            example["labels"] = torch.randn((), generator=generator)
        elif targets == "multi":
            example["labels"] = (torch.rand(LABELS, generator=generator) < 0.4).float()
        elif targets == "span":
            # every third one lies beyond the sequence, and is ignored
            example["start_positions"] = torch.tensor(len(examples) if len(examples) % 3 else 40)
            example["end_positions"] = torch.tensor(min(len(examples) + 2, LENGTH - 1))
        elif targets == "pretraining":
            example.update(labels=labels, next_sentence_label=ids[0] % 2)
        elif targets == "choice":
            example = {"input_ids": torch.randint(2, VOCAB, (3, LENGTH), generator=generator), "labels": ids[0] % 3}
        elif targets == "image":
            example = {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": ids[0] % LABELS}
        elif targets == "pixels":
            example = {"pixel_values": torch.randn(3, 32, 32, generator=generator)}
            pixels = torch.randint(0, LABELS, (32, 32), generator=generator)
            pixels.view(-1)[count * 80 :] = 255
            example["labels"] = pixels
        examples.append(example)
    return examples


CLASSES = {"num_labels": LABELS, "pad_token_id": 0}
VISION = {"image_size": 32, "patch_size": 16, "num_channels": 3, "num_labels": LABELS}
BEIT = {
    **VISION,
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "pool_scales": [1, 2],
    "use_auxiliary_head": True,
    "auxiliary_channels": 8,
    "drop_path_rate": 0.0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
QWEN_VL = {
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    },
    "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
}

# name: class, configuration, targets
HEADS = {
    "causal": ("LlamaForCausalLM", {}, "tokens"),
    "causal, no loss_type": ("GPT2LMHeadModel", {}, "tokens"),  # stock divides by the wrong number: trap 3
    "vision and language": ("Qwen2VLForConditionalGeneration", QWEN_VL, "tokens"),
    "masked": ("ModernBertForMaskedLM", {"pad_token_id": 0, "eos_token_id": 1}, "tokens"),
    "token classes": ("LlamaForTokenClassification", CLASSES, "tags"),
    "sequence class": ("LlamaForSequenceClassification", CLASSES, "class"),
    "regression": ("LlamaForSequenceClassification", {**CLASSES, "num_labels": 1}, "value"),
    "multi label": (
        "LlamaForSequenceClassification",
        {**CLASSES, "problem_type": "multi_label_classification"},
        "multi",
    ),
    "question answering": ("LlamaForQuestionAnswering", {}, "span"),
    "image class": ("ViTForImageClassification", VISION, "image"),
    "image class, no kwargs": (  # accepts_loss_kwargs = False
        "ConvNextForImageClassification",
        {"image_size": 32, "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_labels": LABELS},
        "image",
    ),
    # these call PyTorch's losses in their forward
    "masked, own loss": ("BertForMaskedLM", {}, "tokens"),
    "masked and sentence order": ("BertForPreTraining", {}, "pretraining"),
    "encoder-decoder, own loss": ("T5ForConditionalGeneration", T5, "tokens"),
    "decoder that does not shift": ("BartForCausalLM", BART, "tokens"),
    "token classes, own loss": ("BertForTokenClassification", CLASSES, "tags"),
    "sequence class, own loss": ("BertForSequenceClassification", CLASSES, "class"),
    "regression, own loss": ("BertForSequenceClassification", {"num_labels": 1}, "value"),
    "multi label, own loss": (
        "BertForSequenceClassification",
        {**CLASSES, "problem_type": "multi_label_classification"},
        "multi",
    ),
    "question answering, own loss": ("BertForQuestionAnswering", {}, "span"),
    "multiple choice, own loss": ("BertForMultipleChoice", {}, "choice"),
    "segmentation": ("BeitForSemanticSegmentation", BEIT, "pixels"),
}


@functools.cache
def model_and_rows(head):
    name, config, targets = HEADS[head]
    return build(name, **config), rows(targets)


class Step(NamedTuple):
    """What one optimizer step did."""

    gradients: dict[str, torch.Tensor]
    loss: float  # as logged
    weights: dict[str, torch.Tensor]
    trainer: Trainer


class Recorder(TrainerCallback):
    """Keeps the gradients that the first optimizer step finds, and what is logged."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def make_trainer(
    model: Any,
    examples: list[dict[str, torch.Tensor]],
    accumulation: int,
    batch_size: int | None = None,
    steps: int = 1,
    trainer_class: type = Trainer,
    trainer_options: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Trainer, Recorder]:
    options = {
        "per_device_train_batch_size": batch_size or math.ceil(len(examples) / accumulation),
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        "remove_unused_columns": False,
        "output_dir": tempfile.gettempdir(),
        **arguments,
    }
    recorder = Recorder()
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=examples,
        callbacks=[recorder],
        **(trainer_options or {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(examples)
    return trainer, recorder


def train(model: Any, examples: list[dict[str, torch.Tensor]], accumulation: int, **options: Any) -> Step:
    """Trains a copy of the model for one optimizer step (or ``steps``) over all of the examples, in order."""
    trainer, recorder = make_trainer(copy.deepcopy(model), examples, accumulation, **options)
    trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return Step(recorder.gradients, recorder.losses[-1], weights, trainer)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(t.double().pow(2).sum().item() for t in tensors.values()))


def ratio(step: Step, full: Step) -> float:
    """Size of the gradient, of that of the one batch."""
    return norm(step.gradients) / norm(full.gradients)


def error(step: Step, full: Step) -> float:
    """Relative error of the gradient."""
    assert step.gradients.keys() == full.gradients.keys()
    difference = {n: step.gradients[n].double() - full.gradients[n].double() for n in full.gradients}
    return norm(difference) / norm(full.gradients)


def weight_error(step: Step, full: Step) -> float:
    difference = {n: step.weights[n].double() - full.weights[n].double() for n in full.weights}
    return norm(difference) / norm(full.weights)


def loss_gap(loss: float, wanted: float) -> float:
    """Relative difference of a logged loss."""
    return max(0.0, abs(loss - wanted) - LOG_ROUNDING) / (abs(wanted) or 1.0)


def loss_error(step: Step, full: Step) -> float:
    return loss_gap(step.loss, full.loss)
