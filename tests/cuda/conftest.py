"""Puts this directory on sys.path, for the modules that its tests share."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
