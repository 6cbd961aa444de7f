"""What a Trainer's compute_loss returns, and who divides it by the micro-batches: decided around the outermost one.

Whatever class it comes from, compute_loss is handed the items of the step *per micro-batch*, and what it returns is divided by
the number of micro-batches once. So a loss that honours the number is right, and so is any mix with terms that do not. Three
things are left to Trainer, with the number as it is: a loss that is a plain sum, one that takes the number apart (``int()``),
and one of which nothing is recognised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import _compat
from .._compat import tree_map
from ..inexact import InexactError, InexactWarning
from ..sums import widened
from . import known
from . import step as steps
from .coupled import ROUTER_LOSSES
from .registration import Patches
from .terms import (
    BY_NUMBER,
    MEANS,
    OVER_RANKS,
    ROWS,
    SUM_OF_ROWS,
    SUMS,
    UNKNOWN,
    Combination,
    Schemes,
    ranks_of_sum,
)

# a rest of the loss that is the same for all micro-batches to so much, relatively, depends on none of them
SAME = 1e-6


class Items(torch.Tensor):
    """num_items_in_batch as compute_loss gets it: the items per micro-batch, in operations with the loss.

    What is made of it alone stays of this kind. Where a number is made of it (``int()``, ``item()``, an integer tensor, an
    array), that is the number of the whole step, since numbers say no more what they were divided by; and so it is in memory,
    for what goes past operations.

    Attributes:
        whole: the value, of the items of the step.
        share: the same, of the items per micro-batch.
        graph: share where it is followed, of the leaf ``seen.root``, whose gradient says what depends on the number.
        seen: what was done with it, of all that was made of it.
    """

    whole: torch.Tensor
    share: torch.Tensor
    graph: torch.Tensor | None
    seen: Seen

    @staticmethod
    def of(whole: Any, share: torch.Tensor, is_followed: bool = False) -> Items:
        seen = Seen(share.detach().clone().requires_grad_() if is_followed else None)
        with torch.enable_grad():
            graph = None if seen.root is None else seen.root * 1.0  # no leaf, which could not be written over
        return Items._made(torch.as_tensor(whole).detach().clone(), share, graph, seen)  # Trainer's is not written over

    @staticmethod
    def _made(whole: torch.Tensor, share: torch.Tensor, graph: torch.Tensor | None, seen: Seen) -> Items:
        items = whole.as_subclass(Items)
        items.whole, items.share, items.graph, items.seen = whole, share, graph, seen
        return items

    @property
    def root(self) -> torch.Tensor | None:
        return self.seen.root

    @property
    def is_touched(self) -> bool:
        return self.seen.is_touched

    @property
    def is_taken(self) -> bool:
        return self.seen.is_taken

    @property
    def is_hidden(self) -> bool:
        return self.seen.is_hidden

    def __deepcopy__(self, memo: Any) -> Items:
        return Items._made(self.whole, self.share, self.graph, self.seen)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first: Items | None = None  # what is made of several is of one number
        is_of_loss = False

        def look(value: Any) -> Any:
            nonlocal first, is_of_loss
            if isinstance(value, Items):
                first = value if first is None and hasattr(value, "seen") else first
            elif isinstance(value, torch.Tensor):
                is_of_loss = is_of_loss or value.requires_grad
            return value

        def given(name: str) -> Any:
            def of(value: Any) -> Any:
                if not isinstance(value, Items):
                    return value
                kept = getattr(value, name) if hasattr(value, "seen") else value.as_subclass(torch.Tensor)
                return value.share if kept is None else kept

            return func(*tree_map(of, args), **tree_map(of, kwargs))

        tree_map(look, (args, kwargs))
        if first is None or func in _SHOWING:
            return given("whole")
        if getattr(func, "__name__", "") == "__get__":
            made = given("whole")
            if isinstance(made, torch.Tensor):  # .data: past what can be seen
                first.seen.is_touched = first.seen.is_taken = True
            return made
        first.seen.is_touched = True
        if func in _TAKING:
            first.seen.is_taken = True
        elif is_of_loss:
            return given("graph")
        made = given("whole")
        if func in _TAKING or not isinstance(made, torch.Tensor):
            return made
        if not made.is_floating_point():
            first.seen.is_taken = first.seen.is_taken or made.dtype != torch.bool
            return made
        if func in _OF_WHOLE:  # a bound on the number of the step, and not on a part of it
            ratio = first.share / first.whole
            graph = None if first.graph is None else (first.graph * (made / first.whole).detach()).to(made.dtype)
            return Items._made(made, (made * ratio).to(made.dtype), graph, first.seen)
        with torch.enable_grad():
            graph = given("graph")
        if not graph.requires_grad:
            graph, first.seen.is_hidden = None, True
        first.seen.precision = max(first.seen.precision, 8 * torch.finfo(made.dtype).eps)
        return Items._made(made, given("share"), graph, first.seen)


class Seen:
    """What was done with num_items_in_batch.

    Attributes:
        root: where it is followed, the leaf that operands are made of.
        is_touched: whether it was an operand.
        is_taken: whether a number was made of it.
        is_hidden: whether something was made of it that no gradient follows.
        precision: of what was made of it.
    """

    def __init__(self, root: torch.Tensor | None):
        self.root = root
        self.is_touched = self.is_taken = self.is_hidden = False
        self.precision = 0.0


_TAKING = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__int__, torch.Tensor.__float__,
    torch.Tensor.__index__, torch.Tensor.long, torch.Tensor.int, torch.Tensor.__array__,
}  # fmt: skip
_SHOWING = {torch.Tensor.__repr__, torch.Tensor.__format__, torch.Tensor.__bool__}
_OF_WHOLE = {
    torch.Tensor.clamp, torch.Tensor.clamp_min, torch.Tensor.clamp_max, torch.Tensor.clip, torch.clamp, torch.clamp_min,
    torch.clamp_max, torch.clip, torch.maximum, torch.minimum, torch.max, torch.min, torch.Tensor.maximum,
    torch.Tensor.minimum, torch.Tensor.max, torch.Tensor.min, torch.ceil, torch.floor, torch.round, torch.trunc,
    torch.Tensor.ceil, torch.Tensor.floor, torch.Tensor.round, torch.Tensor.trunc, torch.floor_divide,
    torch.Tensor.floor_divide, torch.Tensor.__floordiv__,
}  # fmt: skip


def per_micro_batch(num_items: Any, micro_batches: int) -> torch.Tensor:
    """The items of a step by its micro-batches: as many dimensions, fp32."""
    return (steps.at_least_one(widened(torch.as_tensor(num_items))) / micro_batches).to(torch.float32)


def micro_batches(trainer: Any, current: int, asked: int) -> Patches:
    """A context of what Trainer says of the micro-batches of this window, and its arguments of any. 1: who divides by them
    divides once."""
    patches = Patches()
    patches.bind(trainer, "current_gradient_accumulation_steps", current)
    patches.bind(trainer.args, "gradient_accumulation_steps", asked)
    return patches


def says_it_is_scaled(trainer: Any) -> bool:
    """Whether a Trainer declares that its compute_loss divides by what the step holds, by itself."""
    declared = getattr(trainer, "loss_is_scaled_for_ga", None)
    # a string in the place of a function: how libraries said so before transformers could be told
    return bool(declared) if declared is not None else isinstance(trainer.compute_loss_func, str)


def is_touched(step: steps.Step) -> bool:
    """Whether compute_loss made use of num_items_in_batch, as far as can be seen."""
    if step.items is None:
        return False
    return step.items.is_touched if isinstance(step.items, Items) else True


def is_followed(step: steps.Step) -> bool:
    """Whether the gradient says what of the loss depends on num_items_in_batch, which it made use of."""
    items = step.items
    if not isinstance(items, Items) or items.root is None or not items.is_touched:
        return False
    return not items.is_taken and not items.is_hidden


class Check:
    """Holds what the micro-batches of the first windows returned against the terms that were recognised.

    The loss is c·t + rest, with the coefficients c of the recognised terms t by autograd. Where the rest is the same in all
    micro-batches (a penalty on the weights), and the items of all terms are known, the step is exact by construction.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._rests: list[torch.Tensor] = []
        self._scale: list[torch.Tensor] = []
        self._precision = SAME
        self._reasons: set[str] = set()

    def add(self, step: steps.Step, loss: Any, combination: Combination, schemes: Schemes, is_summed: bool) -> None:
        """One micro-batch, before its backward."""
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad or loss.dim():
            self._reasons.add("what compute_loss returned is no loss with a gradient")
            return
        of_rows = sum(
            term.reduction == "mean" and term.rule is None and schemes.of(term) == ROWS for term, _ in combination.pairs
        )
        if step.unknown > of_rows and not step.coupled:
            self._reasons.add("the labels of a loss come from no entry of the batch: it is averaged as its rows")
        self._reasons |= step.coupled
        self._reasons |= {
            f"{term.name} is coupled over the tokens of a micro-batch, and averaged"
            for term, coefficient in combination.pairs
            if term.name in ROUTER_LOSSES and bool(coefficient != 0)
        }
        if step.is_of_objects:
            return
        if combination.once is not None:
            self._reasons.add(
                f"{combination.once.__name__}, an autograd.Function of its own, stands between the loss and its terms, and is not "
                "run twice to see what it makes of them"
            )
            return
        if not step.terms and not is_summed and not step.is_known and not step.calls and not is_touched(step):
            self._reasons.add("nothing that it computes was recognised: it stays what Trainer makes of it")
        rest = rest_of(step, loss, combination, schemes, is_summed)
        if rest is None:
            return
        self._rests.append(rest)
        self._scale.append(widened(loss.detach()).abs())
        followed = step.items.seen.precision if isinstance(step.items, Items) else 0.0
        self._precision = max(self._precision, 8 * torch.finfo(loss.dtype).eps, followed)
        others = [said for said in step.rests_of_ranks if said is not None]
        largest = max([float(self._scale[-1]), *(scale for _, scale in others)])
        if any(abs(other - float(rest)) > self._precision * largest for other, _ in others):
            self._reasons.add(NOT_OF_A_TERM.format("ranks"))

    def blame(self, reason: str) -> None:
        self._reasons.add(reason)

    def end(self) -> set[str]:
        """At the end of a window: why the step may not be exact; empty where it is."""
        self.is_done = True
        if len(self._rests) > 1:
            rests, largest = torch.stack(self._rests), torch.stack(self._scale).max()
            if bool((rests - rests[0]).abs().max() > self._precision * largest):
                self._reasons.add(NOT_OF_A_TERM.format("micro-batches"))
        return self._reasons


