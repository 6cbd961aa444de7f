"""The options: one list of them, every loss with every option that means something for it, and nothing swallowed."""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from cases import Case
from oracle import expected, z_scale
from tolerances import SUM, UNIT, assert_close, assert_within, row_loss_bound

import accumloss
from accumloss import LossOptions, keywords, options, reference
from accumloss.losses import Known, masked_lm
from accumloss.transformers import losses

ROOT = Path(__file__).resolve().parents[1]
LOSSES = (
    "cross_entropy", "causal_lm_loss", "masked_lm_loss", "token_classification_loss", "sequence_classification_loss",
    "question_answering_loss", "semantic_segmentation_loss", "linear_cross_entropy", "linear_causal_lm_loss",
)  # fmt: skip
OPS = ("cross_entropy", "cross_entropy_backward", "cross_entropy_backward_", "cross_entropy_with_grad",
       "cross_entropy_with_grad_", "add_cross_entropy_", "mean_with_grad", "cross_entropy_shard",
       "cross_entropy_shard_backward",
       "cross_entropy_shard_backward_", "causal_lm", "masked_lm", "linear_cross_entropy", "linear_cross_entropy_with_grad")  # fmt: skip


# One list -----------------------------------------------------------------------------------------------------------------


def listed():
    """(type, name, default) of each option, as accumloss/options.py lists them."""
    return [(field.type, field.name, field.default) for field in fields(LossOptions)]


@pytest.mark.parametrize("op", OPS)
def test_schemas_have_the_options_of_the_list(op):
    schema = getattr(torch.ops.accumloss, op).default._schema
    found = [(str(a.type), a.name, a.default_value) for a in schema.arguments if a.name in options.NAMES]
    assert found == listed()
    rest = {a.name for a in schema.arguments if a.kwarg_only} - set(options.NAMES)
    known = {"shift", "metrics", "num_valid", "max_scratch_bytes", "needs", "class_offset", "vocab_size"}
    assert rest <= known, "an option that Python does not list"


def test_the_struct_has_the_options_of_the_list():
    text = (ROOT / "csrc" / "options.h").read_text()
    found = re.findall(r"^  OPTION\((\w+), (\w+), (\w+), (\S+)\)", text, flags=re.MULTILINE)
    types = {"int": ("int64_t", int), "float": ("double", float)}
    assert [(schema, name, types[schema][1](value)) for _, schema, name, value in found] == listed()
    assert all(cpp == types[schema][0] for cpp, schema, _, _ in found)


@pytest.mark.parametrize("name", LOSSES)
def test_signatures_have_the_options_of_the_list(name):
    parameters = inspect.signature(getattr(accumloss, name)).parameters
    for type_, option, default in listed():
        if (name, option) == ("question_answering_loss", "ignore_index"):
            assert option not in parameters  # the length of the sequence
            continue
        if (name, option) == ("semantic_segmentation_loss", "ignore_index"):
            default = 255
        assert (parameters[option].annotation, parameters[option].default) == (type_, default), option
    assert list(LossOptions().as_kwargs().items()) == [(option, default) for _, option, default in listed()]


# Every loss with every option ---------------------------------------------------------------------------------------------

B, T, V, ITEMS = 3, 4, 9, 7


class Call(NamedTuple):
    """A loss over logits that the cases of the oracle describe."""

    loss: object  # of (leaf, **options), divided by ITEMS
    leaf: torch.Tensor
    cases: object  # of (weight, LossOptions) -> [Case]; the loss is the mean of theirs
    grads: object  # of the leaf's gradient -> those of the cases' logits


