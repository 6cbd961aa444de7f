"""The ways in which a library that replaces losses goes wrong, one test each (where the trap is one of ours to fall into).

Trap 11 (ranks that count for themselves) is in test_distributed.py.
"""

import copy
import functools
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from tolerances import SUM, TRAINER_GRADIENT, TRAINER_LOSS, UNIT
from training import (
    COUNTS_POSITION_0,
    HEADS,
    IS_CURRENT,
    LABELS,
    build,
    error,
    loss_error,
    loss_gap,
    make_trainer,
    model_and_rows,
    ratio,
    rows,
    train,
)
from transformers import Trainer
from transformers.loss import loss_utils
from transformers.loss.loss_utils import LOSS_MAPPING

import accumloss
from accumloss.transformers import counting, losses, models, ranks
from accumloss.transformers import step as steps
from accumloss.transformers.patches import trainer_methods

TARGETS = 35  # labels of rows() that are targets of a causal loss: position 0 of a row is none
LABELS_IN_ALL = 43


def items(model, examples, **options):
    """num_items_in_batch of the step over the one batch."""
    prepared, _ = make_trainer(model, examples, 1, **options)
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    prepared.model_accepts_loss_kwargs = True  # or, in older versions, some heads are not counted for
    return int(prepared._get_num_items_in_batch([batch], torch.device("cpu")))


def test_rows_are_as_uneven_as_the_tests_need():
    labels = torch.stack([example["labels"] for example in rows()])
    assert (labels != -100).sum() == LABELS_IN_ALL and (labels[:, 1:] != -100).sum() == TARGETS


# Counting -----------------------------------------------------------------------------------------------------------


def test_trap_01_trainer_recognises_the_loss_by_identity(monkeypatch):
    """Replacing the mapping's value alone makes Trainer count position 0."""
    model = build("LlamaForCausalLM")
    wrapped = functools.wraps(loss_utils.ForCausalLMLoss)(
        lambda *args, **kwargs: losses.causal_lm_loss(*args, **kwargs)
    )
    with monkeypatch.context() as alone:
        alone.setitem(LOSS_MAPPING, "ForCausalLM", wrapped)
        if hasattr(transformers.trainer, "ForCausalLMLoss"):
            assert items(model, rows()) == LABELS_IN_ALL
    with accumloss.registered():
        assert items(model, rows()) == TARGETS
        aliases = [key for key, loss in LOSS_MAPPING.items() if loss is losses.causal_lm_loss]
        assert {"ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration"} <= set(aliases)
        if hasattr(transformers.trainer, "ForCausalLMLoss"):
            assert transformers.trainer.ForCausalLMLoss is losses.causal_lm_loss


def test_trap_02_a_trainer_built_before_registering():
    model, examples = build("GPT2LMHeadModel"), rows()
    with accumloss.registered():
        full = train(model, examples, 1)
    early, recorder = make_trainer(copy.deepcopy(model), examples, 4)
    with accumloss.registered():
        early.train()
    late, _ = make_trainer(copy.deepcopy(model), examples, 4)  # built, and used, when it is gone
    assert error(SimpleNamespace(gradients=recorder.gradients), full) <= TRAINER_GRADIENT
    assert late._get_num_items_in_batch.__func__ is Trainer._get_num_items_in_batch
    assert Trainer.training_step.__module__ == "transformers.trainer"


def test_trap_03_no_loss_type():
    """The fallback is the causal loss, which shifts; stock counts position 0 all the same."""
    model, examples = build("GPT2LMHeadModel"), rows()
    assert model.loss_type is None
    assert items(model, examples) == LABELS_IN_ALL
    wrong = train(model, examples, 1)
    with accumloss.registered():
        assert items(model, examples) == TARGETS
        right = train(model, examples, 1)
    assert loss_gap(right.loss * TARGETS / LABELS_IN_ALL, wrong.loss) <= 2 * TRAINER_LOSS


