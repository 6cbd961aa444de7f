"""A tiny random model of every class of transformers that computes a loss, and uneven rows to train it with.

Sizes are shrunk by the names of configuration attributes: whatever is a width becomes WIDTH, whatever is a depth LAYERS, and
so on, in sub-configurations too, so that widths that must match still do. FAMILIES holds what cannot be told from names.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from . import names
from .inputs import CannotBuild, configs_of, head_of, label_names, rows
from .measure import collate, loss_of, named_line

__all__ = ["CannotBuild", "build", "head_of", "loss_bearing_class", "loss_bearing_classes", "rows", "tiny_config"]

WIDTH, INNER, HEADS, HEAD_DIM, LAYERS = 32, 64, 2, 16, 2
VOCAB, FIRST_SPECIAL = 96, 64  # ordinary ids lie below FIRST_SPECIAL
POSITIONS, IMAGE, PATCH, LABELS, EXPERTS, MOST_LAYERS = 64, 32, 8, 5, 4, 4
INITIALIZER_RANGE = 0.2  # so that logits differ, and rows are easy and hard


# What names do not tell: attributes of configurations, and of classes, by their names.
SWIN = {"window_size": 2, "image_size": 64, "encoder_stride": 32}  # a window must not be larger than a stage
SEGMENTER = {  # needs one feature map of each of four layers
    "num_hidden_layers": 4,
    "out_indices": [1, 2, 3, 4],
    "pool_scales": [1, 2],
    "auxiliary_channels": 8,
    "use_mask_token": True,
}
EFFICIENT = {  # channels of the first stage are those of a stem whose width is fixed
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 2],
    "expand_ratios": [1, 6, 6],
    "num_block_repeats": [1, 1, 1],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
SERIES = {
    "prediction_length": 4,
    "context_length": 16,
    "lags_sequence": [1, 2, 3],
    "num_time_features": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
}
MAMBA_2 = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 8}
HYBRID_PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
REFORMER = {
    "axial_pos_embds": False,
    "attn_layers": ["local", "lsh"],
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "num_buckets": 2,
    "num_hashes": 1,
    "hash_seed": 0,
}
PERCEIVER = {"num_latents": 8, "d_latents": 32, "d_model": 32, "num_self_attends_per_block": 1, "num_blocks": 1}
GROUNDING = {"text_config": {"vocab_size": 1100}, "backbone_config": {"image_size": 96}, "num_queries": 4}
DETR = {"decoder_in_channels": [WIDTH] * 3}
XMOD = {"languages": ["en_XX"], "default_language": "en_XX"}
TWO_LABELS = ("question answering", "pre-training", "image and text classification")  # a start and an end, yes and no
FAMILIES: dict[str, dict[str, Any]] = {
    "SwinConfig": SWIN,
    "Swinv2Config": SWIN,
    "DonutSwinConfig": SWIN,
    "MaskFormerSwinConfig": SWIN,
    "FocalNetConfig": {"encoder_stride": 32},
    "BeitConfig": SEGMENTER,
    "Data2VecVisionConfig": SEGMENTER,
    "EfficientNetConfig": {**EFFICIENT, "hidden_dim": 1280},
    "AlignVisionConfig": EFFICIENT,
    "AlignConfig": {"projection_dim": 40},  # the last stage's channels
    "TextNetConfig": {"stem_out_channels": 8},
    "AutoformerConfig": SERIES,
    "InformerConfig": SERIES,
    "TimeSeriesTransformerConfig": SERIES,
    "BitConfig": {"num_groups": 4},
    "Blip2Config": {"image_token_index": 64},
    "BridgeTowerConfig": {"hidden_size": 64},  # a head has 64
    "BridgeTowerTextConfig": {"hidden_size": 64},
    "BridgeTowerVisionConfig": {"hidden_size": 64},
    "BrosConfig": {"hidden_size": 64, "dim_bbox_projection": 32},
    "CLIPSegConfig": {"extract_layers": [0, 1, 1]},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 64}},
    "Emu3Config": {"vocabulary_map": {"<image>": 64, "<|extra_200|>": 65}},
    "DPTConfig": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 24, 32]},
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots1Config": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "HieraConfig": {"decoder_hidden_size": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "JambaConfig": HYBRID_PERIODS,
    "Mamba2Config": MAMBA_2,
    "LEDConfig": {"attention_window": 4},
    "LongformerConfig": {"attention_window": 4},
    "LayoutLMv3Config": {"coordinate_size": 6, "shape_size": 4},  # 4 x 6 + 2 x 4 = 32
    "LevitConfig": {"image_size": 64, "patch_size": 16},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LiltConfig": {"hidden_size": 48},  # a sixth of it is that of a coordinate
    "MobileViTV2Config": {"image_size": 64},
    "PerceiverConfig": PERCEIVER,
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": REFORMER,
    "ReformerModelWithLMHead": {"is_decoder": True},
    "SpeechEncoderDecoderConfig": {"pad_token_id": 0, "decoder_start_token_id": 2},
    "VisionEncoderDecoderConfig": {"pad_token_id": 0, "decoder_start_token_id": 2},
    "Wav2Vec2BertConfig": {"vocab_size": VOCAB},
    "Wav2Vec2ConformerConfig": {"vocab_size": VOCAB},
    "XmodConfig": XMOD,
    "ViltForImagesAndTextClassification": {"num_images": 2, "modality_type_vocab_size": 3},
    "MoshiDepthConfig": {"num_codebooks": 16},  # longer than a text
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 8},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "BltLocalEncoderConfig": {"hidden_size_global": 32},
    "BltLocalDecoderConfig": {"hidden_size_global": 32},
    # three times twice the first stage's width
    "ClapAudioConfig": {"window_size": 2, "spec_size": 64, "num_mel_bins": 64, "hidden_size": 256},
    "ClvpEncoderConfig": {"hidden_size": 64},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "VipLlavaConfig": {"vision_feature_layers": [-1, -2]},
    "DetrConfig": {"encoder_attention_heads": 8},  # added to the width, a multiple of 8
    "ConditionalDetrConfig": {"encoder_attention_heads": 8},
    "VibeVoiceAcousticTokenizerConfig": {"num_filters": 2},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 2},
    "EncodecConfig": {"num_filters": 4},
    "MimiConfig": {"num_filters": 4},
    "DacConfig": {"downsampling_ratios": [2, 4], "upsampling_ratios": [4, 2]},
    "CpmAntConfig": {"dim_ff": 64},
    "LongcatFlashConfig": {"head_dim": 8, "zero_expert_num": 2},
    "ClvpDecoderConfig": {"decoder_fixing_codes": [60, 45, 45, 61]},
    "CohereCompassTextConfig": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}
        }
    },
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0, "intermediate_size": 64},
    "Gemma4TextConfig": {"global_head_dim": 16},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "Glm5NextTextConfig": {"index_topk": 16},
    "Granite4VisionConfig": {
        "spatial_target_layers": [0, 1, 0, 1],
        "deepstack_layer_map": [],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "GroundingDinoConfig": GROUNDING,
    "MMGroundingDinoConfig": GROUNDING,
    "MobileBertConfig": {"initializer_range": 0.05},  # has no layer normalisation
    "InstructBlipConfig": {"image_token_index": 64},
    "InstructBlipVideoConfig": {"video_token_index": 64},
    "Kosmos2Config": {"latent_query_num": 4},
    "Llama4VisionConfig": {"intermediate_size": 128, "vision_output_dim": 32},
    "LwDetrViTConfig": {"image_size": 64, "num_windows": 4, "window_block_indices": [0]},
    "LwDetrConfig": {"projector_scale_factors": [1.0], "group_detr": 2},
    "RfDetrConfig": {"group_detr": 2},
    "RTDetrConfig": DETR,
    "RTDetrV2Config": DETR,
    "DFineConfig": DETR,
    "Deimv2Config": DETR,
    "PPDocLayoutV2Config": DETR,
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "MoonshineStreamingConfig": {"num_key_value_heads": 2},
    "MusicgenDecoderConfig": {"decoder_start_token_id": 2},
    "MusicgenMelodyDecoderConfig": {"decoder_start_token_id": 2},
    "NemotronH_Omni_Reasoning_V3_Config": {"vision_config": {"video_temporal_patch_size": 2}},
    "PatchTSTForClassification": {"num_targets": LABELS},
    "PatchTSMixerForTimeSeriesClassification": {"num_targets": LABELS},
    "PerceiverForMaskedLM": {"max_position_embeddings": 12},  # every position is predicted
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "Pix2StructTextConfig": {"initializer_range": INITIALIZER_RANGE},
    "Pix2StructVisionConfig": {"patch_embed_hidden_size": 768},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 90},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 90},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": INNER},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "RagConfig": {"n_docs": 1},
    "Sapiens2ForSemanticSegmentation": {"head_config": {"upsample_out_channels": [8], "conv_out_channels": [8]}},
    "Sapiens2ForPoseEstimation": {"head_config": {"upsample_out_channels": [8], "conv_out_channels": [8]}},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4},
    "Sapiens2Config": {"num_key_value_heads_per_layer": [2, 2]},
    "SegGptConfig": {
        "image_size": (64, 32),
        "num_hidden_layers": 4,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [1, 2, 3],
        "pretrain_image_size": 32,
    },
    "Step3p7TextConfig": {"sliding_window": 8},
    "TvpConfig": {"visual_prompt_size": 4, "num_frames": 2, "max_img_size": 64},
    "VibeVoiceAsrConfig": {"acoustic_tokenizer_chunk_size": 3200},
    "Wav2Vec2ForPreTraining": {"mask_time_prob": 0.05},  # else there is no embedding for what is masked
    "Wav2Vec2ConformerForPreTraining": {"mask_time_prob": 0.05},
    # two hybrid layers, which share their weights
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    # asked for by its model, unknown to its configuration
    "BridgeTowerForContrastiveLearning": {"contrastive_hidden_size": 32, "logit_scale_init_value": 2.6592},
}

UNABLE = [  # beginnings of classes' names
    ("Reformer", "its reversible layers take no backward pass in eval mode"),
    ("BeitForMaskedImageModeling", "its labels are one list for all of the batch: rows cannot hold them"),
    ("FastSpeech2Conformer", "in eval mode it predicts the lengths that its labels would have to have"),
]


# Classes --------------------------------------------------------------------------------------------------------------


@functools.cache
def loss_bearing_classes() -> dict[str, str]:
    """Every class of the installed transformers whose forward computes a loss: name -> module."""
    return {name: cls.__module__ for name, cls in sorted(_classes().items())}


def loss_bearing_class(name: str, is_exported: bool = False) -> type | None:
    """One of those classes, or None, without importing them all; is_exported: one that transformers exports."""
    cls = names.model_class(name, is_exported)
    return cls if cls is not None and _bears_loss(cls) else None


def _bears_loss(cls: Any) -> bool:
    return cls.__module__.startswith("transformers.models.") and isinstance(cls.config_class, type) and _has_loss(cls)


@functools.cache
def _classes() -> dict[str, type]:
    from transformers import PreTrainedModel

    _import_modeling_modules()
    return {cls.__name__: cls for cls in _subclasses(PreTrainedModel) if _bears_loss(cls)}


def _import_modeling_modules() -> None:
    from transformers import models

    for family in pkgutil.iter_modules(models.__path__, models.__name__ + "."):
        if not family.ispkg:
            continue
        try:
            package = importlib.import_module(family.name)
            for module in pkgutil.iter_modules(package.__path__, family.name + "."):
                if module.name.rpartition(".")[2].startswith("modeling_"):
                    importlib.import_module(module.name)
        except Exception:  # an optional package that is missing: its classes cannot be built either
            continue


def _subclasses(cls: Any) -> Iterator[Any]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _has_loss(cls: Any) -> bool:
    """Whether forward assigns a loss, or returns another's, rather than None."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))
    except (OSError, TypeError):
        return False
    if "loss" not in source and not label_names(cls):
        return False
    if "super().forward(" in source:
        return any(_has_loss(base) for base in cls.__bases__ if hasattr(base, "forward"))
    return any(_makes_loss(node) for node in ast.walk(ast.parse(source)))


