"""What all tests share: the installed package, one thread of torch a worker, groups for pytest-xdist, no silent skips in CI."""

import gc
import importlib.machinery
import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` puts the repository on sys.path, where ./accumloss lacks _C after a normal install.
elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
if importlib.machinery.PathFinder.find_spec("accumloss", elsewhere):  # installed, and not as editable
    sys.path[:] = elsewhere

# What a machine may lack without a fault of ours. Anything else that a test needs is installed by `make test`.
SKIPS_IN_CI = re.compile(
    r"no CUDA device|built without CUDA|a GPU is present|there is a GPU to ask|no nvcc|no nvdisasm|no CUDA toolkit"
    r"|this machine has no|of device memory are not free|one CUDA device|refused|computes in fp32"
    r"|transformers \d|no cgroup"
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Most tensors here are tiny and every core has a worker: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage():
    """Trainer collects garbage after each training: what torch and transformers are made of takes most of that time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def threads():
    """torch.set_num_threads, taken back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Module fixtures that are dear: whoever asks for one goes to the worker that has it. Those that start two ranks go to one
# worker, so that no four processes share two cores.
DEAR = {
    **dict.fromkeys(("two_ranks", "ranks", "of_two", "more_of_two", "of_four"), "torchrun"),
    "by_capability": "instruction sets",
    "demo_result": "demo",
    "in_trl": "TRL",
    "acme": "a device of its own",
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Names what one worker takes at once: a test function with all of its parameters, or what shares a dear fixture.

    The groups of several functions come first, so that none is left to one worker at the end.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            dear = [group for fixture, group in DEAR.items() if fixture in item.fixturenames]
            name = f"{item.path.stem}::{getattr(item, 'originalname', item.name)}"
            item.add_marker(pytest.mark.xdist_group(dear[0] if dear else name))
        for marker in item.iter_markers("slow"):
            assert marker.args and isinstance(marker.args[0], str), f"{item.nodeid}: slow needs a reason"
    items.sort(key=lambda item: "::" in item.get_closest_marker("xdist_group").args[0])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session):
    if getattr(session.config.option, "loadgroup", False) and session.items:
        assert "@" in session.items[0].nodeid, "pytest-xdist has not read the groups: a pytest that it does not know?"


def _fail_a_skip(report):
    if os.environ.get("CI") and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not SKIPS_IN_CI.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, which CI takes for a failure: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    _fail_a_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    _fail_a_skip(report)
    return report
