"""Accumulator: any split of a window trains like the one batch that holds it; misuse is refused."""

import copy
import gc
import json
import math
import random
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import ACCUMULATED_GRADIENT, SUM
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchrun import torchrun
from windows import KEPT, TinyLM, error, gradients, loss_sum, norm, one_batch, split, targets, window

import accumloss
from accumloss import Accumulator
from accumloss.accumulation import accumulator as module
from accumloss.accumulation.gradients import multiply_, norm_of

EXACT = ACCUMULATED_GRADIENT[torch.float32]
SPLITS = {"whole": [8], "halves": [4, 4], "uneven": [3, 1, 4], "single rows": [1] * 8}


def sums_of(model, inputs, labels, **options):
    return accumloss.cross_entropy(model(inputs), labels, shift=1, **options)


def accumulate(accumulator, model, micro_batches, **options):
    for inputs, labels in micro_batches:
        accumulator.backward(sums_of(model, inputs, labels, **options))


def one_micro_batch(**options):
    """A model, its accumulator, and a micro-batch that has been back-propagated."""
    model = TinyLM()
    accumulator = Accumulator(model, **options)
    accumulate(accumulator, model, [window()], metrics=True)
    return model, accumulator


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_any_split_is_the_one_batch(sizes):
    model, (inputs, labels) = TinyLM(), window()
    wanted, loss = one_batch(model, inputs, labels)
    micro_batches = split(inputs, labels, sizes)
    for order in (micro_batches, micro_batches[::-1], random.Random(0).sample(micro_batches, len(micro_batches))):
        model.zero_grad()
        accumulator = Accumulator(model)
        accumulate(accumulator, model, order)
        stats = accumulator.finish()
        assert error(gradients(model), wanted) <= EXACT
        assert stats.mean_loss.item() == pytest.approx(loss, rel=SUM)
        assert stats.num_items.item() == sum(KEPT) - len(KEPT)
        assert not stats.loss_sum.requires_grad


def test_mean_of_means_is_not_the_one_batch():
    """The disease, on the same data."""
    model, (inputs, labels) = TinyLM(), window()
    wanted, _ = one_batch(model, inputs, labels)
    micro_batches = split(inputs, labels, [2, 2, 2, 2])
    for some_inputs, some_labels in micro_batches:
        total, count = loss_sum(model, some_inputs, some_labels)
        (total / count / len(micro_batches)).backward()
    assert error(gradients(model), wanted) > 0.05


def test_metrics_are_those_of_the_window():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    accumulate(accumulator, model, split(inputs, labels, [5, 3]), metrics=True)
    stats, wanted = accumulator.finish(), sums_of(model, inputs, labels, metrics=True)
    for name in ("mean_loss", "perplexity", "accuracy", "mean_entropy"):
        assert getattr(stats, name).item() == pytest.approx(getattr(wanted, name).item(), rel=SUM)
    assert stats.num_correct.dtype == torch.int64


def test_metrics_of_some_micro_batches_are_those_of_none():
    model, accumulator = one_micro_batch()
    accumulate(accumulator, model, [window(1)])
    assert accumulator.finish().num_correct is None


@pytest.mark.parametrize(
    "given",
    [
        lambda total, count: (total, count),
        lambda total, count: ((total, count),),
        lambda total, count: (total, int(count)),
        lambda total, count: (total, count.int().reshape(1)),
        lambda total, count: (accumloss.TokenSums(total, count, count),),
    ],
    ids=["sum, tensor", "pair", "sum, int", "sum, int32 (1,)", "TokenSums"],
)
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_sums_in_any_form(given, known):
    model, (inputs, labels) = TinyLM(), window()
    wanted, _ = one_batch(model, inputs, labels)
    total = {"known_total": sum(KEPT) - len(KEPT)} if known else {}
    accumulator = Accumulator(model)
    for micro_batch in split(inputs, labels, [3, 5]):
        accumulator.backward(*given(*loss_sum(model, *micro_batch)), **total)
    accumulator.finish()
    assert error(gradients(model), wanted) <= EXACT
    assert accumulator.scale.item() == pytest.approx(1 if known else 1 / (sum(KEPT) - len(KEPT)), rel=SUM)


