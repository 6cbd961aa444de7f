"""Token classification with class weights, in a compute_loss of one's own. `python class_weighted_tokens.py [rows]`

A rare class weighs more. Over the whole step an item counts as much as its class weighs, as in PyTorch over one batch.
"""

import sys

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForTokenClassification, Trainer, TrainingArguments, set_seed

import accumloss

ROWS = 16
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2
class_weight = torch.tensor([0.2, 1.0, 4.0])


class WeightedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Written as for one batch: nothing in it knows of micro-batches."""
        outputs = model(**{name: entry for name, entry in inputs.items() if name != "labels"})
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten(), weight=class_weight)
        return (loss, outputs) if return_outputs else loss


set_seed(0)
config = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForTokenClassification(config)  # yours: from_pretrained
tokens, lengths = torch.randint(5, 100, (64, 16)), torch.randint(1, 17, (64, 1))
tags = (tokens > 80).long() + (tokens > 95).long()  # 0 often, 2 rarely
labels = tags.masked_fill(torch.arange(16) >= lengths, -100)
dataset = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]

arguments = TrainingArguments(
    output_dir="trainer-output", per_device_train_batch_size=micro_batch, gradient_accumulation_steps=ROWS // micro_batch,
    max_steps=4, learning_rate=5e-3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    use_cpu=True,  # yours: leave this out
)  # fmt: skip
accumloss.register_with_transformers()
trainer = WeightedTrainer(model, arguments, train_dataset=dataset)
print("exact:", accumloss.verify(trainer).is_exact)  # measured, on 6 of the rows
trainer.train()
print("losses", *(f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry))
