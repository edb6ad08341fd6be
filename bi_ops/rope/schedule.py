"""What only sets a rotation's speed. Its bits need no order: every element is computed by itself, rounded once."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops.core import runtime


@dataclass(frozen=True)
class RowSchedule:
    """One program turns `rows` (token, head) pairs with `num_warps` warps."""

    rows: int
    num_warps: int = 4


def schedule(n_rows: int, half_dim: int) -> RowSchedule:
    """About a thousand pairs of elements per program on a GPU; in the interpreter one program does nearly all."""
    elements = 1 << 17 if runtime.INTERPRET else 1024
    return RowSchedule(rows=min(1 << max(n_rows - 1, 0).bit_length(), max(elements // half_dim, 1)))