def test_op_as_it_is():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    for some_inputs, some_labels in split(inputs, labels, [3, 5]):
        accumulator.backward(torch.ops.accumloss.causal_lm(model(some_inputs), some_labels))
    accumulator.finish()
    assert error(gradients(model), one_batch(model, inputs, labels)[0]) <= EXACT


def test_class_weights_divide_by_the_total_weight():
    model, (inputs, labels) = TinyLM(), window()
    weight = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.1
    logits = model(inputs)
    F.cross_entropy(logits.flatten(0, 1), targets(labels).flatten(), weight).backward()
    wanted = gradients(model)
    model.zero_grad()
    accumulator = Accumulator(model)
    accumulate(accumulator, model, split(inputs, labels, [1, 7]), weight=weight)
    accumulator.finish()
    assert error(gradients(model), wanted) <= EXACT


@pytest.mark.parametrize("options", [{}, {"max_items": 64}, {"max_norm": 1.0}])
def test_window_without_items(options):
    model = TinyLM()
    max_norm = options.pop("max_norm", None)
    accumulator = Accumulator(model, **options)
    inputs, labels = window()
    accumulate(accumulator, model, split(inputs, torch.full_like(labels, -100), [4, 4]))
    stats = accumulator.finish(max_norm=max_norm)
    assert stats.num_items.item() == 0 and stats.mean_loss.item() == 0
    assert norm(gradients(model)) == 0  # and no NaN


def test_micro_batches_without_items():
    model, (inputs, labels) = TinyLM(), window()
    wanted, _ = one_batch(model, inputs, labels)
    empty = (inputs, torch.full_like(labels, -100))
    accumulator = Accumulator(model)
    accumulate(accumulator, model, [empty, *split(inputs, labels, [4, 4]), empty])
    accumulator.finish()
    assert error(gradients(model), wanted) <= EXACT


def test_windows_follow_each_other():
    model, accumulators = TinyLM(), []
    for sizes in ([8], [1] * 8):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        accumulator = Accumulator(copied)
        for seed in range(3):
            accumulate(accumulator, copied, split(*window(seed), sizes))
            accumulator.finish()
            optimizer.step()
            optimizer.zero_grad()
        accumulators.append(dict(copied.named_parameters()))
    assert error(accumulators[1], accumulators[0]) <= EXACT


# --------------------------------------------------------------------------------------------------- divisor, GradScaler


@pytest.mark.parametrize(("max_items", "divisor"), [(1, 1), (2, 2), (3, 4), (512, 512), (513, 1024), (10**6, 2**20)])
def test_provisional_divisor_changes_no_bit(max_items, divisor):
    (model, plain), (divided, accumulator) = one_micro_batch(), one_micro_batch(max_items=max_items)
    assert torch.equal(divided.head.weight.grad * divisor, model.head.weight.grad)
    plain.finish()
    accumulator.finish()
    for name, grad in gradients(model).items():
        assert torch.equal(gradients(divided)[name], grad)


def scaled_windows(max_items):
    """Weights after three windows under fp16 autocast, and how many of them the GradScaler skipped."""
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    accumulator = Accumulator(model, scaler=scaler, max_items=max_items)
    skipped = 0
    for seed in range(3):
        for inputs, labels in split(*window(seed), [4, 4]):
            with torch.autocast("cpu", dtype=torch.float16):
                sums = sums_of(model, inputs, labels)
            accumulator.backward(sums)
        scaler.unscale_(optimizer)
        accumulator.finish()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
    return dict(model.named_parameters()), skipped


def test_divisor_keeps_fp16_from_overflowing():
    assert scaled_windows(max_items=1)[1] >= 2
    weights, skipped = scaled_windows(max_items=None)
    assert skipped == 0
    assert error(weights, scaled_windows(max_items=4096)[0]) <= ACCUMULATED_GRADIENT[torch.float16]


def test_disabled_scaler_is_none():
    model, accumulator = one_micro_batch(scaler=torch.amp.GradScaler("cpu", enabled=False))
    plain, _ = one_micro_batch()
    assert torch.equal(model.head.weight.grad, plain.head.weight.grad)
    accumulator.finish(max_norm=1.0)


