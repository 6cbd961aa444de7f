"""linear_cross_entropy: values, gradients, what is never allocated, and every way of calling it."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import ACCUMULATED_GRADIENT, SUM, linear_gradient_bound
from torch.utils._python_dispatch import TorchDispatchMode

import accumloss
from accumloss import linear_causal_lm_loss, linear_cross_entropy, linear_plan, ops, reference
from accumloss.linear import compute
from accumloss.linear.plan import chunks
from accumloss.losses import Known, linear_causal_lm
from accumloss.options import LossOptions

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
N, H, V = 37, 24, 211
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.5}


def data(dtype=torch.float32, rows=N, hidden_size=H, vocab=V, ignored=0.3, seed=0, has_bias=True):
    """hidden (rows, H), weight (V, H), labels (rows,), bias (V,), all leaves that require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden_size, generator=generator, dtype=torch.float64) / hidden_size**0.5 * 2
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64) if has_bias else None
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    leaves = [t if t is None else t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    return leaves[0], leaves[1], labels, leaves[2]


def scratch_of(chunk_rows, dtype, vocab=V):
    """The budget that leaves just that many rows, beside the 64th that is the matrix products'."""
    return chunk_rows * vocab * dtype.itemsize * 64 // 63 + 1


def float64_of(hidden, weight, labels, bias, class_weight=None, factor=1.0, shift=0, **options):
    """The sums and the gradients, in float64."""
    leaves = [t if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = F.linear(*leaves)
    sums = reference.cross_entropy(logits, labels, class_weight, LossOptions(**options), shift=shift)
    wanted = [t for t in leaves if t is not None]
    return sums, torch.autograd.grad(sums[0] * factor, wanted)


def unfused(hidden, weight, labels, bias, class_weight=None, factor=1.0, **options):
    logits = F.linear(hidden, weight, bias)
    sums = accumloss.cross_entropy(logits, labels, weight=class_weight, **options)
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    return torch.autograd.grad(sums.loss_sum * factor, wanted)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def check_against_float64(dtype, max_scratch_bytes, factor=0.01, class_weight=None, has_bias=True, seed=0, **options):
    hidden, weight, labels, bias = data(dtype, seed=seed, has_bias=has_bias)
    wanted_sums, wanted = float64_of(hidden, weight, labels, bias, class_weight, factor, **options)
    sums = linear_cross_entropy(
        hidden, weight, labels, bias=bias, class_weight=class_weight, metrics=True, max_scratch_bytes=max_scratch_bytes,
        **options,
    )  # fmt: skip
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    got = torch.autograd.grad(sums.loss_sum * factor, leaves)
    stock = unfused(hidden, weight, labels, bias, class_weight, factor, **options)
    assert int(sums.num_items) == int(wanted_sums[1])
    unit = torch.finfo(dtype).eps
    logits_error = (
        unit * 8 * F.linear(*[t if t is None else t.detach().double() for t in (hidden, weight, bias)]).abs().max()
    )
    assert abs(sums.loss_sum.item() - wanted_sums[0].item()) <= logits_error * max(int(sums.num_items), 1)
    for name, a, b, want in zip(("hidden", "weight", "bias"), got, stock, wanted, strict=False):
        assert a.dtype == dtype
        plan = linear_plan(int(sums.num_items), H, V, dtype, gathered=True, max_scratch_bytes=max_scratch_bytes)
        is_rounded = name == "weight" and plan.accumulator == dtype and not plan.parked_rows
        roundings = plan.num_chunks if is_rounded and plan.num_chunks > 1 else 0
        assert relative(a, want) <= linear_gradient_bound(relative(b, want), dtype, roundings), name
    return sums, got


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_matches_float64_as_closely_as_the_logits_path(dtype, chunk_rows):
    check_against_float64(dtype, scratch_of(chunk_rows, dtype))


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.2}, {"z_loss": 1e-2}, {"softcap": 5.0}, {"logit_scale": 0.25}, ALL, {"shift": 1}],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_linear_options(dtype, options):
    check_against_float64(dtype, scratch_of(11, dtype), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_class_weights_and_no_bias(dtype):
    check_against_float64(dtype, scratch_of(11, dtype), class_weight=torch.linspace(0.5, 2, V), has_bias=False)


def test_linear_accumulators():
    """Each chunk costs a rounding where the weight's gradient is summed up in bf16; the budget decides."""
    dtype, rows = torch.bfloat16, 1024
    hidden, weight, labels, _ = data(dtype, rows, has_bias=False)
    _, (_, wanted) = float64_of(hidden, weight, labels, None)
    errors = {}
    for name, chunk_rows, extra in (("one chunk", rows, 0), ("bf16", 128, 0), ("fp32", 256, 4 * V * H)):
        budget = scratch_of(chunk_rows, dtype) + extra * 64 // 63
        plan = linear_plan(rows, H, V, dtype, max_scratch_bytes=budget)
        expected = {"one chunk": (1, dtype), "bf16": (8, dtype), "fp32": (4, torch.float32)}[name]
        assert (plan.num_chunks, plan.accumulator) == expected
        loss = linear_cross_entropy(hidden, weight, labels, max_scratch_bytes=budget).loss_sum
        errors[name] = relative(torch.autograd.grad(loss, weight)[0], wanted)
    (stock,) = unfused(hidden, weight, labels, None)[1:]
    for name, error in errors.items():
        roundings = 8 if name == "bf16" else 0
        assert error <= linear_gradient_bound(relative(stock, wanted), dtype, roundings), errors


@pytest.mark.parametrize("ignored", [0, 0.2])
@pytest.mark.parametrize("rows, budget_rows", [(200, 128), (193, 150), (300, 190), (129, 100), (256, 128), (300, 175)])
def test_linear_parked_rows_make_the_gradient_of_one_chunk(rows, budget_rows, ignored):
    """Bit for bit: the same product over all rows, whatever lay in the gradient's memory before."""
    dtype, hidden_size, vocab = torch.bfloat16, 128, 3001
    hidden, weight, labels, bias = data(dtype, rows, hidden_size, vocab, ignored=ignored)
    valid = compute.valid_rows(labels, vocab, -100, None)[0]
    kept = rows if valid is None else len(valid)
    budget = scratch_of(budget_rows, dtype, vocab) + (kept + budget_rows) * hidden_size * 2 * (kept < rows)
    plan = linear_plan(kept, hidden_size, vocab, dtype, gathered=kept < rows, max_scratch_bytes=budget)
    if kept > budget_rows:
        assert 0 < plan.parked_rows <= hidden_size and plan.num_chunks >= 2
    assert plan.block_classes and plan.scratch_bytes <= budget
    if kept == rows:  # the last chunk's gradient of the hidden states has the memory where the budget has none
        assert plan.has_buffer != ((rows, budget_rows) in ((256, 128), (300, 175)))
    leaves = (hidden, weight, bias)
    results = []
    for limit in (budget, 2**30):
        sums = linear_cross_entropy(hidden, weight, labels, bias=bias, max_scratch_bytes=limit)
        results.append((sums.loss_sum, *torch.autograd.grad(sums.loss_sum / 7, leaves)))
    for name, got, want in zip(("loss", "hidden", "weight", "bias"), *results, strict=True):
        assert relative(got, want.double()) <= (1e-6 if name in ("loss", "bias") else 2.0**-12), name


PLANS = [
    (rows, *size, dtype, budget, weight_grad, hidden_grad, gathered)
    for rows in (0, 1, 100, 1100, 2048, 8192)
    for size in ((768, 50257), (2048, 32000), (1024, 128256), (4096, 128256), (64, 300))
    for dtype in DTYPES
    for budget in (2**22, 2**28, 2**32)
    for weight_grad, hidden_grad in ((True, True), (True, False), (False, True))
    for gathered in (False, True)
]


def test_linear_plan_keeps_to_the_budget():
    kinds = set()
    for rows, hidden_size, vocab, dtype, budget, weight_grad, hidden_grad, gathered in PLANS:
        plan = linear_plan(
            rows, hidden_size, vocab, dtype, weight_grad=weight_grad, hidden_grad=hidden_grad, gathered=gathered,
            max_scratch_bytes=budget,
        )  # fmt: skip
        item = dtype.itemsize
        assert plan.chunk_rows >= 1
        parts = list(chunks(rows, plan))
        assert len(parts) == plan.num_chunks
        assert sum(part.stop - part.start for part in parts) == rows
        copied = rows if plan.block_classes else plan.chunk_rows  # rows of hidden states
        copied = hidden_size * item * (copied + hidden_grad * plan.chunk_rows) * gathered
        accumulator = (plan.accumulator not in (None, dtype)) * 4 * hidden_size * vocab
        buffer = plan.has_buffer * rows * plan.block_classes * item
        assert plan.scratch_bytes == plan.chunk_rows * vocab * item + copied + accumulator + buffer
        if not (weight_grad and dtype == torch.float16):
            assert plan.scratch_bytes <= budget - budget // 64
        if plan.block_classes:
            assert dtype == torch.bfloat16 and plan.parked_rows <= hidden_size and buffer <= 2**24
            last = rows - plan.parked_rows
            assert plan.has_buffer or (hidden_grad and last * hidden_size >= rows * plan.block_classes)
        else:
            assert plan.parked_rows == 0 and not plan.has_buffer
        kinds.add((plan.block_classes > 0, plan.has_buffer, plan.parked_rows > 0, accumulator > 0))
    assert {(True, True, True, False), (True, False, True, False), (True, True, False, False)} <= kinds
    assert {(False, False, False, False), (False, False, False, True)} <= kinds
    with pytest.raises(ValueError, match="linear_plan: expected rows and free_bytes >= 0"):
        linear_plan(-1, 1, 1)


class Largest(TorchDispatchMode):
    """The numbers of elements of all that an operation returns, and the first dimensions of the matrix products."""

    def __init__(self):
        super().__init__()
        self.sizes, self.products = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not any(out.alias_info is not None for out in function._schema.returns):  # a view holds nothing
            flat = result if isinstance(result, (tuple, list)) else [result]
            self.sizes += [t.numel() for t in flat if isinstance(t, torch.Tensor)]
        if function in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm.out):
            self.products.append([tuple(t.shape) for t in args if isinstance(t, torch.Tensor)])
        return result


