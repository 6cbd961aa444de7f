"""The Trainers of a census: every loss of every Trainer of the installed libraries, on tiny random models and rows made here.

A case builds its Trainer for any split of its eight rows. Nothing is downloaded: the tokenizer knows the words w0, w1, ...,
and all lengths are uneven.
"""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

ROWS = 8
WORDS = 40
LENGTHS = (1, 9, 2, 14, 3, 1, 6, 11)  # of what is trained on
LIBRARIES = ("transformers", "trl", "sentence-transformers")


class Split(NamedTuple):
    """How the rows go through."""

    batch_size: int
    micro_batches: int
    folder: str  # for what a Trainer writes


class Case(NamedTuple):
    """One Trainer with one loss.

    Attributes:
        build: makes the Trainer for a split, always with the same weights.
        can_be_uneven: whether its rows may come as 3 + 3 + 2.
        is_evaluated: whether it has an evaluation set.
        smallest: the fewest rows of a micro-batch that it takes.
        needs: what it cannot run without, which is not here.
    """

    library: str
    trainer: str
    loss: str
    build: Callable[[Split], Any]
    can_be_uneven: bool = True
    is_evaluated: bool = True
    smallest: int = 1
    needs: str = ""

    @property
    def name(self) -> str:
        return f"{self.trainer} {self.loss}".strip()


def cases() -> Iterator[Case]:
    """The cases of what is installed. A library is imported when its first one is asked for."""
    yield from _of_transformers()
    if importlib.util.find_spec("trl") is not None:
        yield from _of_trl()
    if importlib.util.find_spec("sentence_transformers") is not None:
        yield from _of_sentence_transformers()


@functools.cache
def find(name: str) -> Case:
    return next(case for case in cases() if case.name == name)


def arguments(split: Split, **more: Any) -> dict[str, Any]:
    """What every Trainer is told: one optimizer step that leaves the weights as they are."""
    return {
        "output_dir": split.folder,
        "per_device_train_batch_size": split.batch_size,
        "per_device_eval_batch_size": split.batch_size,
        "gradient_accumulation_steps": split.micro_batches,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-30,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        **more,
    }


def library(name: str) -> Any:
    """A library that need not be installed, and whose types are its own affair."""
    return importlib.import_module(name)


_folders: list[tempfile.TemporaryDirectory[str]] = []  # gone when the process ends


def _folder() -> str:
    _folders.append(tempfile.TemporaryDirectory(prefix="accumloss-trainers-"))
    return _folders[-1].name


# Words, tokenizers, models ------------------------------------------------------------------------------------------


def text(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(0, WORDS, (length,), generator=generator))


@functools.cache
def tokenizer(side: str = "right", is_of_bytes: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<s>", "<mask>", "[CLS]", "[SEP]"]
    if is_of_bytes:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *alphabet])}, []))
        words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else:
        vocabulary = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        mask_token="<mask>", cls_token="[CLS]", sep_token="[SEP]", padding_side=side, model_max_length=64,
    )  # fmt: skip
    made.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return made


SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


@functools.cache
def _kept_in(kind: str, seed: int) -> str:
    """A folder with a tiny language model: some Trainers load a second one by the name of the first."""
    transformers = library("transformers")
    torch.manual_seed(seed)
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    if kind == "mixture":
        config: Any = transformers.MixtralConfig(**SIZES, **tokens, **experts)
    else:
        sizes = {**SIZES, "vocab_size": 272} if kind == "bytes" else SIZES
        config = transformers.LlamaConfig(**sizes, **tokens)
    folder = _folder()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(is_of_bytes=kind == "bytes").save_pretrained(folder)
    return folder


def causal_lm(seed: int = 0, kind: str = "plain") -> Any:
    transformers = library("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        _kept_in(kind, seed), dtype=torch.float32, trust_remote_code=False
    )
    model.generate = functools.partial(_generate, model)
    return model


def mixture() -> Any:
    """A mixture of experts."""
    return causal_lm(kind="mixture")


