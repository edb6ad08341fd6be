"""What only sets the speed of a sum."""

from __future__ import annotations

import functools
from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2


class SumConfig(NamedTuple):
    """`rows` sums per program; `along_k`: they are neighbours on the inner axis of one outer index."""

    rows: int
    along_k: bool
    num_warps: int = 4


@functools.lru_cache(maxsize=4096)
def sum_config(m: int, k: int, lanes: int) -> SumConfig:
    """How m * k sums are dealt to programs. The pairwise tree is spelled out, so no choice here changes bits."""
    if runtime.INTERPRET:
        # One program for everything that fits Triton's limit of 2**20 elements in a tile.
        return SumConfig(min(next_power_of_2(m * k), 2**20 // lanes // 2), along_k=False)
    # 64 fp32 accumulators per thread. Sums that are neighbours in memory share a program, so that loads coalesce.
    rows = max(8192 // lanes, 1)
    if k > 1:
        return SumConfig(min(next_power_of_2(k), rows, 128), along_k=True)
    return SumConfig(min(next_power_of_2(m), rows // 8 or 1), along_k=False)