def test_linear_never_holds_the_logits():
    hidden, weight, labels, bias = data(rows=512, hidden_size=4)
    with Largest() as seen:
        loss = linear_causal_lm_loss(
            hidden[None], weight, labels[None], 100, bias=bias, max_scratch_bytes=scratch_of(32, torch.float32)
        )
        loss.backward()
    assert max(seen.sizes) <= max(32 * V, 512 * 4)
    with Largest() as seen:
        F.linear(hidden, weight, bias)
    assert max(seen.sizes) == 512 * V  # what the test would see


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_linear_frozen_parts_cost_nothing(frozen):
    hidden, weight, labels, _ = data(rows=40, hidden_size=200, vocab=150, has_bias=False)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    with Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    assert len(seen.products) == {"both": 1}.get(frozen, 2)
    assert (150 * 200 in seen.sizes) == (frozen == "hidden")
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    assert (hidden.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "hidden")


def test_linear_drops_ignored_rows_before_the_products():
    hidden, weight, labels, _ = data(rows=100, has_bias=False, ignored=0.5)
    kept = int((labels != -100).sum())
    assert 40 < kept < 60
    with Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, labels).loss_sum
    logits, grad_weight, grad_hidden = seen.products
    assert (logits[0][0], grad_weight[1][0], grad_hidden[0][0]) == (64, 64, 64) and kept <= 64
    loss.backward()
    assert hidden.grad[labels == -100].count_nonzero() == 0
    assert (hidden.grad[labels != -100] != 0).all()


