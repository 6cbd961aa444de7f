"""`python -m pytest` puts the repository on sys.path, where ./accumloss lacks _C after a normal install."""

import importlib.machinery
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
if importlib.machinery.PathFinder.find_spec("accumloss", elsewhere):  # installed, and not as editable
    sys.path[:] = elsewhere


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
