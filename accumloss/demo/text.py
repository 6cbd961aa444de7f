"""The text of the demo, and how it is cut: paragraphs to token ids, windows of sequences, batches, masks."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import torch

from .runs import WINDOW, DemoError

MAX_TOKENS = 192  # of a sequence
VOCAB = 4096
PAD, START = 0, 1  # token ids; the mask is one more, VOCAB, so that the causal LM has no token that it never sees
IGNORE = -100
MASKED_SHARE = 0.15


def read_text() -> list[str]:
    """The paragraphs of the language reference that ships with Python, in a fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoError(
            "demo: expected a Python with pydoc_data.topics, got one without: use a full Python installation"
        ) from None
    paragraphs = (p for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name]))
    return [p for p in paragraphs if p.strip()]


def tokenise(paragraphs: Sequence[str]) -> list[list[int]]:
    """Token ids of every paragraph, by a byte-level BPE trained on the paragraphs themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<start>"],  # PAD, START
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return [[START, *encoding.ids][:MAX_TOKENS] for encoding in tokenizer.encode_batch(list(paragraphs))]


def windows(sequences: Sequence[list[int]], steps: int) -> list[list[list[int]]]:
    """The sequences of every optimizer step; the text is started anew where it ends."""
    return [[sequences[(step * WINDOW + i) % len(sequences)] for i in range(WINDOW)] for step in range(steps)]


def masked(sequence: list[int], generator: random.Random) -> dict[str, list[int]]:
    """input_ids with the mask in 15 % of the places, at least one; labels with the tokens that were there.

    Without the one, a short sequence that is a micro-batch by itself would be the mean of no items, which is not a number.
    """
    places = range(1, len(sequence))  # START is no text
    chosen = set(generator.sample(places, max(1, round(MASKED_SHARE * len(places)))))
    return {
        "input_ids": [VOCAB if i in chosen else token for i, token in enumerate(sequence)],
        "labels": [token if i in chosen else IGNORE for i, token in enumerate(sequence)],
    }


def collate(examples: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T), padded to the longest example."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded([e["input_ids"] for e in examples], PAD),
        "attention_mask": padded([[1] * len(e["input_ids"]) for e in examples], 0),
        "labels": padded([e["labels"] for e in examples], IGNORE),
    }
