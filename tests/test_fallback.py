"""Devices without kernels: plain PyTorch in their place, held to docs/numerics.md, on the CPU and on a device of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import on_acme
import pytest
import test_distillation
import torch
from cases import DTYPES, sample_cases, short_cases
from oracle import check_sums, expected, token_expected, z_scale
from shards import merged, seven_outputs
from tolerances import SUM, assert_close, assert_within, entropy_bound, row_loss_bound
from torch.utils._python_dispatch import TorchDispatchMode

import accumloss
from accumloss import _compat, fallback, ops, parallel

HERE = Path(__file__).resolve().parent
OPS = torch.ops.accumloss


@pytest.fixture
def plain(monkeypatch):
    """Plain PyTorch stands in for the kernels of the CPU, as it does for a GPU that the build has no image for."""
    library = torch.library.Library("accumloss", "IMPL")
    fallback.pass_over(library, "CPU", lambda device: True)
    monkeypatch.setitem(fallback.served, "cpu", "a test")  # which has been told
    yield
    library._destroy()


def bound_of(case):
    return row_loss_bound(case.logits.dtype, "fallback", z_scale(case))


# Values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_match_float64(plain, dtype):
    """Every sample case: the sums and rows of a forward, the gradient from them, with them, in place and added."""
    acc = ops.accumulation_dtype(torch.empty(0, dtype=dtype))
    grad = torch.tensor(0.25, dtype=acc)
    for case in (*sample_cases(dtype), *short_cases(dtype)):
        wanted = expected(case, "fallback", 0.25)
        given = (case.logits, case.labels, case.weight)
        found = OPS.cross_entropy(*given, **case.kwargs, metrics=True)
        check_sums(found, case, wanted, "fallback")
        backward = OPS.cross_entropy_backward(
            grad, case.logits, case.labels, found[3], found[6], case.weight, **case.kwargs
        )
        *sums, with_grad = OPS.cross_entropy_with_grad(grad, *given, **case.kwargs, metrics=True)
        assert all(map(torch.equal, sums, (*found[:3], *found[4:6]))), case.name
        for name, gradient in (("backward", backward), ("with_grad", with_grad)):
            assert_within(gradient, wanted.grad, wanted.grad_bound, f"{case.name}: {name}")
        if not case.logits.is_contiguous():
            continue
        totals, written = torch.zeros(5, dtype=torch.float64), [case.logits.clone() for _ in range(3)]
        OPS.cross_entropy_backward_(grad, written[0], case.labels, found[3], found[6], case.weight, **case.kwargs)
        OPS.cross_entropy_with_grad_(grad, written[1], case.labels, case.weight, **case.kwargs)
        OPS.add_cross_entropy_(totals, grad, written[2], case.labels, case.weight, **case.kwargs, metrics=True)
        assert torch.equal(written[0], backward), case.name
        assert torch.equal(written[1], with_grad) and torch.equal(written[2], with_grad), case.name
        assert torch.equal(totals.to(acc)[[0, 2, 4]], torch.stack([found[0], found[2], found[5]])), case.name
        assert totals[[1, 3]].tolist() == [found[1].item(), found[4].item()], case.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_match_float64(plain, dtype):
    for case in sample_cases(dtype, large=False):
        leaf = case.logits.detach().requires_grad_()
        outputs = OPS.token_statistics(leaf, case.labels, case.weight, **case.kwargs, metrics=True)
        loss, nll, lse, entropy, argmax = outputs
        wanted, bound = token_expected(case), bound_of(case)
        assert_close(loss, wanted.loss, bound, f"{case.name}: loss")
        assert_close(nll, wanted.nll, bound, f"{case.name}: nll")
        assert_within(lse, wanted.lse, bound * (wanted.lse.abs() + wanted.nll), f"{case.name}: lse")
        assert_within(entropy, wanted.entropy, entropy_bound(wanted, dtype, bound), f"{case.name}: entropy")
        assert torch.equal(argmax, wanted.argmax), f"{case.name}: argmax"
        if not leaf.numel():
            continue
        generator = torch.Generator().manual_seed(0)
        grads = {
            name: torch.randn(loss.shape, generator=generator).double() for name in ("loss", "nll", "lse", "entropy")
        }
        exact, of_gradient = wanted.gradient(grads, "fallback")
        (found,) = torch.autograd.grad(
            outputs[:4], leaf, [g.to(o.dtype) for g, o in zip(grads.values(), outputs, strict=False)]
        )
        assert_within(found, exact, of_gradient, f"{case.name}: gradient")


@pytest.mark.parametrize("size", [1, 3])
def test_shards_match_float64(plain, size):
    for case in sample_cases(torch.float32, large=False):
        wanted = expected(case, "fallback", 0.25)
        rows, labels, shards = merged(case, size)
        check_sums(seven_outputs(rows), case, wanted, "fallback")
        grad = torch.tensor(0.25)
        cut = [case.logits[..., s.class_offset : s.class_offset + s.num_classes].contiguous() for s in shards]
        found = [
            parallel.backward(grad, x, labels, rows.lse, rows.nll, case.weight, s, case.options, in_place=True)
            for x, s in zip(cut, shards, strict=True)
        ]
        assert_within(torch.cat(found, -1), wanted.grad, wanted.grad_bound, f"{case.name}: {size} shards")


@pytest.mark.parametrize("beta", test_distillation.BETAS)
def test_divergences_match_float64(plain, beta):
    for dtype in (torch.bfloat16, torch.float32):
        test_distillation.test_values_and_both_gradients(dtype, beta)


def test_class_probabilities_match_float64(plain):
    for dtype, of_case in itertools.product((torch.float16, torch.float32), ({}, on_acme.OPTIONS)):
        test_distillation.test_soft_targets(dtype, of_case)


def test_chunks_change_nothing(plain, monkeypatch):
    """Rows are what they are in any chunk: of several rows, of one, across the borders of a batch and of two strides."""
    logits = torch.randn(4, 9, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(36).view(4, 9) * 7 % 70
    labels[1, 2:] = -100
    for x, y in ((logits, labels), (logits[:, 1:-1], labels[:, 1:-1])):
        found = []
        for rows in (1000, 13, 5, 1):
            monkeypatch.setattr(fallback, "MAX_SCRATCH_BYTES", rows * 70 * 4 * 4)
            leaf = x.detach().requires_grad_()
            outputs = OPS.token_statistics(leaf, y, label_smoothing=0.1, metrics=True, shift=1)
            sums = OPS.cross_entropy_with_grad(torch.ones(()), x, y, label_smoothing=0.1, metrics=True, shift=1)
            found.append((*outputs, torch.autograd.grad(outputs[0].sum(), leaf)[0], *sums))
        for other in found[1:]:
            for name, (a, b) in enumerate(zip(found[0], other, strict=True)):
                if a.dim():
                    assert torch.equal(a, b), name
                else:
                    assert_close(a, b, SUM, f"output {name}")


def test_labels_that_inference_meets_are_told_in_training(plain):
    """What is recorded in one mode is written to in the other."""
    x, y = torch.randn(2, 5), torch.tensor([0, 5])
    with torch.inference_mode():
        OPS.cross_entropy(x, y)
    OPS.cross_entropy(x, y - 6)
    with pytest.raises(IndexError, match=r"got 5 for row 1 of an earlier call on cpu"):
        accumloss.check()
    accumloss.check()


def test_a_factor_is_not_rounded_to_16_bits(plain, monkeypatch):
    """Where both lie on a device, a product with a 0-dim factor is one of the 16 bits; the CPU takes it for a number."""
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().startswith("aten::mul"):
                products.append([arg.dtype for arg in args if isinstance(arg, torch.Tensor)])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(fallback, "MAX_SCRATCH_BYTES", 64)  # in several chunks
    values = torch.arange(1, 100).bfloat16()
    wanted = (values.double() * torch.tensor(1 / 3).double()).to(torch.bfloat16)
    with Products():
        fallback.KERNELS["scale_"](values, torch.tensor(1 / 3))
    assert torch.equal(values, wanted)
    assert len(products) > 1 and all(dtypes == [torch.float32] * 2 for dtypes in products), products


# What the ops owe PyTorch ---------------------------------------------------------------------------------------------------


def test_opcheck(plain):
    """Schemas, fakes, autograd and compile. The kernels of the CPU are checked by test_ops.py."""
    case = next(case for case in sample_cases(torch.bfloat16, large=False) if case.name == "everything")
    leaf, given = case.logits.detach().requires_grad_(), {**case.kwargs, "metrics": True}
    torch.library.opcheck(OPS.cross_entropy, (leaf, case.labels, case.weight), given)
    torch.library.opcheck(OPS.token_statistics, (leaf, case.labels, case.weight), given)
    grad = torch.ones(())
    torch.library.opcheck(OPS.cross_entropy_with_grad, (grad, case.logits, case.labels, case.weight), given)
    lse, nll = (OPS.cross_entropy(case.logits, case.labels, case.weight, **given)[i] for i in (3, 6))
    torch.library.opcheck(
        OPS.cross_entropy_backward_, (grad, case.logits.clone(), case.labels, lse, nll, case.weight), case.kwargs
    )
    columns = {**case.options.as_kwargs(), "class_offset": 0, "vocab_size": 70}  # nothing is NaN
    torch.library.opcheck(OPS.cross_entropy_shard, (case.logits, case.labels, None), columns)
    torch.library.opcheck(OPS.distillation, (leaf, case.logits.flip(-1), case.labels), {"beta": 0.3})
    torch.library.opcheck(OPS.soft_cross_entropy, (leaf, case.logits.softmax(-1)), {"z_loss": 0.1})
    torch.library.opcheck(OPS.mean_with_grad, (torch.tensor(3.0), case.logits, case.labels), {})


def test_the_same_input_is_refused_in_the_same_words(monkeypatch):
    monkeypatch.setitem(fallback.served, "cpu", "a test")
    x, y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    one, rows = torch.ones(()), torch.zeros(2, 3, dtype=torch.float64)
    bad = [
        ("cross_entropy", (x, y[:1]), {}),
        ("cross_entropy", (x.int(), y), {}),
        ("cross_entropy", (x, y.float()), {}),
        ("cross_entropy", (x, y, torch.ones(4)), {}),
        ("cross_entropy", (torch.ones(()), torch.zeros((), dtype=torch.int64)), {}),
        ("cross_entropy_backward", (torch.ones(2), x, y, rows, rows.float()), {}),
        ("cross_entropy_backward", (one, x, y, rows.float(), rows.float()), {}),
        ("cross_entropy_with_grad_", (one, x.expand(4, 2, 3, 5), y.expand(4, 2, 3)), {}),
        ("add_cross_entropy_", (torch.zeros(4).double(), one, x, y), {}),
        ("token_statistics_backward", (one, None, None, None, x, y, rows.float(), rows, rows), {}),
        ("distillation", (x, x[..., :4], y), {}),
        ("distillation", (x, x, y), {"beta": 2.0}),
        ("soft_cross_entropy", (x, x[..., :4]), {}),
        ("cross_entropy_shard", (x, y), {"class_offset": 3, "vocab_size": 7}),
        ("scale_", (x, torch.ones(2)), {}),
        ("scratch", (x, -1, 2), {}),
    ]
    for name, args, kwargs in bad:
        said = []
        for call in (getattr(OPS, name), fallback.KERNELS[name]):
            with pytest.raises((RuntimeError, ValueError)) as raised:
                call(*args, **kwargs)
            said.append(str(raised.value).split("got")[0])
        assert said[0] == said[1], name


def test_other_layouts_are_refused_in_one_line():
    """They reach plain PyTorch on the CPU too, whose kernels take strided tensors."""
    x, y = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    nested = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)])
    for logits in (x.to_sparse(), x.to_mkldnn(), nested):
        with pytest.raises((RuntimeError, NotImplementedError)) as raised:
            OPS.cross_entropy(logits, y)
        assert "\n" not in str(raised.value), str(raised.value)[:200]


# Which devices ----------------------------------------------------------------------------------------------------------

KEYS = ("CUDA", "XPU", "MPS", "HPU", "MTIA", "XLA", "Lazy", "PrivateUse1")


def test_every_op_has_a_kernel_for_every_device():
    """The dispatcher's thousands of characters about a backend that is missing cannot be reached."""
    schemas = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("accumloss::")}
    own = {f"accumloss::{name}" for name in fallback.KERNELS}
    composite = {"causal_lm", "masked_lm", "linear_cross_entropy", "linear_cross_entropy_with_grad"}
    assert own == schemas - {f"accumloss::{name}" for name in composite}
    for name in sorted(schemas):
        for key in KEYS:
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), (name, key)


