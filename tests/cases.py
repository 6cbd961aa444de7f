"""The sample cases that values, gradients, opcheck, compile and every kernel are run on. Each names its regime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from accumloss import LossOptions


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    logits: torch.Tensor  # (..., V), any strides
    labels: torch.Tensor  # (...)
    weight: torch.Tensor | None = None  # (V,)
    options: LossOptions = field(default_factory=LossOptions)
    shift: int = 0

    @property
    def kwargs(self) -> dict:
        return {"shift": self.shift, **self.options.as_kwargs()}

    def to(self, device: str) -> Case:
        weight = None if self.weight is None else self.weight.to(device)
        logits = self.logits if self.logits.device.type == device else _to_preserving_strides(self.logits, device)
        return Case(self.name, logits, self.labels.to(device), weight, self.options, self.shift)


def _to_preserving_strides(tensor: torch.Tensor, device: str) -> torch.Tensor:
    storage = torch.empty(tensor.untyped_storage().size() // tensor.element_size(), dtype=tensor.dtype, device=device)
    storage.copy_(torch.as_strided(tensor, storage.shape, (1,), 0))
    return torch.as_strided(storage, tensor.shape, tensor.stride(), tensor.storage_offset())


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _logits(*shape: int, dtype: torch.dtype, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    # large values at the edges of blocks, where an off-by-one hides
    for at in {0, 31, 32, 255, 256, 511, 512, 1023, 1024, shape[-1] - 1}:
        if at < shape[-1]:
            logits[..., at] += scale
    return logits.to(dtype)


def _labels(*shape: int, classes: int, ignored: float = 0.25, seed: int = 1, ignore_index: int = -100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator)
    flat = labels.view(-1)
    if flat.numel() >= 2:
        flat[0], flat[-1] = 0, classes - 1
    if flat.numel() > 2:
        drop = torch.rand(flat.numel(), generator=generator) < ignored
        drop[0] = drop[-1] = False
        flat[drop] = ignore_index
    return labels


def short_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Rows of every length around the borders between the CPU kernels for short rows, more than these take at a time."""
    for V in (3, 8, 10, 11, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 64, 100, 128, 300, 511, 512, 513):
        weight = torch.linspace(0.25, 3.0, V) if V % 2 else None
        if weight is not None and dtype == torch.float64:
            weight = weight.double()
        yield Case(f"77 rows, V={V}", _logits(77, V, dtype=dtype), _labels(77, classes=V), weight)
    for V in (5, 21, 65):
        yield Case(f"3 x 30 rows, shift, V={V}", _logits(3, 30, V, dtype=dtype), _labels(3, 30, classes=V), shift=1)
        every = _labels(3, 60, classes=V)[:, ::2].int()
        yield Case(f"3 x 30 rows, strided labels, V={V}", _logits(3, 30, V, dtype=dtype), every, shift=2)


