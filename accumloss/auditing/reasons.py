"""Why some losses cannot be exact under accumulation, by class: what the census says of them where they are not."""

from __future__ import annotations

import re

CONTRASTIVE = "contrastive: each row is scored against the other rows of its micro-batch"

# names of classes -> why
REASONS: dict[str, str] = {
    r"(RoCBert|Flava)ForPreTraining": "adds a contrastive term: each row is scored against the other rows of its micro-batch",
    r"(Wav2Vec2|Wav2Vec2Conformer|UniSpeech|UniSpeechSat)ForPreTraining": (
        "contrastive, its negatives drawn from the whole micro-batch, and a diversity term over the micro-batch's codes"
    ),
    r"PeAudioFrameLevelModel": CONTRASTIVE,
    r"(DFine|Deimv2)ForObjectDetection": (
        "terms of its localisation loss are weighted by how many queries of the micro-batch were matched"
    ),
    r"SpeechT5For(TextToSpeech|SpeechToSpeech)": (
        "its guided attention loss is a mean over pairs of positions that it computes by itself; its other three terms are exact"
    ),
}


def why_not_exact(name: str, head: str) -> str:
    """The reason why a class cannot be exact, or nothing where it has none and is owed exactness."""
    for names, reason in REASONS.items():
        if re.fullmatch(names, name):
            return reason
    return CONTRASTIVE if head == "contrastive" else ""
