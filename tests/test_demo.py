"""The demo, with a smaller model and text than the command uses."""

import csv
import json
from pathlib import Path

import pytest
import torch

from accumloss import demo

for package in ("transformers", "tokenizers", "matplotlib", "rich"):
    pytest.importorskip(package, reason=f"the demo needs {package}")

STEPS = 2


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "VOCAB", 512)
        patch.setattr(demo, "MAX_TOKENS", 48)
        yield


@pytest.fixture(scope="module")
def result(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    demo.main(demo.Settings(out=out, steps=STEPS), as_json=True)
    return json.loads((out / "summary.json").read_text()), out


def rows_of(result, way):
    return {row["accumulation"]: row for row in result[0]["rows"] if row["way"] == way}


def test_demo_writes_its_files(result):
    summary, out = result
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "deviation.png", "loss.png", "summary.json"]
    assert {Path(name).name for name in summary["files"]} == {path.name for path in out.iterdir()}
    for name in ("loss.png", "deviation.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_demo_table_is_what_the_curves_say(result):
    summary, out = result
    with (out / "curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == STEPS * len(demo.WAYS) * len(demo.DEPTHS)
    for row in summary["rows"]:
        own = [line for line in lines if (line["way"], int(line["accumulation"])) == (row["way"], row["accumulation"])]
        assert [int(line["step"]) for line in own] == list(range(1, STEPS + 1))
        assert float(own[-1]["loss"]) == row["last_loss"]
        assert max(float(line["loss_deviation"]) for line in own) == row["max_loss_deviation"]
        assert max(float(line["weight_deviation"]) for line in own) == row["max_weight_deviation"]
        assert row["step_ms"] > 0


def test_demo_shows_the_disease_and_that_accumloss_has_it_not(result):
    sick, well = rows_of(result, demo.MEAN_OF_MEANS), rows_of(result, demo.ACCUMLOSS)
    assert set(sick) == set(well) == set(demo.DEPTHS)
    for depth in demo.DEPTHS:
        # the losses are fp32 sums over the same tokens in another grouping
        rounding = 16 * torch.finfo(torch.float32).eps * well[depth]["last_loss"]
        assert well[depth]["max_loss_deviation"] <= rounding
        if depth > 1:
            assert sick[depth]["max_loss_deviation"] > 100 * rounding
            assert sick[depth]["max_weight_deviation"] > 100 * well[depth]["max_weight_deviation"]


def test_demo_full_batch_deviates_from_nothing(result):
    full = rows_of(result, demo.TRANSFORMERS)[1]
    assert full["max_loss_deviation"] == full["max_weight_deviation"] == 0
    # one micro-batch has one mean: no disease
    assert rows_of(result, demo.MEAN_OF_MEANS)[1]["max_loss_deviation"] == pytest.approx(0, abs=1e-6)


def test_demo_depths_see_the_same_sequences():
    sequences = [[demo.START, i, i + 1] for i in range(2, 60)]
    windows = demo.windows(sequences, steps=5)
    assert [len(window) for window in windows] == [demo.WINDOW] * 5
    assert [sequence for window in windows for sequence in window][: len(sequences)] == sequences
    assert all(demo.WINDOW % depth == 0 for depth in demo.DEPTHS)


def test_demo_collate_ignores_padding_only():
    batch = demo.collate([[1, 7, 8, 9], [1, 0]], "cpu")
    assert batch["input_ids"].tolist() == [[1, 7, 8, 9], [1, 0, demo.PAD, demo.PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 7, 8, 9], [1, 0, demo.IGNORE, demo.IGNORE]]


def test_demo_models_start_equal():
    settings = demo.Settings()
    state = torch.get_rng_state()
    first, second = (demo.make_run(way, 1, settings) for way in (demo.MEAN_OF_MEANS, demo.ACCUMLOSS))
    assert torch.equal(demo.flat_weights(first), demo.flat_weights(second))
    assert torch.equal(torch.get_rng_state(), state)


def test_demo_table_prints(result, capsys):
    summary, _ = result
    demo.print_table([demo.Row(**row) for row in summary["rows"]], summary)
    printed = capsys.readouterr().out
    for text in ("mean of means", "transformers", "accumloss", "deviation", "curves.csv"):
        assert text in printed
    assert max(map(len, printed.splitlines()[:20])) <= 110


def test_demo_progress_off_a_terminal_is_plain_lines(capsys):
    with demo.progress(20) as show:
        for done in range(1, 21):
            show(done, "text")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == "step 2/20  text"
    assert len(captured.err.splitlines()) == 10


def test_demo_peak_memory_sees_a_buffer():
    peak = demo.peak_bytes(lambda: torch.ones(10_000_000), "cpu")
    if peak is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 39e6 <= peak < 60e6  # the kernel counts pages in batches
