"""The losses a user calls: stock equivalence, exact accumulation, num_items in every form, in-place, bad input."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from oracle import expected
from tolerances import SUM, UNIT, assert_close, assert_within, fp32_gradient_limit

import accumloss
from accumloss import LossOptions, TokenSums

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
B, T, V = 8, 12, 61


def batch(dtype=torch.float32, seed=0):
    """Logits and very uneven labels: row b keeps b + 1 of its labels, the last row all."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(B, T, V, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=generator)
    for b in range(B - 1):
        labels[b, b + 1 :] = -100
    return logits, labels


def stock_causal(logits, labels, num_items=None):
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    loss = F.cross_entropy(logits.float().flatten(0, 1), shifted.flatten(), reduction="sum")
    return loss / (num_items if num_items is not None else (shifted != -100).sum())


def loss_and_grad(function, logits, *args, **kwargs):
    leaf = logits.detach().clone().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    loss.backward()
    return loss.detach(), leaf.grad


# The losses against float64 and against stock ---------------------------------------------------------------------------

ITEMS = 21 + T - 1  # targets of batch(): row b has b of them, the last row all


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_items", [None, 7, ITEMS])
@pytest.mark.parametrize("inplace", [False, "backward", "forward"])
def test_causal_lm_loss_matches_float64(dtype, num_items, inplace):
    logits, labels = batch(dtype)
    divisor = ITEMS if num_items is None else num_items
    wanted = expected(Case("causal", logits, labels, shift=1), grad_loss_sum=1 / divisor)
    assert wanted.sums[1].item() == ITEMS
    if inplace == "forward" and (num_items is None or dtype == torch.float16):
        return  # refused: test_in_place_needs
    leaf = logits.clone().requires_grad_()
    computed = leaf * 1
    loss = accumloss.causal_lm_loss(computed, labels, V, num_items_in_batch=num_items, inplace=inplace)
    loss.backward()
    assert_close(loss, wanted.sums[0] / divisor, 2 * SUM, "loss")
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and loss.shape == ()
    assert leaf.grad.dtype == dtype
    # 1 / divisor is rounded to the accumulation dtype
    assert_within(leaf.grad, wanted.grad, wanted.grad_bound + 2 * UNIT * wanted.grad.abs(), "gradient")
    assert torch.equal(computed.detach(), logits) == (inplace is False)


