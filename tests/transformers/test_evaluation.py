"""The loss of an evaluation set is that of the one batch that holds it all, for every batch size, order and number of ranks."""

import contextlib
import copy
import functools
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tolerances import TRAINER_LOSS
from torchrun import torchrun
from training import COUNTS_POSITION_0, HEADS, IS_CURRENT, LENGTH, T5, build, make_trainer, rows, train
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

import accumloss

HERE = Path(__file__).resolve().parent
TOKEN_HEADS = [head for head, (_, _, targets) in HEADS.items() if targets in ("tokens", "tags", "pixels")]


@functools.cache
def model_in_eval(head):
    name, config, targets = HEADS[head]
    return build(name, **config).eval(), rows(targets)


def evaluate(model, examples, batch_size, register=True, method="evaluate", trainer_options=None, **arguments):
    options = {"metrics": arguments.pop("metrics", False), "evaluation": arguments.pop("evaluation", True)}
    context = accumloss.registered(**options) if register else contextlib.nullcontext()
    with context:
        trainer, _ = make_trainer(
            copy.deepcopy(model), [], 1, batch_size=1, per_device_eval_batch_size=batch_size,
            trainer_options=trainer_options, **arguments,
        )  # fmt: skip
        return getattr(trainer, method)(examples)


def close(a, b):
    return abs(a - b) <= TRAINER_LOSS * max(abs(a), abs(b))


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_loss_is_that_of_the_one_batch(head):
    model, examples = model_in_eval(head)
    whole = evaluate(model, examples, len(examples))["eval_loss"]
    for size in (1, 2, 3):
        assert close(evaluate(model, examples, size)["eval_loss"], whole)
    assert close(evaluate(model, examples[::-1], 3)["eval_loss"], whole)
    stock = evaluate(model, examples, len(examples), register=False)["eval_loss"]
    if head != "causal, no loss_type" and not (COUNTS_POSITION_0 and head in ("causal", "vision and language")):
        assert close(stock, whole)  # over one batch it is what Trainer says itself


@pytest.mark.parametrize("head", TOKEN_HEADS)
def test_stock_depends_on_the_batch_size(head):
    model, examples = model_in_eval(head)
    losses = [evaluate(model, examples, size, register=False)["eval_loss"] for size in (8, 3, 2)]
    assert max(losses) - min(losses) > 1e-3 * max(losses)


@pytest.mark.parametrize("head", ["masked, own loss", "question answering"])
def test_every_multiple_of_several_terms_is_found(head):
    """A model whose loss is not just one term: twice it, another term with other items, and something else."""
    base, examples = model_in_eval(head)

    class Multiple(type(base)):
        def forward(self, num_items_in_batch=None, **inputs):
            outputs = super().forward(**inputs)
            first = outputs.logits if "logits" in outputs else outputs.start_logits
            extra = torch.nn.functional.mse_loss(first.double(), torch.zeros_like(first).double())  # over rows
            outputs.loss = 2 * outputs.loss - 0.25 * extra + 3
            return outputs

    model = copy.deepcopy(base)
    model.__class__ = Multiple
    with torch.no_grad():
        wanted = model(**{key: torch.stack([e[key] for e in examples]) for key in examples[0]}).loss.item()
    names = [name for name in examples[0] if name not in ("input_ids", "attention_mask")]
    for size in (8, 3, 1):
        assert close(evaluate(model, examples, size, label_names=names)["eval_loss"], wanted)


@pytest.mark.parametrize("head", ["causal", "masked, own loss", "sequence class"])
def test_batches_without_items_count_nothing(head):
    model, examples = model_in_eval(head)
    ignored = [{**e, "labels": torch.full_like(e["labels"], -100)} for e in examples[:4]]
    whole = evaluate(model, examples, 8)["eval_loss"]
    for mixed in (ignored + examples, examples + ignored):
        assert close(evaluate(model, mixed, 2)["eval_loss"], whole)
    assert evaluate(model, ignored, 2)["eval_loss"] == 0.0
    stock = evaluate(model, ignored, 2, register=False, logging_nan_inf_filter=False)
    assert not math.isfinite(stock["eval_loss"]) or head == "causal"


