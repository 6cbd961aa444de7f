"""The benchmark harness: right competitors are measured, wrong ones are refused, and the figures are what was measured."""

# ruff: noqa: E402 - the benchmarks are no package and are put on sys.path first
import csv
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import accumloss

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are in the repository only", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import bench_cross_entropy
import devices
import harness
import peers
import shapes
from shapes import Shape

DTYPES = ["bf16", "fp16", "fp32", "fp64"]


def losses(logits, labels):
    """Row losses (N,) of the causal loss, float32 or float64."""
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
    wide = logits.flatten(0, -2)
    wide = wide if wide.dtype == torch.float64 else wide.float()
    return F.cross_entropy(wide, shifted, reduction="none")


class Wrong(torch.autograd.Function):
    """The right loss with a gradient that was changed by a function (grad (N, V), labels (N,), n) -> grad."""

    @staticmethod
    def forward(ctx, logits, labels, n, change):
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            loss = losses(leaf, labels).sum() / n
        grad = torch.autograd.grad(loss, leaf)[0]
        shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
        ctx.save_for_backward(change(grad.flatten(0, -2).clone(), shifted, n).view_as(grad))
        return loss.detach()

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0], None, None, None


def without_label(grad, labels, n):
    rows = (labels != -100).nonzero().squeeze(1)
    grad[rows, labels[rows]] += 1 / n
    return grad


def without_one_entry(grad, labels, n):
    grad[:, 3] = 0
    return grad


def not_shifted(grad, labels, n):
    return grad.roll(1, 0)


def of_ignored_rows(grad, labels, n):
    grad[labels == -100] = torch.finfo(grad.dtype).tiny
    return grad


WRONG = {
    "unchanged": None,
    "zero": lambda grad, labels, n: torch.zeros_like(grad),
    "nan": lambda grad, labels, n: torch.full_like(grad, float("nan")),
    "doubled": lambda grad, labels, n: 2 * grad,
    "counts one item more": lambda grad, labels, n: grad * (n / (n + 1)),
    "without_label": without_label,
    "without_one_entry": without_one_entry,
    "not_shifted": not_shifted,
    "of_ignored_rows": of_ignored_rows,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRONG)
def test_harness_rejects_wrong_gradients(name, dtype):
    case = harness.Case.make(Shape(40, 301, dtype, ignored=0.3))
    change = WRONG[name] or (lambda grad, labels, n: grad)
    peer = peers.Peer(name, lambda logits, labels, n: Wrong.apply(logits, labels, n, change))
    if WRONG[name] is None:
        harness.check(case, peer)
    else:
        with pytest.raises(harness.WrongResult, match=name):
            harness.check(case, peer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_harness_rejects_wrong_losses(dtype):
    case = harness.Case.make(Shape(40, 301, dtype))
    peer = peers.Peer("mean over all rows", lambda logits, labels, n: losses(logits, labels).sum() / (n + 1))
    with pytest.raises(harness.WrongResult, match="mean over all rows"):
        harness.check(case, peer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in peers.PEERS if name != peers.COMPILE])
def test_peers_are_right(name, dtype):
    try:
        peer = peers.PEERS[name]()
    except peers.PeerMissing as reason:
        pytest.skip(str(reason))
    if name == peers.STOCK and dtype == "fp64":
        pytest.skip("transformers computes in fp32 whatever the logits are")
    if name == "accumloss forward" and dtype == "fp16":
        pytest.skip("refused by accumloss: a gradient divided by the number of items underflows")
    for shape in (Shape(40, 301, dtype), Shape(40, 9, dtype, ignored=0.5), Shape(2, 2000, dtype)):
        harness.check(harness.Case.make(shape), peer)


@pytest.mark.parametrize("inplace", ["backward", "forward"])
def test_peers_in_place_overwrite_the_logits(inplace):
    case = harness.Case.make(Shape(16, 100, "fp32"))
    _, grad = case.call(peers.accumloss(inplace))
    assert grad.data_ptr() == case.logits.data_ptr()
    assert not torch.equal(case.logits, case.source)
    case.refresh()
    assert torch.equal(case.logits, case.source)


