"""What fixes the bits of a norm (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops._common import runtime
from bi_ops._common.rows import TOKEN_STEP


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
    """dweight adds rows front to back inside chunks of `chunk` rows, then the chunks front to back.

    A chunk divides TOKEN_STEP tokens whatever number of rows (heads) a token has, so the sum of a batch that is cut
    there can be carried on. It is counted in rows, never in SMs: the bits belong to no GPU size.
    """

    chunk: int = TOKEN_STEP


@dataclass(frozen=True)
class TokenSchedule:
    """One program sums `rows` chunks x `cols` columns; the sum of the chunks has `unroll` loads in flight."""

    rows: int
    cols: int
    unroll: int
    num_warps: int = 4


def row_order() -> RowOrder:
    """The order of a forward or dX row; takes no row count."""
    return RowOrder()


def token_order() -> TokenOrder:
    """The order of dweight; takes no row count either: the last chunk is only shorter."""
    return TokenOrder()


def token_schedule(n_chunks: int, n_cols: int) -> TokenSchedule:
    """Four columns per thread on a GPU; in the interpreter one program does nearly all. Any gives the same bits.

    Adding the chunks is one chain per column, so loads ahead of it are what hides the memory.
    """
    elements = 1 << 18 if runtime.INTERPRET else 512
    cols = min(_next_power_of_2(n_cols), elements)
    return TokenSchedule(min(_next_power_of_2(n_chunks), elements // cols), cols, 1 if runtime.INTERPRET else 16)


def rows_per_program(n_rows: int) -> int:
    """Rows one program handles: one on a GPU; all of them in the interpreter, where programs are dear."""
    return min(_next_power_of_2(n_rows), 256) if runtime.INTERPRET else 1


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
