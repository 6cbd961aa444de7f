"""explain() of heads that compute their loss themselves, and the audit of somebody's own Trainer."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import pytest
import torch
import transformers
from tolerances import TRAINER_GRADIENT
from training import IS_CURRENT, LABELS, T5, build, error, make_trainer, rows, train

import accumloss
from accumloss.__main__ import main
from accumloss.auditing import audit_rows


@functools.cache
def tagger():
    return build("BertForTokenClassification", num_labels=LABELS).eval(), rows("tags")


def test_a_head_that_calls_pytorchs_loss_itself():
    model, _ = tagger()
    assert accumloss.explain(model).path == "stock"
    with accumloss.registered():
        for head in (model, build("T5ForConditionalGeneration", **T5)):
            found = accumloss.explain(head)
            assert (
                found.path == "logits"
                and found.reason == "its forward calls CrossEntropyLoss itself, and no loss_function"
            )
            assert found.loss.endswith(f"{type(head).__name__}.forward")
    with accumloss.registered(fused_linear=True):
        assert accumloss.explain(model).path == "logits"


@pytest.mark.skipif(not IS_CURRENT, reason="transformers 5.23 and newer: the tiny model is of their configuration")
def test_a_head_whose_loss_is_not_known():
    from accumloss.auditing import tiny

    model = tiny.build(transformers.SiglipModel)
    with accumloss.registered():
        found = accumloss.explain(model)
    assert found.path == "stock" and "verify(trainer) measures" in found.reason


def test_one_such_head_registered_alone_is_exact():
    model, examples = tagger()
    full = train(model, examples, 1)
    alone = copy.deepcopy(model)
    with accumloss.registered(alone):
        trainer, recorder = make_trainer(alone, examples, 4)
        trainer.train()
    assert error(full._replace(gradients=recorder.gradients), full) <= TRAINER_GRADIENT


def test_a_loss_function_that_is_never_called_is_told():
    model, examples = tagger()
    model = copy.deepcopy(model)
    model.loss_function = accumloss.make_loss("token_classification", weight=torch.linspace(0.1, 1, LABELS))
    with accumloss.registered():
        assert "the loss_function that was assigned to it has no effect" in accumloss.explain(model).reason
        trainer, _ = make_trainer(model, examples, 4)
        with pytest.warns(accumloss.InexactWarning, match="has no effect: its forward calls none") as caught:
            trainer.train()
    assert len(caught) == 1
    called = build("LlamaForCausalLM")
    called.loss_function = accumloss.make_loss("causal_lm", z_loss=1e-4)
    with accumloss.registered(), warnings.catch_warnings():
        warnings.simplefilter("error", accumloss.InexactWarning)
        make_trainer(called, rows(), 4)[0].train()


class Functional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 3)

    def forward(self, x, labels=None):
        return torch.nn.functional.cross_entropy(self.head(x), labels)


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.criterion = torch.nn.Linear(3, 3), torch.nn.CrossEntropyLoss()

    def forward(self, x, labels=None):
        return self.criterion(self.head(x), labels)


class Wrapper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tagger, self.language = tagger()[0], build("LlamaForCausalLM")

    def forward(self, batch):
        return self.tagger(**batch["tags"]).loss + self.language(**batch["text"]).loss


@pytest.mark.parametrize(("make", "called"), [(Functional, "cross_entropy"), (Holder, "CrossEntropyLoss")])
def test_a_module_of_ones_own(make, called):
    """With its losses, by name, whatever has wrapped it; what is said of a Trainer holds: test_own_code trains such models."""
    for model in (make(), torch.compile(make()), torch.nn.DataParallel(make())):
        found = accumloss.explain(model)
        assert (found.model, found.path, found.by) == (make.__name__, "stock", "stock")
        assert "accumloss is not registered" in found.reason and called in found.reason
        assert str(found).startswith(f"{make.__name__}: stock, ")
        with accumloss.registered():
            found = accumloss.explain(model)
        assert (found.path, found.by) == ("logits", "accumloss") and called in found.reason
        assert "accumloss.Accumulator" in found.reason  # a loop of one's own
        assert str(found).startswith(f"{make.__name__}: accumloss, ")


def test_a_module_around_models_explains_each():
    with accumloss.registered(fused_linear=True):
        found = accumloss.explain(Wrapper())
    assert {name: head.path for name, head in found.heads.items()} == {"tagger": "logits", "language": "fused"}
    text = str(found)
    assert "  tagger, BertForTokenClassification: accumloss, from the logits" in text
    assert "  language, LlamaForCausalLM: accumloss, from the hidden states, without the logits" in text
    assert {head.by for head in accumloss.explain(Wrapper()).heads.values()} == {"stock"}


def test_a_module_without_a_loss_and_what_is_no_model():
    found = accumloss.explain(torch.nn.Linear(2, 2))
    assert found.by == "stock" and "calls no loss that accumloss knows" in found.reason
    trainer, _ = make_trainer(*tagger(), 4)
    with pytest.raises(TypeError, match=r"got a .*Trainer; explain.trainer.model. explains its model"):
        accumloss.explain(trainer)


# The audit ------------------------------------------------------------------------------------------------------------


def test_the_audit_names_what_to_do():
    class Mixing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64)

        def forward(self, input_ids, labels=None, **kwargs):
            hidden = self.embed(input_ids)
            logits = self.head(hidden + hidden.mean(0, keepdim=True))
            return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    found = audit_rows(Mixing(), rows(), batch_sizes=[2])
    assert "depends on the other rows" in found.reason and "per_device_train_batch_size" in found.remedy

    class ByHand(Mixing):
        def forward(self, input_ids, labels=None, **kwargs):
            taken = self.head(self.embed(input_ids)).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return {"loss": -(taken * (labels != -100)).sum() / (labels != -100).sum()}

    found = audit_rows(ByHand(), rows(), batch_sizes=[2])
    assert "was not recognised" in found.reason and "verify=True" in found.remedy
    (told,) = {step.told for step in found.of("accumloss")}
    assert "nothing that it computes was recognised" in told and not any(step.told for step in found.of("stock"))


def test_a_factory_may_return_a_trainer(capsys):
    assert main(["audit", "--factory", "own_losses:make_stock"]) == 0
    assert "the step of Trainer over micro-batches is exact" in capsys.readouterr().out
    assert main(["audit", "--factory", "own_losses:make_own", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["trainer"] == "ByHandTrainer" and found["is_exact"] is False and found["can_be_exact"] is True
    assert found["terms"][0]["known_by"] == "measured"
