"""Runs the blocks of docs/loops.md as they stand, each against the one batch of every optimizer step."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tolerances import ACCUMULATED_GRADIENT, SUM, UNIT
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchrun import torchrun
from windows import TinyLM, error, gradients, norm, split, targets, window

import accumloss

PAGE = Path(__file__).resolve().parents[1] / "docs" / "loops.md"
SECTIONS = dict(section.split("\n", 1) for section in PAGE.read_text().split("\n## ")[1:])
BLOCKS = {name: text.split("```python\n")[1].split("```")[0] for name, text in SECTIONS.items() if "```python" in text}
EXACT = ACCUMULATED_GRADIENT[torch.float32]
SIZES = ([2, 2, 2, 2], [1, 4, 1, 2])  # of the micro-batches of each window
LR = 0.1


def micro_batches():
    return [split(*window(seed), sizes) for seed, sizes in enumerate(SIZES)]


def step_of_one_batch(model, inputs, labels):
    F.cross_entropy(model(inputs).flatten(0, 1), targets(labels).flatten()).backward()


def train_on_one_batch(model, max_norm=None, step=step_of_one_batch):
    """The truth: gradients of each optimizer step, in plain PyTorch. Every recipe trains by SGD at this rate."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=LR), []
    for seed in range(len(SIZES)):
        step(model, *window(seed))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        found.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return found


def run(recipe, model, **names):
    """Runs a recipe; the gradients that each of its optimizer steps found."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=LR), []
    handle = register_optimizer_step_post_hook(lambda *_: found.append(gradients(model)))
    names = {"model": model, "optimizer": optimizer, "windows": micro_batches(), **names}
    try:
        exec(
            compile(BLOCKS[recipe], f"{PAGE.name}: {recipe}", "exec"), {"torch": torch, "accumloss": accumloss, **names}
        )
    finally:
        handle.remove()
    return found


def check(recipe, found, wanted, bound=EXACT):
    """Relative error of the whole gradient, of every optimizer step. pytest -s shows them."""
    assert len(found) == len(wanted)
    largest = max(error(f, w) for f, w in zip(found, wanted, strict=True))
    print(f"| {recipe} | {largest:.0e} |")
    assert largest <= bound


def test_every_block_is_run():
    source = Path(__file__).read_text()
    assert BLOCKS
    assert [recipe for recipe in BLOCKS if f'"{recipe}"' not in source] == []
    assert len(BLOCKS) == PAGE.read_text().count("```python")


@pytest.mark.parametrize(
    ("recipe", "max_norm"),
    [
        ("A loop", 1.0),
        ("Clip in the same pass", 1.0),
        ("Items that are known beforehand", None),
        ("torch.compile", None),
    ],
)
def test_recipe(recipe, max_norm):
    model = TinyLM()
    wanted = train_on_one_batch(copy.deepcopy(model), max_norm)
    check(recipe, run(recipe, model), wanted)


def test_recipe_is_exact_where_mean_of_means_is_not():
    model = TinyLM()
    wanted = train_on_one_batch(copy.deepcopy(model))
    for inputs, labels in micro_batches()[0]:
        (F.cross_entropy(model(inputs).flatten(0, 1), targets(labels).flatten()) / len(SIZES[0])).backward()
    assert error(gradients(model), wanted[0]) > 0.05


def test_fp16():
    def step(model, inputs, labels):
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(inputs)
        F.cross_entropy(logits.float().flatten(0, 1), targets(labels).flatten()).backward()

    recipe, model = "fp16 with a GradScaler", TinyLM()
    wanted = train_on_one_batch(copy.deepcopy(model), 1.0, step)
    check(recipe, run(recipe, model, device="cpu"), wanted, ACCUMULATED_GRADIENT[torch.float16])


def transformers_model(name, **config):
    pytest.importorskip("transformers", reason="needs transformers")
    from training import build

    return build(name, vocab_size=32, **config)


def test_transformers():
    def step(model, inputs, labels):
        F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets(labels).flatten()).backward()

    recipe, model = "A transformers model", transformers_model("LlamaForCausalLM")
    wanted = train_on_one_batch(copy.deepcopy(model), 1.0, step)
    check(recipe, run(recipe, model), wanted)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_mixture_of_experts(coefficient):
    """Against the one batch without the balance loss; with it, against the sum that it promises."""

    def step(model, inputs, labels):
        whole = (targets(labels) != -100).sum()
        sizes = SIZES[step.window] if coefficient else [len(inputs)]
        step.window += 1
        for some_inputs, some_labels in split(inputs, labels, sizes):
            outputs = model(input_ids=some_inputs, output_router_logits=True)
            items = targets(some_labels).flatten()
            loss_sum = F.cross_entropy(outputs.logits.flatten(0, 1), items, reduction="sum")
            share = (items != -100).sum() / whole
            (loss_sum / whole + coefficient * outputs.aux_loss * share).backward()

    step.window = 0
    recipe = "A mixture of experts"
    config = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": coefficient}
    model = transformers_model("MixtralForCausalLM", **config)
    wanted = train_on_one_batch(copy.deepcopy(model), 1.0, step)
    check(recipe, run(recipe, model), wanted)


def all_micro_batches():
    """Of all windows."""
    return [micro_batch for some in micro_batches() for micro_batch in some]


def loader():
    return torch.utils.data.DataLoader(all_micro_batches(), batch_size=None, shuffle=False)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    accelerate.Accelerator(cpu=True)  # its state is global: the recipe's is then on the CPU too
    recipe, model = "Accelerate", TinyLM()
    wanted = train_on_one_batch(copy.deepcopy(model), 1.0)
    try:
        check(recipe, run(recipe, model, accelerate=accelerate, loader=loader()), wanted)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("recipe", ["Lightning, manual optimization", "Lightning, automatic optimization"])
def test_lightning(recipe, tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    options = {} if "manual" in recipe else {"accumulate_grad_batches": 4, "gradient_clip_val": 1.0}
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)
    model = TinyLM()
    wanted = train_on_one_batch(copy.deepcopy(model), 1.0)
    check(recipe, run(recipe, model, lightning=lightning, trainer=trainer, loader=loader()), wanted)


MINE = """
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook
from windows import TinyLM as make_model, split, window

