"""Trainers of TRL and sentence-transformers, as the census trains them: stock is wrong where it says so, accumloss is not.

They run in a process of their own, as in the census: those libraries stay out of the other tests. Every case comes by its loss
in another way.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerances import ACCUMULATED_GRADIENT, TRAINER_GRADIENT, TRAINER_LOSS
from torchrun import torchrun
from training import Step, error, loss_error

from accumloss.auditing import trainers
from accumloss.auditing.census import Worker

SECONDS = 300
MPO = "DPOTrainer MPO (sigmoid + bco_pair + sft)"
NOT_INSTALLED = [name for name in ("trl", "sentence_transformers") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(NOT_INSTALLED), reason=f"{' and '.join(NOT_INSTALLED)} not installed: pip install 'accumloss[trainers]'"
)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("trainers") / "trainers.log", "accumloss.auditing.trainers")
    yield lambda name: worker.ask("", name, SECONDS)
    worker.stop()


def assert_exact(line):
    assert line["status"] == "run", line["reason"]
    assert trainers.verdict(line) == trainers.EXACT_WITH, json.dumps(line["accumloss"], indent=1)
    assert not (trainers.trains_exactly(line, "stock") and trainers.evaluates_exactly(line, "stock"))


# factors of its own, half of the rows, eval_loss
@pytest.mark.parametrize("name", [MPO, "SFTTrainer nll"])
def test_a_loss_that_stock_gets_wrong_is_exact(audited, name):
    assert_exact(audited(name))


@pytest.mark.slow("other ways of coming by a loss: each takes some seconds, and none a kind that known.py has not")
@pytest.mark.parametrize(
    "name",
    [
        "ORPOTrainer orpo",  # labels made in its forward, token means inside of a mean over rows
        "TPOTrainer sigmoid",  # a third of the rows
        "GRPOTrainer bnpo",  # makes its micro-batches itself, and divides by itself
        "GRPOTrainer dapo + entropy bonus",  # a part beside what is right already
        "OnlineDPOTrainer sigmoid",  # a training_step that does everything
        "GOLDTrainer jsd",  # is handed the items of all of its micro-batches once for each
        "SentenceTransformerTrainer ContrastiveTensionLoss",  # a sum
        "SentenceTransformerTrainer DenoisingAutoEncoderLoss",  # tokens of its second column
        "CrossEncoderTrainer LambdaLoss",  # pairs of documents
        "RewardTrainer sigmoid",  # rows
    ],
)
def test_more_losses_that_stock_gets_wrong_are_exact(audited, name):
    assert_exact(audited(name))


@pytest.mark.slow("training and evaluation of two more Trainers; test_known.py tells of a coupled one in the fast tier")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("KTOTrainer kto", "baseline"),
        ("SentenceTransformerTrainer MultipleNegativesRankingLoss", "each other's negatives"),
    ],
)
def test_a_coupled_loss_is_told_with_its_reason(audited, name, why):
    line = audited(name)
    assert trainers.verdict(line) == trainers.TOLD
    assert len(line["accumloss"]["told"]) == 1
    assert why in trainers.reason(line)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What distributed_trainers.py found: the one batch on one rank, and two micro-batches of two rows on each of two."""
    script, found = Path(__file__).with_name("distributed_trainers.py"), []
    for number, split in ((1, (8, 1)), (2, (2, 2))):
        out = tmp_path_factory.mktemp("ranks") / "found.pt"
        torchrun(script, out, *split, ranks=number)
        steps = torch.load(out)
        found.append(
            {name: [Step(way["gradients"], way["loss"], {}, None) for way in ways] for name, ways in steps.items()}
        )
    return found


@pytest.mark.slow(
    "two launches that import TRL and sentence-transformers; test_distributed.py has two ranks of Trainer"
)
def test_two_ranks(ranks):
    whole, spread = ranks
    assert len(whole) == 4
    for name, (ours, _) in spread.items():
        full = whole[name][1]
        assert error(ours, full) < TRAINER_GRADIENT, name
        assert loss_error(ours, full) < TRAINER_LOSS, name
    assert error(spread[MPO][1], whole[MPO][1]) > 0.1  # stock


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """What mixed_trainers.py found: the one batch in stock, four micro-batches with accumloss, and in stock."""
    out = tmp_path_factory.mktemp("mixed") / "found.pt"
    script = Path(__file__).with_name("mixed_trainers.py")
    done = subprocess.run([sys.executable, script, out], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.slow("a process that imports TRL, and one model that is compiled; test_exactness.py has these of Trainer")
def test_mixed_use(mixed):
    assert len(mixed) == 11
    for run, found in mixed.items():
        assert not isinstance(found, str), (run, found)
        full, ours, _ = (Step(way["gradients"], way["loss"], {}, None) for way in found)
        bound = ACCUMULATED_GRADIENT[torch.bfloat16] if run[1] == "bf16" else TRAINER_GRADIENT
        assert error(ours, full) < bound, run
        assert loss_error(ours, full) < (bound if run[1] == "bf16" else TRAINER_LOSS), run
        assert run[1] != "LoRA" or any("lora" in name for name in found[1]["gradients"]), run
    full, _, stock = (Step(way["gradients"], way["loss"], {}, None) for way in mixed[MPO, "bf16"])
    assert error(stock, full) > 0.1


METRICS = """
import json, sys, tempfile, torch, accumloss, transformers
from accumloss.auditing import trainer_cases
torch.set_num_threads(1)
case, logs = trainer_cases.find("SFTTrainer nll"), {}
class Log(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        found.update(logs)
accumloss.register_with_transformers(metrics=True)
for size, k in ((8, 1), (2, 4), (3, 3)):
    with tempfile.TemporaryDirectory() as folder:
        trainer = case.build(trainer_cases.Split(size, k, folder))
        found = {}
        trainer.add_callback(Log())
        trainer.train()
        found.update(trainer.evaluate())
        logs[size] = {key: found.get(key) for key in (
            "token_accuracy", "token_entropy", "eval_token_accuracy", "eval_token_entropy", "entropy")}
batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
with torch.no_grad():
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
labels = batch["labels"][:, 1:]
logits, labels = logits[labels != -100].double(), labels[labels != -100]
p = logits.log_softmax(-1)
logs["wanted"] = [(logits.argmax(-1) == labels).double().mean().item(), -(p.exp() * p).sum(-1).mean().item()]
print(json.dumps(logs), file=sys.stderr)
"""


@pytest.mark.slow("a process that imports TRL; test_exactness.py has the metrics of Trainer's own losses")
def test_sft_logs_the_metrics_of_all_tokens(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", METRICS], cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads(done.stderr.strip().splitlines()[-1])
    accuracy, entropy = logs.pop("wanted")
    for size, found in logs.items():
        for prefix in ("", "eval_"):
            assert found[f"{prefix}token_accuracy"] == pytest.approx(accuracy, rel=1e-6), size
            assert found[f"{prefix}token_entropy"] == pytest.approx(entropy, rel=1e-5), size
    assert logs["2"]["entropy"] != pytest.approx(entropy, rel=1e-3)  # a mean of the micro-batches' means


def test_only_what_is_installed_can_be_asked_for():
    with pytest.raises(trainers.AuditError, match=r"got NoTrainer; pip install"):
        trainers.names(["NoTrainer"])