# ----------------------------------------------------------------------------------------------------- rescale and clip


@pytest.mark.parametrize("max_norm", [1e-3, 1e3, math.inf])
def test_fused_clip_is_a_clip_after_the_rescale(max_norm):
    (model, accumulator), (fused, fused_accumulator) = one_micro_batch(), one_micro_batch()
    accumulator.finish()
    wanted_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    fused_accumulator.finish(max_norm=max_norm)
    assert error(gradients(fused), gradients(model)) <= EXACT
    assert fused_accumulator.grad_norm.item() == pytest.approx(wanted_norm.item(), rel=SUM)
    assert accumulator.grad_norm is None
    assert fused_accumulator.scale <= accumulator.scale


@pytest.mark.parametrize("max_norm", [None, 1e-3])
def test_scale_is_what_remains_to_be_multiplied(max_norm):
    (model, accumulator), (left, left_accumulator) = one_micro_batch(), one_micro_batch()
    accumulator.finish(max_norm=max_norm)
    before = left.head.weight.grad.clone()
    left_accumulator.finish(rescale=False, max_norm=max_norm)
    assert torch.equal(left.head.weight.grad, before)
    assert torch.equal(before * left_accumulator.scale, model.head.weight.grad)


def test_known_total_is_clipped_too():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    accumulator.backward(sums_of(model, inputs, labels), known_total=torch.tensor(sum(KEPT) - len(KEPT)))
    accumulator.finish(max_norm=1e-3)
    assert norm(gradients(model)) == pytest.approx(1e-3, rel=1e-2)


# ----------------------------------------------------------------------------------------------- parameters of all kinds


def test_sparse_gradients():
    model, (inputs, labels) = TinyLM(sparse=True), window()
    dense = TinyLM()
    for each in (model, dense):
        accumulator = Accumulator(each)
        accumulate(accumulator, each, split(inputs, labels, [3, 5]))
        accumulator.finish(max_norm=1e-2)
    assert model.embed.weight.grad.is_sparse
    assert error(gradients(model), gradients(dense)) <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    model, (inputs, labels) = TinyLM().to(dtype), window()
    wanted, _ = one_batch(model, inputs, labels)
    model.head.float()  # and of several
    model.head.register_forward_pre_hook(lambda _, args: args[0].float())
    accumulator = Accumulator(model)
    accumulate(accumulator, model, split(inputs, labels, [3, 5]))
    accumulator.finish(max_norm=1e3)
    assert {g.dtype for g in gradients(model).values()} == {dtype, torch.float32}
    assert error(gradients(model), wanted) <= ACCUMULATED_GRADIENT.get(dtype, EXACT)


def test_norm_of_fp16_sums_is_finite():
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    accumulator = Accumulator([parameter])
    accumulator.backward(parameter.float().sum() * 4096, 4096)  # a norm of 4096 * 64, beyond fp16's 65504
    accumulator.finish(max_norm=1.0)
    assert accumulator.grad_norm.item() == 64
    assert parameter.grad.float().norm().item() == pytest.approx(1, rel=2.0**-11)


