"""What fixes the bits of a norm (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops.core import runtime
from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.rows import ALIGNMENT, TOKEN_STEP

#: Elements of a tile of several rows. A thread that had less than 16 bytes of it would be another layout, with another
#: tree, so the tile does not shrink when rows are few.
TILE = 2048

#: Bytes of the longest row that is held in registers, so that it is read once. dX holds g, x and the weight.
HELD = 16384


@dataclass(frozen=True)
class RowOrder:
    """One row is summed in chunks of `block` columns, front to back, by `num_warps` warps.

    Both are vLLM's (`rms_norm_batch_invariant`: 1024 columns, Triton's default of 4 warps): the tree inside a chunk
    follows from them, so they are the order and not a schedule.
    """

    block: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class RowSchedule:
    """One program has `rows` rows and holds `chunks` of `block` columns in registers; 0: none, a row is read twice.

    Two kinds have the tree of `RowOrder`. All have its warps, and 16 bytes of a row next to each other in a thread.

    - One row whose chunks are side by side: each keeps all warps to itself.
    - Rows of one short chunk: with fewer columns than 1024 in the tile a row lies in the first threads of those that
      it would have to itself. A thread adds its elements front to back, lanes then meet at distances 16, 8, ..., 1 and
      warps at 2, 1; the distances that are gone are those at which the row would have met zeros, which change no bit.
    """

    rows: int
    chunks: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class TokenOrder:
    """dweight adds rows front to back inside chunks of `chunk` rows, then the chunks front to back.

    A chunk divides TOKEN_STEP tokens whatever number of rows (heads) a token has, so the sum of a batch that is cut
    there can be carried on. It is counted in rows, never in SMs: the bits belong to no GPU size.
    """

    chunk: int = TOKEN_STEP


@dataclass(frozen=True)
class TokenSchedule:
    """One program sums `rows` chunks x `cols` columns. Then one adds the chunks of `add_cols` columns, `unroll` in a
    round, with the rounds of `stages - 1` to come on their way."""

    rows: int
    cols: int
    add_cols: int
    unroll: int
    stages: int
    num_warps: int = 4
    add_warps: int = 1


def row_order() -> RowOrder:
    """The order of a forward or dX row; takes no row count."""
    return RowOrder()


def token_order() -> TokenOrder:
    """The order of dweight; takes no row count either: the last chunk is only shorter."""
    return TokenOrder()


def row_schedule(n_rows: int, n_cols: int, itemsize: int) -> RowSchedule:
    """Short rows share a program, long ones are held; in the interpreter, where programs are dear, all rows share one.

    On a GPU `n_rows` changes nothing: see `TILE`. Where N is no multiple of 16, results are stored in pieces of other
    sizes, which may turn a tile of several rows to another layout, so there a program has one row, chunk by chunk.
    """
    order = row_order()
    block = min(max(next_power_of_2(n_cols), ALIGNMENT), order.block)
    if runtime.INTERPRET:
        return RowSchedule(min(next_power_of_2(n_rows), 256), int(n_cols <= block), block, order.num_warps)
    if n_cols % ALIGNMENT or n_cols * itemsize > HELD:
        return RowSchedule(1, 0, order.block, order.num_warps)
    chunks = next_power_of_2(cdiv(n_cols, block))
    return RowSchedule(TILE // block if chunks == 1 else 1, chunks, block, order.num_warps)


def token_schedule(n_chunks: int, n_cols: int) -> TokenSchedule:
    """Four elements a thread on a GPU; in the interpreter one program does nearly all. Any gives the same bits.

    Rows are a multiple of 4, so that a thread stores 4 chunks of a column at once. Adding the chunks is one chain per
    column: one warp with a column a thread, so that short rows have as many of them as can be, and 128 chunks, or 512
    cycles of adds, on their way.
    """
    if runtime.INTERPRET:
        cols = min(next_power_of_2(n_cols), 1 << 18)
        return TokenSchedule(min(next_power_of_2(n_chunks), (1 << 18) // cols), cols, cols, 4, 1)
    cols = min(max(next_power_of_2(n_cols), ALIGNMENT), 128)
    return TokenSchedule(512 // cols, cols, 32, 64, 3)


def in_one_pass(rows: RowSchedule, n_chunks: int, processors: int) -> bool:
    """Whether dX and the chunks' sums of dweight take one pass: a program then has `rows.rows` chunks, row after row.

    That needs rows that are held, with a sum beside each, and programs enough to fill a GPU. Either way has the same
    bits.
    """
    return 0 < rows.chunks <= 4 and n_chunks >= 2 * rows.rows * processors
