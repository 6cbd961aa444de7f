"""Divergences from a teacher and class probabilities: float64, PyTorch's and TRL's formulas, sums and accumulation."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tolerances import (
    ACCUMULATED_GRADIENT,
    SUM,
    assert_close,
    assert_within,
    divergence_bound,
    linear_gradient_bound,
    row_loss_bound,
    ulp,
    unit_of,
)

import accumloss
from accumloss import Accumulator, LossOptions, reference

ops = torch.ops.accumloss
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BETAS = (0.0, 0.1, 0.5, 1.0)
OTHER_BETA = pytest.mark.slow(
    "four seconds of opcheck; the fast tier has every beta's gradients, and one of them checked so"
)


def logits_of(*shape, dtype=torch.float64, seed=0, scale=3.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@functools.cache
def pairs(dtype):
    """(name, student, teacher, labels): each a regime."""
    found = []
    for V in (1, 2, 33, 512, 513, 1100):
        found.append((f"V={V}", logits_of(7, V, dtype=dtype), logits_of(7, V, dtype=dtype, seed=1), None))
    s, t = logits_of(2, 5, 300, dtype=dtype), logits_of(2, 5, 300, dtype=dtype, seed=1)
    labels = torch.arange(10).view(2, 5)
    labels[0, 1] = labels[1, 4] = -100
    found.append(("ignored rows", s, t, labels))
    found.append(("the same logits", s, s.clone(), None))
    found.append(("a small update", s, (s.double() + 1e-3 * t.double()).to(dtype), None))
    wide = logits_of(4, 6, 140, dtype=dtype)
    found.append(
        (
            "strides",
            wide[:, :, 1:66],
            wide.transpose(0, 1)[:4, :, 3:68].transpose(0, 1)[:4].repeat(1, 2, 1)[:, :6],
            None,
        )
    )
    confident = logits_of(4, 200, dtype=dtype, scale=1.0)
    confident[:, 3] += torch.tensor([8.0, 16.0, 24.0, 40.0]).to(dtype)
    other = logits_of(4, 200, dtype=dtype, seed=2, scale=1.0)
    other[:2, 3] += 20.0
    found.append(("confident", confident, other, None))
    shifted = 50 + logits_of(3, 100, dtype=dtype)
    found.append(("shifted up", shifted, logits_of(3, 100, dtype=dtype, seed=1) - 30, None))
    far, other = logits_of(3, 40, dtype=dtype), logits_of(3, 40, dtype=dtype, seed=1)
    far[:, 5], other[:, 9] = -300.0, -300.0
    found.append(("classes far apart", far, other, None))
    masked, other = logits_of(4, 600, dtype=dtype), logits_of(4, 600, dtype=dtype, seed=1)
    masked[:, :300] = other[:, :300] = -torch.inf
    found.append(("a masked vocabulary", masked, other, None))
    low = logits_of(2, 2300, dtype=dtype) + torch.tensor([[-100.0], [-1000.0]]).to(dtype)
    found.append(("low", low, logits_of(2, 2300, dtype=dtype, seed=1), None))
    masked, other = low.clone(), low.flip(1)
    masked[:, :1100] = other[:, :1100] = -torch.inf  # a block, of bf16 two
    found.append(("low after a block that is masked", masked, other, None))
    rising = torch.linspace(-25, 25, 2300).expand(2, -1).to(dtype)
    found.append(("rising", rising, rising.flip(1).contiguous(), None))
    return found


def exact(student, teacher, labels, beta, temperature):
    s, t = (x.double().detach().requires_grad_() for x in (student, teacher))
    mask = torch.zeros(s.shape[:-1], dtype=torch.int64) if labels is None else labels
    loss = reference.distillation(s, t, mask, beta=beta, logit_scale=1 / temperature)
    return s, t, loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_both_gradients(dtype, beta):
    """Of every regime, with any gradient for each row, to either side."""
    for name, student, teacher, labels in pairs(dtype):
        for temperature in (1.0, 0.7):
            s, t, wanted = exact(student, teacher, labels, beta, temperature)
            grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(5)).double()
            of_exact = torch.autograd.grad(wanted, (s, t), grad.to(torch.float32).double())
            ours = [x.detach().requires_grad_() for x in (student, teacher)]
            mask = torch.zeros(wanted.shape, dtype=torch.int64) if labels is None else labels.clamp(max=0)
            found = ops.distillation(*ours, mask, beta=beta, logit_scale=1 / temperature)[0]
            bounds = divergence_bound(s.detach() / temperature, t.detach() / temperature, beta, dtype)
            assert_within(found, wanted, bounds.loss, f"{name}: loss")
            of_ours = torch.autograd.grad(found, ours, grad.to(torch.float32).to(found.dtype))
            scale = (grad.abs() / temperature).unsqueeze(-1)
            for side, a, b, bound in zip(("student", "teacher"), of_ours, of_exact, bounds[1:], strict=True):
                rounding = ulp(b, dtype) if dtype in (torch.bfloat16, torch.float16) else ulp(b, dtype) / 2
                tiny = torch.finfo(torch.float32).tiny * (dtype != torch.float64)
                assert_within(a, b, bound * scale + rounding + tiny, f"{name}: {side}")


def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"):
    """trl's GKDTrainer.generalized_jsd_loss, written out; test_in_trl.py compares with the installed one."""
    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=-1)
    if beta == 0:
        jsd = F.kl_div(student_log_probs, teacher_log_probs, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(teacher_log_probs, student_log_probs, reduction="none", log_target=True)
    else:
        b = torch.tensor(beta, dtype=student_log_probs.dtype)
        stacked = torch.stack([student_log_probs + torch.log1p(-b), teacher_log_probs + torch.log(b)])
        mixture = torch.logsumexp(stacked, dim=0)
        kl_teacher = F.kl_div(mixture, teacher_log_probs, reduction="none", log_target=True)
        kl_student = F.kl_div(mixture, student_log_probs, reduction="none", log_target=True)
        jsd = b * kl_teacher + (1 - b) * kl_student
    if labels is not None:
        jsd = jsd[labels != -100]
    return jsd.sum() / (labels != -100).sum() if reduction == "batchmean" else jsd.sum()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_trls_loss(beta, temperature):
    student, teacher = logits_of(3, 6, 50, dtype=torch.float32), logits_of(3, 6, 50, dtype=torch.float32, seed=1)
    labels = torch.arange(18).view(3, 6)
    labels[0, :4] = -100
    results = []
    for function in (generalized_jsd_loss, accumloss.distillation_loss):
        leaf = (
            student.double().requires_grad_() if function is generalized_jsd_loss else student.clone().requires_grad_()
        )
        given = teacher.to(leaf.dtype)
        loss = function(leaf, given, labels, beta=beta, temperature=temperature)
        results.append((loss, torch.autograd.grad(loss, leaf)[0]))
    assert_close(results[1][0], results[0][0], 4 * SUM, "loss")
    assert (results[1][1] - results[0][1]).norm() <= ACCUMULATED_GRADIENT[torch.float32] * results[0][1].norm()
    summed = generalized_jsd_loss(student.double(), teacher.double(), labels, beta, temperature, "sum")
    loss = accumloss.distillation_loss(student, teacher, labels, temperature, beta, num_items_in_batch=40)
    assert_close(loss, summed / 40, 4 * SUM, "divided by a step's items")


def test_accumulation_is_that_of_the_one_batch():
    generator = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(8, 6, 8, generator=generator), logits_of(8, 6, 33, dtype=torch.float32)
    labels = torch.where(torch.rand(8, 6, generator=generator) < torch.linspace(0.1, 0.9, 8)[:, None], -100, 1)
    token_weight = torch.rand(8, 6, generator=generator)
    found = []
    for size in (8, 3):
        head = torch.nn.Linear(8, 33, bias=False)
        with torch.no_grad():
            head.weight.copy_(torch.randn(33, 8, generator=torch.Generator().manual_seed(1)))
        accumulator = Accumulator(head)
        for part in torch.arange(8).split(size):
            sums = accumloss.distillation(
                head(x[part]), teacher[part], labels[part], 2.0, token_weight=token_weight[part], shift=1
            )
            accumulator.backward(sums)
        found.append((accumulator.finish(), head.weight.grad))
    assert found[0][0].num_items == found[1][0].num_items == (labels[:, 1:] != -100).sum()
    assert_close(found[1][0].mean_loss, found[0][0].mean_loss, SUM, "mean loss")
    assert (found[1][1] - found[0][1]).norm() <= ACCUMULATED_GRADIENT[torch.float32] * found[0][1].norm()


def test_a_frozen_teacher_costs_no_gradient_and_masked_rows_are_not_read():
    student, teacher = logits_of(3, 700, dtype=torch.float32), logits_of(3, 700, dtype=torch.float32, seed=1)
    student[1], teacher[1] = torch.nan, torch.nan
    leaf = student.requires_grad_()
    sums = accumloss.distillation(leaf, teacher, torch.tensor([0, -100, 5]))
    (grad,) = torch.autograd.grad(sums.loss_sum, leaf)
    assert sums.loss_sum.isfinite() and sums.num_items == 2
    assert (grad[1] == 0).all() and grad.isfinite().all() and teacher.grad is None


def test_what_a_student_excludes_costs_infinity():
    """KL(t | s) where the teacher may say what the student cannot; PyTorch's kl_div agrees. Nothing of it is clamped."""
    student, teacher = torch.zeros(2, 40), torch.zeros(2, 40)
    student[0, 7] = -torch.inf
    student[1, 7] = -600.0
    losses = ops.distillation(student, teacher, torch.zeros(2, dtype=torch.int64), beta=0.0)[0]
    wanted = F.kl_div(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), reduction="none", log_target=True
    )
    assert_close(losses, wanted.sum(-1), row_loss_bound(torch.float32, "cpu"), "losses")
    assert losses[0].isinf()