@pytest.mark.parametrize("labels", [torch.full((N,), -100), torch.zeros(0, dtype=torch.int64)], ids=["ignored", "none"])
def test_linear_without_items_is_zero(labels):
    hidden, weight, _, bias = data(rows=len(labels))
    for loss in (
        linear_cross_entropy(hidden, weight, labels, bias=bias).loss_sum,
        linear_causal_lm_loss(hidden[None], weight, labels[None], bias=bias),
        linear_causal_lm_loss(hidden[None], weight, labels[None], 0, bias=bias),
    ):
        assert loss.item() == 0
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        assert all(grad.count_nonzero() == 0 for grad in grads)


def test_linear_causal_lm_loss_is_the_loss_of_the_logits():
    hidden, weight, labels, bias = data(torch.float64, rows=60)
    hidden, labels = hidden.view(4, 15, H), labels.view(4, 15)
    for kwargs in ({}, {"num_items_in_batch": 33}, {"num_items_in_batch": torch.tensor(33), "z_loss": 1e-3}):
        got = linear_causal_lm_loss(hidden, weight, labels, bias=bias, **kwargs)
        want = accumloss.causal_lm_loss(F.linear(hidden, weight, bias), labels, **kwargs)
        assert got.dtype == want.dtype and got.item() == pytest.approx(want.item(), rel=1e-12)
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        again = linear_causal_lm_loss(hidden, weight, None, shift_labels=shifted, bias=bias, **kwargs)
        assert again.item() == got.item()
        for a, b in zip(
            torch.autograd.grad(got, (hidden, weight, bias)),
            torch.autograd.grad(want, (hidden, weight, bias)),
            strict=True,
        ):
            assert relative(a, b) < 1e-12
    weighted = torch.linspace(0.5, 2, V)
    got = linear_causal_lm_loss(hidden, weight, labels, bias=bias, class_weight=weighted)
    want = accumloss.causal_lm_loss(F.linear(hidden, weight, bias), labels, weight=weighted)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("splits", [[10] * 6, [1, 5, 54], [30, 0, 30]], ids=str)
