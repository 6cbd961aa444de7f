"""Trainers of known libraries: what their losses are means over, written down, so that nothing of theirs has to be measured.

The table below is by the class that computes the loss, and by the loss that it was configured with. It was found by
``python -m accumloss audit --trainers``, whose result is docs/trainers.md. A Trainer that overrides what computes the loss is
none of the table's; neither is one of another major version than those that it was measured with.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..sums import TokenSums
from . import step as steps
from .counting import Rule
from .registration import Patches
from .terms import ROWS_WEIGH, SUM_WEIGHS, Measured, Weight

MEASURED_WITH = {"trl": 1, "sentence_transformers": 6}  # the major versions


class Items(NamedTuple):
    """What a mean is over that no Rule counts."""

    key: str  # the entry it is counted in
    what: str
    count_in: Callable[[Any], float]  # the entry

    def total(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return torch.tensor(float(self.count_in(batch[self.key])), dtype=torch.float64)


class Known(NamedTuple):
    """What the loss of a Trainer is a mean over.

    Attributes:
        over: what is in no part, and in no loss that is recognised; None: it honours num_items_in_batch, or its rows are as
            many in every micro-batch.
        evaluated_over: the same in an evaluation, where it is something else.
        calls: of recognised losses whose labels come from no entry of the batch: (("mean", number of the call), weight).
        parts: attributes of the Trainer, or of its arguments, that are the factor of a part of the loss, and what that part
            is a mean over; a tuple where the attribute is a list of factors.
        coupled: why no split of a batch is exact; empty where there is one.
        window: the micro-batches of the step that the Trainer is in, where it makes them itself.
        is_counted_often: the micro-batches of a step are made of one batch, whose labels Trainer counts once for each.
        has_own_step: its training_step does everything, and does not divide by the micro-batches.
        shows_tokens: its model returns the entropy of each token, and whether it was right.
    """

    over: Weight | Items | None = None
    evaluated_over: Weight | Items | None = None
    calls: tuple[tuple[Any, Weight], ...] = ()
    parts: tuple[tuple[str, Any], ...] = ()
    coupled: str = ""
    window: Callable[[Any], Sequence[Mapping[str, Any]]] | None = None
    is_counted_often: bool = False
    has_own_step: bool = False
    shows_tokens: bool = False

    @property
    def measured(self) -> Measured:
        rest: Any = () if self.over is None else (self.over,)
        return Measured(rest, tuple((call, (weight,)) for call, weight in self.calls))

    def fits(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the entries are there that are counted."""
        weights = [self.over, self.evaluated_over, *(weight for _, weight in self.calls)]
        for _, over in self.parts:
            weights += over if isinstance(over, tuple) and not hasattr(over, "total") else [over]
        return all(weight.key in inputs for weight in weights if isinstance(weight, (Rule, Items)))


def look_up(trainer: Any, inputs: Any) -> Known | None:
    """What is known of a Trainer; inputs: a micro-batch as compute_loss gets it."""
    found = _entry(trainer)
    if found is None or not isinstance(inputs, Mapping):
        return None
    known = found(trainer, inputs)
    return known if known is not None and known.fits(inputs) else None


def _entry(trainer: Any) -> Callable[[Any, Any], Known | None] | None:
    """The table's entry for the class whose loss a Trainer computes."""
    own = vars(trainer).get("compute_loss")
    while isinstance(own, functools.partial) and own.args:  # ours around it
        own = own.args[-1]
    if own is not None and getattr(own, "__func__", None) is not type(trainer).compute_loss:
        return None
    if trainer.compute_loss_func is not None and not isinstance(trainer.compute_loss_func, str):
        return None
    if getattr(trainer.args, "use_liger_kernel", False):
        return None
    for cls in type(trainer).__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if name in TABLE:
            return TABLE[name] if _is_measured(cls.__module__.partition(".")[0]) else None
        if any("loss" in method or method in COMPUTE_IT for method in vars(cls)):
            return None
    return None


# methods of a Trainer that have a part in its loss, besides those that are called so
COMPUTE_IT = ("concatenated_forward", "get_batch_logps", "_prepare_inputs", "collect_features", "odds_ratio")


@functools.cache
def _is_measured(package: str) -> bool:
    try:
        version = importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return version.partition(".")[0] == str(MEASURED_WITH[package])


# Parts of a loss ------------------------------------------------------------------------------------------------------


class Factor(float):
    """A number whose product with a tensor is the part of a loss that it is the factor of; in anything else the number."""

    over: Any
    name: str

    @staticmethod
    def of(value: float, over: Any, name: str) -> Factor:
        factor = Factor(value)
        factor.over, factor.name = over, name
        return factor

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, torch.Tensor):
            return float(self) * other
        over, name = self.over, self.name
        return steps.part(other * float(self), lambda step: step.share_of_weights((over,), name), name)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            one, other = args
            return other * one if isinstance(other, Factor) else one * other
        plain = [float(value) if isinstance(value, Factor) else value for value in args]
        return func(*plain, **{k: float(v) if isinstance(v, Factor) else v for k, v in (kwargs or {}).items()})


