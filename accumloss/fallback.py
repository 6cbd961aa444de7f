"""The ops in plain PyTorch, for tensors on a device that no kernel of this build serves.

Which devices those are, and why, is told once for each type. The rows go through in chunks within a budget: of the logits
one chunk exists in fp32 at a time. Nothing here waits for the device, and no shape depends on a value. The formulas are
those of ``csrc/row.h``, over all rows of a chunk at once; docs/numerics.md has their bounds.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import _C, checks
from ._compat import below_ad_inplace, computed_kernel, when_cuda_starts
from .options import NAMES, LossOptions
from .reference import shift_labels
from .sums import wide_dtype

Tensor = torch.Tensor
MAX_SCRATCH_BYTES = 256 * 2**20
_OF_PAIRS = 7  # buffers of a chunk where there are a student and a teacher


# Which devices, and why -----------------------------------------------------------------------------------------------


class FallbackWarning(UserWarning):
    """Tensors on a device that no kernel of this build serves: their losses are computed in plain PyTorch.

    The message says why, and what to do about it. Told once for each type of device; ``ACCUMLOSS_FALLBACK=error`` in the
    environment makes it an error in each call.

    Examples:
        >>> accumloss.build_info()["fallback"]  # the types of devices so far, each with the reason
        {}
    """


class Reason(NamedTuple):
    """Why no kernel serves a device, and what to do about it."""

    why: str
    remedy: str


announced: set[str] = set()  # types of devices of which it was said before any was used
served: dict[str, str] = {}  # type of a device that plain PyTorch has served in this process -> why


def reason(device: torch.device | str) -> Reason | None:
    """Why no kernel of this build serves a device; None where one does."""
    device = torch.device(device)
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda":
        return Reason(
            f"accumloss has kernels for cpu and cuda, none for {device.type}",
            "nothing has to be done, if speed is no matter",
        )
    if torch.version.hip is not None:
        return Reason("accumloss has no kernels for ROCm", "nothing has to be done, if speed is no matter")
    architectures = _architectures()
    if architectures is None:
        cause = _build().get("without_cuda")
        return Reason(
            "this accumloss was built without CUDA" + (f" ({cause})" if cause else ""),
            "install it again from its sources with ACCUMLOSS_CUDA=ON, which says what is missing",
        )
    if not torch.cuda.is_available():
        return None  # of a GPU of which nothing is known
    major, minor = torch.cuda.get_device_capability(device)
    if has_image(architectures, major, minor):
        return None
    return Reason(
        f"this accumloss was built for the architectures {architectures}, and has no image for sm_{major}{minor}",
        f"install it again from its sources with CUDAARCHS={major}{minor}",
    )


def _build() -> dict[str, Any]:
    return _C.build_info()


def _architectures() -> str | None:
    """As CMake writes them; None in a build without CUDA."""
    return _build()["cuda_architectures"]


def has_image(architectures: str, major: int, minor: int) -> bool:
    """Whether code for these architectures, as CMake writes them ("80-real 90a-real 100"), runs on such a GPU.

    Machine code of an architecture runs on those of its major version that are no older, PTX on all that are no older; that
    of ``90a`` on itself alone, of ``100f`` on its family. Of a word that is none of these, such as ``native``, the build
    knows no more than that nothing else was asked for: taken as fitting, so that a launch says what is wrong.
    """
    for architecture in architectures.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
        if found is None:
            return True
        of_major, of_minor, kind, only = int(found[1]), int(found[2]), found[3], found[4]
        if kind == "a":
            fits = (major, minor) == (of_major, of_minor)
        elif kind == "f" or only == "-real":
            fits = major == of_major and minor >= of_minor
        else:
            fits = (major, minor) >= (of_major, of_minor)
        if fits:
            return True
    return False


def _announce(function: str, device: torch.device) -> None:
    """Warns where that has not been said of this type of device, or refuses."""
    wish = os.environ.get("ACCUMLOSS_FALLBACK", "").strip()
    if wish == "" and device.type in served:
        return
    if wish not in ("", "error"):
        raise ValueError(f'accumloss: expected ACCUMLOSS_FALLBACK to be "error" or not set, got {wish!r}')
    why, remedy = reason(device) or Reason("the kernels have been passed over", "nothing has to be done")
    if wish == "error":
        raise RuntimeError(
            f"{function}: expected tensors on a device that kernels serve, since ACCUMLOSS_FALLBACK=error, got {device}: "
            f"{why}; {remedy}"
        )
    if device.type in announced and device.type not in served:
        served[device.type] = why
        return
    warnings.warn(
        f"accumloss: on {device} losses are computed in plain PyTorch, slower than by kernels: {why}; {remedy} "
        "(ACCUMLOSS_FALLBACK=error refuses)",
        FallbackWarning,
        stacklevel=3,
    )
    served[device.type] = why  # not where the warning is an error: then the next call raises too


# Labels outside of the classes ----------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """Memory of a device for the first bad label since the last check, written by the work of one stream alone."""

    first: Tensor  # (2,) its row and itself; row -1: none
    stream: Any  # None on a device without streams


def _in_stream(device: torch.device, stream: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if stream is None else torch.get_device_module(device).stream(stream)


_OF_GRAPHS = -1  # in the place of a stream's number: of all captures on a device
_records: dict[tuple[torch.device, int], _Record] = {}


def _current_stream(device: torch.device) -> Any:
    """None on a device without streams."""
    module = torch.get_device_module(device)
    return module.current_stream(device) if hasattr(module, "current_stream") and hasattr(module, "stream") else None


def _record_of(device: torch.device) -> Tensor | None:
    """The memory for the current stream; None where a capture has begun before there was any."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        found = _records.get((device, _OF_GRAPHS))
        return None if found is None else found.first
    stream = _current_stream(device)
    key = device, getattr(stream, "stream_id", 0)
    if key in _records:
        return _records[key].first

    def allocate() -> None:
        with _in_stream(device, stream):  # a thread begins in the stream that is the default
            for number in (key[1], _OF_GRAPHS):
                if (device, number) not in _records:
                    first = torch.full((2,), -1, dtype=torch.int64, device=device)
                    _records[device, number] = _Record(first, stream)

    # It outlives the call: in a thread of its own it is none of the memory of a graph that torch.compile warms up here, nor
    # an inference tensor.
    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    return _records[key].first