def gradients_of_pairs(x, other):
    """The gradients of divergences from the other rows, and of a loss against their probabilities."""
    leaf, none = x.detach().requires_grad_(), torch.zeros(len(x), dtype=torch.int64)
    for beta in (0.0, 0.3, 1.0):
        losses = ops.distillation(leaf, other, none, beta=beta, logit_scale=1.0 if beta else 0.7)[0]
        yield losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]
    losses = accumloss.token_losses(leaf, other.float().softmax(-1).to(x.dtype))
    yield losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_gradients_have_the_bits_of_small_ones(dtype):
    """From 32 MiB on they go past the caches, in whole lines, wherever a row begins."""
    V = 8193
    rows = 2**25 // (V * dtype.itemsize) + 1
    x, other = (
        torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype) for seed in (0, 1)
    )
    parts = [slice(0, 5), slice(5, 6), slice(rows - 3, rows)]
    whole = list(gradients_of_pairs(x, other))
    for part in parts:
        for (losses, grad), (few, small) in zip(whole, gradients_of_pairs(x[part], other[part]), strict=True):
            assert torch.equal(losses[part], few) and torch.equal(grad[part], small)


CAPABILITY_PROGRAM = """
import sys, torch, accumloss
sys.path.insert(0, sys.argv[1])
import test_distillation as t
assert accumloss.build_info()["cpu_capability"] == sys.argv[2]
found = [[*t.gradients_of_pairs(*(t.logits_of(9, V, dtype=dtype, seed=seed) for seed in (0, 1)))]
         for dtype in t.DTYPES for V in (33, 1100, 2311)]
torch.save(found, sys.argv[3])
"""


