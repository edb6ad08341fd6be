"""Where a figure was measured: device, versions, time."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform

import torch

from bi_ops.core import runtime

#: Packages whose release can change bits or speed.
PACKAGES = ("torch", "triton", "vllm", "flash-attn", "flash-attn-4", "liger-kernel", "transformers")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Python's, CUDA's and the installed packages'."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name() -> str:
    return "Triton interpreter" if runtime.INTERPRET else torch.cuda.get_device_name()
