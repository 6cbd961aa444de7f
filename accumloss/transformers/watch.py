"""Looks at the steps of a Trainer: says what of them is not exact by construction, and measures it where it was asked to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .._compat import class_of, dataloaders_of, uncompiled
from . import counting, coupled, objective, probe, terms
from . import step as steps
from .models import REMEDIES, base_model, bypassing_library, counted_rule, is_overridden
from .ranks import averaged_losses
from .settings import settings
from .state import State, is_covered, state_of


def look_at(trainer: Any, state: State, step: steps.Step) -> None:
    """At the end of a window: says once what of the step is not exact by construction."""
    window = state.window
    if state.known is not None and state.known.coupled and (step.micro_batches > 1 or trainer.args.world_size > 1):
        objective.tell(trainer, state.warned, state.known.coupled, settings.verify == "error", "differs")
    for reason in step.ambiguous - state.warned:
        state.warned |= {reason, "ambiguous"}
        objective.tell(trainer, set(), reason, settings.verify == "error")
    if window is None:
        return
    window.seen += 1
    if state.check.is_done:
        if window.seen == len(window.fetched):
            state.end_window()
        return
    if not (step.is_computed or step.terms or step.calls):
        state.check.blame("training_step computes it without compute_loss, by nothing that was recognised")
    if trainer.args.n_gpu > 1:
        for reason in unseen_in_replicas(step):
            state.check.blame(reason)
    if window.seen < len(window.fetched):
        return
    if len(window.fetched) == 1 and trainer.args.world_size == 1 and trainer.args.n_gpu <= 1:
        state.check, state.schemes = objective.Check(), terms.Schemes()  # nothing was accumulated
        return
    for reason in state.schemes.ends_of_window(window.batches):
        state.check.blame(reason)
    smallest = min(counting.num_rows(batch) for batch in window.batches)
    why = coupled.why(class_of(base_model(trainer)).__name__, smallest)
    for reason in probe.coupling(base_model(trainer)) | ({why} if why else set()):
        state.check.blame(reason)
    reasons = state.check.end()
    state.end_window()
    found = state.verification
    if found is not None and found.is_exact is not None:
        before, state.doubts = state.doubts, reasons if state.doubts is None else state.doubts
        if before is not None and reasons - before:
            reason = (
                f"{'; '.join(sorted(reasons - before))}; it was measured before the first step, and has changed since"
            )
            objective.tell(trainer, state.warned, reason, settings.verify == "error")
        return
    reason = "; ".join(sorted(reasons))
    library = bypassing_library(trainer)
    if reason and library:
        reason += f" ({library} computes the loss of {class_of(base_model(trainer)).__name__}: {REMEDIES[library]})"
    if reason and found is not None:
        reason += f"; it could not be measured: {found.reason}"
    elif reason:
        reason += "; accumloss.verify(trainer) measures what it averages over"
    objective.tell(trainer, state.warned, reason, settings.verify == "error")


def unseen_in_replicas(step: steps.Step) -> Iterator[str]:
    """What of a step under nn.DataParallel is not exact by construction: what its replicas return is not looked into."""
    if step.unknown:
        yield "the labels of a loss come from no entry of the batch: each replica of DataParallel averages its own"
    if step.by_hand:
        yield "a loss is averaged by hand in the replicas of DataParallel"
    if not step.calls and not objective.is_touched(step):
        yield "nothing that the replicas of DataParallel compute was recognised: it stays what Trainer makes of it"
    if counting.num_rows(step.inputs) % step.num_replicas:
        yield "the replicas of DataParallel have unequally many rows"


def measure(trainer: Any, here: Any = None, is_training: bool = False) -> probe.Verification:
    """What the loss of a Trainer averages over, measured on its own rows; see accumloss.verify."""
    state = state_of(trainer)
    before, measured = state.window, state.measured
    name = type(trainer).__name__
    dataloaders = list(dataloaders_of(trainer.accelerator))
    theirs = state.methods.get("compute_loss", trainer.compute_loss)
    try:
        why_not = _why_not_measured(trainer)
        if why_not:
            raise probe.NotMeasured(why_not)
        model = uncompiled(trainer.model)
        with probe.as_it_was(trainer, model):
            loader = trainer.callback_handler.train_dataloader if is_training else trainer.get_train_dataloader()

            def run(measured: terms.Measured) -> probe.Verification:
                counted = functools.partial(counted_rule, trainer)
                return probe.Probe(trainer, model, theirs, counted, measured).run(loader, here)

            found = run(measured)
            if found.is_exact is False and (found.measured.rest or any(w for _, w in found.measured.calls)):
                again = run(found.measured)
                if again.is_exact and is_training:
                    return replace(again, measured=found.measured, can_be_exact=True)
                return replace(found, forwards=again.forwards + found.forwards, can_be_exact=bool(again.is_exact))
            return found
    except probe.NotMeasured as error:
        return probe.Verification(name, None, str(error))
    except Exception as error:  # whatever the code of somebody else raises on rows of its own dataset
        return probe.Verification(name, None, f"on some rows of its dataset it raised {type(error).__name__}: {error}")
    finally:
        dataloaders_of(trainer.accelerator)[:] = dataloaders
        state.window = before


def _why_not_measured(trainer: Any) -> str:
    if not is_covered(trainer):
        return "accumloss is not registered for its model"
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
        return "its weights are sharded"
    if "_buffered_inputs" in vars(trainer):
        return "it generates the rows that it trains on, and makes its micro-batches of them by itself"
    step = inspect.unwrap(type(trainer).training_step)
    if is_overridden(trainer, "training_step") and not {"super", "compute_loss"} & set(step.__code__.co_names):
        return f"{type(trainer).__name__}.training_step computes the loss itself"
    if trainer.train_dataset is None:
        return "it has no train_dataset"
    return ""


def measure_once(trainer: Any, state: State, inputs: Any) -> None:
    """Before the first step of a Trainer, where register_with_transformers(verify=True) asks for it."""
    window = state.window
    if not settings.verify or state.verification is not None or window is None:
        return
    if state.look_up(trainer, inputs) is not None:
        return  # it is written down
    if len(window.fetched) == 1 and trainer.args.world_size == 1:
        return  # nothing is accumulated
    mine = found = measure(trainer, inputs, is_training=True)
    if trainer.args.world_size > 1:
        from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

        found = broadcast_object_list([mine])[0]  # all ranks must count equally often
        if (mine.is_exact, mine.measured) != (found.is_exact, found.measured):
            objective.tell(
                trainer,
                set(),
                f"on rank {trainer.args.process_index} it was measured to be another: {mine.reason or 'exact'}",
            )
    state.verification = found
    if found.is_exact is None:
        return  # what is known by construction is all there is
    state.check, state.schemes = objective.Check(), found.schemes
    if averaged_losses(trainer) > 1:
        state.schemes.open_again()
    if found.can_be_exact:
        state.measured = found.measured
    if not found.is_exact:
        objective.tell(trainer, state.warned, found.reason, settings.verify == "error", "differs")
