"""What is told of each row: token_losses, token_log_probs, token_statistics, against float64 on every kind of input."""

import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, Case, sample_cases
from oracle import token_expected
from oracle import z_scale as z_scale_of
from test_ops import CONTRACT, OTHER_DTYPE, SECOND
from tolerances import ACCUMULATED_GRADIENT, SUM, assert_close, assert_within, entropy_bound, row_loss_bound, unit_of

import accumloss
from accumloss import reference, token_log_probs, token_losses, token_statistics

ops = torch.ops.accumloss
PAGE = Path(__file__).resolve().parents[1] / "docs" / "per-token.md"
BLOCKS = [part.split("```")[0] for part in PAGE.read_text().split("```python\n")[1:]]


@functools.cache
def sampled(dtype):
    return list(sample_cases(dtype))


def incoming(case, seed):
    """A gradient for each row, of both signs; some rows get none."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(case.labels.shape, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(grad.shape, generator=generator) < 0.2, 0.0, grad)


def outputs_of(case):
    """A leaf, and the outputs of the op."""
    leaf = case.logits.detach().requires_grad_()
    return leaf, ops.token_statistics(leaf, case.labels, case.weight, **case.kwargs, metrics=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_of_every_case(dtype):
    for case in sampled(dtype):
        loss, nll, lse, entropy, argmax = ops.token_statistics(
            case.logits, case.labels, case.weight, **case.kwargs, metrics=True
        )
        wanted = token_expected(case)
        bound = row_loss_bound(dtype, "cpu", z_scale_of(case))
        assert_close(loss, wanted.loss, bound, f"{case.name}: loss")
        assert_close(nll, wanted.nll, bound, f"{case.name}: nll")
        assert_within(lse, wanted.lse, bound * (wanted.lse.abs() + wanted.nll), f"{case.name}: lse")
        assert_within(entropy, wanted.entropy, entropy_bound(wanted, dtype, bound), f"{case.name}: entropy")
        assert torch.equal(argmax, wanted.argmax), f"{case.name}: argmax"
        few = ops.token_statistics(case.logits, case.labels, case.weight, **case.kwargs)
        assert all(map(torch.equal, few[:3], (loss, nll, lse))), case.name
        assert few[3].numel() == few[4].numel() == 0, case.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["loss", "nll", "lse", "entropy", "all"])
def test_every_gradient_of_every_case(dtype, which):
    names = ("loss", "nll", "lse", "entropy")
    for number, case in enumerate(sampled(dtype)):
        used = names if which == "all" else (which,)
        grads = {name: incoming(case, 10 * number + i) for i, name in enumerate(names) if name in used}
        leaf, outputs = outputs_of(case)
        total = sum((outputs[names.index(name)] * grad.to(leaf.dtype)).sum() for name, grad in grads.items())
        # as the op gets them: rounded to the dtype of what they come back to
        rounded = {name: grad.to(leaf.dtype).to(outputs[names.index(name)].dtype) for name, grad in grads.items()}
        (grad,) = torch.autograd.grad(total, leaf) if leaf.numel() else (torch.zeros_like(leaf),)
        wanted, bound = token_expected(case).gradient({name: value.double() for name, value in rounded.items()})
        assert grad.dtype == leaf.dtype
        assert_within(grad, wanted, bound, f"{case.name}: gradient of {which}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_pytorch_gives_the_same(dtype):
    """What the docstrings say they are equivalent to, at a temperature, with rows that are shifted and ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 9, 700, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, 700, (3, 9), generator=generator)
    z = (logits.double() / 0.7).requires_grad_()
    log_p = z.log_softmax(-1)
    wanted = (log_p.gather(-1, labels[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1))
    leaf = logits.clone().requires_grad_()
    found = token_statistics(leaf, labels, 0.7)
    bound = row_loss_bound(dtype, "cpu", z.abs().max().item())
    for name, ours, theirs in zip(("log_prob", "entropy", "lse"), found, wanted, strict=False):
        assert_within(ours, theirs, bound * (1 + theirs.abs()), name)
    assert torch.equal(found.argmax, logits.argmax(-1))
    assert torch.equal(token_log_probs(leaf, labels, 0.7), found.log_prob)
    shifted = token_log_probs(logits, labels, shift=1)
    assert torch.equal(shifted[:, :-1], token_log_probs(logits[:, :-1], labels[:, 1:]))
    assert (shifted[:, -1] == 0).all() and not torch.signbit(shifted[:, -1]).any()
    losses = token_losses(logits, labels.masked_fill(labels < 350, -100), label_smoothing=0.1)
    theirs = F.cross_entropy(
        logits.double().flatten(0, 1), labels.masked_fill(labels < 350, -100).flatten(),
        reduction="none", label_smoothing=0.1,
    )  # fmt: skip
    assert_within(losses, theirs.view(3, 9), row_loss_bound(dtype, "cpu") * (1 + theirs.view(3, 9)), "losses")


def test_losses_add_up_to_cross_entropy():
    """The same rows as the losses' sums, whichever kernel those take: values, and gradients of a uniform one."""
    for dtype in DTYPES:
        for case in sampled(dtype):
            _, (loss, *_, entropy, argmax) = outputs_of(case)
            sums = accumloss.cross_entropy(
                case.logits, case.labels, weight=case.weight, shift=case.shift, metrics=True,
                **case.options.as_kwargs(),
            )  # fmt: skip
            magnitude = loss.double().abs().sum()
            bound = 2 * row_loss_bound(dtype, "cpu", z_scale_of(case)) + 2 * unit_of(dtype)
            assert_within(sums.loss_sum, loss.double().sum(), bound * magnitude, case.name)
            labels = reference.shift_labels(case.labels, case.shift, case.options.ignore_index)
            assert int(((argmax == labels) & ~loss.isnan()).sum()) == int(sums.num_correct), case.name
            scale = entropy.double().sum() + token_expected(case).nll.sum()
            assert_within(sums.entropy_sum, entropy.double().sum(), 2 * bound * scale, case.name)


def test_confident_tokens_keep_their_digits():
    """And the entropy does, which is as small: of label and of another class that leads. Stock loses both."""
    logits = torch.zeros(2, 1000)
    logits[:, 3] = 40.0
    exact = logits.double().log_softmax(-1)
    others = 999 * torch.exp(torch.tensor(-40.0, dtype=torch.float64))
    log_prob = -torch.log1p(others)
    found = token_statistics(logits, torch.tensor([3, 5]))
    assert_close(found.log_prob[0], log_prob, row_loss_bound(torch.float32, "cpu"), "log-probability")
    entropy = torch.log1p(others) + 40 * others / (1 + others)
    assert_close(found.entropy[0], entropy, 2 * row_loss_bound(torch.float32, "cpu"), "entropy")
    assert_close(found.log_prob[1], exact[1, 5], row_loss_bound(torch.float32, "cpu"), "of the other")
    assert_within(found.entropy[1], entropy, row_loss_bound(torch.float32, "cpu"), "where another class leads")
    stock = logits.log_softmax(-1)[0, 3]
    assert abs(stock.double() - log_prob) > 0.5 * abs(log_prob)


def test_entropy_of_a_row_does_not_depend_on_its_label():
    """Also not on one that is masked, or far below: its terms are about the largest logit."""
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(3)) * 6
    logits[0, 7], logits[0, 8], logits[0, 9] = -torch.inf, torch.finfo(torch.float32).min, -900.0
    rows = logits.expand(600, 600)
    entropy = token_statistics(rows, torch.arange(600)).entropy
    assert_close(entropy, entropy[:1].expand(600), 2 * row_loss_bound(torch.float32, "cpu"), "entropy")
    exact = -(logits.double().softmax(-1) * logits.double().log_softmax(-1)).nansum()
    assert_close(entropy[0], exact, row_loss_bound(torch.float32, "cpu"), "entropy")