DEALT = [0, 2, 4, 7], [1, 3, 5, 6]  # rows of few labels, and of many
torch.manual_seed(0)


def windows():
    for seed, sizes in enumerate(([1, 2, 1], [3, 1])):
        inputs, labels = window(seed)
        rows = DEALT[dist.get_rank()]
        yield split(inputs[rows], labels[rows], sizes)
"""


@pytest.mark.xdist_group("torchrun")
@pytest.mark.parametrize("recipe", ["DistributedDataParallel", "FSDP"])
def test_torchrun(recipe, tmp_path):
    command = re.search(r"^torchrun (.*)$", SECTIONS[recipe], re.M)[1].split()
    (tmp_path / command[-1]).write_text(BLOCKS[recipe])
    (tmp_path / "mine.py").write_text(MINE)
    torchrun(*command, cwd=tmp_path)
    start, model = dict(TinyLM().named_parameters()), TinyLM()
    train_on_one_batch(model, 1.0)
    trained = torch.load(tmp_path / "weights.pt")
    moved, wanted = (
        {n: w[n].detach() - p.detach() for n, p in start.items()} for w in (trained, dict(model.named_parameters()))
    )
    # each step rounds the weights, in both
    rounding = 2 * len(SIZES) * UNIT * norm(start) / norm(wanted)
    check(recipe, [moved], [wanted], EXACT + rounding)


def test_evaluation():
    model, batches = TinyLM(), all_micro_batches()
    names = {"torch": torch, "accumloss": accumloss, "model": model, "batches": batches}
    exec(BLOCKS["Evaluation"], names)
    inputs, labels = (torch.cat(some) for some in zip(*batches, strict=True))
    wanted = F.cross_entropy(model(inputs).flatten(0, 1), targets(labels).flatten())
    assert names["sums"].mean_loss.item() == pytest.approx(wanted.item(), rel=SUM)
