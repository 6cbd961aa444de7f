"""A step over micro-batches is the step over the one batch, with the real Trainer, head by head."""

import functools

import pytest
import torch
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from training import (
    CLASSES,
    COUNTS_POSITION_0,
    HEADS,
    IS_CURRENT,
    LABELS,
    T5,
    build,
    error,
    loss_error,
    loss_gap,
    make_trainer,
    model_and_rows,
    norm,
    ratio,
    rows,
    train,
    weight_error,
)
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import accumloss

STOCK_IS_EXACT = {"causal": True, "image class": True, "token classes": False, "masked, own loss": False}


@functools.cache
def whole(head):
    """The step over the one batch, accumloss registered."""
    with accumloss.registered():
        return train(*model_and_rows(head), 1)


MORE = pytest.mark.slow("the fast tier has one even split and the uneven one")
SPLITS = [pytest.param((2, 4), marks=MORE), (4, 2), pytest.param((8, 1), marks=MORE), (3, 3)]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_step_is_that_of_the_one_batch(head, split):
    accumulation, batch_size = split
    with accumloss.registered():
        step = train(*model_and_rows(head), accumulation, batch_size=batch_size)
    assert norm(whole(head).gradients) > 0
    assert abs(ratio(step, whole(head)) - 1) <= TRAINER_GRADIENT
    assert error(step, whole(head)) <= TRAINER_GRADIENT
    assert loss_error(step, whole(head)) <= TRAINER_LOSS


@pytest.mark.parametrize("head", HEADS)
def test_one_batch_is_that_of_stock(head):
    """The same loss and gradient as transformers' own, where there is nothing to accumulate."""
    miscounts = COUNTS_POSITION_0 and head in ("causal", "vision and language")
    if head != "causal, no loss_type" and not miscounts:
        stock = train(*model_and_rows(head), 1)
        assert error(whole(head), stock) <= TRAINER_GRADIENT
        assert loss_error(whole(head), stock) <= TRAINER_LOSS


@pytest.mark.skipif(not IS_CURRENT, reason="transformers 5.23 and newer: what stock does wrong is of a version")
@pytest.mark.parametrize("head", STOCK_IS_EXACT)
def test_stock_is_exact_only_where_we_say_so(head):
    """Of a sum and a mean that Trainer knows, and of two that it does not; docs/census.md has every class."""
    stock_whole, stock = train(*model_and_rows(head), 1), train(*model_and_rows(head), 4)
    assert (error(stock, stock_whole) <= TRAINER_GRADIENT) == STOCK_IS_EXACT[head]


@pytest.mark.parametrize("accumulation", [2, 8])
@pytest.mark.parametrize("head", ["causal", "token classes", "question answering"])
def test_five_steps_of_adamw(head, accumulation):
    model, examples = model_and_rows(head)
    with accumloss.registered():
        # the gradient of the QA head's bias is zero but for rounding, which an epsilon of 1e-8 would make a step of
        options = {"steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-5}
        full = train(model, examples, 1, **options)
        step = train(model, examples, accumulation, **options)
    assert weight_error(step, full) <= TRAINER_GRADIENT
    assert loss_error(step, full) <= TRAINER_GRADIENT  # of the fifth step: the weights differ by then


def test_last_window_of_an_epoch_is_shorter():
    """Three micro-batches of one row make a step; the last window of eight rows has two."""
    model, examples = model_and_rows("token classes")
    with accumloss.registered():
        steps = {"num_train_epochs": 1, "steps": -1}
        in_pieces = train(model, examples, 3, batch_size=1, **steps)
        in_threes = train(model, examples, 1, batch_size=3, **steps)
    assert in_pieces.trainer.state.global_step == in_threes.trainer.state.global_step == 3
    assert weight_error(in_pieces, in_threes) <= TRAINER_GRADIENT
    assert loss_error(in_pieces, in_threes) <= TRAINER_LOSS


@pytest.mark.parametrize(
    "head", ["causal", "causal, no loss_type", "token classes", "sequence class", "vision and language"]
)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing(head, accumulation):
    model, examples = model_and_rows(head)
    smoothing = 0.2
    with accumloss.registered():
        full = train(model, examples, 1, label_smoothing_factor=smoothing)
        step = train(model, examples, accumulation, label_smoothing_factor=smoothing)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
    if accumulation == 1:
        shift = head not in ("token classes", "sequence class")
        wanted = smoothed(model, examples, smoothing, shift)
        assert loss_gap(full.loss, wanted) <= TRAINER_LOSS
        assert error(full, whole(head)) > 1e-2


def smoothed(model, examples, smoothing, shift):
    """The smoothed loss of the one batch by PyTorch, in float64."""
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits.double()
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing)
    return loss.item()


def test_label_smoothing_of_a_loss_in_forward():
    """T5 computes its loss itself, without smoothing: the kernel then smooths over the logits it returns."""
    model, examples = t5(), rows()
    with accumloss.registered():
        full = train(model, examples, 1, label_smoothing_factor=0.1)
        step = train(model, examples, 4, label_smoothing_factor=0.1)
    stock = train(model, prepared(model, examples), 1, label_smoothing_factor=0.1)
    assert error(step, full) <= TRAINER_GRADIENT
    assert error(full, stock) <= TRAINER_GRADIENT and loss_error(full, stock) <= TRAINER_LOSS


