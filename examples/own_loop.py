"""Trains a small language model in a plain PyTorch loop. `python own_loop.py [rows of a micro-batch]`

The micro-batches have between 1 and 16 labels a row; whatever their size, the losses are the same.
"""

import sys

import torch
from torch import nn

import accumloss

ROWS = 16  # of an optimizer step
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 100))  # yours
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accumulator = accumloss.Accumulator(model)


def make_batch():
    """Tokens that count upwards, and labels that end somewhere in each row. Yours: a DataLoader."""
    starts, lengths = torch.randint(100, (ROWS, 1)), torch.randint(2, 18, (ROWS, 1))
    steps = torch.arange(17)
    tokens = (starts + steps) % 100
    return tokens, tokens.masked_fill(steps >= lengths, -100)


losses = []
for _ in range(20):
    inputs, labels = make_batch()
    for some_inputs, some_labels in zip(inputs.split(micro_batch), labels.split(micro_batch), strict=True):
        sums = accumloss.cross_entropy(model(some_inputs), some_labels, shift=1, metrics=True)
        accumulator.backward(sums)  # the sum of the losses; nothing is divided yet
    stats = accumulator.finish(max_norm=1.0)  # divides by the items of the whole step, and clips
    optimizer.step()
    optimizer.zero_grad()
    losses.append(f"{stats.mean_loss:.4f}")
print(f"accuracy {stats.accuracy:.1%} over {stats.num_items} tokens, perplexity {stats.perplexity:.2f}")
print("losses", *losses[::5], losses[-1])