def _makes_loss(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return node.arg == "loss" and not isinstance(node.value, (ast.Constant, ast.Name))
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return False
    if isinstance(node.value, ast.Constant):
        return False
    names = (part for target in targets for part in ast.walk(target))
    return any(isinstance(name, ast.Name) and "loss" in name.id for name in names)


# Configurations -------------------------------------------------------------------------------------------------------

# The first rule whose expression matches the whole name of an integer attribute gives its largest value; None: as it is.
INTEGERS: list[tuple[str, int | None]] = [
    # not sizes, though some look like it
    (r".*(_ids?|_index|_indices|_idx)|.*_token_id_.*|num_labels|seed|.*(rates?|theta|temperature|base|factor)", None),
    (r"(?!encoder_stride).*(strides?|coefficient|weight|cost|kernel.*|theta_.*|hop_length)", None),
    (r"num_channels|in_channels|audio_channels|out_features|chunk_size_feed_forward|pretraining_tp|mlp_ratio", None),
    (r"temporal_patch_size|spatial_merge_size|merge_size|tubelet_size|patch_temporal|type_vocab_size|reduction", None),
    # vocabularies and positions
    (r".*vocab_size.*|n_vocab|vocab_offset", VOCAB),
    (r"codebook_size|num_embeddings|num_codevectors_per_group", 32),
    (r"max_source_positions", 16),
    (r"max_.*position.*|.*max_position_embeddings|n_positions|context_length|.*_max_positions?", POSITIONS),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention", 8),
    # depths
    (r"(.*_)?n?_?layers?|depth|.*_depth|num_(hidden_|res_)?blocks", LAYERS),
    # heads
    (r"mamba_n_heads|mamba_num_heads", EXPERTS),  # of HEAD_DIM: twice the width
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"(.*_)?head_dim|d_kv|dim_head|(.*_)?d_head|(.*_)?head_size|rotary_dim", HEAD_DIM),
    (r".*heads?|n_head_kv", HEADS),
    # experts and groups
    (r"num_experts_per_tok|.*top_?k|num_selected_experts|moe_k|n_group", 2),
    (r"topk_group|n_groups|mamba_n_groups|mamba_num_groups", 1),
    (r"upsample_groups", WIDTH),
    (r"(.*_)?num_(.*_)?experts|n_routed_experts", EXPERTS),
    # images and sound
    (r"(.*_)?image_size|img_size|input_size|crop_size|resolution", IMAGE),
    (r"(.*_)?patch_size|encoder_stride", PATCH),
    (r"num_mel_bins|mel_dim|n_mels|model_in_dim", 16),
    (r"num_frames|num_queries|train_num_points|num_negatives|num_denoising", 6),
    # widths
    (r"hidden_size_per_layer_input", 8),
    (r".*(intermediate|ffn|mlp|inner|feed_?forward).*|d_ff|dim_ff|ff_dim", INNER),
    (r".*(sizes?|dims?|channels?|rank|width|units|embd|filters|features|hidden|d_model|expand)|embed|window", WIDTH),
]
_RULES = [(re.compile(expression), rule) for expression, rule in INTEGERS]
RANDOM = re.compile(r".*(drop|jitter|mask_time_prob|mask_feature_prob|pdrop).*")  # set to 0
WIDTHS = re.compile(
    r"(.*_)?(hidden_sizes|channels|dims?|embed_dims?|hidden_size_list|sizes|feature_sizes|channel_list|out_features|tdnn_dim|conv_dim|filters)(_per_stage)?"
)
LAYER_INDICES = re.compile(
    r".*(indexes|indices|indexs|_idxs|layer_ids|_layers|block_ids|hook_ids|vision_feature_layer)"
)
SPECIAL_IDS = re.compile(r".*(token_ids?|token_index|_token|tok_id|_id)")


