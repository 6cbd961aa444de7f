"""What head and loss together can reach on an H200 by the plans of accumloss.linear_plan, before a GPU says it.

``make cuda-report`` prints it into docs/internals/cuda-model.md. A model, as cost_model.py is one of the loss kernels: three
products at a published rate, and what a plan adds to them. It leaves out tiles that are not full, and what the clocks of
a busy GPU do to both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cost_model
import torch
from cost_model import NOMINAL, PESSIMISTIC, Parameters

from accumloss import LinearPlan, linear_plan

GPU = "H200"
# bf16, of products with H = 4096 and V = 65536 to 262144: linkedin/Liger-Kernel pull request #1422 has 788 to 791 TFLOP/s
# for the forward of a head.
PRODUCTS = 790e12
SHAPES = (  # rows, H, V
    (8192, 4096, 128256), (4096, 2048, 50257), (16384, 4096, 151936), (4096, 4096, 128256), (32768, 2560, 262144),
    (2048, 768, 50257),
)  # fmt: skip
# Launches, as test_head_model.py counts them: of a chunk, and of the call around the chunks.
OF_A_CHUNK, OF_A_CALL = 5, 18
GATHERED_OF_A_CHUNK, GATHERED_OF_A_CALL = 3, 14  # more, where ignored rows are left out


class Assumed(NamedTuple):
    """What is assumed of a call beside the products."""

    parameters: Parameters
    exposed: float  # of the bytes that a product moves for the sums of the weight's gradient: not hidden behind it
    launch: float  # seconds from one small kernel to the next


LIKELY = Assumed(NOMINAL, 0.5, 2e-6)
WORST = Assumed(PESSIMISTIC, 1.0, 4e-6)


class Times(NamedTuple):
    """Seconds."""

    products: float
    loss: float
    weight: float  # of the sums over the chunks, and their rounding
    rows: float  # that are gathered
    launches: float

    @property
    def over_products(self) -> float:
        return sum(self) / self.products


def sum_bytes(plan: LinearPlan, elements: int) -> tuple[int, int]:
    """What is moved for the weight's gradient of so many elements, beyond the one write of it in bf16 that is a product's:
    inside of the products, and by kernels of their own."""
    chunks = plan.num_chunks
    if plan.accumulator == torch.bfloat16:
        return 4 * elements * (chunks - 1), 0
    if plan.product == torch.float32:
        return elements * (4 * chunks + 4 * (chunks - 1) - 2), 6 * elements  # rounded in the end
    return 2 * elements * (chunks - 1), elements * (2 * chunks + 4 * chunks + 4 * (chunks - 1) + 6)


def times(plan: LinearPlan, counted: int, rows: int, H: int, V: int, share: float, assumed: Assumed = LIKELY) -> Times:
    """Of one call, forward and backward, in bf16.

    Args:
        plan: of the rows that count.
        counted: rows that count, of all.
        share: of the copy's bandwidth that the kernel of the loss reaches, which reads and writes each logit once.
    """
    copy = assumed.parameters.copy * cost_model.CHIPS[GPU].gigabytes * 1e9
    inside, beside = sum_bytes(plan, H * V)
    launches = OF_A_CALL + OF_A_CHUNK * plan.num_chunks
    gathered = 0
    if counted < rows:
        launches += GATHERED_OF_A_CALL + GATHERED_OF_A_CHUNK * plan.num_chunks
        gathered = (2 + 2 + 2 + 2) * counted * H + 2 * rows * H  # both copies, and the zeros of the others' gradient
    return Times(
        products=6 * counted * H * V / PRODUCTS,
        loss=4 * counted * V / copy / share,
        weight=(assumed.exposed * inside + beside) / copy,
        rows=gathered / copy,
        launches=launches * assumed.launch,
    )


def of_call(rows: int, H: int, V: int, share: float, assumed: Assumed = LIKELY, counted: int | None = None) -> Times:
    """times() by the plan for the GPU."""
    count = rows if counted is None else counted
    plan = linear_plan(count, H, V, gathered=count < rows, device=GPU)
    return times(plan, count, rows, H, V, share, assumed)


def over_none(rows: int, H: int, V: int, share: float, assumed: Assumed = LIKELY) -> float:
    """The time with 50 % of the labels ignored, over that with none."""
    half = sum(of_call(rows, H, V, share, assumed, counted=rows // 2))
    return half / sum(of_call(rows, H, V, share, assumed))


def report(share_of: Callable[[int, Parameters], float]) -> list[str]:
    """The model's table in Markdown.

    Args:
        share_of: (V, parameters) -> the share of the copy's bandwidth that the loss reaches by the model of its kernels.
    """
    lines = [
        "| rows, H, V | plan for the CPU | plan | chunk + sums, MiB | products, ms | loss | weight's sums | launches | over the "
        "products | 50 % ignored over none |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for rows, H, V in SHAPES:
        before, plan = linear_plan(rows, H, V), linear_plan(rows, H, V, device=GPU)
        parts = [of_call(rows, H, V, share_of(V, assumed.parameters), assumed) for assumed in (LIKELY, WORST)]
        likely = parts[0]
        shares = [f"{value / likely.products:.1%}" for value in (likely.loss, likely.weight, likely.launches)]
        halves = [over_none(rows, H, V, share_of(V, assumed.parameters), assumed) for assumed in (LIKELY, WORST)]
        cells = [
            f"{rows}, {H}, {V}",
            f"{before.num_chunks} × {before.chunk_rows}{', parked' if before.parked_rows else ''}",
            f"{plan.num_chunks} × {plan.chunk_rows}, {'fp32' if plan.accumulator == torch.float32 else 'bf16'}",
            f"{plan.scratch_bytes / 2**20:.0f}",
            f"{1e3 * likely.products:.1f}",
            *shares,
            " / ".join(f"{each.over_products:.3f}" for each in parts),
            " / ".join(f"{half:.2f}" for half in halves),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
