"""What only sets the speed of a rotation."""

from __future__ import annotations

from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2


class RowConfig(NamedTuple):
    """One program rotates `rows` (token, head) pairs with `num_warps` warps."""

    rows: int
    num_warps: int = 4


def row_config(n_rows: int, half_dim: int) -> RowConfig:
    """About a thousand pairs of elements per program on a GPU; in the interpreter one program does nearly all."""
    elements = 1 << 17 if runtime.INTERPRET else 1024
    return RowConfig(rows=min(next_power_of_2(n_rows), max(elements // half_dim, 1)))
