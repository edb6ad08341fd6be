"""What only sets the speed of an activation."""

from __future__ import annotations

import functools
from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2
from bi_ops.core.limits import columns_for_grid

#: Outputs that fill a GPU many times.
MANY = 1 << 22


class TileConfig(NamedTuple):
    """One program computes `rows` x `cols` outputs with `num_warps` warps."""

    rows: int
    cols: int
    num_warps: int = 4


@functools.lru_cache(maxsize=1024)
def tile_config(n_rows: int, n_cols: int) -> TileConfig:
    """Short rows share a program on a GPU, which has 2,048 elements where these fill it many times; in the interpreter,
    where programs are dear, one does nearly all."""
    elements = 1 << 18 if runtime.INTERPRET else 2048 if n_rows * n_cols >= MANY else 1024
    cols = max(min(next_power_of_2(n_cols), elements), columns_for_grid(n_cols))
    return TileConfig(rows=min(next_power_of_2(n_rows), max(elements // cols, 1)), cols=cols)
