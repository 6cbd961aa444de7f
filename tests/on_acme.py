"""What test_fallback.py runs on a device without kernels, in a process of its own: one check after the other.

python on_acme.py FILE    writes {check: what was wrong, or ""} as JSON
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from tolerances import (
    ACCUMULATED_GRADIENT,
    ROW_LOSS_FLOAT64,
    SUM,
    TRAINER_LOSS,
    WITHOUT_FLOAT64_GRADIENT,
    assert_close,
    assert_within,
    row_loss_bound,
)

import accumloss
from accumloss import fallback

DEVICE = "acme"
acme: Any = None  # the module of the device, which stays in the process that imports it
CHECKS: dict[str, Callable[[], None]] = {}
B, T, V, H = 3, 7, 65, 16
FLOAT32 = row_loss_bound(torch.float32, "fallback")


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(B, T, V, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 2:] = -100
    return logits, labels


def fails_with(error: type[Exception], call: Callable[[], object]) -> str:
    """What it says, in one line."""
    said = None
    try:
        call()
    except error as raised:
        said = str(raised)
    assert said is not None, f"expected {error.__name__}, got none"
    assert "\n" not in said, said
    return said


@check
def warns_once_and_says_why() -> None:
    logits, labels = (tensor.to(DEVICE) for tensor in batch())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            accumloss.causal_lm_loss(logits, labels)
            accumloss.token_losses(logits, labels)
    ours = [str(warning.message) for warning in told if warning.category is accumloss.FallbackWarning]
    assert len(ours) == 1, ours
    assert "acme:0" in ours[0] and "none for acme" in ours[0] and "ACCUMLOSS_FALLBACK=error" in ours[0], ours[0]
    assert accumloss.build_info()["fallback"] == {"acme": fallback.reason(DEVICE).why}


@check
def refuses_where_that_is_asked_for() -> None:
    logits, labels = (tensor.to(DEVICE) for tensor in batch())
    os.environ["ACCUMLOSS_FALLBACK"] = "error"
    said = fails_with(RuntimeError, lambda: accumloss.causal_lm_loss(logits, labels))
    assert "ACCUMLOSS_FALLBACK=error" in said and "acme:0" in said and len(said) < 400, said
    os.environ["ACCUMLOSS_FALLBACK"] = "no"
    assert "got 'no'" in fails_with(ValueError, lambda: accumloss.causal_lm_loss(logits, labels))
    del os.environ["ACCUMLOSS_FALLBACK"]
    accumloss.causal_lm_loss(*batch())  # nor did the CPU mind


@check
def env_names_the_device() -> None:
    from accumloss.environment import environment

    _, device = environment()["devices"]
    assert (device["device"], device["served_by"]) == ("acme:0", "fallback"), device
    assert device["why"] == fallback.reason(DEVICE).why


def heads(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"hidden": (B, T, H), "weight": (V, H), "bias": (V,), "other": (V, H)}
    return {name: torch.randn(*size, generator=generator).to(device) for name, size in sizes.items()}


CLASS_WEIGHT = torch.linspace(0.5, 2.0, V)
CONFIG = SimpleNamespace(num_labels=5, problem_type="single_label_classification")
OPTIONS = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.5}


def calls(device: str) -> dict[str, Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]]:
    """Every public loss: what it comes to, and the tensors that get its gradient."""
    logits, labels = (tensor.to(device) for tensor in batch())
    target = torch.softmax(batch()[0].flip(-1), -1).to(device)
    weight, token_weight = CLASS_WEIGHT.to(device), torch.linspace(0, 1, B * T).view(B, T).to(device)
    classes = torch.tensor([0, 4, -100]).to(device)

    def of_logits(function: Callable[..., object], *args: object, **kwargs: object) -> Callable[[], tuple]:
        def call() -> tuple[torch.Tensor, list[torch.Tensor]]:
            leaf = logits.detach().clone().requires_grad_()
            found = function(leaf.view_as(leaf), *args, **kwargs)
            return found, [leaf]

        return call

    def of_head(function: Callable[..., object], *args: object, **kwargs: object) -> Callable[[], tuple]:
        def call() -> tuple[torch.Tensor, list[torch.Tensor]]:
            given = heads(device)
            leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
            return function(*leaves, *args, **kwargs), leaves

        return call

    def of_teacher() -> tuple[torch.Tensor, list[torch.Tensor]]:
        given = heads(device)
        leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
        found = accumloss.linear_distillation_loss(*leaves, given["hidden"].detach(), given["other"], labels)
        return found, leaves

    def accumulated() -> tuple[torch.Tensor, list[torch.Tensor]]:
        parameter = heads(device)["weight"].requires_grad_()
        hidden = heads(device)["hidden"]
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        accumulator = accumloss.Accumulator([parameter])
        for row in range(B):
            sums = accumloss.cross_entropy(hidden[row] @ parameter.t(), labels[row], metrics=True)
            accumulator.backward(sums)
        stats = accumulator.finish()
        del optimizer
        return stats.mean_loss, [parameter]

    all_of = {**OPTIONS, "weight": weight}
    return {
        "cross_entropy": of_logits(lambda x: accumloss.cross_entropy(x, labels, metrics=True).mean_loss),
        "cross_entropy with options": of_logits(lambda x: accumloss.cross_entropy(x, labels, **all_of).mean_loss),
        "cross_entropy of weighted tokens": of_logits(
            lambda x: accumloss.cross_entropy(x, labels, token_weight=token_weight, z_loss=1e-3).mean_loss
        ),
        "causal_lm_loss": of_logits(accumloss.causal_lm_loss, labels),
        "causal_lm_loss by a number": of_logits(accumloss.causal_lm_loss, labels, num_items_in_batch=40),
        "causal_lm_loss in place": of_logits(
            lambda x: accumloss.causal_lm_loss(x * 1, labels, num_items_in_batch=9, inplace="forward")
        ),
        "masked_lm_loss in place": of_logits(lambda x: accumloss.masked_lm_loss(x * 1, labels, inplace="backward")),
        "token_classification_loss": of_logits(accumloss.token_classification_loss, labels),
        "token_losses": of_logits(lambda x: accumloss.token_losses(x, labels).sum()),
        "token_log_probs": of_logits(lambda x: accumloss.token_log_probs(x, labels).exp().sum()),
        "token_statistics": of_logits(lambda x: accumloss.token_statistics(x, labels).entropy.sum()),
        "distillation_loss": of_logits(accumloss.distillation_loss, target, labels, beta=0.5),
        "class probabilities": of_logits(lambda x: accumloss.cross_entropy(x, target).mean_loss),
        "sequence_classification_loss": of_logits(
            lambda x: accumloss.sequence_classification_loss(classes, x[:, 0, :5], CONFIG)
        ),
        "linear_cross_entropy": of_head(
            lambda h, w: accumloss.linear_cross_entropy(h, w, labels, metrics=True).mean_loss
        ),
        "linear_causal_lm_loss": of_head(accumloss.linear_causal_lm_loss, labels, num_items_in_batch=40),
        "linear_token_log_probs": of_head(lambda h, w: accumloss.linear_token_log_probs(h, w, labels).exp().sum()),
        "linear_distillation_loss": of_teacher,
        "Accumulator": accumulated,
    }


def of_device(name: str, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss, leaves = calls(device)[name]()
    if loss.requires_grad:
        loss.backward()
    return loss.detach().cpu(), [leaf.grad.cpu() for leaf in leaves]


def _is_the_cpus(name: str, of_gradient: float = ACCUMULATED_GRADIENT[torch.float32]) -> None:
    wanted, wanted_grads = of_device(name, "cpu")
    found, grads = of_device(name, DEVICE)
    assert_close(found, wanted, 2 * FLOAT32 + SUM, name)
    for grad, of_cpu in zip(grads, wanted_grads, strict=True):
        error = (grad - of_cpu).norm() / of_cpu.norm()
        assert error <= of_gradient, f"{name}: a gradient that is off by {error:.2g}"


@check
def every_loss_is_the_cpus() -> None:
    for name in calls("cpu"):
        _is_the_cpus(name)


@check
def every_loss_is_the_cpus_without_float64() -> None:
    with acme.without_float64():
        fails_with(TypeError, lambda: torch.zeros(1, dtype=torch.float64, device=DEVICE))
        for name in calls("cpu"):
            _is_the_cpus(name, WITHOUT_FLOAT64_GRADIENT)


@check
def nothing_waits_for_the_device() -> None:
    logits, labels = (tensor.to(DEVICE) for tensor in batch())
    leaf = logits.requires_grad_()
    given = heads(DEVICE)
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    with acme.recorded() as record:
        accumloss.cross_entropy(leaf, labels, metrics=True, **OPTIONS).loss_sum.backward()
        accumloss.token_losses(leaf, labels).sum().backward()
        accumloss.distillation_loss(leaf, logits.detach(), labels, beta=0.3, num_items_in_batch=9).backward()
        accumloss.linear_cross_entropy(hidden, weight, labels, metrics=True).mean_loss.backward()
    assert len(record.ops) > 100
    assert record.waits == [], record.waits


@check
def no_copy_of_everything() -> None:
    rows, classes, budget = 512, 1000, 2**18
    logits = torch.randn(1, rows, classes).bfloat16().to(DEVICE)
    labels = torch.arange(rows).view(1, rows).to(DEVICE)
    whole = accumloss.cross_entropy(logits, labels, metrics=True)
    before, fallback.MAX_SCRATCH_BYTES = fallback.MAX_SCRATCH_BYTES, budget
    try:
        with acme.recorded() as record:
            sums = accumloss.cross_entropy(logits, labels, metrics=True)
            accumloss.causal_lm_loss(logits, labels, num_items_in_batch=3, inplace="forward")
    finally:
        fallback.MAX_SCRATCH_BYTES = before
    assert record.most_bytes <= budget // 4, record.most_bytes  # of one tensor: several exist together
    assert_close(sums.loss_sum, whole.loss_sum.cpu(), SUM, "loss_sum in chunks")
    assert sums.num_correct.item() == whole.num_correct.item() and sums.num_items.item() == rows


@check
def bad_labels_are_nan_and_told() -> None:
    logits, labels = batch()
    labels[1, 3] = V
    leaf, labels = logits.to(DEVICE).requires_grad_(), labels.to(DEVICE)
    loss = accumloss.cross_entropy(leaf, labels).loss_sum
    loss.backward()
    assert loss.isnan().item()
    grad = leaf.grad.cpu()
    assert not grad[1, 3].any() and grad.isfinite().all() and grad[1, 2].any()
    labels[2, 0] = -7
    with torch.no_grad():
        accumloss.cross_entropy(logits.to(DEVICE), labels)  # the first one stays
    said = fails_with(IndexError, accumloss.check)
    assert f"got {V} for row {T + 3}" in said and "acme" in said, said
    accumloss.check()


@check
def ignored_rows_are_inert() -> None:
    logits, labels = batch()
    spoiled = logits.clone()
    spoiled[0, 2:4], spoiled[0, 4:] = torch.nan, torch.inf
    found = []
    for given in (logits, spoiled):
        leaf = given.to(DEVICE).requires_grad_()
        sums = accumloss.cross_entropy(leaf, labels.to(DEVICE), metrics=True, **OPTIONS)
        sums.loss_sum.backward()
        found.append((sums.loss_sum.cpu(), sums.entropy_sum.cpu(), leaf.grad.cpu()))
    for clean, other in zip(*found, strict=True):
        assert torch.equal(clean, other)


@check
def second_derivatives() -> None:
    logits, labels = batch(torch.float64)
    results = []
    for device in ("cpu", DEVICE):
        leaf = logits.to(device).requires_grad_()
        loss = accumloss.cross_entropy(leaf, labels.to(device)).mean_loss
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), leaf)[0].cpu())
    assert_within(results[1], results[0], ROW_LOSS_FLOAT64, "a second derivative")


@check
def trainer_trains_and_evaluates() -> None:
    _train_and_evaluate(fused_linear=False)


@check
def trainer_trains_and_evaluates_from_hidden_states() -> None:
    _train_and_evaluate(fused_linear=True)


@check
def trainer_without_float64() -> None:
    with acme.without_float64():
        _train_and_evaluate(fused_linear=False)


def _train_and_evaluate(fused_linear: bool) -> None:
    """Two accumulated steps and an evaluation on the device, against the CPU."""
    import tempfile

    import training
    import transformers
    from accelerate.state import AcceleratorState, PartialState

    data = [
        {"input_ids": row, "labels": [token if i > 2 + k else -100 for i, token in enumerate(row)]}
        for k, row in enumerate(torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0)).tolist())
    ]
    results = []
    accumloss.register_with_transformers(fused_linear=fused_linear)
    try:
        for device in ("cpu", DEVICE):
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
            model = training.build("LlamaForCausalLM")
            with tempfile.TemporaryDirectory() as folder:
                arguments = transformers.TrainingArguments(
                    folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, report_to=[],
                    per_device_eval_batch_size=3, disable_tqdm=True, save_strategy="no", optim="sgd",
                    dataloader_pin_memory=False, logging_steps=1, learning_rate=0.1, lr_scheduler_type="constant",
                    max_grad_norm=0.0,
                )  # fmt: skip
                trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
                trainer.train()
                loss = trainer.evaluate()["eval_loss"]
            assert next(model.parameters()).device.type == device
            results.append((loss, [parameter.detach().cpu() for parameter in model.parameters()]))
    finally:
        accumloss.unregister_from_transformers()
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    (wanted, of_cpu), (found, of_device) = results
    assert abs(found - wanted) <= TRAINER_LOSS * abs(wanted), (found, wanted)
    for a, b in zip(of_device, of_cpu, strict=True):
        assert (a - b).norm() <= ACCUMULATED_GRADIENT[torch.float32] * b.norm()


def main(file: str, *names: str) -> None:
    global acme
    import device_without_kernels as acme

    torch.set_num_threads(1)
    found = {}
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    with open(file, "w") as out:
        json.dump(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
