"""The shapes that are measured: rows x classes, dtype, share of ignored rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Shape:
    """Logits (1, rows, vocab) of a dtype; `ignored` of the rows have no label."""

    rows: int
    vocab: int
    dtype: str
    ignored: float = 0.0

    @classmethod
    def parse(cls, text: str, ignored: float = 0.0) -> Shape:
        """2048x32000:bf16; without a dtype, bf16."""
        size, _, dtype = text.partition(":")
        rows, _, vocab = size.partition("x")
        dtype = dtype or "bf16"
        if not (rows.isdigit() and vocab.isdigit() and int(rows) > 1 and int(vocab) > 0 and dtype in DTYPES):
            raise ValueError(f"expected ROWSxVOCAB[:DTYPE] with DTYPE of {', '.join(DTYPES)}, got {text!r}")
        return cls(int(rows), int(vocab), dtype, ignored)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.torch_dtype.itemsize

    @property
    def floor_bytes(self) -> int:
        """Every logit of a row that counts is read once, every element of the gradient is written once."""
        return round(self.logits_bytes * (2 - self.ignored))

    def __str__(self) -> str:
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        return f"{self.rows}x{self.vocab} {self.dtype}{ignored}"


DEFAULT = (
    "2048x32000:bf16",
    "1024x128256:bf16",
    "512x262144:bf16",
    "4096x50257:bf16",
    "2048x32000:fp32",
    "1024x128256:fp32",
    "4096x9:bf16",
    "4096x9:fp32",
)
QUICK = ("256x32000:bf16", "256x32000:fp32", "1024x9:fp32")
