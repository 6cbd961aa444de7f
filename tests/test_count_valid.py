"""count_valid: what it counts, and that nothing waits before a head asks. The GPU is a fake that records what it is told."""

import contextlib

import pytest
import recorded_gpu
import torch

from accumloss import ValidCount, count_valid, linear_causal_lm_loss, linear_cross_entropy
from accumloss.linear import count_each
from accumloss.linear import device as devices

H, V = 8, 64


@pytest.fixture
def gpu(monkeypatch):
    return recorded_gpu.install(monkeypatch)


def window(sizes=((2, 9), (3, 5), (1, 12))):
    """Micro-batches of hidden states (B, T, H) and labels (B, T), a third of which count."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for B, T in sizes:
        labels = torch.randint(0, V, (B, T), generator=generator)
        labels[torch.rand(B, T, generator=generator) < 0.67] = -100
        found.append((torch.randn(B, T, H, generator=generator).requires_grad_(), labels))
    return found


WEIGHT = torch.randn(V, H, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (0, 5), (4, 1)])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_count_valid_counts_what_the_loss_does(shape, dtype, ignore_index):
    labels = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    labels[labels == 5] = ignore_index
    for shift in (0, 1, 2) if len(shape) > 1 else (0,):
        count = count_valid(labels, ignore_index=ignore_index, shift=shift)
        hidden = torch.zeros(*shape, H)
        sums = linear_cross_entropy(hidden, WEIGHT, labels, ignore_index=ignore_index, shift=shift, num_valid=count)
        assert int(count) == int(sums.num_items) == int((labels[..., shift:] != ignore_index).sum())
        assert isinstance(count, ValidCount) and count.is_known and repr(count) == f"ValidCount({int(count)})"


def test_counts_are_of_the_labels_as_they_were():
    labels = torch.tensor([1, -100, 2])
    count = count_valid(labels)
    labels.fill_(-100)
    assert int(count) == int(count) == 2
    assert [10, 20, 30][count] == 30  # an index


def test_bad_labels_are_refused():
    for bad, got in ((torch.zeros(3), "torch.float32"), ([1, 2], "a list"), (None, "a NoneType")):
        with pytest.raises(TypeError, match=rf"count_valid: expected labels \(..., T\) of int64 or int32, got {got}"):
            count_valid(bad)
    for shift in (-1, 1.0, True):
        with pytest.raises(ValueError, match="count_valid: expected shift >= 0, an int"):
            count_valid(torch.zeros(3, dtype=torch.int64), shift=shift)
    with pytest.raises(ValueError, match="labels .* for it, got 1"):
        count_valid(torch.tensor(3), shift=1)


def test_a_head_asks_when_its_forward_is_queued(gpu):
    """The order of a loop: all counts of a window, then forward and question in turn; one wait for each count."""
    batches = window()
    counts = [count_valid(labels, shift=1) for _, labels in batches]
    assert gpu.order == ["count 1"] * 3
    assert repr(counts[0]) == "ValidCount(not known yet)" and not counts[0].is_known
    gpu.order.clear()
    wanted = []
    for (hidden, labels), count in zip(batches, counts, strict=True):
        gpu.order.append("forward")
        linear_causal_lm_loss(hidden, WEIGHT, labels, 20, num_valid=count).backward()
        wanted += ["forward", "wait", f"head {(labels[:, 1:] != -100).sum()}"]
    assert gpu.order == wanted
    # asked again: by a second loss of the step, or a recomputed forward
    gpu.order.clear()
    linear_causal_lm_loss(batches[0][0], WEIGHT, batches[0][1], 20, num_valid=counts[0])
    assert gpu.order == wanted[2:3]


def test_a_count_that_is_there_is_no_wait_for_who_looks_first(gpu):
    count = count_valid(torch.tensor([1, -100]))
    gpu.is_done = True
    assert count.is_known and gpu.order == ["count 1"]


def test_counts_of_a_window_are_one_copy(gpu):
    labels = [labels for _, labels in window()]
    counts = count_each(labels)
    assert gpu.order == ["count 3"]
    assert [int(count) for count in counts] == [int((each != -100).sum()) for each in labels]
    assert gpu.order == ["count 3", "wait"]
    assert count_each([]) == []


@pytest.mark.parametrize("frozen", ["nothing", "head", "all"])
def test_gradients_are_those_without_a_count(gpu, frozen):
    hidden, labels = window(((4, 30),))[0]
    weight = WEIGHT.clone().requires_grad_(frozen == "nothing")
    results = []
    for count in (None, count_valid(labels), count_valid(labels, shift=1)):
        gpu.order.clear()
        with torch.set_grad_enabled(frozen != "all"):
            sums = linear_cross_entropy(hidden, weight, labels, shift=1, metrics=True, num_valid=count)
        wanted = [t for t in (hidden, weight) if t.requires_grad and sums.loss_sum.requires_grad]
        grads = torch.autograd.grad(sums.loss_sum, wanted) if wanted else ()
        results.append((sums, grads, gpu.order[-1]))
    (plain, grads, of_all), *counted = results
    assert of_all == "head 120"
    for (sums, got, rows), number in zip(counted, ((labels != -100).sum(), (labels[:, 1:] != -100).sum()), strict=True):
        assert rows == f"head {number}"
        assert torch.equal(sums.num_items, plain.num_items) and torch.equal(sums.num_correct, plain.num_correct)
        torch.testing.assert_close(sums.loss_sum, plain.loss_sum)
        for a, b in zip(got, grads, strict=True):
            torch.testing.assert_close(a, b)


def test_a_count_of_other_labels_is_no_silent_loss(gpu):
    """Fewer than there are: NaN where the labels cannot be looked at."""
    hidden, labels = window()[0]
    assert linear_cross_entropy(hidden, WEIGHT, labels, num_valid=count_valid(labels[:1])).loss_sum.isnan()


def test_a_count_is_not_asked_for_inside_of_a_graph(gpu, monkeypatch):
    hidden, labels = window()[0]
    counts = count_valid(labels), count_valid(labels)
    number = int(counts[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError,
        match=r"^count_valid\(\.\.\.\): expected the count to be asked for before a CUDA graph is captured",
    ):
        linear_cross_entropy(hidden, WEIGHT, labels, num_valid=counts[1])
    assert int(linear_cross_entropy(hidden, WEIGHT, labels, num_valid=counts[0]).num_items) == number


def test_compiled_code_takes_a_number():
    """A whole graph refuses to ask; one that may break goes on in eager mode."""
    hidden, labels = window()[0]
    count = count_valid(labels)

    def call(count):
        return linear_cross_entropy(hidden, WEIGHT, labels, num_valid=count).num_items

    whole = torch.compile(call, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="expected an int for num_valid inside of torch.compile, got a ValidCount"):
        whole(count)
    assert int(whole(int(count))) == int(torch.compile(call, backend="eager")(count)) == int(count)


def test_what_is_queued_for_a_count(monkeypatch):
    """On CUDA: pinned memory, a copy that nobody waits for, and an event behind it."""
    order = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    class Pinned:
        def copy_(self, counts, non_blocking=False):
            order.append(("copy", type(counts), non_blocking))

    class Event:
        def record(self):
            order.append("record")

    def empty(shape, *, dtype, pin_memory):
        order.append(("pinned", tuple(shape), dtype, pin_memory))
        return Pinned()

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    host, event = devices.to_host(torch.zeros(3, dtype=torch.int64).as_subclass(OnGpu))
    assert order == [("pinned", (3,), torch.int64, True), ("copy", OnGpu, True), "record"]
    assert isinstance(host, Pinned) and isinstance(event, Event)