def tiny_config(cls: Any) -> Any:
    """The configuration of a class, of the smallest sizes that make sense."""
    overrides = dict(FAMILIES.get(cls.__name__, {}))
    if head_of(cls) in TWO_LABELS and ("labels" not in label_names(cls) or head_of(cls) != "question answering"):
        overrides.setdefault("num_labels", 2)
    original = cls.config_class()
    config = _shrunk(original, overrides, _special_ids(original))
    for part in configs_of(config):
        _settle(part)
    return config


def _special_ids(config: Any) -> dict[int, int]:
    """Ids outside the tiny vocabulary -> ids inside of it, the same everywhere in a tree of configurations."""
    found = set()
    for part in configs_of(config):
        for name, value in vars(part).items():
            if SPECIAL_IDS.fullmatch(name):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= FIRST_SPECIAL}
    return {old: FIRST_SPECIAL + i % (VOCAB - FIRST_SPECIAL) for i, old in enumerate(sorted(found))}


def _shrunk(original: Any, overrides: dict[str, Any], ids: Mapping[int, int]) -> Any:
    from transformers import PretrainedConfig

    cls = type(original)
    overrides = {**FAMILIES.get(cls.__name__, {}), **overrides}
    defaults = _defaults(cls)
    values = {name: value for name, value in vars(original).items() if not name.startswith("_")}
    for name in defaults:
        if name not in values:
            values[name] = _get(original, name)
    unit = _unit(values)
    kept = _kept_layers(values)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PretrainedConfig):
            inner = overrides.pop(name, {})
            if value.model_type == "timm_backbone":  # needs another package; any backbone of four stages will do
                value, inner = _resnet(value), {}
            changed[name] = _shrunk(value, inner, ids) if isinstance(inner, dict) else inner
        elif name in overrides or name not in defaults:
            continue  # said by FAMILIES, or derived from others
        elif SPECIAL_IDS.fullmatch(name) and isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
            changed[name] = _renamed(value, ids)
        elif kept and _is_of_layers(value, kept.depth) and (defaults[name] is not None or _kinds(value) > 1):
            changed[name] = type(value)(value[i] for i in kept.layers)
        elif kept and DEPTH.fullmatch(name) and value == kept.depth:
            changed[name] = len(kept.layers)
        elif kept and _is_layer_indices(name, value, kept.depth):
            changed[name] = type(value)(i for i, old in enumerate(kept.layers) if old in value)
        elif isinstance(value, dict) and name in ("rope_parameters", "rope_scaling") and "mrope_section" in value:
            changed[name] = {**value, "mrope_section": _sections(values, value)}
        elif defaults[name] is not None:
            new = _smaller(name, value, values, unit)
            if new is not value or (_is_plain(value) and value != defaults[name]):
                changed[name] = new
    changed.update(_outputs(original, changed, defaults))
    changed.update(overrides)
    changed.setdefault("num_labels", LABELS)
    return cls(**changed)


