"""Bad input: all tensors of a call on one device, or an error; and a fake raises if and only if its op does."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

import accumloss

ops = torch.ops.accumloss
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = {
    "cross_entropy": ("logits", "labels", "weight"),
    "cross_entropy_backward": ("grad", "logits", "labels", "lse", "nll", "weight"),
    "cross_entropy_backward_": ("grad", "logits", "labels", "lse", "nll", "weight"),
    "cross_entropy_with_grad": ("grad", "logits", "labels", "weight"),
    "cross_entropy_with_grad_": ("grad", "logits", "labels", "weight"),
    "add_cross_entropy_": ("totals", "grad", "logits", "labels", "weight"),
    "mean_with_grad": ("grad", "logits", "labels", "weight"),
    "cross_entropy_shard": ("logits", "labels", "weight"),
    "cross_entropy_shard_backward": ("grad", "logits", "labels", "lse", "nll", "weight"),
    "cross_entropy_shard_backward_": ("grad", "logits", "labels", "lse", "nll", "weight"),
    "scale_": ("logits", "grad"),
    "scratch": ("logits",),
    "causal_lm": ("logits", "labels", "weight"),
    "masked_lm": ("logits", "labels", "weight"),
    "linear_cross_entropy": ("hidden", "head", "labels", "bias", "weight"),
    "linear_cross_entropy_with_grad": ("hidden", "head", "labels", "bias", "weight"),
}
BAD_OPTIONS = {
    "shift": (-1, 1, 2, 7), "label_smoothing": (-0.1, 1.1, math.nan, 0.5), "z_loss": (-1.0, math.inf, math.nan, 0.1),
    "softcap": (-1.0, math.inf, math.nan, 5.0), "logit_scale": (0.0, -1.0, math.inf, math.nan, 2.0),
    "max_scratch_bytes": (0, -1, 1, 1000), "metrics": (True,), "class_offset": (-1, 0, 1, 2**62),
    "vocab_size": (-2, 0, 1, 8, 9),
}  # fmt: skip


class Draw:
    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, n: int) -> int:
        return int(torch.randint(0, n, (), generator=self.generator))

    def one_of(self, values):
        return values[self.below(len(values))]


def good_input(draw: Draw, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    sizes = draw.one_of([(3,), (2, 3), (2, 2, 2), (1, 4), (4, 1)])
    V, H = draw.one_of([1, 5, 8]), 4
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "logits": torch.zeros(*sizes, V, dtype=dtype), "labels": torch.zeros(sizes, dtype=torch.int64),
        "weight": torch.ones(V), "grad": torch.ones((), dtype=acc), "lse": torch.zeros(sizes, dtype=torch.float64),
        "nll": torch.zeros(sizes, dtype=acc), "hidden": torch.zeros(*sizes, H, dtype=dtype),
        "totals": torch.zeros(5, dtype=torch.float64), "head": torch.zeros(V, H, dtype=dtype), "bias": torch.zeros(V, dtype=dtype),
    }  # fmt: skip


def changed(draw: Draw, x: torch.Tensor) -> torch.Tensor:
    """Another shape, dtype, device or layout; often a wrong one."""
    kind = draw.below(10)
    if kind == 0:
        return x.to(draw.one_of([*FLOATS, torch.int64, torch.int32, torch.int16, torch.bool, torch.uint8]))
    if kind == 1:
        return x.to("meta")
    if kind == 2:
        return x.unsqueeze(draw.below(x.dim() + 1))
    if kind == 3:
        return x[0] if x.dim() and x.shape[0] else x.reshape(1, -1)
    if kind == 4 and x.dim() and x.numel():
        at = draw.below(x.dim())
        return torch.cat([x, x.narrow(at, 0, 1)], at)
    if kind == 5 and x.dim():
        return x.narrow(draw.below(x.dim()), 0, 0)
    if kind == 6 and x.dim() > 1:
        return x.transpose(draw.below(x.dim()), draw.below(x.dim()))
    if kind == 7 and x.dim() and x.numel():
        return x.narrow(draw.below(x.dim()), 0, 1).expand(x.shape)
    if kind == 8:
        return torch.stack([x, x], -1)[..., 0]
    if kind == 9 and x.dim():  # rows that interlock or overlap
        strides = [draw.below(3 * x.shape[-1] + 1) for _ in x.shape[:-1]]
        return torch.zeros(500, dtype=x.dtype).as_strided(x.shape, (*strides, 1))
    return x.reshape(-1)


def call(name: str, tensors: dict[str, torch.Tensor | None], options: dict):
    given = [tensors[n] for n in NAMES[name]]
    if name == "scratch":
        return ops.scratch(*given, options.get("shift", 3), 5)
    if name == "linear_cross_entropy_with_grad":
        options = {**options, "needs": [True, True, given[3] is not None]}
    if "shard" in name:
        options = {
            "class_offset": 0,
            "vocab_size": tensors["logits"].shape[-1] if tensors["logits"].dim() else 1,
            **options,
        }
    return getattr(ops, name)(*given, **options)


def takes(name: str, option: str) -> bool:
    """Whether an op has the option."""
    return any(argument.name == option for argument in getattr(ops, name).default._schema.arguments)


def outcome(name, tensors, options):
    """The outputs as (shape, dtype, device), or the exception."""
    try:
        found = call(name, tensors, options)
    except Exception as error:
        return error
    found = [] if found is None else [found] if isinstance(found, torch.Tensor) else found
    return [(tuple(x.shape), x.dtype, x.device.type, x.stride()) for x in found]


@pytest.mark.parametrize("name", NAMES)
def test_fakes_raise_if_and_only_if_the_ops_do(name):
    draw = Draw(list(NAMES).index(name))
    raised = passed = 0
    for index in range(160):
        tensors: dict = good_input(draw, draw.one_of(FLOATS))
        for optional in ("weight", "bias"):
            if draw.below(3) == 0:
                tensors[optional] = None
        options = {}
        for _ in range(draw.below(3)):
            which = draw.one_of(NAMES[name])
            if tensors[which] is not None:
                tensors[which] = changed(draw, tensors[which])
        if draw.below(3) == 0:
            key = draw.one_of(list(BAD_OPTIONS))
            if takes(name, key) or (name, key) == ("scratch", "shift"):  # its rows
                options[key] = draw.one_of(BAD_OPTIONS[key])
        what = f"{name}, draw {index}: " + str({
            n: None if (t := tensors[n]) is None else (tuple(t.shape), t.stride(), t.dtype, t.device.type)
            for n in NAMES[name]
        }) + f" {options}"  # fmt: skip
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = {n: None if t is None else mode.from_tensor(t) for n, t in tensors.items()}
            fake = outcome(name, fakes, options)
        real = outcome(name, tensors, options)
        assert isinstance(real, Exception) == isinstance(fake, Exception), f"{what}: op {real!r}, fake {fake!r}"
        if isinstance(real, Exception):
            assert "expected" in str(real) and "expected" in str(fake), f"{what}: op {real!r}, fake {fake!r}"
            raised += 1
        else:
            assert real == fake, what
            passed += 1
    assert min(raised, passed) >= 10, (raised, passed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_tensors_on_two_devices_are_refused(name, device):
    """Each tensor alone on another device, and all but it; real tensors where the other is meta."""
    draw = Draw(1)
    tensors = good_input(draw, torch.float32)
    for which in NAMES[name]:
        for others in (False, True):
            if len(NAMES[name]) == 1:
                continue
            if device == "meta":
                moved = {n: t.to("meta") if (n == which) != others else t for n, t in tensors.items()}
                with pytest.raises(RuntimeError, match="expected .* on .*device.*got"):
                    call(name, moved, {})
                continue
            with FakeTensorMode():
                moved = {
                    n: torch.empty(t.shape, dtype=t.dtype, device="cuda" if (n == which) != others else "cpu")
                    for n, t in tensors.items()
                }
                with pytest.raises(RuntimeError, match="expected .* on .*device.*got"):
                    call(name, moved, {})


def test_a_loss_on_meta_stays_there():
    x, y = torch.empty(2, 3, 5, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta")
    assert ops.cross_entropy(x, y)[0].device.type == "meta"
    assert accumloss.masked_lm_loss(x, torch.zeros(2, 3, dtype=torch.int64)).device.type == "meta"
