"""What only sets the speed of a norm. Every function here may look at the number of rows and at the GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.limits import columns_for_grid
from bi_ops.core.rows import ALIGNMENT
from bi_ops.norm.order import RowOrder

#: Elements of a tile of several rows. A thread that had less than 16 bytes of it would be another layout, with another
#: tree, so the tile does not shrink when rows are few.
TILE = 2048

#: Tiles of queries from which on a program takes several.
FULL = 4096

#: Bytes of the longest row that is held in registers, so that it is read once. dX holds g, x and the weight.
HELD = 16384


class RowConfig(NamedTuple):
    """One program has `rows` rows and holds `chunks` chunks of columns in registers; 0: none, a row is read twice.

    tiles: of the norm of queries and keys, `rows` rows each, one after another. stages: of a backward that goes row by
    row: `stages - 1` rows to come are on their way.

    All have the tree of `RowOrder`: its warps, and 16 bytes of a row next to each other in a thread. That is why a tile
    of several rows must have at least 16 bytes for every thread.
    """

    rows: int
    chunks: int
    tiles: int = 1
    stages: int = 1


class TokenConfig(NamedTuple):
    """One program sums `rows` chunks x `cols` columns. Then one adds the chunks of `add_cols` columns, `unroll` in a
    round, with the rounds of `stages - 1` to come on their way."""

    rows: int
    cols: int
    add_cols: int
    unroll: int
    stages: int
    num_warps: int = 4
    add_warps: int = 1


class BackwardConfig(NamedTuple):
    """rows: of dX. tokens: of dweight. one_pass: one kernel makes dX and the chunks' sums of dweight, if both are
    needed; a program then has `rows.rows` chunks, row after row. It needs rows that are held."""

    rows: RowConfig
    tokens: TokenConfig
    one_pass: bool


@functools.lru_cache(maxsize=1024)
def row_config(n_rows: int, n_cols: int, itemsize: int, order: RowOrder) -> RowConfig:
    """Short rows share a program, long ones are held; in the interpreter, where programs are dear, all rows share one.

    On a GPU `n_rows` changes nothing: see `TILE`. Where N is no multiple of 16, results are stored in pieces of other
    sizes, which may turn a tile of several rows to another layout, so there a program has one row, chunk by chunk.
    """
    block = order.tile(n_cols, held=True)
    if runtime.INTERPRET:
        return RowConfig(min(next_power_of_2(n_rows), 256), int(n_cols <= block))
    if n_cols % ALIGNMENT or n_cols * itemsize > HELD:
        return RowConfig(1, 0)
    chunks = next_power_of_2(cdiv(n_cols, block))
    return RowConfig(TILE // block if chunks == 1 else 1, chunks)


@functools.lru_cache(maxsize=1024)
def heads_config(n_rows: int, head_dim: int, itemsize: int, order: RowOrder) -> RowConfig:
    """`row_config` for the heads of queries and keys: where they fill a GPU several times, a program takes eight tiles,
    and loads the next one's rows while it computes (bench/LOG.md)."""
    c = row_config(n_rows, head_dim, itemsize, order)
    many = not runtime.INTERPRET and n_rows >= FULL * c.rows
    return c._replace(tiles=8) if many else c


def heads_backward_config(n_chunks: int, head_dim: int, itemsize: int, order: RowOrder) -> RowConfig:
    """`row_config` for the backward of the heads of queries and keys."""
    return row_config(n_chunks, head_dim, itemsize, order)._replace(stages=3)


@functools.lru_cache(maxsize=1024)
def token_config(n_chunks: int, n_cols: int) -> TokenConfig:
    """Four elements a thread on a GPU; in the interpreter one program does nearly all. Any gives the same bits.

    Rows are a multiple of 4, so that a thread stores 4 chunks of a column at once. Adding the chunks is one chain per
    column: one warp with a column a thread, so that short rows have as many of them as can be, and 320 chunks, or 1,280
    cycles of adds, on their way: memory is no nearer.
    """
    if runtime.INTERPRET:
        cols = min(next_power_of_2(n_cols), 1 << 18)
        return TokenConfig(min(next_power_of_2(n_chunks), (1 << 18) // cols), cols, cols, 4, 1)
    cols = max(min(max(next_power_of_2(n_cols), ALIGNMENT), 128), columns_for_grid(n_cols))
    return TokenConfig(max(512 // cols, 4), cols, 32, 64, 6)


def padded_chunks(n_rows: int, chunk: int, tokens: TokenConfig) -> int:
    """Chunks of `n_rows` rows, up to a whole round of `tokens`: those past the end hold 0.0, so no mask is needed."""
    return cdiv(n_rows, chunk * tokens.unroll) * tokens.unroll


def backward_config(
    n_rows: int, n_cols: int, itemsize: int, order: RowOrder, chunk: int, num_sms: int
) -> BackwardConfig:
    """As `row_config` and `token_config`; one pass where rows are held, with a sum beside each, and chunks are enough
    to fill the GPU."""
    rows, tokens = row_config(n_rows, n_cols, itemsize, order), token_config(cdiv(n_rows, chunk), n_cols)
    fills = padded_chunks(n_rows, chunk, tokens) >= 2 * rows.rows * num_sms
    return BackwardConfig(rows._replace(stages=4), tokens, fills and 0 < rows.chunks <= 4)
