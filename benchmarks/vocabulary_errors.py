"""A vocabulary in shards: errors of loss and gradient against float64, for each option, beside the whole kernel's.

    python benchmarks/vocabulary_errors.py [--rows 64] [--vocab 32000]

In one process: the shards are computed one after the other and merged as several processes merge them. Prints a table: the
relative error of the loss in fp32 and of the whole gradient in fp32 and bf16, of the whole kernel / two shards / three; and
the entries of a million that differ from the whole kernel's in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import accumloss
from accumloss import LossOptions, parallel, reference

OPTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "z_loss 1e-3": {"z_loss": 1e-3},
    "softcap 20": {"softcap": 20.0},
    "logit_scale 0.5": {"logit_scale": 0.5},
    "weight": {"weight": True},
    "all of them": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 1.5, "weight": True},
}


def in_shards(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, options: LossOptions, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses, and its gradient, of a vocabulary cut into so many shards."""
    V = logits.shape[-1]
    chunk = -(-V // size)
    shards = [parallel.Shard(None, size, chunk, at, min(chunk, V - at), V) for at in range(0, V, chunk)]
    parts = [logits[:, s.class_offset : s.class_offset + s.num_classes].contiguous() for s in shards]
    columns = [
        parallel.columns_of(part, labels, weight, s, options, False) for part, s in zip(parts, shards, strict=True)
    ]
    rows = parallel.merge(torch.stack(columns), labels, weight, shards[0], options, False, torch.float32)
    one = torch.ones(())
    grads = [
        parallel.backward(one, part, labels, rows.lse, rows.nll, weight, s, options)
        for part, s in zip(parts, shards, strict=True)
    ]
    return rows.sums[0], torch.cat(grads, -1)


def line(name: str, rows: int, vocab: int) -> str:
    given = dict(OPTIONS[name])
    weight = torch.rand(vocab, generator=torch.Generator().manual_seed(3)) + 0.5 if given.pop("weight", False) else None
    options, cells = LossOptions(**given), []  # type: ignore[arg-type]
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
        exact_logits = logits.double().requires_grad_()
        exact = reference.cross_entropy(exact_logits, labels, weight, options)[0]
        exact.backward()
        assert exact_logits.grad is not None
        whole = logits.clone().requires_grad_()
        loss_sum = accumloss.cross_entropy(whole, labels, weight=weight, **given).loss_sum
        loss_sum.backward()
        assert whole.grad is not None
        found = [(loss_sum, whole.grad), *(in_shards(logits, labels, weight, options, size) for size in (2, 3))]
        losses = [abs(loss.double().item() / exact.item() - 1) for loss, _ in found]
        scale = exact_logits.grad.norm()
        gradients = [((grad.double() - exact_logits.grad).norm() / scale).item() for _, grad in found]
        if dtype == torch.float32:
            cells.append(" / ".join(f"{value:.0e}" for value in losses))
        cells.append(" / ".join(f"{value:.1e}" for value in gradients))
        if dtype == torch.bfloat16:
            differ = [(grad != whole.grad).sum().item() / grad.numel() * 1e6 for _, grad in found[1:]]
            cells.append(" / ".join(f"{value:.0f}" for value in differ))
    return f"| {name} | " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=32000)
    options = parser.parse_args(arguments)
    print("| options | loss, fp32 | gradient, fp32 | gradient, bf16 | others, of a million |")
    print("|---|---|---|---|---:|")
    for name in OPTIONS:
        print(line(name, options.rows, options.vocab))


if __name__ == "__main__":
    main()
