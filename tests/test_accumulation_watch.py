"""Accumulator watches every gradient of a window: what spoils one is refused, and what is legal passes in silence."""

from __future__ import annotations

import gc
import math
import time
import warnings
import weakref

import pytest
import torch
from tolerances import ACCUMULATED_GRADIENT
from torch import nn
from torch.utils.checkpoint import checkpoint
from windows import TinyLM, error, gradients, one_batch, split, window

import accumloss
from accumloss import Accumulator
from accumloss.accumulation.gradients import marks, parameters_of
from accumloss.accumulation.window import Window

EXACT = ACCUMULATED_GRADIENT[torch.float32]
MICRO_BATCHES = split(*window(), [3, 1, 4])

CHANGED = "expected gradients that nothing but backward\\(\\) has changed"
LOST = "expected the gradients of the window.*got none for"


@pytest.fixture(autouse=True)
def no_warnings():
    """A false alarm is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def sums_of(model, inputs, labels):
    return accumloss.cross_entropy(model(inputs), labels, shift=1)


def by_backward(accumulator, sums, **options):
    accumulator.backward(sums, **options)


def by_loss(accumulator, sums, **options):
    """The backward is somebody else's: Accelerate's, Lightning's."""
    accumulator.loss(sums, **options).backward()


@pytest.fixture(params=[by_backward, by_loss])
def back(request):
    return request.param


def parts(model):
    """Two optimizers; the first parameter is not the second's."""
    return torch.optim.SGD(model.embed.parameters(), lr=0.1), torch.optim.SGD(
        [*model.hidden.parameters(), *model.head.parameters()], lr=0.1
    )


def check(model, accumulator, **options):
    accumulator.finish(**options)
    assert error(gradients(model), one_batch(TinyLM(), *window())[0]) <= EXACT


# ------------------------------------------------------------------------------------------------------- what is refused


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def clip_values(model):
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def clip_the_last(model):
    nn.utils.clip_grad_norm_([model.head.bias], 1e-3)


def scale(model):
    torch._foreach_mul_([p.grad for p in model.parameters()], 0.5)


def zero_the_second(model):
    parts(model)[1].zero_grad()


def zero_the_second_in_place(model):
    parts(model)[1].zero_grad(set_to_none=False)


def drop_the_last(model):
    model.head.bias.grad = None


def backward_of_another_loss(model):
    model.head.bias.square().sum().backward()