def test_rescale_of_bf16_has_no_bias():
    """A factor that is rounded to bf16 first moves all gradients the same way, by up to 2**-9."""
    parameter = torch.nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    grad = torch.rand(4096, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    accumulator = Accumulator([parameter])
    accumulator.backward((parameter.float() * grad.float()).sum(), 3)
    accumulator.finish()
    ratio = (parameter.grad.double() / (grad.double() / 3)).mean().item()
    assert abs(ratio - 1) < 2.0**-12


def test_parameters_without_gradient_and_twice():
    model, (inputs, labels) = TinyLM(), window()
    wanted, _ = one_batch(model, inputs, labels)
    unused = torch.nn.Parameter(torch.zeros(3))
    frozen = torch.zeros(3)
    parameters = [*model.parameters(), unused, frozen, *model.parameters()]
    accumulator = Accumulator(iter(parameters))
    accumulate(accumulator, model, split(inputs, labels, [3, 5]))
    accumulator.finish(max_norm=1e3)
    assert error(gradients(model), wanted) <= EXACT
    assert unused.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_on_several_devices(dtype):
    """Fake tensors: they have a device and no values, and refuse whatever needs one on the host."""
    with FakeTensorMode():
        grads = [torch.empty(3, 2, device="cuda:0"), torch.empty(5, device="cuda:1", dtype=dtype)]
        grads += [torch.empty((), device="cuda:1", dtype=dtype), torch.empty(2, 3, device="cuda:1", dtype=dtype).t()]
        norm = norm_of(grads, torch.device("cuda:0"))
        multiply_(grads, norm)
    assert norm.device == torch.device("cuda:0") and norm.dtype == torch.float64


def test_wrapped_module():
    model, (inputs, labels) = TinyLM(), window()
    compiled = torch.compile(model, backend="eager")
    accumulator = Accumulator(compiled)
    accumulate(accumulator, compiled, split(inputs, labels, [3, 5]))
    accumulator.finish()
    assert error(gradients(model), one_batch(model, inputs, labels)[0]) <= EXACT


# ----------------------------------------------------------------------------------------------------------- known total


def test_known_total_multiplies_nothing():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    accumulator.backward(sums_of(model, inputs, labels), known_total=sum(KEPT) - len(KEPT))
    version = model.head.weight.grad._version
    accumulator.finish()
    assert model.head.weight.grad._version == version
    assert accumulator.scale.item() == 1


def test_known_total_of_zero():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    empty = torch.full_like(labels, -100)
    accumulator.backward(sums_of(model, inputs, empty), known_total=0)
    assert accumulator.finish().num_items.item() == 0
    model.zero_grad()
    accumulator.backward(sums_of(model, inputs, empty), known_total=torch.tensor(0))
    accumulator.finish()
    assert norm(gradients(model)) == 0


# ---------------------------------------------------------------------------------------------------------------- misuse


def backward_with(*args, **kwargs):
    model, (inputs, labels) = TinyLM(), window()
    total, count = loss_sum(model, inputs, labels)
    values = {"sum": total, "count": count, "sums": accumloss.TokenSums(total, count, count)}
    Accumulator(model).backward(
        *(values.get(a, a) if isinstance(a, str) else a(total) if callable(a) else a for a in args), **kwargs
    )


def mixed(first, second):
    model, accumulator = TinyLM(), None
    accumulator = Accumulator(model)
    for known_total in (first, second):
        accumulator.backward(sums_of(model, *window()), known_total=known_total)


def finish_twice():
    _, accumulator = one_micro_batch()
    accumulator.finish()
    accumulator.finish()


def finish_without_backward():
    model = TinyLM()
    accumulator = Accumulator(model)
    accumulator.loss(sums_of(model, *window())).backward()
    accumulator.loss(sums_of(model, *window()))
    accumulator.finish()


def finish_with_wrong_total():
    model = TinyLM()
    accumulator = Accumulator(model)
    accumulator.backward(sums_of(model, *window()), known_total=40)
    accumulator.finish()


def finish_after(change, **options):
    model, accumulator = one_micro_batch()
    change(model)
    accumulator.finish(**options)


def finish_scaled():
    _, accumulator = one_micro_batch(scaler=torch.amp.GradScaler("cpu"))
    accumulator.finish(max_norm=1.0)


def backward_after(change):
    model, accumulator = one_micro_batch()
    change(model)
    accumulate(accumulator, model, [window()])


def loss_after_zeroing():
    model = TinyLM()
    accumulator = Accumulator(model)
    for _ in range(2):
        model.zero_grad()
        accumulator.loss(sums_of(model, *window())).backward()


def next_window_without_zeroing(clip=False, make=torch.optim.SGD):
    model, accumulator = one_micro_batch()
    accumulator.finish()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    make(model.parameters(), lr=0.1).step()
    accumulate(accumulator, model, [window()])


def clip(model):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def error_cases():
    def case(name, work, kind, message):
        return pytest.param(work, kind, message, id=name)

    yield case(
        "not a module", lambda: Accumulator(3), TypeError, "expected a module or an iterable of parameters, got int"
    )
    yield case(
        "a single parameter", lambda: Accumulator(torch.zeros(3)), TypeError, "iterable of parameters, got Tensor"
    )
    yield case("param groups", lambda: Accumulator([{"params": []}]), TypeError, "iterable of parameters, got list")
    yield case(
        "reduction", lambda: Accumulator([], gradient_reduction="avg"), ValueError, '"mean" or "sum", got \'avg\''
    )
    yield case(
        "unknown keyword",
        lambda: Accumulator([], gradient_reduce="mean"),
        TypeError,
        "Accumulator: expected keyword arguments model_or_params, process_group, gradient_reduction, max_items, scaler, got "
        "'gradient_reduce' .the nearest is 'gradient_reduction'.",
    )
    yield case("max_items 0", lambda: Accumulator([], max_items=0), ValueError, "max_items as an int >= 1, got 0")
    yield case("max_items 0.5", lambda: Accumulator([], max_items=0.5), ValueError, "max_items as an int >= 1, got 0.5")

    yield case(
        "no sums", lambda: backward_with(None), TypeError, "expected TokenSums, a sum of losses or .* got NoneType"
    )
    yield case(
        "no count", lambda: backward_with("sum"), ValueError, "expected num_items with a sum of losses, got None"
    )
    yield case("two counts", lambda: backward_with("sums", 3), ValueError, "no num_items with TokenSums, .* got 3")
    yield case("negative", lambda: backward_with("sum", -1), ValueError, "expected num_items >= 0, got -1")
    yield case(
        "fraction", lambda: backward_with("sum", 1.5), TypeError, "num_items as an int or a () tensor, got float"
    )
    yield case("counts", lambda: backward_with("sum", torch.ones(2)), ValueError, "num_items of shape (), got (2,)")
    yield case(
        "losses", lambda: backward_with(lambda t: t.expand(2), 2), ValueError, "of shape (), got torch.float32 (2,)"
    )
    yield case(
        "int sum", lambda: backward_with(torch.tensor(3), 2), ValueError, "floating-point sum .* got torch.int64 ()"
    )
    yield case("detached", lambda: backward_with(torch.Tensor.detach, 2), ValueError, "does not require grad")
    yield case("known", lambda: backward_with("sums", known_total=-2), ValueError, "expected known_total >= 0, got -2")
    yield case(
        "known type", lambda: backward_with("sums", known_total=2.0), TypeError, "known_total as an int .* got float"
    )
    yield case("unknown, known", lambda: mixed(None, 42), ValueError, "or for none, got one after 1 without")
    yield case("known, unknown", lambda: mixed(42, None), ValueError, "or for none, got none after 1 with")
    yield case("known, other", lambda: mixed(42, 43), ValueError, "expected the known_total 42 of the window, got 43")

    yield case(
        "finish twice", finish_twice, RuntimeError, "finish: expected micro-batches since the last finish(), got none"
    )
    yield case("no backward", finish_without_backward, RuntimeError, "a backward of every loss, got none of 1 of 2")
    yield case("wrong total", finish_with_wrong_total, ValueError, "expected the known_total 40 .* got 39")
    yield case(
        "max_norm", lambda: finish_after(torch.nn.Module.train, max_norm=0), ValueError, "expected max_norm > 0, got 0"
    )
    yield case("scaled", finish_scaled, RuntimeError, "expected scaler.unscale_(optimizer) before finish(max_norm=1.0)")
    yield case(
        "zeroed at the end", lambda: finish_after(torch.nn.Module.zero_grad), RuntimeError, "of the window, got none"
    )
    yield case(
        "zeroed", lambda: backward_after(torch.nn.Module.zero_grad), RuntimeError, "earlier micro-batches, got none"
    )
    yield case("zeroed before loss()", loss_after_zeroing, RuntimeError, "loss: .* earlier micro-batches, got none")
    yield case(
        "set to 0", lambda: backward_after(lambda m: m.zero_grad(False)), RuntimeError, "nothing but backward() has"
    )
    yield case("clipped", lambda: backward_after(clip), RuntimeError, "nothing but backward() has changed")
    yield case(
        "not zeroed", next_window_without_zeroing, RuntimeError, "expected gradients that were zeroed after the last"
    )
    yield case(
        "clipped, not zeroed", lambda: next_window_without_zeroing(clip=True), RuntimeError, "zeroed after the last"
    )


@pytest.mark.parametrize(("work", "kind", "message"), list(error_cases()))
def test_misuse_is_refused(work, kind, message):
    for special in "()":
        message = message.replace(special, "\\" + special)
    with pytest.raises(kind, match=message):
        work()


class Steps:
    """Ways of stepping an optimizer."""

    @staticmethod
    def plain(optimizer):
        optimizer.step()

    @staticmethod
    def scaled(optimizer):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)

    @staticmethod
    def accelerated(optimizer):
        accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
        accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer).step()

    @staticmethod
    def closure(optimizer):
        optimizer.step(lambda: None)


