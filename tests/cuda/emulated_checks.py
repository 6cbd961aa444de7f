"""What the tests of the emulated kernels share: cases, and the checks of every call against float64."""

from __future__ import annotations

import itertools
import math

import emulated
import pytest
import row_oracle
import torch

U = row_oracle.U
ALL = {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 0.5, "metrics": True}
# Regime: shape (B, T, V) and what is special. V <= 1024 takes the warps, more the blocks.
CASES = {
    "less_than_a_vector": {"shape": (2, 3, 7), "offset": 5},
    "warp": {"shape": (2, 19, 130), "offset": 1},
    "warp_all_options": {"shape": (2, 5, 517), "shift": 1, "weight": True, "int32": True, **ALL},
    "warp_largest": {"shape": (1, 2, 1024), "confident": True},
    "block_smallest": {"shape": (1, 3, 1025), "offset": 3, "spread": 3.0},
    "block_metrics": {"shape": (2, 3, 2050), "metrics": True, "grad": -0.5},
    "block_all_options": {"shape": (1, 5, 4099), "shift": 1, "weight": True, "ignore_index": 3, "spread": 5.0, **ALL},
    "block_weight_z_loss": {"shape": (1, 3, 1100), "weight": True, "z_loss": 1e-2, "int32": True},
    "block_confident": {"shape": (1, 4, 16001), "offset": 7, "confident": True},
    "all_ignored": {"shape": (2, 3, 1030), "ignored": 1.0},
}
# Each plan by force, on rows that it need not be meant for: more of them than it has stages (one cluster walks over
# all of them on a device that has room for one), rows without a vector, vectors that do not reach all blocks, other rows
# between.
PLAN_CASES = {
    "ring": {"shape": (3, 9, 1037), "offset": 1, "spread": 3.0},
    "ring_all_options": {"shape": (2, 12, 1100), "shift": 1, "weight": True, "int32": True, **ALL},
    "ring_metrics_ignored": {"shape": (1, 30, 600), "metrics": True, "ignored": 0.6, "offset": 3},
    "few_vectors": {"shape": (2, 5, 61), "confident": True, "metrics": True},
    "no_vector": {"shape": (1, 4, 3), "offset": 1, "metrics": True},
    # Of a cluster, long runs of rows that nothing is exchanged for; and more rows than records wait to be added.
    "many_ignored": {"shape": (1, 60, 200), "ignored": 0.9},
    "many_rows": {"shape": (1, 150, 40)},
}
# A row of which a pass or two is held: that plan, the rows. Labels on both sides, ends that are no vector, a rest of less
# than a pass, of a pass and a part, of an end alone, and none.
PARTLY_HELD = [
    ("partly_held:1", {"shape": (2, 5, 4099), "offset": 1, "spread": 3.0}, torch.float32),
    ("partly_held:1", {"shape": (1, 5, 12003), "confident": True, "ignored": 0.0}, torch.float32),
    ("partly_held:1", {"shape": (1, 7, 4099), "offset": 3, "int32": True, "weight": True}, torch.bfloat16),
    ("partly_held:2", {"shape": (1, 4, 9001), "offset": 1, "z_loss": 1e-2, "ignored": 0.6}, torch.float16),
    ("partly_held:1", {"shape": (1, 6, 2051), "offset": 1, "ignored": 0.0}, torch.float32),
    ("partly_held:2", {"shape": (1, 4, 1037), "offset": 1}, torch.float32),
]
FORMAT = {"shape", "offset", "spread", "grad", "ignored", "weight", "int32", "confident"}
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def inputs(case: dict, dtype: torch.dtype):
    """logits, labels, weight, grad, options of a case; the same for every call."""
    options = {name: value for name, value in case.items() if name not in FORMAT}
    shift, ignore_index = options.get("shift", 0), options.get("ignore_index", -100)
    B, T, V = case["shape"]
    generator = torch.Generator().manual_seed(B * 7 + T * 11 + V)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64) * case.get("spread", 1.0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    if labels.numel() > 1 and case.get("ignored", 0.25) < 1:
        labels[-1, -1], labels[0, min(1, T - 1)] = 0, V - 1  # the edges of the vocabulary
    if case.get("confident"):
        gap = torch.linspace(0, 25, B * T, dtype=torch.float64).view(B, T, 1)
        logits.scatter_(2, labels[..., None], logits.amax(2, keepdim=True) + gap)
    ignored = torch.rand(B, T, generator=generator) < case.get("ignored", 0.25)
    ignored[..., -1] &= case.get("ignored", 0.25) == 1
    labels[ignored] = ignore_index
    if shift == 0:
        logits[ignored] = math.nan  # an ignored row is not read
    weight = torch.rand(V, generator=generator) + 0.1 if case.get("weight") else None
    if case.get("int32"):
        labels = labels.int()
    return emulated.guarded(logits.to(dtype), case.get("offset", 0)), labels, weight, case.get("grad", 1.0), options


def assert_within(name: str, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> None:
    got = got.double()
    wrong = ~((got - want).abs() <= bound) & ~(got.isnan() & want.isnan()) & (got != want)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        pytest.fail(f"{name}{at}: {got[at]:.9g}, expected {want[at]:.9g} within {bound[at]:.3g}; {wrong.sum()} such")


def check_case(backend: emulated.Backend, case: dict, dtype: torch.dtype) -> None:
    check(backend, *inputs(case, dtype), offset=case.get("offset", 0))


def check(backend: emulated.Backend, logits, labels, weight, grad: float, options: dict, offset: int = 0) -> None:
    """Forward, backward and both in one, out of place and in place, against float64."""
    dtype = logits.dtype
    pristine = logits.clone()
    want = row_oracle.rows(logits.nan_to_num(0.0), labels, weight, grad, **options)
    u = U[dtype]
    got = backend.forward(logits, labels, weight, **options)
    assert_within("nll", got["nll"], want.nll, want.nll_bound + u * want.nll)
    assert_within("lse", got["lse"], want.lse, want.nll_bound + u * (16 + want.lse.abs()))

    def check_sums(sums: dict[str, torch.Tensor]) -> None:
        assert_within("loss_sum", sums["loss_sum"], want.loss.sum(), want.loss_bound.sum() + 2 * u * want.loss.sum())
        assert_within("total_weight", sums["total_weight"], want.weight.sum(), 2 * u * want.weight.sum())
        assert sums["num_items"] == want.items.sum()
        if options.get("metrics"):
            assert sums["num_correct"] == want.correct.sum()
            bound = (32 * u * (1 + want.lse.abs() + want.entropy) * want.items).sum()
            assert_within("entropy_sum", sums["entropy_sum"], want.entropy.sum(), bound)
        else:
            assert sums["num_correct"] == 0
            assert sums["entropy_sum"] == 0

    check_sums(got)

    def fresh() -> torch.Tensor:
        return emulated.guarded(logits, offset)

    def check_gradient(name: str, gradient: torch.Tensor) -> None:
        assert_within(name, gradient, want.grad, want.grad_bound)
        emulated.check_guards(gradient)

    arguments = (labels, got["lse"], got["nll"], grad, weight)
    gradient = backend.backward(logits, *arguments, **options)
    check_gradient("backward", gradient)
    assert torch.equal(logits.nan_to_num(0.0), pristine.nan_to_num(0.0))
    over = fresh()
    check_gradient("backward in place", backend.backward(over, *arguments, out=over, **options))
    both = backend.forward_with_grad(logits, labels, grad, weight, **options)
    check_gradient("forward_with_grad", both["grad_logits"])
    same = emulated.guarded(torch.full_like(logits, 7.0).contiguous(), offset)
    backend.forward_with_grad(logits, labels, grad, weight, out=same, **options)
    check_gradient("forward_with_grad, aligned as the logits", same)
    over = fresh()
    in_place = backend.forward_with_grad(over, labels, grad, weight, out=over, **options)
    check_gradient("forward_with_grad in place", over)
    check_sums(both)
    check_sums(in_place)


def check_half(backend: emulated.Backend) -> None:
    """What 16-bit logits without options may meet, through the loops of the staged kernels."""
    generator = torch.Generator().manual_seed(5)
    for plan, V in (
        ("staged:1", 1037),
        ("staged:2", 2051),
        ("held", 1037),
        ("partly_held:1", 5003),
        ("block", 1037),
        ("warp", 1000),
        ("packed", 251),
    ):
        rows = [torch.randn(V, generator=generator) * s + shift for shift in (0, 1000, -30000, 3e7) for s in (0.02, 3)]
        logits = torch.stack(rows)[None].bfloat16()
        labels = torch.randint(0, V, logits.shape[:2], generator=generator)
        labels[0, 0], labels[0, 1] = 0, V - 1
        for row, gap in ((0, 20.0), (1, 60.0)):  # a label far ahead
            logits[0, row, labels[0, row]] = logits[0, row].max() + gap
        logits[0, 4, V // 2 :] = -math.inf
        labels[0, 4] = 1
        # A reference of log2(e) 30000 is rounded by up to 2^-9; few entries are so near to a tie that one row shows it.
        far = [torch.randn(V, generator=generator) * 20 + shift for shift in (-30000, 30000, 12345) for _ in range(4)]
        with backend.plan(plan, clusters=1):
            check(backend, emulated.guarded(logits, 3), labels, None, -1024.0, {}, offset=3)
            shifted = torch.stack(far)[None].bfloat16()
            check(backend, shifted, torch.randint(0, V, shifted.shape[:2], generator=generator), None, 1.0, {})
            # exp(-100.5) is no normal number, and 1024 times the sum of the others is one.
            far_label, one = logits[:, :1].clone(), labels[:, :1]
            far_label[0, 0, one[0, 0]] = 100.5
            want = row_oracle.rows(far_label, one, None, 1024.0).grad[0, 0, one[0, 0]]
            got = backend.forward_with_grad(far_label, one, 1024.0)["grad_logits"][0, 0, one[0, 0]]
            assert_within("entry of a label far ahead", got[None], want[None], want[None].abs() * 2.0**-8)
            # What float64 cannot tell apart: half of the classes at one number as large as there are, the others lower.
            ends = torch.zeros(1, 2, V)
            ends[0, :, ::2] = torch.tensor([[2e38], [-2e38]])
            ends[0, 1, 1::2] = -math.inf
            count, ends, first = (V + 1) // 2, ends.bfloat16(), torch.zeros(1, 2, dtype=torch.int64)
            entries = backend.forward_with_grad(ends, first)["grad_logits"][0]
            assert (entries[:, 2::2].double() * count - 1).abs().max() <= 2.0**-8
            assert (entries[:, 1::2] == 0).all()
            nll = backend.forward(ends, first)["nll"].double()
            assert (nll / math.log(count) - 1).abs().max() <= 2e-6
            nan = emulated.guarded(logits)
            nan[0, 2, labels[0, 2]] = torch.tensor(-1, dtype=torch.int16).view(torch.bfloat16)  # with a sign bit
            assert backend.forward_with_grad(nan, labels)["grad_logits"][0, 2].isnan().all()
            assert backend.forward(nan, labels)["nll"][0].isnan().nonzero().tolist() == [[2]]


def check_partly_held(backend: emulated.Backend, only: torch.dtype | None = None) -> None:
    """Rows of which a part is held, more of them than blocks run at once."""
    for plan, case, dtype in PARTLY_HELD:
        if only not in (None, dtype):
            continue
        for clusters in (1, 2):
            with backend.plan(plan, capability=80, clusters=clusters):
                check_case(backend, case, dtype)


# Softcap makes equal z of different x; equal x decide by the index. The winner is torch.argmax of the raw logits.
def check_ties(backend: emulated.Backend, V: int) -> None:
    backend.seed(6)
    rows = []
    for (a, x_a), (b, x_b) in itertools.product([(2, 900.0), (V // 2, 1000.0), (V - 1, 1000.0)], repeat=2):
        row = torch.zeros(V)
        row[a], row[b] = x_a, x_b
        rows += [(row, a), (row, b)]
    rows += [(torch.zeros(V), 0), (torch.zeros(V), 1)]
    logits = torch.stack([row for row, _ in rows])[None]
    labels = torch.tensor([label for _, label in rows])[None]
    expected = (logits.argmax(2) == labels).sum()
    for options in ({"metrics": True}, {"metrics": True, "softcap": 5.0}):
        assert backend.forward(logits, labels, **options)["num_correct"] == expected
        over = emulated.guarded(logits)
        assert backend.forward_with_grad(over, labels, out=over, **options)["num_correct"] == expected


def check_strides(backend: emulated.Backend, V: int) -> None:
    backend.seed(9)
    generator = torch.Generator().manual_seed(10)
    store = torch.randn(3, 4, V + 3, generator=generator)
    labels = torch.randint(0, V, (4, 3), generator=generator).T  # stride along T
    for logits in (store[..., :V], store[..., 3:], store[:, ::2, 1 : V + 1], store.transpose(0, 1)[..., 2 : V + 2]):
        y = labels[: logits.shape[0], : logits.shape[1]] if logits.shape[0] == 3 else labels.T
        got, want = backend.forward(logits, y), backend.forward(logits.contiguous(), y.contiguous())
        gradient = backend.forward_with_grad(logits, y)["grad_logits"]
        reference = row_oracle.rows(logits, y)
        assert_within("nll", got["nll"], reference.nll, reference.nll_bound)
        assert_within("gradient", gradient, reference.grad, reference.grad_bound)
        assert_within("lse", got["lse"], want["lse"], 16 * U[torch.float32] * want["lse"].abs())