def test_trap_04_the_mapping_is_a_regular_expression():
    """Its keys decide the loss_type of models built later: none is added, none moves."""
    keys = list(LOSS_MAPPING)
    with accumloss.registered():
        assert list(LOSS_MAPPING) == keys
        assert build("LlamaForTokenClassification").loss_type == "ForTokenClassification"


def test_trap_05_shift_labels_win():
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    wanted = losses.causal_lm_loss(logits, labels, 11)
    assert torch.equal(losses.causal_lm_loss(logits, None, 11, shift_labels=shifted), wanted)
    assert torch.equal(losses.causal_lm_loss(logits, labels.flip(1), 11, shift_labels=shifted), wanted)
    batch = {"labels": labels, "shift_labels": shifted}
    assert models.counted_labels(build("LlamaForCausalLM"), batch) is shifted


def test_trap_05_encoder_decoders_do_not_shift():
    name, config, _ = HEADS["encoder-decoder, own loss"]
    with accumloss.registered():
        assert items(build(name, **config), rows()) == LABELS_IN_ALL


def test_trap_06_padding_free_batches():
    """Rows laid end to end, each start ignored by the collator: the same items and the same loss as padded."""
    examples = rows()
    kept = [int((e["labels"] != -100).sum()) for e in examples]
    logits = torch.randn(len(kept), 12, 31)
    labels = torch.stack([e["labels"] for e in examples]) % 31
    labels[torch.stack([e["labels"] for e in examples]) == -100] = -100
    flat_logits = torch.cat([logits[i, :n] for i, n in enumerate(kept)]).unsqueeze(0)
    starts = labels.clone()
    starts[:, 0] = -100
    flat_labels = torch.cat([starts[i, :n] for i, n in enumerate(kept)]).unsqueeze(0)
    padded = losses.causal_lm_loss(logits, labels, 31, num_items_in_batch=TARGETS)
    flat = losses.causal_lm_loss(flat_logits, flat_labels, 31, num_items_in_batch=TARGETS)
    assert abs(padded - flat) <= SUM * padded
    assert (models.counted_labels(build("LlamaForCausalLM"), {"labels": flat_labels}) != -100).sum() == TARGETS


def test_trap_07_every_term_has_its_own_count():
    """Masked tokens and sentence order: 43 tokens and 8 sentences, however they are split."""
    model, examples = model_and_rows("masked and sentence order")
    with accumloss.registered():
        full, step = train(model, examples, 1), train(model, examples, 8)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
    stock = train(model, examples, 8)
    assert not IS_CURRENT or ratio(stock, full) > 4


# Scaling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count", [35, 35.0, torch.tensor(35), torch.tensor([[35], [35]]), torch.tensor(35, dtype=torch.int32)], ids=repr
)
def test_trap_08_num_items_in_every_form(count):
    logits, labels = torch.randn(4, 12, 31, requires_grad=True), torch.randint(0, 31, (4, 12))
    before = labels.clone()
    wanted = losses.causal_lm_loss(logits, labels, 31) * (labels.numel() - 4) / 35
    assert abs(losses.causal_lm_loss(logits, labels, 31, num_items_in_batch=count) - wanted) <= SUM * wanted
    assert torch.equal(labels, before)


def test_trap_08_compute_loss_func_without_labels():
    with pytest.raises(ValueError, match="compute_loss_func: expected a batch with labels, got none"):
        accumloss.compute_loss_func(SimpleNamespace(logits=torch.zeros(1, 2, 3)), None)
    with pytest.raises(ValueError, match="compute_loss_func: expected outputs with logits, got SimpleNamespace"):
        accumloss.compute_loss_func(SimpleNamespace(), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="whose class says whether labels are shifted, got a dict; pass shift"):
        accumloss.compute_loss_func({"logits": torch.zeros(1, 2, 3)}, torch.zeros(1, 2, dtype=torch.int64))