def losses():
    """(name, ours, stock, logits, arguments) for every transformers loss that has a counterpart."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    generator = torch.Generator().manual_seed(3)
    logits, labels = batch()
    yield "causal", accumloss.causal_lm_loss, loss_utils.ForCausalLMLoss, logits, (labels, V), {}
    shifted = {"labels": None, "vocab_size": V, "shift_labels": labels}
    yield "shift_labels", accumloss.causal_lm_loss, loss_utils.ForCausalLMLoss, logits, (), shifted
    yield "masked", accumloss.masked_lm_loss, loss_utils.ForMaskedLMLoss, logits, (labels, V), {}
    config = SimpleNamespace(num_labels=V)
    yield "token", accumloss.token_classification_loss, loss_utils.ForTokenClassification, logits, (labels, config), {}

    def swapped(function):
        return lambda pooled, labels, config, **kwargs: function(labels, pooled, config, **kwargs)

    pooled = torch.randn(B, 5, generator=generator)
    ours, stock = (
        swapped(f) for f in (accumloss.sequence_classification_loss, loss_utils.ForSequenceClassificationLoss)
    )
    for name, labels, problem, num_labels in (
        ("single label", torch.arange(B) % 5, None, 5),
        ("multi label", (torch.rand(B, 5, generator=generator) < 0.4).float(), None, 5),
        ("regression, several", torch.randn(B, 5, generator=generator), "regression", 5),
        ("regression", torch.randn(B, generator=generator), None, 1),
    ):
        config = SimpleNamespace(num_labels=num_labels, problem_type=problem)
        yield name, ours, stock, pooled[:, :num_labels], (labels, config), {}

    def ends(function):
        return lambda logits, *args, **kwargs: function(logits[..., 0], logits[..., 1], *args, **kwargs)

    both = torch.randn(B, T, 2, generator=generator)
    positions = torch.tensor([0, 3, T - 1, T, T + 5, -2, 4, 1]), torch.tensor([[1], [3], [T], [T], [2], [-1], [4], [9]])
    yield "question answering", ends(accumloss.question_answering_loss), ends(loss_utils.ForQuestionAnsweringLoss), both, positions, {}  # fmt: skip


@pytest.mark.parametrize("num_items", [None, 13])
def test_losses_match_transformers(num_items):
    names = []
    for name, ours, stock, logits, args, kwargs in losses():
        found = loss_and_grad(ours, logits, *args, **copy.deepcopy(kwargs), num_items_in_batch=num_items)
        wants_sum = num_items is not None and name in ("multi label", "regression", "regression, several")
        wanted = loss_and_grad(stock, logits, *args, **copy.deepcopy(kwargs), num_items_in_batch=num_items)
        factor = logits.numel() / num_items if wants_sum else 1.0  # stock ignores num_items_in_batch there
        torch.testing.assert_close(found[0], wanted[0] * factor, rtol=1e-6, atol=0, msg=lambda m, name=name: name + m)
        torch.testing.assert_close(
            found[1], wanted[1] * factor, rtol=2e-5, atol=1e-8, msg=lambda m, name=name: name + m
        )
        names.append(name)
    assert len(names) == 9


def test_sequence_classification_sets_the_problem_type_as_transformers_does():
    for labels, num_labels, problem in (
        (torch.zeros(2), 1, "regression"),
        (torch.zeros(2).long(), 3, "single_label_classification"),
        (torch.zeros(2, 3), 3, "multi_label_classification"),
    ):
        config = SimpleNamespace(num_labels=num_labels, problem_type=None)
        accumloss.sequence_classification_loss(labels, torch.zeros(2, num_labels), config)
        assert config.problem_type == problem


def test_question_answering_without_positions_has_no_loss():
    logits = torch.zeros(2, 3)
    assert accumloss.question_answering_loss(logits, logits, None, torch.zeros(2).long()) is None


# Exact accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("splits", [(8,), (4, 4), (1,) * 8, (3, 3, 2)])
def test_accumulated_gradient_is_that_of_one_batch(dtype, splits):
    """A linear head over very uneven rows: the weight's gradient, for any partition into micro-batches."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, 16, generator=generator, dtype=dtype)
    head = torch.randn(V, 16, generator=generator, dtype=dtype)
    _, labels = batch()

    def accumulated(parts, loss_of):
        weight = head.clone().requires_grad_()
        total = 0.0
        for h, y in zip(hidden.split(parts), labels.split(parts), strict=True):
            loss = loss_of(h @ weight.T, y)
            loss.backward()
            total += loss.item()
        return total, weight.grad

    def exact(logits, y):
        return accumloss.causal_lm_loss(logits, y, num_items_in_batch=ITEMS)

    whole_loss, whole = accumulated((B,), exact)
    loss, grad = accumulated(splits, exact)
    assert abs(loss - whole_loss) <= 1e-6 * whole_loss
    assert (grad - whole).norm() / whole.norm() <= 1e-6
    if len(splits) > 1:  # the disease: the mean of the micro-batches' means is another gradient

        def mean_of_means(logits, y):
            return stock_causal(logits, y).nan_to_num() / len(splits)

        _, wrong = accumulated(splits, mean_of_means)
        assert (wrong - whole).norm() / whole.norm() > 0.1


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("inplace", [False, "backward"])
def test_a_step_without_items_is_zero(num_items, inplace):
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.full((2, 3), -100)
    loss = accumloss.causal_lm_loss(leaf * 1, labels, num_items_in_batch=num_items, inplace=inplace)
    loss.backward()
    assert loss.item() == 0 and (leaf.grad == 0).all()
    config = SimpleNamespace(num_labels=5)
    assert accumloss.token_classification_loss(leaf, labels, config, num_items_in_batch=num_items).item() == 0
    empty = SimpleNamespace(num_labels=1, problem_type="regression")
    nothing = accumloss.sequence_classification_loss(torch.zeros(0), torch.zeros(0, 1), empty, num_items)
    assert nothing.item() == 0