NOT_OF_A_TERM = (
    "a part of it was computed by none of the losses that accumloss knows, and is averaged over the {} as they are"
)


def rest_of(
    step: steps.Step, loss: Any, combination: Combination, schemes: Schemes, is_summed: bool
) -> torch.Tensor | None:
    """What of the loss of a micro-batch is none of its terms, () in the widest dtype; None where that says nothing."""
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad or loss.dim():
        return None
    if step.is_of_objects or combination.once is not None:
        return None
    if is_summed or step.is_known or (not step.terms and not is_followed(step)):
        return None
    if is_touched(step) and not is_followed(step) and not (isinstance(step.items, Items) and step.items.is_taken):
        return None  # what else there is honours the number that it was given, as far as can be seen
    with torch.no_grad():
        rest = combination.rest(widened(loss), schemes.left_in_rest())
        if combination.by_number is not None:  # what is divided by the number is a part of the step's as it is
            rest = rest - combination.by_number + combination.divided_by_number(schemes)
    return rest


def tell(trainer: Any, warned: set[str], reason: str, raises: bool = False, may: str = "may differ") -> None:
    """Warns once for each Trainer that its step is not exact, or not by construction."""
    if not reason or "inexact" in warned:
        return
    warned.add("inexact")
    message = (
        f"accumloss: the loss of {type(trainer).__name__} over micro-batches {may} from that of the one batch: {reason}"
    )
    if raises:
        raise InexactError(message)
    warnings.warn(message, InexactWarning, stacklevel=4)