def _generate(
    model: Any,
    input_ids: torch.Tensor,
    generation_config: Any = None,
    return_dict_in_generate: bool = False,
    **_: Any,
) -> Any:
    """Rows of uneven lengths (B, T + most), which depend on the prompt and on how often it is there, and on nothing else: the
    same for every split of the prompts."""
    most = generation_config.max_new_tokens or 12
    rows, seen = [], collections.Counter[tuple[int, ...]]()
    for row in input_ids.repeat_interleave(generation_config.num_return_sequences or 1, dim=0).tolist():
        prompt = tuple(token for token in row if token != 0)
        seen[prompt] += 1
        generator = torch.Generator().manual_seed(hash((prompt, seen[prompt])) % 2**31)
        length = int(torch.randint(1, most, (), generator=generator))
        words = torch.randint(7, 7 + WORDS, (length,), generator=generator).tolist()
        rows.append([*row, *words, 1, *[0] * (most - length - 1)][: len(row) + most])
    made = torch.tensor(rows)
    if not return_dict_in_generate:
        return made
    return library("transformers.generation.utils").GenerateDecoderOnlyOutput(sequences=made)


def classifier() -> Any:
    transformers = library("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0, eos_token_id=1, num_labels=1)
    return transformers.LlamaForSequenceClassification(config)


def dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


# transformers ---------------------------------------------------------------------------------------------------------


def _of_transformers() -> Iterator[Case]:
    transformers = library("transformers")

    def labelled() -> list[dict[str, Any]]:
        ids = [tokenizer()(text(2 + i % 4, i))["input_ids"] for i in range(ROWS)]
        targets = [tokenizer()(text(length, 50 + i))["input_ids"] for i, length in enumerate(LENGTHS)]
        return [{"input_ids": a, "labels": b} for a, b in zip(ids, targets, strict=True)]

    def seq2seq(split: Split, **more: Any) -> Any:
        torch.manual_seed(0)
        config = transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
        return transformers.Seq2SeqTrainer(
            model=model,
            args=transformers.Seq2SeqTrainingArguments(**arguments(split, **more)),
            train_dataset=labelled(),
            eval_dataset=labelled(),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer(), model, padding=True),
        )

    def plain(split: Split) -> Any:
        rows = [
            {"input_ids": row["labels"] + row["input_ids"], "labels": row["labels"] + [-100] * len(row["input_ids"])}
            for row in labelled()
        ]
        return transformers.Trainer(
            model=causal_lm(),
            args=transformers.TrainingArguments(**arguments(split)),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer(), padding=True),
        )

    yield Case("transformers", "Trainer", "causal LM", plain)
    yield Case("transformers", "Seq2SeqTrainer", "T5", seq2seq)
    smoothed = functools.partial(seq2seq, label_smoothing_factor=0.1)
    yield Case("transformers", "Seq2SeqTrainer", "T5 label smoothing", smoothed)
    generates = functools.partial(seq2seq, predict_with_generate=True, generation_max_length=6)
    yield Case("transformers", "Seq2SeqTrainer", "T5 predict_with_generate", generates)


# TRL ------------------------------------------------------------------------------------------------------------------


def completions() -> list[dict[str, Any]]:
    return [{"prompt": text(2 + i % 4, i), "completion": " " + text(n, 20 + i)} for i, n in enumerate(LENGTHS)]


def preferences() -> list[dict[str, Any]]:
    return [
        {"prompt": text(2 + i % 4, i), "chosen": " " + text(n, 20 + i), "rejected": " " + text(16 - n, 40 + i)}
        for i, n in enumerate(LENGTHS)
    ]


