"""FSDP2, and a head that never makes its logits: hidden states go to the loss, chunk by chunk.

`torchrun --nproc-per-node=2 fsdp2_fused_head.py [rows of a micro-batch]`
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import accumloss

ROWS, VOCAB = 16, 1000
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCAB, 32), nn.Linear(32, 64), nn.GELU())  # yours
        self.head = nn.Linear(64, VOCAB, bias=False)

    def forward(self, inputs, labels):  # the loss inside of forward: there FSDP has gathered the head's weight
        return accumloss.linear_cross_entropy(self.body(inputs), self.head.weight, labels, shift=1)


dist.init_process_group("gloo")  # yours: "nccl"
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = Model()
fully_shard(model.body)
fully_shard(model, reshard_after_forward=False)  # the head's weight stays until backward
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
accumulator = accumloss.Accumulator(model)

losses = []
for _ in range(6):
    tokens = (torch.randint(VOCAB, (ROWS, 1)) + torch.arange(17)) % VOCAB
    labels = tokens.masked_fill(torch.arange(17) >= torch.randint(2, 18, (ROWS, 1)).sort(dim=0).values, -100)
    tokens, labels = tokens.chunk(ranks)[rank], labels.chunk(ranks)[rank]  # yours: a DistributedSampler
    parts = list(zip(tokens.split(micro_batch), labels.split(micro_batch), strict=True))
    for i, (some_tokens, some_labels) in enumerate(parts):
        model.set_requires_gradient_sync(i + 1 == len(parts))  # gradients are reduced once a step
        accumulator.backward(model(some_tokens, some_labels))
    stats = accumulator.finish(max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(f"{stats.mean_loss:.4f}")
if rank == 0:
    print(accumloss.linear_plan(micro_batch * 17, 64, VOCAB, torch.float32))
    print("losses", *losses[::2])
dist.barrier()
dist.destroy_process_group()
