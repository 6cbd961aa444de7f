"""Accumulator on meshes: expert, tensor, pipeline and context parallelism, products of two of them."""

import json
from pathlib import Path

import pytest
import torch
from tolerances import ACCUMULATED_GRADIENT, SUM
from torchrun import torchrun
from windows import KEPT

HERE = Path(__file__).resolve().parent
EXACT = ACCUMULATED_GRADIENT[torch.float32]
ITEMS = sum(KEPT) - len(KEPT)


def found_by(ranks, folder):
    torchrun(HERE / "distributed_meshes.py", folder, ranks=ranks)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two ranks found: case -> figures. One torchrun for all of the cases."""
    return found_by(2, tmp_path_factory.mktemp("meshes"))


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    return found_by(4, tmp_path_factory.mktemp("meshes"))


def assert_exact(of_ranks, case):
    for found in of_ranks:
        assert found[case].get("failed") is None
        assert found[case]["error"] <= EXACT
        assert found[case]["loss error"] <= SUM
        assert found[case]["num_items"] == ITEMS


EXACT_ON_TWO = (
    "experts_on_a_mesh_of_their_own",
    "experts_of_a_known_total",
    "tensor_parallel_alone",
    "pipeline",
    "context_parallel",
)


@pytest.mark.parametrize("case", EXACT_ON_TWO)
def test_step_of_the_one_batch(of_two, case):
    assert_exact(of_two, case)


@pytest.mark.slow("four processes; the fast tier has one mesh at a time")
@pytest.mark.parametrize("case", ["fsdp_of_tensor_parallel_on_four", "hsdp_on_four"])
def test_products_of_two_meshes(of_four, case):
    assert_exact(of_four, case)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("experts_clipped_by_one_norm", "expected max_norm=None where units of FSDP lie on meshes of different sizes"),
        (
            "experts_rescaled_by_the_caller",
            "expected rescale=True where units of FSDP lie on meshes of different sizes",
        ),
        ("experts_that_fsdp_ignores", 'give gradient_reduction="sum"'),
        ("experts_that_ddp_ignores", "DistributedDataParallel leaves mixture.experts.0.bias"),
        ("tensor_parallel_without_a_group", 'give the ranks whose micro-batches differ: mesh["dp"].get_group()'),
        ("a_divisor_of_somebody_elses_backward", "use loss()"),
    ],
)
def test_misuse_is_refused(of_two, case, message):
    for found in of_two:
        assert message in found[case]["raised"]


@pytest.mark.slow("four processes")
def test_a_group_of_too_many_is_refused(of_four):
    for found in of_four:
        raised = found["fsdp_with_the_group_of_all_on_four"]["raised"]
        assert "expected a process_group of the 2 ranks over which the gradients are averaged, got one of 4" in raised


@pytest.mark.parametrize("case", ["ddp_of_a_static_graph_looked_at", "fsdp1_looked_at", "fsdp2_looked_at"])
def test_engines_sleep_while_a_loss_is_looked_at(of_two, case):
    for found in of_two:
        assert found[case].get("failed") is None
        assert found[case]["error"] <= EXACT
