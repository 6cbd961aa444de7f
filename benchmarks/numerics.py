"""Prints the worst error against float64 of each dtype and each way to the gradient, beside what is promised.

    python benchmarks/numerics.py [--device cuda]

Random logits of several spreads, confident rows down to a loss of 1e-26, odd and long rows; plain cross-entropy. The
table of docs/numerics.md is what this prints.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import record
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cases import Case
from oracle import expected, token_expected
from tolerances import UNIT, UNIT64, ulp

import accumloss
from accumloss import fallback, reference

ops = torch.ops.accumloss


def rows(dtype: torch.dtype) -> list[Case]:
    """Some million logits: spreads of 1, 4 and 12, and rows whose label leads by 2 to 60."""
    cases = []
    for V, N in ((9, 4096), (1000, 256), (32003, 24), (128256, 8)):
        for spread in (1.0, 4.0, 12.0):
            generator = torch.Generator().manual_seed(V)
            logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * spread
            labels = torch.randint(0, V, (N,), generator=generator)
            confident = torch.arange(N) % 2 == 0
            lead = torch.linspace(2, 60, N, dtype=torch.float64)
            at = torch.arange(N)
            best = logits.max(-1).values
            logits[at, labels] = torch.where(confident, best + lead, logits[at, labels])
            cases.append(Case(f"V={V}, spread {spread}", logits.to(dtype), labels))
    return cases


def gradients(case: Case):
    acc = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    one = torch.ones((), dtype=acc, device=case.logits.device)
    outputs = ops.cross_entropy(case.logits, case.labels)
    yield "backward", ops.cross_entropy_backward(one, case.logits, case.labels, outputs[3], outputs[6])
    yield "in forward", ops.cross_entropy_with_grad(one, case.logits, case.labels)[-1]


def worst(dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest error of each kind over rows(dtype)."""
    found: dict[str, float] = {}

    def note(what: str, value: float) -> None:
        found[what] = max(found.get(what, 0.0), value)

    for case in rows(dtype):
        wanted = expected(case, device)
        on_device = case.to(device)
        outputs = ops.cross_entropy(on_device.logits, on_device.labels)
        nll = wanted.sums[6].detach()
        representable = nll >= torch.finfo(outputs[6].dtype).tiny
        error = (outputs[6].double().cpu() - nll).abs() / nll
        note("row loss", error[representable].max().item())
        total = wanted.sums[0].item()
        note("sum", abs(outputs[0].item() - total) / total)
        z = case.logits.double()
        distance = (z - wanted.sums[3].detach().unsqueeze(-1)).abs()
        label = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, case.labels.unsqueeze(-1), True)
        for way, grad in gradients(on_device):
            actual, g = grad.double().cpu(), wanted.grad
            # what is subnormal in fp32 is written as zero
            counts = g.abs() >= torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).tiny
            error = (actual - g).abs()
            if dtype in (torch.bfloat16, torch.float16):
                note(f"ulp, {way}", (error / ulp(g, dtype))[counts].max().item())
                note(f"ulp of the label's entry, {way}", (error / ulp(g, dtype))[label & counts].max().item())
                nearest = actual == g.to(dtype).double()
                note(f"not the nearest number, {way}", 1 - nearest[counts].double().mean().item())
            else:
                unit = UNIT64 if dtype == torch.float64 else UNIT
                units = error / g.abs() / ((4 + distance) * unit)
                note(f"relative, {way}", (error / g.abs())[counts].max().item())
                note(f"relative, the label's entry, {way}", (error / g.abs())[label & counts].max().item())
                note(f"of (4 + distance from lse) units, {way}", units[counts].max().item())
    return found


def worst_of_tokens(dtype: torch.dtype) -> dict[str, float]:
    """The same of what is told of each token, over rows(dtype); entropies and divergences against 1 and their own size."""
    found: dict[str, float] = {}

    def note(what: str, error: torch.Tensor, size: torch.Tensor) -> None:
        counts = size >= torch.finfo(torch.float32).tiny
        found[what] = max(found.get(what, 0.0), (error.abs() / size)[counts].max().item())

    for case in rows(dtype):
        wanted = token_expected(case)
        leaf = case.logits.detach().requires_grad_()
        _, nll, lse, entropy, _ = ops.token_statistics(leaf, case.labels, metrics=True)
        leads = wanted.nll < 0.5
        note("log-probability", nll.double() - wanted.nll, wanted.nll)
        note("lse, of 1 + itself", lse - wanted.lse, 1 + wanted.lse.abs())
        note("entropy where the label leads", (entropy.double() - wanted.entropy)[leads], wanted.entropy[leads])
        note(
            "entropy elsewhere, of 1 + itself", (entropy.double() - wanted.entropy)[~leads], 1 + wanted.entropy[~leads]
        )
        teacher = case.logits.roll(1, 0)
        mask = torch.zeros_like(case.labels)
        for beta in (0.0, 0.5, 1.0):
            exact = reference.distillation(case.logits, teacher, mask, beta=beta)
            loss = ops.distillation(case.logits, teacher, mask, beta=beta)[0].double()
            note(f"divergence, beta {beta:g}, of 1 + itself", loss - exact, 1 + exact)
        soft = (
            torch.nn.functional.one_hot(case.labels, case.logits.shape[-1]).to(dtype) * 0.875
            + 0.125 / case.logits.shape[-1]
        )
        exact = reference.soft_cross_entropy(case.logits, soft)
        note("loss of class probabilities", ops.soft_cross_entropy(case.logits, soft)[0].double() - exact, exact)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fallback", action="store_true", help="of plain PyTorch in the place of the CPU's kernels")
    given = parser.parse_args()
    device = given.device
    if given.fallback and device != "cpu":
        parser.error("--fallback: expected the CPU, whose kernels are passed over")
    record.refuse_fallback(device)
    library = torch.library.Library("accumloss", "IMPL")
    if given.fallback:
        warnings.simplefilter("ignore", accumloss.FallbackWarning)
        fallback.pass_over(library, "CPU", lambda device: True)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    show({name: worst(dtype, device) for name, dtype in names.items()})
    if device == "cpu":
        print()
        show({name: worst_of_tokens(dtype) for name, dtype in names.items()})


def show(found: dict[str, dict[str, float]]) -> None:
    print("| worst error against float64 | " + " | ".join(found) + " |")
    print("|---|" + "---:|" * len(found))
    for what in dict.fromkeys(what for errors in found.values() for what in errors):
        cells = (f"{errors[what]:.2g}" if what in errors else "" for errors in found.values())
        print(f"| {what} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