def test_linear_micro_batches_equal_the_batch(dtype, splits):
    hidden, weight, labels, _ = data(dtype, rows=60, has_bias=False)
    labels[10:16] = -100
    num_items = int((labels != -100).sum())
    _, wanted = float64_of(hidden, weight, labels, None, factor=1 / num_items)
    total = 0.0
    for h, y in zip(hidden.split(splits), labels.split(splits), strict=True):
        sums = linear_cross_entropy(h, weight, y, max_scratch_bytes=scratch_of(16, dtype))
        (sums.loss_sum / num_items).backward()
        total += sums.loss_sum.item()
    exact = linear_cross_entropy(hidden, weight, labels).loss_sum.item()
    assert total == pytest.approx(exact, rel=SUM)
    one = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss_sum / num_items, (hidden, weight))
    for got, whole, want in zip((hidden.grad, weight.grad), one, wanted, strict=True):
        assert relative(got, want) <= relative(whole, want) + ACCUMULATED_GRADIENT[dtype]


def test_linear_tied_embedding():
    _, weight, labels, _ = data(torch.float64, has_bias=False)
    tokens = torch.arange(N) % V

    def gradient(loss_of):
        hidden = torch.tanh(F.embedding(tokens, weight))
        return torch.autograd.grad(loss_of(hidden), weight)[0]

    got = gradient(lambda hidden: linear_cross_entropy(hidden, weight, labels).loss_sum)
    want = gradient(lambda hidden: accumloss.cross_entropy(F.linear(hidden, weight), labels).loss_sum)
    assert relative(got, want) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_backward_may_be_repeated(dtype):
    hidden, weight, labels, bias = data(dtype)
    loss = linear_causal_lm_loss(hidden[None], weight, labels[None], 20, bias=bias)
    first = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    copies = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True)
    third = torch.autograd.grad(3 * loss, (hidden, weight, bias))
    for a, b, c in zip(copies, second, third, strict=True):
        assert torch.equal(a, b)
        assert relative(c, 3 * a.double()) <= torch.finfo(dtype).eps


