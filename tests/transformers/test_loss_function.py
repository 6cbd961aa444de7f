"""accumloss's own losses in the place of a model's loss_function: called with whatever the model has, they go on."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from tolerances import TRAINER_GRADIENT, TRAINER_LOSS
from training import HEADS, IS_CURRENT, build, error, loss_error, model_and_rows, rows, train
from transformers.loss.loss_utils import LOSS_MAPPING

import accumloss
from accumloss import keywords, losses

ASSIGNED = {  # head in HEADS -> what is assigned
    "causal": "causal_lm_loss",
    "vision and language": "causal_lm_loss",
    "masked": "masked_lm_loss",
    "token classes": "token_classification_loss",
    "sequence class": "sequence_classification_loss",
    "multi label": "sequence_classification_loss",
    "regression": "sequence_classification_loss",
    "question answering": "question_answering_loss",
    "image class": "sequence_classification_loss",
    "image class, no kwargs": "sequence_classification_loss",
}


def batch_of(examples):
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


def same(found, wanted):
    loss, gradient = found
    assert abs(loss - wanted[0]) <= TRAINER_LOSS * abs(wanted[0])
    assert (gradient - wanted[1]).norm() <= TRAINER_GRADIENT * wanted[1].norm()


@pytest.mark.parametrize("head", ASSIGNED)
def test_a_model_takes_our_loss_for_its_own(head, monkeypatch):
    """The same loss and gradient as with transformers' own, from the very call that the model makes."""
    name, config, targets = HEADS[head]
    model, inputs = build(name, **config), batch_of(rows(targets))
    wanted = loss_and_gradients(model, **inputs)
    seen, divisor = [], losses.divisor_of
    monkeypatch.setattr(losses, "divisor_of", lambda *given: seen.append(given) or divisor(*given))
    model.loss_function = getattr(accumloss, ASSIGNED[head])
    same(loss_and_gradients(model, **inputs), wanted)
    assert seen or not IS_CURRENT, "the model did not call it"


@pytest.mark.parametrize("where", ["model", "mapping"])
def test_trainer_is_exact_with_our_loss_assigned(where, monkeypatch):
    """Nothing is registered: Trainer passes num_items_in_batch through the model."""
    model, examples = build("LlamaForCausalLM"), rows()
    if where == "model":
        model.loss_function = accumloss.causal_lm_loss
    else:
        monkeypatch.setitem(LOSS_MAPPING, "mine", accumloss.causal_lm_loss)
        model.loss_type = "mine"
    assert model.loss_function is accumloss.causal_lm_loss
    full, step = train(model, examples, 1), train(model, examples, 4)
    assert error(step, full) <= TRAINER_GRADIENT and loss_error(step, full) <= TRAINER_LOSS


# what a collator of packed rows, a processor and a caller hand to a model that names none of it
PASSED = {
    "num_items_in_batch": torch.tensor(7), "token_type_ids": torch.zeros(8, 12, dtype=torch.int64), "seq_idx": None,
    "mm_token_type_ids": None, "special_tokens_mask": None, "num_crops": None, "output_router_logits": False,
    "cu_seq_lens_q": None, "cu_seq_lens_k": None, "max_length_q": None, "max_length_k": None,
}  # fmt: skip


def test_names_that_models_pass_along_are_left_out():
    model, examples = model_and_rows("causal")
    inputs = batch_of(examples)
    wanted = loss_and_gradients(model, **inputs, **PASSED)
    model = build("LlamaForCausalLM")
    model.loss_function = accumloss.causal_lm_loss
    same(loss_and_gradients(model, **inputs, **PASSED), wanted)


def test_a_model_that_passes_pad_token_id():
    model = build("XGLMForCausalLM", d_model=16, ffn_dim=32, num_layers=1, attention_heads=2, pad_token_id=1)
    inputs = batch_of(rows())
    wanted = loss_and_gradients(model, **inputs)
    model.loss_function = accumloss.causal_lm_loss
    same(loss_and_gradients(model, **inputs), wanted)


