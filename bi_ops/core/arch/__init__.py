"""The architectures that bits belong to: one table, one file an architecture.

An order may ask an architecture what it is like (`Arch`). What the table does not know takes the orders named
`portable`, says so once, and `bi-ops doctor` shows it: bits never change because another Triton was installed.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import torch

from bi_ops.core import replay, runtime
from bi_ops.core.arch.base import Arch
from bi_ops.core.arch.interpreter import INTERPRETER
from bi_ops.core.arch.portable import PORTABLE
from bi_ops.core.arch.sm_90 import SM_90

__all__ = ["INTERPRETER", "PORTABLE", "SM_90", "Arch", "current", "known", "of", "register"]

_TABLE: dict[str, Arch] = {}


def register(arch: Arch) -> Arch:
    """Add an architecture to the table, or replace the entry of that name."""
    _TABLE[arch.name] = arch
    _of_name.cache_clear()
    of.cache_clear()
    replay.forget()
    return arch


def known() -> dict[str, Arch]:
    """Every architecture of the table, by name."""
    return dict(_TABLE)


@functools.lru_cache
def of(device: torch.device) -> Arch:
    """The architecture whose orders hold on `device`: the table's entry, or `portable` under the GPU's name.

    Warns once per GPU type where the table does not know the GPU, or its kernels do not know the installed Triton.
    """
    if runtime.INTERPRET or device.type == "cpu":
        return INTERPRETER
    return _of_name(runtime.architecture(device if device.type == "cuda" else None))


def current() -> Arch:
    """The architecture of the device that new tensors are made on."""
    return of(runtime.default_device())


@functools.lru_cache
def _of_name(name: str) -> Arch:
    import triton

    from bi_ops.core.triton_helpers import thread_sums

    sums = thread_sums(triton.__version__)
    entry = _TABLE.get(name)
    if entry is None:
        reason = f"bi_ops knows no orders of its own for {name} (known: {', '.join(sorted(_TABLE))})"
    elif not entry.knows_triton(triton.__version__):
        releases = ", ".join(entry.triton_releases)
        reason = f"{name}'s kernels were not built with Triton {triton.__version__} (known: {releases})"
    else:
        return entry if entry.thread_sums == sums else replace(entry, thread_sums=sums)
    warnings.warn(
        f"bi_ops: {reason}; it takes the portable orders, whose bits are not {name}'s own",
        stacklevel=2,
    )
    return replace(PORTABLE, name=name, reason=reason, thread_sums=sums)


for _arch in (SM_90, INTERPRETER):
    register(_arch)