def call_of(name, ignored=-100, num_items=ITEMS):
    """The loss over logits and labels, some of which are ``ignored``; semantic segmentation has 255 in the place of -100."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(B, T, V, generator=generator) * 3
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 1] = 3
    labels[1, 2] = ignored
    config = SimpleNamespace(num_labels=V, problem_type="single_label_classification")
    function = getattr(accumloss, name)

    def case(shift=0, logits=logits, labels=labels, ignored=None):
        def make(weight, given):
            given = given if ignored is None else LossOptions(**{**given.as_kwargs(), "ignore_index": ignored})
            return [Case(name, logits, labels, weight, given, shift)]

        return make

    def itself(grad):
        return [grad]

    if name == "cross_entropy":
        return Call(lambda x, **k: function(x, labels, **k).loss_sum / num_items, logits, case(), itself)
    if name in ("causal_lm_loss", "masked_lm_loss"):
        shift = int(name == "causal_lm_loss")
        return Call(lambda x, **k: function(x, labels, num_items_in_batch=num_items, **k), logits, case(shift), itself)
    if name == "token_classification_loss":
        return Call(lambda x, **k: function(x, labels, config, num_items, **k), logits, case(), itself)
    if name == "sequence_classification_loss":
        pooled, classes = logits[:, 0], torch.tensor([0, 3, ignored])
        return Call(
            lambda x, **k: function(classes, x, config, num_items, **k),
            pooled, case(logits=pooled, labels=classes), itself,
        )  # fmt: skip
    if name == "question_answering_loss":
        both, positions = logits[:, :2], torch.tensor([[0, 8], [3, 40], [9, 5]])  # (B, 2, V): positions are the classes
        targets = positions.clamp(0, V)

        def ends(weight, given):
            given = LossOptions(**{**given.as_kwargs(), "ignore_index": V})
            return [Case(name, both[:, i], targets[:, i], None, given) for i in (0, 1)]

        return Call(
            lambda x, **k: function(x[:, 0].contiguous(), x[:, 1].contiguous(), positions[:, 0], positions[:, 1], num_items, **k),
            both, ends, lambda grad: [grad[:, 0], grad[:, 1]],
        )  # fmt: skip
    if name == "semantic_segmentation_loss":
        maps = logits.permute(0, 2, 1).reshape(B, V, 2, 2).contiguous()  # enlarged to their own size: the same numbers
        pixels = labels.view(B, 2, 2)
        if ignored == -100:
            pixels, ignored = pixels.masked_fill(pixels == -100, 255), 255
        by_pixel = case(logits=maps.permute(0, 2, 3, 1), labels=pixels, ignored=ignored)

        def loss(x, **k):
            return function(x, pixels, num_items_in_batch=num_items, **k)

        return Call(loss, maps, by_pixel, lambda grad: [grad.permute(0, 2, 3, 1)])
    # the head's weight holds the logits, and each hidden state picks its own: the product is exact
    hidden = torch.eye(B * T).view(B, T, B * T)
    shift = int(name == "linear_causal_lm_loss")

    def linear(leaf, **k):
        k["class_weight"] = k.pop("weight", None)
        head = leaf.view(B * T, V).t()
        if shift:
            return function(hidden, head, labels, num_items, **k)
        return function(hidden, head, labels, **k).loss_sum / num_items

    return Call(linear, logits, case(shift), itself)


VALUES = {
    "ignore_index": 3,  # a class
    "label_smoothing": 0.1,
    "z_loss": 0.05,
    "softcap": 5.0,
    "logit_scale": 0.5,
    "weight": torch.linspace(0.5, 2.0, V),
    "inplace": "backward",
}
COMBINED = "all of them"


def options_of(name):
    named = inspect.signature(getattr(accumloss, name)).parameters
    return [option for option in VALUES if option in named or (option == "weight" and "class_weight" in named)]


def combinations():
    for name in LOSSES:
        yield from ((name, option) for option in [*options_of(name), COMBINED])


@pytest.mark.parametrize(("name", "option"), list(combinations()))
def test_every_option_of_every_loss_matches_float64(name, option):
    """Value and gradient; and the option changes the loss, but for inplace, which changes where the gradient lies."""
    given = {o: VALUES[o] for o in options_of(name)} if option == COMBINED else {option: VALUES[option]}
    call = call_of(name, given.get("ignore_index", -100))
    leaf = call.leaf.clone().requires_grad_()
    loss = call.loss(leaf * 1, **given)
    loss.backward()
    of_rows = LossOptions(**{o: v for o, v in given.items() if o in options.NAMES})
    cases = call.cases(given.get("weight"), of_rows)
    wanted = [expected(case, grad_loss_sum=1 / ITEMS / len(cases)) for case in cases]
    total = sum(w.sums[0] for w in wanted) / ITEMS / len(cases)
    bound = 2 * SUM + max(row_loss_bound(torch.float32, "cpu", z_scale(case)) for case in cases)
    assert_close(loss, total, bound, f"{name}, {option}")
    for found, w in zip(call.grads(leaf.grad), wanted, strict=True):
        assert_within(found, w.grad, w.grad_bound + 3 * UNIT * w.grad.abs(), f"{name}, {option}: gradient")
    if option != "inplace":
        changed = -100 if option == "ignore_index" else of_rows.ignore_index
        plain = [expected(case) for case in call_of(name, changed).cases(None, LossOptions(ignore_index=changed))]
        other = sum(w.sums[0] for w in plain) / ITEMS / len(plain)
        assert abs(total - other) > 1e-3 * abs(other), "the option changes nothing: a loss could swallow it unseen"


def test_options_of_multi_label_match_float64():
    generator = torch.Generator().manual_seed(6)
    logits, labels = torch.randn(B, V, generator=generator) * 3, (torch.rand(B, V, generator=generator) < 0.4).float()
    config = SimpleNamespace(num_labels=V, problem_type="multi_label_classification")
    for option in ("softcap", "logit_scale", "weight", COMBINED):
        names = ("softcap", "logit_scale", "weight") if option == COMBINED else (option,)
        given = {name: VALUES[name] for name in names}
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = accumloss.sequence_classification_loss(labels, leaf, config, ITEMS, **given)
        z = reference.transform(exact, LossOptions(**{k: v for k, v in given.items() if k != "weight"}))
        weight = given.get("weight", torch.ones(V)).double()
        # -log sigmoid of the right sign, which neither cancels nor overflows
        wanted = (weight * torch.nn.functional.softplus(torch.where(labels == 1, -z, z))).sum() / ITEMS
        loss.backward()
        wanted.backward()
        assert_close(loss, wanted, row_loss_bound(torch.float32, "cpu", z.detach().abs().max().item()), option)
        scale = exact.grad.abs().max()
        assert_within(
            leaf.grad, exact.grad, row_loss_bound(torch.float32, "cpu", z.detach().abs().max().item()) * scale, option
        )


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_options_without_a_meaning_for_a_problem_are_refused(problem):
    config = SimpleNamespace(num_labels=V, problem_type=problem)
    takes = {"softcap", "logit_scale", "weight"} if problem == "multi_label_classification" else set()
    logits, labels = torch.zeros(B, V), torch.zeros(B, V)
    for option in VALUES:
        if option in takes:
            accumloss.sequence_classification_loss(labels, logits, config, **{option: VALUES[option]})
            continue
        with pytest.raises(ValueError, match=f"sequence_classification_loss: expected no {option} for {problem}, got"):
            accumloss.sequence_classification_loss(labels, logits, config, **{option: VALUES[option]})


def test_the_table_of_the_docs_is_what_the_signatures_say():
    text = (ROOT / "docs" / "losses.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    start = next(i for i, row in enumerate(rows) if row[0] == "loss" and "ignore_index" in row)
    head, table = rows[start], {row[0]: row for row in rows[start + 2 : start + 2 + len(LOSSES)]}
    assert set(head[1:]) == set(VALUES) and set(table) == set(LOSSES)
    for name, row in table.items():
        named = inspect.signature(getattr(accumloss, name)).parameters
        for option, cell in zip(head[1:], row[1:], strict=True):
            takes = option in named or (option == "weight" and "class_weight" in named)
            assert (cell != "–") == takes, (name, option)
        if "class_weight" in named:
            assert row[head.index("weight")] == "class_weight"


def test_make_loss_and_the_hook_take_the_options_of_the_loss():
    for kind in losses.KINDS:
        assert set(losses.options_named_by(kind)) == set(options_of(f"{kind}_loss"))
    logits, labels = torch.randn(2, 3, V), torch.randint(0, V, (2, 3))
    outputs = SimpleNamespace(logits=logits)
    found = accumloss.compute_loss_func(outputs, labels, shift=0, z_loss=0.5)
    assert torch.equal(found, accumloss.masked_lm_loss(logits, labels, z_loss=0.5))
    ends = (logits[:, 0], logits[:, 1], labels[:, 0], labels[:, 1])
    made = accumloss.make_loss("question_answering", softcap=2.0)
    assert torch.equal(made(*ends), accumloss.question_answering_loss(*ends, softcap=2.0))


# Nothing is swallowed -----------------------------------------------------------------------------------------------------

FUNCTIONS = sorted(
    name for name in accumloss.__all__
    if inspect.isroutine(getattr(accumloss, name)) and inspect.signature(getattr(accumloss, name)).parameters
)  # fmt: skip


@pytest.mark.parametrize("name", [*FUNCTIONS, "LossOptions"])
def test_an_unknown_keyword_is_refused_by_name(name):
    """Before anything else is looked at; the nearest is named."""
    function = getattr(accumloss, name)
    more = {"make_loss": ["z_loss", "weight"], "compute_loss_func": ["softcap"], "registered": ["fused_linear"]}
    known = [*(p for p in keywords.named_by(function) if p != "kind"), *more.get(name, [])]
    for parameter in known:
        wrong = f"{parameter}_"
        with pytest.raises(
            TypeError, match=f"{name}: expected keyword arguments .*got '{wrong}' .the nearest is '{parameter}'"
        ):
            function(**{wrong: None})


def test_functions_without_parameters_refuse_keywords():
    for name in set(accumloss.__all__) - set(FUNCTIONS):
        if inspect.isroutine(getattr(accumloss, name)):
            with pytest.raises(TypeError, match=f"^{name}: expected no arguments, got 'foo'"):
                getattr(accumloss, name)(foo=1)


def test_typing_errors_that_once_returned_a_loss():
    x, y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    for given, nearest in (
        ("label_smooting", "label_smoothing"),
        ("num_items", "num_items_in_batch"),
        ("weights", "weight"),
    ):
        with pytest.raises(
            TypeError, match=f"got '{given}' .the nearest is '{nearest}'.*make_loss..causal_lm.., which takes"
        ):
            accumloss.causal_lm_loss(x, y, **{given: 0.5})
    with pytest.raises(TypeError, match=r"make_loss: expected keyword arguments .*got 'reduction'"):
        accumloss.make_loss("masked_lm", reduction="sum")
    with pytest.raises(TypeError, match=r"masked_lm_loss: .*got 'shift_labels'"):  # another loss's: not ignored either
        accumloss.masked_lm_loss(x, y, shift_labels=y)


# Options that the arithmetic does not hold --------------------------------------------------------------------------------

UNHELD = [
    {"softcap": 1e308}, {"softcap": 1e-50}, {"logit_scale": 1e-50}, {"logit_scale": 1e39}, {"z_loss": 1e300},
    {"z_loss": 1e-60}, {"label_smoothing": 1e-45}, {"softcap": 1e-30, "logit_scale": 1e20},
    {"softcap": 1e30, "logit_scale": 1e-20}, {"softcap": 1e-40},
]  # fmt: skip
BAD = [
    {"softcap": -1.0}, {"softcap": float("nan")}, {"softcap": float("inf")}, {"logit_scale": 0.0}, {"logit_scale": -1.0},
    {"logit_scale": float("nan")}, {"logit_scale": float("inf")}, {"z_loss": -1e-9}, {"z_loss": float("nan")},
    {"z_loss": float("inf")}, {"label_smoothing": -1e-9}, {"label_smoothing": 1.0 + 1e-9}, {"label_smoothing": float("nan")},
]  # fmt: skip
WRONG_TYPES = [{name: value} for name in options.NAMES for value in (None, "1", True, [1.0])]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def direct_calls(given, dtype, device="cpu"):
    """Every op with these options: callables of nothing."""
    ops = torch.ops.accumloss
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = torch.zeros(4, 5, dtype=dtype, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    one, lse = torch.ones((), dtype=acc, device=device), torch.zeros(4, dtype=torch.float64, device=device)
    nll, head = torch.zeros(4, dtype=acc, device=device), torch.zeros(5, 5, dtype=dtype, device=device)
    yield lambda: ops.cross_entropy(x, y, **given)
    yield lambda: ops.cross_entropy_backward(one, x, y, lse, nll, **given)
    yield lambda: ops.cross_entropy_backward_(one, x, y, lse, nll, **given)
    yield lambda: ops.cross_entropy_with_grad(one, x, y, **given)
    yield lambda: ops.cross_entropy_with_grad_(one, x, y, **given)
    yield lambda: ops.add_cross_entropy_(torch.zeros(5, dtype=torch.float64, device=device), one, x, y, **given)
    yield lambda: ops.mean_with_grad(one, x, y, **given)
    yield lambda: ops.masked_lm(x, y, **given)
    yield lambda: ops.causal_lm(x, y, **given)
    yield lambda: ops.linear_cross_entropy(x, head, y, **given)
    yield lambda: ops.linear_cross_entropy_with_grad(x, head, y, needs=[True, True, False], **given)


@pytest.mark.parametrize("given", UNHELD, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_arithmetic_does_not_hold_is_refused_but_for_fp64(given, dtype):
    """In losses, ops and fakes: not a NaN, nor an option that is silently off."""
    if dtype == torch.float64:
        case = Case("held", torch.randn(B, V, dtype=dtype), torch.tensor([0, 8, 3]), options=LossOptions(**given))
        found = torch.ops.accumloss.cross_entropy(case.logits, case.labels, **given)[0]
        bound = SUM + row_loss_bound(dtype, "cpu", z_scale(case))
        assert_close(found, expected(case).sums[0], bound, str(given))
        return
    message = "expected .* holds .fp64 logits are computed in fp64, all others in fp32., got"
    for device in ("cpu", "meta"):
        for call in direct_calls(given, dtype, device):
            with pytest.raises(ValueError, match=message):
                call()
    for name in LOSSES:
        call = call_of(name)
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            call.loss(call.leaf.to(dtype) if "linear" not in name else call.leaf, **given)


@pytest.mark.parametrize("given", BAD, ids=str)
def test_options_out_of_range_are_refused_everywhere(given):
    with pytest.raises(ValueError, match="LossOptions: expected"):
        LossOptions(**given)
    for device in ("cpu", "meta"):
        for dtype in (torch.float32, torch.float64):
            for call in direct_calls(given, dtype, device):
                with pytest.raises(ValueError, match="expected"):
                    call()
    for name in LOSSES:
        call = call_of(name)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            call.loss(call.leaf, **given)


@pytest.mark.parametrize("given", [*WRONG_TYPES, {"ignore_index": 2**63}, {"ignore_index": 0.5}], ids=str)
def test_options_of_a_wrong_type_are_refused(given):
    with pytest.raises(ValueError, match="LossOptions: expected"):
        LossOptions(**given)
    for name in LOSSES:
        if set(given) <= set(options_of(name)):
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                call_of(name).loss(call_of(name).leaf, **given)


@pytest.mark.parametrize("softcap", [3e38, 1e30])
def test_a_softcap_far_beyond_the_logits_changes_nothing(softcap):
    """The largest that fp32 holds: its reciprocal is subnormal."""
    case = Case("far", torch.randn(B, V), torch.tensor([0, 8, 3]), options=LossOptions(softcap=softcap))
    found = torch.ops.accumloss.cross_entropy(case.logits, case.labels, **case.kwargs)[0]
    assert_close(found, expected(case).sums[0], SUM + row_loss_bound(torch.float32, "cpu", z_scale(case)), str(softcap))


# The divisor --------------------------------------------------------------------------------------------------------------

NAN_DIVISORS = [
    torch.tensor(float("nan")), torch.tensor(-1.0), torch.tensor(float("inf")), torch.tensor(-float("inf")),
    torch.tensor(-3), torch.tensor([-3], dtype=torch.int32), torch.tensor([[float("nan")], [float("nan")]]),
    torch.tensor(1e300, dtype=torch.float64), torch.tensor(1e-300, dtype=torch.float64),
    torch.tensor(float("nan"), dtype=torch.bfloat16), torch.tensor(-1.0, dtype=torch.float16),
]  # fmt: skip
DIVIDED = [name for name in LOSSES if name not in ("cross_entropy", "linear_cross_entropy")]


@pytest.mark.parametrize("name", DIVIDED)
def test_a_tensor_that_is_no_number_of_items_gives_nan(name):
    """In the loss and in the gradient of every row that counts; the ignored ones stay zero."""
    for inplace in (False, "backward", "forward") if "linear" not in name else (False,):
        given = {"inplace": inplace} if inplace else {}
        plain = call_of(name)
        leaf = plain.leaf.clone().requires_grad_()
        plain.loss(leaf * 1, **given).backward()
        counts = [grad.abs().sum(-1) > 0 for grad in plain.grads(leaf.grad)]
        for num_items in NAN_DIVISORS:
            call = call_of(name, num_items=num_items)
            leaf = call.leaf.clone().requires_grad_()
            loss = call.loss(leaf * 1, **given)
            loss.backward()
            assert torch.isnan(loss), num_items
            for grad, is_item in zip(call.grads(leaf.grad), counts, strict=True):
                assert grad[is_item].isnan().all(), num_items


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_tensor_that_is_no_number_of_items_gives_nan_elsewhere(problem):
    config = SimpleNamespace(num_labels=V, problem_type=problem)
    for num_items in NAN_DIVISORS:
        leaf = torch.randn(B, V, requires_grad=True)
        loss = accumloss.sequence_classification_loss(torch.zeros(B, V), leaf, config, num_items)
        loss.backward()
        assert torch.isnan(loss) and leaf.grad.isnan().all()


@pytest.mark.parametrize("num_items", [float("nan"), -1, -0.5, float("inf"), 1e300, 1e-300, 10**400, True, "7", [7],
                                       torch.tensor(True), torch.tensor(1j), torch.zeros(0), torch.ones(2, 3)], ids=str)  # fmt: skip
def test_a_number_that_is_no_number_of_items_is_refused(num_items):
    for name in DIVIDED:
        call = call_of(name, num_items=num_items)
        with pytest.raises(ValueError, match=f"{name}: expected num_items_in_batch "):
            call.loss(call.leaf)


@pytest.mark.parametrize("num_items", [7, 7.0, 0.25, 2**40, 2**70, 0, torch.tensor(7), torch.tensor([7]), torch.tensor([[7], [7]]),
                                       torch.tensor(0.25), torch.tensor(0), torch.tensor(7, dtype=torch.int16),
                                       torch.tensor(7.0, dtype=torch.float64)], ids=str)  # fmt: skip
def test_any_number_of_items_divides(num_items):
    """A fraction is legal, 0 counts as 1."""
    first = num_items.flatten()[0].item() if isinstance(num_items, torch.Tensor) else num_items
    for name in DIVIDED:
        sums, call = call_of(name, num_items=1), call_of(name, num_items=num_items)
        wanted = sums.loss(sums.leaf).double() / float(first or 1)
        assert_close(call.loss(call.leaf), wanted, 2 * SUM, name)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_divisor_has_the_dtype_of_the_sum_whatever_the_default(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        for name in DIVIDED:
            call = call_of(name, num_items=torch.tensor(7))
            leaf = call.leaf.float() if "linear" not in name else call.leaf
            assert call.loss(leaf).dtype == (torch.float64 if leaf.dtype == torch.float64 else torch.float32)
    finally:
        torch.set_default_dtype(before)


def test_divisors_of_one_call_are_seen_without_a_sync():
    """On meta no value can be looked at: whatever does raises."""
    logits, labels = torch.zeros(2, 3, V, device="meta"), torch.zeros(2, 3, dtype=torch.int64, device="meta")
    items = torch.zeros((), device="meta")
    assert accumloss.causal_lm_loss(logits, labels, num_items_in_batch=items).is_meta
    assert masked_lm(logits, labels, None, Known(items), LossOptions()).loss.is_meta


# Shapes -------------------------------------------------------------------------------------------------------------------


def pairs():
    """(function of (logits, labels) by their shapes without V, what is right of them)."""
    config = SimpleNamespace(num_labels=V, problem_type="single_label_classification")

    def over(name, shape, labels, **k):
        return getattr(accumloss, name)(torch.randn(*shape, V), torch.zeros(labels, dtype=torch.int64), **k)

    def linear(name, shape, labels):
        return getattr(accumloss, name)(
            torch.randn(*shape, 4), torch.randn(V, 4), torch.zeros(labels, dtype=torch.int64)
        )

    def ends(shape, labels):
        x, y = torch.randn(*shape, V), torch.zeros(labels, dtype=torch.int64)
        return accumloss.question_answering_loss(x, x, y, y)

    def maps(shape, labels):
        return accumloss.semantic_segmentation_loss(torch.randn(shape[0], V, *shape[1:]), torch.zeros(labels).long())

    def problem(kind, num_labels):
        def call(shape, labels):
            given = SimpleNamespace(num_labels=num_labels, problem_type=kind)
            return accumloss.sequence_classification_loss(torch.zeros(labels), torch.randn(*shape), given)

        return call

    flat = [((2, 3), (2, 3)), ((2, 3), (6,)), ((6,), (2, 3)), ((6,), (6,))]
    wrong = [
        ((2, 3), (3, 2)),
        ((2, 3), (2, 3, 1)),
        ((2, 3), (1, 6)),
        ((2, 3, 4), (6, 4)),
        ((6, 4), (2, 3, 4)),
        ((2, 3), (2,)),
    ]
    for name in ("masked_lm_loss", "token_classification_loss"):
        yield name, lambda a, b, n=name: over(n, a, b), flat, wrong
    yield "causal_lm_loss", lambda a, b: over("causal_lm_loss", a, b), [flat[0]], wrong + flat[1:3]
    yield "shift_labels", lambda a, b: accumloss.causal_lm_loss(
        torch.randn(*a, V), None, shift_labels=torch.zeros(b, dtype=torch.int64)), flat, wrong  # fmt: skip
    yield "cross_entropy", lambda a, b: over("cross_entropy", a, b), [flat[0], flat[3]], wrong + flat[1:3]
    for name in ("linear_cross_entropy", "linear_causal_lm_loss"):
        yield name, lambda a, b, n=name: linear(n, a, b), [flat[0], flat[3]], wrong + flat[1:3]
    yield "sequence_classification_loss", lambda a, b: accumloss.sequence_classification_loss(
        torch.zeros(b, dtype=torch.int64), torch.randn(*a, V), config), [*flat, ((6,), (6, 1))], wrong  # fmt: skip
    yield (
        "question_answering_loss",
        ends,
        [((2,), (2,)), ((2,), (2, 1))],
        [((2,), (1, 2)), ((2,), (3,)), ((2, 3), (6,)), ((2,), ())],
    )
    yield (
        "semantic_segmentation_loss",
        maps,
        [((2, 4, 5), (2, 8, 9))],
        [((2, 4, 5), (2, 1, 8, 9)), ((2, 4, 5), (3, 4, 5)), ((2, 4), (2, 4))],
    )
    yield (
        "regression",
        problem("regression", 1),
        [((6, 1), (6,)), ((6, 1), (6, 1)), ((6,), (6, 1)), ((2, 3, 1), (2, 3))],
        [((2, 3, 1), (3, 2)), ((2, 3, 1), (3, 2, 1))],
    )
    yield (
        "regression of several",
        problem("regression", 4),
        [((6, 4), (6, 4))],
        [((6, 4), (4, 6)), ((6, 4), (24,)), ((6, 4), (6,))],
    )
    yield (
        "multi label",
        problem("multi_label_classification", 4),
        [((6, 4), (6, 4))],
        [((6, 4), (4, 6)), ((6, 4), (24,)), ((6, 4), (1, 4))],
    )
    yield "reference", lambda a, b: reference.rows(
        torch.randn(*a, V), torch.zeros(b, dtype=torch.int64)), [flat[0], flat[3]], wrong + flat[1:3]  # fmt: skip


@pytest.mark.parametrize(("function", "right", "wrong"), [p[1:] for p in pairs()], ids=[p[0] for p in pairs()])
def test_labels_are_paired_with_the_logits_of_their_shape_only(function, right, wrong):
    for shapes in right:
        function(*shapes)
    for shapes in wrong:
        with pytest.raises((RuntimeError, ValueError), match="expected .*got"):
            function(*shapes)


def test_registered_losses_fold_neighbouring_dimensions_only():
    """transformers' own take any labels of as many elements; heads come flattened, or side by side."""
    x, y = torch.randn(2, 3, 4, V), torch.randint(0, V, (2, 3, 4))
    config = SimpleNamespace(num_labels=V)
    for loss in (losses.masked_lm_loss, lambda a, b, _: losses.token_classification_loss(a, b, config)):
        wanted = loss(x, y, V)
        for logits in (x, x.flatten(0, 1), x.flatten(1, 2), x.flatten(0, 2), x.flatten(2, 3)):
            for labels in (y, y.flatten(0, 1), y.flatten(1, 2), y.flatten()):
                if (
                    logits.dim() == 3
                    and labels.dim() == 2
                    and logits.shape[:-1] != labels.shape
                    and logits.shape[-1] == V
                ):
                    with pytest.raises(RuntimeError, match="expected labels of shape"):  # (6, 4) and (2, 12)
                        loss(logits, labels, V)
                elif logits.shape[-1] == V or logits.shape[:-1] != (2, 3) or labels.dim() != 2:
                    assert torch.equal(loss(logits, labels, V), wanted)
        for shape in ((3, 2, 4), (2, 4, 3), (4, 6), (12, 2), (3, 8)):
            with pytest.raises(RuntimeError, match="expected labels of shape"):
                loss(x, y.reshape(shape), V)