def sample_cases(dtype: torch.dtype, *, large: bool = True) -> Iterator[Case]:
    """The cases of one dtype. ``large=False`` leaves out those over 200,000 logits."""
    for V in (1, 2, 9, 31, 32, 33, 64, 1000, 1024, 1025):
        yield Case(f"V={V}", _logits(5, V, dtype=dtype), _labels(5, classes=V))
    yield Case("no leading dimension", _logits(33, dtype=dtype), torch.tensor(7))
    yield Case("no rows", _logits(0, 33, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    yield Case("all ignored", _logits(4, 33, dtype=dtype), torch.full((4,), -100))
    yield Case("(2, 3, 5, V)", _logits(2, 3, 5, 65, dtype=dtype), _labels(2, 3, 5, classes=65))
    yield Case("int32 labels", _logits(6, 65, dtype=dtype), _labels(6, classes=65).int())
    yield Case("ignore_index 3 inside the classes", _logits(9, 11, dtype=dtype),
               _labels(9, classes=11, ignore_index=3), options=LossOptions(ignore_index=3))  # fmt: skip

    yield Case("shift", _logits(3, 7, 65, dtype=dtype), _labels(3, 7, classes=65), shift=1)
    yield Case("shift 2", _logits(3, 7, 65, dtype=dtype), _labels(3, 7, classes=65), shift=2)
    yield Case("shift, T=1: nothing to predict", _logits(3, 1, 65, dtype=dtype), _labels(3, 1, classes=65), shift=1)
    yield Case("shift beyond T", _logits(3, 2, 65, dtype=dtype), _labels(3, 2, classes=65), shift=5)

    wide = _logits(3, 8, 130, dtype=dtype)
    yield Case("rows with a gap and no alignment", wide[:, :, 1:66], _labels(3, 8, classes=65))
    yield Case("time steps cut off", wide[:, 1:-2], _labels(3, 8, classes=130)[:, 1:-2], shift=1)
    yield Case("transposed rows", wide.transpose(0, 1), _labels(8, 3, classes=130), shift=1)
    yield Case("transposed classes: copied", _logits(6, 65, dtype=dtype).t().contiguous().t(), _labels(6, classes=65))
    yield Case("three strides: copied", _logits(2, 8, 6, 33, dtype=dtype)[:, ::2, ::3], _labels(2, 4, 2, classes=33))
    yield Case("expanded rows", _logits(1, 65, dtype=dtype).expand(4, 65), _labels(4, classes=65))
    yield Case("strided labels", _logits(4, 65, dtype=dtype), _labels(8, classes=65)[::2])

    weight = torch.linspace(0.25, 3.0, 65)
    for name, options, class_weight in (
        ("label smoothing", LossOptions(label_smoothing=0.1), None),
        ("all the mass smoothed", LossOptions(label_smoothing=1.0), None),
        ("z-loss", LossOptions(z_loss=1e-3), None),
        ("softcap", LossOptions(softcap=5.0), None),
        ("logit scale", LossOptions(logit_scale=0.0625), None),
        ("class weights", LossOptions(), weight),
        ("class weights, smoothing", LossOptions(label_smoothing=0.2), weight.bfloat16()),
        ("everything", LossOptions(-100, 0.1, 1e-3, 20.0, 1.5), weight),
    ):
        yield Case(name, _logits(3, 7, 65, dtype=dtype), _labels(3, 7, classes=65), class_weight, options, shift=1)

    shifted = _logits(6, 200, dtype=dtype) + (100 if dtype != torch.float16 else 50)
    yield Case("all logits shifted up", shifted, _labels(6, classes=200))
    confident = _logits(8, 200, dtype=dtype, scale=1.0)
    labels = _labels(8, classes=200, ignored=0)
    gaps = torch.tensor([4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 40.0, 60.0])
    confident[torch.arange(8), labels] = gaps.to(dtype)
    yield Case("confident: losses from 1e-2 to 1e-26", confident, labels)
    wrong = confident.clone()
    wrong[torch.arange(8), (labels + 1) % 200] = (2 * gaps).to(dtype)
    yield Case("confident and wrong", wrong, labels)
    yield Case("all logits equal", torch.zeros(4, 65, dtype=dtype), torch.tensor([0, 1, 64, 33]))
    masked = _logits(6, 1100, dtype=dtype)
    masked[:, :600] = -torch.inf
    masked[3:, 1090:] = -torch.inf
    yield Case("masked vocabulary", masked, torch.tensor([600, 700, 1099, 700, 1000, 1089]))

    if large:
        yield Case("V=50257, odd", _logits(9, 50257, dtype=dtype), _labels(9, classes=50257))
        yield Case("one long row", _logits(1, 128256, dtype=dtype), torch.tensor([128255]))
        yield Case("two long rows with options", _logits(2, 40001, dtype=dtype), _labels(2, classes=40001),
                   torch.linspace(0.5, 2.0, 40001), LossOptions(-100, 0.1, 1e-3, 30.0, 0.5))  # fmt: skip
        yield Case("many short rows", _logits(3000, 9, dtype=dtype), _labels(3000, classes=9))
