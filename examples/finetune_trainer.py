"""Fine-tunes a classifier with transformers' Trainer. `python finetune_trainer.py [rows of a micro-batch]`

Any number of rows that divides 16 gives the same losses. Take the two lines with accumloss away, and it does not.
"""

import sys

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

import accumloss

accumloss.register_with_transformers()

ROWS = 16  # of an optimizer step
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2

set_seed(0)
# Yours: BertForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=3)
config = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForSequenceClassification(config)
tokens = torch.randint(5, 100, (64, 12))
dataset = [{"input_ids": row, "labels": (row[0] > 35).long() + (row[0] > 70)} for row in tokens]

arguments = TrainingArguments(
    output_dir="trainer-output",
    per_device_train_batch_size=micro_batch,
    gradient_accumulation_steps=ROWS // micro_batch,
    max_steps=8,
    learning_rate=5e-3,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,  # yours: leave this out
)
trainer = Trainer(model, arguments, train_dataset=dataset)
trainer.train()
print(accumloss.explain(model))
losses = [f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry]
print("losses", *losses)