def divided(
    trainer: Any,
    call: Callable[..., Any],
    step: steps.Step,
    ranks: int,
    check: Check | None,
    share_of: Callable[[Any, int], torch.Tensor],
    args: Any,
    kwargs: Any,
) -> Any:
    """What compute_loss returns, as Trainer is to get it.

    Args:
        call: the outermost compute_loss, bound.
        ranks: what Trainer multiplies by, since the gradients of the ranks are averaged.
        check: looks at the loss; None: it has been looked at.
        share_of: per_micro_batch, or what remembers it.
        args, kwargs: what Trainer calls it with; handed on in the same way, whatever its signature is.
    """
    k = step.micro_batches
    step.averaged, step.expected_grad = k * ranks, 1.0 / k
    given = kwargs.get("num_items_in_batch")
    leaves_it = is_taken_as_scaled(trainer, given)
    if given is not None:
        share = share_of(given, k)
        # compilers know no subclass
        is_plain = trainer.args.n_gpu > 1 or is_compiled(trainer)
        step.items = share if is_plain else Items.of(given, share, is_followed=check is not None)
        kwargs = {**kwargs, "num_items_in_batch": step.items}
    with micro_batches(trainer, 1, 1), known.parts(trainer, step.known):
        result = call(*args, **kwargs)
    step.collect()
    loss = result[0] if isinstance(result, tuple) else result
    step.raw = loss
    loss, kind = _weighed(trainer, step, loss, check)
    factor = 1.0
    if kind == SUMMED:
        factor = 1.0 if leaves_it else float(k)
    elif kind == LEFT:
        if check is not None and (not leaves_it or ranks != 1):
            check.blame("a sum with a factor that is not recognised stays what Trainer makes of it")
    elif leaves_it and (has_parts(step) or step.is_known or step.calls or is_touched(step) or step.measured.rest):
        factor = 1.0 / k
    if factor != 1.0:
        loss = loss * factor if factor > 1 else loss / k
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