def test_linear_gradcheck_and_gradgradcheck():
    hidden, weight, labels, bias = data(torch.float64, rows=6, hidden_size=3, vocab=5)

    def function(hidden, weight, bias):
        return linear_cross_entropy(hidden, weight, labels, bias=bias, z_loss=0.1, max_scratch_bytes=80).loss_sum

    def op(hidden, weight, bias):
        return torch.ops.accumloss.linear_cross_entropy(hidden, weight, labels, bias, z_loss=0.1)[0]

    for call in (function, op):
        assert torch.autograd.gradcheck(call, (hidden, weight, bias))
        assert torch.autograd.gradgradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_opcheck(dtype):
    hidden, weight, labels, bias = data(dtype)
    op = torch.ops.accumloss.linear_cross_entropy_with_grad.default
    for needs in ([True, True, True], [True, False, False], [False, False, False]):
        options = {"needs": needs, "shift": 0, **LossOptions().as_kwargs(), "metrics": True}
        torch.library.opcheck(op, (hidden, weight, labels, bias, None), options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_compiles_whole(dtype):
    hidden, weight, labels, bias = data(dtype, rows=40)

    def step(hidden, weight, bias):
        return linear_causal_lm_loss(
            torch.tanh(hidden).view(4, 10, H), weight, labels.view(4, 10), 20, bias=bias, max_scratch_bytes=8 * V * 4
        )

    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        loss = call(hidden, weight, bias)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight, bias))))
    eager, compiled = results
    assert eager[0].item() == pytest.approx(compiled[0].item(), rel=SUM)
    for a, b in zip(eager[1:], compiled[1:], strict=True):
        assert a.dtype == b.dtype
        assert relative(b, a.double()) <= linear_gradient_bound(
            torch.finfo(dtype).eps, dtype
        )  # scaled after, not before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_under_autocast(dtype):
    hidden, weight, labels, bias = data()
    with torch.autocast("cpu", dtype):
        sums = linear_cross_entropy(hidden, weight, labels, bias=bias, max_scratch_bytes=scratch_of(16, dtype))
        by_op = torch.ops.accumloss.linear_cross_entropy(hidden, weight, labels, bias)[0]
    _, wanted = float64_of(hidden, weight, labels, bias)
    for loss in (sums.loss_sum, by_op):
        assert loss.dtype == torch.float32
        for got, want in zip(torch.autograd.grad(loss, (hidden, weight, bias)), wanted, strict=True):
            assert got.dtype == torch.float32
            assert relative(got, want) < 16 * torch.finfo(dtype).eps


def test_linear_fp16_gradient_survives_many_items_and_a_scaler():
    hidden, weight, labels, _ = data(torch.float16, rows=4000, hidden_size=4, vocab=11, has_bias=False, ignored=0)
    with torch.no_grad():
        hidden.add_(40)
        labels.fill_(3)
    _, (_, wanted) = float64_of(hidden, weight, labels, None, factor=2.0**8 / 1e6)
    loss = linear_causal_lm_loss(hidden[None], weight, None, 1_000_000, shift_labels=labels[None])
    (got,) = torch.autograd.grad(2.0**8 * loss, weight)
    assert torch.isfinite(got).all()
    assert relative(got, wanted) < 64 * torch.finfo(torch.float16).eps


def test_linear_num_valid():
    hidden, weight, labels, _ = data(has_bias=False)
    count = int((labels != -100).sum())
    want = linear_cross_entropy(hidden, weight, labels).loss_sum
    for enough in (count, N, 10 * N):
        assert torch.equal(linear_cross_entropy(hidden, weight, labels, num_valid=enough).loss_sum, want)
    with pytest.raises(ValueError, match=f"num_valid of at least {count}.*got {count - 1}"):
        linear_cross_entropy(hidden, weight, labels, num_valid=count - 1)


def test_linear_rows_are_dropped_without_being_counted_where_that_would_wait(monkeypatch):
    """What a GPU does, by labels that say they are on one."""
    _, _, labels, _ = data(rows=300)
    count = int((labels != -100).sum())
    assert count - 1 > 128 and count + 3 <= 256

    class OnGpu(torch.Tensor):
        device = torch.device("cuda:0")

    for given in (count, count + 3):
        rows, is_enough = compute.valid_rows(labels.as_subclass(OnGpu), V, -100, given)
        rows = rows.as_subclass(torch.Tensor)
        assert is_enough and len(rows) == 256  # a multiple of 64
        assert rows[:count].tolist() == (labels != -100).nonzero().squeeze(1).tolist()
    assert not compute.valid_rows(labels.as_subclass(OnGpu), V, -100, count - 1)[1]
    assert compute.valid_rows(labels.as_subclass(OnGpu), V, -100, 290)[0] is None  # no 64 less than all
    assert compute.valid_rows(labels.as_subclass(OnGpu), V, -100, 10**9) == (None, None)
    assert compute.valid_rows(labels.as_subclass(OnGpu), V, -100, None) == (None, None)