def test_ratios_near_one_keep_their_digits():
    """exp(new - old) of a small update: both log-probabilities are right to 8 units, where bf16 has no digit of it."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(64, 2000, generator=generator) * 3
    labels = old.argmax(-1)
    old[torch.arange(64), labels] += 12.0  # confident, as sampled tokens are
    new = old + 1e-3 * torch.randn(64, 2000, generator=generator)
    found = (token_log_probs(new, labels) - token_log_probs(old, labels)).double()
    exact = -reference.rows(new, labels).nll + reference.rows(old, labels).nll
    magnitude = 2 * reference.rows(old, labels).nll
    assert_within(found, exact, row_loss_bound(torch.float32, "cpu") * magnitude + 2**-24 * found.abs(), "new - old")
    stock = (
        new.log_softmax(-1).gather(-1, labels[:, None])[:, 0] - old.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    )
    assert ((stock.double() - exact).abs() > 1e-2 * exact.abs()).any()


def test_argmax_is_torchs():
    """Ties, caps that make ties, NaN and infinities included; of rows without labels none."""
    V = 1500
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(12, V, generator=generator) * 2).round()  # many ties
    rows[1, 700] = rows[1, 701] = 50.0
    rows[2, 1400] = torch.nan
    rows[3, 3], rows[3, 900] = torch.inf, torch.nan
    rows[4, 3], rows[4, 900] = torch.nan, torch.nan
    rows[5, 700] = torch.inf
    rows[6] = -torch.inf
    rows[7, 5], rows[7, 6] = torch.inf, torch.inf
    rows[8, 0] = rows[8, V - 1] = 60.0
    for label in (0, 700, V - 1):
        for dtype in DTYPES:
            x = rows.to(dtype)
            found = token_statistics(x, torch.full((12,), label)).argmax
            assert torch.equal(found, x.argmax(-1)), (label, dtype)
            found = ops.token_statistics(x, torch.full((12,), label), softcap=0.5, metrics=True)[4]
            assert torch.equal(found, x.argmax(-1)), (label, dtype)
    assert token_statistics(rows, torch.full((12,), -100)).argmax.eq(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_ignored_or_get_no_gradient_are_not_read(dtype):
    """Whatever their logits are."""
    logits = torch.full((5, 900), torch.nan, dtype=dtype)
    logits[1::2] = torch.randn(2, 900, generator=torch.Generator().manual_seed(0)).to(dtype)
    leaf = logits.requires_grad_()
    labels = torch.tensor([-100, 4, -100, 899, 2])
    losses = token_losses(leaf, labels)
    assert losses[[0, 2]].eq(0).all() and losses[[1, 3]].isfinite().all() and losses[4].isnan()
    (grad,) = torch.autograd.grad(losses, leaf, torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0], dtype=losses.dtype))
    assert grad[[0, 2, 4]].eq(0).all() and grad[[1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_is_the_same_gradient_over_the_logits(dtype):
    for case in sampled(dtype):
        if case.logits.dim() < 2 or not case.logits.is_contiguous() or not case.logits.numel():
            continue
        grads, memory = [], None
        for inplace in (False, "backward"):
            leaf = case.logits.detach().clone().requires_grad_()
            logits = leaf * 1
            memory = logits.data_ptr()
            losses = token_losses(
                logits, case.labels, weight=case.weight, shift=case.shift, inplace=inplace, **case.options.as_kwargs()
            )
            grad = incoming(case, 5).to(losses.dtype)
            grads.append(torch.autograd.grad(losses, (logits, leaf), grad))
        assert torch.equal(*(grad[0].nan_to_num() for grad in grads)), case.name
        assert grads[1][0].data_ptr() == memory, case.name


def test_in_place_is_noticed_and_refused_where_it_would_be_wrong():
    labels = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="token_losses: expected logits that a model computed .* got a leaf"):
        token_losses(torch.randn(2, 5, requires_grad=True), labels, inplace="backward")
    with pytest.raises(ValueError, match=r'token_log_probs: expected False or "backward" for inplace, got \'forward\''):
        token_log_probs(torch.randn(2, 5), labels, inplace="forward")
    leaf = torch.randn(2, 5, requires_grad=True)
    logits = leaf.tanh()
    token_statistics(logits, labels, inplace="backward")
    losses = token_losses(logits, labels, inplace="backward")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_a_long_row_is_split_over_threads_without_a_change(threads):
    """Few rows go through the threads in pieces: the same bits, gradients of every kind included."""
    logits = torch.randn(2, 70000, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([69999, 12])
    found = []
    for count in (1, 2):
        threads(count)
        leaf = logits.clone().requires_grad_()
        outputs = token_statistics(leaf, labels)
        (grad,) = torch.autograd.grad(sum((i + 1.0) * outputs[i].sum() for i in range(3)), leaf)
        found.append((*outputs, grad))
    assert all(map(torch.equal, *found))


# What the ops owe PyTorch ----------------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc):
    if "contract" in metafunc.fixturenames:
        parameters = []
        for dtype in DTYPES:
            cases = [case for case in sample_cases(dtype, large=False) if case.name in CONTRACT]
            for i, case in enumerate(cases):
                marks = OTHER_DTYPE if DTYPES[i % len(DTYPES)] != dtype else ()
                name = f"{str(dtype).removeprefix('torch.')}-{case.name}"
                parameters.append(pytest.param(case, id=name, marks=marks))
        metafunc.parametrize("contract", parameters)


def test_opcheck(contract):
    case, check = contract, torch.library.opcheck
    leaf, outputs = outputs_of(case)
    logits, labels, weight, kwargs = case.logits, case.labels, case.weight, {**case.kwargs, "metrics": True}
    check(ops.token_statistics.default, (leaf, labels, weight), kwargs)
    _, nll, lse, entropy, _ = (output.detach() for output in outputs)
    acc = nll.dtype
    grads = [incoming(case, i).to(torch.float64 if i == 2 else acc) for i in range(4)]
    given = (logits, labels, nll, lse, entropy, weight)
    check(ops.token_statistics_backward.default, (*grads, *given), kwargs)
    dense = logits.clone(memory_format=torch.contiguous_format)
    check(ops.token_statistics_backward_.default, (grads[0], None, None, None, dense, *given[1:]), kwargs)


@pytest.mark.parametrize("name", ["shift", pytest.param("everything", marks=SECOND)])
def test_opcheck_of_the_second_derivative(name):
    case = next(c for c in sample_cases(torch.float32, large=False) if c.name == name)
    leaf, outputs = outputs_of(case)
    _, nll, lse, entropy, _ = (output.detach() for output in outputs)
    grads = [incoming(case, i).to(torch.float64 if i == 2 else nll.dtype).requires_grad_() for i in range(4)]
    given = (leaf, case.labels, nll, lse, entropy, case.weight)
    torch.library.opcheck(ops.token_statistics_backward.default, (*grads, *given), {**case.kwargs, "metrics": True})


def test_gradcheck_and_gradgradcheck():
    for case in sample_cases(torch.float64, large=False):
        if case.name not in ("V=33", "no leading dimension", "shift", "expanded rows", "everything"):
            continue
        if case.logits.numel() > 700:
            case = Case(case.name, case.logits[:1], case.labels[:1], case.weight, case.options, case.shift)
        leaf = case.logits.detach().clone().requires_grad_()

        def statistics(logits, case=case):
            return ops.token_statistics(logits, case.labels, case.weight, **case.kwargs, metrics=True)[:4]

        assert torch.autograd.gradcheck(statistics, (leaf,)), case.name
        if case.name != "no leading dimension":
            assert torch.autograd.gradgradcheck(statistics, (leaf,), fast_mode=True), case.name


def test_compile_gives_the_eager_numbers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 65, generator=generator)
    labels = torch.randint(0, 65, (2, 7), generator=generator)

    def step(x):
        found = token_statistics(x, labels, 0.8, shift=1)
        losses = token_losses(x, labels, label_smoothing=0.1)
        ratio = (token_log_probs(x, labels) - 1.0).exp()
        return (found.log_prob + 0.3 * found.entropy + found.lse).sum() + (ratio * losses).sum(), found.argmax

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        value, argmax = function(leaf)
        value.backward()
        results.append((value.detach(), argmax, leaf.grad))
    assert_close(results[1][0], results[0][0], SUM, "value")
    assert torch.equal(results[0][1], results[1][1])
    error = (results[1][2] - results[0][2]).norm()
    assert error <= ACCUMULATED_GRADIENT[torch.float32] * results[0][2].norm()


X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_losses(None, Y), ValueError, r"token_losses: expected a tensor logits \(..., V\), got None"),
        (lambda: token_losses(X, Y[0]), RuntimeError, r"labels of shape \(2, 3, 5\) without its last .* got \(3,\)"),
        (lambda: token_losses(X, Y + 5), IndexError, r"expected labels in \[0, 5\) or ignore_index -100, got 5 for row 0"),
        (lambda: token_losses(X, Y, softcap=-1.0), ValueError, "expected a finite number >= 0 .* for softcap"),
        (lambda: token_losses(X, Y, smoothing=0.1), TypeError, "token_losses: .* got 'smoothing'"),
        (lambda: token_losses(X, Y, shift=-1), ValueError, "token_losses: expected shift >= 0"),
        (lambda: token_log_probs(X, Y, 0.0), ValueError, "token_log_probs: expected a finite number > 0 for temperature"),
        (lambda: token_log_probs(X, Y, True), ValueError, "finite number > 0 for temperature, got True"),
        (lambda: token_statistics(X, Y, 1e-50), ValueError, "token_statistics: expected logit_scale in"),
        (lambda: token_statistics(X.long(), Y), RuntimeError, "expected logits of dtype bfloat16"),
        (lambda: torch.func.grad(lambda x: token_losses(x, Y).sum())(X), RuntimeError, "no torch.func transform"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_dtensors_are_refused_by_name():
    class Sharded(torch.Tensor):
        device_mesh = "a mesh"

    logits = X.as_subclass(Sharded)
    for call in (
        lambda: token_losses(logits, X),
        lambda: accumloss.distillation(X, logits),
        lambda: accumloss.linear_token_log_probs(logits, torch.zeros(7, 5), Y),
    ):
        with pytest.raises(ValueError, match=r"expected plain tensors, got a DTensor; pass logits.to_local\(\)"):
            call()
    with pytest.raises(ValueError, match="cross_entropy: expected no DTensor with labels that are class probabilities"):
        accumloss.cross_entropy(logits, X)
    with pytest.raises(ValueError, match="cross_entropy: expected no token_weight beside DTensors"):
        accumloss.cross_entropy(logits, Y, token_weight=torch.ones(2, 3))


@pytest.mark.parametrize("V", [2, 40, 1500])
def test_argmax_of_rows_with_nan_and_infinities_is_torchs(V):
    """Also where the label leads all that are numbers."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(60, V, generator=generator)
    labels = torch.randint(0, V, (60,), generator=generator)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])
    logits[torch.arange(60), torch.randint(0, V, (60,), generator=generator)] = special.repeat(20)
    logits[::2].scatter_(1, labels[::2, None], 50.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        found = token_statistics(logits.to(dtype), labels).argmax
        assert torch.equal(found, logits.to(dtype).argmax(-1)), dtype


def test_gradients_of_another_shape_are_refused():
    _, nll, lse, entropy, _ = ops.token_statistics(X, Y, metrics=True)
    with pytest.raises(RuntimeError, match=r"expected grad_lse of shape \(2, 3\) as labels, got \(3,\)"):
        ops.token_statistics_backward(None, None, torch.ones(3).double(), None, X, Y, nll, lse, entropy)
    with pytest.raises(RuntimeError, match="expected entropy as cross_entropy returned it"):
        ops.token_statistics_backward(None, None, None, torch.ones(2, 3), X, Y, nll, lse, entropy[:0])


@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0][:40] for block in BLOCKS])
def test_the_blocks_of_the_page_run(block):
    """Each as it stands, from logits that a head has made to a gradient of its weight."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 33, bias=False)
    hidden = torch.randn(2, 5, 8, generator=generator)
    tokens = torch.randint(0, 33, (2, 5), generator=generator)
    advantages, weights = torch.randn(2, 5, generator=generator), torch.rand(2, 5, generator=generator)
    logits, teacher_logits = head(hidden), torch.randn(2, 5, 33, generator=generator)
    names = {
        "torch": torch, "accumloss": accumloss, "head": head, "hidden": hidden, "tokens": tokens, "advantages": advantages,
        "weights": weights, "logits": logits, "teacher_logits": teacher_logits, "mask": (tokens > 10).float(),
        "probabilities": teacher_logits.softmax(-1), "old_log_probs": token_log_probs(logits.detach(), tokens, 0.7),
    }  # fmt: skip
    exec(compile(block, f"{PAGE.name}", "exec"), names)
    if ".backward()" in block:
        assert head.weight.grad.isfinite().all() and (head.weight.grad != 0).any()
    else:
        assert names["sums"].loss_sum > 0