def test_trap_08_question_answering_has_no_labels_key():
    model, examples = model_and_rows("question answering")
    with accumloss.registered():
        full, step = train(model, examples, 1), train(model, examples, 3, batch_size=3)
    assert error(step, full) <= TRAINER_GRADIENT
    assert not IS_CURRENT or error(train(model, examples, 3, batch_size=3), full) > 0.1  # stock


def test_trap_09_label_smoothing_of_vision_and_language():
    """Stock does not shift for heads that it finds no causal name for."""
    model, examples = model_and_rows("vision and language")
    stock = train(model, examples, 1, label_smoothing_factor=0.1)
    with accumloss.registered():
        full = train(model, examples, 1, label_smoothing_factor=0.1)
        step = train(model, examples, 4, label_smoothing_factor=0.1)
    assert error(step, full) <= TRAINER_GRADIENT
    assert not IS_CURRENT or error(stock, full) > 0.1


def test_trap_10_router_losses_are_no_longer_added_up():
    """Each micro-batch's counts for its tokens. They are coupled over the batch, so that no split is exact."""
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model, examples = build("MixtralForCausalLM", router_aux_loss_coef=1.0, **options), rows()
    with accumloss.registered():
        full = train(model, examples, 1)
        with pytest.warns(accumloss.InexactWarning, match="load_balancing_loss_func is coupled over the tokens"):
            step = train(model, examples, 4)
    stock_full, stock = train(model, examples, 1), train(model, examples, 4)
    assert COUNTS_POSITION_0 or error(full, stock_full) <= TRAINER_GRADIENT
    assert not IS_CURRENT or (abs(ratio(stock, stock_full) - 1) > 0.4 and loss_error(stock, stock_full) > 0.5)
    assert abs(ratio(step, full) - 1) < 0.05 and loss_error(step, full) < 0.05
    without = build("MixtralForCausalLM", router_aux_loss_coef=0.0, **options)
    with accumloss.registered():
        assert error(train(without, examples, 4), train(without, examples, 1)) <= TRAINER_GRADIENT


class FakeTrainer:
    """What is asked of a Trainer about its ranks."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


def fake_trainer(world=1, tensor=1, context=1, sequence=1, n_gpu=1, average=True):
    gathered = lambda tensor: tensor.repeat(world, *[1] * (tensor.dim() - 1))  # noqa: E731  every rank has the same
    return FakeTrainer(
        args=SimpleNamespace(
            average_tokens_across_devices=average, n_gpu=n_gpu, world_size=world, device=torch.device("cpu")
        ),
        accelerator=SimpleNamespace(num_processes=world, gather=gathered, parallelism_config=None),
        get_tp_size=lambda: tensor,
        get_cp_size=lambda: context,
        get_sp_size=lambda: sequence,
    )


@pytest.mark.parametrize(
    ("sizes", "total", "factor"),
    [
        ({}, 10, 1),
        ({"world": 4}, 40, 4),
        ({"world": 4, "tensor": 2}, 20, 2),
        ({"world": 4, "context": 2}, 20, 4),
        ({"world": 8, "tensor": 2, "context": 2, "sequence": 2}, 10, 4),
        ({"world": 4, "average": False}, 10, 1),
        ({"n_gpu": 2}, 10, 2),
        ({"n_gpu": 2, "average": False}, 5, 1),
    ],
    ids=str,
)
def test_trap_12_ranks_that_hold_the_same_batch_count_once(sizes, total, factor):
    """As Trainer's own count and factor go, which test_uneven_ranks runs for real."""
    fake = fake_trainer(**sizes)
    assert ranks.over_ranks(fake, torch.tensor(10.0)) == total
    assert ranks.ranks(fake) == factor