def test_avx2_and_avx512_give_the_same_bits_of_pairs(tmp_path):
    found = []
    for name in ("avx2", "avx512"):
        command = [sys.executable, "-P", "-c", CAPABILITY_PROGRAM, str(Path(__file__).parent), name, tmp_path / name]
        environment = {**os.environ, "ACCUMLOSS_CPU_CAPABILITY": name}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0 and "expected one of" in done.stderr:
            pytest.skip(f"this machine has no {name}: {done.stderr.strip().splitlines()[-1]}")
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / name))
    for ours, others in zip(*found, strict=True):
        for a, b in zip(ours, others, strict=True):
            assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_logits_beyond_any_unit(beta):
    """Logits of more than 2^12, whose exponentials have an origin of another kind, on either side."""
    far, near = logits_of(3, 2300, scale=4e6).bfloat16(), logits_of(3, 2300, dtype=torch.bfloat16, seed=1)
    for student, teacher in ((far, near), (near, far), (far, far.flip(0)), (far, far)):
        _, _, wanted = exact(student, teacher, None, beta, 1.0)
        leaf = student.clone().requires_grad_()
        found = ops.distillation(leaf, teacher, torch.zeros(3, dtype=torch.int64), beta=beta)[0]
        bound = 8 * unit_of(torch.bfloat16) * (1 + wanted.detach())
        assert_within(found, wanted, bound, "losses")
        assert torch.autograd.grad(found.sum(), leaf)[0].isfinite().all()


