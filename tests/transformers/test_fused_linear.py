"""register_with_transformers(fused_linear=True): the loss from the hidden states, the logits when somebody reads them."""

import contextlib
import copy
import functools
import json
import pickle
import re
import sys
import warnings
from pathlib import Path

import pytest
import recorded_gpu
import torch
import transformers
from tolerances import SUM, TRAINER_GRADIENT, TRAINER_LOSS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrun import torchrun
from training import norm

import accumloss
from accumloss.transformers import deferred
from accumloss.transformers.deferred import DeferredLogits

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import fused_linear

# Scale, softcap and bias among them; classes that transformers knows.
ARCHITECTURES = [
    "Llama",
    "Qwen2",
    "Qwen3",
    "Qwen2Moe",
    "Mistral",
    "Mixtral",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "Phi",
    "Phi3",
    "GPTNeoX",
    "OPT",
    "Falcon",
    "Cohere",
    "Cohere2",
    "Granite",
    "Olmo",
    "Olmo2",
    "StableLm",
    "Bloom",
    "Mpt",
    "DeepseekV2",
    "DeepseekV3",
    "Mamba",
    "Mamba2",
    "GPTBigCode",
    "GPTNeo",
    "GPTJ",
    "CodeGen",
    "Starcoder2",
    "Glm",
    "Jamba",
    "Persimmon",
    "Nemotron",
    "RecurrentGemma",
    "Biogpt",
    "Xglm",
    "SmolLM3",
    "Ernie4_5",
    "Helium",
    "Dbrx",
]
EXTRA = ["GPT2LMHeadModel", "BertLMHeadModel", "RoFormerForCausalLM", "GitForCausalLM"]


# One for each way to the loss: plain, a softcap, a factor, a quotient, a bias, tied, rows chosen after the head, a cast, no
# loss_type, a bias of its own parameter, labels over a part of the logits.
FAST = ["Llama", "Gemma2", "Cohere", "Granite", "GPTJ", "Bloom", "Mamba", "RecurrentGemma", *EXTRA]


def class_names():
    for name in (*ARCHITECTURES, *EXTRA):
        found = name if name in EXTRA else f"{name}ForCausalLM"
        slow = pytest.mark.slow("another architecture whose head and loss are called as those of the fast tier are")
        if hasattr(transformers, found):
            yield pytest.param(found, marks=[] if name in FAST else [slow])


def relative_error(got, want):
    """Of tensors by name, as a whole."""
    return norm({name: got[name].double() - want[name].double() for name in want}) / norm(want)


def llama(vocab_size=97, tie=False):
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def batch(rows=3, length=12, vocab_size=97):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, **inputs):
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="the audit's tiny configurations need transformers 5"
)