def _record_bad_labels(is_bad: Tensor, labels: Tensor) -> None:
    """Keeps the first of them on the device: to look would be to wait."""
    record = _record_of(labels.device) if labels.numel() else None
    if record is None:
        return
    row = is_bad.to(torch.float32).argmax()
    first = torch.stack([torch.where(is_bad.any(), row, -1), labels[row.view(1)].squeeze(0)])
    record.copy_(torch.where(record[0] >= 0, record, first))


def check_labels() -> None:
    """Raises IndexError where a call in plain PyTorch has met a label outside [0, V) since the last check.

    Waits for all calls so far, whatever streams they run on.
    """
    for device in {device for device, _ in _records}:
        module = torch.get_device_module(device)
        if hasattr(module, "synchronize"):  # graphs write to a record wherever they are replayed
            module.synchronize(device)
    for (device, _), record in list(_records.items()):
        with _in_stream(device, record.stream):
            row, label = record.first.tolist()
            if row >= 0:
                record.first.fill_(-1)
                raise IndexError(
                    f"cross_entropy: expected labels in [0, V) or ignore_index, got {label} for row {row} of an earlier call "
                    f"on {device}; check vocab_size and the value that pads the labels"
                )


# Rows -----------------------------------------------------------------------------------------------------------------


def _accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _split(given: dict[str, Any]) -> tuple[LossOptions, int, bool]:
    """The keywords of an op, of which the dispatcher leaves out those that are the default."""
    options = LossOptions(**{name: given[name] for name in NAMES if name in given})
    return options, given.get("shift", 0), given.get("metrics", False)


class _Call:
    """A call's tensors, checked, row by row."""

    def __init__(
        self,
        function: str,
        logits: Tensor,  # (..., V)
        labels: Tensor,  # (...)
        weight: Tensor | None,  # (V,); of a shard (vocab_size,)
        given: dict[str, Any],
        shard: tuple[int, int] | None = None,
        has_labels: bool = True,  # that are classes
    ):
        self._check(function, logits, labels, weight, given, shard)
        _announce(function, logits.device)
        self.options, shift, self.metrics = _split(given)
        self.logits, self.shape = logits, labels.shape
        self.acc, self.wide = _accumulation_dtype(logits), wide_dtype(logits.device)
        self.V = logits.shape[-1]
        self.class_offset, self.vocab_size = shard or (0, self.V)
        labels = shift_labels(labels, shift, self.options.ignore_index).reshape(-1).long()
        self.is_item = labels != self.options.ignore_index  # (N,)
        self.is_known = self.is_item  # (N,) whose label is a class
        if has_labels:
            is_bad = self.is_item & ((labels < 0) | (labels >= self.vocab_size))
            _record_bad_labels(is_bad, labels)
            self.is_known = self.is_item & ~is_bad
        classes = torch.where(self.is_known, labels, 0)
        local = classes - self.class_offset
        self.is_shard = shard is not None
        self.has_label = self.is_known & (local >= 0) & (local < self.V)  # (N,) among these classes
        self.y = local.clamp(0, self.V - 1)  # (N,)
        self.weight = None if weight is None else weight.to(self.acc)
        self.item_weight: Tensor | None = None  # (N,)
        self.weight_sum: Any = self.vocab_size
        if self.weight is not None:
            self.item_weight = self.weight[classes].to(self.wide)
            self.weight_sum = self.weight.sum(dtype=self.wide)
            self.weight = self.weight[self.class_offset : self.class_offset + self.V]

    @staticmethod
    def _check(
        function: str,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        given: dict[str, Any],
        shard: tuple[int, int] | None,
    ) -> None:
        for name, tensor in (("logits", logits), ("labels", labels), ("weight", weight)):
            if tensor is not None and (tensor.layout != torch.strided or tensor.is_nested):
                kind = "a nested tensor" if tensor.is_nested else f"a layout of {tensor.layout}"
                raise RuntimeError(f"{function}: expected {name} of dense layout, got {kind}; pass {name}.to_dense()")
        checks.check_call(function, logits, labels, weight, given, shard)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """One number of each row."""
        return torch.empty(self.shape, dtype=dtype, device=self.logits.device)

    def scalar(self, value: Tensor) -> Tensor:
        """A number that comes back, (1,) in the dtype of the rows."""
        return value.reshape(1).to(self.wide)

    def rows(self, value: Tensor) -> Tensor:
        return value.reshape(-1).to(self.wide)


