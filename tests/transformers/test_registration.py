"""What register_with_transformers replaces, and that everything is put back."""

import copy
import inspect
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers
import transformers.trainer
from tolerances import TRAINER_GRADIENT
from training import COUNTS_POSITION_0, build, error, rows, train
from transformers.loss import loss_utils
from transformers.loss.loss_utils import LOSS_MAPPING

import accumloss
from accumloss.transformers import heads as torch_losses
from accumloss.transformers import losses, mapping, versions
from accumloss.transformers.patches import trainer_methods
from accumloss.transformers.registration import Patches

HERE = Path(__file__).parent  # not the root, whose ./accumloss has no _C
REPLACED = {
    "ForCausalLM": "causal_lm_loss",
    "ForConditionalGeneration": "causal_lm_loss",
    "CsmForConditionalGeneration": "causal_lm_loss",
    "ForMaskedLM": "masked_lm_loss",
    "ForQuestionAnswering": "question_answering_loss",
    "ForSequenceClassification": "sequence_classification_loss",
    "ForImageClassification": "sequence_classification_loss",
    "ForVideoClassification": "sequence_classification_loss",
    "ForAudioClassification": "sequence_classification_loss",
    "ForTokenClassification": "token_classification_loss",
    "ForSemanticSegmentation": "semantic_segmentation_loss",
}
CHANGED = [(loss_utils, "LOSS_MAPPING"), (transformers.trainer, "ForCausalLMLoss")]


def everything():
    """The objects that registering may change."""
    names = {**dict(LOSS_MAPPING), **{name: vars(transformers.Trainer).get(name) for name in trainer_methods.METHODS}}
    for module, name in CHANGED:
        names[f"{module.__name__}.{name}"] = getattr(module, name, None)
    return names


def assert_same(before, after):
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


def test_registered_losses_name_what_computes_what():
    accumloss.register_with_transformers()
    found = accumloss.registered_losses()
    for key, function in found.items():
        expected = f"accumloss.transformers.losses.{REPLACED[key]}" if key in REPLACED else "transformers.loss"
        assert function.startswith(expected), key
    assert {key for key in REPLACED if key in LOSS_MAPPING} == {
        key for key, function in found.items() if function.startswith("accumloss")
    }


def test_no_key_is_added_or_moved_and_the_dict_stays():
    keys, mapping_object = list(LOSS_MAPPING), loss_utils.LOSS_MAPPING
    accumloss.register_with_transformers()
    assert list(LOSS_MAPPING) == keys
    assert loss_utils.LOSS_MAPPING is mapping_object
    assert transformers.modeling_utils.LOSS_MAPPING is mapping_object


def test_unregistering_restores_the_very_same_objects():
    before = everything()
    accumloss.register_with_transformers()
    assert everything() != before
    accumloss.register_with_transformers(inplace_backward=True)  # idempotent
    accumloss.unregister_from_transformers()
    assert_same(before, everything())
    accumloss.unregister_from_transformers()  # idempotent too
    assert_same(before, everything())


def test_a_newer_transformers_than_the_tested_ones_is_told_of_once(monkeypatch):
    versions.warn_where_newer.cache_clear()
    monkeypatch.setattr(warnings, "filters", [])
    warnings.simplefilter("error")
    for version in ("4.57.6", "5.24.9", f"{versions.NEWEST[0]}.{versions.NEWEST[1]}.0.dev0"):
        monkeypatch.setattr(transformers, "__version__", version)
        with accumloss.registered():
            pass
    for version in ("5.25.0", "6.0.0.dev0"):
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.warns(UserWarning, match=rf"4\.57 to 5\.24 .*{version}.*python -m accumloss audit") as caught:
            accumloss.register_with_transformers()
        accumloss.register_with_transformers()
        accumloss.unregister_from_transformers()
        assert [w.filename for w in caught] == [__file__]


def test_registered_as_context():
    before = everything()
    with accumloss.registered():
        inside = everything()
        with accumloss.registered(inplace_backward=True):
            assert_same(inside, everything())
        assert_same(inside, everything())
        assert not accumloss.transformers.settings.inplace_backward
    assert_same(before, everything())
    with pytest.raises(KeyError), accumloss.registered():
        raise KeyError
    assert_same(before, everything())


