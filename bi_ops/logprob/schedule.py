"""What fixes the bits of a softmax row (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops.core import runtime


@dataclass(frozen=True)
class RowOrder:
    """exp(x - max) is summed in chunks of `block` columns, front to back, by `num_warps` warps.

    Both are those of vLLM's sampler kernels (1024 columns, Triton's default of 4 warps).
    """

    block: int = 1024
    num_warps: int = 4


def row_order() -> RowOrder:
    """The order of a row; takes no row count."""
    return RowOrder()


def rows_per_program(n_rows: int) -> int:
    """Rows one program handles: one on a GPU; all of them in the interpreter, where programs are dear."""
    return min(1 << max(n_rows - 1, 0).bit_length(), 256) if runtime.INTERPRET else 1
