"""The perplexity of a language model over a whole data set. `python evaluate_perplexity.py [rows of a batch]`

Sums add up, and the mean is taken once: the result is the same for every batch size and number of processes.
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import accumloss

rows_of_a_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 4

set_seed(0)
config = LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, initializer_range=0.3,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()  # yours: AutoModelForCausalLM.from_pretrained(...)

tokens, lengths = torch.randint(100, (32, 24)), torch.randint(2, 25, (32, 1))  # yours: tokenized texts, padded
labels = tokens.masked_fill(torch.arange(24) >= lengths, -100)

total = 0
with torch.no_grad():
    for some_tokens, some_labels in zip(tokens.split(rows_of_a_batch), labels.split(rows_of_a_batch), strict=True):
        logits = model(some_tokens).logits  # without labels: the model computes no loss of its own
        total += accumloss.cross_entropy(logits, some_labels, shift=1, metrics=True)
sums = total.all_reduce()  # over all processes; alone it changes nothing
print(f"{sums.num_items} tokens, accuracy {sums.accuracy:.2%}, entropy {sums.mean_entropy:.4f} nats")
print(f"losses {sums.mean_loss:.4f} perplexity {sums.perplexity:.3f}")  # of weights that nobody has trained
