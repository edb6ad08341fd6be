"""Carries csrc/ in the wheel, and compiles it into the wheel where a C++ compiler is.

The library needs neither torch nor CUDA to be compiled and serves every release of them that bi_ops supports
(bi_ops/matmul/recipe.py), so a build that pip isolates has it too. Without a compiler the wheel is one of Python alone,
and a failure fails no install. `bi-ops doctor` says what is missing then.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
recipe = SimpleNamespace(**runpy.run_path(str(ROOT / "bi_ops" / "matmul" / "recipe.py")))


class BuildPy(build_py):
    """Copies csrc/ to bi_ops/csrc: what a library was compiled from is known, and one can be compiled on first use."""

    def _copies(self) -> dict[str, str]:
        """Where each source goes. An editable install needs none: it finds csrc/ beside the package."""
        if self.editable_mode:
            return {}
        folder = Path(self.build_lib) / "bi_ops" / "csrc"
        return {str(folder / source.name): str(source) for source in recipe.files(CSRC)}

    def run(self) -> None:
        super().run()
        for target, source in self._copies().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._copies()]


def library() -> dict[str, Any]:
    """What setup() needs to compile the library; nothing where it cannot be compiled."""
    if sys.platform != "linux" or recipe.unsupported_reason(CSRC):
        return {}
    extension = Extension(
        f"bi_ops.matmul.{recipe.NAME}",
        sources=["csrc/cublaslt.cpp"],
        depends=[os.path.relpath(path, ROOT) for path in recipe.files(CSRC)],
        define_macros=recipe.macros(CSRC),
        extra_compile_args=recipe.COMPILE,
        extra_link_args=recipe.LINK,
        py_limited_api=True,
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "options": {"bdist_wheel": {"py_limited_api": "cp" + "".join(map(str, recipe.PYTHON))}},
    }


setup(cmdclass={"build_py": BuildPy}, **library())