@pytest.mark.parametrize(
    "num_items", [32, 32.0, torch.tensor(32), torch.tensor(32, dtype=torch.int32), torch.tensor([[32], [32]]),
                  torch.tensor([32.0])]
)  # fmt: skip
def test_num_items_in_every_form(num_items):
    logits, labels = batch()
    before = copy.deepcopy(num_items)
    found = loss_and_grad(accumloss.causal_lm_loss, logits, labels, num_items_in_batch=num_items)
    wanted = loss_and_grad(accumloss.causal_lm_loss, logits, labels, num_items_in_batch=32)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert torch.equal(torch.as_tensor(num_items), torch.as_tensor(before))


def test_class_weights_without_num_items_divide_by_their_total():
    logits, labels = batch()
    weight = torch.linspace(0.5, 2, V)
    flat = labels.flatten()
    loss, grad = loss_and_grad(accumloss.masked_lm_loss, logits, labels, weight=weight)
    wanted = loss_and_grad(lambda x: F.cross_entropy(x.flatten(0, 1), flat, weight=weight), logits)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, wanted[1], rtol=1e-5, atol=1e-9)


def test_label_smoothing_is_that_of_torch():
    logits, labels = batch()
    for weight in (None, torch.linspace(0.5, 2, V)):
        loss, grad = loss_and_grad(accumloss.masked_lm_loss, logits, labels, label_smoothing=0.1, weight=weight)
        wanted = loss_and_grad(
            lambda x, w=weight: F.cross_entropy(x.flatten(0, 1), labels.flatten(), weight=w, label_smoothing=0.1),
            logits,
        )
        torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, wanted[1], rtol=2e-5, atol=1e-8)


def test_labels_and_logits_are_left_alone():
    logits, labels = batch()
    kept_logits, kept_labels = logits.clone(), labels.clone()
    loss_and_grad(accumloss.causal_lm_loss, logits, labels, num_items_in_batch=5)
    assert torch.equal(logits, kept_logits) and torch.equal(labels, kept_labels)


def test_flattened_logits_or_labels_are_accepted_without_a_shift():
    logits, labels = batch()
    wanted = accumloss.masked_lm_loss(logits, labels)
    assert torch.equal(accumloss.masked_lm_loss(logits, labels.flatten()), wanted)
    assert torch.equal(accumloss.masked_lm_loss(logits.flatten(0, 1), labels), wanted)


# The gradient written in forward ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_backward_may_be_repeated(factor):
    logits, labels = batch()
    leaf = logits.clone().requires_grad_()
    loss = accumloss.causal_lm_loss(leaf, labels, num_items_in_batch=ITEMS) * factor
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, leaf)[0]
    wanted = expected(Case("twice", logits, labels, shift=1), grad_loss_sum=factor / ITEMS)
    for grad in (first, second):
        assert_within(grad, wanted.grad, wanted.grad_bound + 4 * UNIT * wanted.grad.abs(), "gradient")


def test_fp16_gradient_survives_a_scaler():
    """p / N underflows in fp16; the scaler's factor must reach the kernel before the rounding."""
    logits, labels = torch.zeros(1, 2, 50000, dtype=torch.float16), torch.tensor([[0, 1]])
    leaf = logits.requires_grad_()
    loss = accumloss.causal_lm_loss(leaf, labels, num_items_in_batch=4096)
    (loss * 65536).backward()
    assert_within(leaf.grad[0, 0, 5].float(), torch.tensor(65536 / 4096 / 50000), 1e-3 * 16 / 50000, "p * scale / N")


@pytest.mark.parametrize("inplace", ["backward", "forward"])
def test_in_place_over_logits_with_gaps(inplace):
    """For an incoming gradient that was not expected too."""
    wide = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([[1, 2, 3], [4, 0, 1]])
    grads = []
    for way in (False, inplace):
        leaf = wide.clone().requires_grad_()
        view = (leaf * 1)[..., :5]
        (2 * accumloss.masked_lm_loss(view, labels, num_items_in_batch=4, inplace=way)).backward()
        grads.append(leaf.grad)
    assert_close(grads[1], grads[0], fp32_gradient_limit(), "gradient")