def test_what_is_nothing_beside_later_classes_costs_nothing():
    """Where the student excludes classes that the teacher only puts far below the others, wherever in the row they are."""
    student, teacher = logits_of(2, 2300, dtype=torch.float32), logits_of(2, 2300, dtype=torch.float32, seed=1)
    for excluded in (slice(0, 1100), slice(1200, 2300)):
        s, t = student.clone(), teacher.clone()
        s[:, excluded], t[:, excluded] = -torch.inf, -1000.0
        rest = torch.ones(2300, dtype=torch.bool)
        rest[excluded] = False
        found, wanted = (
            ops.distillation(a, b, torch.zeros(2, dtype=torch.int64), beta=0.0)[0]
            for a, b in ((s, t), (s[:, rest], t[:, rest]))
        )
        assert_close(found, wanted.double(), 4 * SUM, "losses")


@pytest.mark.parametrize("beta", [0.5, *(pytest.param(beta, marks=OTHER_BETA) for beta in (0.0, 1.0))])
def test_distillation_owes_pytorch(beta):
    student, teacher = logits_of(3, 9).requires_grad_(), logits_of(3, 9, seed=1).requires_grad_()
    labels = torch.tensor([0, -100, 0])
    options = {"beta": beta, "logit_scale": 0.8}

    def losses(s, t):
        return ops.distillation(s, t, labels, **options)[0]

    assert torch.autograd.gradcheck(losses, (student, teacher))
    assert torch.autograd.gradgradcheck(losses, (student, teacher))
    single = [x.detach().float().requires_grad_() for x in (student, teacher)]
    torch.library.opcheck(ops.distillation.default, (*single, labels), options)
    found = [value.detach() for value in ops.distillation(*single, labels, **options)]
    grad = torch.tensor([1.0, 2.0, 0.0])
    torch.library.opcheck(ops.distillation_backward.default, (grad.requires_grad_(), *single, labels, *found), options)
    given = (grad.detach(), single[0].detach().clone(), single[1].detach(), labels, *found)
    torch.library.opcheck(ops.distillation_backward_.default, given, options)


# Class probabilities -----------------------------------------------------------------------------------------------------


TARGET_OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 15.0, "logit_scale": 1.5}],
    ids=["plain", "options"],
)


class SoftTargets(NamedTuple):
    V: int
    logits: torch.Tensor  # (6, V)
    targets: torch.Tensor
    weight: torch.Tensor  # (V,)
    grad: torch.Tensor  # (6,) of the losses
    z_scale: float
    losses: torch.Tensor  # (6,) in float64
    of_logits: torch.Tensor  # (6, V) their gradient
    bound: torch.Tensor  # (6, V)


