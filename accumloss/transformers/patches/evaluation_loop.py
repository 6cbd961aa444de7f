"""Trainer's evaluation loop, whose loss is that of the whole set (evaluation.py)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..._compat import class_of
from ...sums import TokenSums
from .. import counting, known, objective, rebind, terms, tracked
from .. import evaluation as evaluations
from .. import step as steps
from ..models import OURS_TO_KNOW, base_model, counted_rule, is_overridden, is_sum_over_examples
from ..ranks import first_rows, is_sharded_later, largest, real_rows, sum_over_ranks
from ..registration import Patches
from ..settings import settings
from ..state import is_covered, state_of
from . import originals
from .compute_loss import share


def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
    original = originals["evaluation_loop"]
    if not is_covered(self) or not settings.evaluation or self.args.n_gpu > 1:
        return original(self, *args, **kwargs)
    rebind.rebind_for(self, base_model(self))
    evaluation = evaluations.Evaluation(settings.metrics, self.args.logging_nan_inf_filter)
    evaluation.model = base_model(self)
    with Patches() as patches, steps.entered(evaluation):
        # of the instance; a subclass may have others than Trainer
        predict = functools.partial(_prediction_step, self, evaluation, self.prediction_step)
        patches.bind(self, "prediction_step", predict)
        if is_overridden(self, "compute_loss"):
            patches.bind(self, "compute_loss", functools.partial(_evaluated, self, evaluation, self.compute_loss))
        output = original(self, *args, **kwargs)
    chosen = evaluation.agree_on_schemes(functools.partial(largest, self))
    _tell_evaluation(self, evaluation, chosen)
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    prefix = given.get("metric_key_prefix", "eval")
    if output.metrics is not None and f"{prefix}_loss" in output.metrics:
        results = evaluation.results(lambda sums: sum_over_ranks(self, sums), chosen)
        output.metrics.update({f"{prefix}_{name}": value for name, value in results.items()})
    return output


def _prediction_step(
    trainer: Any,
    evaluation: evaluations.Evaluation,
    predict: Callable[..., Any],
    model: Any,
    inputs: Any,
    prediction_loss_only: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Trainer's, of any class, whose loss goes into the evaluation."""

    written = evaluation.known = state_of(trainer).look_up(trainer, inputs)

    def show(sums: TokenSums) -> None:
        evaluation.token_sums = evaluation.token_sums or sums

    is_sharded = is_sharded_later(trainer)

    def called(inputs: Any, loss_only: bool) -> Any:
        inputs = counting.like(inputs, counting.whole(inputs)) if is_sharded else inputs  # in place
        evaluation.begin(inputs)
        shown = show if evaluation.metrics else None
        with known.parts(trainer, written), known.tokens_shown(model, written, shown):
            return predict(model, inputs, loss_only, *args, **kwargs)

    with _smoothed_in_kernel(trainer, evaluation, prediction_loss_only):
        predicted = called(inputs, prediction_loss_only)
    if predicted[0] is None:
        return tracked.plain(predicted)
    loss = predicted[0].mean()
    predicted = tracked.plain(predicted)
    real, are_all_real = real_rows(trainer, inputs)
    if evaluation.is_looking:
        evaluation.look(loss, functools.partial(largest, trainer))
    if not are_all_real:  # rows that fill the last batch up are in the set already
        inputs = first_rows(inputs, max(real, 1))
        loss = called(inputs, True)[0].mean()
        if evaluation.has_loops:
            evaluation.take_loops_out(loss)
    if evaluation.is_linear:
        amount = evaluation.amount or _amount_of_rest(trainer, evaluation) or _amount(trainer, evaluation)
    else:
        amount = evaluations.Amount(*[float(counting.num_rows(evaluation.inputs))] * 2)
    evaluation.add(loss, amount, is_real=real > 0)
    return predicted