def test_a_loss_that_is_not_finite():
    """It is left out where Trainer leaves it out, and shows where it does not."""
    model, examples = model_in_eval("causal")
    whole = evaluate(model, examples[2:], 8)["eval_loss"]

    class Broken(type(model)):
        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            if inputs["input_ids"][0, 0] == examples[0]["input_ids"][0]:
                outputs.loss = outputs.loss * math.nan
            return outputs

    broken = copy.deepcopy(model)
    broken.__class__ = Broken
    options = {"label_names": ["labels"]}
    assert close(evaluate(broken, examples, 2, **options)["eval_loss"], whole)
    assert math.isnan(evaluate(broken, examples, 2, logging_nan_inf_filter=False, **options)["eval_loss"])


@pytest.mark.parametrize("epsilon", [0.1])
@pytest.mark.parametrize("head", ["causal", "token classes, own loss", "encoder-decoder, own loss"])
def test_smoothed_loss(head, epsilon):
    model, examples = model_in_eval(head)
    losses = [evaluate(model, examples, size, label_smoothing_factor=epsilon)["eval_loss"] for size in (8, 3, 1)]
    assert close(losses[0], losses[1]) and close(losses[0], losses[2])
    assert abs(losses[0] - evaluate(model, examples, 8)["eval_loss"]) > 1e-4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ctc_is_a_mean_over_examples(reduction):
    config = {
        "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "ctc_loss_reduction": reduction, "vocab_size": 12, "feat_extract_norm": "layer",
        "layerdrop": 0.0, "num_feat_extract_layers": 2, "pad_token_id": 0, "apply_spec_augment": False,
    }  # fmt: skip
    model = build("HubertForCTC", **config).eval()
    generator = torch.Generator().manual_seed(0)
    examples = [
        {
            "input_values": torch.randn(800, generator=generator),
            "labels": torch.randint(1, 12, (4,), generator=generator),
        }
        for _ in range(7)
    ]
    losses = [evaluate(model, examples, size)["eval_loss"] for size in (7, 3, 1)]
    assert close(losses[0], losses[1]) and close(losses[0], losses[2])


# What else Trainer does -----------------------------------------------------------------------------------------------


def test_opting_out():
    model, examples = model_in_eval("masked, own loss")
    for size in (3, 1):
        stock = evaluate(model, examples, size, register=False)["eval_loss"]
        assert close(evaluate(model, examples, size, evaluation=False)["eval_loss"], stock)
        assert not close(evaluate(model, examples, size)["eval_loss"], stock)


@pytest.mark.parametrize("head", ["causal", "masked and sentence order"])
def test_predictions_and_their_metrics_are_the_same(head):
    model, examples = model_in_eval(head)
    seen = []

    def compute_metrics(found):
        logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        seen.append((logits, found.label_ids, found.losses))
        return {"size": float(len(logits))}

    options = {"trainer_options": {"compute_metrics": compute_metrics}, "include_for_metrics": ["loss"]}
    for register in (False, True):
        found = evaluate(model, examples, 3, register=register, method="predict", **options)
        assert found.metrics["test_size"] == 8 and len(seen[-1][2]) == 8
    assert all((a == b).all() for a, b in zip(seen[0][:1], seen[1][:1], strict=True))
    assert close(found.metrics["test_loss"], evaluate(model, examples, 8)["eval_loss"])


def test_batch_eval_metrics():
    model, examples = model_in_eval("sequence class")
    sizes = []

    def compute_metrics(found, compute_result):
        sizes.append(len(found.predictions))
        return {"rows": sum(sizes)} if compute_result else {}

    options = {"trainer_options": {"compute_metrics": compute_metrics}, "batch_eval_metrics": True}
    found = evaluate(model, examples, 3, **options)
    assert sizes == [3, 3, 2] and found["eval_rows"] == 8
    assert close(found["eval_loss"], evaluate(model, examples, 8)["eval_loss"])


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_seq2seq_trainer_that_generates(epsilon):
    model, examples = build("T5ForConditionalGeneration", **T5).eval(), rows()
    results = {}
    for size in (8, 3, 1):
        options = {"predict_with_generate": True, "generation_max_length": 4, "label_smoothing_factor": epsilon}
        with accumloss.registered():
            trainer = make_seq2seq(model, size, **options)
            found = trainer.predict(examples)
        assert found.predictions.shape[0] == 8
        results[size] = found.metrics["test_loss"]
        assert trainer.label_smoother is None or trainer.label_smoother.epsilon == epsilon
    assert close(results[8], results[3]) and close(results[8], results[1])
    with accumloss.registered():
        trainer = make_seq2seq(model, 8, label_smoothing_factor=epsilon)
        assert close(trainer.evaluate(examples)["eval_loss"], results[8])