_PRODUCTS = (torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul)


@contextmanager
def parts(trainer: Any, known: Known | None) -> Iterator[None]:
    """While a loss is computed: its parts weigh as their items do."""
    patches = Patches()
    for name, over in () if known is None else known.parts:
        owner = trainer.args if name.startswith("args.") else trainer
        attribute = name.removeprefix("args.")
        value = getattr(owner, attribute)
        if isinstance(value, (list, tuple)):
            ours: Any = [Factor.of(v, o, f"{attribute}[{i}]") for i, (v, o) in enumerate(zip(value, over, strict=True))]
        else:
            ours = Factor.of(value, over, attribute)
        patches.bind(owner, attribute, ours)
    with patches:  # one that was adapted meanwhile stays as it is
        yield


@contextmanager
def tokens_shown(model: Any, known: Known | None, show: Callable[[TokenSums], None] | None) -> Iterator[None]:
    """Shows the sums over the tokens that a model returns beside its log-probabilities, once."""
    if known is None or not known.shows_tokens or show is None:
        yield
        return

    def look(module: Any, args: Any, output: Any) -> None:
        mask, right, entropy = (getattr(output, name, None) for name in ("label_mask", "is_top1", "entropy"))
        if mask is not None and right is not None and entropy is not None:
            with torch.no_grad():
                items = mask.sum()
                show(
                    TokenSums(entropy.new_zeros(()), items, items, (right & mask.bool()).sum(), entropy.detach().sum())
                )

    handle = model.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


# The table ------------------------------------------------------------------------------------------------------------

ROUTER = "the router's load balancing loss couples the tokens of a micro-batch"
LABELS = Rule("labels", 1)


def _router(trainer: Any) -> str:
    return ROUTER if getattr(trainer, "aux_loss_enabled", False) else ""


def _sft(trainer: Any, inputs: Any) -> Known:
    return Known(evaluated_over=LABELS, coupled=_router(trainer), shows_tokens=True)


SORTS = {"aot": "it sorts the rows of a micro-batch", "aot_unpaired": "it sorts the rows of a micro-batch"}


def _dpo(trainer: Any, inputs: Any) -> Known:
    chosen = Rule("completion_mask", 1, 0, half=0)
    over = tuple(chosen if loss == "sft" else ROWS_WEIGH for loss in trainer.loss_types)
    coupled = [SORTS[loss] for loss in trainer.loss_types if loss in SORTS]
    return Known(ROWS_WEIGH, parts=(("loss_weights", over),), coupled=_router(trainer) or "".join(coupled[:1]))


def _rows(trainer: Any, inputs: Any) -> Known:
    return Known(ROWS_WEIGH, coupled=_router(trainer))


def _kto(trainer: Any, inputs: Any) -> Known:
    baseline = "its baseline is the mean KL divergence of a micro-batch" if trainer.loss_type == "kto" else ""
    return Known(ROWS_WEIGH, coupled=_router(trainer) or baseline)


def _buffered(trainer: Any) -> Sequence[Mapping[str, Any]]:
    """The micro-batches of a step, out of those that were generated at once."""
    made, k = trainer._buffered_inputs, max(trainer.current_gradient_accumulation_steps, 1)
    here = trainer._step % len(made)
    return made[here - here % k : here - here % k + k]


def _grpo(trainer: Any, inputs: Any) -> Known:
    tokens = Rule("completion_mask", 0, 0, mask="tool_mask" if "tool_mask" in inputs else None)
    coupled = _router(trainer)
    if getattr(trainer, "top_entropy_quantile", 1.0) < 1.0:
        coupled = coupled or "which tokens have the most entropy is asked within a micro-batch"
    bonus = (("entropy_coef", tokens),) if getattr(trainer, "_entropy_bonus_enabled", False) else ()
    is_over_tokens = trainer.loss_type == "bnpo"
    return Known(tokens if is_over_tokens else None, parts=bonus, coupled=coupled, window=_buffered)


def _left(trainer: Any, inputs: Any) -> Known:
    """It is exact: rows of as many in each micro-batch, or sums divided by what the step holds."""
    return Known(coupled=_router(trainer))


def _orpo(trainer: Any, inputs: Any) -> Known:
    """Its cross-entropy is over prompt and completion of the chosen rows."""
    chosen = Rule("chosen_labels") if trainer.is_encoder_decoder else Rule("chosen_attention_mask", 1, 0)
    return Known(ROWS_WEIGH, calls=((("mean", 1), chosen),), coupled=_router(trainer))


