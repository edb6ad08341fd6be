"""What an index, an offset and a grid can hold.

Kernels count in 32 bits where these suffice and in 64, `LARGE`, where they do not: the same bits, at another speed.
"""

from __future__ import annotations

from operator import mul

import torch

from bi_ops.core.integers import cdiv, next_power_of_2

#: Indices and offsets below this fit 32 bits, those of a tile that reaches past the end included.
SMALL = 2**31 - 2**20

#: Programs along the second and the third axis of a CUDA grid. Along the first there are as many as int32 counts.
GRID_YZ = 65535


def is_large(*tensors: torch.Tensor) -> bool:
    """Does a tensor have elements, or reach past its first one, as far as 32 bits do not count?"""
    for t in tensors:
        if t.numel() >= SMALL or (not t.is_contiguous() and sum(map(mul, t.shape, t.stride())) >= SMALL):
            return True
    return False


def columns_for_grid(n_cols: int) -> int:
    """The fewest columns, a power of two, that a program must have for axis y of a grid to hold `n_cols`."""
    return next_power_of_2(cdiv(n_cols, GRID_YZ))


def check_programs(op: str, programs: int) -> None:
    """Raise ValueError if the first axis of a grid does not hold so many programs."""
    if programs >= 2**31:
        raise ValueError(f"{op}: {programs} programs, and a grid holds 2**31 - 1; call it in parts of fewer rows")