def test_kernels_are_preferred(monkeypatch):
    monkeypatch.setenv("ACCUMLOSS_FALLBACK", "error")
    accumloss.causal_lm_loss(torch.randn(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64))
    x, y = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
    for key in KEYS[0 if accumloss.build_info()["cuda"] is None else 1 :]:
        kernel = _compat.computed_kernel("accumloss::cross_entropy", key)
        with pytest.raises(RuntimeError, match="since ACCUMLOSS_FALLBACK=error, got cpu"):
            kernel(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), x, y)


@pytest.mark.parametrize(
    ("architectures", "fits", "fits_not"),
    [
        ("80-real", [80, 86, 89], [75, 90, 120]),
        ("80-real 90-real", [80, 89, 90], [75, 100]),
        ("75-real;80-real;89-real;90-real;100;120-real", [75, 80, 86, 89, 90, 100, 103, 110, 120, 121], [70, 72]),
        ("90-virtual", [90, 100, 120], [80, 89]),
        ("90a-real", [90], [80, 100]),
        ("90a", [90], [100]),
        ("100f", [100, 103], [90, 110, 120]),
        ("native", [70, 120], []),
    ],
)
def test_images_and_the_gpus_they_run_on(architectures, fits, fits_not):
    for capability in (*fits, *fits_not):
        assert fallback.has_image(architectures, *divmod(capability, 10)) == (capability in fits), capability


