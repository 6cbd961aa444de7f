import pytest

pytest.importorskip("transformers")

import transformers

import accumloss


@pytest.fixture(autouse=True)
def nothing_registered():
    """Every test begins, and leaves transformers, without accumloss."""
    transformers.logging.set_verbosity_error()
    yield
    accumloss.unregister_from_transformers()
