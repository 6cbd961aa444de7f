"""One class for each way in which transformers' heads come by their loss; the census runs them all."""

from __future__ import annotations

import pytest
import torch
import transformers
from training import IS_CURRENT

import accumloss
from accumloss.auditing import census, tiny, worker
from accumloss.transformers import counting, heads, rebind
from accumloss.transformers import step as steps

PATTERNS = {
    "loss_function with the kwargs": "LlamaForCausalLM",
    "loss_function without the kwargs": "LlamaForTokenClassification",
    "accepts_loss_kwargs = False": "LlavaForConditionalGeneration",
    "encoder-decoder": "T5ForConditionalGeneration",
    "delegated to an inner model": "EncoderDecoderModel",
    "CrossEntropyLoss() in forward": "BertForMaskedLM",
    "nn.functional.cross_entropy": "OpenAIGPTDoubleHeadsModel",
    "ignore_index=ignored_index": "BertForQuestionAnswering",
    "ignored_index, with patches beyond the text": "LayoutLMv3ForQuestionAnswering",
    "two terms": "BertForPreTraining",
    "a loss made in __init__": "DistilBertForMaskedLM",
    "losses made in __init__, in a dictionary": "LxmertForPreTraining",
    "nll_loss over several copies": "ProphetNetForConditionalGeneration",
    "kl_div, batchmean": "VisualBertForQuestionAnswering",
    "labels masked by attention": "YosoForTokenClassification",
    "labels selected by attention": "ElectraForPreTraining",
    "labels selected by a mask of their own": "BrosSpadeEEForTokenClassification",
    "a codebook of several": "CsmForConditionalGeneration",
    "image classification": "ViTForImageClassification",
    "semantic segmentation, 255 is ignored": "DPTForSemanticSegmentation",
    "masked image": "ViTForMaskedImageModeling",
    "masked image, random mask": "ViTMAEForPreTraining",
    "CTC": "Wav2Vec2ForCTC",
    "a transducer": "ParakeetForTDT",
    "a margin loss of its own": "Wav2Vec2ForXVector",
    "a mean of its own": "TapasForQuestionAnswering",
    "time series": "PatchTSTForPrediction",
    "quantiles beside mse": "TimesFmModelForPrediction",
    "detection, weighted classes": "DetrForObjectDetection",
    "detection, focal": "DabDetrForObjectDetection",
    "instance segmentation": "MaskFormerForInstanceSegmentation",
}


@pytest.mark.parametrize(
    "batch_sizes", [(3,), pytest.param((1, 2), marks=pytest.mark.slow("the uneven split is the harder one"))], ids=str
)
@pytest.mark.parametrize("name", PATTERNS.values(), ids=PATTERNS)
def test_pattern_is_exact(name, batch_sizes):
    cls = tiny.loss_bearing_class(name)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    # stock, and the splits into equal parts, are the census's
    line = worker.audit_class(cls.__module__, name, ways=("accumloss",), batch_sizes=batch_sizes)
    if line["status"] != "run" and not IS_CURRENT:
        pytest.skip(f"{name} does not run on transformers {transformers.__version__}: {line['reason']}")
    assert line["status"] == "run", line["reason"]
    assert line["accumloss"]["exact"], line


def test_what_few_labels_fit_by_chance_hides_no_origin():
    """In micro-batches of one row the labels that a mask selects are often the first of the row as well."""
    name = "BrosSpadeEEForTokenClassification"
    cls = tiny.loss_bearing_class(name)
    line = worker.audit_class(cls.__module__, name, ways=("accumloss",), batch_sizes=(1,))
    assert line["accumloss"]["exact"], line


@pytest.mark.parametrize("name", ["CLIPModel", "RoCBertForPreTraining"])
def test_coupled_losses_are_named(name):
    module = tiny.loss_bearing_class(name).__module__
    line = worker.audit_class(module, name, ways=("accumloss",), batch_sizes=(3,))
    assert not line["accumloss"]["exact"]
    assert census.verdict(line) == census.COUPLED and "scored against the other rows" in census.why_not_exact(line)


def test_unregistering_gives_losses_and_criteria_back():
    from transformers.loss import loss_for_object_detection as detection

    name = "DistilBertForMaskedLM"
    model = tiny.build(tiny.loss_bearing_class(name))
    get_loss = detection.ImageLoss.get_loss
    with accumloss.registered():
        rebind.rebind_modules_of(model)
        assert type(model.mlm_loss_fct) is heads.CrossEntropyLoss and detection.ImageLoss.get_loss is not get_loss
    assert type(model.mlm_loss_fct) is torch.nn.CrossEntropyLoss and detection.ImageLoss.get_loss is get_loss


# How labels that a head has made are recognised -------------------------------------------------------------------------


def step_over(*batches: dict[str, torch.Tensor]) -> steps.Step:
    return steps.Step(list(batches), batches[0], len(batches), 1.0, lambda total: total, {})


