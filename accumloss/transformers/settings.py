"""What register_with_transformers was asked for. One object, which every module of this package reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Settings:
    inplace_backward: bool = False  # the losses write their gradient over the logits in backward
    evaluation: bool = True  # evaluation losses are means over the items of the whole set
    metrics: bool = False  # token accuracy and entropy go into Trainer's logs
    verify: Any = False  # measures what a Trainer's loss averages over; "error": raises where it is not exact
    fused_linear: bool = False  # heads defer their logits, and losses compute themselves from the hidden states

    def reset(self) -> None:
        """Back to what they are before anything is registered."""
        vars(self).update(vars(Settings()))


settings = Settings()
