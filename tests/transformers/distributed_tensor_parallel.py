"""Run by torchrun: two ranks (gloo) train a tiny Llama whose head leaves its logits sharded; rank 0 writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from many_devices import as_accelerators
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torchrun import leave
from transformers.distributed import DistributedConfig

import accumloss

VOCAB, LENGTH = 97, 12  # shards of 49 and 48
KEPT = (2, 12, 3, 11, 2, 4, 12, 1)  # labels of each row


def rows() -> list[dict[str, torch.Tensor]]:
    generator, found = torch.Generator().manual_seed(1), []
    for kept in KEPT:
        ids = torch.randint(1, VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[kept:] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **given) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1, optim="sgd",
        learning_rate=1.0, max_grad_norm=0, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1,
        lr_scheduler_type="constant", disable_tqdm=True, **given,
    )  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    squares = sum((found[n].double() - wanted[n].double()).square().sum() for n in wanted)
    return float((squares / sum(w.double().square().sum() for w in wanted.values())).sqrt())


@as_accelerators()
def main(out: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {}
    batch = {key: torch.stack([row[key] for row in rows()]) for key in ("input_ids", "labels")}
    accumloss.register_with_transformers(metrics=True)
    for tied in (False, True):
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=tied,
        )  # fmt: skip
        torch.manual_seed(0)
        one = transformers.LlamaForCausalLM(config).train()
        folder = out.with_suffix(f".{tied}")
        if dist.get_rank() == 0:
            one.save_pretrained(folder)
        dist.barrier()
        one(**batch).loss.backward()

        def parallel(folder=folder):
            plan = accumloss.vocabulary_parallel_plan()
            distributed = DistributedConfig(tp_size=2, tp_plan=plan)
            return transformers.LlamaForCausalLM.from_pretrained(folder, distributed_config=distributed).train()

        model = parallel()
        outputs = model(**batch)
        with CommDebugMode() as communication:
            loss = model.loss_function(outputs.logits, batch["labels"], vocab_size=VOCAB)
        outputs.loss.backward()
        found[f"a call, tied {tied}"] = {
            "error": error(gradients(model), gradients(one)),
            "logits": str(outputs.logits.placements),
            "loss": type(loss).__name__,
            "collectives": communication.get_total_counts(),
        }
        model.eval()
        with torch.no_grad():
            found[f"a call, tied {tied}"]["evaluated"] = (model(**batch).loss / outputs.loss - 1).abs().item()

        model = parallel()
        before = {name: whole(p) for name, p in model.named_parameters()}
        trainer = InOrder(model, arguments(folder), train_dataset=rows())
        trainer.train()
        moved = {name: before[name] - whole(p) for name, p in model.named_parameters()}
        log = trainer.state.log_history[0]
        found[f"Trainer, tied {tied}"] = {
            "error": error(moved, gradients(one)),
            "loss": abs(log["loss"] / outputs.loss.item() - 1),
            "entropy": log["token_entropy"],
        }
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
