"""What a loss adds to memory: no fp32 copy of bf16 logits, no shifted copy, no permuted copy."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.loss import loss_utils

HERE = Path(__file__).parent  # not the root, whose ./accumloss has no _C
SIZE = 64  # MiB of logits

PROGRAM = """
import ctypes, sys
from pathlib import Path
import torch
from transformers.loss import loss_utils
from accumloss.transformers import losses

name, inplace = sys.argv[1], sys.argv[2] == "inplace"
torch.set_num_threads(2)
if name == "causal":
    anchor = torch.randn(1, 1024, 32768, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 32768, (1, 1024))
    options = {"inplace": "backward"} if inplace else {}
    ours = lambda x: losses.causal_lm_loss(x, labels, 32768, num_items_in_batch=1023, **options)
    stock = lambda x: loss_utils.ForCausalLMLoss(x, labels, 32768, num_items_in_batch=1023)
else:  # enlarged fourfold, to 64 MiB in fp32
    anchor = torch.randn(2, 32, 128, 128).requires_grad_()
    labels = torch.randint(0, 32, (2, 512, 512))
    ours = lambda x: losses.semantic_segmentation_loss(x, labels)
    stock = lambda x: loss_utils.ForSemanticSegmentationLoss(x, labels)

def status(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)) * 1024

def peak(loss):
    logits = anchor.detach().clone().requires_grad_()
    head = logits.view_as(logits) if not inplace else logits * 1
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    value = loss(head)
    forward = status("VmHWM") - before
    value.backward()
    return forward, status("VmHWM") - before

peak(ours), peak(stock)
print(*(b / 2**20 for b in (*peak(ours), *peak(stock))))
"""


def peaks(name, inplace=False):
    """MiB above the logits: forward and all of ours, forward and all of stock."""
    command = [sys.executable, "-c", PROGRAM, name, "inplace" if inplace else "own"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
    return map(float, done.stdout.split())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_no_copy_of_the_logits():
    """The gradient, written in forward, is all that there is; stock takes six times the logits."""
    forward, whole, _, stock = peaks("causal")
    assert whole < 1.1 * SIZE and forward < 1.1 * SIZE
    assert stock > 4 * SIZE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_no_buffer_at_all_in_place():
    forward, _, _, _ = peaks("causal", inplace=True)
    assert forward < 0.1 * SIZE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_no_permuted_copy_of_segmentation_logits():
    """Enlarged logits and their gradient, both 64 MiB, and the interpolation's; stock's log-softmax and copies on top."""
    if not hasattr(loss_utils, "ForSemanticSegmentationLoss"):
        pytest.skip("this transformers has no loss for semantic segmentation")
    _, whole, _, stock = peaks("segmentation")
    assert whole < stock
    assert whole < 2.4 * SIZE