@pytest.mark.parametrize("step", [Steps.plain, Steps.scaled, Steps.accelerated, Steps.closure])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_refuses_an_unfinished_window(step, make):
    model, accumulator = one_micro_batch()
    optimizer = make(model.parameters(), lr=0.1)
    other = torch.nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    step(torch.optim.SGD([other], lr=0.1))  # one that holds no parameter of ours
    with pytest.raises(RuntimeError, match=r"step: expected Accumulator.finish\(\) before it, got a window of 1"):
        step(optimizer)
    accumulator.finish()
    step(optimizer)


def test_window_may_be_finished_in_a_closure():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulate(accumulator, model, [(inputs, labels)])

    def closure():
        accumulate(accumulator, model, [(inputs, labels)])
        accumulator.finish()

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="zeroed after the last"):
        accumulate(accumulator, model, [(inputs, labels)])


def test_nothing_keeps_an_accumulator():
    model, accumulator = one_micro_batch()
    gone = weakref.ref(accumulator)
    assert accumulator in module._watched
    del accumulator
    gc.collect()
    assert gone() is None
    torch.optim.SGD(model.parameters(), lr=0.1).step()  # its window is nobody's any more
    hooks = len(module._hooks)
    one_micro_batch()
    assert len(module._hooks) == hooks


