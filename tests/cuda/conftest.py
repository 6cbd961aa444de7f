"""Puts this directory on sys.path, for the modules that its tests share."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
pytest.register_assert_rewrite("emulated_checks")  # its asserts say what they compared
