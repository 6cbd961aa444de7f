"""Distils a teacher into a smaller student. `python distillation.py [rows of a micro-batch]`

The divergence of both distributions is computed from the logits as they are: no log_softmax of either is ever made.
"""

import sys

import torch
from torch import nn

import accumloss

ROWS, VOCAB = 16, 200
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2


def language_model(size):
    """Yours: AutoModelForCausalLM.from_pretrained(...), and .logits of what it returns."""
    return nn.Sequential(nn.Embedding(VOCAB, size), nn.Linear(size, size), nn.GELU(), nn.Linear(size, VOCAB))


torch.manual_seed(0)
teacher, student = language_model(64).requires_grad_(False), language_model(16)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
accumulator = accumloss.Accumulator(student)

losses = []
for _ in range(10):
    tokens, lengths = torch.randint(VOCAB, (ROWS, 16)), torch.randint(1, 17, (ROWS, 1))
    labels = tokens.masked_fill(torch.arange(16) >= lengths, -100)  # only say which positions count
    for some_tokens, some_labels in zip(tokens.split(micro_batch), labels.split(micro_batch), strict=True):
        with torch.no_grad():
            teacher_logits = teacher(some_tokens)
        accumulator.backward(
            accumloss.distillation(student(some_tokens), teacher_logits, some_labels, temperature=2.0, beta=0.5)
        )
    stats = accumulator.finish()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(f"{stats.mean_loss:.4e}")
print("losses", *losses[::3])