def t5():
    return build("T5ForConditionalGeneration", **T5)


def prepared(model, examples):
    """What DataCollatorForSeq2Seq does for stock, whose smoother takes the labels away from the model."""
    shifted = model._shift_right(torch.stack([e["labels"] for e in examples]))
    return [{**e, "decoder_input_ids": ids} for e, ids in zip(examples, shifted, strict=True)]


def test_label_smoothing_in_evaluation():
    """The evaluation loss of the one batch is the smoothed one, with Trainer and with Seq2SeqTrainer."""
    model, examples = model_and_rows("causal")
    with accumloss.registered():
        trainer, _ = make_trainer(model, examples, 1, label_smoothing_factor=0.1, per_device_eval_batch_size=8)
        loss = trainer.evaluate(examples)["eval_loss"]
    assert loss_gap(loss, smoothed(model.eval(), examples, 0.1, True)) <= TRAINER_LOSS
    model.train()
    assert issubclass(Seq2SeqTrainer, type(trainer)) and Seq2SeqTrainingArguments  # evaluates by the same method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_model(dtype):
    """The gradients differ by what the dtype rounds, not by a factor."""
    model, examples = model_and_rows("causal")
    model = build("LlamaForCausalLM").to(dtype)
    unit = torch.finfo(dtype).eps
    with accumloss.registered():
        full = train(model, examples, 1)
        step = train(model, examples, 8)
    assert abs(ratio(step, full) - 1) <= 4 * unit
    assert loss_error(step, full) <= 2 * unit


def test_autocast():
    model, examples = model_and_rows("token classes")
    unit = torch.finfo(torch.bfloat16).eps
    with accumloss.registered():
        full = train(model, examples, 1, bf16=True)
        step = train(model, examples, 8, bf16=True)
    assert abs(ratio(step, full) - 1) <= 4 * unit
    assert loss_error(step, full) <= 2 * unit


def test_gradient_checkpointing():
    model, examples = model_and_rows("token classes")
    with accumloss.registered():
        step = train(model, examples, 4, gradient_checkpointing=True)
    assert error(step, whole("token classes")) <= TRAINER_GRADIENT


@pytest.mark.parametrize("head", ["causal", "token classes", "masked, own loss"])
def test_torch_compile(head):
    """The causal head is handed the count; the others ask the step for it, at the price of a graph break."""
    torch.compiler.reset()
    model, examples = model_and_rows(head)
    with accumloss.registered():
        step = train(model, examples, 4, torch_compile=True, torch_compile_backend="aot_eager")
    gradients = {name.removeprefix("_orig_mod."): grad for name, grad in step.gradients.items()}
    assert error(step._replace(gradients=gradients), whole(head)) <= TRAINER_GRADIENT
    assert loss_error(step, whole(head)) <= TRAINER_LOSS


@pytest.mark.parametrize("head", ["causal", "token classes"])
def test_lora(head):
    peft = pytest.importorskip("peft")
    name, config, targets = HEADS[head]
    saved = ["lm_head"] if head == "causal" else ["score"]
    task = peft.TaskType.CAUSAL_LM if head == "causal" else peft.TaskType.TOKEN_CLS
    examples = rows(targets)

    def adapted():
        model = build(name, **config)
        torch.manual_seed(0)
        lora = peft.LoraConfig(task_type=task, r=4, lora_dropout=0.0, modules_to_save=saved, init_lora_weights=False)
        return peft.get_peft_model(model, lora)

    with accumloss.registered():
        full, step = train(adapted(), examples, 1), train(adapted(), examples, 4)
    assert any("lora_" in name for name in full.gradients) and any(saved[0] in name for name in full.gradients)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


def test_compute_loss_func_without_registering():
    model, examples = model_and_rows("causal")
    options = {"trainer_options": {"compute_loss_func": accumloss.compute_loss_func}}
    full, step = train(model, examples, 1, **options), train(model, examples, 4, **options)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
    # unregistered, the count is Trainer's own
    assert COUNTS_POSITION_0 or error(full, whole("causal")) <= TRAINER_GRADIENT


def test_compute_loss_func_with_options():
    model, examples = model_and_rows("token classes")
    hook = functools.partial(accumloss.compute_loss_func, label_smoothing=0.2)
    full = train(model, examples, 1, trainer_options={"compute_loss_func": hook})
    step = train(model, examples, 4, trainer_options={"compute_loss_func": hook})
    assert error(step, full) <= TRAINER_GRADIENT
    assert loss_gap(full.loss, smoothed(model, examples, 0.2, False)) <= TRAINER_LOSS


def test_class_weights_divide_by_their_total():
    """With make_loss(weight=...) the step's loss is PyTorch's weighted mean over all of its labels."""
    weight = torch.linspace(0.2, 3, LABELS)
    model, examples = build("LlamaForTokenClassification", **CLASSES), rows("tags")
    model.loss_function = accumloss.make_loss("token_classification", weight=weight)
    with accumloss.registered():
        full, step = train(model, examples, 1), train(model, examples, 8)
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight).item()
    assert loss_gap(full.loss, wanted) <= TRAINER_LOSS
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
