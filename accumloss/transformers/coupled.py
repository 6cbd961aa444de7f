"""Classes of transformers whose loss is coupled over the rows of a micro-batch: no split of their batch can be exact.

Most contrastive losses are recognised by their labels, the numbers of the rows (terms.is_contrastive). These compute theirs in
other ways; the audit has measured each.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CONTRASTIVE = "contrastive: each row is scored against the other rows of its micro-batch"
DEPENDS = "what the model returns for a row depends on the other rows of its micro-batch"


class Coupled(NamedTuple):
    names: str  # of classes
    reason: str
    is_of_one_row: bool = False  # only where a micro-batch has a single row


TABLE = (
    Coupled(r"(RoCBert|Flava)ForPreTraining", f"it adds a term that is {CONTRASTIVE}"),
    Coupled(
        r"(Wav2Vec2|Wav2Vec2Conformer|UniSpeech|UniSpeechSat)ForPreTraining",
        "contrastive, its negatives drawn from the whole micro-batch, and a diversity term over the micro-batch's codes",
    ),
    Coupled(r"(PeAudio|PeAudioFrameLevel|PeVideo|PeAudioVideo|Siglip2?|VideoPrismClip)Model", CONTRASTIVE),
    Coupled(
        r"(DFine|Deimv2)ForObjectDetection",
        "terms of its localisation loss are weighted by how many queries of the micro-batch were matched",
    ),
    Coupled(
        r"SpeechT5For(TextToSpeech|SpeechToSpeech)",
        "its guided attention loss is a mean over pairs of positions that it computes by itself; its other three terms are "
        "exact",
    ),
    Coupled(r"AutoformerForPrediction|Blip2Model", DEPENDS),
    Coupled(r"PaliGemmaForConditionalGeneration", "it attends otherwise where a micro-batch has a single row", True),
)

# Functions of transformers that are means over the tokens of a router, coupled over them. Each micro-batch's weighs as much
# as its tokens do in the step, which is near and not exact.
ROUTER_LOSSES = ("load_balancing_loss_func", "router_z_loss_func")


def why(name: str, smallest: int = 1) -> str:
    """Why the loss of a class cannot be exact; empty where nothing is known against it.

    Args:
        smallest: rows of the smallest micro-batch.
    """
    for entry in TABLE:
        if re.fullmatch(entry.names, name) and (smallest == 1 or not entry.is_of_one_row):
            return entry.reason
    return ""