SPOILT = {
    clip: CHANGED,
    clip_values: CHANGED,
    clip_the_last: CHANGED,
    scale: CHANGED,
    zero_the_second: LOST,
    zero_the_second_in_place: CHANGED,
    drop_the_last: LOST,
    backward_of_another_loss: CHANGED,
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_spoils_a_gradient_before_finish_is_refused(spoil, back):
    model = TinyLM()
    accumulator = Accumulator(model)
    for micro_batch in MICRO_BATCHES:
        back(accumulator, sums_of(model, *micro_batch))
    spoil(model)
    with pytest.raises(RuntimeError, match=f"Accumulator.finish: {SPOILT[spoil]}"):
        accumulator.finish()


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_spoils_a_gradient_in_mid_window_is_refused(spoil, back):
    model = TinyLM()
    accumulator = Accumulator(model)
    back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
    spoil(model)
    sums = sums_of(model, *MICRO_BATCHES[1])
    with pytest.raises(RuntimeError, match=f"Accumulator.(backward|loss): {SPOILT[spoil]}"):
        back(accumulator, sums)


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_spoils_a_gradient_between_a_loss_and_its_backward_is_refused(spoil):
    """optimizer.zero_grad() where most loops have it."""
    model = TinyLM()
    accumulator = Accumulator(model)
    by_loss(accumulator, sums_of(model, *MICRO_BATCHES[0]))
    loss = accumulator.loss(sums_of(model, *MICRO_BATCHES[1]))
    spoil(model)
    with pytest.raises(RuntimeError, match=f"Accumulator: {SPOILT[spoil]}"):
        loss.backward()


def test_a_second_optimizer_that_does_not_zero_is_refused(back):
    model = TinyLM()
    accumulator = Accumulator(model)
    first, second = parts(model)
    for optimizer in (first, second):
        back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
        accumulator.finish()
        clip(model)
        first.step()
        second.step()
        optimizer.zero_grad()  # one of both
        with pytest.raises(RuntimeError, match="expected gradients that were zeroed after the last window"):
            back(accumulator, sums_of(model, *MICRO_BATCHES[1]))
        model.zero_grad()
        accumulator.reset()


def test_a_backward_that_failed_has_not_been(back):
    model = TinyLM()
    accumulator = Accumulator(model)
    back(accumulator, sums_of(model, *MICRO_BATCHES[0]))

    def out_of_memory(_):
        raise MemoryError

    handle = model.embed.weight.register_hook(out_of_memory)
    with pytest.raises(MemoryError):
        back(accumulator, sums_of(model, *MICRO_BATCHES[1]))
    handle.remove()
    with pytest.raises(RuntimeError, match="expected a backward of every loss, got none of 1 of 2"):
        accumulator.finish()
    with pytest.raises(RuntimeError, match=CHANGED):  # a part of the gradients is there
        back(accumulator, sums_of(model, *MICRO_BATCHES[1]))
    model.zero_grad()
    accumulator.reset()
    for micro_batch in MICRO_BATCHES:
        back(accumulator, sums_of(model, *micro_batch))
    check(model, accumulator)


# ---------------------------------------------------------------------------------------------------------- what is legal


@pytest.mark.parametrize("kind", ["for", "foreach", "fused"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_windows_with_any_optimizer(make, kind, set_to_none, back):
    model = TinyLM()
    options = {} if kind == "for" else {kind: True}
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1, maximize=True, **options)
    accumulator = Accumulator(model)
    for _ in range(3):
        for micro_batch in MICRO_BATCHES:
            back(accumulator, sums_of(model, *micro_batch))
        accumulator.finish()
        clip(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
    accumulator.finish()
    optimizer.step()
    with pytest.raises(RuntimeError, match="zeroed after the last window"):  # whatever a fused step does to gradients
        back(accumulator, sums_of(model, *MICRO_BATCHES[0]))


def test_zeroing_between_the_loss_and_the_first_backward():
    """As Lightning does."""
    model = TinyLM()
    accumulator = Accumulator(model)
    for _ in range(2):
        for i, micro_batch in enumerate(MICRO_BATCHES):
            loss = accumulator.loss(sums_of(model, *micro_batch))
            if i == 0:
                model.zero_grad()
            loss.backward()
        check(model, accumulator)


def test_gradients_dropped_one_by_one_between_windows(back):
    model = TinyLM()
    accumulator = Accumulator(model)
    for _ in range(2):
        for micro_batch in MICRO_BATCHES:
            back(accumulator, sums_of(model, *micro_batch))
        check(model, accumulator)
        for parameter in model.parameters():
            parameter.grad = None


def test_unscale_before_finish():
    model = TinyLM()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    accumulator = Accumulator(model, scaler=scaler, max_items=1)
    for _ in range(2):
        for micro_batch in MICRO_BATCHES:
            accumulator.backward(sums_of(model, *micro_batch))
        scaler.unscale_(optimizer)
        check(model, accumulator, max_norm=math.inf)
        model.zero_grad()
        scaler.update()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("in_place", [False, True])
def test_reducing_by_hand_before_finish(tmp_path, reduction, in_place, back):
    """On one rank: a sum and a mean change no value, and are written all the same."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = TinyLM()
        accumulator = Accumulator(model, gradient_reduction=reduction)
        for micro_batch in MICRO_BATCHES:
            back(accumulator, sums_of(model, *micro_batch))
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
            if in_place:
                parameter.grad /= 1
            else:
                parameter.grad = parameter.grad / 1
        check(model, accumulator)
        model.zero_grad()
        back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
        clip(model)
        sums = sums_of(model, *MICRO_BATCHES[1])
        with pytest.raises(RuntimeError, match=CHANGED):  # in mid-window they are nobody's
            back(accumulator, sums)
    finally:
        torch.distributed.destroy_process_group()


def test_an_all_reduce_is_legal_without_a_word_on_it(tmp_path, back):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = TinyLM()
        accumulator = Accumulator(model)
        for micro_batch in MICRO_BATCHES:
            back(accumulator, sums_of(model, *micro_batch))
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
        check(model, accumulator)
    finally:
        torch.distributed.destroy_process_group()


class Heads(nn.Module):
    """Two heads, of which a micro-batch takes one, and one that none takes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Embedding(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, inputs, head):
        return self.heads[head](self.body(inputs))


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [1, 0, 1, 0]])
@pytest.mark.parametrize("stale", [False, True])
def test_parameters_without_gradient_in_some_micro_batches(order, stale, back):
    model = Heads()
    inputs, labels = torch.arange(8), torch.arange(8).flip(0)
    if stale:  # the third head has a gradient of something else, which the window does not write to
        model.heads[2].weight.grad = torch.ones(8, 8)
    accumulator = Accumulator(model)
    for _ in range(2):
        for head in order:
            back(accumulator, accumloss.cross_entropy(model(inputs, head), labels))
            if stale:
                model.heads[2].weight.grad.add_(1)
        accumulator.finish()
        found = gradients(model)
        for p in (p for m in (model.body, *model.heads[:2]) for p in m.parameters()):
            p.grad = None
        loss = sum(nn.functional.cross_entropy(model(inputs, head), labels) for head in order) / len(order)
        loss.backward()
        wanted = gradients(model)
        for name in ("heads.2.weight",) if stale else ():
            found.pop(name), wanted.pop(name)
        assert error(found, wanted) <= EXACT
        for p in (p for m in (model.body, *model.heads[:2]) for p in m.parameters()):
            p.grad = None


def test_micro_batches_that_reach_no_parameter(back):
    """An Accumulator of one head, which the first micro-batch does not take."""
    model = Heads()
    inputs, labels = torch.arange(8), torch.arange(8)
    accumulator = Accumulator(model.heads[1])
    for head in (0, 1, 0):
        back(accumulator, accumloss.cross_entropy(model(inputs, head), labels))
    assert accumulator.finish().num_items.item() == 24


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, back):
    model = TinyLM()
    inner = model.hidden.forward
    model.hidden.forward = lambda x: checkpoint(inner, x, use_reentrant=use_reentrant)
    accumulator = Accumulator(model)
    for micro_batch in MICRO_BATCHES:
        back(accumulator, sums_of(model, *micro_batch))
    check(model, accumulator)