# Numerics, evaluation, plumbing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [(2, 3), range(8)], ids=["a micro-batch", "the step"])
@pytest.mark.parametrize("head", ["causal", "masked, own loss"])
def test_trap_13_nothing_to_learn_from(head, empty):
    """Without a single label loss and gradient are 0, never NaN; a micro-batch without one counts nothing."""
    model, examples = model_and_rows(head)
    examples = [dict(e) for e in examples]
    for i in empty:
        examples[i]["labels"] = torch.full_like(examples[i]["labels"], -100)
    with accumloss.registered():
        full, step = train(model, examples, 1), train(model, examples, 4)
    if len(empty) == len(examples):
        assert step.loss == full.loss == 0
        assert all(not g.any() for s in (full, step) for g in s.gradients.values())
    else:
        assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


def test_trap_14_evaluation_loss_depends_on_the_batch_size():
    model, examples = model_and_rows("causal")
    with accumloss.registered():
        found = []
        for size in (8, 2, 1):
            evaluated, _ = make_trainer(model, examples, 1, per_device_eval_batch_size=size)
            found.append(evaluated.evaluate(examples)["eval_loss"])
    model.train()
    assert max(found) - min(found) <= TRAINER_LOSS * max(found)


@pytest.mark.parametrize("inplace", [False, True])
def test_trap_15_logits_stay_untouched(inplace):
    """After forward always, after backward unless the gradient was asked to take their place."""
    model, examples = build("LlamaForCausalLM"), rows()
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    with torch.no_grad():
        wanted = model(**batch).logits
    with accumloss.registered(inplace_backward=inplace):
        outputs = model(**batch)
        assert torch.equal(outputs.logits, wanted)
        outputs.loss.backward()
        assert torch.equal(outputs.logits, wanted) != inplace


def test_trap_16_the_loss_may_be_changed_in_place():
    logits, labels = torch.randn(2, 6, 11, requires_grad=True), torch.randint(0, 11, (2, 6))
    loss = losses.causal_lm_loss(logits, labels, 11, num_items_in_batch=10)
    value = loss.item()
    loss *= 2
    loss += 1
    loss.backward()
    assert loss.dim() == 0 and abs(loss.item() - (2 * value + 1)) <= 4 * UNIT * loss.item()
    again = losses.causal_lm_loss(logits, labels, 11, num_items_in_batch=10)
    assert again.item() == value and logits.grad.norm() > 0


def test_trap_17_positional_and_unknown_arguments():
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    wanted = losses.causal_lm_loss(logits=logits, labels=labels, vocab_size=11)
    assert torch.equal(losses.causal_lm_loss(logits, labels, 11), wanted)
    assert torch.equal(losses.causal_lm_loss(logits, labels, 11, output_attentions=True, foo=object()), wanted)
    assert torch.equal(losses.causal_lm_loss(logits, labels.int(), 11), wanted)
    assert torch.equal(losses.causal_lm_loss(logits.flatten(0, 1), labels, 11), wanted)
    stock = loss_utils.ForCausalLMLoss(logits, labels, 11)
    assert abs(wanted - stock) <= SUM * stock


def test_trap_18_a_loss_is_a_function():
    """nn.Module.__setattr__ takes a Module for a part of the model, and loss_function goes on as before."""
    model = build("LlamaForCausalLM")
    assert not isinstance(accumloss.make_loss("causal_lm"), torch.nn.Module)
    model.loss_function = loss = accumloss.make_loss("causal_lm", z_loss=1e-3)
    assert model.loss_function is loss


@pytest.mark.parametrize("count", [None, 35], ids=["mean", "count"])
def test_trap_19_compiles_into_one_graph(count):
    torch.compiler.reset()
    logits, labels = torch.randn(2, 6, 11, requires_grad=True), torch.randint(0, 11, (2, 6))
    count = count if count is None else torch.tensor(count)
    compiled = torch.compile(losses.causal_lm_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(logits, labels, 11, num_items_in_batch=count)
    loss.backward()
    gradient, logits.grad = logits.grad, None
    losses.causal_lm_loss(logits, labels, 11, num_items_in_batch=count).backward()
    assert torch.allclose(gradient, logits.grad, rtol=32 * UNIT, atol=0)
    with accumloss.registered():
        model, examples = model_and_rows("causal")
        batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch, num_items_in_batch=torch.tensor(35))
        assert abs(whole.loss - model(**batch, num_items_in_batch=torch.tensor(35)).loss) <= TRAINER_LOSS * whole.loss