def test_reasons_name_the_remedy(monkeypatch):
    assert fallback.reason("cpu") is None
    assert "none for xpu" in fallback.reason("xpu").why
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fallback, "_architectures", lambda: None)
    monkeypatch.setattr(fallback, "_build", lambda: {"without_cuda": "nvcc was not found"})
    assert "built without CUDA (nvcc was not found)" in fallback.reason("cuda").why
    monkeypatch.setattr(fallback, "_build", dict)
    assert "built without CUDA" in fallback.reason("cuda").why and "ACCUMLOSS_CUDA=ON" in fallback.reason("cuda").remedy
    monkeypatch.setattr(fallback, "_architectures", lambda: "80-real 90-real")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6) if device.index == 0 else (12, 0))
    assert fallback.reason("cuda:0") is None
    assert "sm_120" in fallback.reason("cuda:1").why and "CUDAARCHS=120" in fallback.reason("cuda:1").remedy
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in fallback.reason("cuda:0").why


def test_gpus_without_an_image_are_found_when_cuda_starts(monkeypatch):
    """Two GPUs, an image for one of them: its kernels stay."""
    passed_over, calls = [], []
    monkeypatch.setattr(fallback, "_architectures", lambda: "90-real")
    monkeypatch.setattr(fallback, "when_cuda_starts", calls.append)
    monkeypatch.setattr(fallback, "pass_over", lambda *args: passed_over.append(args))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (12, 0))

    class Library:
        def impl(self, *args):
            pass

    fallback.register(Library())
    assert not passed_over
    for call in calls:
        call()
    ((_, key, is_unserved),) = passed_over
    assert key == "CUDA"
    assert not is_unserved(torch.device("cuda:0")) and is_unserved(torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    calls[0]()
    assert len(passed_over) == 1


def test_a_device_that_is_served_keeps_its_kernels():
    x, y = torch.randn(3, 700), torch.zeros(3, dtype=torch.int64)
    wanted = OPS.cross_entropy(x, y)
    library = torch.library.Library("accumloss", "IMPL")
    fallback.pass_over(library, "CPU", lambda device: False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = OPS.cross_entropy(x, y)
            with pytest.raises(IndexError) as bad:
                OPS.cross_entropy(x, y + 700)
    finally:
        library._destroy()
    assert all(map(torch.equal, found, wanted))
    assert "expected labels in [0, 700)" in str(bad.value)


# A device of its own ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def acme(tmp_path_factory):
    file = tmp_path_factory.mktemp("acme") / "found.json"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, HERE / "on_acme.py", file], env=environment, capture_output=True, text=True, timeout=300
    )
    assert file.exists(), ran.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("name", on_acme.CHECKS)
