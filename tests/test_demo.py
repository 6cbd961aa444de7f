"""The demo, with a smaller vocabulary and shorter sequences than the command uses."""

import csv
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS

from accumloss import demo

for package in demo.PACKAGES:
    pytest.importorskip(package, reason=f"the demo needs {package}")

from accumloss.demo import causal, masked, measure, pictures, report, runs, text  # noqa: E402  they import those packages

STEPS = 2
PYTHONS_TEXT = text.read_text


def paragraphs() -> list[str]:
    """Of 1 to 60 words, some frequent and most rare."""
    generator = random.Random(0)
    syllables = [a + b for a in "bdfglmnprst" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(600)]
    weights = [1 / rank for rank in range(1, 601)]
    return [" ".join(generator.choices(words, weights, k=generator.randint(1, 60))) for _ in range(1000)]


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "VOCAB", 512)
        patch.setattr(text, "MAX_TOKENS", 48)
        patch.setattr(text, "read_text", paragraphs)  # Python's own differs from version to version
        yield


@pytest.fixture(scope="module")
def demo_result(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    demo.main(demo.Settings(out=out, steps=STEPS), as_json=True)
    return json.loads((out / "summary.json").read_text()), out


def rows_of(demo_result, task, way):
    return {row["accumulation"]: row for row in demo_result[0][task]["rows"] if row["way"] == way}


def test_demo_reads_pythons_language_reference():
    found = PYTHONS_TEXT()
    assert len(found) > 1000 and all(part.strip() for part in found)
    assert any("generator" in part for part in found)


def test_demo_writes_its_files(demo_result):
    summary, out = demo_result
    files = ["curves.csv", "deviation.png", "loss.png", "masked_lm.png", "summary.json"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert sorted(Path(name).name for name in summary["files"]) == files
    for name in files[1:4]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_demo_tables_are_what_the_curves_say(demo_result):
    summary, out = demo_result
    with (out / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == STEPS * len(runs.DEPTHS) * sum(map(len, runs.WAYS.values()))
    for task in runs.WAYS:
        for row in summary[task]["rows"]:
            key = (task, row["way"], row["accumulation"])
            own = [line for line in lines if (line["task"], line["way"], int(line["accumulation"])) == key]
            assert [int(line["step"]) for line in own] == list(range(1, STEPS + 1))
            assert float(own[-1]["loss"]) == row["last_loss"]
            assert max(float(line["loss_deviation"]) for line in own) == row["max_loss_deviation"]
            assert max(float(line["weight_deviation"]) for line in own) == row["max_weight_deviation"]
            assert row["step_ms"] > 0


def test_demo_shows_that_trainer_adds_up_the_means_of_a_masked_lm(demo_result):
    stock = rows_of(demo_result, runs.MASKED_LM, runs.TRANSFORMERS)
    assert set(stock) == set(runs.DEPTHS)
    assert stock[4]["gradient_ratio"] > 3
    assert stock[16]["gradient_ratio"] > 12
    # logged: the losses of k micro-batches added up
    assert stock[4]["max_loss_deviation"] > 2 * stock[1]["last_loss"]
    # weights: a step k times as long
    assert stock[4]["max_weight_deviation"] > 2


def test_demo_accumloss_is_exact_for_a_masked_lm(demo_result):
    exact = rows_of(demo_result, runs.MASKED_LM, runs.ACCUMLOSS)
    assert set(exact) == set(runs.DEPTHS)
    for row in exact.values():
        assert row["gradient_ratio"] == pytest.approx(1, abs=TRAINER_GRADIENT)
        assert row["max_loss_deviation"] <= TRAINER_LOSS * row["last_loss"]
        assert row["max_weight_deviation"] <= TRAINER_GRADIENT  # plain SGD: the distance trained is made of gradients


def test_demo_shows_the_mean_of_means_and_that_accumloss_has_it_not(demo_result):
    sick = rows_of(demo_result, runs.CAUSAL_LM, runs.MEAN_OF_MEANS)
    well = rows_of(demo_result, runs.CAUSAL_LM, runs.ACCUMLOSS)
    assert set(sick) == set(well) == set(runs.DEPTHS)
    for depth in runs.DEPTHS:
        # the losses are fp32 sums over the same tokens in another grouping
        rounding = TRAINER_LOSS * well[depth]["last_loss"]
        assert well[depth]["max_loss_deviation"] <= rounding
        assert well[depth]["gradient_ratio"] == pytest.approx(1, abs=TRAINER_GRADIENT)
        if depth > 1:
            assert sick[depth]["max_loss_deviation"] > 100 * rounding
            assert sick[depth]["max_weight_deviation"] > 100 * well[depth]["max_weight_deviation"]


def test_demo_full_batch_deviates_from_nothing(demo_result):
    for task in runs.WAYS:
        full = rows_of(demo_result, task, runs.TRANSFORMERS)[1]
        assert full["gradient_ratio"] == 1
        assert full["max_loss_deviation"] == full["max_weight_deviation"] == 0
    # one micro-batch has one mean: no disease
    one = rows_of(demo_result, runs.CAUSAL_LM, runs.MEAN_OF_MEANS)[1]
    assert one["max_loss_deviation"] <= TRAINER_LOSS * one["last_loss"]


def test_demo_depths_see_the_same_sequences():
    sequences = [[text.START, i, i + 1] for i in range(2, 60)]
    windows = text.windows(sequences, steps=5)
    assert [len(window) for window in windows] == [runs.WINDOW] * 5
    assert [sequence for window in windows for sequence in window][: len(sequences)] == sequences
    assert all(runs.WINDOW % depth == 0 for depth in runs.DEPTHS)


def test_demo_trainer_takes_the_examples_in_order(tmp_path):
    examples = [{"input_ids": [text.START, i], "labels": [text.IGNORE, i]} for i in range(2, 2 + 2 * runs.WINDOW)]
    settings = demo.Settings(out=tmp_path)
    for depth in runs.DEPTHS:
        run = runs.Run(runs.TRANSFORMERS, depth, masked.make_model(0, "cpu"))
        batches = list(masked.make_trainer(run, examples, settings).get_train_dataloader())
        assert {len(batch["labels"]) for batch in batches} == {runs.WINDOW // depth}
        assert torch.cat([batch["labels"][:, 1] for batch in batches]).tolist() == [e["labels"][1] for e in examples]


def test_demo_masks_a_share_of_the_text_and_keeps_it_as_labels():
    sequence = [text.START, *range(100, 140)]
    example = text.masked(sequence, random.Random(3))
    assert example == text.masked(sequence, random.Random(3))
    hidden = [i for i, label in enumerate(example["labels"]) if label != text.IGNORE]
    assert len(hidden) == round(text.MASKED_SHARE * 40)
    assert 0 not in hidden
    for i, token in enumerate(sequence):
        assert (example["input_ids"][i], example["labels"][i]) == (
            (text.VOCAB, token) if i in hidden else (token, text.IGNORE)
        )
    assert text.masked([text.START, 7], random.Random(0)) == {
        "input_ids": [text.START, text.VOCAB],
        "labels": [text.IGNORE, 7],
    }


def test_demo_collate_ignores_padding_only():
    batch = causal.collate([[1, 7, 8, 9], [1, 0]], "cpu")
    assert batch["input_ids"].tolist() == [[1, 7, 8, 9], [1, 0, text.PAD, text.PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 7, 8, 9], [1, 0, text.IGNORE, text.IGNORE]]


@pytest.mark.parametrize("module", [causal, masked])
def test_demo_models_start_equal(module):
    state = torch.get_rng_state()
    first, second = (module.make_model(0, "cpu") for _ in range(2))
    assert torch.equal(runs.flat_weights(first), runs.flat_weights(second))
    assert torch.equal(torch.get_rng_state(), state)


def test_demo_tables_print(demo_result, capsys):
    summary, _ = demo_result
    report.print_tables(summary)
    printed = capsys.readouterr().out
    for words in ("mean of means", "transformers", "accumloss", "deviation", "BertForMaskedLM", "curves.csv"):
        assert words in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 120


def test_demo_shows_what_has_diverged(demo_result, tmp_path, capsys):
    summary, out = demo_result
    assert math.isnan(runs.largest([1.0, math.nan, 2.0]))
    assert runs.largest([1.0, math.inf, 2.0]) == math.inf
    row = runs.Row(runs.TRANSFORMERS, 16, math.nan, 16.0, math.inf, math.nan, 1.0, None)
    report.print_tables({**summary, runs.MASKED_LM: {**summary[runs.MASKED_LM], "rows": [vars(row)]}})
    printed = capsys.readouterr().out
    assert "nan" in printed
    assert "inf" in printed

    curves = report.read_curves(out / "curves.csv")[runs.MASKED_LM]
    curves[runs.TRANSFORMERS, 16]["loss"][-1] = math.nan
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.annotate", lambda axis, label, *args, **kwargs: texts.append(label))
        pictures.plot_masked_lm(curves, tmp_path / "masked_lm.png")
    assert texts == ["not a number"]


def test_demo_progress_off_a_terminal_is_plain_lines(capsys):
    with report.progress(20) as show:
        for done in range(1, 21):
            show(done, "text")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == "step 2/20  text"
    assert len(captured.err.splitlines()) == 10


def test_demo_refuses_a_gpu_that_trainer_would_not_take(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "empty", lambda *args, device: SimpleNamespace(device=torch.device(device)))
    with pytest.raises(demo.DemoError, match="CUDA_VISIBLE_DEVICES=1"):
        demo.check(demo.Settings(out=tmp_path, device="cuda:1"))
    demo.check(demo.Settings(out=tmp_path, device="cuda:0"))


def test_demo_peak_memory_sees_a_buffer():
    peak = measure.peak_bytes(lambda: torch.ones(10_000_000), "cpu")
    if peak is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 39e6 <= peak < 60e6  # the kernel counts pages in batches


def test_demo_says_what_came_out(demo_result, capsys):
    report.print_tables(demo_result[0])
    printed = capsys.readouterr().out
    assert printed.count("accumloss: all splits train alike") == 2
    assert "transformers: the splits train apart" in printed and "mean of means: the splits train apart" in printed
    assert "python -m accumloss audit MODEL" in printed
