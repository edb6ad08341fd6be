"""Carries csrc/ in the wheel, and builds the cuBLASLt binding into it where torch with CUDA and cuBLAS's headers are.

A build that pip isolates sees no torch: `pip install --no-build-isolation .` builds the binding, `pip install .` leaves
it to the first use. So does a build that fails: the package works, and `bi-ops doctor` says what is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = sorted((ROOT / "csrc").glob("*.cpp"))


class BuildPy(build_py):
    """Copies csrc/ to bi_ops/csrc, so that an installed package can build the binding on first use."""

    def _copies(self) -> dict[str, str]:
        """Where each source goes. An editable install needs none: it finds csrc/ beside the package."""
        if self.editable_mode:
            return {}
        folder = Path(self.build_lib) / "bi_ops" / "csrc"
        return {str(folder / source.name): str(source) for source in SOURCES}

    def run(self) -> None:
        super().run()
        for target, source in self._copies().items():
            self.mkpath(os.path.dirname(target))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *self._copies()]


def binding() -> dict[str, Any]:
    """What setup() needs to build the binding; nothing where it cannot be built."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        if torch.version.cuda is None:
            return {}
        sys.path.insert(0, str(ROOT))
        from bi_ops.matmul import cublaslt
    except ImportError:
        return {}
    how, _ = cublaslt.recipe()
    if how is None:
        return {}
    how["sources"] = [os.path.relpath(source, ROOT) for source in how["sources"]]
    extension = CppExtension(f"bi_ops.matmul.{cublaslt.name()}", **how, optional=True)
    # Without ninja: a failure is then one that `optional` forgives.
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)}}


built = binding()
setup(**{**built, "cmdclass": {"build_py": BuildPy, **built.get("cmdclass", {})}})
