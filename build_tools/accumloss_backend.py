"""PEP 517 backend: setuptools, except that the build uses the torch that is already installed.

Named in pyproject.toml. A static requirement on torch would make pip download it into every isolated build;
here torch, cmake and ninja are required only where the machine has none that will do.
"""

import os
from pathlib import Path

import native
import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # the hooks that are not overridden below

if int(setuptools.__version__.split(".")[0]) < 77:  # the first to read pyproject's license expression
    native.fail(f"setuptools 77 or newer is needed, found {setuptools.__version__}: pip install -U setuptools")


def get_requires_for_build_wheel(config_settings=None):
    required = native.missing_requirements()
    with native.alone(), native.writable():
        return required + build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    required = native.missing_requirements()
    with native.alone(), native.writable():
        return required + build_meta.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with native.alone(), native.writable():
        return build_meta.prepare_metadata_for_build_wheel(str(Path(metadata_directory).resolve()), config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    native.prerequisites()  # before setuptools prints anything: a missing one is all that the user reads
    with native.alone(), native.writable():
        native.remove_previous_package()
        return build_meta.build_wheel(str(Path(wheel_directory).resolve()), config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    with native.alone(), native.writable():
        return build_meta.build_sdist(str(Path(sdist_directory).resolve()), config_settings)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    native.prerequisites()
    if not os.access(native.ROOT, os.W_OK):
        native.fail(f"an editable install writes into {native.ROOT}, which is read-only: pip install . without -e")
    with native.alone():
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
