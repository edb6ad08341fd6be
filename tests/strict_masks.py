"""Masks that are no booleans are refused in every interpreter: Triton's own does it since 3.9, and converts before.

It splats a comparison of two scalars as int32, so a block's mask and such a comparison make one of these.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from triton.runtime import interpreter


def _strict(name: str, place: int) -> None:
    own = getattr(interpreter.InterpreterBuilder, name)

    @functools.wraps(own)
    def call(self: Any, *args: Any) -> Any:
        mask = args[place].data
        if mask.dtype != np.bool_:
            raise TypeError(f"{name}: the mask is {mask.dtype}, not bool; compare a block, not two scalars")
        return own(self, *args)

    setattr(interpreter.InterpreterBuilder, name, call)


def install() -> None:
    """Once a process."""
    if not hasattr(interpreter.InterpreterBuilder.create_masked_load, "__wrapped__"):
        _strict("create_masked_load", 1)
        _strict("create_masked_store", 2)