def test_compiled_optimizer_step():
    model, accumulator = one_micro_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    before = model.head.weight.clone()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"expected Accumulator.finish\(\) before it"):
            step()
        assert torch.equal(model.head.weight, before)
        accumulator.finish()
        step()
        assert not torch.equal(model.head.weight, before)
        optimizer.zero_grad()
        accumulate(accumulator, model, [window()])
        before = model.head.weight.clone()


def test_reset_drops_a_window():
    model, accumulator = one_micro_batch()
    model.zero_grad()
    accumulator.reset()
    inputs, labels = window(1)
    accumulate(accumulator, model, [(inputs, labels)])
    accumulator.finish()
    assert error(gradients(model), one_batch(model, inputs, labels)[0]) <= EXACT


def test_caller_may_change_the_loss_in_place():
    model, (inputs, labels) = TinyLM(), window()
    accumulator = Accumulator(model)
    loss = accumulator.loss(sums_of(model, inputs, labels))
    loss *= 1
    loss.backward()
    with torch.no_grad():
        loss *= 5
    assert accumulator.finish().mean_loss.item() == pytest.approx(one_batch(model, inputs, labels)[1], rel=SUM)


# ------------------------------------------------------------------------------------------------------------------ sync


class Synchronisations(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("known_total", [None, torch.tensor(39)], ids=["unknown", "known"])
def test_nothing_synchronises(known_total):
    model = TinyLM()
    accumulator = Accumulator(model, max_items=64)
    with Synchronisations() as seen:
        for inputs, labels in split(*window(), [4, 4]):
            accumulator.backward(sums_of(model, inputs, labels, metrics=True), known_total=known_total)
        accumulator.finish(max_norm=1.0)
        assert seen.found == []
        torch.ones(()).item()
        assert seen.found


# ---------------------------------------------------------------------------------------------------------- several ranks

HERE = Path(__file__).resolve().parent
ITEMS = sum(KEPT) - len(KEPT)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found: case -> figures. One torchrun for all of the cases."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun(HERE / "distributed_accumulation.py", out)
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "case",
    [
        "ddp_every_backward_reduces",
        "ddp_last_backward_reduces",
        "ddp_bucket_views",
        "ddp_divisor",
        "ddp_known_total",
        "ddp_known_total_as_tensor",
        "ddp_own_group",
        "ddp_compiled",
        "ddp_rank_without_items",
        "ddp_windows_by_loss",
        "ddp_bucket_views_windows_by_loss",
        "ddp_windows_unscaled",
        "fsdp_windows_by_loss",
        "fsdp_windows_unscaled",
        "fsdp_every_backward_reduces",
        "fsdp_last_backward_reduces",
        "fsdp_sums",
        "fsdp1_with_its_own_clip",
        "hand_sum_before_finish",
        "hand_mean_before_finish",
        "hand_mean_after_finish",
        "hand_rank_without_micro_batches",
        "hand_mean_rank_without_micro_batches",
        "hand_known_total_rank_without_micro_batches",
    ],
)
def test_uneven_ranks_take_the_step_of_the_one_batch(ranks, case):
    for found in ranks:
        assert found[case]["error"] <= EXACT
        assert found[case]["loss error"] <= SUM
        assert found[case]["num_items"] == ITEMS


