"""What the ops owe PyTorch: opcheck, gradcheck, compile, functorch, autocast, versions, in-place rules."""

from contextlib import nullcontext

import pytest
import torch
from cases import DTYPES, Case, sample_cases
from oracle import expected
from tolerances import assert_within
from torch.fx.experimental.proxy_tensor import make_fx

import accumloss

ops = torch.ops.accumloss

# Cases whose dispatcher behaviour differs; the others differ only in numbers.
CONTRACT = {
    "V=33", "no leading dimension", "no rows", "all ignored", "(2, 3, 5, V)", "int32 labels", "shift",
    "time steps cut off", "transposed classes: copied", "expanded rows", "class weights, smoothing", "everything",
}  # fmt: skip


OTHER_DTYPE = pytest.mark.slow("the fast tier has every case in one dtype, and every dtype")

SECOND = pytest.mark.slow("three seconds a case, traced through the reference; the fast tier has one of each kind")


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        is_opcheck = metafunc.function is not test_gradcheck_and_gradgradcheck
        is_second = metafunc.function is test_opcheck_of_the_second_derivative
        parameters = []
        for dtype in DTYPES if is_opcheck else (torch.float64,):
            cases = [case for case in sample_cases(dtype, large=False) if case.name in CONTRACT]
            for i, case in enumerate(cases):
                marks = OTHER_DTYPE if is_opcheck and DTYPES[i % len(DTYPES)] != dtype else ()
                if is_second and case.name not in ("shift", "everything"):
                    marks = SECOND
                name = f"{str(dtype).removeprefix('torch.')}-{case.name}"
                parameters.append(pytest.param(case, id=name, marks=marks))
        metafunc.parametrize("case", parameters)


def test_opcheck(case):
    """Every op on every kind of input: schema, fake kernel, autograd registration, static and dynamic shapes."""
    check = torch.library.opcheck
    acc = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    g = torch.tensor(0.5, dtype=acc)
    logits, labels, weight, kwargs = case.logits, case.labels, case.weight, case.kwargs
    leaf = logits.detach().requires_grad_()
    check(ops.cross_entropy.default, (leaf, labels, weight), {**kwargs, "metrics": True})
    _, _, _, lse, _, _, nll = ops.cross_entropy(logits, labels, weight, **kwargs)
    check(ops.cross_entropy_backward.default, (g, logits, labels, lse, nll, weight), kwargs)
    check(ops.cross_entropy_with_grad.default, (g, logits, labels, weight), kwargs)
    mean = {name: value for name, value in kwargs.items() if name != "metrics"}
    check(ops.mean_with_grad.default, (g, logits, labels, weight, 0.25), mean)
    dense = logits.clone(memory_format=torch.contiguous_format)
    check(ops.cross_entropy_backward_.default, (g, dense.clone(), labels, lse, nll, weight), kwargs)
    check(ops.cross_entropy_with_grad_.default, (g, dense.clone(), labels, weight), kwargs)
    totals = torch.zeros(5, dtype=torch.float64)
    check(ops.add_cross_entropy_.default, (totals, g, dense.clone(), labels, weight), kwargs)
    check(ops.scale_.default, (dense.clone(), g))
    shard = {name: value for name, value in kwargs.items() if name not in ("shift", "metrics")}
    shard |= {"class_offset": 0, "vocab_size": logits.shape[-1] + 1}  # with all labels: opcheck takes no NaN for equal
    padded = weight if weight is None else torch.cat([weight, weight[:1]])
    check(ops.cross_entropy_shard.default, (logits, labels, padded), shard)
    check(ops.cross_entropy_shard_backward.default, (g, logits, labels, lse, nll, padded), shard)
    check(ops.cross_entropy_shard_backward_.default, (g, dense.clone(), labels, lse, nll, padded), shard)
    lm = {name: value for name, value in kwargs.items() if name != "shift"}
    check(ops.masked_lm.default, (leaf, labels, weight), lm)
    if logits.dim() > 1:
        check(ops.causal_lm.default, (leaf, labels, weight), lm)