def _cpo(trainer: Any, inputs: Any) -> Known:
    chosen = Rule("chosen_labels", 0 if trainer.is_encoder_decoder else 1)
    return Known(ROWS_WEIGH, calls=((("mean", 1), chosen),), coupled=_router(trainer))


def _tpo(trainer: Any, inputs: Any) -> Known:
    reference = Rule("completion_mask", 1, 0, half=2, of=3)
    return Known(ROWS_WEIGH, calls=((("mean", 1), reference),), coupled=_router(trainer))


def _distilled(trainer: Any, inputs: Any) -> Known:
    """It honours num_items_in_batch in training, and is a mean over the labels of a batch in an evaluation."""
    return Known(evaluated_over=LABELS)


def _off_one_batch(trainer: Any, inputs: Any) -> Known:
    return Known(evaluated_over=LABELS, is_counted_often=True)


def _gold(trainer: Any, inputs: Any) -> Known | None:
    if not trainer.use_uld_loss or trainer.teacher_tokenizer is None:
        return _off_one_batch(trainer, inputs)
    return Known(ROWS_WEIGH)


def _online(trainer: Any, inputs: Any) -> Known:
    return Known(ROWS_WEIGH, has_own_step=True)


def _sdpo(trainer: Any, inputs: Any) -> Known:
    tokens = Rule("completion_mask", 0, 0)
    is_over_tokens = trainer.loss_type in ("bnpo", "dapo") and trainer.args.distillation_weight < 1.0
    mixes = is_over_tokens and trainer.args.distillation_weight > 0.0
    distilled = (("args.distillation_weight", ROWS_WEIGH),) if mixes else ()
    return Known(tokens if is_over_tokens else None, parts=distilled, window=_buffered if is_over_tokens else None)


# What sentence-transformers' losses average over. Coupled ones weigh as their rows.
IN_BATCH = "the rows of a micro-batch are each other's negatives"
MINES = "it looks for its pairs or triplets within a micro-batch"
RANKS = "it compares all pairs of rows of a micro-batch"
LAYERS = "it draws layers at random for each micro-batch"
DIMENSIONS = "it draws dimensions at random for each micro-batch"
STATISTIC = "it is a statistic of the embeddings of a micro-batch"


def _pairs_of(labels: Any) -> float:
    """Pairs of documents of one query of which one is more relevant."""
    return sum(float((of[:, None] > of[None, :]).sum()) for of in labels)


def _weight_of_loss(loss: Any, inputs: Mapping[str, Any]) -> Known | None:
    name = type(loss).__name__
    if type(loss).__module__.partition(".")[0] != "sentence_transformers":
        return None  # somebody's own
    if name in LOSSES:
        over, coupled = LOSSES[name]
        return Known(over, coupled=coupled)
    labels = next((key for key in ("labels", "label", "score", "scores") if key in inputs), "labels")
    if name == "ContrastiveLoss":
        return Known(ROWS_WEIGH if loss.size_average else SUM_WEIGHS)
    if name == "ADRMSELoss":
        return Known(Items(labels, "documents", lambda rows: sum(len(row) for row in rows)))
    if name in ("LambdaLoss", "RankNetLoss"):
        scheme = type(loss.weighting_scheme).__name__
        if loss.k is not None or scheme == "NDCGLoss1Scheme":
            return None
        return Known(Items(labels, "pairs of documents", _pairs_of))
    if name == "DenoisingAutoEncoderLoss":
        columns = [key for key in inputs if key.endswith("input_ids")]
        if loss.need_retokenization or len(columns) != 2:
            return None
        return Known(Rule(columns[1], 1, loss.tokenizer_decoder.pad_token_id))
    if name in ("MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss"):
        return _of_wrapper(loss, name, inputs)
    if name in ("SpladeLoss", "CachedSpladeLoss"):
        return Known(ROWS_WEIGH, coupled="its regularizer is the square of a mean over the rows of a micro-batch")
    return None


def _of_wrapper(loss: Any, name: str, inputs: Mapping[str, Any]) -> Known | None:
    """A loss around another: of several layers or dimensions."""
    inner = _weight_of_loss(loss.loss, inputs)
    if inner is None or inner.over != ROWS_WEIGH:
        return None
    draws = ""
    if getattr(loss, "n_dims_per_step", -1) not in (-1, None) and loss.n_dims_per_step > 0:
        draws = DIMENSIONS
    if getattr(loss, "n_layers_per_step", -1) not in (-1, None) and loss.n_layers_per_step > 0:
        draws = LAYERS
    return inner._replace(coupled=inner.coupled or draws)