def _chunks(*tensors: Tensor, buffers: int = 4) -> Iterator[tuple[slice, list[Tensor]]]:
    """Ranges of the rows of tensors (..., V), and those of each tensor, (b, t, V): where they lie, if two strides reach them.

    buffers: of a chunk's logits in the dtype of the accumulation that exist together, at most.
    """
    like = tensors[0]
    V = like.shape[-1]
    if not like.numel():
        return
    T = like.shape[-2] if like.dim() > 1 else 1
    if all(tensor.is_contiguous() for tensor in tensors):
        T = like.numel() // V
    as_rows = [tensor.reshape(-1, T, V) for tensor in tensors]
    B = as_rows[0].shape[0]
    most = max(MAX_SCRATCH_BYTES // (V * _accumulation_dtype(like).itemsize * buffers), 1)
    if most >= T:
        step = most // T
        for b in range(0, B, step):
            yield slice(b * T, min(b + step, B) * T), [each[b : b + step] for each in as_rows]
        return
    step = -(-T // -(-T // most))  # as few as possible, of one size but for the last
    for b in range(B):
        for t in range(0, T, step):
            yield slice(b * T + t, b * T + min(t + step, T)), [each[b : b + 1, t : t + step] for each in as_rows]


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy (n, V) of rows (b, t, V)."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x).view(-1, x.shape[-1])


def _transformed(x: Tensor, dtype: torch.dtype, options: LossOptions) -> Tensor:
    """z (n, V), which may be overwritten."""
    z = _widened(x, dtype)
    if options.softcap > 0:
        return z.mul_(options.logit_scale / options.softcap).tanh_().mul_(options.softcap)
    return z if options.logit_scale == 1 else z.mul_(options.logit_scale)


def _column(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).unsqueeze(-1)


class _Others(NamedTuple):
    """RowState of csrc/row.h: of the classes other than the label, (n,) in the wide dtype."""

    exps: Tensor  # (n, V) of the accumulation: exp(z_j - max), 0 for the label; takes the place of z
    max: Tensor
    sum: Tensor  # of exps
    below: Tensor | None  # sum of exps (z_j - max); with metrics
    linear: Tensor | None  # sum of w_j (z_j - origin) over all classes, the label too; with label smoothing
    target: Tensor  # z_y
    origin: Tensor  # z_y where it is finite, else 0


def _reduce(call: _Call, rows: slice, z: Tensor, smooths: bool) -> _Others:
    y = call.y[rows].unsqueeze(-1)
    target = z.gather(1, y)
    origin = torch.where(target.isfinite(), target, 0)
    linear = None
    if smooths:
        terms = z - origin
        linear = (terms if call.weight is None else terms.mul_(call.weight)).sum(1).to(call.wide)
        del terms
    if call.is_shard:  # whose classes need not have the label
        z.scatter_(1, y, torch.where(call.has_label[rows].unsqueeze(-1), -math.inf, target))
    else:
        z.scatter_(1, y, -math.inf)
    top = z.amax(1, keepdim=True)
    z.sub_(torch.where(top.isfinite(), top, 0))
    below = None
    if call.metrics:
        exps = z.exp()
        terms = z.mul_(exps).masked_fill_(exps == 0, 0)  # a class of probability 0 adds nothing
        below = terms.sum(1).to(call.wide)
        del terms
    else:
        exps = z.exp_()
    total = exps.sum(1).to(call.wide)
    top, target, origin = (value.squeeze(-1).to(call.wide) for value in (top, target, origin))
    return _Others(exps, top, total, below, linear, target, origin)


class _Result(NamedTuple):
    """RowResult of csrc/row.h, (n,) in the wide dtype; of rows that are ignored anything."""

    loss: Tensor
    lse: Tensor
    nll: Tensor
    entropy: Tensor | None


def _of_label(others: _Others) -> tuple[Tensor, ...]:
    """The larger of the label's logit and the others', their sum in units of its exp, lse and nll."""
    top = torch.maximum(others.max, others.target)
    total = torch.where(others.sum == 0, 0, others.sum * (others.max - top).exp())
    gap = top - others.target
    nll = torch.where(gap == 0, total.log1p(), gap + (total + (-gap).exp()).log())
    lse = torch.where(gap > 1024, top + total.log(), others.target + nll)
    is_none = ~top.isfinite() | others.target.isnan()  # all -inf, or +inf or NaN somewhere: not a distribution
    return top, total, lse.masked_fill_(is_none, math.nan), nll.masked_fill_(is_none, math.nan)


def _result(call: _Call, rows: slice, others: _Others) -> _Result:
    options = call.options
    top, total, lse, nll = _of_label(others)
    is_far = top - others.target > 1024
    is_bad = (call.is_item & ~call.is_known)[rows]
    lse, nll = lse.masked_fill_(is_bad, math.nan), nll.masked_fill_(is_bad, math.nan)
    loss = (1 - options.label_smoothing) * nll
    if call.item_weight is not None:
        loss = loss * call.item_weight[rows]
    if others.linear is not None:
        # lse less the origin, which may be so large that it would swallow the rest
        less = torch.where(is_far, top - others.origin + total.log(), others.target - others.origin + nll)
        spread = call.weight_sum * less - others.linear
        loss = loss + options.label_smoothing / call.V * spread
    if options.z_loss > 0:
        loss = loss + options.z_loss * lse * lse
    entropy = None
    if others.below is not None:
        scale = torch.where(others.sum == 0, 0, (others.max - top).exp())
        below = torch.where(scale == 0, 0, (others.below + others.sum * (others.max - top)) * scale)
        of_label = (others.target - top).exp()
        own = torch.where(of_label == 0, 0, of_label * (others.target - top))
        log_total = torch.where(others.target == top, nll, (total + of_label).log())
        entropy = (log_total - (below + own) / (total + of_label)).masked_fill_(nll.isnan(), math.nan)
    return _Result(loss, lse, nll, entropy)


def _items(call: _Call, rows: slice, value: Tensor, other: Any = 0) -> Tensor:
    return torch.where(call.is_item[rows], value, other)


class _Factors(NamedTuple):
    """RowGrad of csrc/row.h, (n,) in the wide dtype."""

    probability: Tensor  # grad * C
    smoothing: Tensor | None  # grad * e / V
    target: Tensor  # grad * dL/dz_y


def _factors(call: _Call, rows: slice, grad: Tensor, lse: Tensor, nll: Tensor) -> _Factors:
    options = call.options
    share = options.label_smoothing / call.vocab_size
    item_weight: Any = 1.0 if call.item_weight is None else call.item_weight[rows]
    hard = (1 - options.label_smoothing) * item_weight
    soft = share * call.weight_sum + 2 * options.z_loss * lse
    target = soft * (-nll).exp() + hard * (-nll).expm1() - share * item_weight
    return _Factors(grad * (hard + soft), grad * share if share else None, grad * target)


def _write_gradient(
    call: _Call,
    rows: slice,
    is_written: Tensor,  # (n,): zero elsewhere
    x: Tensor,  # (b, t, V)
    g: Tensor,  # (n, V) p_j grad C, overwritten
    smoothing: Tensor | None,
    target: Tensor,
    out: Tensor,  # (b, t, V), may be x
) -> None:
    options = call.options
    y = call.y[rows].unsqueeze(-1)
    if smoothing is not None and call.weight is not None:
        g.addcmul_(_column(smoothing, call.acc), call.weight.unsqueeze(0), value=-1)
    elif smoothing is not None:
        g.sub_(_column(smoothing, call.acc))
    of_label = _column(target, call.acc).expand(g.shape[0], 1)
    if call.is_shard:
        of_label = torch.where(call.has_label[rows].unsqueeze(-1), of_label, g.gather(1, y))
    g.scatter_(1, y, of_label)
    _multiply_by_slope(g, x, call.acc, options)
    g.masked_fill_(~is_written.unsqueeze(-1), 0)
    out.copy_(g.view(out.shape))


def _multiply_by_slope(g: Tensor, x: Tensor, dtype: torch.dtype, options: LossOptions) -> None:
    """g *= dz/dx, written as 4E / (1 + E)^2 of E = exp(-2|u|), which keeps its digits where the cap saturates."""
    if options.softcap > 0:
        e = _widened(x, dtype).abs_().mul_(-2 * options.logit_scale / options.softcap).exp_()
        g.mul_(e)
        e.add_(1)
        g.div_(e).div_(e).mul_(4 * options.logit_scale)
    elif options.logit_scale != 1:
        g.mul_(options.logit_scale)


def _probabilities(z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """exp(z - lse) (n, V) in the place of z, but for factors (n,): lse is taken in two pieces."""
    high = lse.to(z.dtype)
    return z.sub_(high.unsqueeze(-1)).exp_(), (high.to(lse.dtype) - lse).exp()


def _log_probabilities(z: Tensor, lse: Tensor) -> Tensor:
    """z - lse (n, V) in the place of z."""
    high = lse.to(z.dtype)
    return z.sub_(high.unsqueeze(-1)).add_(_column(high.to(lse.dtype) - lse, z.dtype))


# The ops --------------------------------------------------------------------------------------------------------------


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Below autograd, whose keys the dispatcher may have left open."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with below_ad_inplace():
            return function(*args, **kwargs)

    return call


class _Sums:
    """The sums of a call, in the wide dtype while they are added up."""

    def __init__(self, call: _Call):
        device = call.logits.device
        self.call = call
        self.loss, self.entropy = (torch.zeros((), dtype=call.wide, device=device) for _ in range(2))
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.items = call.is_item.sum()
        weights = call.is_item if call.item_weight is None else torch.where(call.is_item, call.item_weight, 0)
        self.weight = weights.sum(dtype=call.wide)

    def add(self, rows: slice, x: Tensor, found: _Result) -> None:
        call = self.call
        self.loss += _items(call, rows, found.loss).sum()
        if found.entropy is not None:
            self.entropy += _items(call, rows, found.entropy).sum()
            is_correct = (x.argmax(-1).view(-1) == call.y[rows]) & call.is_known[rows] & ~found.nll.isnan()
            self.correct += is_correct.sum()

    def fields(self) -> tuple[Tensor, ...]:
        acc = self.call.acc
        # copies, where nothing has to be rounded too: two outputs of an op are never one tensor
        loss, weight, entropy = (each.to(acc, copy=True) for each in (self.loss, self.weight, self.entropy))
        return loss, self.items, weight, self.correct, entropy


def _forward(
    call: _Call,
    rows_of: tuple[Tensor, Tensor] | None = None,  # lse and nll (...), to be written
    grad: Tensor | None = None,  # (1,) what comes back
    out: Tensor | None = None,  # (..., V) of the gradient; may be the logits
) -> _Sums:
    sums = _Sums(call)
    for rows, (x, *outs) in _chunks(call.logits, *([] if out is None else [out])):
        z = _transformed(x, call.acc, call.options)
        others = _reduce(call, rows, z, call.options.label_smoothing > 0)
        del z
        found = _result(call, rows, others)
        sums.add(rows, x, found)
        if rows_of is not None:
            for value, output in zip((found.lse, found.nll), rows_of, strict=True):
                output.view(-1)[rows] = _items(call, rows, value).to(output.dtype)
        if grad is not None:
            factors = _factors(call, rows, grad, found.lse, found.nll)
            of_exps = factors.probability * (others.max - found.lse).exp()
            g = others.exps.mul_(_column(of_exps, call.acc))
            _write_gradient(call, rows, call.is_known[rows], x, g, factors.smoothing, factors.target, outs[0])
    return sums


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **given: Any) -> tuple[Tensor, ...]:
    call = _Call("cross_entropy", logits, labels, weight, given)
    lse, nll = call.empty(call.wide), call.empty(call.acc)
    loss_sum, num_items, total_weight, num_correct, entropy_sum = _forward(call, (lse, nll)).fields()
    return loss_sum, num_items, total_weight, lse, num_correct, entropy_sum, nll


def _like(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _check_saved(function: str, saved: dict[str, Tensor], call: _Call, labels: Tensor) -> None:
    dtypes = {"nll": call.acc, "entropy": call.acc, "label": torch.int64}
    for name, tensor in saved.items():
        checks.check_saved(function, name, tensor, dtypes.get(name, call.wide), labels, call.logits)


def _backward_into(
    function: str,
    out: Tensor,
    grad_loss_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    nll: Tensor,
    weight: Tensor | None,
    given: dict[str, Any],
    shard: tuple[int, int] | None = None,
) -> None:
    call = _Call(function, logits, labels, weight, given, shard)
    checks.check_grad(function, grad_loss_sum, logits)
    _check_saved(function, {"lse": lse, "nll": nll}, call, labels)
    grad, of_lse, of_nll = call.scalar(grad_loss_sum), call.rows(lse), call.rows(nll)
    for rows, (x, to) in _chunks(logits, out):
        p, rest = _probabilities(_transformed(x, call.acc, call.options), of_lse[rows])
        factors = _factors(call, rows, grad, of_lse[rows], of_nll[rows])
        g = p.mul_(_column(factors.probability * rest, call.acc))
        _write_gradient(call, rows, call.is_known[rows], x, g, factors.smoothing, factors.target, to)


def cross_entropy_backward(
    grad_loss_sum: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, nll: Tensor, weight: Tensor | None = None, **given: Any
) -> Tensor:  # fmt: skip
    out = _like(logits)
    _backward_into("cross_entropy_backward", out, grad_loss_sum, logits, labels, lse, nll, weight, given)
    return out


def cross_entropy_backward_(
    grad_loss_sum: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, nll: Tensor, weight: Tensor | None = None, **given: Any
) -> None:  # fmt: skip
    checks.check_in_place("cross_entropy_backward_", logits)
    _backward_into("cross_entropy_backward_", logits, grad_loss_sum, logits, labels, lse, nll, weight, given)


def cross_entropy_with_grad(
    grad_loss_sum: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **given: Any
) -> tuple[Tensor, ...]:
    call = _Call("cross_entropy_with_grad", logits, labels, weight, given)
    checks.check_grad("cross_entropy_with_grad", grad_loss_sum, logits)
    out = _like(logits)
    return *_forward(call, None, call.scalar(grad_loss_sum), out).fields(), out


def cross_entropy_with_grad_(
    grad_loss_sum: Tensor, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **given: Any
) -> tuple[Tensor, ...]:
    name = "cross_entropy_with_grad_"
    checks.check_in_place(name, logits)
    call = _Call(name, logits, labels, weight, given)
    checks.check_grad(name, grad_loss_sum, logits)
    return _forward(call, None, call.scalar(grad_loss_sum), logits).fields()


def add_cross_entropy_(
    totals: Tensor, grad_loss_sum: Tensor | None, logits: Tensor, labels: Tensor, weight: Tensor | None = None, **given: Any
) -> None:  # fmt: skip
    name = "add_cross_entropy_"
    if grad_loss_sum is not None:
        checks.check_in_place(name, logits)
    call = _Call(name, logits, labels, weight, given)
    checks.check_totals(name, totals, logits)
    grad = None
    if grad_loss_sum is not None:
        checks.check_grad(name, grad_loss_sum, logits)
        grad = call.scalar(grad_loss_sum)
    sums = _forward(call, None, grad, None if grad is None else logits)
    of_call = (sums.loss, sums.items, sums.weight, sums.correct, sums.entropy)
    totals += torch.stack([value.to(totals.dtype) for value in of_call])


def mean_with_grad(
    divisor: Tensor,
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    expected_grad: float = 1.0,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    name = "mean_with_grad"
    call = _Call(name, logits, labels, weight, given)
    checks.check_divisor(name, divisor, logits, call.acc)
    out = _like(logits)
    factor = expected_grad * divisor.reciprocal()
    loss_sum = _forward(call, None, call.scalar(factor), out).fields()[0]
    return (loss_sum / divisor).view(()), out


def token_statistics(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **given: Any) -> tuple[Tensor, ...]:
    call = _Call("token_statistics", logits, labels, weight, given)
    loss, nll, lse = call.empty(call.acc), call.empty(call.acc), call.empty(call.wide)
    if call.metrics:
        entropy, argmax = call.empty(call.acc), call.empty(torch.int64)
    else:
        entropy, argmax = (torch.empty(0, dtype=dtype, device=logits.device) for dtype in (call.acc, torch.int64))
    for rows, (x,) in _chunks(logits):
        z = _transformed(x, call.acc, call.options)
        found = _result(call, rows, _reduce(call, rows, z, call.options.label_smoothing > 0))
        del z
        for value, output in ((found.loss, loss), (found.nll, nll), (found.lse, lse), (found.entropy, entropy)):
            if value is not None:
                output.view(-1)[rows] = _items(call, rows, value).to(output.dtype)
        if call.metrics:
            argmax.view(-1)[rows] = torch.where(call.is_known[rows], x.argmax(-1).view(-1), -1)
    return loss, nll, lse, entropy, argmax


def _tokens_backward_into(
    function: str,
    out: Tensor,
    grads: Sequence[Tensor | None],  # of loss, nll, lse, entropy
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    lse: Tensor,
    entropy: Tensor,
    weight: Tensor | None,
    given: dict[str, Any],
) -> None:
    given = dict(given)
    class_offset, vocab_size = given.pop("class_offset", 0), given.pop("vocab_size", 0)
    shard = (class_offset, vocab_size) if vocab_size else None
    call = _Call(function, logits, labels, weight, given, shard)
    saved = {"lse": lse, "nll": nll, **({} if grads[3] is None else {"entropy": entropy})}
    _check_saved(function, saved, call, labels)
    checks.check_token_grads(function, grads, labels, logits)
    of_rows = [None if grad is None else call.rows(grad) for grad in grads]
    is_written = call.is_known & functools.reduce(
        torch.logical_or, [grad != 0 for grad in of_rows if grad is not None], torch.zeros_like(call.is_known)
    )
    of_lse, of_nll = call.rows(lse), call.rows(nll)
    of_entropy = None if grads[3] is None else call.rows(entropy)
    for rows, (x, to) in _chunks(logits, out):
        grad_loss, grad_nll, grad_lse, grad_entropy = (0.0 if grad is None else grad[rows] for grad in of_rows)
        row_lse, row_nll = of_lse[rows], of_nll[rows]
        zero = torch.zeros_like(row_lse)
        factors = _factors(call, rows, zero + grad_loss, row_lse, row_nll)
        H = zero if of_entropy is None else of_entropy[rows]
        p_y = (-row_nll).exp()
        own = torch.where(p_y == 0, 0, p_y * (grad_lse + grad_entropy * (row_nll - H)))
        # nothing comes back to a loss that is infinite: no share of it either
        of_loss = factors.target if grads[0] is not None else zero
        target = of_loss + grad_nll * (-row_nll).expm1() + own
        probability = factors.probability + grad_nll + grad_lse - grad_entropy * H
        z = _transformed(x, call.acc, call.options)
        if of_entropy is None:
            p, rest = _probabilities(z, row_lse)
            g = p.mul_(_column(probability * rest, call.acc))
        else:
            log_p = _log_probabilities(z, row_lse)
            p = log_p.exp()
            g = log_p.mul_(_column(-(zero + grad_entropy), call.acc)).add_(_column(probability, call.acc))
            g.mul_(p).masked_fill_(p == 0, 0)
            del p, log_p
        del z
        _write_gradient(call, rows, is_written[rows], x, g, factors.smoothing, target, to)


def token_statistics_backward(
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    lse: Tensor,
    entropy: Tensor,
    weight: Tensor | None = None,
    **given: Any,
) -> Tensor:
    out = _like(logits)
    grads = (grad_loss, grad_nll, grad_lse, grad_entropy)
    _tokens_backward_into("token_statistics_backward", out, grads, logits, labels, nll, lse, entropy, weight, given)
    return out


def token_statistics_backward_(
    grad_loss: Tensor | None,
    grad_nll: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    lse: Tensor,
    entropy: Tensor,
    weight: Tensor | None = None,
    **given: Any,
) -> None:
    name = "token_statistics_backward_"
    checks.check_in_place(name, logits)
    grads = (grad_loss, grad_nll, grad_lse, grad_entropy)
    _tokens_backward_into(name, logits, grads, logits, labels, nll, lse, entropy, weight, given)


# Rows of two tensors


def _row_lse(z: Tensor, wide: torch.dtype) -> Tensor:
    """lse of rows (n, V), in the wide dtype."""
    top = z.amax(-1, keepdim=True)
    total = (z - torch.where(top.isfinite(), top, 0)).exp_().sum(-1).to(wide)
    top = top.squeeze(-1).to(wide)
    return torch.where(top.isfinite(), top + total.log(), math.nan)


def _from_mixture(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log s_j - log m_j and log t_j - log m_j for m = (1 - beta) s + beta t; anything where both are 0."""
    log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    return log_s - log_m, log_t.sub(log_m)


def _divergence(log_p: Tensor, from_m: Tensor, wide: torch.dtype) -> Tensor:
    """sum_j p_j (log p_j - log m_j): a class of probability 0 adds nothing, whatever its logarithm."""
    p = log_p.exp()
    return from_m.mul(p).masked_fill_(p == 0, 0).sum(-1).to(wide)


def _of_pair(given: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    return given.get("beta", 0.5), {name: value for name, value in given.items() if name != "beta"}


def _pair_call(function: str, student: Tensor, teacher: Tensor, labels: Tensor, given: dict[str, Any]) -> _Call:
    beta, options = _of_pair(given)
    checks.check_distillation(function, student, teacher, labels, beta, **options)
    return _Call(function, student, labels, None, options, has_labels=False)


def distillation(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, **given: Any) -> tuple[Tensor, ...]:
    call = _pair_call("distillation", student_logits, teacher_logits, labels, given)
    beta, wide = _of_pair(given)[0], call.wide
    loss = call.empty(call.acc)
    lse, teacher_lse, of_student, of_teacher = (call.empty(wide) for _ in range(4))
    for rows, (x, t) in _chunks(student_logits, teacher_logits, buffers=_OF_PAIRS):
        log_s, log_t = (_transformed(each, call.acc, call.options) for each in (x, t))
        row_lse, row_teacher_lse = _row_lse(log_s, wide), _row_lse(log_t, wide)
        log_s, log_t = _log_probabilities(log_s, row_lse), _log_probabilities(log_t, row_teacher_lse)
        zero = torch.zeros_like(row_lse)
        if beta == 0:
            s, own = zero, _divergence(log_t, log_t - log_s, wide)
        elif beta == 1:
            s, own = _divergence(log_s, log_s - log_t, wide), zero
        else:
            from_s, from_t = _from_mixture(log_s, log_t, beta)
            s, own = _divergence(log_s, from_s, wide), _divergence(log_t, from_t, wide)
            del from_s, from_t
        del log_s, log_t
        total = own if beta == 0 else s if beta == 1 else beta * own + (1 - beta) * s
        found = ((loss, total), (lse, row_lse), (teacher_lse, row_teacher_lse), (of_student, s), (of_teacher, own))
        for output, value in found:
            output.view(-1)[rows] = _items(call, rows, value).to(output.dtype)
    return loss, lse, teacher_lse, of_student, of_teacher


def _distillation_into(
    function: str,
    out: Tensor,
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    saved: dict[str, Tensor],
    given: dict[str, Any],
) -> None:
    call = _pair_call(function, student, teacher, labels, given)
    beta = _of_pair(given)[0]
    checks.check_row_grad(function, "grad_loss", grad_loss, labels, student)
    _check_saved(function, saved, call, labels)
    of = {name: call.rows(value) for name, value in saved.items()}
    grad = call.rows(grad_loss) * (call.options.logit_scale * (1 - beta if 0 < beta < 1 else 1))
    is_written = call.is_item & (grad != 0)
    for rows, (x, t, to) in _chunks(student, teacher, out, buffers=_OF_PAIRS):
        log_s = _log_probabilities(_transformed(x, call.acc, call.options), of["lse"][rows])
        log_t = _log_probabilities(_transformed(t, call.acc, call.options), of["teacher_lse"][rows])
        if beta == 0:
            g = log_s.exp_().sub_(log_t.exp_())
        else:
            from_m = log_s - log_t if beta == 1 else _from_mixture(log_s, log_t, beta)[0]
            s = log_s.exp_()
            g = from_m.sub_(_column(of["of_student"][rows], call.acc)).mul_(s).masked_fill_(s == 0, 0)
            del from_m, s
        del log_s, log_t
        g.mul_(_column(grad[rows], call.acc)).masked_fill_(~is_written[rows].unsqueeze(-1), 0)
        to.copy_(g.view(to.shape))


def distillation_backward(
    grad_loss: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    of_student: Tensor,
    of_teacher: Tensor,
    **given: Any,
) -> Tensor:
    out = _like(student_logits)
    saved = {"lse": lse, "teacher_lse": teacher_lse, "of_student": of_student, "of_teacher": of_teacher}
    _distillation_into("distillation_backward", out, grad_loss, student_logits, teacher_logits, labels, saved, given)
    return out


def distillation_backward_(
    grad_loss: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    lse: Tensor,
    teacher_lse: Tensor,
    of_student: Tensor,
    of_teacher: Tensor,
    **given: Any,
) -> None:
    name = "distillation_backward_"
    checks.check_in_place(name, student_logits)
    saved = {"lse": lse, "teacher_lse": teacher_lse, "of_student": of_student, "of_teacher": of_teacher}
    _distillation_into(name, student_logits, grad_loss, student_logits, teacher_logits, labels, saved, given)


def _target_call(function: str, logits: Tensor, targets: Tensor, weight: Tensor | None, given: dict[str, Any]) -> _Call:
    checks.require(logits.dim() >= 1, function, lambda: "logits of shape (..., V), got a 0-dim tensor")
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    call = _Call(function, logits, labels, weight, given, has_labels=False)
    checks.check_like(function, "targets", targets, logits, "logits")
    return call


def _weighted_targets(call: _Call, q: Tensor) -> Tensor:
    """w_j q_j (n, V), q smoothed, of targets (b, t, V)."""
    q = _widened(q, call.acc)
    e = call.options.label_smoothing
    if e > 0:
        q.mul_(1 - e).add_(e / call.V)
    return q if call.weight is None else q.mul_(call.weight)


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, weight: Tensor | None = None, **given: Any
) -> tuple[Tensor, ...]:
    call = _target_call("soft_cross_entropy", logits, targets, weight, given)
    loss, nll = call.empty(call.acc), call.empty(call.acc)
    lse, total, of_label = (call.empty(call.wide) for _ in range(3))
    label = call.empty(torch.int64)
    for rows, (x, t) in _chunks(logits, targets):
        call.y[rows] = t.argmax(-1).view(-1)  # whose label is the class of the largest target
        y = call.y[rows].unsqueeze(-1)
        others = _reduce(call, rows, _transformed(x, call.acc, call.options), smooths=False)
        _, _, row_lse, row_nll = _of_label(others)
        del others
        q = _weighted_targets(call, t)
        own = q.gather(1, y).squeeze(-1).to(call.wide)
        q.scatter_(1, y, 0)
        of_others = q.sum(1).to(call.wide)
        log_p = _log_probabilities(_transformed(x, call.acc, call.options), row_lse)
        surprise = log_p.mul_(q).masked_fill_(q == 0, 0).sum(1).to(call.wide).neg_()
        del log_p, q
        row_loss = surprise + torch.where(own == 0, 0, own * row_nll)
        if call.options.z_loss > 0:
            row_loss = row_loss + call.options.z_loss * row_lse * row_lse
        row_loss = row_loss.masked_fill(row_nll.isnan(), math.nan)
        found = (
            (loss, row_loss), (nll, row_nll), (lse, row_lse), (total, of_others + own), (of_label, own),
            (label, call.y[rows]),
        )  # fmt: skip
        for output, value in found:
            output.view(-1)[rows] = value.to(output.dtype)
    return loss, nll, lse, total, of_label, label


def soft_cross_entropy_backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    nll: Tensor,
    lse: Tensor,
    total: Tensor,
    of_label: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    **given: Any,
) -> Tensor:
    name = "soft_cross_entropy_backward"
    call = _target_call(name, logits, targets, weight, given)
    checks.check_row_grad(name, "grad_loss", grad_loss, label, logits)
    saved = {"nll": nll, "lse": lse, "total": total, "of_label": of_label, "label": label}
    _check_saved(name, saved, call, label)
    out = _like(logits)
    call.y = label.reshape(-1)
    grad, of_nll, of_lse = (call.rows(value) for value in (grad_loss, nll, lse))
    of_all, of_own = call.rows(total), call.rows(of_label)
    from_lse = 2 * call.options.z_loss * of_lse
    target = of_all * (-of_nll).expm1() + (of_all - of_own) + from_lse * (-of_nll).exp()
    is_written = grad != 0
    for rows, (x, t, to) in _chunks(logits, targets, out):
        p, rest = _probabilities(_transformed(x, call.acc, call.options), of_lse[rows])
        g = p.mul_(_column((of_all + from_lse)[rows] * rest, call.acc)).sub_(_weighted_targets(call, t))
        g.scatter_(1, call.y[rows].unsqueeze(-1), _column(target[rows], call.acc))
        g.mul_(_column(grad[rows], call.acc))
        _multiply_by_slope(g, x, call.acc, call.options)
        g.masked_fill_(~is_written[rows].unsqueeze(-1), 0)
        to.copy_(g.view(to.shape))
    return out


# Of logits that are a shard of the vocabulary


def cross_entropy_shard(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, *, class_offset: int, vocab_size: int, **given: Any
) -> Tensor:
    call = _Call("cross_entropy_shard", logits, labels, weight, given, (class_offset, vocab_size))
    smooths = call.options.label_smoothing > 0
    count = 3 + smooths + 2 * call.metrics
    columns = torch.empty(count, *labels.shape, dtype=call.wide, device=logits.device)
    of_shard: Any = call.V if call.weight is None else call.weight.sum(dtype=call.wide)
    for rows, (x,) in _chunks(logits):
        has_label = call.has_label[rows]
        others = _reduce(call, rows, _transformed(x, call.acc, call.options), smooths)
        is_none = others.max.isnan() | (others.max == math.inf)
        log_sum = torch.where(others.sum == 0, -math.inf, others.sum.log()).masked_fill(is_none, math.nan)
        found = [others.max, log_sum, torch.where(has_label, others.target, math.nan)]
        if others.linear is not None:
            about = torch.where(has_label & others.target.isfinite(), others.target, 0)
            about = torch.where(others.max.isfinite(), others.max, about)
            found.append(others.linear + of_shard * (others.origin - about))
        if others.below is not None:
            found.append(torch.where(others.sum == 0, 0, others.sum.log() - others.below / others.sum))
            best, first = x.max(-1)
            wins = ~has_label | (first.view(-1) == call.y[rows])
            found.append(torch.where(wins, best.view(-1).to(call.wide), math.nan))
        for column, value in zip(columns.view(count, -1), found, strict=True):
            column[rows] = _items(call, rows, value)
    return columns


def cross_entropy_shard_backward(
    grad_loss_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    nll: Tensor,
    weight: Tensor | None = None,
    *,
    class_offset: int,
    vocab_size: int,
    **given: Any,
) -> Tensor:
    out = _like(logits)
    shard = (class_offset, vocab_size)
    _backward_into("cross_entropy_shard_backward", out, grad_loss_sum, logits, labels, lse, nll, weight, given, shard)
    return out


def cross_entropy_shard_backward_(
    grad_loss_sum: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    nll: Tensor,
    weight: Tensor | None = None,
    *,
    class_offset: int,
    vocab_size: int,
    **given: Any,
) -> None:
    name = "cross_entropy_shard_backward_"
    checks.check_in_place(name, logits)
    shard = (class_offset, vocab_size)
    _backward_into(name, logits, grad_loss_sum, logits, labels, lse, nll, weight, given, shard)


def scale_(values: Tensor, factor: Tensor) -> None:
    """Visits the values where the factor is 1 too: to look would be to wait."""
    checks.check_scale(values, factor)
    _announce("scale_", values.device)
    acc = _accumulation_dtype(values)
    factor = factor.reshape(()).to(acc)
    flat = values.view(-1)
    step = MAX_SCRATCH_BYTES // (2 * acc.itemsize)
    for begin in range(0, flat.numel(), step):
        part = flat[begin : begin + step]
        part.copy_(part.to(acc) * factor)  # a 0-dim factor would be rounded to 16 bits first


def scratch(like: Tensor, rows: int, columns: int) -> Tensor:
    checks.check_scratch(like, rows, columns)
    return torch.empty(rows, columns, dtype=like.dtype, device=like.device)


# Registration ---------------------------------------------------------------------------------------------------------

KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: _plain(function)
    for function in (
        cross_entropy, cross_entropy_backward, cross_entropy_backward_, cross_entropy_with_grad, cross_entropy_with_grad_,
        add_cross_entropy_, mean_with_grad, token_statistics, token_statistics_backward, token_statistics_backward_,
        distillation, distillation_backward, distillation_backward_, soft_cross_entropy, soft_cross_entropy_backward,
        cross_entropy_shard, cross_entropy_shard_backward, cross_entropy_shard_backward_, scale_, scratch,
    )
}  # fmt: skip


# Of all devices; nested tensors, whose keys that leaves out, are refused by name.
KEYS = (
    "CompositeExplicitAutograd",
    "NestedTensorCPU",
    "NestedTensorCUDA",
    "NestedTensorXPU",
    "NestedTensorPrivateUse1",
)


def register(library: torch.library.Library) -> None:
    """For every device whose dispatch key has no kernel; and, once it is known which GPUs there are, for those without an
    image in this build."""
    for name, kernel in KERNELS.items():
        for key in KEYS:
            library.impl(name, kernel, key)
    if _architectures() is not None:
        when_cuda_starts(lambda: _pass_over_gpus(library))


def _pass_over_gpus(library: torch.library.Library) -> None:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    unserved = {device for device in devices if reason(device) is not None}
    if unserved:
        pass_over(library, "CUDA", unserved.__contains__)


def pass_over(library: torch.library.Library, key: str, is_unserved: Callable[[torch.device], bool]) -> None:
    """Has plain PyTorch stand in for the kernels of a dispatch key on some of its devices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a kernel already
        for name, kernel in KERNELS.items():
            library.impl(name, _choose(name, kernel, key, is_unserved), key, with_keyset=True)


def _choose(name: str, plain: Callable[..., Any], key: str, is_unserved: Callable[[torch.device], bool]) -> Any:
    compiled = computed_kernel(f"accumloss::{name}", key)

    def kernel(keyset: Any, *args: Any, **given: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        return plain(*args, **given) if is_unserved(device) else compiled(keyset, *args, **given)

    return kernel