@needs_transformers_5
@pytest.mark.parametrize("name", list(class_names()))
def test_architecture_is_fused_and_equal(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        line = fused_linear.measure(name)
    assert line["problem"] == ""
    assert (line["path"], line["reason"]) == ("fused", "")
    assert line["loss_error"] < TRAINER_LOSS
    assert line["gradient_error"] < TRAINER_GRADIENT
    assert line["logits_error"] == "" or line["logits_error"] < SUM


@needs_transformers_5
def test_a_forward_with_a_loss_of_its_own_keeps_its_logits():
    with pytest.warns(UserWarning, match="fused_linear=True is not used for XLNetLMHeadModel"):
        line = fused_linear.measure("XLNetLMHeadModel")
    assert (line["path"], line["reason"]) == (
        "logits",
        "its forward calls CrossEntropyLoss itself, and no loss_function",
    )
    assert line["gradient_error"] < TRAINER_GRADIENT


def test_enough_architectures_are_tried():
    assert len(list(class_names())) >= 25


def test_logits_of_an_evaluation_and_of_generation_are_what_they_were():
    model = llama().eval()
    inputs = batch()
    want = model(**inputs)
    tokens = model.generate(inputs["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
    with accumloss.registered(fused_linear=True):
        got = model(**inputs)
        assert type(got.logits) is torch.Tensor and torch.equal(got.logits, want.logits)
        assert torch.equal(model.generate(inputs["input_ids"][:1, :5], max_new_tokens=4, do_sample=False), tokens)
        model.train()
        with torch.no_grad():
            assert type(model(**inputs).logits) is torch.Tensor
        assert type(model(input_ids=inputs["input_ids"]).logits) is torch.Tensor  # without labels
        assert type(model(**inputs).logits) is DeferredLogits
    assert type(model(**inputs).logits) is torch.Tensor
    assert "__call__" not in vars(transformers.PreTrainedModel)


READS = {
    "argmax": lambda logits: logits.argmax(-1),
    "detach": lambda logits: logits.detach(),
    "numpy": lambda logits: torch.from_numpy(logits.detach().numpy()),
    "index": lambda logits: logits[0, 1:3],
    "softmax": lambda logits: torch.softmax(logits, -1),
    "clone": lambda logits: logits.clone(),
    "iterate": lambda logits: torch.stack(list(logits)),
    "times a tensor": lambda logits: logits * torch.arange(1.0, 98.0),
    "in place": lambda logits: logits.detach().clone().add_(1),
    "stack": lambda logits: torch.stack([logits, logits]),
    "cast": lambda logits: logits.double().sum(),
    "view": lambda logits: logits.view(-1, 97).sum(0),
    "scaled": lambda logits: (2 * logits / 3).sum(0),
    "capped": lambda logits: (torch.tanh(logits / 5) * 5).sum(0),
    "rows": lambda logits: logits[:, 1:-1].contiguous().sum(0),
    "classes": lambda logits: logits[:, :, 3:5],
    "ellipsis": lambda logits: logits[..., :2],
    "mask": lambda logits: logits[logits > 0],
    "flat": lambda logits: logits.reshape(-1),
    "pickle": lambda logits: pickle.loads(pickle.dumps(logits.detach())),
    "list": lambda logits: torch.tensor(logits.tolist()),
    "item": lambda logits: torch.tensor(logits.max().item()),
    "out": torch.no_grad()(lambda logits: torch.add(logits, 1, out=torch.empty(3, 12, 97))),
    "equal": lambda logits: torch.tensor(torch.equal(logits, logits.detach())),
    "where": lambda logits: torch.where(logits > 0, logits, -logits),
}


@pytest.mark.parametrize("read", READS)
def test_reading_gives_what_the_logits_are(read):
    model, inputs = llama(), batch()
    want = READS[read](model(**inputs).logits)
    with accumloss.registered(fused_linear=True):
        logits = model(**inputs).logits
        assert isinstance(logits, torch.Tensor) and not logits.requires_grad  # before it is read
        assert (logits.shape, logits.dtype, logits.device.type) == ((3, 12, 97), torch.float32, "cpu")
        assert logits.size(-1) == 97 and logits.dim() == 3 and logits.is_floating_point() and len(logits) == 3
        got = READS[read](logits)
        assert logits.value is None or logits.requires_grad
    assert type(got) is torch.Tensor
    assert torch.equal(got, want) or relative_error({"": got.double()}, {"": want.double()}) < SUM


def test_what_is_read_carries_the_gradient():
    model, inputs = llama(), batch()
    with accumloss.registered(fused_linear=True):
        outputs = model(**inputs)
        (outputs.loss + outputs.logits.square().mean()).backward()
        got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.loss + outputs.logits.square().mean()).backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    assert relative_error(got, want) < TRAINER_GRADIENT


def test_a_first_read_without_grad_does_not_take_the_gradient_from_the_next():
    model, inputs = llama(), batch()
    with accumloss.registered(fused_linear=True):
        logits = model(**inputs).logits
        assert repr(logits) == "DeferredLogits(shape=(3, 12, 97), dtype=torch.float32, not computed yet)"
        with torch.no_grad():
            assert not logits.argmax(-1).requires_grad
            assert not (logits * 2 + 1).requires_grad
        assert "not computed" not in repr(logits)
        logits.square().mean().backward()
        assert model.lm_head.weight.grad.count_nonzero() > 0


def test_logits_that_a_step_has_overtaken_are_refused():
    model, inputs = llama(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with accumloss.registered(fused_linear=True):
        read, unread = model(**inputs), model(**inputs)
        before = read.logits.detach().clone()
        unread.loss.backward()
        optimizer.step()
        assert torch.equal(read.logits.detach(), before)
        with pytest.raises(RuntimeError, match="read outputs.logits before"):
            unread.logits.sum()


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(out.alias_info for out in function._schema.returns):
            self.size = max(self.size, result.numel())
        return result


def test_a_step_never_holds_the_logits(monkeypatch):
    from accumloss import linear, losses

    loss = functools.partial(losses.linear_causal_lm, max_scratch_bytes=40 * 4 * 997)
    monkeypatch.setattr(losses, "linear_causal_lm", loss)
    model, inputs = llama(vocab_size=997), batch(4, 50, 997)
    logits = 4 * 50 * 997
    with Largest() as plain:
        gradients(model, **inputs)
    assert plain.size >= logits
    with accumloss.registered(fused_linear=True), Largest() as fused:
        gradients(model, **inputs)
    assert fused.size <= 40 * 997 < logits
    assert linear.MAX_SCRATCH_BYTES == 256 * 2**20


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "head", "body"])
def test_frozen_parts_and_tied_embeddings(tie, frozen):
    model, inputs = llama(tie=tie), batch()
    for name, parameter in model.named_parameters():
        is_head = "lm_head" in name or (tie and "embed" in name)
        parameter.requires_grad_(frozen == "nothing" or is_head == (frozen == "body"))
    _, want = gradients(model, **inputs)
    with accumloss.registered(fused_linear=True), fused_linear.counted() as seen:
        _, got = gradients(model, **inputs)
    assert seen == [1] and got.keys() == want.keys()
    assert relative_error(got, want) < TRAINER_GRADIENT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model, inputs = llama(), batch()
    with torch.autocast("cpu", dtype):
        outputs, want = gradients(model, **inputs)
    with accumloss.registered(fused_linear=True), fused_linear.counted() as seen:
        with torch.autocast("cpu", dtype):
            deferred_outputs, got = gradients(model, **inputs)
        assert deferred_outputs.logits.dtype == outputs.logits.dtype == dtype
        assert torch.equal(deferred_outputs.logits.detach(), outputs.logits.detach())  # read outside of autocast
    assert seen == [1]
    assert all(got[name].dtype == torch.float32 for name in got)
    assert relative_error(got, want) < 8 * torch.finfo(dtype).eps


def explained(model):
    return str(accumloss.explain(model))


def with_lora(model, *modules):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(modules), r=2, init_lora_weights=False))