def test_a_name_of_ones_own_is_refused_and_make_loss_takes_it():
    model, inputs = build("LlamaForCausalLM"), batch_of(rows())
    wanted = loss_and_gradients(model, **inputs)
    model.loss_function = accumloss.causal_lm_loss
    with pytest.raises(TypeError, match=r"causal_lm_loss: .*got 'sample_ids'.*assign accumloss.make_loss..causal_lm"):
        model(**inputs, sample_ids=torch.arange(8))
    model.loss_function = accumloss.make_loss("causal_lm")
    same(loss_and_gradients(model, **inputs, sample_ids=torch.arange(8)), wanted)


def unknown(loss, names):
    return sorted(set(names) - keywords.FROM_MODELS - set(keywords.named_by(getattr(accumloss, loss))))


def test_keywords_that_transformers_declares_are_known():
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
    from transformers.utils import TransformersKwargs

    names = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
    assert names
    for loss in set(ASSIGNED.values()) | {"semantic_segmentation_loss", "linear_causal_lm_loss"}:
        assert unknown(loss, names) == []


LOSS_OF_CLASS = {  # how the name of a class ends -> the loss that transformers gives it
    "ForCausalLM": "causal_lm_loss",
    "ForConditionalGeneration": "causal_lm_loss",
    "ForMaskedLM": "masked_lm_loss",
    "ForTokenClassification": "token_classification_loss",
    "ForSequenceClassification": "sequence_classification_loss",
    "ForImageClassification": "sequence_classification_loss",
    "ForVideoClassification": "sequence_classification_loss",
    "ForQuestionAnswering": "question_answering_loss",
    "ForSemanticSegmentation": "semantic_segmentation_loss",
}
LOSSES_OF_THEIR_OWN = {"flow_head"}  # a keyword that tells calls of another loss under such a name


def calls_of(folder):
    """(class, loss, keywords written at the call and names that its processors make and its forward does not) of a model."""
    inputs: set[str] = set()
    for path in folder.glob("*.py"):
        text = path.read_text()
        if "model_input_names" in text:
            for node in ast.walk(ast.parse(text)):
                is_list = isinstance(node, ast.Assign) and isinstance(node.value, (ast.List, ast.Tuple))
                if is_list and any(getattr(target, "id", "") == "model_input_names" for target in node.targets):
                    inputs |= {item.value for item in node.value.elts if isinstance(item, ast.Constant)}
    for path in folder.glob("modeling_*.py"):
        text = path.read_text()
        if "loss_function(" not in text:
            continue
        for cls in (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)):
            loss = next((loss for end, loss in LOSS_OF_CLASS.items() if cls.name.endswith(end)), None)
            for forward in (node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "forward"):
                named = {argument.arg for argument in [*forward.args.args, *forward.args.kwonlyargs]}
                kwargs = forward.args.kwarg.arg if forward.args.kwarg else None
                set_later = {
                    node.targets[0].slice.value
                    for node in ast.walk(forward)
                    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
                    and ast.unparse(node.targets[0].value) == kwargs and isinstance(node.targets[0].slice, ast.Constant)
                }  # fmt: skip
                for node in ast.walk(forward):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.loss_function" and loss:
                        written = {keyword.arg for keyword in node.keywords if keyword.arg}
                        hands_on = any(keyword.arg is None for keyword in node.keywords)
                        if not written & LOSSES_OF_THEIR_OWN:
                            yield cls.name, loss, written | ((inputs - named) | set_later if hands_on else set())


@pytest.mark.slow(
    "reads 400 modeling files; the names that transformers declares, and real models, are fast tests above"
)
@pytest.mark.skipif(not IS_CURRENT, reason=f"transformers {transformers.__version__}: the list is that of newer ones")
def test_every_call_of_a_loss_in_transformers_is_understood():
    models = Path(transformers.__file__).parent / "models"
    found = [call for folder in sorted(models.iterdir()) if folder.is_dir() for call in calls_of(folder)]
    assert len(found) > 250 and {loss for _, loss, _ in found} == set(LOSS_OF_CLASS.values())
    missing = {name: unknown(loss, names) for name, loss, names in found if unknown(loss, names)}
    assert missing == {}, "put the names into accumloss.keywords.FROM_MODELS, or explain them"