def _resnet(timm: Any) -> Any:
    import transformers

    config_class: Any = transformers.ResNetConfig
    count = len(vars(timm).get("_out_indices") or [4])
    return config_class(out_indices=list(range(5 - count, 5)))


def _outputs(original: Any, changed: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Which stages a backbone gives: as many as before, where it gave more than the last."""
    outputs, stages = vars(original).get("_out_indices"), vars(original).get("stage_names")
    if not outputs or not stages or len(outputs) == 1:
        return {}
    depth = next((name for name in ("num_hidden_layers", "depth") if name in defaults), None)
    if depth is None or vars(original).get(depth) != len(stages) - 1:
        return {"out_indices": list(outputs)}  # stages, whose number stays
    return {depth: max(changed.get(depth, 1), len(outputs)), "out_indices": list(range(1, len(outputs) + 1))}


def _defaults(cls: type) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(cls):
        if not field.init and field.default is dataclasses.MISSING:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _renamed(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, int):
        return ids.get(value, value)
    return type(value)(_renamed(v, ids) if isinstance(v, int) else v for v in value)


def _unit(values: Mapping[str, Any]) -> float:
    """What the widths of a model with stages are divided by."""
    widest = 0
    for name, value in values.items():
        if isinstance(value, (list, tuple)) and value and WIDTHS.fullmatch(name):
            widest = max([widest, *(v for v in _flat(value) if isinstance(v, int) and not isinstance(v, bool))])
    return max(1.0, widest / 64)


def _flat(value: Any) -> Iterator[Any]:
    for v in value:
        if isinstance(v, (list, tuple)):
            yield from _flat(v)
        else:
            yield v


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map(function, v) for v in value)
    return function(value)


def _smaller(name: str, value: Any, values: Mapping[str, Any], unit: float) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if RANDOM.fullmatch(name):
        return _map(lambda v: type(v)(0) if isinstance(v, (int, float)) else v, value)
    if name in ("initializer_range", "init_std") and isinstance(value, float) and 0 < value < INITIALIZER_RANGE:
        return INITIALIZER_RANGE
    if isinstance(value, int):
        return _smaller_int(name, value, values)
    if isinstance(value, (list, tuple)) and value:
        return _smaller_list(name, value, values, unit)
    return value


def _smaller_int(name: str, value: int, values: Mapping[str, Any]) -> int:
    if re.fullmatch(r"(.*_)?(num_)?(kv|key_value)_heads|n_kv_heads?|num_kv", name):
        of = re.sub(r"(key_value|kv)_heads", "attention_heads", name)
        heads = values.get(of) or values.get("n_heads") or values.get("num_heads")
        if value <= HEADS and value == 1:
            return 1
        return HEADS if not isinstance(heads, int) or value >= heads else 1
    for expression, rule in _RULES:
        if expression.fullmatch(name):
            if rule is None:
                return value
            return min(value, rule)
    return value


def _smaller_list(name: str, value: Any, values: Mapping[str, Any], unit: float) -> Any:
    flat = list(_flat(value))
    integers = all(isinstance(v, int) and not isinstance(v, bool) for v in flat)
    if not integers:
        return value
    if re.fullmatch(
        r"depths|num_blocks|layer_depths|stage_num_blocks|stage_numb_of_layers|num_block_repeats|blocks_per_stage", name
    ):
        return _map(lambda v: 1, value)
    if re.fullmatch(r".*heads(_per_stage)?", name):
        return _map(lambda v: min(v, HEADS), value)
    if re.fullmatch(r"(.*_)?image_size|img_size|crop_size|resolution", name):
        return _map(lambda v: min(v, IMAGE), value)
    if re.fullmatch(r"conv_dim|conv_kernel|conv_stride", name):
        return _map(lambda v: min(v, WIDTH), value[:3])
    if WIDTHS.fullmatch(name):
        return _map(lambda v: v if v < 8 else max(8, 8 * round(v / unit / 8)), value)
    return value


class _Layers(NamedTuple):
    """Which layers of a model are kept, of how many."""

    layers: list[int]
    depth: int


DEPTH = re.compile(r"num_hidden_layers|num_layers|n_layers?|depth|encoder_layers|num_encoder_layers")


def _kept_layers(values: Mapping[str, Any]) -> _Layers | None:
    """The first layers that show each kind of layer once; None where configurations do not tell layers apart."""
    depth = next(
        (values[name] for name in ("num_hidden_layers", "num_layers", "n_layer", "depth") if name in values), None
    )
    if not isinstance(depth, int) or depth < 2:
        return None
    seen: set[tuple[str, str]] = set()
    layers = []
    for i in range(depth):
        kinds = set()
        for name, value in values.items():
            if _is_of_layers(value, depth):
                kinds.add((name, str(value[i])))
            elif _is_layer_indices(name, value, depth):
                kinds.add((name, str(i in value)))
        if kinds - seen:
            layers.append(i)
            seen |= kinds
    for i in range(depth):
        if len(layers) < LAYERS and i not in layers:
            layers.append(i)
    return _Layers(sorted(layers[:MOST_LAYERS]), depth)


def _is_of_layers(value: Any, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == depth and depth > 4


def _kinds(value: Any) -> int:
    return len({str(v) for v in value})


def _is_layer_indices(name: str, value: Any, depth: int) -> bool:
    if not isinstance(value, (list, tuple)) or not value or not LAYER_INDICES.fullmatch(name):
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < depth for v in value) and depth > 4


def _settle(config: Any) -> None:
    """What is only known once a configuration exists."""
    if _get(config, "pad_token_id", 0) is None:
        config.pad_token_id = 0
    heads, hidden = _get(config, "num_attention_heads"), _get(config, "hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads:
        for name, value in (("head_dim", hidden // heads), ("num_key_value_heads", heads)):
            if _get(config, name, 0) is None:
                setattr(config, name, value)
    if _get(config, "use_cache"):
        config.use_cache = False
    if _get(config, "is_encoder_decoder", False) and _get(config, "decoder_start_token_id") is None:
        config.decoder_start_token_id = 2
    parameters = _get(config, "rope_parameters")
    if (
        isinstance(parameters, dict)
        and "rope_type" in parameters
        and "mrope_section" not in parameters
        and _has_sections(config.__class__)
    ):
        parameters["mrope_section"] = _sections(vars(config), {"mrope_section": [1, 1, 1], **parameters})


@functools.cache
def _has_sections(config_class: Any) -> bool:
    """Whether a model's rotary embedding has sections even where its configuration does not say so."""
    if "Text" not in config_class.__name__:
        return False
    try:
        module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return False
    return '.get("mrope_section"' in inspect.getsource(module)


def _get(config: Any, name: str, default: Any = None) -> Any:
    try:
        return getattr(config, name, default)
    except Exception:  # an attribute that varies over the layers
        return default


def _sections(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> list[int]:
    """Shares of half of a tiny rotary dimension: time, height and width."""
    rotary = 8 if values.get("qk_rope_head_dim") else HEAD_DIM
    partial = parameters.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    half = int(rotary * partial) // 2
    each = max(1, half // 3)
    return [each, each, half - 2 * each] if half - 2 * each > 0 else [half - each, each, 0]


# Models ---------------------------------------------------------------------------------------------------------------


def build(cls: type) -> torch.nn.Module:
    """A tiny model of a class, in eval mode, the same weights every time.

    Raises:
        CannotBuild: The reason, in one line.
    """
    for expression, reason in UNABLE:
        if re.match(expression, cls.__name__):
            raise CannotBuild(reason)
    model = _model(cls, INITIALIZER_RANGE)
    if not _is_sound(model):
        model = _model(cls, 0.05)
    return model


def _model(cls: Any, initializer_range: float) -> torch.nn.Module:
    try:
        config = tiny_config(cls)
        for part in configs_of(config):
            for name in ("initializer_range", "init_std"):
                if vars(part).get(name) == INITIALIZER_RANGE:
                    setattr(part, name, initializer_range)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cls(config)
            _fill_tokens(model, initializer_range)
    except Exception as error:
        raise CannotBuild(named_line(error)) from error
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # of a rate that is no attribute of the configuration
            module.p = 0.0
    return model.float().eval()


def _fill_tokens(model: torch.nn.Module, std: float) -> None:
    """Tokens and positions that begin as zeros, where the slope of a layer normalisation is that of its eps."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=std)


def _is_sound(model: torch.nn.Module) -> bool:
    """Whether rows have a loss and gradients of a size that fp32 can take."""
    try:
        loss = loss_of(model, collate(rows(model)[:4]))
        loss.backward()
    except Exception:
        return True  # not a matter of the weights
    squares = [p.grad.double().pow(2).sum().item() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return abs(loss.item()) < 1e2 and sum(squares) < 1e4**2
