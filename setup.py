"""Builds the cuBLASLt binding into the package where a torch with CUDA and cuBLAS's headers are at hand.

A build that pip isolates sees no torch: `pip install --no-build-isolation .` does this, `pip install .` leaves it to
the first use. So does a build that fails: the package works, and `bi-ops doctor` says what is missing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).resolve().parent


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


setup(**binding())