def test_modeling_modules_are_restored():
    """A mixture of experts has its router's loss rebound while it trains."""
    from transformers.models.mixtral import modeling_mixtral

    theirs = modeling_mixtral.load_balancing_loss_func
    options = {"num_local_experts": 4, "output_router_logits": True}
    with accumloss.registered():
        with pytest.warns(accumloss.InexactWarning, match="load_balancing_loss_func is coupled"):
            train(build("MixtralForCausalLM", **options), rows(), 2)
        assert modeling_mixtral.load_balancing_loss_func is not theirs
    assert modeling_mixtral.load_balancing_loss_func is theirs


def test_a_users_own_loss_in_the_mapping_stays(monkeypatch):
    def own(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        return logits.sum()

    monkeypatch.setitem(LOSS_MAPPING, "my_loss_type", own)
    monkeypatch.setitem(LOSS_MAPPING, "ForMaskedLM", own)
    accumloss.register_with_transformers()
    assert LOSS_MAPPING["my_loss_type"] is own and LOSS_MAPPING["ForMaskedLM"] is own
    LOSS_MAPPING["ForTokenClassification"] = own  # after registering
    accumloss.unregister_from_transformers()
    assert LOSS_MAPPING["ForTokenClassification"] is own and LOSS_MAPPING["ForMaskedLM"] is own
    LOSS_MAPPING["ForTokenClassification"] = loss_utils.ForTokenClassification


def mean_or_share(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """A custom loss that honours num_items_in_batch, as transformers documents them."""
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


@pytest.mark.parametrize("where", ["model", "mapping"])
def test_custom_losses_train_exactly_beside_ours(where, monkeypatch):
    model, examples = build("LlamaForCausalLM"), rows()
    with accumloss.registered():
        ours = train(model, examples, 1)
        if where == "model":
            model.loss_function = mean_or_share
        else:
            monkeypatch.setitem(LOSS_MAPPING, "my_loss_type", mean_or_share)
            model.loss_type = "my_loss_type"
        full, step = train(model, examples, 1), train(model, examples, 4)
    assert error(full, step) <= TRAINER_GRADIENT
    if where == "model":  # by the mapping's name Trainer cannot know that it shifts, and counts position 0
        assert error(full, ours) <= TRAINER_GRADIENT


def test_make_loss_for_one_model():
    model, examples = build("LlamaForCausalLM"), rows()
    model.loss_function = accumloss.make_loss("causal_lm", softcap=2.0, z_loss=1e-3)
    full, step = train(model, examples, 1), train(model, examples, 4)  # nothing is registered
    plain = train(build("LlamaForCausalLM"), examples, 1)
    assert error(step, full) <= TRAINER_GRADIENT
    assert error(full, plain) > 1e-2
    with accumloss.registered():
        # unregistered, the count is Trainer's own
        assert COUNTS_POSITION_0 or error(train(model, examples, 4), full) <= TRAINER_GRADIENT
    again = pickle.loads(pickle.dumps(model.loss_function))
    assert losses.underlying(again) is losses.causal_lm_loss


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("causal", {}, ValueError, "make_loss: expected a kind of causal_lm, .*, got 'causal'"),
        (
            "question_answering",
            {"weight": None},
            TypeError,
            "make_loss: expected .*got 'weight'.*question_answering_loss",
        ),
        (
            "causal_lm",
            {"smoothing": 0.1},
            TypeError,
            "got 'smoothing' .the nearest is 'label_smoothing'.*of causal_lm_loss",
        ),
        (
            "causal_lm",
            {"label_smoothing": 2.0},
            ValueError,
            "LossOptions: expected a number in .0, 1. for label_smoothing",
        ),
    ],
)
def test_make_loss_refuses(kind, options, error, message):
    with pytest.raises(error, match=message):
        accumloss.make_loss(kind, **options)