@pytest.mark.parametrize("inplace", ["backward", "forward"])
def test_whoever_saved_the_overwritten_logits_raises(inplace):
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3))
    loss = accumloss.causal_lm_loss(torch.tanh(leaf), labels, num_items_in_batch=4, inplace=inplace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inplace", ["backward", "forward"])
def test_in_place_backward_happens_once(inplace):
    computed = torch.randn(2, 3, 5, requires_grad=True) * 1
    loss = accumloss.causal_lm_loss(computed, torch.randint(0, 5, (2, 3)), num_items_in_batch=4, inplace=inplace)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|expected one backward"):
        loss.backward()


def test_in_place_needs():
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3))
    with pytest.raises(ValueError, match="got a leaf that requires grad"):
        accumloss.causal_lm_loss(leaf, labels, num_items_in_batch=4, inplace="backward")
    with pytest.raises(
        ValueError, match=r"causal_lm_loss: expected num_items_in_batch where inplace=.forward., got None"
    ):
        accumloss.causal_lm_loss(leaf * 1, labels, inplace="forward")
    with pytest.raises(ValueError, match="got float16, in which a gradient divided by the number of items underflows"):
        accumloss.causal_lm_loss(leaf.half(), labels, num_items_in_batch=4, inplace="forward")
    with pytest.raises(ValueError, match="expected False, .* got True"):
        accumloss.causal_lm_loss(leaf * 1, labels, inplace=True)
    with pytest.raises(RuntimeError, match="expected inplace=False under torch.compile"):
        torch.compile(lambda x: accumloss.causal_lm_loss(x * 1, labels, inplace="backward"), fullgraph=True)(leaf)
    without_grad = leaf.detach().clone()
    accumloss.causal_lm_loss(without_grad, labels, num_items_in_batch=4, inplace="forward")
    assert torch.equal(without_grad, leaf.detach())  # no gradient is wanted, so nothing is overwritten