def hook(module, args, output):
    return output


class Scaled(nn.Linear):
    pass


FALLBACKS = {
    "forward hook": (lambda m: m.lm_head.register_forward_hook(hook), "its head has hooks"),
    "pre-hook": (lambda m: m.lm_head.register_forward_pre_hook(lambda module, args: None), "its head has hooks"),
    "another class": (lambda m: setattr(m.lm_head, "__class__", Scaled), "its head is .*Scaled"),
    "its own forward": (lambda m: setattr(m.lm_head, "forward", m.lm_head.forward), "forward was replaced"),
    "parametrized": (
        lambda m: nn.utils.parametrizations.weight_norm(m.lm_head), "its head is torch.nn.utils.parametrize|parametrized"
    ),
    "no output embeddings": (lambda m: setattr(m, "get_output_embeddings", lambda: None), "names no output embeddings"),
}  # fmt: skip


@pytest.mark.parametrize("name", FALLBACKS)
def test_other_heads_compute_their_logits_and_say_why(name):
    change, why = FALLBACKS[name]
    model, inputs = llama(), batch()
    change(model)
    _, want = gradients(model, **inputs)
    with accumloss.registered(fused_linear=True), fused_linear.counted() as seen:
        with pytest.warns(UserWarning, match=why) as told:
            (outputs, got), _ = [gradients(model, **inputs) for _ in range(2)]
        assert len([warning for warning in told if "fused_linear" in str(warning.message)]) == 1
        assert type(outputs.logits) is torch.Tensor
        explanation = accumloss.explain(model)
        assert explanation.path == "logits" and "from the logits" in str(explanation)
        assert re.search(why, explanation.reason), explanation
    assert seen == []
    assert relative_error(got, want) < TRAINER_GRADIENT


def test_logits_that_are_read_before_their_loss_are_told():
    class Reading(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
            logits = logits - logits.mean()
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)

    model = Reading(llama().config).train()
    with (
        accumloss.registered(fused_linear=True),
        pytest.warns(UserWarning, match="is not used for Reading.* its logits are read before its loss takes them"),
    ):
        gradients(model, **batch())


