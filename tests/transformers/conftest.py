import os

import pytest

pytest.importorskip("transformers")

import transformers
from accelerate.state import AcceleratorState

import accumloss


@pytest.fixture(autouse=True)
def nothing_registered():
    """Every test begins, and leaves transformers, without accumloss."""
    transformers.logging.set_verbosity_error()
    yield
    accumloss.unregister_from_transformers()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_MIXED", "ACCELERATE_DYNAMO"))]:
        del os.environ[name]  # older Trainers leave what they were given to all after them
    AcceleratorState._reset_state(reset_partial_state=True)