def test_in_place_is_the_gradient_of_a_model():
    """The head's gradient is float64's by all three ways, and the logits' buffer becomes the gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden, (_, labels) = torch.randn(B, T, 16, generator=generator), batch()
    weight = torch.randn(V, 16, generator=generator) / 4
    for inplace in (False, "backward", "forward"):
        head = torch.nn.Linear(16, V, bias=False)
        head.weight.data.copy_(weight)
        logits = head(hidden)
        wanted = expected(Case("head", logits.detach().clone(), labels, shift=1), grad_loss_sum=1 / ITEMS)
        accumloss.causal_lm_loss(logits, labels, num_items_in_batch=ITEMS, inplace=inplace).backward()
        rows, grad, bound = hidden.double().flatten(0, 1), wanted.grad.flatten(0, 1), wanted.grad_bound.flatten(0, 1)
        rounding = B * T * UNIT * (grad.abs().T @ rows.abs())  # of the matrix product, whatever its order
        assert_within(head.weight.grad, grad.T @ rows, bound.T @ rows.abs() + rounding, f"inplace={inplace}")
        if inplace:
            assert_within(logits, wanted.grad, wanted.grad_bound, f"the logits after inplace={inplace}")


# TokenSums and LossOptions --------------------------------------------------------------------------------------------------


def test_token_sums():
    logits, labels = batch()
    sums = accumloss.cross_entropy(logits, labels, shift=1, metrics=True)
    wanted = expected(Case("sums", logits, labels, shift=1))
    assert_close(sums.mean_loss, wanted.sums[0] / ITEMS, 2 * SUM, "mean_loss")
    assert_close(sums.perplexity, (wanted.sums[0] / ITEMS).exp(), 1e-5, "perplexity")
    assert_close(sums.accuracy, wanted.sums[4] / ITEMS, 1e-6, "accuracy")
    assert_close(sums.mean_entropy, wanted.sums[5] / ITEMS, 1e-6, "mean_entropy")
    parts = [accumloss.cross_entropy(x, y, shift=1, metrics=True) for x, y in zip(logits, labels, strict=True)]
    total = sum(parts)
    assert total.num_items == sums.num_items and total.num_correct == sums.num_correct
    assert_close(total.loss_sum, sums.loss_sum, 1e-6, "loss_sum")
    assert_close(total.entropy_sum, sums.entropy_sum, 1e-6, "entropy_sum")


def test_token_sums_without_metrics_have_none():
    sums = accumloss.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert sums.num_correct is None and (sums + sums).entropy_sum is None
    with pytest.raises(ValueError, match=r"TokenSums.accuracy: expected sums from cross_entropy\(..., metrics=True\)"):
        _ = sums.accuracy
    with pytest.raises(ValueError, match="TokenSums.mean_entropy"):
        _ = sums.mean_entropy


def test_token_sums_of_nothing():
    sums = accumloss.cross_entropy(torch.zeros(2, 3), torch.full((2,), -100), metrics=True)
    assert (sums.mean_loss, sums.accuracy, sums.mean_entropy) == (0, 0, 0)
    with pytest.raises(TypeError):
        _ = sums + 1


def test_token_sums_carry_the_gradient_of_the_loss():
    leaf = torch.randn(4, 3, requires_grad=True)
    sums = accumloss.cross_entropy(leaf[:2], torch.tensor([0, 1])) + accumloss.cross_entropy(
        leaf[2:], torch.tensor([2, 2])
    )
    sums.mean_loss.backward()
    wanted = leaf.detach().clone().requires_grad_()
    F.cross_entropy(wanted, torch.tensor([0, 1, 2, 2])).backward()
    torch.testing.assert_close(leaf.grad, wanted.grad)
    assert not sums.detach().loss_sum.requires_grad


def test_token_sums_all_reduce(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        logits, labels = batch()
        sums = accumloss.cross_entropy(logits, labels, metrics=True)
        reduced = sums.all_reduce()
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(reduced, TokenSums)
    for name in ("loss_sum", "num_items", "total_weight", "num_correct", "entropy_sum"):
        a, b = getattr(sums, name), getattr(reduced, name)
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("metrics", [False, True])
def test_token_sums_all_reduce_without_a_process_group(metrics):
    """The line of the README, on one process: the sums as they are, without the gradient that the ranks' sums lack too."""
    assert not torch.distributed.is_initialized()
    logits, labels = batch()
    micro_batches = [(logits.requires_grad_(), labels)] * 2
    sums = sum(accumloss.cross_entropy(x, y, shift=1, metrics=metrics) for x, y in micro_batches)
    reduced = sums.all_reduce()
    for field in dataclasses.fields(TokenSums):
        a, b = getattr(sums, field.name), getattr(reduced, field.name)
        assert (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype)
    assert sums.loss_sum.requires_grad and not reduced.loss_sum.requires_grad


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"label_smoothing": 1.5}, r"a number in \[0, 1\] for label_smoothing, got 1.5"),
        ({"label_smoothing": float("nan")}, "label_smoothing, got nan"),
        ({"z_loss": -1}, "a finite number >= 0 for z_loss, got -1"),
        ({"softcap": -2.0}, "for softcap, got -2.0"),
        ({"logit_scale": 0}, "a finite number > 0 for logit_scale, got 0"),
        ({"logit_scale": "2"}, "for logit_scale, got '2'"),
        ({"ignore_index": 1.0}, "an int for ignore_index .64 bits., got 1.0"),
    ],
)
def test_options_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match="LossOptions: expected " + ".*" + message):
        LossOptions(**kwargs)
    with pytest.raises(ValueError, match=message):
        accumloss.masked_lm_loss(torch.zeros(2, 3), torch.tensor([0, 1]), **kwargs)