def test_a_sharded_or_quantised_weight_is_left_alone():
    class Kind(torch.Tensor):
        pass

    model = llama()
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 16, dtype=torch.int8), requires_grad=False)
    with accumloss.registered(fused_linear=True):
        assert "weight is torch.int8" in accumloss.explain(model).reason
        model.lm_head.weight = nn.Parameter(torch.zeros(97, 16).as_subclass(Kind))
        assert "weight is a" in accumloss.explain(model).reason


def test_lora_on_the_body_is_fused_and_on_the_head_is_not():
    inputs = batch()
    for modules, path in ((("q_proj",), "fused"), (("q_proj", "lm_head"), "logits")):
        model = with_lora(llama(), *modules)
        _, want = gradients(model, **inputs)
        told = pytest.warns(UserWarning, match="peft") if path == "logits" else contextlib.nullcontext()
        with accumloss.registered(fused_linear=True), fused_linear.counted() as seen, told:
            _, got = gradients(model, **inputs)
            explanation = accumloss.explain(model)
        assert explanation.path == path, explanation
        assert seen == [1] * (path == "fused")
        assert ("peft" in explanation.reason) == (path == "logits")
        assert got and relative_error(got, want) < TRAINER_GRADIENT


def test_explain_says_what_is_registered():
    model = llama()
    assert explained(model).startswith(
        "LlamaForCausalLM: stock, by the loss that it brings\n  why   accumloss is not registered"
    )
    with accumloss.registered():
        assert "registered without fused_linear=True" in explained(model)
    with accumloss.registered(fused_linear=True):
        assert "from the hidden states, without the logits" in explained(model)
        assert accumloss.explain(torch.compile(model)).reason == "it is compiled"
        classifier = transformers.LlamaForSequenceClassification(model.config)
        assert accumloss.explain(classifier).path == "logits"
    for other in ("LlamaForCausalLM", nn.Linear, None):
        with pytest.raises(TypeError, match="explain: expected a model, a torch.nn.Module, got"):
            accumloss.explain(other)


def test_logits_to_keep_are_what_the_loss_is_of():
    model, inputs = llama(), batch()
    inputs["labels"] = inputs["labels"][:, -5:]
    want_outputs, want = gradients(model, **inputs, logits_to_keep=5)
    with accumloss.registered(fused_linear=True), fused_linear.counted() as seen:
        outputs, got = gradients(model, **inputs, logits_to_keep=5)
        assert outputs.logits.shape == want_outputs.logits.shape == (3, 5, 97)
        as_tuple = model(**inputs, logits_to_keep=5, return_dict=False)
    assert seen == [1, 1]
    assert isinstance(as_tuple, tuple) and as_tuple[0].item() == outputs.loss.item()
    assert outputs.loss.item() == pytest.approx(want_outputs.loss.item(), rel=SUM)
    assert relative_error(got, want) < TRAINER_GRADIENT


def test_gradient_checkpointing():
    model, inputs = llama(), batch()
    _, want = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with accumloss.registered(fused_linear=True), fused_linear.counted() as seen:
        _, got = gradients(model, **inputs)
    assert seen == [1]
    assert relative_error(got, want) < TRAINER_GRADIENT


def test_an_error_in_the_forward_leaves_the_head_as_it_was():
    model, inputs = llama(), batch()
    with accumloss.registered(fused_linear=True):
        with pytest.raises(IndexError):
            model(input_ids=inputs["input_ids"], labels=inputs["labels"].clamp(min=0) + 97)
        assert "forward" not in vars(model.lm_head)
        assert type(model.eval()(**inputs).logits) is torch.Tensor


def test_options_of_a_loss_and_of_a_head_go_together():
    model, inputs = llama(), batch()
    loss = accumloss.make_loss("causal_lm", label_smoothing=0.1, z_loss=1e-3, weight=torch.linspace(0.5, 2, 97))
    model.loss_function = loss
    _, want = gradients(model, **inputs)
    with accumloss.registered(fused_linear=True), fused_linear.counted() as seen:
        _, got = gradients(model, **inputs)
    assert seen == [1]
    assert relative_error(got, want) < TRAINER_GRADIENT