# Messages -----------------------------------------------------------------------------------------------------------------


def test_messages():
    x, y = torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.int64)
    hidden, head = torch.zeros(2, 3, 4), torch.zeros(V, 4)
    linear = accumloss.linear_cross_entropy
    for call, error, message in (
        (lambda: accumloss.masked_lm_loss(x, None), ValueError, r"masked_lm_loss: expected a tensor labels \(...\), got None"),
        (lambda: accumloss.masked_lm_loss(x, [[0]]), TypeError, "masked_lm_loss: expected a tensor labels .* got a list"),
        (lambda: accumloss.masked_lm_loss(None, y), ValueError, "masked_lm_loss: expected a tensor logits .* got None"),
        (lambda: accumloss.masked_lm_loss(torch.zeros(()), y), RuntimeError, "masked_lm_loss: .* got a 0-dim tensor"),
        (lambda: accumloss.causal_lm_loss(x, [0]), TypeError, "causal_lm_loss: expected a tensor labels .* got a list"),
        (lambda: accumloss.token_classification_loss(x, None), ValueError, "token_classification_loss: .* got None"),
        (lambda: accumloss.cross_entropy(x, None), ValueError, "cross_entropy: expected a tensor labels .* got None"),
        (lambda: accumloss.cross_entropy(x, y, shift=-1), ValueError, "cross_entropy: expected shift >= 0, an int, got -1"),
        (lambda: accumloss.cross_entropy(x, y, shift=True), ValueError, "shift >= 0, an int, got True"),
        (lambda: accumloss.cross_entropy(x, y, weight=[1.0]), TypeError, "cross_entropy: expected a tensor weight .* a list"),
        (lambda: accumloss.masked_lm_loss(x, y, weight=torch.ones(2)), RuntimeError, r"masked_lm_loss: .*\(9,\), got \(2,\)"),
        (lambda: accumloss.masked_lm_loss(x, y, num_items_in_batch=1e300), ValueError, "got 1e.300; it is 0 or a number in"),
        (lambda: torch.ops.accumloss.scale_(torch.zeros(()), torch.ones(())), RuntimeError, "scale_: .* got a 0-dim tensor"),
        (lambda: torch.ops.accumloss.scale_(torch.zeros((), device="meta"), torch.ones((), device="meta")),
         RuntimeError, "scale_: .* got a 0-dim tensor"),
        (lambda: linear(hidden[..., :0], head[:, :0], y), RuntimeError, r"linear_cross_entropy: .*V and H >= 1, got \(9, 0\)"),
        (lambda: linear(hidden, head[:0], y), RuntimeError, r"linear_cross_entropy: .*V and H >= 1, got \(0, 4\)"),
        (lambda: linear(hidden, head, None), ValueError, "linear_cross_entropy: expected a tensor labels .* got None"),
        (lambda: linear(hidden, None, y), ValueError, "linear_cross_entropy: expected a tensor weight .* got None"),
        (lambda: linear(hidden, head, y, max_scratch_bytes=0), ValueError, "max_scratch_bytes >= 1, an int, got 0"),
        (lambda: linear(hidden, head, y, num_valid=-1), ValueError, "num_valid >= 0, an int, got -1"),
        (lambda: linear(hidden, head, y, class_weight=torch.ones(2)), RuntimeError, r"class_weight of shape .*\(9,\), got \(2,\)"),
        (lambda: linear(hidden, head, y, class_weight=torch.ones(V).long()), RuntimeError, "class_weight of bfloat16.* got"),
        (lambda: accumloss.linear_causal_lm_loss(hidden, head, [0]), TypeError, "linear_causal_lm_loss: .* got a list"),
        (lambda: accumloss.question_answering_loss(x[0], x[0], [0], [0]), TypeError, "start_positions .*got a list"),
        (lambda: accumloss.question_answering_loss(x[0], x[0, :, :4], y[0], y[0]), RuntimeError, "of one shape .B, T."),
        (lambda: accumloss.question_answering_loss(x[0], x[0], y[0], y[0], (1,)), ValueError, "expected a pair .* got 1"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


def test_linear_on_meta_has_the_shapes_of_what_it_would_give():
    hidden, head = (torch.zeros(*s, device="meta", requires_grad=True) for s in ((2, 3, 4), (V, 4)))
    labels = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    loss = accumloss.linear_causal_lm_loss(hidden, head, labels, 5)
    loss.backward()
    assert loss.is_meta and loss.shape == () and hidden.grad.shape == hidden.shape and head.grad.shape == head.shape
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected labels of shape"):
        accumloss.linear_cross_entropy(hidden, head, labels[:1])
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected weight on hidden's device"):
        accumloss.linear_cross_entropy(hidden, head.new_zeros(head.shape, device="cpu"), labels)