def soft_targets(dtype, options):
    """Of every size, one-hot and confident ones included."""
    for V in (1, 2, 33, 513, 1100):
        logits = logits_of(6, V, dtype=dtype)
        targets = logits_of(6, V, seed=1).softmax(-1)
        targets[0] = F.one_hot(torch.tensor(V - 1), V).double()
        logits[0, V - 1] += 20.0  # a loss of 1e-6, that of the one class
        targets[1] *= 0.5  # not a distribution: as PyTorch, what is said is taken
        targets[2] = 0.0
        targets = targets.to(dtype)
        weight = torch.linspace(0.5, 2.0, V)
        grad = torch.randn(6, generator=torch.Generator().manual_seed(3))
        x = logits.double().requires_grad_()
        wanted = reference.soft_cross_entropy(x, targets, weight, LossOptions(**options))
        (of_exact,) = torch.autograd.grad(wanted, x, grad.double())
        z = reference.transform(x.detach(), LossOptions(**options))
        z_scale = z.abs().max().item() if options else 0.0
        q = targets.double() * 2 + options.get("label_smoothing", 0.0)
        distance = 8 + (z - z.logsumexp(-1, keepdim=True)).abs() + 8 * z_scale
        terms = (q.sum(-1, keepdim=True) * 2 + 1) * z.softmax(-1) + q
        bound = (
            4 * unit_of(dtype) * distance * terms * grad.abs().unsqueeze(-1) * max(options.get("logit_scale", 1.0), 1.0)
        )
        bound = bound + ulp(of_exact, dtype)
        yield SoftTargets(V, logits, targets, weight, grad, z_scale, wanted.detach(), of_exact, bound)


@pytest.mark.parametrize("dtype", DTYPES)
@TARGET_OPTIONS
def test_soft_targets(dtype, options):
    """Values and gradients against float64."""
    for case in soft_targets(dtype, options):
        leaf = case.logits.clone().requires_grad_()
        found = accumloss.token_losses(leaf, case.targets, weight=case.weight, **options)
        assert_close(found, case.losses, 2 * row_loss_bound(dtype, "cpu", case.z_scale), f"V={case.V}: losses")
        (of_ours,) = torch.autograd.grad(found, leaf, case.grad.to(found.dtype))
        assert_within(of_ours, case.of_logits, case.bound, f"V={case.V}: gradient")


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_targets_whose_largest_class_moves(dtype):
    """Each block has a larger probability than those before: their classes are no label any more, whatever their logit."""
    V = 5000
    rising = torch.linspace(1e-3, 1.0, V).expand(6, V)
    logits = logits_of(6, V, dtype=dtype)
    logits[1, ::511] = 40.0  # beyond what was the largest logit without them
    logits[2] = torch.linspace(-60, 60, V).to(dtype)
    logits[3] = -logits[2]
    logits[4] = logits[0] - 1000.0
    logits[5, :1100] = -torch.inf
    targets = (rising / rising.sum(-1, keepdim=True)).to(dtype)
    targets[5, :1100] = 0.0
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = accumloss.token_losses(leaf, targets)
    log_p = wide.log_softmax(-1)
    wanted = -torch.where(targets == 0, 0.0, targets.double() * log_p).sum(-1)
    assert_close(found, wanted, 2 * row_loss_bound(dtype, "cpu"), "losses")
    (of_ours,) = torch.autograd.grad(found.sum(), leaf)
    (of_exact,) = torch.autograd.grad(wanted.sum(), wide)
    distance = (
        8 + log_p.detach().clamp(min=-1e4).abs() + 1000 * (dtype == torch.float64)
    )  # of which the oracle has a unit
    bound = 4 * unit_of(dtype) * distance * (2 * log_p.detach().exp() + targets.double()) + ulp(of_exact, dtype)
    assert_within(of_ours, of_exact, bound, "gradient")
    one = F.one_hot(torch.tensor([0, 700, 1500, 4999, 0, 1200]), V).to(dtype)
    hard = accumloss.token_losses(logits, torch.tensor([0, 700, 1500, 4999, 0, 1200]))
    assert_close(accumloss.token_losses(logits, one), hard.double(), 2 * row_loss_bound(dtype, "cpu"), "one-hot")


@pytest.mark.parametrize("probability", [torch.nan, -torch.inf])
def test_soft_targets_that_are_no_numbers_are_seen(probability):
    logits = logits_of(2, 1500, dtype=torch.float32)
    for at in (slice(3, 4), slice(1499, 1500), slice(None)):
        targets = torch.full((2, 1500), 1e-3)
        targets[0, at] = probability
        losses = accumloss.token_losses(logits, targets)
        assert not losses[0].isfinite() and losses[1].isfinite()


