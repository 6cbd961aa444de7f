"""A vocabulary that two processes share: the loss and its gradient by accumloss, and the other ways.

    python benchmarks/bench_vocabulary.py [--ranks 2] [--rows 1024] [--rounds 7] [--step] [--out FOLDER]

Starts its processes itself (gloo, one thread each). Each has the bf16 logits (rows, V / ranks) that a column-parallel head
made. Forward and backward together, from those logits to their gradient; the ways take turns within a round, medians over the
rounds. CPU time is of one process, communication included; gloo on one machine copies memory, where a network would be slower.
`bytes` is what one process hands to collectives, in forward and backward. Peak memory is above the local logits, in a pass of
its own. Every way's loss and gradient are held against float64. Writes vocabulary_cpu.csv and .json, and prints a table.

With --step: forward and backward of a small Llama in fp32 under transformers' tensor parallelism, whose plan gathers the
logits or, by vocabulary_parallel_plan(), does not; time, and peak memory above weights and gradients of one process. Writes
vocabulary_step_cpu.csv and .json.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import devices
import record
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import Head
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode

import accumloss

NAME, STEP_NAME = "vocabulary_cpu", "vocabulary_step_cpu"
VOCABULARIES = (32000, 128256)
FIELDS = (
    "ranks", "rows", "vocab", "way", "rounds", "ms_median", "cpu_ms_median", "collectives", "bytes", "peak_extra_bytes",
    "loss_error", "gradient_error",
)  # fmt: skip
STEP_FIELDS = (
    "ranks", "rows", "vocab", "hidden_size", "layers", "way", "rounds", "ms_median", "bytes", "peak_extra_bytes", "loss",
)  # fmt: skip
COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
Way = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]  # (local logits, labels, items) -> loss


class Gathered(torch.autograd.Function):
    """The logits of all processes, one after the other along V, as a column-parallel head with gathered output has them."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        ctx.width = local.shape[-1]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.narrow(-1, dist.get_rank() * ctx.width, ctx.width).contiguous()


class ThreeReduces(torch.autograd.Function):
    """The way of Megatron-LM's vocab_parallel_cross_entropy: an fp32 copy, and all_reduces of maximum, label's logit and sum."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = local.float()
        largest = logits.amax(-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        logits.sub_(largest.unsqueeze(-1))
        begin = dist.get_rank() * local.shape[-1]
        elsewhere = (labels < begin) | (labels >= begin + local.shape[-1])
        mine = (labels - begin).masked_fill_(elsewhere, 0)
        target = logits.gather(-1, mine.unsqueeze(-1)).squeeze(-1).masked_fill_(elsewhere, 0.0)
        dist.all_reduce(target)
        exps = logits.exp_()
        total = exps.sum(-1)
        dist.all_reduce(total)
        exps.div_(total.unsqueeze(-1))
        ctx.dtype = local.dtype
        ctx.save_for_backward(exps, elsewhere, mine)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        exps, elsewhere, mine = ctx.saved_tensors
        rows = torch.arange(exps.shape[0])
        exps[rows, mine] -= 1.0 - elsewhere.float()
        return exps.mul_(grad.unsqueeze(-1)).to(ctx.dtype), None


def ways() -> dict[str, Way]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group = dist.group.WORLD

    def by_loss_parallel(local: torch.Tensor, labels: torch.Tensor, items: int) -> torch.Tensor:
        logits = DTensor.from_local(local, mesh, [Shard(1)], run_check=False)
        return F.cross_entropy(logits.float(), labels, reduction="sum").full_tensor() / items

    def ours(inplace: Any) -> Way:
        return lambda local, labels, items: accumloss.masked_lm_loss(
            local, labels, num_items_in_batch=items, group=group, inplace=inplace
        )

    return {
        "accumloss, group=": ours(False),
        "accumloss, in place": ours("forward"),
        "gathered, accumloss": lambda local, labels, items: accumloss.masked_lm_loss(
            Gathered.apply(local), labels, num_items_in_batch=items
        ),
        "gathered, torch": lambda local, labels, items: (
            F.cross_entropy(Gathered.apply(local).float(), labels, reduction="sum") / items
        ),
        "torch's loss_parallel": by_loss_parallel,
        "three all_reduces": lambda local, labels, items: ThreeReduces.apply(local, labels).sum() / items,
    }


class Communication(TorchDispatchMode):
    """Collectives, and the bytes of what is handed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it is made of comes by
        if func.namespace in COLLECTIVES and "wait" not in func.name():
            self.calls += 1
            # of those that write elsewhere the outputs come first
            has_outputs = "allgather" in func.name()
            given = args[1] if has_outputs else args[0]
            tensors = given if isinstance(given, (list, tuple)) else [given]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