class LigerLike(transformers.LlamaForCausalLM):
    """A model whose forward computes its own loss and skips the mapping, as Liger's patched forwards do."""

    by_hand = True

    def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids)[0])
        flat, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        if self.by_hand:
            kept = targets != -100
            taken = flat[kept].gather(1, targets[kept][:, None])[:, 0]
            loss = (flat[kept].logsumexp(1) - taken).mean()
        else:
            loss = torch.nn.functional.cross_entropy(flat, targets)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("library", ["liger_kernel", "trl", "unsloth", None])
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by a call that is recognised"])
def test_trap_20_other_libraries_are_named(library, by_hand):
    """Where the step is not exact, with what turns the library's loss off; where it is, nothing is said."""
    model = build("LlamaForCausalLM")
    module = {"__module__": f"{library}.models" if library else "own", "by_hand": by_hand}
    model.__class__ = type("LlamaForCausalLM", (LigerLike,), module)
    with accumloss.registered(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, rows(), 2, steps=2)
    ours = [str(w.message) for w in caught if "accumloss" in str(w.message)]
    assert len(ours) == int(by_hand)
    if by_hand:
        assert "nothing that it computes was recognised" in ours[0]
        assert (f"{library} computes the loss of LlamaForCausalLM" in ours[0]) == (library is not None)


def test_trap_21_registration_survives_copies():
    """The rest of it (idempotent, reversible, order of imports, PEFT, one model) is in test_registration.py."""
    model, examples = model_and_rows("token classes")
    with accumloss.registered():
        full = train(copy.deepcopy(model), examples, 1)
        accumloss.register_with_transformers()
        assert error(train(copy.deepcopy(model), examples, 4), full) <= TRAINER_GRADIENT


def test_trap_22_what_a_call_averages_over_is_read_from_the_call():
    """BartForCausalLM has the causal loss_type and does not shift: its own call says what it averages over."""
    model, examples = model_and_rows("decoder that does not shift")
    assert model.loss_type == "ForCausalLM"
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    with accumloss.registered():
        full, step = train(model, examples, 1), train(model, examples, 8)
    wanted = model(**batch).loss.item()  # over 43 labels
    assert loss_gap(full.loss, wanted) <= TRAINER_LOSS
    assert error(step, full) <= TRAINER_GRADIENT


def test_trap_22_labels_that_are_no_entry_of_the_batch():
    """A head that makes labels of its own: as many as Trainer counts, they count as those; else the call is a mean."""
    labels = torch.tensor([[1, 2, 3, -100], [4, -100, -100, -100]])
    window = [{"labels": labels}, {"labels": torch.ones(2, 4, dtype=torch.int64)}]
    step = steps.Step(window, window[0], averaged=2, expected_grad=0.5, over_ranks=lambda total: total, totals={})
    step.main = counting.Rule("labels")  # 4 here, 12 in the step
    as_many = step.divisor(torch.tensor([9, 9, 9, 9]))
    other = step.divisor(torch.tensor([9, 9]))
    assert as_many.value == 12 / 2 and other.value == 2
    assert step.divisor(labels.view(-1)).value == step.divisor(labels.clone().int()).value == 12 / 2
    assert step.divisor(labels[:, 1:].contiguous()).value == (2 + 6) / 2  # rows whose first label is left out
    assert step.divisor(labels, given=torch.tensor(7)) == 7  # the caller's own count