def test_linear_loss_gives_the_sums_that_it_was_made_of():
    hidden, weight, labels, _ = data(has_bias=False)
    options = LossOptions()
    for metrics in (False, True):
        given = Known(torch.tensor(20.0), 0.5, metrics)
        loss, sums = linear_causal_lm(hidden[None], weight, None, labels[None], given, options)
        assert (sums is not None) == metrics
    want = accumloss.cross_entropy(F.linear(hidden, weight), labels, metrics=True)
    assert loss.item() == pytest.approx(want.loss_sum.item() / 20, rel=SUM)
    assert int(sums.num_correct) == int(want.num_correct)
    assert sums.entropy_sum.item() == pytest.approx(want.entropy_sum.item(), rel=SUM)
    (grad,) = torch.autograd.grad(2 * loss, hidden)
    (expected,) = torch.autograd.grad(want.loss_sum / 10, hidden)
    assert relative(grad, expected.double()) < ACCUMULATED_GRADIENT[torch.float32]


class Sharded(torch.Tensor):
    placements = ()


def error_cases():
    hidden, weight, labels, bias = (t.detach() for t in data())
    bad = labels.clone()
    bad[5] = V
    yield "H differs", (hidden[:, 1:], weight, labels), {}, RuntimeError, r"hidden \(\.\.\., H\) and weight \(V, H\)"
    yield "labels differ", (hidden, weight, labels[1:]), {}, RuntimeError, "labels of shape"
    yield "bias differs", (hidden, weight, labels), {"bias": bias[1:]}, RuntimeError, "bias of shape"
    yield "float labels", (hidden, weight, labels.float()), {}, RuntimeError, "int64 or int32 labels"
    yield "dtypes differ", (hidden.bfloat16(), weight, labels), {}, RuntimeError, "weight of hidden's dtype"
    yield (
        "devices differ",
        (hidden, weight.to("meta"), labels),
        {},
        RuntimeError,
        "weight on hidden's device cpu, got meta",
    )
    yield "integers", (hidden.int(), weight.int(), labels), {}, RuntimeError, "bfloat16, float16"
    yield "label too large", (hidden, weight, bad), {}, IndexError, f"got {V} for row 5 of {N}"
    yield "sharded", (hidden, weight.as_subclass(Sharded), labels), {}, RuntimeError, "whole weight, got a sharded"
    yield "shift", (hidden, weight, labels), {"shift": -1}, ValueError, "shift >= 0"
    yield "no budget", (hidden, weight, labels), {"max_scratch_bytes": 0}, ValueError, "max_scratch_bytes >= 1"
    yield "option", (hidden, weight, labels), {"softcap": -1.0}, ValueError, "softcap"


@pytest.mark.parametrize("inputs, kwargs, error, message", [pytest.param(*c[1:], id=c[0]) for c in error_cases()])
def test_linear_bad_input(inputs, kwargs, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*inputs, **kwargs)


def test_linear_causal_lm_loss_needs_labels():
    hidden, weight, _, _ = data()
    with pytest.raises(ValueError, match="expected labels"):
        linear_causal_lm_loss(hidden[None], weight, None)


@pytest.mark.parametrize("micro_batches", [1, 3, 4, 7])
def test_linear_expected_gradient_is_not_scaled_again(micro_batches, monkeypatch):
    """Trainer's 1/k, which is no binary fraction for every k: what was written for it is handed out as it is."""
    factors = []
    monkeypatch.setattr(ops, "scale_", lambda values, factor: factors.append(factor.item()))
    hidden, weight, labels, _ = data(torch.bfloat16, has_bias=False)
    for items in range(1, 40):
        given = Known(torch.tensor(float(items)), expected_grad=1 / micro_batches)
        (
            linear_causal_lm(hidden[None], weight, labels[None], None, given, LossOptions()).loss / micro_batches
        ).backward()
    assert len(factors) == 2 * 39 and set(factors) == {1.0}


def test_linear_mean_of_a_call_is_not_scaled_again(monkeypatch):
    """Its divisor is counted before the gradients are written, shift and all."""
    factors = []
    hidden, weight, labels, _ = data(has_bias=False)
    (wanted,) = torch.autograd.grad(F.cross_entropy(F.linear(hidden[:-1], weight), labels[1:]), weight)
    monkeypatch.setattr(ops, "scale_", lambda values, factor: factors.append(factor.item()))
    linear_causal_lm_loss(hidden[None], weight, labels[None]).backward()
    assert factors == [1.0, 1.0]
    assert relative(weight.grad, wanted) <= ACCUMULATED_GRADIENT[torch.float32]
