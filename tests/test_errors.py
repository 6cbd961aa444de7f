"""What a user did wrong is told in the words of the call: the function's own name, its own parameters, the nearest keyword."""

import copy
import inspect
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import accumloss

V, H, T = 11, 6, 4
LOGITS, LABELS = torch.randn(2, T, V), torch.randint(V, (2, T))
HIDDEN, HEAD = torch.randn(2, T, H), torch.randn(V, H)
CONFIG = SimpleNamespace(num_labels=V, problem_type="single_label_classification")
ROWS = {"logits": LOGITS, "labels": LABELS}
OF_HIDDEN = {"hidden": HIDDEN, "weight": HEAD, "labels": LABELS}
TWO = {"student_logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS}
TWO_HEADS = {
    "student_hidden": HIDDEN, "student_weight": HEAD, "teacher_hidden": HIDDEN, "teacher_weight": HEAD, "labels": LABELS,
}  # fmt: skip
CALLS = {
    "causal_lm_loss": ROWS, "cross_entropy": ROWS, "masked_lm_loss": ROWS, "token_classification_loss": ROWS,
    "token_log_probs": ROWS, "token_losses": ROWS, "token_statistics": ROWS,
    "distillation": TWO, "distillation_loss": TWO, "linear_distillation": TWO_HEADS, "linear_distillation_loss": TWO_HEADS,
    "linear_causal_lm_loss": OF_HIDDEN, "linear_cross_entropy": OF_HIDDEN, "linear_token_log_probs": OF_HIDDEN,
    "count_valid": {"labels": LABELS},
    "sequence_classification_loss": {"labels": LABELS[:, 0], "pooled_logits": LOGITS[:, 0], "config": CONFIG},
    "question_answering_loss": {
        "start_logits": LOGITS[0], "end_logits": LOGITS[1], "start_positions": LABELS[0], "end_positions": LABELS[1],
    },
    "semantic_segmentation_loss": {"logits": torch.randn(2, V, 4, 4), "labels": torch.randint(V, (2, 4, 4))},
}  # fmt: skip
# What is wrong with a tensor, and with a number; and the functions to which that is nothing wrong.
OF_LABELS = {
    "no tensor": lambda x: x.tolist(),
    "of 16 bits": lambda x: x.short(),
    "fewer": lambda x: x[:, :-1] if x.dim() > 1 else x[:-1],
    "too large": lambda x: x + 1000,
}
OF_FLOATS = {
    "no tensor": lambda x: x.tolist(),
    "of integers": lambda x: x.long(),
    "empty": lambda x: x[..., :0],
    "of another shape": lambda x: x.flatten(),
    "sparse": lambda x: x.to_sparse(),
}
OPTIONS = {
    "ignore_index": "a", "label_smoothing": 2.0, "z_loss": -1.0, "softcap": -1.0, "logit_scale": 0.0, "temperature": 0.0,
    "beta": 2.0, "shift": -1, "num_items_in_batch": -1, "max_scratch_bytes": 0, "num_valid": -1, "bias": torch.ones(V + 1),
    "class_weight": torch.ones(V + 1), "token_weight": torch.ones(3), "inplace": "sideways", "config": "a",
}  # fmt: skip
ALLOWED = {
    ("count_valid", "labels", "fewer"), ("count_valid", "labels", "too large"),  # it looks at ignore_index alone
    ("distillation", "labels", "too large"), ("distillation_loss", "labels", "too large"),  # as these do
    ("linear_distillation", "labels", "too large"), ("linear_distillation_loss", "labels", "too large"),
    ("question_answering_loss", "start_positions", "too large"), ("question_answering_loss", "end_positions", "too large"),
    ("semantic_segmentation_loss", "labels", "fewer"),  # the logits are enlarged to whatever they are
    ("token_classification_loss", "config", "option"),  # it has no labels to hold against those of the logits
}  # fmt: skip


def wrong_calls(name):
    given = CALLS[name]
    for parameter, value in given.items():
        if isinstance(value, torch.Tensor):
            for what, change in (OF_FLOATS if value.is_floating_point() else OF_LABELS).items():
                yield parameter, what, {**given, parameter: change(value)}
    for parameter in inspect.signature(getattr(accumloss, name)).parameters.keys() & OPTIONS.keys():
        yield parameter, "option", {**given, parameter: OPTIONS[parameter]}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_errors_bear_the_name_of_the_function_that_was_called(name):
    """Not that of an op, of LossOptions, or of the function that it calls in turn; and nothing wrong is taken."""
    function = getattr(accumloss, name)
    function(**CALLS[name])
    for parameter, what, given in wrong_calls(name):
        if (name, parameter, what) not in ALLOWED:
            with pytest.raises(
                (TypeError, ValueError, RuntimeError, IndexError), match=f"^{name}: expected "
            ) as raised:
                function(**given)
            assert ", got " in str(raised.value), raised.value


def test_every_function_over_tensors_has_its_wrong_calls():
    of_tensors = {"logits", "hidden", "student_logits", "student_hidden", "labels", "start_logits"}
    functions = {name for name in accumloss.__all__ if inspect.isfunction(getattr(accumloss, name))}
    public = {name for name in functions if of_tensors & inspect.signature(getattr(accumloss, name)).parameters.keys()}
    assert public - {"plan", "compute_loss_func"} == set(CALLS)


def test_what_code_of_others_raises_keeps_its_words():
    """An error of a model, or of a loss of ours inside of it, is not that of the function that runs the model."""

    class Model(torch.nn.Linear):
        def forward(self, labels):
            return accumloss.cross_entropy(self.weight, labels)

    with pytest.raises(IndexError, match=r"^cross_entropy: expected labels in \[0, 3\)"):
        accumloss.audit(Model(3, 2), [{"labels": torch.tensor([0, 7])}])


METHODS = {
    "Accumulator.backward": "num_items", "Accumulator.loss": "known_total", "Accumulator.add": "num_items",
    "Accumulator.finish": "max_norm", "Accumulator.reset": "",
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_keyword_of_a_method_is_refused_by_name(name):
    method = getattr(accumloss.Accumulator(torch.nn.Linear(2, 2)), name.partition(".")[2])
    nearest = METHODS[name]
    hint = f".the nearest is '{nearest}'" if nearest else "^Accumulator.reset: expected no arguments, got 'x_'$"
    with pytest.raises(TypeError, match=rf"{re.escape(name)}: expected .* got '{nearest or 'x'}_'|{hint}") as raised:
        method(**{f"{nearest or 'x'}_": 1})
    assert re.search(hint, str(raised.value))


def test_the_remedy_of_an_unknown_keyword_can_be_followed():
    """make_loss is named where it makes such a loss alone."""
    for name, given in CALLS.items():
        with pytest.raises(TypeError) as raised:
            getattr(accumloss, name)(**given, ignore_idx=1)
        for kind in re.findall(r'make_loss\("(\w+)"\)', str(raised.value)):
            accumloss.make_loss(kind)


@pytest.mark.parametrize("name", ["backward", "item", "loss", "mean", "requires_grad"])
def test_sums_that_are_taken_for_a_loss_say_what_to_take(name):
    sums = accumloss.cross_entropy(LOGITS, LABELS)
    with pytest.raises(AttributeError, match=f"TokenSums: .* got '{name}', .*sums.mean_loss .*Accumulator.backward"):
        getattr(sums, name)
    with pytest.raises(TypeError, match="TokenSums: expected no division .*sums.mean_loss"):
        sums / 2
    assert not hasattr(sums, "nothing") and not hasattr(sums, name)
    assert copy.deepcopy(sums).num_items == pickle.loads(pickle.dumps(sums)).num_items == sums.num_items


@pytest.mark.parametrize(
    ("given", "said"), [("reduction", ".mean_loss, the loss of each row token_losses"), ("target", "target is labels")]
)
def test_keywords_of_pytorchs_losses_are_told_apart(given, said):
    with pytest.raises(TypeError, match=f"got '{given}' .*{said}"):
        accumloss.cross_entropy(LOGITS, LABELS, **{given: "mean"})


def test_a_name_that_is_missing_is_suggested():
    """By Python itself, which asks the error for the module."""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", "import accumloss; accumloss.cros_entropy"], capture_output=True, text=True
    )
    assert "Did you mean: 'cross_entropy'?" in ran.stderr.splitlines()[-1]