class Problem:
    """The logits of this process, and what comes out of them in float64."""

    def __init__(self, rows: int, vocab: int) -> None:
        self.rows, self.vocab = rows, vocab
        size, rank = dist.get_world_size(), dist.get_rank()
        width = vocab // size
        parts = [self._part(index, rows, width) for index in range(size)]
        self.source = parts[rank]
        self.labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(99))
        step = max(1, 2**22 // vocab)
        losses, grads = [], []
        for begin in range(0, rows, step):
            z = torch.cat([part[begin : begin + step] for part in parts], -1).double()
            lse = z.logsumexp(-1)
            y = self.labels[begin : begin + step]
            losses.append(lse - z.gather(-1, y[:, None])[:, 0])
            p = torch.exp(z - lse[:, None]).scatter_add_(-1, y[:, None], -torch.ones(len(y), 1, dtype=torch.float64))
            grads.append((p[:, rank * width : (rank + 1) * width] / rows).float())
        self.loss = torch.cat(losses).sum().item() / rows
        self.grad = torch.cat(grads)
        self.local = self.source.clone()
        self.anchor = torch.zeros((), requires_grad=True)

    @staticmethod
    def _part(index: int, rows: int, width: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        return (torch.randn(rows, width, generator=generator) * 2).bfloat16()

    def run(self, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
        received: list[torch.Tensor] = []
        loss = way(Head.apply(self.anchor, self.local, received), self.labels, self.rows)
        loss.backward()
        return loss.detach(), received[0]

    def refresh(self) -> None:
        self.local.copy_(self.source)


def measure(problem: Problem, rounds: int) -> list[dict[str, object]]:
    device, lines, times = devices.Cpu(), [], {}
    candidates = ways()
    for name, way in candidates.items():
        with loss_parallel():
            problem.refresh()
            with Communication() as communication:
                loss, grad = problem.run(way)
            difference = torch.linalg.vector_norm(grad.float() - problem.grad) / torch.linalg.vector_norm(problem.grad)
            del grad
            problem.refresh()
            dist.barrier()
            peak = device.peak_bytes(lambda way=way: problem.run(way))
        lines.append({
            "ranks": dist.get_world_size(), "rows": problem.rows, "vocab": problem.vocab, "way": name, "rounds": rounds,
            "collectives": communication.calls, "bytes": communication.bytes, "peak_extra_bytes": peak,
            "loss_error": abs(loss.item() / problem.loss - 1), "gradient_error": difference.item(),
        })  # fmt: skip
        times[name] = ([], [])
    order = random.Random(0)
    for turn in range(rounds + 1):
        names = list(candidates)
        order.shuffle(names)
        for name in names:
            problem.refresh()
            dist.barrier()
            cpu, start = time.process_time(), time.perf_counter()
            with loss_parallel():
                problem.run(candidates[name])
            dist.barrier()
            if turn > 0:  # the first warms up
                times[name][0].append((time.perf_counter() - start) * 1e3)
                times[name][1].append((time.process_time() - cpu) * 1e3)
    for line in lines:
        wall, cpu = times[str(line["way"])]
        line.update(ms_median=statistics.median(wall), cpu_ms_median=statistics.median(cpu))
    return lines


def measure_step(folder: Path, rows: int, vocab: int, rounds: int) -> list[dict[str, object]]:
    """A small Llama whose logits are its largest tensor, under transformers' tensor parallelism."""
    import transformers
    from transformers.distributed import DistributedConfig

    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=rows, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    if dist.get_rank() == 0:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    ids = torch.randint(1, vocab, (2, rows // 2), generator=torch.Generator().manual_seed(1))
    device, lines = devices.Cpu(), []
    for name, sharded, ours in (
        ("logits gathered, transformers' loss", False, False),
        ("logits gathered, accumloss", False, True),
        ("logits sharded, accumloss", True, True),
    ):
        plan = accumloss.vocabulary_parallel_plan() if sharded else None
        distributed = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
        model = transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=distributed).train()
        if ours:
            accumloss.register_with_transformers()

        def step(model: Any = model) -> float:
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            return loss.item()

        step()  # the gradients exist from here on
        with Communication() as communication:
            loss = step()
        peak, times = device.peak_bytes(step), []
        for _ in range(rounds):
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e3)
        if ours:
            accumloss.unregister_from_transformers()
        lines.append({
            "ranks": dist.get_world_size(), "rows": rows, "vocab": vocab, "hidden_size": 256, "layers": 2, "way": name,
            "rounds": rounds, "ms_median": statistics.median(times), "bytes": communication.bytes,
            "peak_extra_bytes": peak, "loss": loss,
        })  # fmt: skip
    return lines


def step_markdown(lines: Sequence[dict[str, Any]]) -> str:
    text = ["| V | way | ms | bytes | peak above weights and gradients | loss |", "|---:|---|---:|---:|---:|---:|"]
    for line in lines:
        peak = "" if line["peak_extra_bytes"] is None else f"{line['peak_extra_bytes'] / 1e6:.0f} MB"
        text.append(
            f"| {line['vocab']} | {line['way']} | {line['ms_median']:.0f} | {line['bytes']:,} | {peak} | {line['loss']:.4f} |"
        )
    return "\n".join(text)


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    text = [
        "| V | way | ms | CPU ms | collectives | bytes | peak above the logits | gradient error |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        peak = "" if line["peak_extra_bytes"] is None else f"{line['peak_extra_bytes'] / 1e6:.0f} MB"
        text.append(
            f"| {line['vocab']} | {line['way']} | {line['ms_median']:.0f} | {line['cpu_ms_median']:.0f} | {line['collectives']} "
            f"| {line['bytes']:,} | {peak} | {line['gradient_error']:.1e} |"
        )
    return "\n".join(text)


def rank_main(options: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    lines: list[dict[str, object]] = []
    for vocab in options.vocab:
        if options.step:
            folder = Path(tempfile.gettempdir()) / f"accumloss-vocabulary-{os.environ['MASTER_PORT']}"
            lines += measure_step(folder, options.rows, vocab, options.rounds)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder)
        else:
            lines += measure(Problem(options.rows, vocab), options.rounds)
    if dist.get_rank() == 0:
        facts = {**record.origin("bench_vocabulary.py", options.arguments), **record.environment()}
        name, fields, table = (STEP_NAME, STEP_FIELDS, step_markdown) if options.step else (NAME, FIELDS, markdown)
        record.write(Path(options.out), name, fields, lines, facts)
        print(table(lines))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step", action="store_true", help="of a small Llama under transformers' tensor parallelism")
    parser.add_argument("--out", default=str(record.RESULTS))
    options = parser.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any(vocab % options.ranks for vocab in options.vocab):
        parser.error(f"--vocab: expected multiples of --ranks {options.ranks}, got {options.vocab}")
    if "RANK" in os.environ:
        rank_main(options)
        sys.stdout.flush()
        os._exit(0)  # without the destructors of gloo's threads, which may abort the process (pytorch/pytorch#179291)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*launch, __file__, *options.arguments], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
