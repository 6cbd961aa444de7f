"""A tiny language model in plain PyTorch, a window of very uneven rows, and the gradient of the one batch that holds them all."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

VOCAB, LENGTH = 32, 12
KEPT = (2, 12, 3, 11, 2, 4, 12, 1)  # labels of each row, the first of which is no target


class TinyLM(nn.Module):
    """(B, T) tokens -> (B, T, V) logits."""

    def __init__(self, sparse: bool = False, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCAB, 16, sparse=sparse)
            self.hidden = nn.Linear(16, 16)
            self.head = nn.Linear(16, VOCAB)
        with torch.no_grad():
            self.head.weight *= 8  # so that rows are easy and hard, and a gradient is longer than 1

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(inputs))))


def window(seed: int = 0, kept: tuple[int, ...] = KEPT) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (8, T); labels that are not shifted yet."""
    inputs = torch.randint(VOCAB, (len(kept), LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = inputs.clone()
    for row, count in zip(labels, kept, strict=True):
        row[count:] = -100
    return inputs, labels


def split(inputs: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


def targets(labels: torch.Tensor) -> torch.Tensor:
    """Labels, shifted."""
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def loss_sum(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses and number of items, in plain PyTorch."""
    wanted = targets(labels).flatten()
    return F.cross_entropy(model(inputs).flatten(0, 1), wanted, reduction="sum"), (wanted != -100).sum()


def one_batch(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss of the one batch, in float64."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets(labels).flatten())
    loss.backward()
    return gradients(model), loss.item()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies, without the prefixes of wrappers, whole where they are sharded; dense."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            found[name.removeprefix("module.")] = grad.detach().to_dense().clone()
    return found


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(t.double().pow(2).sum().item() for t in tensors.values()))


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Relative error of the whole."""
    assert found.keys() == wanted.keys()
    return norm({name: found[name].double() - wanted[name].double() for name in wanted}) / norm(wanted)
