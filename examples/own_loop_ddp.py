"""The same on several processes, whose shares of a step are uneven.

`torchrun --nproc-per-node=2 own_loop_ddp.py [rows of a micro-batch]`
"""

import contextlib
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import accumloss

ROWS = 16  # of an optimizer step, of all processes together
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2

dist.init_process_group("gloo")  # yours: "nccl", and the model on this process's GPU
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 100))
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accumulator = accumloss.Accumulator(model)  # sees that DistributedDataParallel averages


def make_batch():
    """The rows of this process: rank 0 has the short ones. Yours: a DataLoader with a DistributedSampler."""
    starts, lengths = torch.randint(100, (ROWS, 1)), torch.randint(2, 18, (ROWS, 1)).sort(dim=0).values
    steps = torch.arange(17)
    tokens = (starts + steps) % 100
    labels = tokens.masked_fill(steps >= lengths, -100)
    return tokens.chunk(ranks)[rank], labels.chunk(ranks)[rank]


losses = []
for _ in range(10):
    inputs, labels = make_batch()
    parts = list(zip(inputs.split(micro_batch), labels.split(micro_batch), strict=True))
    for i, (some_inputs, some_labels) in enumerate(parts):
        is_last = i + 1 == len(parts)
        with contextlib.nullcontext() if is_last else model.no_sync():  # gradients are reduced once a step
            accumulator.backward(accumloss.cross_entropy(model(some_inputs), some_labels, shift=1))
    stats = accumulator.finish(max_norm=1.0)  # on every process, also on one without a label
    optimizer.step()
    optimizer.zero_grad()
    losses.append(f"{stats.mean_loss:.4f}")  # of all processes
if rank == 0:
    print("losses", *losses[::3])
dist.barrier()
dist.destroy_process_group()