def _tell_evaluation(trainer: Any, evaluation: evaluations.Evaluation, chosen: list[int | None]) -> None:
    """Says what of an evaluation may depend on the size of its batches."""
    if evaluation.known is not None:
        if evaluation.known.coupled:
            objective.tell_evaluation(trainer, state_of(trainer).warned, evaluation.known.coupled)
        return
    knows = state_of(trainer).measured.rest or evaluation.is_by_number or not _is_somebodys_own(trainer)
    reasons = sorted(evaluation.coupled)
    if not evaluation.is_linear:
        reasons.append(objective.NOT_LINEAR)
    elif not knows and evaluation.depends_on_batches(chosen):
        reasons.append(objective.OF_NO_TERM)
    if reasons:
        objective.tell_evaluation(trainer, state_of(trainer).warned, "; ".join(reasons))


@contextmanager
def _smoothed_in_kernel(trainer: Any, evaluation: evaluations.Evaluation, prediction_loss_only: bool) -> Iterator[None]:
    """Seq2SeqTrainer smooths the logits beside a generation itself, as a mean of the batch: here the model's loss does."""
    smoother = trainer.label_smoother
    generates = getattr(trainer.args, "predict_with_generate", False) and not prediction_loss_only
    if smoother is None or not generates:
        yield
        return
    trainer.label_smoother, evaluation.label_smoothing = None, smoother.epsilon
    try:
        yield
    finally:
        trainer.label_smoother, evaluation.label_smoothing = smoother, 0.0


def _evaluated(
    trainer: Any, evaluation: evaluations.Evaluation, theirs: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The outermost compute_loss of somebody's own, in an evaluation: whether it makes use of the items that it is given."""
    given = kwargs.get("num_items_in_batch")
    inputs: Any = kwargs.get("inputs", args[1] if len(args) > 1 else None)
    labels = counting.entries_of(inputs).get("labels")
    if given is None or not isinstance(labels, torch.Tensor) or objective.is_compiled(trainer):
        return theirs(*args, **kwargs)
    items = objective.Items.of(given, objective.per_micro_batch(given, 1))
    evaluation.main = counted_rule(trainer, inputs)
    result = theirs(*args, **{**kwargs, "num_items_in_batch": items})
    evaluation.is_touched = items.is_touched or items.is_taken
    evaluation.is_by_number = evaluation.is_by_number or evaluation.is_touched
    return result


def _is_somebodys_own(trainer: Any) -> bool:
    """Whether the loss of an evaluation is computed by other code than Trainer's and transformers'."""
    import transformers

    own = transformers.Trainer.prediction_step, transformers.Seq2SeqTrainer.prediction_step
    is_own = is_overridden(trainer, "compute_loss") or type(trainer).prediction_step not in own
    return (
        is_own
        or trainer.compute_loss_func is not None
        or not class_of(base_model(trainer)).__module__.startswith(OURS_TO_KNOW)
    )


def _amount_of_rest(trainer: Any, evaluation: evaluations.Evaluation) -> evaluations.Amount | None:
    """What a batch weighs where it is written down, or was measured, what the rest of the loss is a mean over."""
    written = evaluation.known
    if written is not None:
        over = written.over if written.evaluated_over is None else written.evaluated_over
    else:
        over = next(iter(state_of(trainer).measured.rest), None)
        if not isinstance(over, counting.Rule) or not isinstance(evaluation.inputs.get(over.key), torch.Tensor):
            return None
    rows = evaluation.share_of_rows()
    if over == terms.SUM_WEIGHS:
        return evaluations.Amount(1.0, rows)
    items = rows if over is None or isinstance(over, str) else over.total(evaluation.inputs)
    return evaluations.Amount(items, items)


def _amount(trainer: Any, evaluation: evaluations.Evaluation) -> evaluations.Amount:
    """What a batch weighs in the set, besides its terms: its rows, mostly."""
    rows = evaluation.share_of_rows()
    if evaluation.is_touched and evaluation.main is not None:
        of_main = evaluation.main.total(evaluation.inputs)
        return evaluations.Amount(of_main, of_main)
    if is_sum_over_examples(base_model(trainer)):
        return evaluations.Amount(1.0, rows)
    items = share(evaluation, evaluation.calls > 0)
    if items is None:
        main = None if evaluation.calls or evaluation.summed else evaluation.main
        evaluation.is_by_number = evaluation.is_by_number or main is not None
        items = rows if main is None else main.total(evaluation.inputs)
    return evaluations.Amount(items, items)