def test_on_a_device_without_kernels(acme, name):
    assert not acme[name], acme[name]


# Streams --------------------------------------------------------------------------------------------------------------


class Streams:
    """The module of a device with streams, whose work is done at once: what is queued where, and who waits."""

    def __init__(self):
        self.log, self.of_thread = [], threading.local()

    def current_stream(self, device=None):
        return SimpleNamespace(stream_id=getattr(self.of_thread, "stream", 0))

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.of_thread.stream = getattr(self.of_thread, "stream", 0), stream.stream_id
        self.log.append(stream.stream_id)
        yield
        self.of_thread.stream = before

    def synchronize(self, device=None):
        self.log.append("synchronize")


@pytest.fixture
def streams(monkeypatch):
    module = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: module)
    monkeypatch.setattr(fallback, "_records", {})
    return module


def met(label, streams, number):
    """A call on a stream meets that label, among two others."""
    labels = torch.tensor([1, label, 2])
    with streams.stream(SimpleNamespace(stream_id=number)):
        fallback._record_bad_labels((labels < 0) | (labels >= 5), labels)


def test_each_stream_has_a_record_that_it_alone_writes(streams):
    """One record for all: a stream that met none could write over what another met at that moment."""
    for number, label in ((0, 3), (7, 99), (9, 4)):
        met(label, streams, number)
    of_streams = {number: record for (_, number), record in fallback._records.items() if number != fallback._OF_GRAPHS}
    assert {number: record.first.tolist() for number, record in of_streams.items()} == {
        0: [-1, 1],
        7: [1, 99],
        9: [-1, 1],
    }
    assert {number: record.stream.stream_id for number, record in of_streams.items()} == {0: 0, 7: 7, 9: 9}
    assert len({record.first.data_ptr() for record in fallback._records.values()}) == 4  # and that of graphs