def refuse(logits, labels, n):
    raise ValueError("not this dtype")


def test_harness_measures_what_is_right_and_names_what_is_not():
    competitors = {
        "stock": peers.Peer("stock", lambda logits, labels, n: losses(logits, labels).sum() / n),
        "wrong": peers.Peer("wrong", lambda logits, labels, n: losses(logits, labels).sum()),
        "refuses": peers.Peer("refuses", refuse),
        "absent": "needs something",
    }
    shape = Shape(32, 50, "fp32")
    results = harness.measure(shape, competitors, rounds=4, adaptive=False)
    by_name = {result.peer: result for result in results}
    assert len(by_name["stock"].ms) == len(by_name["copy"].ms) == 4
    assert by_name["wrong"].ms == by_name["absent"].ms == by_name["refuses"].ms == []
    assert by_name["refuses"].missing == "refused: not this dtype"
    assert by_name["wrong"].missing.startswith("wrong result: wrong at 32x50 fp32")
    lines = {line["peer"]: line for line in harness.figures("fresh", shape, results)}
    assert lines["absent"]["missing"] == "needs something"
    assert lines["stock"]["ratio_to_stock"] == 1
    assert lines["stock"]["ratio_to_compile"] is None


def test_figures_are_medians_of_ratios_within_rounds():
    results = [
        harness.Result("stock", [8.0, 80.0, 9.0], [0, 0, 0]),
        harness.Result("fast", [2.0, 10.0, 3.0], [1, 2, 3]),
        harness.Result("copy", [1.0, 5.0, 1.5], [0, 0, 0]),
    ]
    shape = Shape(1000, 500, "fp32")
    fast = harness.figures("fresh", shape, results)[1]
    assert fast["ms_median"] == 3
    assert fast["ratio_to_stock"] == statistics.median([4, 8, 3])
    assert fast["fraction_of_copy"] == 0.5
    assert fast["gb_per_s"] == pytest.approx(2 * 1000 * 500 * 4 / 3e-3 / 1e9)


def test_memory_of_a_call_is_seen():
    peak = devices.Cpu().peak_bytes(lambda: torch.ones(10_000_000))
    if peak is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 39e6 <= peak < 60e6  # the kernel counts pages in batches


@pytest.mark.parametrize("text", [*shapes.DEFAULT, *shapes.QUICK])
def test_shapes_default_ones_are_well_formed(text):
    assert str(Shape.parse(text)) == text.replace(":", " ")


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x4", "4x0", "4x4:int8", "4x4x4", "-4x4"])
def test_shapes_refuse_what_they_cannot_read(text):
    with pytest.raises(ValueError, match="ROWSxVOCAB"):
        Shape.parse(text)


def test_shapes_floor_reads_no_ignored_row():
    assert Shape(10, 10, "bf16").floor_bytes == 400
    assert Shape(10, 10, "bf16", ignored=0.5).floor_bytes == 300


