"""What only sets the speed of an embedding."""

from __future__ import annotations

import functools
from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2
from bi_ops.core.limits import columns_for_grid


class TileConfig(NamedTuple):
    """One program serves `rows` tokens x `cols` columns; the gradient loads `unroll` tokens at a time."""

    rows: int
    cols: int
    unroll: int = 1
    num_warps: int = 4


@functools.lru_cache(maxsize=1024)
def lookup_config(n_rows: int, n_cols: int) -> TileConfig:
    """About a thousand elements per program on a GPU; in the interpreter one program does nearly all."""
    elements = 1 << 18 if runtime.INTERPRET else 1024
    cols = max(min(next_power_of_2(n_cols), elements), columns_for_grid(n_cols))
    return TileConfig(rows=min(next_power_of_2(n_rows), max(elements // cols, 1)), cols=cols)


@functools.lru_cache(maxsize=1024)
def touched_config(n_rows: int, n_cols: int) -> TileConfig:
    """Most programs find no row that is touched, so on a GPU one looks at sixteen."""
    if runtime.INTERPRET:
        return lookup_config(n_rows, n_cols)
    return TileConfig(rows=16, cols=max(min(next_power_of_2(n_cols), 256), columns_for_grid(n_cols)))


@functools.lru_cache(maxsize=1024)
def gradient_config(n_runs: int, n_cols: int) -> TileConfig:
    """Many ids per program in the interpreter. On a GPU one, narrow and with loads ahead of its sums.

    The sum of a frequent id is one chain of dependent adds, so columns are what is left to spread over the GPU, and
    eight independent loads in flight are what hides the memory behind the chain.
    """
    if runtime.INTERPRET:
        return lookup_config(n_runs, n_cols)
    cols = max(min(next_power_of_2(n_cols), 256), columns_for_grid(n_cols))
    return TileConfig(rows=1, cols=cols, unroll=8, num_warps=2)
