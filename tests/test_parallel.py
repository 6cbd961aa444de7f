"""A vocabulary in shards: the kernels and the merge in one process, against float64 and the whole kernel; and two and three ranks."""

import contextlib
import json
from pathlib import Path

import distributed_vocabulary
import pytest
import torch
from cases import DTYPES, Case, sample_cases, short_cases
from oracle import check_sums, expected
from shards import extreme_rows, merged, part, seven_outputs
from tolerances import OTHER_NEIGHBOUR, assert_same_but_for_neighbours, assert_within, row_loss_bound
from torchrun import torchrun

import accumloss
from accumloss import LossOptions, parallel

HERE = Path(__file__).resolve().parent

OTHER_SIZE = pytest.mark.slow("three shards are of two sizes and go everywhere; these are other cuts of the same cases")


def gradient(case, rows, labels, shards, factor, in_place=False):
    """The gradient (..., V), put together from those of the shards."""
    factor = torch.tensor(factor, dtype=rows.nll.dtype)
    arguments = (labels, rows.lse, rows.nll, case.weight)
    return torch.cat(
        [parallel.backward(factor, part(case.logits, s), *arguments, s, case.options, in_place) for s in shards], -1
    )


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("V, rows", [(1001, 512), (4096, 256), (32000, 64)])
def test_bits_are_those_of_the_whole_kernel(V, rows, size):
    """bf16 without options: but for a few in a million, where lse, summed up in other parts, lies beyond another rounding."""
    generator = torch.Generator().manual_seed(V)
    logits = (torch.randn(rows, V, generator=generator) * 3).bfloat16()
    case = Case("", logits, torch.randint(0, V, (rows,), generator=generator))
    whole = logits.clone().requires_grad_()
    (accumloss.cross_entropy(whole, case.labels).loss_sum / 11).backward()
    found, labels, shards = merged(case, size, metrics=False)
    grad = gradient(case, found, labels, shards, 1 / 11)
    assert_same_but_for_neighbours(grad, whole.grad, OTHER_NEIGHBOUR, f"V={V} in {size}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [pytest.param(2, marks=OTHER_SIZE), 3, pytest.param(7, marks=OTHER_SIZE)])
def test_shards_match_float64(dtype, size):
    """Every sample case, rows of fewer classes than shards and short rows among them: sums, metrics, lse, nll, gradient."""
    for case in (*sample_cases(dtype), *short_cases(dtype)):
        wanted = expected(case, grad_loss_sum=0.25)
        rows, labels, shards = merged(case, size)
        check_sums(seven_outputs(rows), case, wanted)
        for in_place in (False, True):
            found = gradient(case, rows, labels, shards, 0.25, in_place)
            assert_within(found, wanted.grad, wanted.grad_bound, f"{case.name}: gradient of {size} shards")


@pytest.mark.parametrize("rows, V, size", [(256, 4096, 2), (64, 32768, 8), (4, 32768, 2)])
def test_bits_are_the_same_where_shards_have_whole_blocks(rows, V, size):
    """bf16 without options, shards of a multiple of 1024 classes: lse to rounding in double, no entry of the gradient differs."""
    generator = torch.Generator().manual_seed(V + size)
    for scale in (1, 8):
        logits = (torch.randn(rows, V, generator=generator) * scale).bfloat16()
        case = Case("", logits, torch.randint(0, V, (rows,), generator=generator))
        whole = logits.clone().requires_grad_()
        (accumloss.cross_entropy(whole, case.labels).loss_sum / 11).backward()
        found, labels, shards = merged(case, size, metrics=False)
        lse = torch.ops.accumloss.cross_entropy(logits, case.labels)[3]
        assert_within(found.lse, lse, 8 * torch.finfo(torch.float64).eps * lse.abs(), "lse")
        assert torch.equal(gradient(case, found, labels, shards, 1 / 11), whole.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 20.0}, {"logit_scale": 0.5}], ids=str)
def test_extreme_rows_are_those_of_the_whole_kernel(dtype, options):
    """loss, nll and lse where logits are as large as there are, -inf, +inf or NaN, in one shard or in all but one; counts too."""
    bound = row_loss_bound(dtype, "cpu", 20.0)
    for V, size in ((700, 2), (2051, 3), (5, 3)):
        logits = extreme_rows(V, size, dtype)
        chunk = -(-V // size)
        for label in sorted({0, chunk, V - 1}):
            case = Case(
                f"V={V} in {size}, label {label}",
                logits,
                torch.full(logits.shape[:1], label),
                None,
                LossOptions(**options),
            )
            rows, *_ = merged(case, size)
            loss, nll, lse, entropy, _ = torch.ops.accumloss.token_statistics(
                logits, case.labels, metrics=True, **case.options.as_kwargs()
            )
            for name, found, wanted in (("loss", rows.loss, loss), ("nll", rows.nll, nll), ("lse", rows.lse, lse)):
                is_number = wanted.isfinite()
                assert torch.equal(found[~is_number].nan_to_num(), wanted[~is_number].nan_to_num()), (
                    f"{case.name}: {name}"
                )
                scale = wanted[is_number].double().abs().clamp(min=1) if name == "lse" else wanted[is_number].double()
                assert_within(found[is_number], wanted[is_number], 2 * bound * scale, f"{case.name}: {name}")
            if dtype != torch.float64:  # whose lowest numbers have differences beyond it
                assert torch.equal(rows.entropy.isnan(), entropy.isnan()), case.name
                assert_within(rows.entropy.nan_to_num(), entropy.nan_to_num(), 20 * bound, f"{case.name}: entropy")
            assert (
                rows.sums[3]
                == torch.ops.accumloss.cross_entropy(logits, case.labels, metrics=True, **case.options.as_kwargs())[4]
            )


# Ranks ----------------------------------------------------------------------------------------------------------------

FAST_CASES = [name for name in distributed_vocabulary.CASES if not name.startswith(("slow_", "four_"))]


def launch(folder: Path, ranks: int, names: list[str]) -> list[dict[str, str]]:
    """What each rank said of each case, "" where nothing was wrong: one torchrun for all of them."""
    out = folder / "found"
    with contextlib.suppress(AssertionError):  # of the launch: the ranks have written why
        torchrun(HERE / "distributed_vocabulary.py", out, *names, ranks=ranks)
    files = [out.with_suffix(f".{rank}") for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def check(found: list[dict[str, str]], name: str) -> None:
    for rank, of_rank in enumerate(found):
        said = of_rank.get(name, "not run: an earlier case failed, or the process ended")
        assert not said, f"rank {rank}: {said}"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two_ranks"), 2, FAST_CASES)


@pytest.mark.parametrize("name", FAST_CASES)
def test_two_ranks(two_ranks, name):
    check(two_ranks, name)


@pytest.mark.slow("two ranks run the same cases; three have shards of two sizes, and one without a class")
@pytest.mark.xdist_group("torchrun")
def test_three_ranks(tmp_path):
    found = launch(tmp_path, 3, FAST_CASES)
    for name in FAST_CASES:
        check(found, name)


@pytest.mark.slow(
    "the fast tier compiles by aot_eager, inductor takes a minute; and a mesh of two dimensions takes four ranks"
)
@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("name, ranks", [("slow_compiled_by_inductor", 2), ("four_two_dimensions", 4)])
def test_other_ranks(tmp_path, name, ranks):
    check(launch(tmp_path, ranks, [name]), name)