def test_forgotten_world_factor_halves_the_gradient(ranks):
    """The disease: DDP has averaged."""
    assert ranks[0]["ddp_without_the_world_factor"]["ratio"] == pytest.approx(0.5, rel=SUM)


@pytest.mark.parametrize("case", ["ddp_fused_clip", "fsdp_fused_clip"])
def test_clip_is_over_all_shards(ranks, case):
    for found in ranks:
        assert found[case]["grad_norm"] == pytest.approx(norm(one_batch(TinyLM(), *window())[0]), rel=EXACT)
        assert found[case]["norm"] == pytest.approx(1e-3 / (1 + 1e-6 / found[case]["grad_norm"]), rel=EXACT)


def test_ranks_without_micro_batches_report_what_the_others_do(ranks):
    wanted = sums_of(TinyLM(), *window(), metrics=True)
    for found in ranks:
        assert found["hand_rank_without_micro_batches"]["accuracy"] == pytest.approx(wanted.accuracy.item(), rel=SUM)
        assert found["hand_nothing_on_any_rank"] == {"num_items": 0, "mean_loss": 0.0, "scale": 1.0}


def test_one_all_reduce_for_everything(ranks):
    wanted = sums_of(TinyLM(), *window(), metrics=True)
    for found in ranks:
        assert found["one_all_reduce"]["calls"] == 1
        assert found["one_all_reduce"]["mean_entropy"] == pytest.approx(wanted.mean_entropy.item(), rel=SUM)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("ddp_wrong_known_total", "expected the known_total 40 over all micro-batches and ranks, got 39"),
        ("ddp_zeroed_in_the_middle", "nothing but backward() has changed in the middle of a window"),
        ("fsdp_zeroed_in_the_middle", "nothing but backward() has changed in the middle of a window"),
        ("ddp_clipped_before_finish", "nothing but backward() has changed before finish()"),
        ("ddp_bucket_views_clipped_before_finish", "nothing but backward() has changed before finish()"),
        ("ddp_second_optimizer_zeroed", "got none for 2 of 5 parameters"),
        ("fsdp_clipped_before_finish", "nothing but backward() has changed before finish()"),
        ("fsdp_second_optimizer_zeroed", "got none for 2 of 5 parameters"),
        ("fsdp_backward_of_another_loss", "nothing but backward() has changed in the middle of a window"),
        ("fsdp_not_zeroed", "expected gradients that were zeroed after the last window"),
        ("hand_reduction_not_told", "expected gradient_reduction on 2 ranks, got None"),
        ("hand_made_too_early", "made after init_process_group, got one for 1 of 2 ranks"),
    ],
)
def test_misuse_on_ranks_is_refused(ranks, case, message):
    for found in ranks:
        assert message in found[case]["raised"]


def test_known_total_on_one_rank_is_refused_there(ranks):
    assert "on all ranks or none, got it for 1 of 2" in ranks[0]["hand_known_on_one_rank"]["raised"]
    assert "got a window of 1 micro-batches" in ranks[0]["fsdp_not_zeroed"]["early"]
    assert "model.clip_grad_norm_" in ranks[0]["fsdp1_with_its_own_clip"]["refused"]