def test_gradients_that_the_caller_writes():
    """torch.autograd.grad: no backward has written anything."""
    model = TinyLM()
    parameters = list(model.parameters())
    accumulator = Accumulator(model)
    for _ in range(2):
        for i, micro_batch in enumerate(MICRO_BATCHES):
            grads = torch.autograd.grad(accumulator.loss(sums_of(model, *micro_batch)), parameters)
            for parameter, grad in zip(parameters, grads, strict=True):
                if i:
                    parameter.grad += grad
                else:
                    parameter.grad = grad.clone()
        check(model, accumulator)


def test_losses_that_are_back_propagated_together():
    model = TinyLM()
    accumulator = Accumulator(model)
    for _ in range(2):
        first, second, third = (accumulator.loss(sums_of(model, *micro_batch)) for micro_batch in MICRO_BATCHES)
        (first + second).backward()
        third.backward()
        check(model, accumulator)
        model.zero_grad()


@pytest.mark.slow("the compiler takes seconds, and no other path of ours is taken")
def test_compiled_autograd():
    """Its backwards are not watched, and legal."""
    from torch._dynamo import compiled_autograd  # two seconds to import

    model = TinyLM()
    accumulator = Accumulator(model)
    for _ in range(2):
        for micro_batch in MICRO_BATCHES:
            sums = sums_of(model, *micro_batch)
            with warnings.catch_warnings(), compiled_autograd._enable(torch.compile(backend="eager")):
                warnings.simplefilter("ignore")  # the compiler's own
                accumulator.backward(sums)
        check(model, accumulator)
        model.zero_grad()