def has_parts(step: steps.Step) -> bool:
    """Whether a term of the step is known to be a part of it: what somebody averages in a way of his own stays as it is."""
    return any(t.reduction == "mean" or step.schemes.of(t) != UNKNOWN for t in step.terms)


SUMMED, LEFT = "a sum", "a sum over something that is not known"


def _weighed(trainer: Any, step: steps.Step, loss: Any, check: Check | None) -> tuple[Any, str]:
    """The loss whose terms are parts of the step's, also those that are averaged by hand; and whether it is a sum as a whole."""
    is_taken = isinstance(step.items, Items) and step.items.is_taken
    may_be_sum = (is_taken or (step.sums > 0 and not is_touched(step))) and not step.is_known
    is_looked_at = check is not None and trainer.args.n_gpu <= 1
    schemes = step.schemes
    is_measured = bool(step.measured.rest) and isinstance(loss, torch.Tensor) and not is_touched(step)
    is_open = step.exchange is not None and step.exchange.is_open_to(step)
    if not is_looked_at and not may_be_sum and not schemes.are_acted_on and not is_measured and not is_open:
        return loss, ""
    combination = Combination(step, loss, step.items.root if is_looked_at and is_followed(step) else None)
    if is_looked_at:
        assert check is not None
        for reason in schemes.look_at_loops(step, combination) if not step.is_of_objects else ():
            check.blame(reason)
    combination.merge(step, schemes)
    step.take_doubts()
    if is_looked_at:
        assert check is not None
        number = step.items if is_touched(step) else step.num_items_in_batch if step.is_known else None
        number = number.share if isinstance(number, Items) else number
        for reason in schemes.look(step, combination, number, is_taken) if not step.is_of_objects else ():
            check.blame(reason)

    def summed() -> tuple[set[str], bool]:
        # the number may be taken for a log, and a sum beside a mean
        found = {schemes.of(term) for term, _ in combination.pairs if term.reduction != "mean"}
        is_sum = (
            may_be_sum
            and not combination.uses_a_mean
            and not is_measured
            and not found & {*MEANS, *BY_NUMBER, SUM_OF_ROWS}
        )
        return found, is_sum

    rest_here = rest_of(step, loss, combination, schemes, summed()[1]) if is_looked_at and is_open else None
    corrections = settled(step, None if rest_here is None else (float(rest_here), abs(float(loss))))
    found, is_summed = summed()
    if is_looked_at:
        assert check is not None
        check.add(step, loss, combination, schemes, is_summed)
    if not is_summed and isinstance(loss, torch.Tensor):
        rest = combination.rest(loss, schemes.left_in_rest()) if is_measured else None
        loss = schemes.weighed(step, combination, loss, corrections)
        if rest is not None:
            loss = _with_rest(step, loss, rest)
    is_known_sum = found <= set(SUMS) and not step.has_unknown_sums
    if is_summed and is_known_sum and found and found <= set(OVER_RANKS):
        loss = loss * min(ranks_of_sum(step, *pair) for pair in combination.pairs)
    return loss, "" if not is_summed else SUMMED if is_known_sum else LEFT