def test_make_loss_names_every_kind():
    assert set(losses.KINDS) == {
        "causal_lm",
        "masked_lm",
        "token_classification",
        "sequence_classification",
        "question_answering",
        "semantic_segmentation",
    }
    for kind, loss in losses.KINDS.items():
        name = next(n for n, ours in losses.REPLACEMENTS.items() if ours is loss)
        stock = getattr(loss_utils, name, loss)  # the last came in 5.24
        theirs = [n for n, p in inspect.signature(stock).parameters.items() if p.kind is not p.VAR_KEYWORD]
        assert [n for n in inspect.signature(loss).parameters][: len(theirs)] == theirs, kind


def test_one_model_alone():
    """The other model, and the mapping, stay as they are; deep copies and PEFT wrappers take the loss with them."""
    peft = pytest.importorskip("peft")
    before = dict(LOSS_MAPPING)
    model, other = build("LlamaForTokenClassification", num_labels=5, pad_token_id=0), build("LlamaForCausalLM")
    examples = rows("tags")
    accumloss.register_with_transformers(model)
    assert_same(before, dict(LOSS_MAPPING))
    assert model.loss_function is losses.token_classification_loss
    assert other.loss_function is loss_utils.ForCausalLMLoss
    full, step = train(model, examples, 1), train(model, examples, 4)  # train() copies it
    assert error(step, full) <= TRAINER_GRADIENT
    assert copy.deepcopy(model).loss_function is losses.token_classification_loss
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS", lora_dropout=0.0))
    assert wrapped.get_base_model().loss_function is losses.token_classification_loss
    accumloss.unregister_from_transformers(wrapped)
    assert model.loss_function is loss_utils.ForTokenClassification
    assert "_loss_function" not in vars(model)


def test_one_model_alone_gets_its_own_loss_back():
    model = build("LlamaForCausalLM")
    model.loss_function = loss_utils.ForMaskedLMLoss
    with accumloss.registered(model):
        assert model.loss_function is losses.masked_lm_loss
    assert model.loss_function is loss_utils.ForMaskedLMLoss


def test_registering_a_model_refuses():
    with pytest.raises(TypeError, match="expected a transformers model, got Linear"):
        accumloss.register_with_transformers(torch.nn.Linear(2, 2))
    model = build("LlamaForCausalLM")
    model.loss_function = mean_or_share
    with pytest.raises(ValueError, match="expected a model whose loss accumloss replaces, got LlamaForCausalLM with"):
        accumloss.register_with_transformers(model)
    assert model.loss_function is mean_or_share


def test_a_transformers_without_a_hook_is_refused_and_left_alone(monkeypatch):
    before = everything()
    monkeypatch.setattr(mapping, "_stock", {})
    with monkeypatch.context() as patched:
        patched.delattr(loss_utils, "ForMaskedLMLoss")
        with pytest.raises(RuntimeError, match="expected transformers.loss.loss_utils to define ForMaskedLMLoss"):
            accumloss.register_with_transformers()
    with monkeypatch.context() as patched:
        patched.setattr(trainer_methods, "METHODS", {**trainer_methods.METHODS, "no_such_method": None})
        with pytest.raises(RuntimeError, match="expected transformers.Trainer to have no_such_method"):
            accumloss.register_with_transformers()
    assert_same(before, everything())


@pytest.mark.parametrize(
    "order",
    [
        "import accumloss; accumloss.register_with_transformers(); import transformers.trainer",
        "import transformers.trainer; import accumloss; accumloss.register_with_transformers()",
        "from transformers import LlamaForCausalLM; import accumloss; accumloss.register_with_transformers()",
    ],
)
def test_order_of_imports(order):
    check = (
        "; import transformers.trainer as t; from transformers.loss.loss_utils import LOSS_MAPPING as m"
        "; current = lambda: {m['ForCausalLM'].__module__, getattr(t, 'ForCausalLMLoss', m['ForCausalLM']).__module__}"
        "; assert current() == {'accumloss.transformers.losses'}"
        "; accumloss.unregister_from_transformers()"
        "; assert current() == {'transformers.loss.loss_utils'}"
    )
    subprocess.run([sys.executable, "-c", order + check], check=True, cwd=HERE)


def test_the_core_does_not_import_transformers():
    code = "import sys, accumloss; assert 'transformers' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


