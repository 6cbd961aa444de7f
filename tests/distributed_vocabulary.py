"""Run by torchrun: ranks (gloo) that share a vocabulary, against the whole kernel on one; writes what went wrong, by case."""

from __future__ import annotations

import datetime
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import Case
from oracle import expected, token_expected, z_scale
from shards import extreme_rows, merged, part, shards_of
from test_per_token import incoming
from tolerances import (
    OTHER_NEIGHBOUR,
    SUM,
    assert_close,
    assert_same_but_for_neighbours,
    assert_within,
    entropy_bound,
    linear_gradient_bound,
    row_loss_bound,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

import accumloss
from accumloss import LossOptions, parallel

OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-3},
    "softcap": {"softcap": 20.0},
    "scale": {"logit_scale": 0.5},
    "weights": {"weight": True},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.5, "weight": True},
}
SIZES = (
    5,
    300,
    1001,
    4096,
    32000,
)  # some uneven, fewer than 512 of a shard, and of three ranks one without a class but for 5
CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def sample(V: int, dtype: torch.dtype = torch.float32, options: str = "plain", shift: int = 0) -> Case:
    """Two sequences; labels at both ends of the vocabulary, some ignored, and a tie of the largest logits across shards."""
    generator = torch.Generator().manual_seed(V)
    logits = (torch.randn(2, 9, V, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, V, (2, 9), generator=generator)
    labels[0, 3] = labels[1, 8] = -100
    labels[0, 1], labels[0, 2], labels[1, 1] = 0, V - 1, V - 1
    logits[1, 0, 0] = logits[1, 0, V - 1] = 40.0  # row (1, 0) has label V - 1 where shifted: not the first of equals
    logits[0, 1, V - 1] = 40.0
    kwargs = dict(OPTIONS[options])
    weight = torch.rand(V, generator=generator) + 0.5 if kwargs.pop("weight", False) else None
    return Case(f"V={V} {dtype} {options}", logits, labels, weight, LossOptions(**kwargs), shift)


def own(x: torch.Tensor) -> torch.Tensor:
    """This rank's classes."""
    return part(x, shards_of(x.shape[-1], dist.get_world_size())[dist.get_rank()])


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def mesh() -> object:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def gathered(value: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(found, value.detach().contiguous())
    return found


@contextmanager
def counted(forward: int, nbytes: int | None = None):
    """Fails unless so many collectives are called inside, all of them parallel's all_gather of so many bytes a rank."""
    sent = []
    gather = parallel.all_gather_single

    def watch(output, given, **kwargs):
        sent.append(given.nbytes)
        return gather(output, given, **kwargs)

    parallel.all_gather_single = watch
    try:
        with CommDebugMode() as mode:
            yield
    finally:
        parallel.all_gather_single = gather
    assert mode.get_total_counts() == len(sent) == forward, (mode.get_comm_counts(), sent)
    assert nbytes is None or sent == [nbytes] * forward, (nbytes, sent)


def check_against_whole(c: Case) -> None:
    """cross_entropy with group=, of one case: sums, metrics, gradient; one gather in forward and none in backward."""
    kwargs = {**c.kwargs, "weight": c.weight, "metrics": True}
    whole, shard = leaf(c.logits), leaf(own(c.logits))
    want = accumloss.cross_entropy(whole, c.labels, **kwargs)
    columns = 4 + (c.options.label_smoothing > 0)
    with counted(1, 8 * (columns * c.labels.numel() + 2)):
        sums = accumloss.cross_entropy(shard, c.labels, group=dist.group.WORLD, vocab_size=c.logits.shape[-1], **kwargs)
    for field in ("loss_sum", "total_weight", "entropy_sum"):
        assert_close(getattr(sums, field), getattr(want, field), SUM, f"{c.name}: {field}")
    assert sums.num_items == want.num_items
    assert sums.num_correct == want.num_correct
    assert all(torch.equal(sums.loss_sum, other) for other in gathered(sums.loss_sum))
    (want.loss_sum / 11).backward()
    with counted(0):
        (sums.loss_sum / 11).backward()
    rows, labels, shards = merged(c, dist.get_world_size())  # in one process, from the same shards
    mine = shards[dist.get_rank()]
    assert torch.equal(sums.loss_sum, rows.sums[0]), c.name
    factor = torch.tensor(1.0) / 11
    grad = parallel.backward(factor, own(c.logits), labels, rows.lse, rows.nll, c.weight, mine, c.options)
    assert torch.equal(shard.grad, grad), f"{c.name}: bits"
    wanted = expected(c, grad_loss_sum=1 / 11)
    assert_within(shard.grad, own(wanted.grad), own(wanted.grad_bound), f"{c.name}: gradient")
    is_plain = c.logits.dtype == torch.bfloat16 and c.options == LossOptions() and c.weight is None
    if is_plain and c.logits.shape[-1] > 512:  # up to which the whole row is another kernel's
        assert_same_but_for_neighbours(
            shard.grad, own(whole.grad), OTHER_NEIGHBOUR, f"{c.name}: the whole kernel's bits"
        )


def of_options(options: str) -> None:
    def function() -> None:
        for V in SIZES:
            for dtype in (torch.bfloat16, torch.float32) if options in ("plain", "everything") else (torch.bfloat16,):
                check_against_whole(sample(V, dtype, options, shift=1))

    CASES[options] = function


for name in OPTIONS:
    of_options(name)


@case
def sixteen_bytes_a_row() -> None:
    c = sample(1001)
    for options, bytes_a_row in (("plain", 16), ("weights", 16), ("smoothing", 24)):
        c = sample(1001, options=options)
        with counted(1, bytes_a_row * c.labels.numel() + 16):
            accumloss.masked_lm_loss(
                own(c.logits), c.labels, 1001, group=dist.group.WORLD, weight=c.weight,
                label_smoothing=c.options.label_smoothing,
            )  # fmt: skip


@case
def losses() -> None:
    """causal_lm_loss and masked_lm_loss: with and without a divisor, shifted labels, flattened ones, class weights."""
    c = sample(1001, torch.bfloat16, "weights")
    shifted = torch.cat([c.labels[:, 1:], torch.full((2, 1), -100)], 1)
    for weight in (None, c.weight):
        for num_items in (None, 7, torch.tensor([[7.5]]), 0):
            for name, labels, given in (
                ("causal_lm_loss", c.labels, {}),
                ("causal_lm_loss", None, {"shift_labels": shifted}),
                ("masked_lm_loss", c.labels, {}),
                ("masked_lm_loss", c.labels.flatten(), {}),
            ):
                call, results = getattr(accumloss, name), []
                for logits, group in ((c.logits, None), (own(c.logits), dist.group.WORLD)):
                    x = leaf(logits)
                    loss = call(x, labels, 1001, num_items, group=group, weight=weight, **given)
                    (loss * 0.5).backward()
                    results.append((loss, x.grad))
                (want, whole), (loss, grad) = results
                assert_close(loss, want, SUM, name)
                # the whole kernel writes its gradient in forward: the same to within the rounding of bf16
                assert_close(grad, own(whole), 2.0**-7, f"{name}: gradient")


@case
def in_place() -> None:
    c = sample(1536, torch.bfloat16, shift=1)
    want = leaf(own(c.logits))
    accumloss.causal_lm_loss(want, c.labels, num_items_in_batch=11, group=dist.group.WORLD).backward()
    for inplace in ("backward", "forward"):
        x = leaf(own(c.logits))
        logits = x * 1
        places: list[int] = []
        logits.register_hook(lambda grad, places=places: places.append(grad.data_ptr()))
        loss = accumloss.causal_lm_loss(
            logits, c.labels, num_items_in_batch=11, group=dist.group.WORLD, inplace=inplace
        )
        loss.backward()
        assert places == [logits.data_ptr()], "the gradient lies elsewhere"
        assert torch.equal(x.grad, want.grad), inplace
        y = torch.tanh(leaf(own(c.logits)))  # has saved its output
        loss = accumloss.causal_lm_loss(y, c.labels, num_items_in_batch=11, group=dist.group.WORLD, inplace=inplace)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        z = torch.tanh(leaf(distribute_tensor(c.logits, mesh(), [Shard(2)])))
        loss = accumloss.causal_lm_loss(z, c.labels, num_items_in_batch=11, inplace=inplace)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with pytest.raises(ValueError, match="a leaf that requires grad"):
        accumloss.causal_lm_loss(x, c.labels, group=dist.group.WORLD, inplace="backward")


@case
def second_backwards() -> None:
    c = sample(300)
    x = leaf(own(c.logits))
    loss = accumloss.causal_lm_loss(x, c.labels, num_items_in_batch=11, group=dist.group.WORLD)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    loss = accumloss.causal_lm_loss(x, c.labels, num_items_in_batch=11, group=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="create_graph=False .* gather them, and leave group= out"):
        torch.autograd.grad(loss, x, create_graph=True)


@case
def errors() -> None:
    """Each on all ranks alike: none waits for another."""
    group, rank = dist.group.WORLD, dist.get_rank()
    c = sample(1001)
    x = own(c.logits)
    for bad in (1001, -1):
        labels = c.labels.clone()
        labels[0, 5] = bad
        with pytest.raises(IndexError, match=rf"in \[0, 1001\) or ignore_index -100, got {bad} for row 5 of 18"):
            accumloss.cross_entropy(x, labels, group=group, vocab_size=1001)
        with pytest.raises(IndexError, match=r"in \[0, 1\)"):  # where some ranks have no class to compare it with
            accumloss.cross_entropy(own(c.logits[..., :1]), labels, group=group, vocab_size=1)
    if 1001 % dist.get_world_size():
        with pytest.raises(ValueError, match="one vocabulary in all processes .* give vocab_size="):
            accumloss.cross_entropy(x, c.labels, group=group)
    with pytest.raises(ValueError, match="with .* classes, .* of vocab_size 2000, on rank .* got"):
        accumloss.cross_entropy(x, c.labels, group=group, vocab_size=2000)
    with pytest.raises(ValueError, match="vocab_size >= 1"):
        accumloss.cross_entropy(x, c.labels, group=group, vocab_size=0)
    with pytest.raises(RuntimeError, match=r"weight of shape \(V,\) = \(1001,\)"):
        accumloss.cross_entropy(x, c.labels, weight=torch.ones(x.shape[-1]), group=group, vocab_size=1001)
    with pytest.raises(TypeError, match="ProcessGroup or None for group"):
        accumloss.cross_entropy(x, c.labels, group="world")
    alone = dist.new_group([0])
    if rank > 0:
        with pytest.raises((ValueError, TypeError), match="group"):
            accumloss.cross_entropy(x, c.labels, group=alone)
    for at, other in (
        ((0, 0), 7),
        ((1, 1), -100),
    ):  # another label, perhaps of the same shard; a row that counts nowhere else
        labels = c.labels.clone()
        labels[at] = other + rank if other >= 0 else other if rank else labels[at]
        with pytest.raises(ValueError, match="expected the same labels in all processes"):
            accumloss.cross_entropy(x, labels, group=group, vocab_size=1001)
    swapped = c.labels.flip(1) if rank else c.labels
    with pytest.raises(ValueError, match="expected the same labels in all processes"):
        accumloss.cross_entropy(x, swapped, group=group, vocab_size=1001)


@case
def errors_of_one_rank() -> None:
    """What one rank alone refuses, all hear of in the one gather: that rank by its own error, the others by rank and reason."""
    group, rank = dist.group.WORLD, dist.get_rank()
    c = sample(1001)
    x, alone = own(c.logits), rank == dist.get_world_size() - 1

    def losses(logits, vocab_size=1001, weight=None):
        yield lambda: accumloss.cross_entropy(logits, c.labels, group=group, vocab_size=vocab_size, weight=weight)
        yield lambda: accumloss.causal_lm_loss(logits, c.labels, vocab_size, 7, group=group, weight=weight)
        yield lambda: accumloss.causal_lm_loss(
            leaf(logits) * 1 if logits.is_floating_point() else logits, c.labels, vocab_size, 7, group=group,
            weight=weight, inplace="forward",
        )  # fmt: skip
        yield lambda: accumloss.token_losses(logits, c.labels, group=group, vocab_size=vocab_size, weight=weight)

    def heads_of(H):
        hidden, weight, _, labels = heads(1001, torch.float32)
        w = own_rows(weight)
        yield lambda: accumloss.linear_cross_entropy(
            hidden, w[:-1] if alone else w, labels, group=group, vocab_size=1001, max_scratch_bytes=H
        )

    last = dist.get_world_size() - 1
    for calls, error, message in (
        (losses(x[..., :-1] if alone else x), ValueError, f"on rank {last} of .*, cut as torch.chunk cuts, got"),
        (losses(x, 2000 if alone else 1001), ValueError, "of vocab_size 2000"),
        (losses(x, weight=torch.ones(7 if alone else 1001)), RuntimeError, r"weight of shape \(V,\) = \(1001,\)"),
        (losses(x.long() if alone else x), RuntimeError, "float"),
        (heads_of(2**28), ValueError, f"on rank {last} of .*, cut as torch.chunk cuts, got"),
        (heads_of(40000), ValueError, f"on rank {last} of .*, cut as torch.chunk cuts, got"),
    ):
        for call in calls:
            with CommDebugMode() as mode:
                if alone:
                    with pytest.raises(error, match=message):
                        call()
                else:
                    with pytest.raises(
                        RuntimeError,
                        match=f": rank {last} of the group takes no part in this call: {error.__name__}.*{message}",
                    ):
                        call()
            assert mode.get_total_counts() == 1, mode.get_comm_counts()


@case
def ops_refuse_dtensors() -> None:
    c = sample(300)
    x, labels = (distribute_tensor(value, mesh(), [Shard(0)]) for value in (c.logits, c.labels))
    for name in ("cross_entropy", "causal_lm", "masked_lm"):
        for given in ((x, labels), (x, c.labels), (leaf(x), labels)):
            with pytest.raises(
                RuntimeError,
                match=rf"accumloss.{name}: .*\(Shard\(dim=0\)\); call accumloss.cross_entropy, causal_lm_loss",
            ):
                getattr(torch.ops.accumloss, name)(*given)


@case
def a_group_of_one() -> None:
    c = sample(300, torch.bfloat16, shift=1)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    results = []
    for group in (None, alone):
        x = leaf(c.logits)
        accumloss.cross_entropy(x, c.labels, shift=1, group=group).loss_sum.backward()
        results.append(x.grad)
    assert_close(results[1], results[0], 2.0**-7, "gradient")
    for V in (1, 5, 300):  # one class of a shard that has them all
        c = (
            sample(V, torch.float32, "everything")
            if V > 1
            else Case(
                "V=1",
                torch.randn(2, 3, 1),
                torch.zeros(2, 3, dtype=torch.int64),
                torch.rand(1),
                LossOptions(label_smoothing=0.1),
            )
        )
        kwargs = {**c.kwargs, "weight": c.weight}
        want = accumloss.cross_entropy(c.logits, c.labels, **kwargs).loss_sum
        assert_close(accumloss.cross_entropy(c.logits, c.labels, group=alone, **kwargs).loss_sum, want, SUM, "loss_sum")
        rows = accumloss.token_losses(c.logits, c.labels, group=alone, **kwargs)
        assert_close(rows.sum(), want, SUM, "sum of the rows")


@case
def extreme_rows_on_ranks() -> None:
    """Of logits as large as there are, -inf, +inf and NaN, on one rank or on all but one: each row's loss is the whole kernel's."""
    group, size = dist.group.WORLD, dist.get_world_size()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        logits = extreme_rows(1001, size, dtype)
        for label in (0, 334, 1000):
            labels = torch.full(logits.shape[:1], label)
            for options in ({}, {"label_smoothing": 0.1}):
                want = accumloss.token_losses(logits, labels, **options)
                found = accumloss.token_losses(own(logits), labels, group=group, vocab_size=1001, **options)
                assert all(torch.equal(found.nan_to_num(), other.nan_to_num()) for other in gathered(found))
                is_number = want.isfinite()
                assert torch.equal(found[~is_number].nan_to_num(), want[~is_number].nan_to_num()), (dtype, label)
                bound = 2 * row_loss_bound(dtype, "cpu", 20.0) * want[is_number].double()
                assert_within(found[is_number], want[is_number], bound, f"{dtype}, label {label}")


@case
def no_rows() -> None:
    """As without a group."""
    for shape in ((0,), (2, 0)):
        x, labels = leaf(torch.zeros(*shape, 7)), torch.zeros(shape, dtype=torch.int64)
        given = {"group": dist.group.WORLD, "vocab_size": 7 * dist.get_world_size()}
        found = accumloss.token_statistics(x, labels, **given)
        assert all(value.shape == shape for value in (found.log_prob, found.entropy, found.lse, found.argmax))
        sums = accumloss.cross_entropy(x, labels, metrics=True, **given)
        assert sums.num_items == 0 and sums.loss_sum == 0
        (grad,) = torch.autograd.grad(found.log_prob.sum() + sums.loss_sum, x)
        assert grad.shape == x.shape


@case
def dtensors() -> None:
    """Logits placed in every way, labels plain and placed alike: sums, gradient, placements, communication."""
    for options in ("plain", "everything"):
        for V, placement in ((1001, Shard(2)), (5, Shard(-1)), (300, Shard(0)), (300, Shard(1)), (300, Replicate())):
            c = sample(V, torch.bfloat16, options)
            of_rows = Replicate() if placement in (Shard(2), Shard(-1)) else placement
            loss_placement = Partial() if of_rows.is_shard() else Replicate()
            kwargs = {**c.options.as_kwargs(), "weight": c.weight}
            whole = leaf(c.logits)
            want = accumloss.cross_entropy(whole, c.labels, metrics=True, **kwargs)
            want.loss_sum.backward()
            for labels in (c.labels, distribute_tensor(c.labels, mesh(), [of_rows]),
                           distribute_tensor(c.labels, mesh(), [Replicate()])):  # fmt: skip
                x = leaf(distribute_tensor(c.logits, mesh(), [placement]))
                with counted(1 if of_rows != placement else 0):
                    sums = accumloss.cross_entropy(x, labels, metrics=True, **kwargs)
                assert sums.loss_sum.placements == (loss_placement,)
                assert_close(sums.loss_sum.full_tensor(), want.loss_sum, SUM, "loss_sum")
                assert_close(sums.entropy_sum.full_tensor(), want.entropy_sum, SUM, "entropy_sum")
                assert sums.num_items.full_tensor() == want.num_items
                assert sums.num_correct.full_tensor() == want.num_correct
                sums.loss_sum.backward()
                assert x.grad.placements == x.placements
                bound = expected(c).grad_bound
                assert_within(x.grad.full_tensor(), expected(c).grad, bound, f"{placement}: gradient")


NAMES = ("loss", "nll", "lse", "entropy")


def check_rows(c: Case, found: tuple[torch.Tensor, ...], x: torch.Tensor, whole=lambda x: x) -> None:
    """loss, nll, lse, entropy, argmax of a case against float64, and the gradient of each, by a number of its own for each row."""
    wanted = token_expected(c)
    dtype = c.logits.dtype
    bound = row_loss_bound(dtype, "cpu", z_scale(c))
    of_rows = dict(zip((*NAMES, "argmax"), found, strict=True))
    assert_close(whole(of_rows["loss"]), wanted.loss, bound, f"{c.name}: loss")
    assert_close(whole(of_rows["nll"]), wanted.nll, bound, f"{c.name}: nll")
    assert_within(whole(of_rows["lse"]), wanted.lse, bound * (wanted.lse.abs() + wanted.nll), f"{c.name}: lse")
    assert_within(whole(of_rows["entropy"]), wanted.entropy, entropy_bound(wanted, dtype, bound), f"{c.name}: entropy")
    assert torch.equal(whole(of_rows["argmax"]), wanted.argmax), c.name
    for names in (*((name,) for name in NAMES), NAMES):
        grads = {name: incoming(c, 3 + i).to(of_rows[name].dtype) for i, name in enumerate(names)}
        outputs, given = zip(
            *((of_rows[name], placed_as(grad, of_rows[name])) for name, grad in grads.items()), strict=True
        )
        with counted(0):
            (grad,) = torch.autograd.grad(outputs, x, given, retain_graph=True)
        exact, within = wanted.gradient({name: grad.double() for name, grad in grads.items()})
        if not parallel.is_dtensor(x):
            exact, within = own(exact), own(within)
        assert_within(whole(grad), exact, within, f"{c.name}: gradient of {names}")


def placed_as(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if not parallel.is_dtensor(like):
        return rows
    whole = DTensor.from_local(rows, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements)


@case
def rows_of_a_shared_vocabulary() -> None:
    """token_statistics and token_losses with group=: one gather in forward, none in backward."""
    from accumloss import per_token

    for V in (5, 300, 1001, 4096):
        for options in ("plain", "everything"):
            for dtype in (torch.bfloat16, torch.float32):
                c = sample(V, dtype, options, shift=1)
                x = leaf(own(c.logits))
                columns = 6 + (c.options.label_smoothing > 0)
                with counted(1, 8 * (columns * c.labels.numel() + 2)):
                    found = per_token._statistics(
                        "token_statistics", x, c.labels, c.weight, 1, c.options, False, True, (dist.group.WORLD, V)
                    )
                check_rows(c, found, x)
    c = sample(1001, torch.float32, shift=1)
    given = {"shift": 1, "group": dist.group.WORLD, "vocab_size": 1001}
    x = leaf(own(c.logits))
    with counted(1, 16 * c.labels.numel() + 16):
        log_probs = accumloss.token_log_probs(x, c.labels, 0.7, **given)
    want = accumloss.token_log_probs(c.logits, c.labels, 0.7, shift=1)
    assert_close(log_probs, want, row_loss_bound(torch.float32, "cpu", 60.0), "log-probabilities")
    assert torch.equal(accumloss.token_statistics(x, c.labels, 0.7, **given).log_prob, log_probs)
    logits = x * 1
    places: list[int] = []
    logits.register_hook(lambda grad: places.append(grad.data_ptr()))
    (over,) = torch.autograd.grad(
        accumloss.token_log_probs(logits, c.labels, 0.7, inplace="backward", **given).sum(), x
    )
    assert places == [logits.data_ptr()], "the gradient lies elsewhere"
    assert torch.equal(over, torch.autograd.grad(log_probs.sum(), x, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match=r"create_graph=False .* gather them, and leave group= out"):
        torch.autograd.grad(log_probs.sum(), x, create_graph=True)
    labels = torch.where(c.labels == -100, -100, 2000)
    with pytest.raises(IndexError, match=r"in \[0, 1001\)"):
        accumloss.token_losses(x, labels, group=dist.group.WORLD, vocab_size=1001)
    with pytest.raises(ValueError, match="token_losses: expected no group with labels that are class probabilities"):
        accumloss.token_losses(x, x.softmax(-1), group=dist.group.WORLD)


@case
def token_weights_of_a_shared_vocabulary() -> None:
    c = sample(1001, torch.float32, "weights", shift=1)
    weights = leaf(torch.rand(c.labels.shape, generator=torch.Generator().manual_seed(1)))
    results = []
    for logits, given in ((c.logits, {}), (own(c.logits), {"group": dist.group.WORLD, "vocab_size": 1001})):
        x = leaf(logits)
        sums = accumloss.cross_entropy(
            x, c.labels, weight=c.weight, shift=1, metrics=True, token_weight=weights, z_loss=1e-3, **given
        )
        grads = torch.autograd.grad(sums.mean_loss, (x, weights))
        results.append((sums, grads[0] if given else own(grads[0]), grads[1]))
    (want, *wanted), (sums, *found) = results
    for field in ("loss_sum", "total_weight", "entropy_sum", "z_loss_sum"):
        assert_close(getattr(sums, field), getattr(want, field), SUM, field)
    assert sums.num_items == want.num_items and sums.num_correct == want.num_correct
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 10 * SUM * b.norm()
    with pytest.raises(ValueError, match="no token_weight beside DTensors"):
        accumloss.cross_entropy(distribute_tensor(c.logits, mesh(), [Shard(2)]), c.labels, token_weight=weights)


@case
def rows_of_dtensors() -> None:
    """What is told of the rows is placed as they are."""
    from accumloss import per_token

    for V, placement in ((1001, Shard(2)), (5, Shard(-1)), (300, Shard(0)), (300, Shard(1)), (300, Replicate())):
        c = sample(V, torch.bfloat16, "everything")
        of_rows = Replicate() if placement in (Shard(2), Shard(-1)) else placement
        x = leaf(distribute_tensor(c.logits, mesh(), [placement]))
        with counted(1 if of_rows != placement else 0):
            found = per_token._statistics(
                "token_statistics", x, c.labels, c.weight, 0, c.options, False, True, (None, None)
            )
        assert all(value.placements == (of_rows,) for value in found)
        check_rows(c, found, x, lambda value: value.full_tensor())
        y = torch.tanh(leaf(distribute_tensor(c.logits, mesh(), [placement])))  # has saved its output
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            accumloss.token_log_probs(y, c.labels, inplace="backward").sum().backward()


@case
def dtensor_losses() -> None:
    """causal_lm_loss: the items of all rows divide where none are given; the shift goes over the shards of the sequence."""
    c = sample(300, torch.float32, "weights")
    for weight in (None, c.weight):
        for num_items in (None, 7, torch.tensor(7)):
            whole = leaf(c.logits)
            want = accumloss.causal_lm_loss(whole, c.labels, 300, num_items, weight=weight)
            want.backward()
            for placement in (Shard(2), Shard(0), Shard(1), Replicate()):
                for context in (loss_parallel, lambda: pytest.MonkeyPatch.context()):
                    with context():
                        x = leaf(distribute_tensor(c.logits, mesh(), [placement]))
                        loss = accumloss.causal_lm_loss(x, c.labels, 300, num_items, weight=weight)
                        assert_close(loss.full_tensor(), want, SUM, f"{placement}")
                        loss.backward()
                    assert_close(x.grad.full_tensor(), whole.grad, 1e3 * SUM, f"{placement}: gradient")


@case
def dtensor_errors() -> None:
    c = sample(300)
    m, two = mesh(), init_device_mesh("cpu", (1, dist.get_world_size()))
    by_class = distribute_tensor(c.logits, m, [Shard(2)])
    by_row = distribute_tensor(c.logits, m, [Shard(0)])
    by_time = distribute_tensor(c.logits, m, [Shard(1)])
    whole = distribute_tensor(c.logits, m, [Replicate()])
    for logits, labels, message in (
        (by_class, distribute_tensor(c.labels, m, [Shard(0)]), r"logits placed \(Shard\(dim=2\)\).*labels placed \(Shard\(dim=0\)\).*; redistribute"),
        (by_row, distribute_tensor(c.labels, m, [Shard(1)]), r"logits placed \(Shard\(dim=0\)\).*labels placed \(Shard\(dim=1\)\).*; redistribute"),
        (whole, distribute_tensor(c.labels, m, [Shard(0)]), r"logits placed \(Replicate\(\)\).*labels placed \(Shard\(dim=0\)\).*; redistribute"),
        (by_class, distribute_tensor(c.labels, two, [Replicate(), Replicate()]), r"on a mesh of .*labels placed .* on a mesh of \(1, "),
        (DTensor.from_local(c.logits, m, [Partial()]), c.labels, r"Shard or Replicate .* got \(Partial\(sum\)\); logits.redistribute"),
        (c.logits, distribute_tensor(c.labels, m, [Replicate()]), r"plain labels beside plain logits, got a DTensor placed .*full_tensor\(\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            accumloss.cross_entropy(logits, labels)
    with pytest.raises(
        ValueError,
        match=r"labels whole along time.*logits placed \(Shard\(dim=1\)\) and labels placed \(Shard\(dim=1\)\); pass shift_labels=",
    ):
        accumloss.causal_lm_loss(by_time, distribute_tensor(c.labels, m, [Shard(1)]))
    with pytest.raises(ValueError, match="no group= beside a DTensor"):
        accumloss.cross_entropy(by_class, c.labels, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"vocab_size = 7"):
        accumloss.causal_lm_loss(by_class, c.labels, 7)
    weight = distribute_tensor(torch.ones(300), m, [Shard(0)])
    with pytest.raises(ValueError, match=r"class weights \(V,\) of the whole vocabulary.*weight.full_tensor\(\)"):
        accumloss.cross_entropy(by_class, c.labels, weight=weight)


# Head and loss together -----------------------------------------------------------------------------------------------


def heads(V: int, dtype: torch.dtype, H: int = 24, rows: tuple[int, ...] = (3, 40)):
    """hidden, weight, bias and labels of a head."""
    generator = torch.Generator().manual_seed(V)
    hidden, weight = torch.randn(*rows, H, generator=generator), torch.randn(V, H, generator=generator)
    labels = torch.randint(0, V, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < 0.3] = -100
    return hidden.to(dtype), weight.to(dtype), torch.randn(V, generator=generator).to(dtype), labels


def own_rows(x: torch.Tensor) -> torch.Tensor:
    """This rank's classes of a weight (V, H) or bias (V,)."""
    shard = shards_of(x.shape[0], dist.get_world_size())[dist.get_rank()]
    return x[shard.class_offset : shard.class_offset + shard.num_classes].clone()


def exact_head(hidden, weight, bias, labels, num_items, class_weight=None, **kwargs):
    """Loss and gradients of the head in float64, from the logits."""
    leaves = [leaf(x.double()) for x in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*leaves)
    sums = accumloss.cross_entropy(logits, labels, shift=1, weight=class_weight, **kwargs)
    (sums.loss_sum / num_items).backward()
    return (sums.loss_sum / num_items).detach(), [x.grad for x in leaves]


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def check_head(found, logits_path, exact, dtype, roundings, what) -> None:
    for name, grad, by_logits, want in zip(("hidden", "weight", "bias"), found, logits_path, exact, strict=True):
        bound = linear_gradient_bound(relative(by_logits, want), dtype, roundings)
        assert relative(grad, want) <= bound, f"{what}: gradient of {name}: {relative(grad, want)}, at most {bound}"


@case
def linear_heads() -> None:
    """A weight in shards against float64, as near as the logits path: chunks, options, bias; one all_reduce in backward."""
    for V, dtype, scratch in ((1001, torch.float32, 2**28), (1001, torch.bfloat16, 2**28), (1001, torch.float32, 40000),
                              (1001, torch.bfloat16, 40000), (5, torch.float32, 2**28), (5, torch.float32, 500)):  # fmt: skip
        for options in ("plain", "everything"):
            hidden, weight, bias, labels = heads(V, dtype)
            kwargs = dict(OPTIONS[options])
            class_weight = (
                torch.rand(V, generator=torch.Generator().manual_seed(2)) + 0.5 if kwargs.pop("weight", 0) else None
            )
            num_items = int((labels[:, 1:] != -100).sum())
            want, exact = exact_head(hidden, weight, bias, labels, num_items, class_weight, **kwargs)
            leaves = [leaf(x) for x in (hidden, weight, bias)]
            whole = accumloss.cross_entropy(
                torch.nn.functional.linear(*leaves), labels, shift=1, weight=class_weight, **kwargs
            )
            (whole.loss_sum / num_items).backward()
            h, w, b = leaf(hidden), leaf(own_rows(weight)), leaf(own_rows(bias))
            with CommDebugMode() as mode:
                loss = accumloss.linear_causal_lm_loss(
                    h, w, labels, num_items, bias=b, class_weight=class_weight, group=dist.group.WORLD, vocab_size=V,
                    max_scratch_bytes=scratch, **kwargs,
                )  # fmt: skip
            (chunks,) = mode.get_comm_counts().values()  # one all_gather for each
            assert (chunks > 1) == (scratch < 2**20)
            with CommDebugMode() as mode:
                loss.backward()
            assert list(mode.get_comm_counts().values()) == [1], mode.get_comm_counts()
            what = f"V={V} {dtype} {options} {scratch}"
            assert_close(loss, want, 2.0**-7 if dtype == torch.bfloat16 else 10 * SUM, what)
            exact = [exact[0], own_rows(exact[1]), own_rows(exact[2])]
            by_logits = [leaves[0].grad, own_rows(leaves[1].grad), own_rows(leaves[2].grad)]
            # the gradient of hidden is a sum of one rounded part of each rank
            check_head([h.grad, w.grad, b.grad], by_logits, exact, dtype, chunks + 2 * dist.get_world_size(), what)


@case
def linear_hidden_gradients_may_stay_parts() -> None:
    hidden, weight, _, labels = heads(1001, torch.float32)
    results = []
    for reduce in (True, False):
        h, w = leaf(hidden), leaf(own_rows(weight))
        sums = accumloss.linear_cross_entropy(
            h, w, labels, shift=1, metrics=True, group=dist.group.WORLD, vocab_size=1001, reduce_hidden_grad=reduce
        )
        with CommDebugMode() as mode:
            sums.loss_sum.backward()
        assert mode.get_total_counts() == int(reduce)
        results.append((sums, h.grad, w.grad))
    (_, whole, w), (sums, mine, w_again) = results
    assert torch.equal(w, w_again)
    assert_within(sum(gathered(mine)), whole, 10 * SUM * whole.abs().max(), "the parts' sum")
    want = accumloss.cross_entropy(hidden @ weight.t(), labels, shift=1, metrics=True)
    assert sums.num_correct == want.num_correct
    assert_close(sums.entropy_sum, want.entropy_sum, 10 * SUM, "entropy_sum")


@case
def linear_dtensors() -> None:
    """Weight and hidden placed in every way, hidden states sharded by sequence too: gradients and placements."""
    hidden, weight, bias, labels = heads(1001, torch.float32, rows=(6, 12))
    num_items = int((labels[:, 1:] != -100).sum())
    want, exact = exact_head(hidden, weight, bias, labels, num_items)
    for of_weight, of_hidden, grads, of_loss in (
        (Shard(0), Replicate(), (Partial(), Shard(0)), Replicate()),
        (Shard(0), Shard(1), (Shard(1), Shard(0)), Replicate()),
        (Shard(0), Shard(0), (Shard(0), Shard(0)), Replicate()),
        (Replicate(), Shard(0), (Shard(0), Partial()), Partial()),
        (Replicate(), Shard(1), (Shard(1), Partial()), Partial()),
        (Replicate(), Replicate(), (Replicate(), Replicate()), Replicate()),
    ):
        for given in (num_items, None):
            m = mesh()
            h, w = leaf(distribute_tensor(hidden, m, [of_hidden])), leaf(distribute_tensor(weight, m, [of_weight]))
            b = leaf(distribute_tensor(bias, m, [of_weight]))
            loss = accumloss.linear_causal_lm_loss(h, w, labels, given, bias=b)
            assert loss.placements == (of_loss,)
            assert_close(loss.full_tensor(), want, 10 * SUM, "loss")
            loss.backward()
            assert (h.grad.placements, w.grad.placements) == ((grads[0],), (grads[1],))
            for grad, wanted in zip((h.grad, w.grad, b.grad), exact, strict=True):
                assert relative(grad.full_tensor(), wanted) <= 20 * SUM, (of_weight, of_hidden)


@case
def linear_errors() -> None:
    hidden, weight, bias, labels = heads(1001, torch.float32)
    m, group = mesh(), dist.group.WORLD
    sharded = distribute_tensor(weight, m, [Shard(0)])
    rows = distribute_tensor(hidden, m, [Shard(0)])
    for h, w, kwargs, error, message in (
        (hidden, sharded, {}, RuntimeError, r"a whole weight, got a sharded DTensor placed \(Shard\(dim=0\)\).*under FSDP2.*pass group=, or DTensor.from_local"),
        (rows, weight, {}, ValueError, r"weight as a DTensor on the mesh of hidden, placed \(Shard\(dim=0\)\).*plain tensor; distribute_tensor"),
        (rows, distribute_tensor(weight, m, [Shard(1)]), {}, ValueError, r"weight placed \(Shard\(dim=1\)\) and hidden placed \(Shard\(dim=0\)\); redist"),
        (distribute_tensor(hidden, m, [Shard(2)]), sharded, {}, ValueError, r"hidden placed \(Shard\(dim=2\)\); redist"),
        (rows, sharded, {"bias": bias}, ValueError, r"bias placed as weight is, \(Shard\(dim=0\)\), got nowhere"),
        (rows, sharded, {"group": group}, ValueError, "no group= beside a DTensor"),
        (hidden, distribute_tensor(weight, m, [Replicate()]), {"group": group}, ValueError, r"over the group that is given.*Replicate"),
        (hidden, own_rows(weight), {"group": group, "vocab_size": 2001}, ValueError, "of vocab_size 2001"),
        (hidden, own_rows(weight), {"group": group, "vocab_size": 1001, "bias": bias}, RuntimeError, r"bias of shape \(V,\)"),
        (hidden, weight, {"vocab_size": 7}, ValueError, "vocab_size = 7"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            accumloss.linear_cross_entropy(h, w, labels, **kwargs)
    if 1001 % dist.get_world_size():
        with pytest.raises(ValueError, match="one vocabulary in all processes .* give vocab_size="):
            accumloss.linear_cross_entropy(hidden, own_rows(weight), labels, group=group)
    bad = labels.clone()
    bad[0, 0] = 1001
    with pytest.raises(IndexError, match=r"in \[0, 1001\)"):
        accumloss.linear_cross_entropy(hidden, own_rows(weight), bad, group=group, vocab_size=1001)
    found = accumloss.linear_cross_entropy(hidden, sharded, labels, group=group)  # a DTensor's size is known
    assert_close(found.loss_sum, accumloss.linear_cross_entropy(hidden, weight, labels).loss_sum, 10 * SUM, "loss")
    h, w = leaf(hidden), leaf(own_rows(weight))
    loss = accumloss.linear_causal_lm_loss(h, w, labels, group=group, vocab_size=1001)
    with pytest.raises(RuntimeError, match="create_graph=False"):
        torch.autograd.grad(loss, h, create_graph=True)


def compiled(backend: str) -> None:
    c = sample(1001, torch.float32, "smoothing")
    group, H = dist.group.WORLD, 8
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(2, 9, H, generator=generator), torch.randn(H, 1001, generator=generator)

    def causal(h, w, y):
        return accumloss.causal_lm_loss(h @ w, y, 1001, 11, group=group, label_smoothing=0.1)

    def sums(h, w, y):
        return accumloss.cross_entropy(h @ w, y, vocab_size=1001, group=group, metrics=True).mean_loss

    def placed(h, w, y):
        logits = DTensor.from_local(
            h @ w, mesh_of_all, [Shard(2)], run_check=False, shape=(2, 9, 1001), stride=(9009, 1001, 1)
        )
        return accumloss.causal_lm_loss(logits, y, num_items_in_batch=11).to_local()

    mesh_of_all = mesh()
    for function in (causal, sums, placed):
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend=backend)):
            h, w = leaf(hidden), leaf(own(head))
            loss = call(h, w, c.labels)
            loss.backward()
            results.append((loss, h.grad, w.grad))
        for eager, traced in zip(*results, strict=True):
            assert_within(traced, eager, 1e3 * SUM * eager.abs().max(), f"{backend}, {function.__name__}")


@case
def compiled_without_a_break() -> None:
    compiled("aot_eager")


@case
def four_two_dimensions() -> None:
    """A mesh of data and tensor parallelism: rows over one, the vocabulary over the other; head and loss together as well."""
    m = init_device_mesh("cpu", (2, 2))
    c = sample(1001, torch.float32, "everything")
    kwargs = {**c.options.as_kwargs(), "weight": c.weight}
    whole = leaf(c.logits)
    want = accumloss.causal_lm_loss(whole, c.labels, **kwargs)
    want.backward()
    for rows in (Shard(0), Shard(1), Replicate()):
        for labels in (
            c.labels,
            distribute_tensor(c.labels, m, [Shard(0) if rows == Shard(0) else Replicate(), Replicate()]),
        ):
            x = leaf(distribute_tensor(c.logits, m, [rows, Shard(2)]))
            loss = accumloss.causal_lm_loss(x, labels, **kwargs)
            assert loss.placements == (Partial() if rows.is_shard() else Replicate(), Replicate())
            assert_close(loss.full_tensor(), want, SUM, "loss")
            loss.backward()
            assert_within(x.grad.full_tensor(), whole.grad, 1e2 * SUM * whole.grad.abs().max(), f"{rows}: gradient")
    with pytest.raises(
        ValueError, match=r"V sharded over one dimension of the mesh, got \(Shard\(dim=2\), Shard\(dim=2\)\)"
    ):
        accumloss.causal_lm_loss(distribute_tensor(c.logits, m, [Shard(2), Shard(2)]), c.labels)

    hidden, weight, _, labels = heads(1001, torch.float32, rows=(6, 12))
    num_items = int((labels[:, 1:] != -100).sum())
    exact_loss, exact = exact_head(hidden, weight, torch.zeros(1001), labels, num_items)
    for of_hidden in (Replicate(), Shard(1)):
        h = leaf(distribute_tensor(hidden, m, [Shard(0), of_hidden]))
        w = leaf(distribute_tensor(weight, m, [Replicate(), Shard(0)]))
        loss = accumloss.linear_causal_lm_loss(h, w, labels)
        assert_close(loss.full_tensor(), exact_loss, 10 * SUM, "loss")
        loss.backward()
        assert w.grad.placements == (Partial(), Shard(0))
        for grad, wanted in zip((h.grad, w.grad), exact, strict=False):
            assert relative(grad.full_tensor(), wanted) <= 20 * SUM, of_hidden


@case
def slow_compiled_by_inductor() -> None:
    compiled("inductor")


def main(out: Path, names: list[str]) -> None:
    """Each rank writes what its cases said, "" where nothing, and ends with the first that failed: the others may wait for it."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    found = {}
    for name in names:
        found[name] = ""
        try:
            CASES[name]()
        except BaseException:
            found[name] = traceback.format_exc(limit=-6)
            break
    out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(found))
    if not any(found.values()):
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
