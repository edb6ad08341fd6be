"""What the Hopper kernels of attention share: layouts of a warp group, and rows that are cleared."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)  # of a consumer warp group: the M of a `wgmma`


@gluon.constexpr_function
def wgmma_layout(n):
    """Of an accumulator [64, n] in the registers of a warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16])


@gluon.constexpr_function
def row_layout(d, warps):
    """Of rows of `d` 16-bit values, 16 bytes a thread: memory is read and written in whole lines."""
    return gl.BlockedLayout([1, 8], [256 // d, d // 8], [warps, 1], [1, 0])


@gluon.jit
def clear_rows(tile, n_valid, WARPS: gl.constexpr):
    """Zeros in a tile's rows from `n_valid` on: those rows are another sequence's, and 0 * NaN would be NaN."""
    D: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = row_layout(D, WARPS)
    # Rows at a time: what fits into few registers.
    PART: gl.constexpr = min(tile.shape[0], max(8, 1024 * WARPS // D))
    for i in gl.static_range(tile.shape[0] // PART):
        part = tile.slice(i * PART, PART)
        o_r = i * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
        x = part.load(layout)
        part.store(gl.where((o_r < n_valid)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def clear_share(tile, n_valid, WARP_GROUP: gl.constexpr, WARP_GROUPS: gl.constexpr):
    """`clear_rows` of a warp group's share of a tile, for warp groups that wait for one another before they read it."""
    SHARE: gl.constexpr = tile.shape[0] // WARP_GROUPS
    clear_rows(tile.slice(WARP_GROUP * SHARE, SHARE), n_valid - WARP_GROUP * SHARE, 4)


@gluon.jit
def clear_end(tile, n_valid, n_copied, COPIED: gl.constexpr):
    """`clear_rows` by one warp, for a tile of which TMA copies the first `n_copied` rows.

    COPIED: clear among those, when they have come. Otherwise clear the rows after them, while they are on their way.
    """
    D: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = row_layout(D, 1)
    PART: gl.constexpr = max(8, 1024 // D)
    for i in gl.static_range(tile.shape[0] // PART):
        part = tile.slice(i * PART, PART)
        o_r = i * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
        if COPIED:
            if (i * PART < n_copied) & ((i + 1) * PART > n_valid):
                x = part.load(layout)
                part.store(gl.where((o_r < n_valid)[:, None], x, gl.zeros_like(x)))
        else:
            if i * PART >= n_copied:
                part.store(gl.zeros((PART, D), tile.dtype, layout))


@gluon.jit
def clear_outside(p, p_cu, n_seqs, n_tokens, stride_t, stride_n, N: gl.constexpr):
    """`kernels.common.clear_outside`, by one warp of each CTA."""
    BLOCK: gl.constexpr = 256
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    start = gl.load(p_cu)
    end = gl.load(p_cu + n_seqs)
    for i in range(gl.program_id(0), n_tokens - (end - start), gl.num_programs(0)):
        o_t = gl.where(i < start, i, i - start + end).to(gl.int64)
        for n in range(0, N, BLOCK):
            o_n = (n + gl.arange(0, BLOCK, layout)).to(gl.int64)
            zeros = gl.zeros((BLOCK,), p.dtype.element_ty, layout)
            gl.store(p + o_t * stride_t + o_n * stride_n, zeros, mask=o_n < N)
