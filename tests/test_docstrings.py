"""The docstrings of the public names: complete, and their examples run."""

import doctest
import functools
import inspect
import math
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F

import accumloss

NEEDS_TRANSFORMERS = re.compile(
    r"\b(trainer|Trainer|registered|register_with_transformers|vocabulary_parallel_plan|model)\b"
)
HEADING = re.compile(r"^(\S.*)\n((?:    \S+ {2,}\S.*(?:\n|$))+)", re.M)


def contents():
    """The groups of accumloss.__doc__: heading -> {name: what it is}."""
    groups = HEADING.findall(accumloss.__doc__)
    return {heading: dict(re.findall(r"^    (\S+) {2,}(\S.*)$", lines, re.M)) for heading, lines in groups}


def docs(name):
    return inspect.getdoc(getattr(accumloss, name)) or ""


def parameters(name):
    function = getattr(accumloss, name)
    if not (inspect.isfunction(function) or name in ("Accumulator", "LossOptions")):
        return []
    return list(inspect.signature(function).parameters)


def test_help_is_a_table_of_contents():
    names = [name for group in contents().values() for name in group]
    assert sorted(names) == sorted(accumloss.__all__)
    assert names[0] == "TokenSums"
    assert max(map(len, accumloss.__doc__.splitlines())) <= 120


@pytest.mark.parametrize("name", accumloss.__all__)
def test_every_parameter_is_told(name):
    told = docs(name).split("Args:")[-1] if parameters(name) else ""
    missing = [each for each in parameters(name) if not re.search(rf"(^|[\s,*]){each}[,:]", told, re.M)]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in accumloss.__all__ if inspect.isfunction(getattr(accumloss, name))])
def test_what_is_returned_and_raised_is_told(name):
    signature = inspect.signature(getattr(accumloss, name))
    if signature.return_annotation not in ("None", None):
        assert "Returns:" in docs(name)
    if signature.parameters:
        assert "Raises:" in docs(name)


@pytest.fixture(scope="module")
def names():
    """What the examples are written with."""
    found = {
        "accumloss": accumloss,
        "torch": torch,
        "F": F,
        "math": math,
        "types": types,
        "functools": functools,
        "warnings": warnings,
    }
    found |= {name: getattr(accumloss, name) for name in accumloss.__all__}
    return found


@pytest.fixture
def with_transformers(names, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from training import build, rows

    examples = rows()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = build("LlamaForCausalLM")
    own = {
        "Trainer": transformers.Trainer,
        "arguments": arguments,
        "rows": examples,
        "model": model,
        "batch": {key: torch.stack([row[key] for row in examples]) for key in examples[0]},
        "trainer": transformers.Trainer(model, arguments, train_dataset=examples),
    }
    yield {**names, **own}
    accumloss.unregister_from_transformers()


@pytest.mark.parametrize("name", accumloss.__all__)
def test_example_runs(name, names, request):
    assert ">>>" in docs(name), f"accumloss.{name}: no example"
    if NEEDS_TRANSFORMERS.search(docs(name).split(">>>", 1)[1]):
        names = request.getfixturevalue("with_transformers")
    [example] = doctest.DocTestFinder(recurse=False).find(types.SimpleNamespace(__doc__=docs(name)), name)
    example.globs.update(names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 0 or "+SKIP" in docs(name)


def test_a_wrong_example_is_seen(names):
    """The runner is no formality."""
    [example] = doctest.DocTestFinder(recurse=False).find(types.SimpleNamespace(__doc__=">>> 1 + 1\n3\n"), "wrong")
    runner = doctest.DocTestRunner()
    runner.run(example, out=lambda text: None)
    assert runner.failures == 1


def test_examples_that_are_skipped_are_those_that_need_trl():
    assert [name for name in accumloss.__all__ if "+SKIP" in docs(name)] == ["register_with_trl"]
