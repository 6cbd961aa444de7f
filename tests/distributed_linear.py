"""Run by torchrun: two ranks (gloo) train a tiny Llama with fused_linear=True, under DDP and FSDP2; rank 0 writes the errors."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torchrun import leave

import accumloss
from accumloss import linear

VOCAB = 97


def model():
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (6, 12), generator=generator)
    labels = ids.clone()
    labels[torch.rand(6, 12, generator=generator) < 0.3] = -100
    return ids, labels


def gradients(parallel, ids, labels, num_items):
    parallel(input_ids=ids, labels=labels, num_items_in_batch=num_items).loss.backward()
    found = {}
    for name, parameter in parallel.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def error(got, want):
    squares = sum((got[n].double() - want[n].double()).square().sum() for n in want)
    return float((squares / sum(w.double().square().sum() for w in want.values())).sqrt())


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids, labels = batch()
    num_items = int((labels[:, 1:] != -100).sum())
    whole = model()
    want = {n: g.clone() for n, g in gradients(whole, ids, labels, num_items).items()}
    mine = slice(0, 2) if rank == 0 else slice(2, 6)
    found = {}
    runs: list[int] = []
    run = linear.compute.run
    linear.compute.run = lambda *args, **kwargs: (runs.append(1), run(*args, **kwargs))[1]
    accumloss.register_with_transformers(fused_linear=True)

    def sharded(reshard=True, head=False):
        parallel = model()
        for layer in parallel.model.layers:
            fully_shard(layer)
        if head:
            fully_shard(parallel.lm_head)
        return fully_shard(parallel, reshard_after_forward=reshard)

    engines = {
        "ddp": lambda: DistributedDataParallel(copy.deepcopy(whole.requires_grad_())),
        "ddp, unused": lambda: DistributedDataParallel(model(), find_unused_parameters=True),
        "fsdp2": sharded,
        "fsdp2, head apart": lambda: sharded(head=True),
    }
    for name, make in engines.items():
        parallel = make()
        for parameter in parallel.parameters():
            parameter.grad = None
        runs.clear()
        got = gradients(parallel, ids[mine], labels[mine], num_items / dist.get_world_size())  # both average over ranks
        found[name] = {"error": error(got, want), "fused": len(runs)}
        if name == "fsdp2":
            outputs = parallel(input_ids=ids, labels=labels)
            try:
                outputs.logits.sum()
            except RuntimeError as refused:
                found["read late"] = str(refused)
    parallel = sharded()
    try:
        accumloss.linear_cross_entropy(torch.zeros(2, 16), parallel.lm_head.weight, torch.tensor([1, 2]))
    except RuntimeError as refused:
        found["refused"] = str(refused)
    if rank == 0:
        out.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
