"""Launch choices of the embedding. The one order, each id's tokens front to back, has nothing to choose."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2


@dataclass(frozen=True)
class TileSchedule:
    """One program serves `rows` tokens x `cols` columns; the gradient loads `unroll` tokens at a time."""

    rows: int
    cols: int
    unroll: int = 1
    num_warps: int = 4


def forward_schedule(n_rows: int, n_cols: int) -> TileSchedule:
    """About a thousand elements per program on a GPU; in the interpreter one program does nearly all."""
    elements = 1 << 18 if runtime.INTERPRET else 1024
    cols = min(next_power_of_2(n_cols), elements)
    return TileSchedule(rows=min(next_power_of_2(n_rows), elements // cols), cols=cols)


def backward_schedule(n_runs: int, n_cols: int) -> TileSchedule:
    """Many ids per program in the interpreter. On a GPU one, narrow and with loads ahead of its sums.

    The sum of a frequent id is one chain of dependent adds, so columns are what is left to spread over the GPU, and
    eight independent loads in flight are what hides the memory behind the chain.
    """
    if runtime.INTERPRET:
        return forward_schedule(n_runs, n_cols)
    return TileSchedule(rows=1, cols=min(next_power_of_2(n_cols), 256), unroll=8, num_warps=2)
