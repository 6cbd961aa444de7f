"""What register_with_transformers was asked for. One object, which every module of this package reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    inplace_backward: bool = False  # the losses write their gradient over the logits in backward


settings = Settings()