def test_sparse_gradients(back):
    model = TinyLM(sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    accumulator = Accumulator(model)
    for _ in range(2):
        for micro_batch in MICRO_BATCHES:
            back(accumulator, sums_of(model, *micro_batch))
        check(model, accumulator)
        optimizer.step()
        optimizer.zero_grad()
    back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
    model.embed.weight.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match=CHANGED):
        accumulator.finish()


def test_a_gradient_that_is_dropped_is_freed(back):
    """The marks hold no memory: zeroing after the step frees the gradients, as without an Accumulator."""
    model = TinyLM()
    accumulator = Accumulator(model)
    back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
    accumulator.finish()
    gone = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


# -------------------------------------------------------------------------------------------------------------- optimizers


def step_once(accumulator, model, *optimizers, back=by_backward):
    back(accumulator, sums_of(model, *MICRO_BATCHES[0]))
    accumulator.finish()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_of_others_too_is_warned_of_once():
    model, other = TinyLM(), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([*model.parameters(), other], lr=0.1)
    accumulator = Accumulator(model)
    step_once(accumulator, model, optimizer)  # the other has no gradient, and is not stepped
    other.grad = torch.ones(3)
    with pytest.warns(UserWarning, match=r"AdamW.step: .* got 1 others with a gradient beside 5") as seen:
        step_once(accumulator, model, optimizer)
    assert len(seen) == 1
    other.grad = torch.ones(3)
    step_once(accumulator, model, optimizer)  # once


def test_optimizers_that_no_warning_is_due_to():
    model, other = TinyLM(), nn.Parameter(torch.zeros(3))
    accumulator = Accumulator(model)
    strangers = torch.optim.SGD([other], lr=0.1)
    for _ in range(2):
        other.grad = torch.ones(3)
        accumulator.backward(sums_of(model, *MICRO_BATCHES[0]))
        strangers.step()  # in mid-window
        strangers.zero_grad()
        accumulator.finish()
        for optimizer in parts(model):
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_of_two_accumulators_is_not_warned_of():
    model = TinyLM()
    first, second = Accumulator(model.embed), Accumulator([*model.hidden.parameters(), *model.head.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        sums = sums_of(model, *MICRO_BATCHES[0])
        (first.loss(sums) * 0.5 + second.loss(sums) * 0.5).backward()
        first.finish()
        second.finish()
        optimizer.step()
        optimizer.zero_grad()


# -------------------------------------------------------------------------------------------------------------------- cost


class Many(nn.Module):
    """1000 tensors in 751 modules."""

    def __init__(self):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(250))


def test_a_parameter_is_found_once_and_in_the_order_of_parameters():
    model = Many()
    model.again = model.blocks[3]
    model.nothing = None
    model.register_parameter("missing", None)
    model.blocks[5][0].weight = model.blocks[4][0].weight
    found, wanted = parameters_of(model), list(model.parameters())
    assert len(found) == len(wanted) and {id(p) for p in found} == {id(p) for p in wanted}
    assert found[0] is wanted[0]


@pytest.mark.slow("it takes times, which a busy machine spoils; what they are of is tested above")
def test_watching_a_thousand_gradients_takes_two_milliseconds():
    """All that a window of one micro-batch adds: at its beginning, its end, and in finish()."""
    model = Many()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    parameters = list(model.parameters())
    assert len(parameters) == 1000
    window = Window()
    best = math.inf
    for _ in range(100):
        window.written, window.before, window.running = {}, {}, set()
        start = time.perf_counter()
        window.before = marks(parameters, but=window.written)
        window.before = {}
        window.end_backward(parameters)
        window.refuse_changes("finish", is_finish=True)
        best = min(best, time.perf_counter() - start)
    assert len(window.written) == 1000
    assert best <= 2e-3