def test_check_waits_for_every_stream_and_forgets_in_its_order(streams):
    met(99, streams, 7)
    met(77, streams, 9)
    streams.log.clear()
    with pytest.raises(IndexError, match="^check: expected labels .* got 99 for row 1 of an earlier call"):
        accumloss.check()
    assert streams.log[0] == "synchronize" and streams.log[-1] == 7  # read and forgotten in the stream that wrote it
    with pytest.raises(IndexError, match="got 77 for row 1"):
        accumloss.check()
    accumloss.check()


def test_a_capture_has_a_record_from_the_first_call_on_the_device(streams, monkeypatch):
    """None can be allocated in it; graphs may be replayed on any stream, so that check() waits for the device."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fallback._record_of(device) is None
    record = fallback._Record(torch.full((2,), -1), None)
    fallback._records[device, fallback._OF_GRAPHS] = record
    assert fallback._record_of(device) is record.first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_bad_label_on_a_side_stream_is_told_on_a_gpu(monkeypatch):
    monkeypatch.setattr(fallback, "_records", {})
    monkeypatch.setattr(fallback, "served", {"cuda": "a test"})  # which has been told
    logits, labels = torch.randn(64, 1000, device="cuda"), torch.randint(1000, (64,), device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**8)  # so that who does not wait for this stream reads too early
        bad = labels.clone()
        bad[5] = 1000
        fallback.token_statistics(logits, bad)
    fallback.token_statistics(logits, labels)
    with pytest.raises(IndexError, match="got 1000 for row 5"):
        accumloss.check()