def test_bad_input():
    logits, labels = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"causal_lm_loss: expected logits of shape \(..., vocab_size = 7\), got \(2, 3, 5\)"
    ):
        accumloss.causal_lm_loss(logits, labels, 7)
    with pytest.raises(ValueError, match="causal_lm_loss: expected labels .* got neither"):
        accumloss.causal_lm_loss(logits, None)
    with pytest.raises(ValueError, match="expected num_items_in_batch >= 0, got -1"):
        accumloss.causal_lm_loss(logits, labels, num_items_in_batch=-1)
    with pytest.raises(ValueError, match="expected num_items_in_batch >= 0, got True"):
        accumloss.causal_lm_loss(logits, labels, num_items_in_batch=True)
    with pytest.raises(ValueError, match="got an empty tensor"):
        accumloss.causal_lm_loss(logits, labels, num_items_in_batch=torch.zeros(0))
    with pytest.raises(IndexError, match="got 5 for row 0"):
        accumloss.masked_lm_loss(logits, labels + 5)
    config = SimpleNamespace(num_labels=5, problem_type="ranking")
    with pytest.raises(ValueError, match="expected config.problem_type .* got 'ranking'"):
        accumloss.sequence_classification_loss(labels[0], logits[0], config)
    config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"expected labels of shape \(3, 5\), got \(3,\)"):
        accumloss.sequence_classification_loss(labels[0].float(), logits[0], config)
    config.problem_type = "regression"
    with pytest.raises(ValueError, match="expected no weight for regression, got a tensor .5,."):
        accumloss.sequence_classification_loss(torch.zeros(3, 5), logits[0], config, weight=torch.ones(5))


def test_check_finds_nothing_on_cpu():
    assert accumloss.check() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_z_loss_is_told_by_itself(dtype, weighted):
    """What of loss_sum it is, with a gradient that may be taken alone, or with that of the rest; added up over a step."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 7, 700, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, 700, (2, 7), generator=generator)
    labels[0, 2] = -100
    token_weight = torch.rand(2, 7, generator=generator) if weighted else None
    leaf = logits.clone().requires_grad_()
    given = {"token_weight": token_weight, "shift": 1}
    sums = accumloss.cross_entropy(leaf, labels, z_loss=1e-2, **given)
    plain = accumloss.cross_entropy(leaf, labels, **given)
    assert plain.z_loss_sum is None and sums.z_loss_sum.dtype == sums.loss_sum.dtype
    x = logits.double().requires_grad_()
    rows = torch.where(labels[:, 1:] != -100, 1e-2 * x.logsumexp(-1)[:, :-1] ** 2, 0.0)
    wanted = (rows if token_weight is None else rows * token_weight[:, 1:]).sum()
    assert_close(sums.z_loss_sum, wanted, SUM, "z_loss_sum")
    assert_close(sums.loss_sum - sums.z_loss_sum, plain.loss_sum, 4 * SUM, "the rest")
    (of_z,) = torch.autograd.grad(sums.z_loss_sum, leaf, retain_graph=True)
    (of_x,) = torch.autograd.grad(wanted, x)
    (of_both,) = torch.autograd.grad(sums.loss_sum + 2 * sums.z_loss_sum, leaf)
    (of_plain,) = torch.autograd.grad(plain.loss_sum, leaf)
    eps = torch.finfo(dtype).eps if dtype != torch.float64 else SUM
    assert (of_z - of_x).norm() <= 4 * eps * of_x.norm()
    assert (of_both - (of_plain.double() + 3 * of_x)).norm() <= 4 * eps * of_both.norm()
    twice = sums + sums
    assert twice.z_loss_sum == 2 * sums.z_loss_sum and not sums.detach().z_loss_sum.requires_grad


def test_a_window_adds_up_the_z_loss():
    head = torch.nn.Linear(4, 9)
    accumulator = accumloss.Accumulator(head)
    parts = [accumloss.cross_entropy(head(torch.randn(3, 4)), torch.tensor([0, 8, 2]), z_loss=0.1) for _ in range(2)]
    for sums in parts:
        accumulator.backward(sums)
    assert_close(accumulator.finish().z_loss_sum, sum(sums.z_loss_sum.double() for sums in parts), SUM, "z_loss_sum")
