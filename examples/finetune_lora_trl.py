"""Fine-tunes LoRA adapters with TRL's SFTTrainer, on completions of very uneven lengths.

`pip install trl peft`; `python finetune_lora_trl.py [rows of a micro-batch]`
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import accumloss

accumloss.register_with_transformers(metrics=True)  # metrics: token_accuracy and token_entropy over all tokens

ROWS = 8  # of an optimizer step
micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else 2

set_seed(0)
# Yours: AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40))])}
splitter = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
config = LlamaConfig(
    vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2,
)  # fmt: skip
model = LlamaForCausalLM(config)
lengths = torch.randint(1, 20, (32,)).tolist()
dataset = Dataset.from_list(
    [{"prompt": f"w{i} w1", "completion": " " + " ".join(f"w{(i + j) % 40}" for j in range(n))} for i, n in enumerate(lengths)]
)  # fmt: skip

arguments = SFTConfig(
    output_dir="trainer-output", per_device_train_batch_size=micro_batch, gradient_accumulation_steps=ROWS // micro_batch,
    max_steps=3, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
    use_cpu=True, bf16=False,  # yours: leave these two out
)  # fmt: skip
lora = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
trainer.train()
losses = [f"{entry['loss']:.4f}" for entry in trainer.state.log_history if "loss" in entry]
print("losses", *losses)