def make_seq2seq(model, size, **options):
    arguments = Seq2SeqTrainingArguments(
        output_dir="unused", per_device_eval_batch_size=size, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=copy.deepcopy(model), args=arguments)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class OwnSteps(Trainer):
    """A subclass with its own prediction_step and compute_loss."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (loss * 2, outputs) if return_outputs else loss * 2

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss + 1, logits, labels


def test_a_subclass_with_methods_of_its_own():
    model, examples = model_in_eval("causal")
    plain = evaluate(model, examples, 8)["eval_loss"]
    with accumloss.registered():
        for size in (8, 3):
            trainer, _ = make_trainer(model, [], 1, 1, trainer_class=OwnSteps, per_device_eval_batch_size=size)
            assert close(trainer.evaluate(examples)["eval_loss"], 2 * plain + 1)
            assert "prediction_step" not in vars(trainer)


def test_compute_loss_func():
    model, examples = model_in_eval("causal")
    wanted = evaluate(model, examples, 8)["eval_loss"]
    options = {"trainer_options": {"compute_loss_func": accumloss.compute_loss_func}}
    for size in (8, 3):
        assert close(evaluate(model, examples, size, **options)["eval_loss"], wanted)


def test_compiled_model():
    model, examples = model_in_eval("causal")
    wanted = evaluate(model, examples, 8)["eval_loss"]
    with accumloss.registered():
        trainer, _ = make_trainer(copy.deepcopy(model), [], 1, 1, per_device_eval_batch_size=3, torch_compile=True)
        assert close(trainer.evaluate(examples)["eval_loss"], wanted)


@pytest.mark.parametrize("head", ["causal", "masked and sentence order"])
def test_metrics_of_a_compiled_model(head):
    model, examples = model_in_eval(head)
    compiled_by_aot = {"torch_compile": True, "torch_compile_backend": "aot_eager"}  # the graphs, without the C++
    with accumloss.registered(metrics=True):
        plain, compiled = (train(model, examples, 4, **options) for options in ({}, compiled_by_aot))
        logs = [found.trainer.state.log_history[0] for found in (plain, compiled)]
    assert close(logs[0]["token_entropy"], logs[1]["token_entropy"])
    assert logs[0]["token_accuracy"] == logs[1]["token_accuracy"] and close(logs[0]["loss"], logs[1]["loss"])


def test_evaluation_inside_of_training():
    model, examples = model_in_eval("masked, own loss")
    with accumloss.registered():
        plain = train(model, examples, 4, steps=3)
        trainer, _ = make_trainer(
            copy.deepcopy(model), examples, 4, steps=3, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=3,
            trainer_options={"eval_dataset": examples},
        )  # fmt: skip
        trainer.train()
        last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        weights = {n: p.detach() for n, p in trainer.model.named_parameters()}
        assert all(torch.equal(weights[n], plain.weights[n]) for n in weights)
        trained = copy.deepcopy(trainer.model).eval()
    assert len(last) == 3 and close(last[-1], evaluate(trained, examples, 8)["eval_loss"])


# Metrics --------------------------------------------------------------------------------------------------------------


def expected_metrics(model, examples):
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    with torch.no_grad():
        logits = model(**batch).logits.double()[:, :-1]
    labels = batch["labels"][:, 1:]
    seen = labels != -100
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    correct = logits.argmax(-1) == labels
    return correct[seen].double().mean().item(), entropy[seen].mean().item()


def learnable():
    """A model and examples of which it predicts some tokens right."""
    model, examples = model_in_eval("causal")
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    with torch.no_grad():
        best = model(**batch).logits.argmax(-1)[:, :-1]
    labels = batch["labels"].clone()
    take = (torch.arange(LENGTH - 1) % 3 == 0) & (labels[:, 1:] != -100)
    labels[:, 1:] = torch.where(take, best, labels[:, 1:])
    return model, [{**e, "labels": labels[i]} for i, e in enumerate(examples)]


def test_metrics_of_an_evaluation():
    model, examples = learnable()
    accuracy, entropy = expected_metrics(model, examples)
    assert 0.1 < accuracy < 0.9
    for size in (8, 3, 1):
        found = evaluate(model, examples, size, metrics=True)
        assert close(found["eval_token_accuracy"], accuracy) and close(found["eval_token_entropy"], entropy)
        assert "eval_token_accuracy" not in evaluate(model, examples, size)
    values = evaluate(*model_in_eval("regression"), 3, metrics=True)
    assert "eval_token_accuracy" not in values  # of a loss that has none


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4, 8])
def test_metrics_in_the_logs_of_training(accumulation, inplace_backward):
    model, examples = learnable()
    accuracy, entropy = expected_metrics(model, examples)
    options = {"learning_rate": 0.0, "steps": 4, "logging_steps": 2}
    with accumloss.registered(metrics=True, inplace_backward=inplace_backward):
        trained = train(model, examples, accumulation, **options)
    logs = [entry for entry in trained.trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        assert close(entry["token_accuracy"], accuracy)
        assert close(entry["token_entropy"], entropy)
    with accumloss.registered(inplace_backward=inplace_backward):
        plain = train(model, examples, accumulation, **options)
    assert "token_accuracy" not in plain.trainer.state.log_history[0]
    assert all(torch.equal(plain.gradients[n], trained.gradients[n]) for n in plain.gradients)


def test_metrics_are_of_the_first_loss():
    model, examples = model_in_eval("masked and sentence order")
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    with torch.no_grad():
        log_p = model(**batch).prediction_logits.double().log_softmax(-1)
    seen = batch["labels"] != -100
    wanted = -(log_p.exp() * log_p).sum(-1)[seen].mean().item()
    with accumloss.registered(metrics=True):
        logs = train(model, examples, 4).trainer.state.log_history
    assert close(logs[0]["token_entropy"], wanted)
    assert close(evaluate(model, examples, 3, metrics=True)["eval_token_entropy"], wanted)


@pytest.mark.parametrize("head", ["regression", "question answering, own loss"])
def test_metrics_of_other_heads(head):
    with accumloss.registered(metrics=True):
        trained = train(*model_in_eval(head), 4)
    assert ("token_accuracy" in trained.trainer.state.log_history[0]) == (head != "regression")


# Two processes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What rank 0 of two found. One torchrun for all of it."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(HERE / "distributed_evaluation.py", folder)
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("head", ["causal", "masked and sentence order", "multi label", "regression"])
@pytest.mark.parametrize("count", [8, 7, 5, 1])
def test_two_processes(head, count, two_ranks):
    """7 and 5 rows do not divide among the ranks: what fills the last batch up is counted once."""
    model, examples = model_in_eval(head)
    wanted = evaluate(model, examples[:count], 8)["eval_loss"]
    for size in (1, 2, 3):
        assert close(two_ranks[f"{head} {count} {size}"], wanted)


def test_two_processes_log_the_metrics_of_both(two_ranks):
    model, examples = learnable()
    accuracy, entropy = expected_metrics(model, examples)
    found = two_ranks
    assert close(found["trained"]["token_accuracy"], accuracy) and close(found["trained"]["token_entropy"], entropy)
    assert close(found["evaluated"]["eval_token_accuracy"], accuracy)


def test_stock_on_two_processes_is_not_that_of_one(two_ranks):
    model, examples = model_in_eval("causal")
    if IS_CURRENT:
        stock = two_ranks["stock causal 7 2"]
        assert not close(stock, evaluate(model, examples[:7], 8, register=False)["eval_loss"])