LOSSES: dict[str, tuple[Weight, str]] = {
    **dict.fromkeys(
        (
            "CosineSimilarityLoss", "TripletLoss", "MarginMSELoss", "MSELoss", "DistillKLDivLoss", "EmbedDistillLoss",
            "SoftmaxLoss", "BinaryCrossEntropyLoss", "CrossEntropyLoss", "ListMLELoss", "PListMLELoss", "ListNetLoss",
            "SparseCosineSimilarityLoss", "SparseTripletLoss", "SparseMarginMSELoss", "SparseMSELoss",
            "SparseDistillKLDivLoss", "MultiVectorMarginMSELoss", "MultiVectorDistillKLDivLoss",
        ),
        (ROWS_WEIGH, ""),
    ),
    "ContrastiveTensionLoss": (SUM_WEIGHS, ""),
    **dict.fromkeys(
        (
            "MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss", "GISTEmbedLoss",
            "CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss", "CachedGISTEmbedLoss",
            "ContrastiveTensionLossInBatchNegatives", "SparseMultipleNegativesRankingLoss",
            "MultiVectorMultipleNegativesRankingLoss", "CachedMultiVectorMultipleNegativesRankingLoss",
            "MegaBatchMarginLoss",
        ),
        (ROWS_WEIGH, IN_BATCH),
    ),
    **dict.fromkeys(
        (
            "OnlineContrastiveLoss", "BatchAllTripletLoss", "BatchHardTripletLoss", "BatchSemiHardTripletLoss",
            "BatchHardSoftMarginTripletLoss",
        ),
        (ROWS_WEIGH, MINES),
    ),
    **dict.fromkeys(("CoSENTLoss", "AnglELoss", "SparseCoSENTLoss", "SparseAnglELoss"), (ROWS_WEIGH, RANKS)),
    **dict.fromkeys(
        ("GlobalOrthogonalRegularizationLoss", "FlopsLoss", "CSRLoss", "CSRReconstructionLoss"),
        (ROWS_WEIGH, STATISTIC),
    ),
}  # fmt: skip


def _embedded(trainer: Any, inputs: Any) -> Known | None:
    losses = list(trainer.loss.values()) if isinstance(trainer.loss, dict) else [trainer.loss]
    found = [_weight_of_loss(loss, inputs) for loss in losses]
    if not found or found[0] is None or any(known != found[0] for known in found):
        return None
    return found[0]


_TRL, _EXPERIMENTAL, _ST = "trl.trainer.", "trl.experimental.", "sentence_transformers."
TABLE: dict[str, Callable[[Any, Any], Known | None]] = {
    _TRL + "sft_trainer.SFTTrainer": _sft,
    _TRL + "dpo_trainer.DPOTrainer": _dpo,
    _TRL + "reward_trainer.RewardTrainer": _rows,
    _TRL + "kto_trainer.KTOTrainer": _kto,
    _TRL + "grpo_trainer.GRPOTrainer": _grpo,
    _TRL + "rloo_trainer.RLOOTrainer": _left,
    _TRL + "distillation_trainer.DistillationTrainer": _left,
    _EXPERIMENTAL + "gmpo.gmpo_trainer.GMPOTrainer": _left,
    _EXPERIMENTAL + "orpo.orpo_trainer.ORPOTrainer": _orpo,
    _EXPERIMENTAL + "cpo.cpo_trainer.CPOTrainer": _cpo,
    _EXPERIMENTAL + "tpo.tpo_trainer.TPOTrainer": _tpo,
    _EXPERIMENTAL + "gkd.gkd_trainer.GKDTrainer": _distilled,
    _EXPERIMENTAL + "gold.gold_trainer.GOLDTrainer": _gold,
    _EXPERIMENTAL + "iw_opd.iw_opd_trainer.IWOPDTrainer": _off_one_batch,
    _EXPERIMENTAL + "online_dpo.online_dpo_trainer.OnlineDPOTrainer": _online,
    _EXPERIMENTAL + "a2po.a2po_trainer.A2POTrainer": _rows,
    _EXPERIMENTAL + "sdft.sdft_trainer.SDFTTrainer": _left,
    _EXPERIMENTAL + "sdpo.sdpo_trainer.SDPOTrainer": _sdpo,
    _ST + "base.trainer.BaseTrainer": _embedded,
    _ST + "sentence_transformer.trainer.SentenceTransformerTrainer": _embedded,
    _ST + "sparse_encoder.trainer.SparseEncoderTrainer": _embedded,
    _ST + "cross_encoder.trainer.CrossEncoderTrainer": _embedded,
    _ST + "multi_vector_encoder.trainer.MultiVectorEncoderTrainer": _embedded,
}


def own_step(trainer: Any, step: steps.Step, theirs: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A training_step that does everything by itself: what it calls backward on, and returns, is this micro-batch's part."""
    factor = step.share_of_rows() / step.micro_batches
    backward = trainer.accelerator.backward
    with Patches() as patches:
        patches.bind(trainer.accelerator, "backward", lambda loss, **more: backward(loss * factor, **more))
        return theirs(*args, **kwargs) * factor