@pytest.mark.parametrize(
    "transform, linear",
    [
        (lambda x: x.float(), (1, 0)),
        (lambda x: x * 0.5, (0.5, 0)),
        (lambda x: x / 4, (0.25, 0)),
        (lambda x: torch.tanh(x / 5) * 5, (1, 5)),
        (lambda x: (torch.tanh(0.5 * x / 5) * 5).float(), (0.5, 5)),
        (lambda x: x.view(-1, 7).contiguous(), (1, 0)),
        (lambda x: x[:, 1:-1], (1, 0)),
        (lambda x: (x[:1, :2, :] * 0.5).contiguous().view(-1, 7), (0.5, 0)),
        (lambda x: torch.tanh(x), None),
        (lambda x: torch.tanh(x / 5) * 5 * 2, None),
        (lambda x: x * -1.0, None),
        (lambda x: x.half(), None),
        (lambda x: (x * 2) + torch.ones(7), None),
    ],
)
def test_recorded_steps_are_options_or_nothing(transform, linear):
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    want = transform(hidden @ weight.t())
    got = transform(DeferredLogits(hidden, weight, None))
    assert isinstance(got, DeferredLogits) and got.shape == want.shape and got.dtype == want.dtype
    found = got.as_linear()
    assert (None if found is None else (found.logit_scale, found.softcap)) == (linear and pytest.approx(linear))
    if found is not None and found.softcap == 0:
        assert torch.allclose(found.hidden @ weight.t() * found.logit_scale, want)
    assert torch.allclose(got.materialize(), want)
    assert got.materialize() is got.materialize()
    assert got.as_linear() is None  # computed already: the loss takes them


def test_a_bias_that_a_model_adds_is_the_heads():
    hidden, weight, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4), torch.randn(1, 7)
    got = DeferredLogits(hidden, weight, None) + bias
    assert torch.equal(got.as_linear().bias, bias[0])
    assert torch.allclose(got.materialize(), hidden @ weight.t() + bias)


