"""Pre-trains a BERT as masked language model with Trainer. `python masked_lm_bert.py [rows of a micro-batch]`

Stock Trainer adds up the means of the micro-batches of this head: k times the gradient, k times the logged loss.
"""

import sys

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments, set_seed

import accumloss

ROWS, MASK = 16, 4
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2

set_seed(0)
config = BertConfig(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
model = BertForMaskedLM(config)  # yours: BertForMaskedLM.from_pretrained(...)

# Every row has a share of masks of its own, from 5 to 60 %. Yours: DataCollatorForLanguageModeling.
sentences = 5 + torch.randint(95, (8, 16))
tokens = sentences[torch.randint(8, (256,))]  # what is masked can be told from the rest of its sentence
is_masked = torch.rand(256, 16) < torch.rand(256, 1) * 0.55 + 0.05
is_masked[:, 0] = True
inputs, labels = tokens.masked_fill(is_masked, MASK), tokens.masked_fill(~is_masked, -100)
dataset = [{"input_ids": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]

arguments = TrainingArguments(
    output_dir="trainer-output", per_device_train_batch_size=micro_batch, gradient_accumulation_steps=ROWS // micro_batch,
    max_steps=32, learning_rate=1e-2, logging_steps=8, save_strategy="no", report_to=[], disable_tqdm=True,
    use_cpu=True,  # yours: leave this out
)  # fmt: skip
with accumloss.registered(metrics=True):  # for the length of this block
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.train()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
print("token accuracy", *(f"{entry['token_accuracy']:.3f}" for entry in logs))
print("losses", *(f"{entry['loss']:.4f}" for entry in logs))