def test_soft_targets_are_f_cross_entropys():
    logits = logits_of(4, 5, 33, dtype=torch.float32)
    targets = logits_of(4, 5, 33, seed=1).softmax(-1).float()
    weight = torch.linspace(0.5, 2.0, 33)
    theirs = F.cross_entropy(
        logits.double().flatten(0, 1), targets.double().flatten(0, 1), weight.double(), label_smoothing=0.1
    )
    sums = accumloss.cross_entropy(logits, targets, weight=weight, label_smoothing=0.1)
    assert sums.num_items == 20 and sums.total_weight == 20
    assert_close(sums.mean_loss, theirs, 4 * SUM, "mean")
    hard = torch.randint(0, 33, (4, 5))
    one_hot = accumloss.cross_entropy(logits, F.one_hot(hard, 33).float()).loss_sum
    assert_close(one_hot, accumloss.cross_entropy(logits, hard).loss_sum, SUM, "one-hot")
    half = accumloss.cross_entropy(logits, targets, token_weight=torch.full((4, 5), 0.5))
    assert_close(half.loss_sum * 2, accumloss.cross_entropy(logits, targets).loss_sum, SUM, "weighted")


def test_soft_targets_owe_pytorch():
    logits, targets = logits_of(3, 9).requires_grad_(), logits_of(3, 9, seed=1).softmax(-1)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 6.0, "logit_scale": 1.2}
    weight = torch.linspace(0.5, 2.0, 9, dtype=torch.float64)

    def losses(x):
        return ops.soft_cross_entropy(x, targets, weight, **options)[0]

    assert torch.autograd.gradcheck(losses, (logits,))
    assert torch.autograd.gradgradcheck(losses, (logits,))
    single, weight = logits.detach().float().requires_grad_(), weight.float()
    torch.library.opcheck(ops.soft_cross_entropy.default, (single, targets.float(), weight), options)
    found = [value.detach() for value in ops.soft_cross_entropy(single, targets.float(), weight, **options)]
    given = (torch.tensor([1.0, 2.0, 0.0], requires_grad=True), single, targets.float(), *found, weight)
    torch.library.opcheck(ops.soft_cross_entropy_backward.default, given, options)


def test_it_compiles_whole():
    student, teacher = logits_of(4, 65, dtype=torch.float32), logits_of(4, 65, dtype=torch.float32, seed=1)
    targets = teacher.softmax(-1)

    def loss(x):
        return accumloss.distillation_loss(x, teacher, beta=0.3) + accumloss.cross_entropy(x, targets).mean_loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        results.append((value, *torch.autograd.grad(value, leaf)))
    for eager, traced in zip(*results, strict=True):
        assert (traced - eager).norm() <= ACCUMULATED_GRADIENT[torch.float32] * eager.norm()


