"""What fixes the bits of a norm (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops._common import runtime


@dataclass(frozen=True)
class RowOrder:
    """One row is summed in chunks of `block` columns, front to back, by `num_warps` warps.

    Both are vLLM's (`rms_norm_batch_invariant`: 1024 columns, Triton's default of 4 warps): the tree inside a chunk
    follows from them, so they are the order and not a schedule.
    """

    block: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class TokenOrder:
    """dweight sums rows front to back inside chunks of `chunk` rows, then the chunks front to back.

    The chunk is counted in rows, never in SMs: the bits belong to no GPU size.
    """

    chunk: int = 256
    tile_rows: int = 32
    tile_cols: int = 128
    num_warps: int = 4


def row_order() -> RowOrder:
    """The order of a forward or dX row; takes no row count."""
    return RowOrder()


def token_order() -> TokenOrder:
    """The order of dweight; takes no row count either: the last chunk is only shorter."""
    return TokenOrder()


def rows_per_program(n_rows: int) -> int:
    """Rows one program handles: one on a GPU; all of them in the interpreter, where programs are dear."""
    return min(1 << max(n_rows - 1, 0).bit_length(), 256) if runtime.INTERPRET else 1
