"""Builds accumloss._C by CMake and Ninja: metadata, but the README's, is in pyproject.toml, the build in CMakeLists.txt."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "build_tools"))  # for a plain `python setup.py`

import native
import readme


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        native.build(Path(self.get_ext_fullpath(ext.name)).resolve().parent)


setup(
    ext_modules=[Extension("accumloss._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    long_description=readme.for_an_index((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