LABELS = torch.tensor([[5, 6, -100, 7], [8, -100, -100, 9]])
OTHER = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
ONES = torch.ones(2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("made", "options", "total"),
    [
        ("the entry", {}, 5 + 6),
        ("a copy", {}, 5 + 6),
        ("without the first of each row", {}, 3 + 4),
        ("masked by attention", {}, 3 + 6),
        ("selected by attention", {}, 3 + 6),
        ("selected by attention, all count", {"ignore_index": None}, 5 + 8),
        ("its items", {}, 5 + 6),
        ("three copies", {}, 3 * (5 + 6)),
        ("a copy and ignored ones", {}, 5 + 6),
    ],
)
def test_labels_made_from_an_entry(made, options, total):
    labels = {
        "the entry": LABELS.view(-1),
        "a copy": LABELS.clone(),
        "without the first of each row": LABELS[:, 1:].reshape(-1),
        "masked by attention": torch.where(MASK == 1, LABELS, -100).view(-1),
        "selected by attention": LABELS[MASK == 1],
        "selected by attention, all count": LABELS[MASK == 1].float(),
        "its items": LABELS[LABELS != -100],
        "three copies": LABELS.repeat(3, 1, 1),
        "a copy and ignored ones": torch.stack([LABELS, torch.full_like(LABELS, -100)]),
    }[made]
    step = step_over({"attention_mask": MASK, "labels": LABELS}, {"attention_mask": ONES, "labels": OTHER})
    assert step.divisor(labels, **options).value.item() == total / 2


def test_labels_of_a_codebook_and_of_the_frames_that_have_any():
    labels = torch.tensor([[[3, -100, -100], [4, 5, 6], [-100, -100, -100]]])
    other = torch.tensor([[[3, 1, 1], [4, 5, -100], [2, 1, 1]]])
    step = step_over({"labels": labels}, {"labels": other})
    assert step.divisor(labels[:, :, 0]).value.item() == (2 + 3) / 2
    frames = labels[~(labels[:, :, 1:] == -100).all(-1)]
    assert step.divisor(frames, shift=1).value.item() == (2 + 5) / 2


def test_what_fits_twice_is_told_by_another_micro_batch():
    """A micro-batch without padding fits with and without the mask; the call before it has told which."""
    origins: dict = {}
    first, second = {"attention_mask": MASK, "labels": LABELS}, {"attention_mask": ONES, "labels": OTHER}
    totals: dict = {}
    steps.Step([first, second], first, 2, 1.0, lambda t: t, totals, origins).divisor(LABELS[MASK == 1])
    assert len(origins) == 1
    later = steps.Step([first, second], second, 2, 1.0, lambda t: t, totals, origins)
    assert later.divisor(OTHER[ONES == 1]).value.item() == (3 + 6) / 2


def test_labels_of_no_entry_weigh_as_their_rows():
    batches = [
        {"labels": torch.zeros(3, 2), "x": torch.zeros(3, 2)},
        {"labels": torch.zeros(2, 2), "x": torch.zeros(2, 2)},
    ]
    step = step_over(*batches)
    target = torch.arange(3)
    assert step.divisor(target, ignore_index=None).value.item() == pytest.approx(3 / (3 * 2 / 5))
    assert step.share_of_rows() == pytest.approx(6 / 5)
    assert step_over(batches[0], batches[0]).share_of_rows() == 1


def test_objects_of_the_step():
    def rows(*counts: int) -> dict:
        return {
            "labels": [{"class_labels": torch.zeros(n)} for n in counts],
            "pixel_values": torch.zeros(len(counts), 1),
        }

    step = step_over(rows(1, 2), rows(5, 0))
    assert step.objects_of_the_step() == pytest.approx(8 / 2 / 3)
    # two rows of ten queries each: 1 for a matched one, 0.1 for the others
    weight = torch.tensor([1.0, 1.0, 0.1])
    assert step.divisor(torch.zeros(2, 10).long(), weight=weight).value.item() == pytest.approx((8 + 32 * 0.1) / 2)
    # class weights of the user's own say nothing of objects
    assert step._matched(torch.zeros(2, 10).long(), torch.tensor([1.0, 3.0, 0.1])) is None
    assert counting.num_objects({"class_labels": torch.zeros(2, 3)}) == [3, 3]
    assert counting.num_objects({"labels": torch.zeros(2, 3)}) is None


def test_ranks_count_equally_often_whatever_they_find():
    """A rank that waits for the others in a count that they do not make would wait forever."""
    first, second = {"attention_mask": MASK, "labels": LABELS}, {"attention_mask": ONES, "labels": OTHER}
    found = {
        "recognised": [LABELS, OTHER],
        "by the mask, then as it is": [torch.where(MASK == 1, LABELS, -100), OTHER],
        "as it is, then not at all": [LABELS, torch.arange(3)],
        "not at all, then as it is": [torch.arange(3), OTHER],
        "as many, then not": [LABELS + 1, torch.arange(3)],
    }
    for what, made in found.items():
        counts: list[float] = []

        def over_ranks(total: torch.Tensor, counts: list[float] = counts) -> torch.Tensor:
            counts.append(total.item())
            return total * 2  # another rank that holds the same

        totals: dict = {}
        divisors = []
        for inputs, labels in zip((first, second), made, strict=True):
            step = steps.Step([first, second], inputs, 4, 1.0, over_ranks, totals, gathers=True)
            step.main = counting.Rule("labels")
            divisors.append(step.divisor(labels).value.item())
        assert len(counts) == 1, what
        if what == "recognised":
            assert divisors == [2 * (5 + 6) / 4] * 2
        if what == "by the mask, then as it is":
            assert divisors == [2 * (3 + 6) / 4, 2 * (5 + 6) / 4]