def test_bench_writes_csv_environment_and_summary(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(Path(accumloss.__file__).parents[1]))
    arguments = ["--quick", "--shapes", "64x100:fp32", "--peers", "F.cross_entropy", "accumloss"]
    assert bench_cross_entropy.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    with (tmp_path / "cross_entropy_cpu.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == harness.COLUMNS
    assert [(line["regime"], line["peer"]) for line in lines] == [
        (regime, peer)
        for regime in ("fresh", "warmed")
        for peer in ("F.cross_entropy", "accumloss", "copy", "copy to new")
    ]
    assert all(float(line["ms_median"]) > 0 for line in lines)
    facts = json.loads((tmp_path / "cross_entropy_cpu.json").read_text())
    assert facts["threads"] == 1
    assert facts["command"].startswith("python benchmarks/bench_cross_entropy.py --quick")
    assert facts["accumloss"] == accumloss.__version__
    printed = capfd.readouterr().out
    assert printed.count("| 64 × 100 fp32 | F.cross_entropy |") == 2


def test_bench_summary_says_what_is_missing():
    lines = harness.figures("fresh", Shape(4, 5, "bf16"), [harness.Result("compile", missing="no compiler")])
    facts = {"cpu": "c", "threads": 1, "torch": "t", "transformers": "t", "accumloss": "a", "build": {}, "command": "x"}
    assert "missing: no compiler" in bench_cross_entropy.markdown(lines, facts)


def test_bench_goals_are_read_from_the_measurements():
    def line(regime, peer, dtype, vocab=32000, **more):
        found = dict.fromkeys(harness.COLUMNS)
        return {**found, "regime": regime, "peer": peer, "dtype": dtype, "vocab": vocab, "ignored": 0, **more}

    lines = [
        line("fresh", "accumloss forward", "bf16", ratio_to_stock=20.0, fraction_of_copy=0.7),
        line("fresh", "accumloss forward", "bf16", 128256, ratio_to_stock=17.0, fraction_of_copy=0.8),
        line("fresh", "accumloss forward", "bf16", 9, ratio_to_stock=1.0),
        line("warmed", "accumloss forward", "bf16", ratio_to_stock=19.0),
    ]
    found = bench_cross_entropy.goals(lines).splitlines()
    assert "| accumloss forward, bf16, over stock | >= 18 | 17.00 to 20.00, missed | 19.00 to 19.00, reached |" in found
    assert "| accumloss forward, bf16, of the copy | >= 0.6 | 0.70 to 0.80, reached | not measured |" in found


@pytest.mark.parametrize("arguments", [["--shapes", "wrong"], ["--rounds", "0"], ["--ignored", "1"], ["--peers", "x"]])
def test_bench_refuses_bad_options(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        bench_cross_entropy.main(arguments)
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_plot_draws_the_csv(tmp_path):
    pytest.importorskip("matplotlib", reason="plot.py needs matplotlib")
    import plot

    shape = Shape(4, 5, "bf16")
    results = [harness.Result(name, [1.0 + i], [0]) for i, name in enumerate([*peers.PEERS, "copy", "copy to new"])]
    lines = harness.figures("fresh", shape, results) + harness.figures("warmed", shape, results)
    table, _ = bench_cross_entropy.write(lines, {}, tmp_path)
    assert plot.main([str(table)]) == 0
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in table.with_suffix(".svg").read_text()
    assert plot.main([str(tmp_path / "absent.csv")]) == 1


def test_scaling_benchmark_and_its_pictures(tmp_path, monkeypatch, capfd):
    plot = pytest.importorskip("matplotlib", reason="plot.py needs matplotlib") and __import__("plot")
    import bench_scaling

    few = [s for s in bench_scaling.sweeps(True) if s[2].vocab <= 32000 and s[2].rows * s[2].vocab < 3e6]
    few = [(sweep, threads, shape, [n for n in names if n != "compile"]) for sweep, threads, shape, names in few]
    monkeypatch.setattr(bench_scaling, "sweeps", lambda quick: few)
    assert bench_scaling.main(["--quick", "--rounds", "1", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "heads of 9 to 1000 classes over stock, bf16 | >= 3×" in printed and "metrics add, on average" in printed
    with (tmp_path / "scaling_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {"classes", "rows", "threads", "metrics", "call"} <= {line["sweep"] for line in lines}
    assert plot.main([str(tmp_path / "scaling_cpu.csv")]) == 0
    assert (tmp_path / "scaling_cpu_memory_rows_errors.svg").exists()


def test_goals_are_read_from_the_measurements():
    import bench_scaling

    def line(sweep, peer, vocab, ms, ignored=0.0, rows=128, **more):
        found = dict.fromkeys(bench_scaling.FIELDS)
        found.update(
            sweep=sweep, peer=peer, vocab=vocab, ms_median=ms, ignored=ignored, rows=rows, dtype="bf16", missing=""
        )
        return {**found, **more}

    lines = [
        line("classes", "accumloss", 9, 1.0, ratio_to_stock=2.5, ratio_to_compile=1.5),
        line("classes", "accumloss", 1000, 1.0, ratio_to_stock=4.0, ratio_to_compile=1.5),
        line("classes", "accumloss", 32000, 10.0), line("classes", "accumloss", 32000, 1.0, ignored=0.9),
        line("metrics", "metrics", 9, 1.2), line("metrics", "no metrics", 9, 1.0),
        line("call", "accumloss", 9, 0.05),
    ]  # fmt: skip
    found = {what: (got, ok) for what, _, got, ok in bench_scaling.goals(lines)}
    assert found["heads of 9 to 1000 classes over stock, bf16"] == ("2.50 to 4.00×", False)
    assert found["heads of 9 to 1000 classes over torch.compile, bf16"][1]
    assert found["90 % ignored over none ignored, V >= 4096, accumloss"] == ("10.00 to 10.00×", True)
    assert found["metrics add, on average"] == ("20.0 % (20.0 to 20.0)", False)
    assert found["smallest call, loss and backward"] == ("50.0 to 50.0 µs", True)
    intercept, slope, distance = bench_scaling.straight_line([(1, 3.0), (2, 5.0), (4, 9.0)])
    assert abs(intercept - 1) < 1e-9 and abs(slope - 2) < 1e-9 and distance < 1e-9


def test_linear_benchmark(tmp_path, monkeypatch, capfd):
    import bench_linear

    monkeypatch.setattr(bench_linear, "SIZES", ((32, 320), (48, 640)))
    monkeypatch.setattr(bench_linear, "ROWS", 64)
    assert bench_linear.main(["--rounds", "2", "--dtypes", "fp32", "--out", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert "time over the three products, fp32" in printed and "weight error over that on logits" in printed
    with (tmp_path / "linear_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (2 * (len(bench_linear.PEERS) + 1) - 1)
    assert all(line["missing"] or float(line["ms_median"]) > 0 for line in lines)
    head = bench_linear.Head.make(32, 16, 50, torch.float32, 0.3)
    exact = bench_linear.exact_of(head)
    assert max(bench_linear.errors(bench_linear.fused(), head, exact)) < 1e-5
    assert max(bench_linear.errors(lambda h: 1.01 * bench_linear.fused()(h), head, exact)) > 5e-3


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_training_step_benchmark(tmp_path, monkeypatch, capfd, model):
    plot = pytest.importorskip("matplotlib", reason="plot.py needs matplotlib") and __import__("plot")
    import bench_training_step
    from transformers import BertConfig

    llama = bench_training_step.llama(64, 1, 128)
    bert = BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config, build = {
        "llama": (llama, bench_training_step.LlamaForCausalLM),
        "bert": (bert, bench_training_step.BertForMaskedLM),
    }[model]
    monkeypatch.setattr(bench_training_step, "MODELS", {"tiny": bench_training_step.Model(config, build, 2, 16)})
    arguments = [
        "--models",
        "tiny",
        "--ignored",
        "0",
        "0.5",
        "--dtype",
        "float32",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert bench_training_step.main(arguments) == 0
    ways = 4 if model == "llama" else 3
    assert capfd.readouterr().out.count("| tiny float32 |") == 2 * ways
    with (tmp_path / "training_step_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * ways
    timed = [line for line in lines if line["way"] != bench_training_step.FUSED]
    assert len(timed) == 6 and all(0 < float(line["loss_ms"]) < float(line["step_ms"]) for line in timed)
    assert plot.main([str(tmp_path / "training_step_cpu.csv")]) == 0


# The benchmark of a GPU, as far as a machine without one can tell ------------------------------------------------------


def test_gpu_goals_are_read_from_the_measurements():
    import bench_gpu

    def line(peer, ms, vocab=32000, **more):
        found = dict.fromkeys(bench_gpu.FIELDS)
        found.update(peer=peer, ms_median=ms, vocab=vocab, rows=8192, dtype="bf16", ignored=0.0, missing="")
        found.update(mode=bench_gpu.BOTH, grad_output=1.0)
        return {**found, **more}

    lines = [
        line("accumloss forward", 1.0, fraction_of_copy=0.95, peak_extra_over_logits=0.0),
        line("accumloss forward", 2.0, 128256, fraction_of_copy=0.92, peak_extra_over_logits=0.0),
        line("accumloss forward", 0.7, ignored=0.5),
        line("accumloss forward", 0.1, grad_output=0.5, fraction_of_copy=9.0),
        line("accumloss forward", 0.1, dtype="fp32", fraction_of_copy=9.0),
        line("accumloss", 1.0, mode=bench_gpu.FORWARD, fraction_of_read=0.96),
        line("accumloss mean", 1.5, fraction_of_copy=0.64),
        line("stock", 12.0),
        line("liger mean", 1.5),
        line("quack", None, missing="needs a GPU"),
    ]
    found = {what: (got, ok) for what, _, got, ok in bench_gpu.goals(lines)}
    assert found["in place, of the copy, V >= 32000"] == ("0.92 to 0.95", False)
    assert found["forward alone, of the read, V >= 32000"] == ("0.96 to 0.96", True)
    assert found["two visits, of a copy of their bytes, V >= 32000"] == ("0.96 to 0.96", True)
    assert found["in place over stock, V >= 32000"] == ("12.00 to 12.00", True)
    assert found["in place over liger mean, V >= 32000"] == ("1.50 to 1.50", True)
    assert found["50 % ignored over none ignored, in place"] == ("0.700 to 0.700", True)
    assert found["memory above the logits, in place, of their size"][1]
    assert not any("quack" in what for what in found)


def test_gpu_cases_cover_what_is_promised():
    import bench_gpu

    cases = bench_gpu.cases()
    assert {case.shape.rows for case in cases} == {4096, 8192, 32768}
    assert {2, 1000, 32000, 50257, 128256, 151936, 262144} <= {case.shape.vocab for case in cases}
    assert {case.shape.ignored for case in cases} == {0.0, 0.5, 0.9}
    assert {case.shape.dtype for case in cases} == {"bf16", "fp16", "fp32"}
    assert {case.grad_output for case in cases} == {1.0, 0.5}
    assert any(case.shape.rows * case.shape.vocab > 2**31 for case in cases)
    first = bench_gpu.first_cases()
    assert {case.shape.vocab for case in first} == {8192, 32000, 128256}
    assert {case.shape.rows for case in first} == {8192} and len(first) == 6


def test_harness_knows_other_gradients_of_the_loss_and_forward_alone():
    competitor = peers.Peer("stock", lambda logits, labels, n: losses(logits, labels).sum() / n)
    shape = Shape(32, 50, "fp32")
    right = harness.measure(shape, {"stock": competitor}, rounds=2, adaptive=False, grad_output=0.5)
    assert right[0].missing == "" and len(right[0].ms) == 2
    wrong = peers.Peer("wrong", lambda logits, labels, n: losses(logits, labels).sum() / n + 0 * n)
    case = harness.Case.make(shape, grad_output=0.5)
    loss, grad = case.call(wrong)
    assert harness.errors(case, loss, grad)[1] < 1e-5 < harness.errors(case, loss, 2 * grad)[1]
    alone = harness.measure(shape, {"stock": competitor}, rounds=2, adaptive=False, is_forward_only=True)
    assert alone[0].missing == "" and len(alone[0].ms) == 2
    assert not case.forward(competitor).requires_grad


def gpu_script(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    environment["PYTHONPATH"] = str(Path(accumloss.__file__).parents[1])
    command = ["bash", str(BENCHMARKS / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def steps_of(ran):
    """Name -> what became of it, and the seconds of all."""
    found = re.findall(r"^(\S.*?) +\d+ s  from +\d+ s  (.+)$", ran.stdout, re.MULTILINE)
    (seconds,) = re.findall(r"^end of \w+ after (\d+) s$", ran.stdout, re.MULTILINE)
    return dict(found), int(seconds)


@pytest.mark.slow("starts every program of the script; the pieces have tests of their own")
def test_gpu_script_runs_dry_in_two_parts(tmp_path):
    ran = gpu_script("rest", "--dry-run", tmp_path)
    assert ran.returncode == 2 and "gpu.sh first: run that before" in ran.stdout
    ran = gpu_script("first", "--dry-run", tmp_path, BENCH_SECONDS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps, seconds = steps_of(ran)
    assert steps == dict.fromkeys(["modules", "every kernel", "tests that say most", "benchmark"], "ok")
    assert seconds <= 240
    assert (tmp_path / "gpu.md").read_text().startswith("# Dry run")
    first = list(csv.DictReader((tmp_path / "gpu.csv").read_text().splitlines()))
    assert first[0]["vocab"] == "32000" and {line["peer"] for line in first} >= {"accumloss", "accumloss forward"}

    ran = gpu_script("rest", "--dry-run", tmp_path, BENCH_SECONDS="1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    steps, seconds = steps_of(ran)
    names = ["tests on CUDA", "head and loss", "benchmark", "picture", "calls of the sanitizer"]
    assert steps == dict.fromkeys(names, "ok")
    assert seconds <= 600
    with (tmp_path / "gpu.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    by_peer = {line["peer"]: line for line in lines if line["mode"] == "forward + backward"}
    assert float(by_peer["accumloss forward"]["ms_median"]) > 0
    assert "needs a GPU" in by_peer["quack"]["missing"] or torch.cuda.is_available()
    assert "the time was used up: 128x128256" in (tmp_path / "gpu.md").read_text()
    assert len(list(tmp_path.iterdir())) <= 8
    assert (tmp_path / "gpu.png").exists() and json.loads((tmp_path / "gpu.json").read_text())["not_measured"]
    log = (tmp_path / "log.txt").read_text()
    assert "end of first" in log and "end of rest" in log


def test_gpu_script_names_what_is_missing_before_it_starts(tmp_path):
    """Each of it, and nothing is written."""
    old = tmp_path / "old"
    for name, version in (("setuptools", "76.1"), ("pytest", "7.4")):
        (old / f"{name}-{version}.dist-info").mkdir(parents=True)
        (old / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    (old / "peer.whl").touch()
    with (old / "large.whl").open("wb") as file:
        file.truncate(65 << 20)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(old), "PEER_WHEELS": str(old)}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "first", str(out)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "setuptools >= 77: 76.1 is installed" in ran.stdout and "pytest >= 8: 7.4 is installed" in ran.stdout
    assert "expected at most 64 MiB, got 65" in ran.stdout
    if not torch.cuda.is_available():
        assert "torch.cuda.is_available() is false" in ran.stdout
    assert list(out.iterdir()) == []
    ran = gpu_script("first", "--dry-run", out, PYTHON=str(tmp_path / "no-python"))
    assert ran.returncode == 2 and "PYTHON names the interpreter" in ran.stdout
    ran = gpu_script("everything")
    assert ran.returncode == 2 and "gpu.sh first [--dry-run]" in ran.stdout


def test_gpu_script_limits_are_never_negative(tmp_path):
    """What begins when the time is used up is named, and its limit is no negative number."""
    text = (BENCHMARKS / "gpu.sh").read_text()
    functions = text[text.index("# seconds_left RESERVE") : text.index("# --- what is missing")]
    script = f"""set -u; log={tmp_path}/log; failed=0; summary=(); total=2; root=/; out=/
{functions}
step quick 5 true; step slow 10 sleep 10; step late 5 true; step "ours?" 5 false; total=100
step "looked at?" 5 false; printf '%s\\n' "${{summary[@]}}"; echo "$(seconds_left 1000) $failed"
"""
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    found = dict(re.findall(r"^(\S.*?) +\d+ s  from +\d+ s  (.+)$", ran.stdout, re.MULTILINE))
    assert found["quick"] == "ok" and re.fullmatch(r"FAILED: over [12] s", found["slow"])
    assert found["late"] == found["ours"] == "FAILED: no time was left"
    assert found["looked at"] == "to be looked at, see the log: exit status 1"
    assert ran.stdout.endswith("0 1\n") and "-" not in "".join(re.findall(r"at most (\S+) s", ran.stdout))


def test_gpu_benchmark_writes_after_every_case_and_resumes(tmp_path, monkeypatch):
    import bench_gpu
    import record

    shapes = [Shape(4, vocab, "bf16") for vocab in (10, 20, 30)]
    monkeypatch.setattr(bench_gpu, "cases", lambda: [bench_gpu.Case(shape, ["accumloss"]) for shape in shapes])
    found = []

    def measure(case, device, available, rounds):
        if (tmp_path / "gpu.csv").exists():
            found.append([line["vocab"] for line in record.read_csv(tmp_path / "gpu.csv")])
        if case.shape.vocab == 30:
            raise KeyboardInterrupt  # as the limit of the script would
        line = dict.fromkeys(bench_gpu.FIELDS)
        more = {
            "rows": 2,
            "vocab": case.shape.vocab,
            "dtype": "bf16",
            "ignored": 0.0,
            "missing": "",
            "peer": "accumloss",
        }
        return [
            {
                **line,
                **more,
                "mode": case.mode,
                "grad_output": case.grad_output,
                "ms_median": 1.5,
                "fraction_of_copy": 0.5,
            }
        ]

    monkeypatch.setattr(bench_gpu, "measure", measure)
    arguments = ["--dry-run", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main(arguments)
    assert found == [[10], [10, 20]]
    lines = record.read_csv(tmp_path / "gpu.csv")
    assert [(line["vocab"], line["ms_median"], line["missing"], line["peak_extra_bytes"]) for line in lines] == [
        (10, 1.5, "", None), (20, 1.5, "", None)]  # fmt: skip
    assert "2x30 bf16" in (tmp_path / "gpu.md").read_text()  # not measured
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main([*arguments, "--resume"])
    assert [line["vocab"] for line in record.read_csv(tmp_path / "gpu.csv")] == [10, 20]
    monkeypatch.setattr(bench_gpu, "cases", lambda: [bench_gpu.Case(Shape(4, 40, "bf16"), ["accumloss"])])
    bench_gpu.main([*arguments, "--resume"])
    assert [line["vocab"] for line in record.read_csv(tmp_path / "gpu.csv")] == [10, 20, 40]
    bench_gpu.main(arguments)
    assert [line["vocab"] for line in record.read_csv(tmp_path / "gpu.csv")] == [40]


def test_gpu_benchmark_refuses_to_write_figures_that_mean_nothing(capsys):
    import bench_gpu

    with pytest.raises(SystemExit):
        bench_gpu.main(["--dry-run"])
    assert "--dry-run: expected --out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            bench_gpu.main([])
        assert "no GPU is here" in capsys.readouterr().err


def test_figures_of_plain_pytorch_are_refused(tmp_path, monkeypatch):
    """Before they are taken where the device tells, else before they are written."""
    import devices
    import record

    from accumloss import fallback

    record.refuse_fallback("cpu")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fallback, "_architectures", lambda: None)
    for refused in (devices.Cuda, lambda: record.refuse_fallback("xpu")):
        with pytest.raises(SystemExit, match=r"benchmarks: expected a device with kernels, got (cuda|xpu): "):
            refused()
    monkeypatch.setitem(fallback.served, "xpu", "a test")
    with pytest.raises(RuntimeError, match="got plain PyTorch on xpu"):
        record.write(tmp_path, "figures", ["a"], [{"a": 1}], {})
    assert not list(tmp_path.iterdir())


def test_the_fallback_is_timed_on_its_own(monkeypatch, capsys):
    import bench_fallback

    from accumloss import fallback

    monkeypatch.setattr(fallback, "served", {})
    monkeypatch.setattr("sys.argv", ["bench_fallback.py", "--rows", "8", "--vocab", "50", "--rounds", "1"])
    bench_fallback.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * 3
    assert fallback.served.keys() == {"cpu"}  # that is what was timed
    logits = torch.randn(3, 700)
    with pytest.raises(IndexError):  # and the kernels are back
        torch.ops.accumloss.cross_entropy(logits, torch.full((3,), 700))


def test_sanitizer_is_shown_every_kernel():
    """Each kernel in each pass and dtype that the table can choose it for."""
    sys.path.insert(0, str(BENCHMARKS.parent / "tests" / "cuda"))
    import every_kernel

    found = {(kernel, call, dtype) for _, dtype, _, call, kernel in every_kernel.calls("sm_90")}
    for V in (2, 64, 65, 1024, 1025, 5003, 50257, 128256, 400000):
        for dtype in every_kernel.DTYPES:
            for call in every_kernel.CALLS:
                assert (accumloss.plan(V, dtype, arch="sm_90", call=call).kernel, call, dtype) in found


def test_vocabulary_errors(capfd):
    import vocabulary_errors

    vocabulary_errors.main(["--rows", "4", "--vocab", "1000"])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 + len(vocabulary_errors.OPTIONS)
    assert all(float(error) < 1e-6 for line in lines[2:] for error in line.split("|")[2].split("/"))


@pytest.mark.slow("a launch of two ranks; what they compute is tested by others")
@pytest.mark.xdist_group("torchrun")
def test_vocabulary_benchmark(tmp_path, capfd):
    import bench_vocabulary
    import record

    assert bench_vocabulary.main(["--rows", "8", "--vocab", "4096", "--rounds", "1", "--out", str(tmp_path)]) == 0
    lines = {line["way"]: line for line in record.read_csv(tmp_path / "vocabulary_cpu.csv")}
    assert len(lines) == 6
    for line in lines.values():
        assert line["loss_error"] < 1e-5
        assert line["gradient_error"] < 2.0**-8
    ours = lines["accumloss, group="]
    assert (ours["collectives"], ours["bytes"]) == (1, 16 * 8 + 16)
    assert lines["gathered, torch"]["bytes"] == 8 * 2048 * 2
    with pytest.raises(SystemExit):
        bench_vocabulary.main(["--vocab", "33"])
    assert "expected multiples of --ranks 2" in capfd.readouterr().err


@pytest.mark.slow("a measurement; what a call computes is tested in the fast tier")
def test_the_smallest_call_takes_little_more_than_pytorch():
    """benchmarks/overhead.py measures 1.25 and 1.54; a call that is checked or wrapped twice is beyond these bounds."""
    pytest.importorskip("transformers")
    import overhead

    found = overhead.smallest_calls(turns=150)
    assert found[overhead.OURS][1] <= 1.6, found
    assert found[overhead.OUR_OP][1] <= 2.0, found


def test_tokens_are_measured_and_a_wrong_answer_is_not_timed(tmp_path, monkeypatch, capsys, threads):
    import bench_tokens
    import record

    threads(1)
    arguments = ["--rows", "8", "--vocab", "700", "--rounds", "1", "--note", "a test", "--out", str(tmp_path)]
    assert bench_tokens.main(arguments) == 0
    lines = record.read_csv(tmp_path / "tokens_cpu.csv")
    assert len(lines) == 2 * 2 * len(bench_tokens.TASKS)
    assert all(line["ratio_to_plain"] == 1 for line in lines if line["way"] == "plain")
    assert '"note": "a test"' in (tmp_path / "tokens_cpu.json").read_text()
    plain, ours = bench_tokens.TASKS["row losses"]
    wrong = {"row losses": (plain, lambda x, data: 1.001 * ours(x, data))}
    monkeypatch.setattr(bench_tokens, "TASKS", wrong)
    with pytest.raises(RuntimeError, match="bench_tokens: expected errors of at most 1e-6"):
        bench_tokens.main(arguments)