def settled(step: steps.Step, rest: tuple[float, float] | None = None) -> dict[Any, torch.Tensor]:
    """Where the ranks meet at the end of this compute_loss: what its terms are to be multiplied by for what the others hold.

    Args:
        rest: what of the loss is none of its terms, and how large that is, for the others to compare.
    """
    exchange = step.exchange
    return exchange.settle(step, step.schemes, rest) if exchange is not None and exchange.is_open_to(step) else {}


def _with_rest(step: steps.Step, loss: Any, rest: torch.Tensor) -> Any:
    """The loss whose rest is a part of the step's too."""
    share = step.share_of_weights(step.measured.rest, "the rest")
    if isinstance(share, float) and share == 1.0:
        return loss
    return loss + ((share - 1) * rest).to(loss.device, loss.dtype)


def divided_by_itself(
    trainer: Any, call: Callable[..., Any], step: steps.Step, ranks: int, args: Any, kwargs: Any
) -> Any:
    """What the compute_loss of a known Trainer returns that divides by what the step holds, but for a part of its loss.

    The micro-batches are its own, and of one size.
    """
    step.averaged = step.micro_batches * ranks
    with known.parts(trainer, step.known):
        result = call(*args, **kwargs)
    loss = result[0] if isinstance(result, tuple) else result
    if step.measured.rest:
        rest = Combination(step, loss).rest(loss) if step.terms else loss
        loss = _with_rest(step, loss, rest)
    return (loss, *result[1:]) if isinstance(result, tuple) else loss


NOT_LINEAR = "it is no sum of multiples of means, as a perplexity is none"
OF_NO_TERM = "a part of it was computed by none of the losses that accumloss knows"


def tell_evaluation(trainer: Any, warned: set[str], reason: str = NOT_LINEAR) -> None:
    """Warns once for each Trainer whose evaluation loss depends on the size of the batches, or may."""
    if "evaluation" not in warned:
        warned.add("evaluation")
        verb = "may depend" if reason == OF_NO_TERM else "depends"
        warnings.warn(
            f"accumloss: the evaluation loss of {type(trainer).__name__} {verb} on the batch size: {reason}; it is averaged over "
            "the batches by their rows, as Trainer does",
            InexactWarning,
            stacklevel=4,
        )


def is_taken_as_scaled(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether Trainer leaves the loss as it is, and does not divide it by the number of micro-batches."""
    own = getattr(trainer, "loss_is_scaled_for_ga", None)
    if own is not None:
        return own
    accepts = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return accepts or trainer.compute_loss_func is not None


def is_compiled(trainer: Any) -> bool:
    return any(_compat.is_compiled(model) for model in (trainer.model, trainer.model_wrapped))