def test_opcheck_of_the_second_derivative(case):
    """The backward's own formula, for logits that require grad."""
    leaf = case.logits.detach().requires_grad_()
    g = torch.tensor(0.5, dtype=torch.float64 if case.logits.dtype == torch.float64 else torch.float32)
    _, _, _, lse, _, _, nll = ops.cross_entropy(case.logits, case.labels, case.weight, **case.kwargs)
    arguments = (g, leaf, case.labels, lse, nll, case.weight)
    torch.library.opcheck(ops.cross_entropy_backward.default, arguments, case.kwargs)


def test_gradcheck_and_gradgradcheck(case):
    leaf = case.logits.detach().clone().requires_grad_()
    if leaf.numel() > 700:
        leaf = leaf[:1].detach().clone().requires_grad_()
        case = Case(case.name, leaf, case.labels[:1], case.weight, case.options, case.shift)

    def loss_sum(logits):
        return ops.cross_entropy(logits, case.labels, case.weight, **case.kwargs)[0]

    assert torch.autograd.gradcheck(loss_sum, (leaf,))
    if leaf.numel() and case.name != "no leading dimension":
        assert torch.autograd.gradgradcheck(loss_sum, (leaf,), fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compile_gives_the_eager_numbers(dtype):
    case = next(c for c in sample_cases(dtype, large=False) if c.name == "everything")

    def step(logits, labels, weight):
        loss_sum, num_items, *_ = ops.cross_entropy(logits, labels, weight, **case.kwargs)
        return loss_sum / num_items, num_items

    compiled = torch.compile(step, fullgraph=True)
    results = []
    for function in (step, compiled):
        leaf = case.logits.detach().requires_grad_()
        loss, num_items = function(leaf, case.labels, case.weight)
        loss.backward()
        results.append((loss.detach(), num_items, leaf.grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_compiled_functional_loss_matches_eager():
    """Under compile the gradient comes from the second op: the same to within the rounding that both are allowed."""
    case = next(c for c in sample_cases(torch.bfloat16, large=False) if c.name == "shift")

    def loss(logits):
        return accumloss.causal_lm_loss(logits, case.labels, num_items_in_batch=11)

    wanted = expected(case, grad_loss_sum=1 / 11)
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = case.logits.detach().requires_grad_()
        value = function(leaf)
        value.backward()
        assert_within(value, wanted.sums[0] / 11, 1e-6 * wanted.sums[0] / 11, "loss")
        assert_within(leaf.grad, wanted.grad, wanted.grad_bound, "gradient")


def test_compile_handles_changing_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: ops.causal_lm(x, y), fullgraph=True, dynamic=True)
    for B, T in ((2, 5), (3, 8), (1, 2)):
        logits, labels = torch.randn(B, T, 17), torch.randint(0, 17, (B, T))
        assert torch.equal(compiled(logits, labels)[0], ops.causal_lm(logits, labels)[0])


def test_torch_func_is_refused_by_a_clear_error():
    labels = torch.tensor([1, 2])
    for function in (
        lambda x: ops.cross_entropy(x, labels)[0],
        lambda x: ops.masked_lm(x, labels)[0],
        lambda x: accumloss.masked_lm_loss(x, labels, num_items_in_batch=2),
        lambda x: accumloss.cross_entropy(x, labels).loss_sum,
    ):
        with pytest.raises(RuntimeError, match=r"expected no torch.func transform .* use torch.autograd.grad"):
            torch.func.grad(function)(torch.randn(2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_double_backward_is_right(dtype):
    """Also where the gradient was written in forward, with an incoming gradient that is itself differentiated."""
    data = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, -100])
    results = []
    for function in (
        lambda x: accumloss.masked_lm_loss(x, labels, num_items_in_batch=2),
        lambda x: torch.nn.functional.cross_entropy(x, labels, reduction="sum") / 2,
    ):
        leaf = data.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf) ** 2, leaf, create_graph=True)
        results.append((grad.detach(), *torch.autograd.grad(grad.square().sum(), leaf)))
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(*results, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_the_logits(dtype):
    logits = torch.randn(4, 33)
    labels = torch.arange(4)
    with torch.autocast("cpu", dtype=dtype):
        for given in (logits, logits.to(dtype)):
            leaf = given.detach().requires_grad_()
            loss_sum, _ = ops.masked_lm(leaf, labels)
            assert loss_sum.dtype == torch.float32
            assert torch.equal(loss_sum, ops.masked_lm(given, labels)[0])
            loss_sum.backward()
            assert leaf.grad.dtype == given.dtype


def test_gradient_is_skipped_without_requires_grad(monkeypatch):
    calls = []
    for name in ("mean_with_grad", "cross_entropy_with_grad", "cross_entropy_backward"):
        original = getattr(ops, name)

        def recorded(*args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(ops, name, recorded)
    labels = torch.tensor([1, 2])
    loss = accumloss.masked_lm_loss(torch.randn(2, 3), labels, num_items_in_batch=2)
    assert not loss.requires_grad
    with torch.no_grad():
        accumloss.masked_lm_loss(torch.randn(2, 3, requires_grad=True), labels, num_items_in_batch=2)
    assert calls == []
    accumloss.masked_lm_loss(torch.randn(2, 3, requires_grad=True), labels, num_items_in_batch=2)
    assert calls == ["mean_with_grad"]  # the recorder works


def test_outputs_are_fresh_and_only_the_loss_carries_a_gradient():
    leaf = torch.randn(2, 3, requires_grad=True)
    outputs = ops.cross_entropy(leaf, torch.tensor([1, 2]), metrics=True)
    assert [value.requires_grad for value in outputs] == [True] + [False] * 6
    assert len({value.untyped_storage().data_ptr() for value in outputs}) == 7
    assert all(outputs[i].shape == () for i in (0, 1, 2, 4, 5)) and outputs[3].shape == outputs[6].shape == (2,)
    loss_sum = outputs[0]
    loss_sum *= 3  # callers do
    loss_sum += 1
    loss_sum.backward()
    assert torch.isfinite(leaf.grad).all()


def test_causal_lm_and_masked_lm_are_cross_entropy():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    assert torch.equal(ops.causal_lm(logits, labels)[0], ops.cross_entropy(logits, labels, shift=1)[0])
    assert ops.causal_lm(logits, labels)[1].item() == 8
    assert torch.equal(ops.masked_lm(logits, labels)[0], ops.cross_entropy(logits, labels)[0])
    assert ops.masked_lm(logits, labels)[1].item() == 10


def test_what_is_traced_is_cross_entropy():
    """By whatever traces, real or fake tensors: an op that went past the dispatcher would be missing in the graph."""

    def nodes(graph):
        found = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        return [name for name in found if "accumloss" in name]

    class Losses(torch.nn.Module):
        def forward(self, x, y):
            return ops.masked_lm(x, y)[0] + ops.causal_lm(x, y)[0]

    x, y = torch.randn(4, 7, requires_grad=True), torch.tensor([1, 2, -100, 6])
    alone = ["accumloss.cross_entropy.default"] * 2
    for pre_dispatch in (False, True):
        for mode in ("real", "fake"):
            traced = make_fx(Losses(), tracing_mode=mode, pre_dispatch=pre_dispatch)(x, y)
            whole = ["accumloss.masked_lm.default", "accumloss.causal_lm.default"]
            assert nodes(traced.graph) in (alone, whole), (pre_dispatch, mode)
    exported = torch.export.export(Losses(), (x, y))
    assert nodes(exported.run_decompositions().graph) == alone


def test_a_recorded_backward_runs_under_compiled_autograd():
    """The autograd functions hand on what it knows them by."""
    labels = torch.tensor([1, 2])
    for function in (
        lambda x: ops.masked_lm(x, labels)[0],
        lambda x: accumloss.masked_lm_loss(x, labels, num_items_in_batch=2),
    ):
        found = []
        for compiles in (False, True):
            leaf = torch.arange(6.0).view(2, 3).requires_grad_()
            loss = function(leaf)
            with torch._dynamo.compiled_autograd._enable(lambda graph: graph) if compiles else nullcontext():
                loss.backward()
            found.append(leaf.grad)
        assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_with_grad_is_the_quotient(dtype):
    """To the bit what the sum, its gradient and torch's divisions give."""
    for case in sample_cases(dtype, large=False):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        for divisor in (torch.tensor(7.0, dtype=acc), torch.tensor(0.3, dtype=acc)):
            for expected_grad in (1.0, 1 / 3):
                factor = expected_grad / divisor
                loss_sum, *_, wanted = ops.cross_entropy_with_grad(
                    factor, case.logits, case.labels, case.weight, **case.kwargs
                )
                given = (divisor, case.logits, case.labels, case.weight, expected_grad)
                loss, grad = ops.mean_with_grad(*given, **case.kwargs)
                assert torch.equal(loss.nan_to_num(), (loss_sum / divisor).nan_to_num()), case.name
                assert torch.equal(grad.nan_to_num(), wanted.nan_to_num()), case.name


# Bad input: one case for each message -----------------------------------------------------------------------------------

X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


def error_cases():
    yield torch.zeros(()), Y, {}, RuntimeError, r"logits of shape \(..., V\), got a 0-dim tensor"
    yield X.long(), Y, {}, RuntimeError, "logits of dtype bfloat16, float16, float32 or float64, got Long"
    yield X[..., :0], Y, {}, RuntimeError, r"V >= 1, got \(2, 3, 0\)"
    yield X[0, 0], Y[0, 0], {"shift": 1}, RuntimeError, r"logits of shape \(..., T, V\) where shift > 0"
    yield X, Y.float(), {}, RuntimeError, "labels of dtype int64 or int32, got Float"
    yield X, Y[:1], {}, RuntimeError, r"labels of shape \(2, 3, 5\) without its last dimension, got \(1, 3\)"
    yield X, Y[0], {}, RuntimeError, r"got \(3,\); labels are class indices"
    yield X, Y, {"weight": torch.ones(4)}, RuntimeError, r"weight of shape \(V,\) = \(5,\), got \(4,\)"
    yield X, Y, {"weight": torch.ones(5).long()}, RuntimeError, "weight of a floating dtype, got Long"
    yield X, Y, {"shift": -1}, ValueError, "shift >= 0, got -1"
    yield X, Y, {"label_smoothing": 1.5}, ValueError, r"label_smoothing in \[0, 1\], got 1.5"
    yield X, Y, {"z_loss": -1.0}, ValueError, "finite z_loss >= 0, got -1"
    yield X, Y, {"softcap": float("inf")}, ValueError, "finite softcap >= 0 .* got inf"
    yield X, Y, {"logit_scale": 0.0}, ValueError, "finite logit_scale > 0, got 0"
    yield X, Y + 5, {}, IndexError, r"labels in \[0, 5\) or ignore_index -100, got 5 for row 0 of 6; check vocab_size"
    bad = Y.clone()
    bad[1, 2] = -1
    yield X, bad.int(), {}, IndexError, "got -1 for row 5 of 6"
    yield X, Y - 100, {"ignore_index": 0}, IndexError, "ignore_index 0, got -100 for row 0"


@pytest.mark.parametrize("logits,labels,kwargs,error,message", list(error_cases()))
def test_bad_input(logits, labels, kwargs, error, message):
    kwargs = dict(kwargs)
    weight = kwargs.pop("weight", None)
    with pytest.raises(error, match="cross_entropy: expected .*" + message):
        ops.cross_entropy(logits, labels, weight, **kwargs)
    acc = torch.float32
    with pytest.raises(error, match="cross_entropy_with_grad: expected .*|cross_entropy: expected .*"):
        ops.cross_entropy_with_grad(torch.ones((), dtype=acc), logits, labels, weight, **kwargs)


def test_bad_label_is_found_before_logits_are_overwritten():
    logits = torch.randn(2, 3)
    before = logits.clone()
    with pytest.raises(IndexError):
        ops.cross_entropy_with_grad_(torch.ones(()), logits, torch.tensor([0, 3]))
    assert torch.equal(logits, before)


def test_in_place_needs_rows_that_can_be_overwritten():
    one, labels = torch.ones(()), torch.zeros(4, dtype=torch.int64)
    for logits in (torch.zeros(1, 5).expand(4, 5), torch.zeros(5, 4).t(), torch.zeros(20).as_strided((4, 5), (3, 1))):
        with pytest.raises(RuntimeError, match="cross_entropy_with_grad_: expected logits .*rows that do not overlap"):
            ops.cross_entropy_with_grad_(one, logits, labels)
    gap = torch.zeros(4, 8)
    ops.cross_entropy_with_grad_(one, gap[:, :5], labels)
    assert (gap[:, :5] != 0).all() and (gap[:, 5:] == 0).all()


def test_totals_need_to_be_five_doubles():
    logits, labels = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    before = logits.clone()
    for bad in (torch.zeros(4), torch.zeros(5), torch.zeros(6).double(), torch.zeros(10).double()[::2]):
        with pytest.raises(
            RuntimeError, match=r"add_cross_entropy_: expected contiguous totals \(5,\) of dtype double"
        ):
            ops.add_cross_entropy_(bad, torch.ones(()), logits, labels)
    overlapping = torch.zeros(1, 5).expand(4, 5)
    totals = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="add_cross_entropy_: expected logits .*rows that do not overlap"):
        ops.add_cross_entropy_(totals, torch.ones(()), overlapping, labels)
    ops.add_cross_entropy_(totals, None, overlapping, labels)  # which are only read
    assert totals[1] == 4 and torch.equal(logits, before)


def test_backward_needs_what_forward_returned():
    logits, labels, one = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.ones(())
    lse, nll = (ops.cross_entropy(logits, labels)[i] for i in (3, 6))
    for bad in ((one, lse.float(), nll, "lse"), (one, lse[:1], nll, "lse"), (one, lse, nll.double(), "nll"),
                (torch.ones(2), lse, nll, "grad_loss_sum")):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"cross_entropy_backward: expected {bad[3]}"):
            ops.cross_entropy_backward(bad[0], logits, labels, bad[1], bad[2])


def test_backward_through_the_gradient_op_is_refused():
    leaf = torch.zeros(2, 5, requires_grad=True)
    for op in (ops.cross_entropy_with_grad, ops.mean_with_grad):
        out = op(torch.ones(()), leaf, torch.zeros(2, dtype=torch.int64))
        with pytest.raises(RuntimeError, match=f"{op.__name__}: expected no backward through it"):
            out[0].backward()


def test_scale():
    for dtype in DTYPES:
        x = torch.randn(70, 1001).to(dtype)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        scaled = x.clone()
        ops.scale_(scaled, torch.tensor(0.3, dtype=acc))
        assert torch.equal(scaled, (x.to(acc) * torch.tensor(0.3, dtype=acc)).to(dtype))
        ops.scale_(x, torch.ones((), dtype=acc))
    with pytest.raises(RuntimeError, match="scale_: expected contiguous values"):
        ops.scale_(torch.zeros(3, 4).t(), torch.ones(()))
    with pytest.raises(RuntimeError, match="scale_: expected a factor with one element"):
        ops.scale_(torch.zeros(3, 4), torch.ones(2))
