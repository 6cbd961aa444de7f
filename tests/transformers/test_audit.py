"""The audit finds what is wrong and says what it is; the census runs classes in processes that may fail."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from training import LENGTH, build, rows

import accumloss
from accumloss.__main__ import main
from accumloss.auditing import AuditError, audit_rows, census, measure, models, tiny, trainers, worker
from accumloss.auditing.report import verdict, what_to_do


@pytest.fixture(scope="module")
def bert():
    return build("BertForMaskedLM")


@pytest.fixture(scope="module")
def report(bert):
    return audit_rows(bert, rows(), groups=True)


def test_audit_finds_stock_wrong_and_accumloss_exact(report):
    assert not report.is_exact("stock") and report.is_exact()
    assert [step.split for step in report.of("stock")] == ["8x1", "4x2", "3+3+2"]
    assert all(step.cause == measure.SUM_OF_MEANS and step.ratio > 2 for step in report.of("stock"))
    assert all(step.gradient_error < 1e-5 and step.loss_error < 1e-6 for step in report.of("accumloss"))
    assert report.reason == ""
    assert report.noise < 1e-6


def test_audit_evaluates_in_batches_of_each_size(report):
    assert report.evaluation["stock"] > 1e-3 and report.evaluation["accumloss"] < measure.SAME_LOSS
    assert "stock: eval_loss depends on the batch size" in verdict(report)
    assert "accumloss: eval_loss is the same for every batch size" in verdict(report)


def test_audit_reports_the_groups_of_parameters(report):
    groups = report.worst("stock").groups
    assert set(groups) == {"bert.embeddings", "bert.encoder", "cls.predictions"}
    assert all(error > 1 for error in groups.values())
    assert all(error < 1e-5 for error in report.worst("accumloss").groups.values())


def test_a_report_is_json(report):
    found = json.loads(json.dumps(report.to_dict()))
    assert found["exact"] == {"stock": False, "accumloss": True}
    assert len(found["steps"]) == 6 and found["steps"][0]["micro_batches"] == 8


def test_audit_leaves_the_model_and_the_registration_alone(bert):
    before = {name: p.clone() for name, p in bert.named_parameters()}
    accumloss.register_with_transformers()
    try:
        names = accumloss.registered_losses()
        accumloss.audit(bert, [measure.collate(rows()[:4])], batch_sizes=(2,))
        assert accumloss.registered_losses() == names
    finally:
        accumloss.unregister_from_transformers()
    assert bert.training and all(torch.equal(p, before[name]) for name, p in bert.named_parameters())
    assert all(p.grad is None for p in bert.parameters())


def test_audit_pads_batches_of_different_lengths(bert):
    whole = rows()
    short = [{key: value[:5] for key, value in row.items()} for row in whole[:4]]
    short[0]["labels"][:2] = torch.tensor([3, 4])
    found = accumloss.audit(bert, [measure.collate(short), measure.collate(whole[4:])], batch_sizes=(3,))
    assert found.rows == 8 and found.is_exact()
    padded = measure.rows_of([measure.collate(short), measure.collate(whole[4:])])
    assert padded[0]["labels"].shape == (LENGTH,) and padded[0]["labels"][5:].eq(-100).all()
    assert padded[0]["attention_mask"][5:].eq(0).all()


class OwnModel(torch.nn.Module):
    """A classifier over random vectors whose loss is chosen."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, labels=None, **kwargs):
        y = self.linear(x)
        if self.kind == "contrastive":
            loss = torch.nn.functional.cross_entropy(y @ y.T, torch.arange(len(y)))
        elif self.kind == "sum":
            loss = y.pow(2).sum()
        elif self.kind == "random":
            loss = (y * torch.rand_like(y)).mean()
        elif self.kind == "none":
            return {"logits": y}
        elif self.kind == "no gradient":
            loss = y.detach().sum()
        elif self.kind == "infinite":
            loss = y.mean() / 0
        else:
            loss = torch.nn.functional.mse_loss(y, x)
        return {"loss": loss, "logits": y}