def test_trap_23_the_compiler_does_not_pass_by():
    """CrossEntropyLoss() in forward, compiled: the modeling module's name is rebound, torch's class is not."""
    torch.compiler.reset()
    model, examples = model_and_rows("masked, own loss")
    with accumloss.registered():
        full = train(model, examples, 1)
        step = train(model, examples, 4, torch_compile=True, torch_compile_backend="aot_eager")
    gradients = {name.removeprefix("_orig_mod."): grad for name, grad in step.gradients.items()}
    assert error(step._replace(gradients=gradients), full) <= TRAINER_GRADIENT
    assert torch.nn.CrossEntropyLoss.__module__ == "torch.nn.modules.loss"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_trap_24_ctc_counts_examples(reduction):
    """A mean is over examples (and 3 + 3 + 2 of them are no even split); a sum is over all of the step."""
    config = {
        "conv_dim": (8,),
        "conv_kernel": (10,),
        "conv_stride": (10,),
        "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 2,
        "num_conv_pos_embedding_groups": 1,
        "hidden_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
        "apply_spec_augment": False,
        "vocab_size": 8,
        "ctc_loss_reduction": reduction,
        "pad_token_id": 0,
    }
    model = build("Wav2Vec2ForCTC", **config)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for count in (1, 8, 2, 7, 1, 3, 8, 1):
        labels = torch.randint(1, 8, (8,), generator=generator)
        labels[count:] = -100
        examples.append({"input_values": torch.randn(400, generator=generator), "labels": labels})
    with accumloss.registered():
        full = train(model, examples, 1)
        for accumulation in (3, 4):
            step = train(model, examples, accumulation)
            assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS
    assert error(full, train(model, examples, 1)) <= TRAINER_GRADIENT  # the same as stock over one batch


def test_the_gradient_is_written_once(monkeypatch):
    """Trainer's 1/k comes back as expected, so that no gradient is scaled after it was written."""
    calls = []
    names = ("cross_entropy", "cross_entropy_backward", "cross_entropy_with_grad", "mean_with_grad", "scale_")
    spies = {name: spy(name, getattr(torch.ops.accumloss, name), calls) for name in names}
    monkeypatch.setattr(accumloss.ops, "_ops", SimpleNamespace(**spies))
    with accumloss.registered():
        train(*model_and_rows("causal"), 3, batch_size=3)
    assert calls == ["mean_with_grad"] * 3


def spy(name, op, calls):
    def spied(*args, **kwargs):
        calls.append(name)
        return op(*args, **kwargs)

    return spied


def test_labels_of_classes_are_not_taken_for_inputs():
    """input_ids may hold the same values as labels; what is counted is what is called labels."""
    labels = torch.tensor([[1, 2, 3]])
    window = [{"input_ids": labels.clone(), "labels": labels}, {"input_ids": labels, "labels": labels * 0 - 100}]
    step = steps.Step(window, window[0], 1, 1.0, lambda total: total, {})
    assert step.divisor(labels.int()).value == 3
    assert LABELS == 5


@pytest.mark.parametrize("accumulation", [1, 4])
def test_deepspeeds_sequence_parallelism_is_told_where_it_averages(accumulation, monkeypatch):
    """transformers leaves its loss to DeepSpeed, which divides each micro-batch by its own tokens."""
    model, examples = model_and_rows("causal")
    trainer, _ = make_trainer(copy.deepcopy(model), examples, accumulation)
    sharing = SimpleNamespace(sp_size=2, sp_backend="deepspeed", cp_size=1, tp_size=1)
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", sharing)
    with accumloss.registered(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", accumloss.InexactWarning)
        assert ranks.is_of_ulysses(trainer)
        trainer_methods._tell_ulysses(trainer)
        trainer_methods._tell_ulysses(trainer)
    told = [str(w.message) for w in caught if issubclass(w.category, accumloss.InexactWarning)]
    assert len(told) == (accumulation > 1)
    assert all("cp_size in the place of sp_size is exact" in message for message in told)