# From hidden states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_linear_distillation_is_that_of_the_logits(dtype, beta):
    """In chunks, heads of other widths, biases, weights and ignored rows."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden, weight, bias = rand(3, 50, 24), rand(530, 24) / 3, rand(530)
    of_teacher = (rand(3, 50, 40), rand(530, 40) / 4)
    labels = torch.zeros(3, 50, dtype=torch.int64)
    labels[0, ::3] = -100
    token_weight = torch.rand(3, 50, generator=generator)
    token_weight[1, ::2] = 0.0
    given = {"beta": beta, "temperature": 0.9, "token_weight": token_weight, "shift": 1}
    found = []
    for kind in ("exact", "logits", "fused"):
        wide = kind == "exact"
        inputs = [(x.double() if wide else x).detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        teacher = [x.double() if wide else x for x in of_teacher]
        if kind == "fused":
            sums = accumloss.linear_distillation(
                inputs[0], inputs[1], *teacher, labels, student_bias=inputs[2],
                max_scratch_bytes=2 * 40 * 530 * dtype.itemsize, **given,
            )  # fmt: skip
        else:
            sums = accumloss.distillation(F.linear(*inputs), F.linear(*teacher), labels, **given)
        found.append((sums.mean_loss, *torch.autograd.grad(sums.mean_loss, inputs)))
    for exact_, by_logits, fused in zip(*found, strict=True):
        of_logits, ours = ((x.double() - exact_).norm() / exact_.norm() for x in (by_logits, fused))
        assert ours <= linear_gradient_bound(of_logits.item(), dtype, 4)


def test_linear_distillation_has_second_derivatives_and_divides():
    generator = torch.Generator().manual_seed(0)
    h, w, th, tw = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (7, 3), (4, 5), (7, 5))
    )
    given = (h.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: accumloss.linear_distillation(a, b, th, tw).loss_sum, given)
    assert torch.autograd.gradgradcheck(
        lambda a, b: accumloss.linear_distillation(a, b, th, tw, beta=1.0).loss_sum, given
    )
    loss = accumloss.linear_distillation_loss(h, w, th, tw, num_items_in_batch=8)
    assert_close(loss, accumloss.linear_distillation(h, w, th, tw).loss_sum / 8, SUM, "loss")


X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
H2, W2 = torch.zeros(2, 3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: accumloss.distillation(X, None), ValueError, "distillation: expected a tensor teacher_logits"),
        (lambda: accumloss.distillation(X, X[0]), RuntimeError, r"teacher_logits of shape \(2, 3, 5\) as student_logits, got \(3, 5\)"),
        (lambda: accumloss.distillation(X, X.bfloat16()), RuntimeError, "teacher_logits of the dtype of student_logits"),
        (lambda: accumloss.distillation(X, X, Y[0]), RuntimeError, r"distillation: expected labels of shape \(2, 3\), got \(3,\)"),
        (lambda: accumloss.distillation(X, X, Y.float()), RuntimeError, "labels of dtype int64 or int32"),
        (lambda: accumloss.distillation(X, X, beta=1.5), ValueError, r"expected beta in \[0, 1\], got 1.5"),
        (lambda: accumloss.distillation(X, X, temperature=0), ValueError, "> 0 for temperature, got 0"),
        (lambda: accumloss.distillation_loss(X, X, betas=1), TypeError, "distillation_loss: .* got 'betas'"),
        (lambda: accumloss.distillation_loss(X, X, num_items_in_batch=-1), ValueError, "distillation_loss: expected num_items_in_batch >= 0"),
        (lambda: ops.distillation(X, X, Y, beta=-0.5), ValueError, r"distillation: expected beta in \[0, 1\], got -0.5"),
        (lambda: accumloss.cross_entropy(X, X[0]), RuntimeError, r"class probabilities in the shape of logits, \(2, 3, 5\)"),
        (lambda: accumloss.cross_entropy(X, X, shift=1), ValueError, "cross_entropy: expected no shift with labels that are class"),
        (lambda: accumloss.cross_entropy(X, X, metrics=True), ValueError, "expected no metrics with labels that are class"),
        (lambda: accumloss.token_losses(X, X, ignore_index=3), ValueError, "token_losses: expected no ignore_index with labels"),
        (lambda: accumloss.cross_entropy(X, X.bfloat16()), RuntimeError, "targets of the dtype of logits"),
        (
            lambda: accumloss.cross_entropy(X.clone().requires_grad_(), X.clone().requires_grad_()).loss_sum.backward(),
            RuntimeError, "expected targets that need no gradient",
        ),
        (lambda: accumloss.linear_distillation(H2, W2, H2, W2[:4]), RuntimeError, "of one vocabulary, got"),
        (lambda: accumloss.linear_distillation(H2, W2, H2, W2.clone().requires_grad_()), RuntimeError, "a teacher that needs no gradient"),
        (lambda: accumloss.linear_distillation(H2, W2, H2.double(), W2.double()), RuntimeError, "teacher_hidden of the dtype of student_hidden"),
        (
            lambda: torch.compile(accumloss.linear_distillation, fullgraph=True)(H2, W2, H2, W2),
            RuntimeError, "linear_distillation: expected no torch.compile",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_mixture_is_that_of_both():
    """math.log of the shares: what the reference does for 0 < beta < 1."""
    s, t = logits_of(2, 5).log_softmax(-1), logits_of(2, 5, seed=1).log_softmax(-1)
    m = torch.log(0.7 * s.exp() + 0.3 * t.exp())
    wanted = 0.3 * (t.exp() * (t - m)).sum(-1) + 0.7 * (s.exp() * (s - m)).sum(-1)
    found = reference.distillation(s, t, torch.zeros(2, dtype=torch.int64), beta=0.3)
    assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(found.tolist(), wanted.tolist(), strict=True))