def vectors(count: int = 8) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, 4, generator=torch.Generator().manual_seed(0))}


def test_a_coupled_loss_is_called_so():
    found = accumloss.audit(OwnModel("contrastive"), [vectors()])
    assert not found.is_exact()
    assert "coupled over the batch" in found.reason and found.distance > measure.COUPLED
    told = [step.told for step in found.steps if step.told]
    assert told and all(" of Trainer " in each and "SequentialTrainer" not in each for each in told)  # the user's name


def test_a_loss_that_no_weighting_mends_is_told_from_one_that_was_not_recognised():
    found = accumloss.audit(OwnModel("sum"), [vectors()])
    assert not found.is_exact() and found.distance < 1e-6
    assert "not recognised" in found.reason


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "audit: expected OwnModel to return a loss for these entries: x"),
        ("no gradient", "audit: expected the loss of OwnModel to have a gradient, got none"),
        ("infinite", "audit: expected a finite loss and gradient of OwnModel"),
        ("random", "audit: expected a loss of OwnModel that is the same every time, got a random one"),
    ],
)
def test_losses_that_cannot_be_audited(kind, message):
    with pytest.raises(AuditError, match=message):
        accumloss.audit(OwnModel(kind), [vectors()])


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([vectors()], {"ways": ("mine",)}, "audit: expected ways of stock, accumloss, got mine"),
        ([vectors(1)], {}, "audit: expected more rows than one micro-batch holds, got 1"),
        ([{"x": 3}], {}, "audit: expected batches of tensors"),
        ([{**vectors(4), "labels": torch.zeros(3)}], {}, "audit: expected 4 rows in every entry"),
        ([vectors(4), {**vectors(4), "labels": torch.zeros(4)}], {}, "audit: expected the same entries in every batch"),
    ],
)
def test_bad_input(batches, options, message):
    with pytest.raises(AuditError, match=message):
        accumloss.audit(OwnModel("mean"), batches, **options)


# What the steps are held against --------------------------------------------------------------------------------------


def gradients(*values: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float64)}


def test_cause_of_a_step():
    parts = [gradients(1, 2, 3), gradients(-4, 0, 5)]
    assert measure.cause_of(gradients(-3, 2, 8), parts, 1.0) == measure.SUM_OF_MEANS
    assert measure.cause_of(gradients(-1.5, 1, 4), parts, 0.5) == measure.MEAN_OF_MEANS
    assert measure.cause_of(gradients(-1.5, 1, 4.1), parts, 0.5) == measure.MISCOUNTED
    assert measure.cause_of(gradients(1, 1, 1), parts, float("nan")) == measure.NOT_A_NUMBER
    assert measure.cause_of(gradients(1, 1, 1), parts, 0.0) == measure.WRONG_LOSS


def test_distance_to_span():
    parts = [gradients(1, 2, 3), gradients(-4, 0, 5)]
    assert measure.distance_to_span(gradients(-2, 2, 8), parts) < 0.3
    inside = measure.combined(parts, [0.25, 0.6])
    assert measure.distance_to_span(inside, parts) < 1e-12
    outside = gradients(0, 1, 0)
    assert measure.distance_to_span(outside, parts) > 0.1


def test_what_one_gradient_lacks_is_zero():
    assert measure.norm(measure.difference({**gradients(3), "b": torch.tensor([4.0])}, gradients(3))) == 4
    assert measure.norm(measure.difference(gradients(3), {**gradients(3), "b": torch.tensor([4.0])})) == 4


def test_batch_normalisation_is_pytorchs_in_eval_mode():
    norm = torch.nn.BatchNorm2d(3).eval()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(measure._normalized(norm, x), norm(x), atol=1e-6)


# The command ----------------------------------------------------------------------------------------------------------