def test_torch_itself_is_left_alone():
    functions = {name: getattr(torch.nn.functional, name) for name in ("cross_entropy", "mse_loss", "nll_loss")}
    classes = {name: getattr(torch.nn, name) for name in ("CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss")}
    with accumloss.registered():
        assert all(getattr(torch.nn.functional, name) is f for name, f in functions.items())
        assert all(getattr(torch.nn, name) is c for name, c in classes.items())


def test_no_warning_of_ours_in_an_ordinary_run():
    with accumloss.registered(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*accumloss.*")
        train(build("LlamaForCausalLM"), rows(), 2)


# One list of patches, one way back --------------------------------------------------------------------------------------


class Owner:
    name = "inherited"


def test_a_patch_gives_back_what_its_owner_had_itself():
    entries, cls, instance, criterion = {"name": "theirs"}, type("Owned", (Owner,), {}), Owner(), torch.nn.MSELoss()
    patches = Patches()
    for owner in (entries, cls, instance):
        patches.bind(owner, "name", "ours")
        patches.bind(owner, "name", "ours")  # once
    patches.bind(criterion, "__class__", torch_losses.MSELoss)
    assert entries["name"] == cls.name == instance.name == "ours" and type(criterion) is torch_losses.MSELoss
    patches.undo()
    assert entries == {"name": "theirs"} and type(criterion) is torch.nn.MSELoss
    assert cls.name == instance.name == "inherited" and "name" not in vars(cls) and not vars(instance)
    assert not patches and not patches.stayed


def test_what_somebody_bound_since_stays():
    owner = Owner()
    patches = Patches()
    patches.bind(owner, "name", "ours")
    owner.name = "somebody's"
    patches.undo()
    assert owner.name == "somebody's" and patches.stayed == {"name"}


def test_patches_keep_nobody_alive():
    owner, patches = Owner(), Patches()
    patches.bind(owner, "name", "ours")
    gone = weakref.ref(owner)
    del owner
    assert gone() is None
    patches.undo()
    assert not patches.stayed


def test_contexts_nest_and_restore_what_was_installed():
    """Options, models and what they install: the inner one asks for less than the outer."""
    accumloss.register_with_transformers(fused_linear=True, metrics=True)
    defers = vars(transformers.PreTrainedModel)["__call__"]
    inside = everything()
    for context in (accumloss.registered, accumloss.transformers.unregistered):
        with context():
            assert "__call__" not in vars(transformers.PreTrainedModel)
        assert vars(transformers.PreTrainedModel)["__call__"] is defers
        assert accumloss.transformers.settings.metrics
        assert_same(inside, everything())


def test_contexts_restore_models_registered_one_by_one():
    first, second = build("LlamaForCausalLM"), build("LlamaForCausalLM")
    accumloss.register_with_transformers(first)
    with accumloss.registered(second):
        assert first.loss_function is second.loss_function is losses.causal_lm_loss
        with accumloss.transformers.unregistered():
            assert "_loss_function" not in vars(first) and "_loss_function" not in vars(second)
        with accumloss.registered():
            accumloss.unregister_from_transformers()
        assert first.loss_function is second.loss_function is losses.causal_lm_loss
    assert first.loss_function is losses.causal_lm_loss and "_loss_function" not in vars(second)


def test_a_method_that_was_wrapped_around_ours_goes_on(monkeypatch):
    """Registered again under somebody's wrapper: ours is called once and calls transformers' own."""
    theirs, calls = vars(transformers.Trainer)["training_step"], []
    accumloss.register_with_transformers()
    ours = transformers.Trainer.training_step

    def wrapper(self, *args, **kwargs):
        calls.append(1)
        return ours(self, *args, **kwargs)

    transformers.Trainer.training_step = wrapper
    try:
        for _ in range(2):
            accumloss.unregister_from_transformers()
            assert transformers.Trainer.training_step is wrapper
            accumloss.register_with_transformers()
            assert transformers.Trainer.training_step is wrapper
            full, step = train(*SMALL, 1), train(*SMALL, 4)
            assert error(step, full) <= TRAINER_GRADIENT
        assert len(calls) == 2 * (1 + 4)
    finally:
        transformers.Trainer.training_step = theirs


SMALL = build("BertForTokenClassification", num_labels=5), rows("tags")
