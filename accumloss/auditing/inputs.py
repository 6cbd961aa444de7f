"""Rows for any model of transformers: what its forward takes, told from its signature and its configuration."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from .measure import AuditError, collate, loss_of, named_line

Row = dict[str, Any]

LENGTH = 12  # of a text
KEPT = (2, 12, 3, 11, 2, 4, 12, 2)  # labels of a row; a causal loss ignores the first of them
FIRST_ID, PAST_ID = 5, 64  # ordinary token ids
IMAGE = 32


class CannotBuild(RuntimeError):
    """No tiny model of the class, or no rows for it; the message says why in one line."""


# What a class is ------------------------------------------------------------------------------------------------------

HEADS = [  # of class names, the first that is found
    (r"Clvp\w*ForConditionalGeneration", "contrastive"),
    (r"MultipleChoice", "multiple choice"),
    (r"DoubleHeads", "causal LM and multiple choice"),
    (r"TokenClassification|SpadeE[EL]|EntitySpan", "token classification"),
    (r"QuestionAnswering", "question answering"),
    (r"NextSentencePrediction", "next sentence prediction"),
    (r"XVector", "speaker verification"),
    (r"AudioFrameClassification|FrameLevel", "audio frame classification"),
    (r"AudioClassification", "audio classification"),
    (r"VideoClassification", "video classification"),
    (
        r"ImagesAndTextClassification|ImageAndTextRetrieval|VisualReasoning|RegionToPhrase",
        "image and text classification",
    ),
    (r"ImageClassification", "image classification"),
    (r"TimeSeriesClassification|TST\w*ForClassification", "time series classification"),
    (r"SequenceClassification|EntityClassification|EntityPair", "sequence classification"),
    (r"MaskedImageModeling", "masked image modeling"),
    (r"MaskedLM", "masked LM"),
    (r"SemanticSegmentation", "semantic segmentation"),
    (r"ImageSegmentation|ForSegmentation|InstanceSegmentation|UniversalSegmentation", "instance segmentation"),
    (r"ObjectDetection|KeypointDetection", "object detection"),
    (r"DepthEstimation", "depth estimation"),
    (r"PoseEstimation", "pose estimation"),
    (r"VideoGrounding", "video grounding"),
    (r"CTC", "CTC"),
    (r"RNNT|TDT", "transducer"),
    (r"PreTraining|Pretraining", "pre-training"),
    (r"CausalImageModeling", "causal image modeling"),
    (r"TextToSpeech|SpeechToSpeech|FastSpeech|TTS", "speech synthesis"),
    (r"CausalLM|LMHead|HeadModel|TextModel|GenerationDecoder|ModelWithLMHead", "causal LM"),
    (
        r"ConditionalGeneration|Seq2Seq|MTModel|EncoderDecoder|Text2Text|TextToText|SpeechToText|Generation|Omni",
        "conditional generation",
    ),
    (r"ForPrediction|ForRegression", "time series"),
    (r"ContrastiveLearning", "contrastive"),
]


def head_of(cls: type) -> str:
    """The kind of head that a class is, in words."""
    parameters = parameters_of(cls)
    for expression, head in HEADS:
        if re.search(expression, cls.__name__):
            if head == "sequence classification" and "input_ids" not in parameters:
                return "audio classification"
            return head
    return "contrastive" if "return_loss" in parameters else "other"


@functools.cache
def parameters_of(cls: Any) -> tuple[str, ...]:
    """What forward takes."""
    return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]


LABELS = re.compile(
    r".*_labels?|labels?(_.*_ids)?|start_positions|end_positions|future_values|target_values|return_loss"
    r"|bool_masked_pos|ans|actions|mask_time_indices"
)


def label_names(cls: type) -> list[str]:
    """What forward takes for labels."""
    return [name for name in parameters_of(cls) if LABELS.fullmatch(name)]


def configs_of(config: Any) -> Iterator[Any]:
    """A configuration and all those in it, outermost first."""
    from transformers import PretrainedConfig

    yield config
    for value in list(vars(config).values()):
        for child in value.values() if isinstance(value, dict) else [value]:
            if isinstance(child, PretrainedConfig):
                yield from configs_of(child)


# Rows -----------------------------------------------------------------------------------------------------------------


def rows(model: torch.nn.Module, count: int = 8, seed: int = 0) -> list[Row]:
    """Examples whose numbers of labels are very uneven, without a batch dimension.

    All rows have the same entries. Tensors of one shape are to be stacked; what is no tensor (a detector's labels, a
    dict) or differs in shape (the masks of a segmenter) is to be put in a list.

    Raises:
        CannotBuild: No rows were found that the model gives a finite loss for; the reason, in one line.
    """
    reasons: list[Exception] = []
    for recipe in recipes(type(model)):
        try:
            found = Maker(model, recipe, seed).rows(count)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                loss = loss_of(model, collate(found[:2]))
            if not math.isfinite(loss.item()):
                raise CannotBuild(f"the loss of two rows is {loss.item()}")
            return found
        except Exception as error:
            reasons.append(error)
    reason = reasons[0]
    raise CannotBuild(str(reason) if isinstance(reason, (AuditError, CannotBuild)) else named_line(reason)) from reason


MEDIA = re.compile(r"(image_)?pixel_values|flattened_patches|input_features|input_values|audio_input_features")


def recipes(cls: type) -> list[str]:
    """Ways to make rows for a class, in the order in which they are tried."""
    parameters = parameters_of(cls)
    media = [name for name in parameters if MEDIA.fullmatch(name)]
    if "input_ids" in parameters and media:
        if "pixel_values" not in parameters:
            return ["plain", "tiles", "swapped", "text"]
        return ["plain", "unsized", "tiles", "text"] if "image_sizes" in parameters else ["plain", "tiles", "text"]
    return ["plain", "swapped"] if "input_features" in media or "input_values" in media else ["plain"]


class Maker:
    """Makes the rows of one model: an entry of forward's is made by the method of its name, where there is one."""

    def __init__(self, model: Any, recipe: str, seed: int):
        self.model = model
        self.config = model.config
        self.recipe = recipe
        cls: Any = model.__class__
        self.name = cls.__name__
        self.parameters = parameters_of(cls)
        self.labels = label_names(cls)
        self.head = head_of(cls)
        self.generator = torch.Generator().manual_seed(seed)
        self.text_config = text_config_of(model.config)
        self.special = special_ids(model.config)
        self.index = 0  # of the row
        self.kept = 0  # its labels
        self.row: Row = {}
        self.placeholder = -1  # the token that stands for an image
        self._objects: tuple[int, dict[str, torch.Tensor]] = (-1, {})  # of a row

    def rows(self, count: int) -> list[Row]:
        found = []
        for self.index in range(count):
            self.kept = KEPT[self.index % len(KEPT)]
            self.row = {}
            for name in sorted(self.parameters, key=self.order):
                maker = getattr(self, f"make_{name}", None)
                if maker is not None and name not in self.row:
                    value = maker()
                    if value is not None:
                        self.row[name] = value
            found.append(self.row)
        return found

    def order(self, name: str) -> tuple[int, int]:
        """Texts first, what media add to them next, then labels, and what is made of those."""
        if name in ("input_ids", "qformer_input_ids"):
            stage = 0
        elif MEDIA.fullmatch(name):
            stage = 1
        else:
            stage = 4 if name == "decoder_input_ids" else 3 if name in self.labels else 2
        return stage, self.parameters.index(name)

    # Numbers

    def ints(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of some attributes that a configuration has, outermost first."""
        for name in names:
            for config in configs_of(self.config):
                value = get(config, name)
                if value is not None and not callable(value):
                    return value
        return default

    def size(self, *names: str, default: int) -> int:
        value = self.get(*names, default=default)
        return int(value[0] if isinstance(value, (list, tuple)) else value)

    @property
    def classes(self) -> int:
        return int(self.config.num_labels)

    # Texts

    @functools.cached_property
    def vocabulary(self) -> int:
        return int(get(self.text_config, "vocab_size") or self.size("vocab_size", default=PAST_ID))

    def ids(self, *shape: int, below: int | None = None) -> torch.Tensor:
        end = min(PAST_ID, below or self.vocabulary)
        usable = [i for i in range(min(FIRST_ID, end // 2), end) if i not in self.special]
        return torch.tensor(usable)[self.ints(0, len(usable), *shape)]

    def token_id(self, *names: str) -> int | None:
        value = self.get(*names)
        if isinstance(value, (list, tuple)):
            value = value[0] if value else None
        return value if isinstance(value, int) and value >= 0 else None

    @property
    def text_shape(self) -> tuple[int, ...]:
        if self.head == "multiple choice":
            return (3, LENGTH)
        if self.head == "causal LM and multiple choice":
            return (2, LENGTH)
        return (LENGTH,)

    @property
    def end(self) -> int:
        """Of the text; what follows is padding."""
        return LENGTH - 3 if self.kept <= 4 and self.is_masked else LENGTH

    @property
    def is_masked(self) -> bool:
        return "attention_mask" in self.parameters and self.head != "causal LM and multiple choice"

    def make_input_ids(self) -> torch.Tensor | None:
        if "TextToUnit" in self.name:
            return None  # it takes inputs_embeds alone
        if "GroundingDino" in self.name:
            # phrases, each ended by a full stop, between the tokens that begin and end a text
            phrases = torch.full((LENGTH - 2,), 1012)
            phrases[0::2] = self.ids(len(phrases[0::2]))
            return torch.cat([torch.tensor([101]), phrases, torch.tensor([102])])
        if self.input_codebooks:
            return self.ids(*self.input_codebooks, below=32)
        ids = self.ids(*self.text_shape)
        pad, eos = self.token_id("pad_token_id"), self.token_id("eos_token_id")
        ids[..., self.end :] = pad if pad is not None and pad < self.vocabulary else 0
        if eos is not None and eos < self.vocabulary and eos != pad:
            ids[..., self.end - 1] = eos
        return ids

    @property
    def input_codebooks(self) -> tuple[int, ...] | None:
        """The shape of a text of codes, of several codebooks."""
        if re.match(r"Musicgen\w*ForCausalLM", self.name):
            return self.config.num_codebooks, LENGTH
        if self.name.startswith("KyutaiSpeechToText"):
            return LENGTH, self.config.num_codebooks + 1
        return None

    def make_inputs_embeds(self) -> torch.Tensor | None:
        return self.normal(LENGTH, self.config.hidden_size) if "TextToUnit" in self.name else None

    def make_decoder_input_ids(self) -> torch.Tensor | None:
        if self.name.startswith("Dia"):
            return self.ids(LENGTH, self.size("num_channels", default=9), below=32)
        if self.head == "transducer":
            return torch.cat([torch.tensor([self.config.blank_token_id]), self.row["labels"]])
        return None

    def make_attention_mask(self) -> torch.Tensor | None:
        if "input_ids" not in self.row:
            media = next(
                (self.row[n] for n in ("input_features", "input_values", "flattened_patches") if n in self.row), None
            )
            return None if media is None else torch.ones(self.frames_given(media), dtype=torch.int64)
        if not self.is_masked:
            return None
        if self.input_codebooks:
            return torch.ones(LENGTH, dtype=torch.int64)
        mask = torch.ones_like(self.row["input_ids"])
        mask[..., mask.shape[-1] - LENGTH + self.end :] = 0
        return mask

    def frames_given(self, media: torch.Tensor) -> int:
        if media.dim() == 1:
            return media.shape[0]
        return media.shape[-1] if "input_values" in self.row or self.is_mel_first else media.shape[-2]

    def make_global_attention_mask(self) -> torch.Tensor:
        mask = torch.zeros_like(self.row["input_ids"])
        mask[..., 0] = 1
        return mask

    def make_bbox(self) -> torch.Tensor:
        corners = self.ints(0, 30, LENGTH, 2)
        return torch.cat([corners, corners + self.ints(1, 30, LENGTH, 2)], dim=-1)

    def make_mm_token_type_ids(self) -> torch.Tensor | None:
        return (self.row["input_ids"] == self.placeholder).long() if "input_ids" in self.row else None

    def make_entity_ids(self) -> torch.Tensor | None:
        return None if self.head == "multiple choice" else self.ints(1, self.size("entity_vocab_size", default=8), 2)

    def make_entity_attention_mask(self) -> torch.Tensor | None:
        return None if self.head == "multiple choice" else torch.ones(2, dtype=torch.int64)

    def make_entity_position_ids(self) -> torch.Tensor | None:
        return None if self.head == "multiple choice" else torch.stack([torch.arange(4) + 1, torch.arange(4) + 5])

    def make_bbox_first_token_mask(self) -> torch.Tensor:
        return torch.ones(LENGTH, dtype=torch.bool)

    def make_initial_token_labels(self) -> torch.Tensor:
        return self.ints(0, self.classes, LENGTH)

    def make_subsequent_token_labels(self) -> torch.Tensor:
        return self.labels_of_links()

    def make_context_input_ids(self) -> torch.Tensor:
        return self.ids(LENGTH)

    def make_context_attention_mask(self) -> torch.Tensor:
        return torch.ones(LENGTH, dtype=torch.int64)

    def make_doc_scores(self) -> torch.Tensor:
        return self.normal(1)

    def make_labels_input_ids(self) -> torch.Tensor:
        return self.labels_of_tokens()

    def make_labels_attention_mask(self) -> torch.Tensor:
        return torch.ones(LENGTH, dtype=torch.int64)

    def make_attack_input_ids(self) -> torch.Tensor:
        return self.ids(LENGTH)

    make_labels_input_shape_ids = make_labels_input_pronunciation_ids = make_attack_input_ids
    make_attack_input_shape_ids = make_attack_input_pronunciation_ids = make_attack_input_ids
    make_attack_attention_mask = make_labels_attention_mask

    def make_padding_mask(self) -> torch.Tensor | None:
        return torch.ones(self.row["input_values"].shape[-1], dtype=torch.int64) if self.head == "CTC" else None

    def make_last_hidden_state(self) -> torch.Tensor | None:
        return self.normal(LENGTH, self.config.input_size) if self.name == "MoshiDepthDecoder" else None

    def make_user_audio_codes(self) -> torch.Tensor:
        return self.ids(self.config.num_codebooks, LENGTH, below=32)

    make_moshi_audio_codes = make_user_audio_codes

    def make_text_labels(self) -> torch.Tensor:
        return self.labels_of_tokens()

    def make_input_ids_masked(self) -> torch.Tensor:
        return self.ids(LENGTH)

    def make_mlm_labels(self) -> torch.Tensor:
        return self.labels_of_tokens()

    def make_mim_labels(self) -> torch.Tensor:
        return self.ints(0, 32, self.patch_count)

    def make_itm_labels(self) -> torch.Tensor:
        return torch.tensor(1)

    def make_image_attention_mask(self) -> torch.Tensor | None:
        return torch.ones(LENGTH, 1, dtype=torch.int64) if self.name.startswith("Idefics") else None

    def make_image_embeds_position_mask(self) -> torch.Tensor | None:
        if "pixel_values" not in self.row and "flattened_patches" not in self.row:
            return None
        mask = torch.zeros(LENGTH, dtype=torch.bool)
        mask[1 : 1 + self.size("latent_query_num", default=4)] = True
        return mask

    def make_task_inputs(self) -> torch.Tensor:
        return self.ids(self.size("task_seq_len", default=77))

    def make_pixel_attention_mask(self) -> torch.Tensor | None:
        return torch.ones(1, dtype=torch.bool) if self.name.startswith("PI0") else None

    def make_entity_start_positions(self) -> torch.Tensor | None:
        return torch.tensor([1, 5])

    def make_entity_end_positions(self) -> torch.Tensor | None:
        return torch.tensor([4, 8])

    # Images

    def make_pixel_values(self) -> torch.Tensor | None:
        if self.recipe == "text":
            return None
        if "image_grid_thw" in self.parameters:
            value = self.patches()
        elif "spatial_shapes" in self.parameters:
            patch = self.size("patch_size", default=8)
            self.row["spatial_shapes"] = torch.tensor([4, 4])
            self.row["pixel_attention_mask"] = torch.ones(16, dtype=torch.int64)
            value = self.normal(16, 3 * patch * patch)
        else:
            value = self.image()
            if self.recipe == "tiles":
                value = value[None]
            if self.name == "ViltForImagesAndTextClassification":
                value = self.normal(2, *self.image_shape())
            if "image_sizes" in self.parameters and self.recipe != "unsized":
                self.row["image_sizes"] = torch.tensor(value.shape[-2:])
        if "input_ids" in self.row:
            self.row["pixel_values"] = value
            self.add_placeholders()
        return value

    def make_pixel_values_videos(self) -> torch.Tensor | None:
        if "pixel_values" in self.parameters:
            return None
        return self.normal(self.size("num_frames", "frames_per_clip", default=2), *self.image_shape())

    def make_flattened_patches(self) -> torch.Tensor | None:
        if self.recipe == "text":
            return None
        patch = self.size("patch_size", default=16)
        places = torch.stack([torch.arange(8) % 4 + 1, torch.arange(8) // 4 + 1], dim=-1)
        return torch.cat([places.float(), self.normal(8, 3 * patch**2)], dim=-1)

    def image_shape(self) -> tuple[int, int, int]:
        detects = self.head == "object detection" or re.search("Detr", self.name)
        height = width = 96 if detects else IMAGE  # of the last stage, more than one pixel
        for config in configs_of(self.config):
            names = ("image_size", "img_size", "train_size", "max_img_size")
            size = next((get(config, name) for name in names if get(config, name)), None)
            if isinstance(size, (int, list, tuple)):
                height, width = size if isinstance(size, (list, tuple)) else (size, size)
                if self.name.startswith("SegGpt"):
                    height //= 2  # a prompt is put on top
                break
        return self.size("num_channels", "in_channels", "in_chans", default=3), height, width

    def image(self) -> torch.Tensor:
        frames = get(self.config, "num_frames") or get(get(self.config, "vision_config"), "num_frames")
        if isinstance(frames, int) and self.head in (
            "video classification",
            "pre-training",
            "contrastive",
            "video grounding",
        ):
            return self.normal(frames, *self.image_shape())
        return self.normal(*self.image_shape())

    def patches(self) -> torch.Tensor:
        vision = get(self.config, "vision_config") or self.config
        patch = get(vision, "patch_size") or 14
        merge = (
            get(vision, "spatial_merge_size") or get(vision, "merge_size") or self.size("spatial_merge_size", default=2)
        )
        channels = get(vision, "in_channels") or get(vision, "num_channels") or 3
        side = 2 * int(merge if isinstance(merge, int) else merge[0])
        self.row["image_grid_thw"] = torch.tensor([1, side, side])
        if self.recipe == "tiles":
            return self.normal(side * side, channels, patch, patch)
        return self.normal(side * side, channels * (get(vision, "temporal_patch_size") or 1) * patch * patch)

    def add_placeholders(self) -> None:
        """As many image tokens before the text as the model makes of the image."""
        token = self.token_id("image_token_id", "image_token_index", "img_token_id", "media_placeholder_token_id")
        count = self.image_tokens() if token is not None else 0
        if token is None or not count:
            return
        begin = self.token_id("vision_start_token_id", "image_start_token_id", "boi_token_id")
        prefix = torch.tensor(([begin] if begin is not None else []) + [token] * count)
        self.row["input_ids"] = torch.cat([prefix, self.row["input_ids"]])
        self.placeholder = token

    def add_sound_placeholders(self) -> None:
        token = self.token_id("audio_token_id", "audio_token_index")
        if token is None:
            return
        if not hasattr(self, "_sound_tokens"):
            self._sound_tokens = self.tokens_of("get_audio_features")
        if self._sound_tokens:
            self.row["input_ids"] = torch.cat([torch.full((self._sound_tokens,), token), self.row["input_ids"]])

    def image_tokens(self) -> int:
        if not hasattr(self, "_image_tokens"):
            self._image_tokens = self.tokens_of("get_image_features")
        return self._image_tokens

    def tokens_of(self, method: str) -> int:
        """How many vectors the model's own method makes of this row's image or sound."""
        owners = (self.model, getattr(self.model, "model", None))
        owner = next((owner for owner in owners if hasattr(owner, method)), None)
        if owner is None:
            return 0
        takes = tuple(inspect.signature(inspect.unwrap(getattr(owner, method))).parameters)
        given = {name: value[None] for name, value in self.row.items() if name in takes}
        with torch.no_grad():
            return count_of(getattr(owner, method)(**given))

    def make_visual_feats(self) -> torch.Tensor:
        return self.normal(4, self.size("visual_feat_dim", default=32))

    def make_visual_pos(self) -> torch.Tensor:
        return self.uniform(4, self.size("visual_pos_dim", default=4))

    def make_visual_embeds(self) -> torch.Tensor:
        return self.normal(*self.text_shape[:-1], 4, self.size("visual_embedding_dim", default=32))

    def make_visual_attention_mask(self) -> torch.Tensor:
        return torch.ones(*self.text_shape[:-1], 4, dtype=torch.int64)

    def make_visual_token_type_ids(self) -> torch.Tensor:
        return torch.ones(*self.text_shape[:-1], 4, dtype=torch.int64)

    def make_region_to_phrase_position(self) -> torch.Tensor:
        return torch.arange(self.kept % 4 + 4)[:4]

    def make_qformer_input_ids(self) -> torch.Tensor:
        return self.ids(LENGTH)

    def make_qformer_attention_mask(self) -> torch.Tensor:
        return torch.ones(LENGTH, dtype=torch.int64)

    def make_prompt_pixel_values(self) -> torch.Tensor:
        return self.normal(*self.image_shape())

    def make_prompt_masks(self) -> torch.Tensor:
        return self.normal(*self.image_shape())

    # Sound

    @functools.cached_property
    def is_mel_first(self) -> bool:
        """Whether a spectrogram is (mel, frames) rather than (frames, mel)."""
        module = type(self.model).__module__
        is_first = not re.search(
            r"speech_to_text|parakeet|nemotron|lasr|canary|cohere_asr|seamless|granite_speech|wav2vec2_bert|pop2piano|clap",
            module,
        )
        return is_first != (self.recipe == "swapped")

    def make_input_values(self) -> torch.Tensor | None:
        if self.recipe == "text" or ("input_features" in self.parameters and "input_ids" not in self.parameters):
            return self.wave() if "SpeechEncoderDecoder" in self.name else None
        if self.get("max_length") and self.get("num_mel_bins") and "input_ids" not in self.parameters:
            return self.normal(self.get("max_length"), self.get("num_mel_bins"))  # a spectrogram by this name
        return self.wave()

    def wave(self) -> torch.Tensor:
        samples = 2400 if "moonshine" in type(self.model).__module__ else 640
        if self.name == "PeAudioFrameLevelModel":
            samples = 8  # one frame: its loss is of (rows, rows), whatever the number of frames
        return self.normal(1, samples) if self.recipe == "swapped" else self.normal(samples)

    def make_input_features(self) -> torch.Tensor | None:
        if self.recipe == "text" or "SpeechEncoderDecoder" in self.name:
            return None
        mel = self.size(
            "num_mel_bins",
            "feature_projection_input_dim",
            "input_feat_per_channel",
            "input_dim",
            "n_mels",
            "feature_size",
            default=16,
        )
        if self.name.startswith("GraniteSpeech5"):
            mel *= 4  # four bands of it
        frames = 96 if self.name.startswith("VoxtralRealtime") else 2 * self.size("max_source_positions", default=16)
        value = self.normal(mel, frames) if self.is_mel_first else self.normal(frames, mel)
        for name in ("input_features_mask", "feature_attention_mask"):
            if name in self.parameters and "input_ids" in self.row:
                self.row[name] = torch.ones(frames, dtype=torch.int64)
        if "input_ids" in self.row:
            self.row["input_features"] = value[None] if self.recipe == "tiles" else value
            self.add_sound_placeholders()
        return value[None] if self.recipe == "tiles" else value

    @functools.cached_property
    def frames(self) -> int:
        """Of sound, as the model's head sees them."""
        with torch.no_grad():
            given = {name: value[None] for name, value in self.row.items() if isinstance(value, torch.Tensor)}
            outputs = self.model(**given)
        logits = outputs.get("logits", None)
        return int((outputs[0] if logits is None else logits).shape[1])

    def make_sampled_negative_indices(self) -> torch.Tensor:
        return self.ints(0, self.frames, self.frames, self.size("num_negatives", default=4))

    def make_mask_time_indices(self) -> torch.Tensor:
        mask = torch.zeros(self.frames, dtype=torch.int64)
        mask[: max(1, self.frames * self.kept // 13)] = 1
        return mask

    # Time series

    def make_past_values(self) -> torch.Tensor:
        config = self.config
        length = get(config, "context_length") or 16
        channels = get(config, "num_input_channels") or get(config, "input_size") or 1
        if "past_time_features" in self.parameters:
            length += max(get(config, "lags_sequence") or [0])
            return self.normal(length) if channels == 1 else self.normal(length, channels)
        return self.normal(length, channels) if get(config, "num_input_channels") else self.normal(length)

    def make_past_time_features(self) -> torch.Tensor:
        return self.normal(len(self.row["past_values"]), self.config.num_time_features)

    def make_past_observed_mask(self) -> torch.Tensor:
        mask = torch.ones_like(self.row["past_values"])
        mask[: 2 * (self.index % 3)] = 0
        return mask

    def make_future_time_features(self) -> torch.Tensor:
        return self.normal(self.config.prediction_length, self.config.num_time_features)

    def make_future_observed_mask(self) -> torch.Tensor:
        mask = torch.ones(self.config.prediction_length)
        mask[1 + self.kept // 4 :] = 0
        return mask

    def make_future_values(self) -> torch.Tensor:
        length = get(self.config, "prediction_length") or get(self.config, "horizon_length") or 4
        channels = get(self.config, "num_input_channels")
        return self.normal(length, channels) if channels else self.normal(length)

    def make_target_values(self) -> torch.Tensor:
        if self.head == "time series classification":
            return self.ints(0, get(self.config, "num_targets") or self.classes)
        return self.normal(get(self.config, "num_targets") or 1)

    # Robots

    def make_state(self) -> torch.Tensor | None:
        return self.normal(self.config.max_state_dim) if get(self.config, "max_state_dim") else None

    def make_actions(self) -> torch.Tensor:
        return self.normal(self.config.chunk_size, self.config.max_action_dim)

    def make_timestep(self) -> torch.Tensor | None:
        return self.uniform() if get(self.config, "max_action_dim") else None

    # Labels

    def make_noise(self) -> torch.Tensor:
        if get(self.config, "max_action_dim"):
            return self.normal(self.config.chunk_size, self.config.max_action_dim)
        if self.name.startswith("Hiera"):
            return self.uniform(math.prod(self.model.hiera.embeddings.patch_embeddings.mask_spatial_shape))
        return self.uniform(self.patch_count)

    @property
    def patch_count(self) -> int:
        _, height, width = self.image_shape()
        patch = self.size("patch_size", default=16)
        frames = (
            self.size("num_frames", default=1) // self.size("tubelet_size", default=1)
            if self.get("tubelet_size")
            else 1
        )
        return (height // patch) * (width // patch) * max(1, frames)

    def make_return_loss(self) -> list[bool] | None:
        default = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters["return_loss"].default
        return None if default is True else [True]  # a list: stacked, it would be a tensor of several truth values

    def make_next_sentence_label(self) -> torch.Tensor:
        return self.ints(0, 2)

    make_sentence_order_label = make_matched_label = make_sentence_image_labels = make_mc_labels = (
        make_next_sentence_label
    )

    def make_mc_token_ids(self) -> torch.Tensor:
        return torch.full((2,), LENGTH - 1)

    def make_start_positions(self) -> torch.Tensor:
        """Some lie beyond the sequence and are ignored, where no head looks the place up."""
        if self.index % 3 == 0 and self.index and "cls_index" not in self.parameters and self.head != "pre-training":
            return self.shaped(torch.tensor(5 * LENGTH))
        return self.shaped(torch.tensor(min(self.index, LENGTH - 6) + 1))

    def make_end_positions(self) -> torch.Tensor:
        return self.shaped(torch.tensor(min(self.index + 2, LENGTH - 4)))

    def shaped(self, position: torch.Tensor) -> torch.Tensor:
        return position[None] if "question_positions" in self.parameters and self.head == "pre-training" else position

    def make_question_positions(self) -> torch.Tensor | None:
        return torch.tensor([1]) if self.head == "pre-training" else None

    def make_bool_masked_pos(self) -> torch.Tensor | None:
        count = self.patch_count
        if self.name.startswith("SegGpt"):  # of the prompt, which is as large again, nothing is masked
            return torch.arange(2 * count) >= 2 * count - max(1, count * self.kept // 13)
        mask = torch.zeros(count, dtype=torch.bool)
        # a VideoMAE needs as many in every row
        masked = count // 2 if "VideoMAE" in self.name else max(1, count * self.kept // 13)
        mask[torch.randperm(count, generator=self.generator)[:masked]] = True
        return mask

    def make_class_labels(self) -> torch.Tensor:
        return self.objects["class_labels"]

    def make_mask_labels(self) -> torch.Tensor:
        return self.objects["masks"]

    def make_ans(self) -> torch.Tensor:
        return self.ints(0, self.size("num_qa_labels", default=2))

    def make_labels(self) -> Any:
        for expression, maker in self.LABELS_OF.items():
            if re.match(expression, self.name):
                return maker(self)
        by_head = getattr(self, "labels_of_" + self.head.replace(" ", "_"), None)
        return self.labels_of_tokens() if by_head is None else by_head()

    def labels_of_class(self) -> torch.Tensor:
        return self.ints(0, self.classes)

    labels_of_sequence_classification = labels_of_image_classification = labels_of_audio_classification = (
        labels_of_class
    )
    labels_of_video_classification = labels_of_image_and_text_classification = labels_of_speaker_verification = (
        labels_of_class
    )

    def labels_of_multiple_choice(self) -> torch.Tensor:
        return self.ints(0, 3)

    def labels_of_next_sentence_prediction(self) -> torch.Tensor:
        return self.ints(0, 2)

    def labels_of_audio_frame_classification(self) -> torch.Tensor:
        return torch.eye(self.classes)[self.ints(0, self.classes, self.frames)]

    def labels_of_semantic_segmentation(self) -> torch.Tensor:
        _, height, width = self.image_shape()
        labels = self.ints(0, self.classes, height, width)
        labels.view(-1)[height * width * self.kept // 13 :] = self.size(
            "semantic_loss_ignore_index", "ignore_index", default=255
        )
        return labels

    labels_of_depth_estimation = labels_of_semantic_segmentation

    def labels_of_object_detection(self) -> Any:
        return self.objects

    def labels_of_instance_segmentation(self) -> Any:
        return self.objects

    @property
    def objects(self) -> dict[str, torch.Tensor]:
        """Boxes and masks in an image, as many as this row has."""
        if self._objects[0] != self.index:
            count = (2, 5, 3, 5, 2, 3, 4, 2)[self.index % 8]
            centers, sizes = 0.3 + 0.4 * self.uniform(count, 2), 0.1 + 0.3 * self.uniform(count, 2)
            found = {"class_labels": self.ints(0, self.classes, count), "boxes": torch.cat([centers, sizes], dim=-1)}
            if self.head == "instance segmentation":
                found["masks"] = (self.uniform(count, *self.image_shape()[1:]) < 0.4).float()
            self._objects = (self.index, found)
        return self._objects[1]

    def labels_of_CTC(self) -> torch.Tensor:
        labels = self.ids(LENGTH)
        labels[max(1, self.kept // 3) :] = -100
        return labels

    def labels_of_codebooks(self, count: int, is_last: bool, below: int) -> torch.Tensor:
        """Codes at each position, of the text or of its first few."""
        labels = self.ids(LENGTH, count, below=below)
        labels[self.kept :] = -100
        return labels if is_last else labels.T.contiguous()

    def labels_of_codes(self) -> torch.Tensor:
        labels = self.ids(LENGTH)
        labels[self.kept :] = -100
        return labels

    def labels_of_dia(self) -> torch.Tensor:
        return self.labels_of_codebooks(
            self.size("num_channels", default=9), False, self.size("vocab_size", default=32)
        )

    def labels_of_csm(self) -> torch.Tensor:
        return self.labels_of_codebooks(self.config.num_codebooks, True, 32)

    def labels_of_musicgen(self) -> torch.Tensor:
        return self.labels_of_codebooks(self.size("num_codebooks", default=4), True, 32)

    def labels_of_transducer(self) -> torch.Tensor:
        labels = self.ids(LENGTH)
        labels[max(1, self.kept // 3) :] = self.config.blank_token_id
        return labels

    def labels_of_padded_text(self) -> torch.Tensor:
        """Where the labels go into a decoder as they are: padding instead of -100."""
        labels = self.ids(LENGTH)
        labels[self.kept :] = self.token_id("pad_token_id") or 0
        return labels

    def labels_of_spectrogram(self) -> torch.Tensor:
        labels = self.normal(LENGTH, self.size("num_mel_bins", default=16))
        labels[self.kept :] = -100.0
        return labels

    def labels_of_entities(self) -> torch.Tensor:
        return self.ints(0, self.classes, 2)

    def labels_of_answer(self) -> torch.Tensor:
        return self.ints(0, self.size("num_qa_labels", default=self.classes))

    def labels_of_soft_answer(self) -> torch.Tensor:
        return torch.softmax(self.normal(self.classes), dim=-1)

    def labels_of_regions(self) -> torch.Tensor:
        return torch.softmax(self.normal(4, 4), dim=-1)

    def labels_of_text_and_visuals(self) -> torch.Tensor:
        return torch.cat([self.labels_of_tokens(), torch.full((4,), -100)])

    def labels_of_mask(self) -> torch.Tensor:
        return (self.uniform(*self.image_shape()[1:]) < 0.1 * self.kept / 2).float()

    def labels_of_times(self) -> torch.Tensor:
        begin = 0.5 * self.uniform()
        return torch.stack([torch.tensor(10.0), begin, begin + 0.3])

    def labels_of_pose_estimation(self) -> torch.Tensor:
        with torch.no_grad():
            return self.uniform(*self.model(self.row["pixel_values"][None]).heatmaps.shape[1:])

    def labels_of_links(self) -> torch.Tensor:
        """The token that follows each one; a token cannot follow itself, nor padding anything."""
        return (torch.arange(LENGTH) + 1) % (LENGTH - 3)

    def labels_of_picture(self) -> torch.Tensor:
        return self.normal(*self.image_shape())

    LABELS_OF: ClassVar[dict[str, Callable[[Maker], Any]]] = {  # by the beginning of a class's name
        "Dia": labels_of_dia,
        "CsmForConditional": labels_of_csm,
        "Musicgen": labels_of_musicgen,
        "BlipForQuestionAnswering|Rag": labels_of_padded_text,
        "SpeechT5ForTextToSpeech|SpeechT5ForSpeechToSpeech": labels_of_spectrogram,
        "LukeForEntitySpan": labels_of_entities,
        "LxmertForQuestionAnswering": labels_of_answer,
        "ViltForQuestionAnswering|VisualBertForQuestionAnswering": labels_of_soft_answer,
        "VisualBertForRegion": labels_of_regions,
        "VisualBertForPreTraining": labels_of_text_and_visuals,
        "CLIPSeg": labels_of_mask,
        "Tvp": labels_of_times,
        "BrosSpadeEL": labels_of_links,
        "SegGpt": labels_of_picture,
    }

    def labels_of_tokens(self) -> torch.Tensor:
        """Those of the row's first positions, with nothing to predict at padding and images."""
        if self.input_codebooks:
            return self.labels_of_codes()
        has_decoder = "decoder_input_ids" in self.parameters and not re.match("Blip2|InstructBlip", self.name)
        is_own = "input_ids" in self.row and not has_decoder
        labels = self.row["input_ids"].clone() if is_own else self.ids(LENGTH)
        if self.head == "token classification":
            labels = labels % self.classes
        media = labels.shape[-1] - LENGTH
        labels[..., :media] = -100
        labels[..., media + min(self.kept, self.end if is_own else LENGTH) :] = -100
        return labels


def get(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # an attribute that varies over the layers
        return None


def text_config_of(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # several: the decoder's is what predicts
        return config.get_text_config(decoder=True)


def count_of(features: Any) -> int:
    """How many vectors there are in what a model makes of an image."""
    if isinstance(features, torch.Tensor):
        return features.numel() // features.shape[-1]
    if isinstance(features, Mapping) or hasattr(features, "pooler_output"):
        pooled = getattr(features, "pooler_output", None)
        return count_of(pooled if pooled is not None else features.last_hidden_state)
    return sum(count_of(feature) for feature in features)


def special_ids(config: Any) -> set[int]:
    """Token ids with a meaning of their own."""
    found: set[int] = set()
    for part in configs_of(config):
        for name, value in vars(part).items():
            if re.fullmatch(r".*(token_ids?|token_index|_token)", name):
                values = value if isinstance(value, (list, tuple)) else [value]
                found |= {v for v in values if isinstance(v, int) and not isinstance(v, bool)}
    return found
