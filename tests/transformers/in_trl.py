"""What TRL's functions and Trainers do with ours in their places: run by test_in_trl.py, in a process that has TRL."""

import json
import sys

import torch
import trl
import trl.trainer.utils as utils

import accumloss
from accumloss import trl as ours
from accumloss.auditing import trainer_cases
from accumloss.auditing.measure import difference, norm
from accumloss.auditing.trainers import Step

TRAINERS = ("DPOTrainer sigmoid", "GRPOTrainer dapo + entropy bonus", "ORPOTrainer orpo", "TPOTrainer sigmoid")


def calls():
    """Each way of calling the three, on each dtype: (name, dtype, outputs' difference, gradients', dtype of the output)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        logits = (torch.randn(3, 7, 500, generator=generator) * 3).to(dtype)
        index = torch.randint(0, 500, (3, 7), generator=generator)
        mask = torch.rand(3, 7, generator=generator) < 0.6
        top = torch.randint(0, 500, (3, 7, 4), generator=generator)
        both, one = "selective_log_softmax_and_entropy", "selective_log_softmax"
        for what, name, args, kwargs in (
            ("plain", one, (index,), {}),
            ("temperature and mask", one, (index,), {"temperature": 0.7, "row_mask": mask}),
            ("(..., K)", one, (top,), {}),
            ("entropy", "entropy_from_logits", (), {"chunk_size": 5}),
            ("both", both, (index,), {"temperature": 0.7, "row_mask": mask.int()}),
            ("no gradient of the entropy", both, (index,), {"entropy_requires_grad": False}),
        ):
            wide = logits.float() if dtype == torch.bfloat16 else logits  # TRL's answer without its rounding
            results = []
            for function, given in ((ours._registered[name][0], wide), (vars(utils)[name], logits)):
                leaf = given.detach().clone().requires_grad_()
                outputs = function(leaf, *args, **kwargs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                total = sum((i + 1.5) * out.double().sin().sum() for i, out in enumerate(outputs) if out.requires_grad)
                total.backward()
                results.append((outputs, leaf.grad, [out.requires_grad for out in outputs]))
            (theirs, their_grad, flows), (mine, my_grad, my_flows) = results
            error = max((a.double() - b.double()).abs().max().item() for a, b in zip(theirs, mine, strict=True))
            of_grad = ((their_grad.double() - my_grad.double()).norm() / their_grad.double().norm()).item()
            found.append([what, str(dtype), error, of_grad, flows == my_flows, str(mine[0].dtype)])
    return found


def trained():
    """{Trainer: gradient error, loss error, how often ours were called}"""
    found = {}
    for name in TRAINERS:
        case = trainer_cases.find(name)
        accumloss.unregister_from_trl()
        stock = Step(case, trainer_cases.ROWS, "stock")
        accumloss.register_with_trl()
        count = [0]
        for key, (theirs, mine) in list(ours._registered.items()):

            def counted(*args, mine=mine, count=count, **kwargs):
                count[0] += 1
                return mine(*args, **kwargs)

            ours._rebind({id(mine): counted})
            ours._registered[key] = theirs, counted
        step = Step(case, trainer_cases.ROWS, "stock")
        error = norm(difference(step.gradients, stock.gradients)) / norm(stock.gradients)
        found[name] = [error, abs(step.loss - stock.loss) / max(abs(stock.loss), 0.1), count[0]]
        accumloss.unregister_from_trl()
    return found


def bound():
    """Modules that have one of the three, and whose it is."""
    of = {}
    for key, module in list(sys.modules.items()):
        for name in ours.NAMES:
            function = getattr(module, "__dict__", {}).get(name)
            if key.startswith("trl.") and callable(function) and key != "trl.kernels":
                of[f"{key}.{name}"] = getattr(function, "__code__", None).co_filename.endswith("accumloss/trl.py")
    return of


if __name__ == "__main__":
    from trl.experimental.orpo import orpo_trainer  # has bound a name before anything is registered

    result = {"version": trl.__version__, "before": bound()}
    before = {name: vars(utils)[name] for name in ours.NAMES}
    accumloss.register_with_trl()
    accumloss.register_with_trl()
    from trl.experimental.cpo import cpo_trainer  # and one after

    result["registered"] = bound()
    result["calls"] = calls()
    accumloss.unregister_from_trl()
    result["after"] = bound()
    result["same"] = all(vars(utils)[name] is theirs for name, theirs in before.items())
    result["trained"] = trained()
    result["after_training"] = bound()
    with accumloss.registered():
        result["registered_with_transformers"] = bound()
    assert orpo_trainer and cpo_trainer
    print("\n" + json.dumps(result))