def triples() -> list[dict[str, Any]]:
    return [{**row, "reference": " " + text(3 + n // 2, 60 + n)} for row, n in zip(preferences(), LENGTHS, strict=True)]


def judged() -> list[dict[str, Any]]:
    return [{**row, "label": bool(i % 3)} for i, row in enumerate(completions())]


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": text(2 + i % 4, i)} for i in range(ROWS)]


def conversations() -> list[dict[str, Any]]:
    def of(row: dict[str, Any]) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]

    return [{"messages": of(row)} for row in completions()]


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Depends on nothing but the words."""
    return [sum(map(len, completion.split())) % 7 + 0.5 * (len(completion.split()) % 3) for completion in completions]


def _trl(
    split: Split,
    where: str,
    name: str,
    rows: Callable[[], list[dict[str, Any]]],
    *,
    model: Callable[[], Any] = causal_lm,
    is_evaluated: bool = True,
    keywords: Callable[[], dict[str, Any]] = dict,
    side: str = "right",
    is_of_bytes: bool = False,
    options: Callable[[], dict[str, Any]] = dict,
    **more: Any,
) -> Any:
    module = importlib.import_module(where)
    trainer, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    evaluation = {"eval_dataset": dataset(rows())} if is_evaluated else {}
    return trainer(
        model=model(),
        args=config(**arguments(split, **more), **options()),
        train_dataset=dataset(rows()),
        processing_class=tokenizer(side, is_of_bytes),
        **evaluation,
        **keywords(),
    )


def _of_trl() -> Iterator[Case]:
    def case(
        name: str, loss: str, rows: Any, *, where: str = "trl", uneven: bool = True, smallest: int = 1, **more: Any
    ) -> Case:
        is_evaluated = more.get("is_evaluated", True)
        build = functools.partial(_trl, where=where, name=name, rows=rows, **more)
        return Case("trl", f"{name}Trainer", loss, build, uneven, is_evaluated, smallest)

    yield case("SFT", "nll", completions)
    yield case("SFT", "nll, whole sequences", completions, completion_only_loss=False)
    yield case("SFT", "dft", completions, loss_type="dft")
    yield case("SFT", "label smoothing", completions, label_smoothing_factor=0.1)
    yield case("SFT", "padding_free", completions, padding_free=True, max_length=None)
    yield case("SFT", "nll + router loss", completions, model=mixture)
    yield case("SFT", "nll, LoRA", completions, keywords=lambda: {"peft_config": lora()})
    reference: dict[str, Any] = {"keywords": lambda: {"ref_model": causal_lm(1)}}
    for loss in (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ):  # fmt: skip
        smoothed: dict[str, Any] = {"label_smoothing": 0.1} if loss in ("exo_pair", "robust") else {}
        yield case("DPO", loss, preferences, loss_type=[loss], **reference, **smoothed)
    mpo: dict[str, Any] = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    yield case("DPO", "MPO (sigmoid + bco_pair + sft)", preferences, **mpo, **reference)
    yield case("DPO", "sigmoid, LD-DPO", preferences, ld_alpha=0.5, **reference)
    yield case("DPO", "sigmoid, WPO", preferences, use_weighting=True, **reference)
    yield case("DPO", "sigmoid, precomputed reference", preferences, precompute_ref_log_probs=True, **reference)
    yield case("DPO", "sigmoid + router loss", preferences, model=mixture)
    yield case("Reward", "sigmoid", preferences, model=classifier)
    yield case("Reward", "sigmoid, centred", preferences, model=classifier, center_rewards_coefficient=0.01)
    yield case("KTO", "kto", judged, smallest=2, **reference)
    yield case("KTO", "apo_zero_unpaired", judged, loss_type="apo_zero_unpaired", **reference)

    def generated(name: str, loss: str, where: str = "trl", **more: Any) -> Case:
        options: dict[str, Any] = {
            "keywords": lambda: {"reward_funcs": reward}, "is_evaluated": False, "num_generations": 2, "side": "left",
            "max_completion_length": 12, "uneven": False, "temperature": 1.0,
        }  # fmt: skip
        return case(name, loss, prompts, where=where, **{**options, **more})

    for loss in ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"):
        yield generated("GRPO", loss, loss_type=loss)
    yield generated("GRPO", "dapo, beta", beta=0.1)
    yield generated("GRPO", "dapo + entropy bonus", entropy_coef=0.5)
    yield generated("GRPO", "dapo + adaptive entropy bonus", use_adaptive_entropy=True, entropy_coef=0.5)
    yield generated("GRPO", "grpo + entropy bonus", entropy_coef=0.5, loss_type="grpo")
    yield generated("GRPO", "grpo + router loss", loss_type="grpo", model=mixture)
    yield generated("RLOO", "rloo")
    yield generated("GMPO", "gmpo", where="trl.experimental.gmpo")
    experimental = "trl.experimental."
    yield case("ORPO", "orpo", preferences, where=experimental + "orpo")
    for loss in ("sigmoid", "hinge", "ipo", "simpo"):
        alone: dict[str, Any] = {"cpo_alpha": 0.0} if loss == "simpo" else {}
        yield case("CPO", loss, preferences, where=experimental + "cpo", loss_type=loss, **alone)
    yield case("CPO", "simpo + nll", preferences, where=experimental + "cpo", loss_type="simpo", cpo_alpha=0.5)
    yield case("CPO", "AlphaPO", preferences, where=experimental + "cpo", loss_type="simpo", cpo_alpha=0.5, alpha=0.25)
    for loss in ("sigmoid", "hinge", "ipo", "tpo-l"):
        yield case("TPO", loss, triples, where=experimental + "tpo", loss_type=loss)
    yield case("TPO", "sigmoid, alpha = 0", triples, where=experimental + "tpo", tpo_alpha=0.0)
    teacher: dict[str, Any] = {"keywords": lambda: {"teacher_model": causal_lm(1)}}
    yield case("GKD", "jsd", conversations, where=experimental + "gkd", lmbda=0.0, **teacher)
    yield case("GKD", "beta = 0", conversations, where=experimental + "gkd", lmbda=0.0, beta=0.0, **teacher)
    distilled: dict[str, Any] = {
        "is_evaluated": False,
        "uneven": False,
        "max_completion_length": 12,
        "side": "left",
        **teacher,
    }
    yield case("Distillation", "jsd", prompts, where="trl", **distilled)
    bytewise: dict[str, Any] = {
        "model": lambda: causal_lm(0, "bytes"), "is_of_bytes": True, "lmbda": 0.0, "max_length": None,
        "keywords": lambda: {"teacher_model": causal_lm(1, "bytes")}, "where": experimental + "gold", "uneven": False,
    }  # fmt: skip
    yield case("GOLD", "jsd", conversations, use_uld_loss=False, **bytewise)
    same: dict[str, Any] = {"options": lambda: {"teacher_tokenizer_name_or_path": _kept_in("bytes", 1)}}
    yield case("GOLD", "uld", conversations, use_uld_loss=True, **same, **bytewise)
    yield case(
        "IWOPD",
        "iw",
        conversations,
        where=experimental + "iw_opd",
        lmbda=1.0,
        uneven=False,
        is_evaluated=False,
        **teacher,
    )
    online: dict[str, Any] = {"keywords": lambda: {"reward_funcs": reward}, "is_evaluated": False, "side": "left"}
    yield case("OnlineDPO", "sigmoid", prompts, where=experimental + "online_dpo", max_new_tokens=8, **online)
    yield case("A2PO", "a2po", prompts, where=experimental + "a2po", is_evaluated=False, side="left",
               keywords=lambda: {"reward_funcs": reward})  # fmt: skip
    own: dict[str, Any] = {
        "is_evaluated": False,
        "uneven": False,
        "side": "left",
        "max_completion_length": 12,
        "num_generations": 2,
    }
    yield case("SDFT", "sdft", hinted, where=experimental + "sdft", distillation_topk=8, **own)
    sdpo: dict[str, Any] = {
        "where": experimental + "sdpo",
        "keywords": lambda: {"reward_funcs": reward},
        "distillation_topk": 8,
        **own,
    }
    yield case("SDPO", "sdpo", prompts, **sdpo)
    for weight in (0.5, 0.0):
        yield case("SDPO", f"dapo, distillation_weight={weight}", prompts, distillation_weight=weight, **sdpo)
    for name, needs in (
        ("ServerDistillation", "a server of the teacher"),
        ("AsyncGRPO", "a vLLM server"),
        ("AsyncDistillation", "a vLLM server"),
    ):
        yield Case("trl", f"{name}Trainer", "", lambda split: None, needs=needs)


def hinted() -> list[dict[str, Any]]:
    return [{**row, "privileged_context": text(3, 70 + i)} for i, row in enumerate(prompts())]


def lora() -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    return LoraConfig(r=4, lora_dropout=0.0, task_type="CAUSAL_LM", init_lora_weights=False)


# sentence-transformers ------------------------------------------------------------------------------------------------


@functools.cache
def _saved(kind: str) -> str:
    """A folder with a tiny BERT and its tokenizer, which is how sentence-transformers takes them."""
    transformers = library("transformers")
    folder = _folder()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        num_labels={"classifier": 3}.get(kind, 1), is_decoder=False,
    )  # fmt: skip
    classes = {
        "encoder": transformers.BertModel,
        "masked": transformers.BertForMaskedLM,
        "cross": transformers.BertForSequenceClassification,
        "classifier": transformers.BertForSequenceClassification,
    }
    classes[kind](config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def dense_encoder() -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    body = Transformer(_saved("encoder"))
    return SentenceTransformer(modules=[body, Pooling(SIZES["hidden_size"])], device="cpu")


def _sparse() -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.models import (
        MLMTransformer,
        SpladePooling,
    )

    return SparseEncoder(modules=[MLMTransformer(_saved("masked")), SpladePooling()], device="cpu")


def _cross(kind: str = "cross") -> Any:
    from sentence_transformers import CrossEncoder

    folder = _saved(kind)
    torch.manual_seed(0)
    return CrossEncoder(folder, num_labels=3 if kind == "classifier" else 1, device="cpu")


def _multi_vector() -> Any:
    from sentence_transformers import MultiVectorEncoder

    folder = _saved("encoder")
    torch.manual_seed(0)
    return MultiVectorEncoder(folder, device="cpu")


def _scores(n: int) -> list[list[float]]:
    return torch.rand(ROWS, n, generator=torch.Generator().manual_seed(5)).tolist()


def _columns(*names: str, label: Any = None) -> Callable[[], list[dict[str, Any]]]:
    def rows() -> list[dict[str, Any]]:
        made = [
            {name: text(1 + (LENGTHS[i] * (j + 1)) % 13, 100 * j + i) for j, name in enumerate(names)}
            for i in range(ROWS)
        ]
        if label is not None:
            values = label()
            made = [{**row, "label": values[i]} for i, row in enumerate(made)]
        return made

    return rows


def _sentence_transformers(
    split: Split, encoder: Callable[[], Any], trainer: str, loss: Callable[[Any], Any], rows: Callable[[], Any]
) -> Any:
    import sentence_transformers

    model = encoder()
    torch.manual_seed(0)  # what a loss adds
    return getattr(sentence_transformers, trainer)(
        model=model,
        args=getattr(sentence_transformers, trainer.replace("Trainer", "TrainingArguments"))(**arguments(split)),
        train_dataset=dataset(rows()),
        eval_dataset=dataset(rows()),
        loss=loss(model),
    )


def _of_sentence_transformers() -> Iterator[Case]:
    from sentence_transformers.cross_encoder import losses as cross
    from sentence_transformers.multi_vector_encoder import losses as vectors
    from sentence_transformers.sentence_transformer import losses as dense
    from sentence_transformers.sparse_encoder import losses as sparse

    score = [0.1, 0.9, 0.5, 0.3, 1.0, 0.0, 0.7, 0.2]
    binary, classes = [1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 2, 0, 1, 2, 0, 1]
    pairs = _columns("a", "b")
    triplets = _columns("anchor", "positive", "negative")
    scored = _columns("a", "b", label=lambda: score)
    judged_pairs = _columns("a", "b", label=lambda: binary)
    classed = _columns("a", label=lambda: classes)
    classed_pairs = _columns("a", "b", label=lambda: classes)
    margins = _columns("query", "positive", "negative", label=lambda: score)
    two_scores = _columns("query", "positive", "negative", label=lambda: _scores(2))
    embedded = _columns("a", label=lambda: _scores(SIZES["hidden_size"]))

    def of(
        trainer: str, encoder: Any, losses: Any, name: str, rows: Any, loss: Any = None, label: str = "", **more: Any
    ) -> Case:
        make = loss or (lambda model: getattr(losses, name)(model))
        build = functools.partial(_sentence_transformers, encoder=encoder, trainer=trainer, loss=make, rows=rows)
        return Case("sentence-transformers", trainer, label or name, build, **more)

    body = functools.partial(of, "SentenceTransformerTrainer", dense_encoder, dense)
    yield body("CosineSimilarityLoss", scored)
    yield body("ContrastiveLoss", judged_pairs)
    yield body("OnlineContrastiveLoss", judged_pairs)
    yield body("TripletLoss", triplets)
    yield body("MarginMSELoss", margins)
    yield body("MSELoss", embedded)
    yield body("DistillKLDivLoss", two_scores)
    yield body("EmbedDistillLoss", embedded)
    yield body("SoftmaxLoss", classed_pairs, lambda m: dense.SoftmaxLoss(m, SIZES["hidden_size"], num_labels=3))
    yield body("CoSENTLoss", scored)
    yield body("AnglELoss", scored)
    yield body("MultipleNegativesRankingLoss", pairs)
    yield body("MultipleNegativesSymmetricRankingLoss", pairs)
    yield body("CachedMultipleNegativesRankingLoss", pairs)
    yield body("CachedMultipleNegativesSymmetricRankingLoss", pairs)
    yield body("GISTEmbedLoss", pairs, lambda m: dense.GISTEmbedLoss(m, _guide()))
    yield body("CachedGISTEmbedLoss", pairs, lambda m: dense.CachedGISTEmbedLoss(m, _guide()))
    yield body("MegaBatchMarginLoss", pairs, smallest=2)
    yield body("ContrastiveTensionLoss", judged_pairs)
    yield body("ContrastiveTensionLossInBatchNegatives", pairs)
    for name in (
        "BatchAllTripletLoss", "BatchHardTripletLoss", "BatchSemiHardTripletLoss", "BatchHardSoftMarginTripletLoss",
    ):  # fmt: skip
        yield body(name, classed)
    yield body("GlobalOrthogonalRegularizationLoss", pairs)
    matryoshka = [32, 16]
    yield body("MatryoshkaLoss", scored, lambda m: dense.MatryoshkaLoss(m, dense.CosineSimilarityLoss(m), matryoshka),
               "MatryoshkaLoss of CosineSimilarityLoss")  # fmt: skip
    yield body("MatryoshkaLoss", triplets, lambda m: dense.MatryoshkaLoss(m, dense.TripletLoss(m), matryoshka),
               "MatryoshkaLoss of TripletLoss")  # fmt: skip
    yield body("MatryoshkaLoss", pairs, lambda m: dense.MatryoshkaLoss(
        m, dense.MultipleNegativesRankingLoss(m), matryoshka), "MatryoshkaLoss of MultipleNegativesRankingLoss",
    )  # fmt: skip
    yield body("AdaptiveLayerLoss", scored, lambda m: dense.AdaptiveLayerLoss(
        m, dense.CosineSimilarityLoss(m), n_layers_per_step=-1), "AdaptiveLayerLoss of CosineSimilarityLoss, all layers",
    )  # fmt: skip
    yield body("AdaptiveLayerLoss", scored, lambda m: dense.AdaptiveLayerLoss(m, dense.CosineSimilarityLoss(m)),
               "AdaptiveLayerLoss of CosineSimilarityLoss")  # fmt: skip
    yield body("Matryoshka2dLoss", scored, lambda m: dense.Matryoshka2dLoss(
        m, dense.CosineSimilarityLoss(m), matryoshka), "Matryoshka2dLoss of CosineSimilarityLoss",
    )  # fmt: skip
    yield body("DenoisingAutoEncoderLoss", pairs, lambda m: dense.DenoisingAutoEncoderLoss(m, _saved("encoder")))
    queries = functools.partial(of, "CrossEncoderTrainer", _cross, cross)
    yield queries("BinaryCrossEntropyLoss", judged_pairs)
    yield of("CrossEncoderTrainer", functools.partial(_cross, "classifier"), cross, "CrossEntropyLoss", classed_pairs)
    yield queries("MSELoss", scored)
    yield queries("MarginMSELoss", margins)
    yield queries("MultipleNegativesRankingLoss", triplets)
    yield queries("CachedMultipleNegativesRankingLoss", triplets)

    def listed() -> list[dict[str, Any]]:
        sizes = [2, 4, 3, 5, 2, 3, 4, 2]
        return [
            {
                "query": text(1 + n, i),
                "docs": [text(1 + (n * (j + 1)) % 7, 10 * i + j) for j in range(size)],
                "labels": [float((i + j) % 3 == 0) + (j == 0) for j in range(size)],
            }
            for i, (n, size) in enumerate(zip(LENGTHS, sizes, strict=True))
        ]

    for name in ("LambdaLoss", "ListMLELoss", "PListMLELoss", "ListNetLoss", "RankNetLoss", "ADRMSELoss"):
        if hasattr(cross, name):
            yield queries(name, listed)
    thin = functools.partial(of, "SparseEncoderTrainer", _sparse, sparse)

    def splade(inner: str) -> Callable[[Any], Any]:
        return lambda m: sparse.SpladeLoss(
            m, getattr(sparse, inner)(m), document_regularizer_weight=0.1, query_regularizer_weight=0.1
        )

    for name, rows in (
        ("SparseCosineSimilarityLoss", scored),
        ("SparseMarginMSELoss", margins),
        ("SparseDistillKLDivLoss", two_scores),
        ("SparseTripletLoss", triplets),
        ("SparseMultipleNegativesRankingLoss", triplets),
        ("SparseCoSENTLoss", scored),
        ("SparseAnglELoss", scored),
    ):
        yield thin("SpladeLoss", rows, splade(name), f"SpladeLoss of {name}")
    yield thin("SparseMSELoss", _columns("a", label=lambda: _scores(SIZES["vocab_size"])))
    yield thin("CachedSpladeLoss", triplets, lambda m: sparse.CachedSpladeLoss(
        m, sparse.SparseMultipleNegativesRankingLoss(m), document_regularizer_weight=0.1, query_regularizer_weight=0.1,
    ))  # fmt: skip
    yield of("SparseEncoderTrainer", _csr, sparse, "CSRLoss", triplets)
    many = functools.partial(of, "MultiVectorEncoderTrainer", _multi_vector, vectors)
    yield many("MultiVectorMarginMSELoss", margins)
    yield many("MultiVectorDistillKLDivLoss", two_scores)
    yield many("MultiVectorMultipleNegativesRankingLoss", triplets)
    yield many("CachedMultiVectorMultipleNegativesRankingLoss", triplets)


def _guide() -> Any:
    return dense_encoder()


def _csr() -> Any:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.models import Pooling, Transformer
    from sentence_transformers.sparse_encoder.models import SparseAutoEncoder

    body = Transformer(_saved("encoder"))
    torch.manual_seed(0)
    auto = SparseAutoEncoder(input_dim=SIZES["hidden_size"], hidden_dim=64, k=8, k_aux=16)
    return SparseEncoder(modules=[body, Pooling(SIZES["hidden_size"]), auto], device="cpu")
