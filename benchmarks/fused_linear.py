"""Every causal language model of transformers, tiny: the loss and the gradients with fused_linear=True against without.

    python benchmarks/fused_linear.py [CLASS ...] [--out FOLDER]

In fp32, in training mode without dropout, through register_with_transformers alone. "path" is what was seen to be taken, and
"reason" what accumloss.explain says. Writes fused_linear_architectures.csv and .json and prints a summary.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import record
import torch
import transformers

import accumloss
from accumloss import linear
from accumloss.auditing.inputs import rows
from accumloss.auditing.measure import collate, gradients_of, loss_of, named_line
from accumloss.auditing.tiny import CannotBuild, build

NAME = "fused_linear_architectures"
LEAST = 1e-3  # of the whole gradient: below, a parameter's is the rounding of sums that cancel (the bias of keys)
FIELDS = ("class", "path", "reason", "loss_error", "gradient_error", "worst_parameter_error", "logits_error", "problem")


def classes() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([value] if isinstance(value, str) else value)
    return sorted(names)


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often a loss was computed from hidden states."""
    seen: list[int] = []
    run = linear.compute.run

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return run(*args, **kwargs)

    linear.compute.run = counting
    try:
        yield seen
    finally:
        linear.compute.run = run


def step(
    model: torch.nn.Module, batch: dict[str, Any], fused: bool
) -> tuple[float, dict[str, torch.Tensor], int, Any, str]:
    """Loss, gradients, losses from hidden states, outputs and the reason, of one way."""
    with accumloss.registered(fused_linear=fused), counted() as seen:
        torch.manual_seed(0)
        model.zero_grad(set_to_none=True)
        outputs = model(**batch)
        outputs.loss.backward()
        loss, gradients = float(outputs.loss), gradients_of(model)
        logits = outputs.logits if "logits" in outputs else None
        logits = None if logits is None else logits.detach().clone()
        return loss, gradients, len(seen), logits, str(accumloss.explain(model).reason)


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return sum(float(g.double().pow(2).sum()) for g in gradients.values()) ** 0.5


def measure(name: str) -> dict[str, object]:
    line: dict[str, object] = {**dict.fromkeys(FIELDS, ""), "class": name}
    try:
        model = build(getattr(transformers, name))
        batch = collate(rows(model)[:4])
    except CannotBuild as error:
        return {**line, "problem": f"not built: {error}"}
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    try:
        loss_of(model, batch)
        loss, plain, _, logits, _ = step(model, batch, False)
        got, fused, count, read, reason = step(model, batch, True)
    except Exception as error:
        return {**line, "problem": named_line(error)[:160]}
    if plain.keys() != fused.keys():
        return {**line, "problem": f"other gradients: {sorted(plain.keys() ^ fused.keys())[:3]}"}
    difference = {k: fused[k].double() - plain[k].double() for k in plain}
    whole = norm(plain)
    line.update(path="fused" if count else "logits", reason=reason, loss_error=abs(got - loss) / abs(loss))
    line["gradient_error"] = norm(difference) / whole
    line["worst_parameter_error"] = max(
        float(difference[k].norm()) / max(float(plain[k].double().norm()), LEAST * whole) for k in plain
    )
    if isinstance(logits, torch.Tensor) and isinstance(read, torch.Tensor):
        line["logits_error"] = float((read.double() - logits.double()).abs().max() / logits.double().abs().max())
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="fused_linear.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    facts = {**record.environment(), **record.origin("fused_linear.py", arguments)}
    lines = []
    for name in options.classes or classes():
        line = measure(name)
        lines.append(line)
        print(*(f"{v:.1e}" if isinstance(v, float) else v for v in line.values()), sep=" | ", flush=True)
    record.write(options.out, NAME, FIELDS, lines, facts)
    fused = [line for line in lines if line["path"] == "fused"]
    print(
        f"{len(lines)} classes: {len(fused)} fused, {sum(line['path'] == 'logits' for line in lines)} from the logits"
    )
    for error in ("loss_error", "gradient_error", "worst_parameter_error", "logits_error"):
        values = [line[error] for line in fused if isinstance(line[error], float)]
        if values:
            print(f"worst {error}: {max(values):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