def trainer_of(model, tmp_path, trainer_class=transformers.Trainer, **arguments):
    arguments = {"max_steps": 1, **arguments}
    inputs = batch(16, 12)
    data = [{name: value[i] for name, value in inputs.items()} for i in range(16)]
    options = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, learning_rate=1.0, optim="sgd", logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    return trainer_class(copy.deepcopy(model), options, train_dataset=data, eval_dataset=data)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_trainer_accumulates_exactly(tmp_path, label_smoothing):
    """k micro-batches, fused, against the one batch, from its logits; metrics and evaluation on top."""
    model = llama()
    results = {}
    for name, size, options in (("one batch", 16, {}), ("fused", 2, {"fused_linear": True})):
        with accumloss.registered(metrics=True, **options), fused_linear.counted() as seen:
            trainer = trainer_of(
                model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size,
                per_device_eval_batch_size=size, label_smoothing_factor=label_smoothing,
            )  # fmt: skip
            trainer.train()
            logs = trainer.state.log_history[0]
            evaluation = trainer.evaluate()
        change = {n: p.detach() - model.get_parameter(n).detach() for n, p in trainer.model.named_parameters()}
        results[name] = change, logs, evaluation, len(seen)
    (want, logs, evaluation, plain), (got, fused_logs, fused_evaluation, count) = results.values()
    assert plain == 0 and count == 8
    assert relative_error(got, want) < TRAINER_GRADIENT
    for name in ("loss", "token_accuracy", "token_entropy"):
        assert fused_logs[name] == pytest.approx(logs[name], rel=1e-4)
    assert fused_evaluation["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=1e-4)


class TwoLosses(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return first + 0.5 * super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)


class MaskedInPlace(transformers.Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["labels"][:, 3] = -100
        return super().compute_loss(model, inputs, *args, **kwargs)


class Replaced(transformers.Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "labels": inputs["labels"].clone()}, *args, **kwargs)


COUNTED = {
    "accumulation": (transformers.Trainer, {}),
    "gradient checkpointing": (transformers.Trainer, {"gradient_checkpointing": True}),
    "prefetching": (transformers.Trainer, {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 4}),
    "evaluation in between": (transformers.Trainer, {"eval_strategy": "steps", "eval_steps": 1}),
    "two losses": (TwoLosses, {}),
    "frozen head": (transformers.Trainer, {}),
}


def recorded(situation, trainer_class, tmp_path, monkeypatch, **arguments):
    """Two windows of four micro-batches of two rows, on a GPU that records."""
    gpu = recorded_gpu.install(monkeypatch)
    model = llama()
    model.lm_head.requires_grad_(situation != "frozen head")
    with accumloss.registered(fused_linear=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", accumloss.InexactWarning)
        trainer = trainer_of(
            model, tmp_path, trainer_class, per_device_train_batch_size=2, gradient_accumulation_steps=4, **arguments
        )
        trainer.model.model.register_forward_pre_hook(
            lambda body, args: gpu.order.append("forward") if body.training else None
        )
        trainer.train()
    change = {n: p.detach() - model.get_parameter(n).detach() for n, p in trainer.model.named_parameters()}
    return gpu.order, {n: c for n, c in change.items() if model.get_parameter(n).requires_grad}


@pytest.mark.parametrize("situation", COUNTED)
def test_trainer_counts_a_window_before_its_first_forward_is_queued(situation, tmp_path, monkeypatch):
    """One copy to the host for a window, and one wait for it: at the first head, behind whose forward it is queued."""
    trainer_class, arguments = COUNTED[situation]
    with monkeypatch.context() as patched:
        order, got = recorded(situation, trainer_class, tmp_path, patched, max_steps=2, **arguments)
    times = 2 if situation == "two losses" else 1
    shape = [event.split()[0] for event in order]
    asks = ["forward", "head"] * 3 * times + ["forward", "head"] * (times - 1)
    assert shape == ["count", "forward", "wait", "head", *asks] * 2
    assert order.count("count 4") == 2
    model, inputs = llama(), batch(16, 12)
    counted = int((inputs["labels"] != -100).sum())
    assert sum(int(event.split()[1]) for event in order if event.startswith("head")) == times * counted
    model.lm_head.requires_grad_(situation != "frozen head")
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("ignore", accumloss.InexactWarning)
        trainer = trainer_of(
            model, tmp_path, trainer_class, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2
        )
        trainer.train()
    want = {n: trainer.model.get_parameter(n).detach() - model.get_parameter(n).detach() for n in got}
    assert relative_error(got, want) < TRAINER_GRADIENT


@pytest.mark.parametrize("trainer_class", [MaskedInPlace, Replaced])
def test_labels_that_were_changed_since_they_were_counted_have_all_rows(trainer_class, tmp_path, monkeypatch):
    """A count of other labels would be a loss of NaN, or one more of the same."""
    order, got = recorded("", trainer_class, tmp_path, monkeypatch, max_steps=1)
    assert [event for event in order if event.startswith(("wait", "head"))] == ["head 24"] * 4
    assert norm(got) > 0


def test_labels_that_were_copied_are_known_where_they_can_be_looked_at(tmp_path, monkeypatch):
    gpu = recorded_gpu.install(monkeypatch)
    monkeypatch.setattr(recorded_gpu.devices, "waits", lambda device: False)
    with accumloss.registered(fused_linear=True):
        trainer_of(llama(), tmp_path, Replaced, per_device_train_batch_size=16).train()
    assert [event.split()[0] for event in gpu.order] == ["count", "wait", "head"]


def test_nothing_is_counted_where_no_head_asks(tmp_path, monkeypatch):
    gpu = recorded_gpu.install(monkeypatch)
    with accumloss.registered():
        trainer_of(llama(), tmp_path, per_device_train_batch_size=8).train()
    assert gpu.order == []


def test_deferring_is_taken_back_when_registered_without():
    accumloss.register_with_transformers(fused_linear=True)
    assert vars(transformers.PreTrainedModel)["__call__"] is deferred._call_of_model
    accumloss.register_with_transformers()
    assert "__call__" not in vars(transformers.PreTrainedModel)
    accumloss.register_with_transformers(fused_linear=True)
    accumloss.unregister_from_transformers()
    assert "__call__" not in vars(transformers.PreTrainedModel)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks found, under each engine."""
    here = Path(__file__).resolve().parents[1]
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    torchrun(here / "distributed_linear.py", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("engine, fused", [("ddp", 1), ("ddp, unused", 1), ("fsdp2", 1), ("fsdp2, head apart", 0)])
def test_ranks_equal_the_one_batch(ranks, engine, fused):
    """Where the head is a unit of FSDP2 of its own, it is another class, and computes its logits."""
    assert ranks[engine]["fused"] == fused
    assert ranks[engine]["error"] < TRAINER_GRADIENT


def test_a_sharded_head_is_refused(ranks):
    assert "FSDP has freed it" in ranks["read late"]
    assert "expected a whole weight, got a sharded DTensor" in ranks["refused"]