def test_audit_of_a_class_by_name(capsys):
    assert main(["audit", "BertForMaskedLM", "--json", "--batch-sizes", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "BertForMaskedLM" and found["exact"] == {"stock": False, "accumloss": True}


def test_audit_prints_a_table(capsys):
    assert main(["audit", "BertForMaskedLM", "--batch-sizes", "4", "--groups"]) == 0
    out = capsys.readouterr().out
    assert "2x4" in out and "sum of means" in out and "accumloss: exact" in out and "cls.predictions" in out
    assert "its size, of that of the one batch: 1 is right" in out  # what the columns are
    assert " MB" not in out and " ms" not in out  # a tiny model's say nothing
    assert out.rstrip().splitlines()[-1].startswith("what to do: call accumloss.register_with_transformers()")


def test_audit_says_what_to_do():
    def found(stock, ours, evaluation, **more):
        steps = [
            measure.StepResult(way, "4x2", 4, 1.0, error, error, "" if error < 1e-4 else measure.SUM_OF_MEANS, 0.0, 0.0)
            for way, error in (("stock", stock), ("accumloss", ours))
        ]
        return measure.Report("Model", 8, 1.0, 0.0, steps, evaluation={"stock": evaluation}, **more)

    assert what_to_do(found(1e-7, 1e-7, 0.0)).startswith("nothing")
    assert "eval_loss" in what_to_do(found(1e-7, 1e-7, 1e-2))
    assert what_to_do(found(3.0, 1e-7, 0.0)).startswith("call accumloss.register_with_transformers()")
    assert what_to_do(found(3.0, 1.0, 0.0, remedy="a larger batch")) == "a larger batch"


def test_audit_of_an_own_model(capsys, tmp_path, monkeypatch):
    source = Path(__file__).read_text()
    (tmp_path / "own_audit.py").write_text(
        "import torch\n"
        + source[source.index("class OwnModel") : source.index("def test_a_coupled_loss")]
        + 'def make():\n    return OwnModel("contrastive"), [vectors()]\n\ndef wrong():\n    return 3\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["audit", "--factory", "own_audit:make"]) == 1
    assert "coupled over the batch" in " ".join(capsys.readouterr().out.split())
    for factory, message in (
        ("own_audit:wrong", "expected own_audit:wrong() to return (model, batches) or a Trainer, got int"),
        ("own_audit:missing", "expected --factory own_audit:missing to import"),
        ("nonsense", "expected --factory pkg.module:function, got 'nonsense'"),
    ):
        assert main(["audit", "--factory", factory]) == 2
        assert message in capsys.readouterr().err


def test_audit_of_a_folder(bert, capsys, tmp_path):
    bert.save_pretrained(tmp_path)
    assert main(["audit", str(tmp_path), "--json", "--batch-sizes", "4"]) == 0
    assert "its own weights" in json.loads(capsys.readouterr().out)["note"]


def refused(capsys, *arguments):
    """The one line with which the audit refuses."""
    assert main(["audit", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def imports_little(monkeypatch):
    """An answer in seconds: not all of transformers' models are imported for it."""

    def import_all():
        raise AssertionError("all models were imported")

    monkeypatch.setattr(tiny, "_classes", import_all)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("BertForMaskedML", "got 'BertForMaskedML'; near: BertForMaskedLM"),
        ("bertformaskedlm", "near: BertForMaskedLM"),
        ("BertModel", "got 'BertModel', which computes none; those of its family do: BertForMaskedLM, BertLMHeadModel"),
        ("Bert", "near: Bert"),
        ("DPOTrainer", "a Trainer of a library is audited by --trainers --only DPOTrainer"),
        ("qqqq", "python -m accumloss audit --help says what MODEL may be"),
        ("./nowhere", "expected MODEL to be a folder, got ./nowhere, where there is none"),
        ("out/checkpoint/5", "expected MODEL to be a folder, got out/checkpoint/5, where there is none"),
    ],
)
def test_names_that_stand_for_nothing(name, said, capsys, imports_little):
    assert said in refused(capsys, name)


def test_names_that_are_not_one(capsys):
    assert "expected one of MODEL, --factory, --all and --trainers" in refused(capsys)
    assert "expected one of MODEL, --factory, --all and --trainers" in refused(capsys, "BertForMaskedLM", "--all")


def test_a_census_of_unknown_classes_says_which_are_near(capsys):
    assert "got BertForMaskedML; near: BertForMaskedLM" in refused(capsys, "--all", "--only", "BertForMaskedML")


def test_classes_of_a_configuration_are_found_without_importing_all(imports_little):
    for name in ("BertConfig", "bert"):
        found = [cls.__name__ for cls in models._of_configuration(name)]
        assert found[:2] == ["BertForMaskedLM", "BertLMHeadModel"] and "BertForTokenClassification" in found
        assert all(name.startswith("Bert") for name in found)
    assert [cls.__name__ for cls in models._of_configuration("xlm-roberta")][:1] == ["XLMRobertaForCausalLM"]
    assert models._of_configuration("no-such-type") == []


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_a_hub_id_that_cannot_be_reached_is_told_at_once(name, capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, variable, str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    begin = time.perf_counter()
    said = refused(capsys, name)
    assert time.perf_counter() - begin < 4 * models.HUB_SECONDS
    assert f"expected {name} to be" in said and "http://127.0.0.1:9 cannot be reached" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "nothing of it in the cache of this machine, and HF_HUB_OFFLINE is set" in refused(capsys, name)


# The census -----------------------------------------------------------------------------------------------------------


def test_census_survives_classes_that_crash_or_hang(tmp_path, monkeypatch):
    (tmp_path / "crashing_module.py").write_text("import os; os._exit(3)")
    (tmp_path / "hanging_module.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    classes = {
        "BertForTokenClassification": "transformers.models.bert.modeling_bert",
        "Crash": "crashing_module",
        "Hang": "hanging_module",
    }
    state = tmp_path / "state.jsonl"
    lines = {line["name"]: line for line in census.run(classes, state, jobs=1, time_limit=25)}
    assert lines["Crash"]["reason"] == "the process ended with status 3"
    assert lines["Hang"]["reason"] == "took longer than 25 s"
    found = lines["BertForTokenClassification"]
    assert found["status"] == "run" and found["accumloss"]["exact"] and not found["stock"]["exact"]

    # what is done is not done again
    asked: list[str] = []
    monkeypatch.setattr(census.Worker, "ask", lambda self, module, name, limit: asked.append(name))
    assert len(census.run(classes, state, jobs=1, time_limit=25)) == 3
    assert asked == []


def line(name: str, stock: bool, ours: bool, status: str = "run") -> dict:
    def result(exact: bool) -> dict:
        return {
            "exact": exact,
            "split": "8x1",
            "ratio": 1.0 if exact else 8.0,
            "gradient_error": 0.0 if exact else 7.0,
            "loss_error": 0.0,
            "cause": "" if exact else "sum of means",
            "evaluation_difference": 0.0 if exact else 0.01,
        }

    found = {"name": name, "module": "m", "head": "masked LM", "status": status, "reason": "why", "seconds": 1.0}
    if status == "run":
        found.update(stock=result(stock), accumloss=result(ours), distance=None, noise=1e-7, dtype="fp32")
    return found


def test_census_counts(tmp_path):
    lines = [
        line("AForMaskedLM", False, True),
        line("BForMaskedLM", True, True),
        {**line("CLIPModel", False, False), "head": "contrastive"},
        line("DForMaskedLM", False, False),
        line("EForMaskedLM", False, False, "not run"),
    ]
    assert census.summary(lines) == {
        "classes": 5,
        "run": 4,
        "stock_exact": 1,
        "stock_wrong": 3,
        "exact": 2,
        "cannot be exact": 1,
        "wrong": 1,
        "not run": 1,
        "evaluated": 3,
        "stock_depends": 2,
        "accumloss_depends": 1,
    }
    text = census.markdown(lines, 12)
    assert "| **all** | 4 | 1 | 3 | 2 | 1 | 1 | 1 |" in text and "12 minutes" in text
    assert "| EForMaskedLM | why |" in text and "| CLIPModel |" in text
    assert all(len(row) <= 100 or row.startswith("|") for row in text.splitlines())
    census.write_csv(lines, tmp_path / "census.csv")
    with (tmp_path / "census.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["verdict"] for row in written] == ["exact", "exact", "cannot be exact", "wrong", "not run"]
    assert written[0]["stock_ratio"] == "8" and written[0]["accumloss_ratio"] == "1"


@pytest.mark.skipif(sys.platform != "linux", reason="resets the peak of the process through /proc")
def test_peak_memory_is_of_the_block():
    with measure._measured() as found:
        block = torch.ones(25_000_000)  # malloc maps so much anew
        del block
    assert found["peak_mb"] > 80


def test_worker_reports_what_it_cannot_run():
    found = worker.audit_class("transformers.models.bert.modeling_bert", "BertModel")
    assert found["status"] == "not run" and found["reason"]


def line_of_a_trainer(gradient=1e-7, evaluation=1.0, told=(), told_of_evaluation=()):
    """A line of the census of Trainers."""
    step = {"gradient_error": gradient, "loss_error": 0.0, "told": bool(told)}
    ours = {"steps": {"4x2": step}, "evaluation": [1.0, evaluation]}
    ours.update(told=[*told], told_of_evaluation=[*told_of_evaluation])
    stock = {"steps": {"4x2": {**step, "gradient_error": 3.0}}, "evaluation": [1.0, 1.5], "told": []}
    names = {"name": "A b", "module": "trl", "trainer": "A", "loss": "b", "status": "run", "reason": "", "seconds": 1.0}
    return {**names, "stock": stock, "accumloss": ours}


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        ("exact", {}),
        ("silent", {"gradient": 1e-3}),
        ("silent", {"evaluation": 1.01}),
        ("silent", {"evaluation": 1.01, "told": ["accumloss: A differs: why"]}),
        ("told", {"gradient": 1e-3, "told": ["accumloss: A differs: why"]}),
        ("told", {"evaluation": 1.01, "told_of_evaluation": ["accumloss: A depends: why"]}),
        ("told though exact", {"told": ["accumloss: A differs: why"]}),
        ("told though exact", {"told_of_evaluation": ["accumloss: A depends: why"]}),
    ],
)
def test_verdicts_of_the_census_of_trainers(wanted, what):
    line = line_of_a_trainer(**what)
    assert trainers.verdict(line) == wanted
    assert not trainers.trains_exactly(line, "stock")
    text = trainers.markdown([line])
    assert f"| A | b | 3.0e+00 | - | - | 5.0e-01 | {line['accumloss']['steps']['4x2']['gradient_error']:.1e} |" in text
    assert ("| A | b | why |" in text) == wanted.startswith("told")
    assert all(len(row) <= 100 or row.startswith("|") for row in text.splitlines())
    row = trainers.row(line)
    assert (row["stock_4x2"], row["verdict"]) == ("3.0e+00", wanted)


def test_detection_is_evaluated_as_the_one_batch(capsys):
    """It adds its terms up, as a loop over rows does: with one row a batch only the labels tell them apart."""
    assert main(["audit", "YolosForObjectDetection", "--json"]) == 0
    evaluation = json.loads(capsys.readouterr().out)["evaluation"]
    assert evaluation["stock"] > 1e-3 and evaluation["accumloss"] < measure.SAME_LOSS
