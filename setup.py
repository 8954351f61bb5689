"""Compiles the native library when Quire is installed or packed into a wheel.

Without a compiler, pip fetches clang for the build alone, as the package `ziglang`. If an index has
no such package, the installation fails: WITHOUT_ZIGLANG=1 in the environment installs without the
library, and `python -m model.native.build` prints the reason.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # a build backend does not see the project

from model.native import NativeUnavailable
from model.native.build import build_into_package, find_compiler

ZIG = "ziglang>=0.17,<0.18"  # 100 MB; later releases were not tried


class WithLibrary(Distribution):
    """A distribution for one kind of machine."""

    def has_ext_modules(self) -> bool:
        """The library is no extension module, but as much a binary."""
        return True


class BuildLibrary(build_py):
    """Also compiles the library, and packs this one only: not those of earlier sources."""

    def run(self) -> None:
        """Compiles in the project's tree, so that an editable installation finds it."""
        super().run()
        try:
            made = build_into_package()
        except NativeUnavailable as reason:
            self.warn(f"there will be no native library, and the torch runner serves: {reason}")
            return
        if not self.editable_mode:
            folder = Path(self.build_lib, "model", "native", "lib")
            shutil.rmtree(folder, ignore_errors=True)
            self.mkpath(str(folder))
            self.copy_file(str(made), str(folder))


class TagWheel(bdist_wheel):
    """The library has no interface of Python's, so the wheel fits every version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """(python, ABI, platform)"""
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=WithLibrary,
    cmdclass={"build_py": BuildLibrary, "bdist_wheel": TagWheel},
    setup_requires=[] if find_compiler() or os.environ.get("WITHOUT_ZIGLANG") else [ZIG],
)
