"""GEMMs of consecutive rows with the weight of their expert. Counts of rows are on the device; no host reads them.

One program owns one output tile and walks the reduced axis front to back: no split-K, no atomics. Programs are
persistent: each takes every num_programs-th tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import cast, dot


@triton.jit
def _tile_of(tile, n_tiles_m, n_tiles_n, GROUP_M: tl.constexpr):
    """(tile row, tile column). GROUP_M tile rows, which share weights in L2, are walked column by column."""
    first_m = tile // (GROUP_M * n_tiles_n) * GROUP_M
    rows_in_group = min(n_tiles_m - first_m, GROUP_M)
    within = tile % (GROUP_M * n_tiles_n)
    return first_m + within % rows_in_group, within // rows_in_group


@triton.jit(do_not_specialize=["R", "capacity"])
def tile_table_kernel(
    p_offsets,  # [E + 1], int32
    p_tiles,  # [tile rows + 1, 4], int32: their number; then the expert of each, its first row, the expert's last
    R,
    E,
    capacity,  # tile rows that p_tiles has room for: enough for every ascending p_offsets
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # more than E
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tile rows, expert by expert, a program for each. Program E has the rows behind the last expert's.

    Whatever p_offsets holds, no row outside of [0, R) is named.
    """
    pdl.begin(0, PDL)
    i_e = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    starts = tl.load(p_offsets + o_e, mask=o_e <= E, other=R)
    starts = tl.minimum(tl.maximum(starts, 0), R)
    ends = tl.minimum(tl.load(p_offsets + o_e + 1, mask=o_e < E, other=R), R)
    counts = tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M)
    before = tl.sum(tl.where(o_e < i_e, counts, 0), axis=0)
    count = tl.sum(tl.where(o_e == i_e, counts, 0), axis=0)
    first = tl.sum(tl.where(o_e == i_e, starts, 0), axis=0)
    last = tl.sum(tl.where(o_e == i_e, ends, 0), axis=0)
    if i_e == E:
        tl.store(p_tiles, tl.minimum(before + count, capacity))
    for t in range(0, count, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        p_tile = p_tiles + (1 + before + o_t) * 4
        m = (o_t < count) & (before + o_t < capacity)
        tl.store(p_tile, tl.zeros([BLOCK_T], tl.int32) + i_e, mask=m)
        tl.store(p_tile + 1, first + o_t * BLOCK_M, mask=m)
        tl.store(p_tile + 2, tl.zeros([BLOCK_T], tl.int32) + last, mask=m)


@triton.jit
def grouped_matmul_kernel(
    p_x,  # [R, K]
    p_w,  # [E, N, K]
    p_tiles,  # [tile rows + 1, 4], int32: see `tile_table_kernel`
    p_weights,  # [T, TOP_K], fp32: routing weights
    p_rows,  # [R], int32: the pair of a row, or -1
    p_y,  # [R, N]
    N,
    K,
    E,
    stride_x,
    stride_we,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K: no mask
):
    """y[r] = x[r] @ w[expert of r].T (* routing weight of r, in the accumulator); zeros behind the last expert."""
    i_tiles_n = tl.cdiv(N, BLOCK_N)
    i_tiles_m = tl.load(p_tiles)
    for tile in range(tl.program_id(0), i_tiles_m * i_tiles_n, tl.num_programs(0)):
        i_m, i_n = _tile_of(tile, i_tiles_m, i_tiles_n, GROUP_M)
        group = tl.load(p_tiles + 4 + i_m * 4)
        first = tl.load(p_tiles + 5 + i_m * 4)
        last = tl.load(p_tiles + 6 + i_m * 4)
        o_m = first.to(tl.int64) + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m = o_m < last
        m_n = o_n < N
        # Rows past the end read the first one and are not stored: the loads then need a mask over K alone.
        p_xm = p_x + tl.where(m_m, o_m, first.to(tl.int64))[:, None] * stride_x
        p_wn = p_w + group.to(tl.int64) * stride_we + tl.where(m_n, o_n, 0).to(tl.int64)[None, :] * stride_wn
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, tl.where(group < E, K, 0), BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            if EVEN_K:
                b_x = tl.load(p_xm + o_k[None, :])
                b_w = tl.load(p_wn + o_k[:, None] * stride_wk)
            else:
                b_x = tl.load(p_xm + o_k[None, :], mask=(o_k < K)[None, :], other=0.0)
                b_w = tl.load(p_wn + o_k[:, None] * stride_wk, mask=(o_k < K)[:, None], other=0.0)
            acc = dot(b_x, b_w, acc)
        if HAS_WEIGHTS:
            pairs = tl.load(p_rows + o_m, mask=m_m, other=-1)
            acc *= tl.load(p_weights + pairs, mask=pairs >= 0, other=0.0)[:, None]
        p_at = p_y + o_m[:, None] * N + o_n[None, :]
        tl.store(p_at, cast(acc, p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["R"])
def grouped_wgrad_kernel(
    p_g,  # [R, N]
    p_x,  # [R, K]
    p_offsets,  # [E + 1], int32
    p_dw,  # [E, N, K]
    R,
    N,
    K,
    E,
    stride_g,
    stride_x,
    BLOCK_M: tl.constexpr,  # of N
    BLOCK_N: tl.constexpr,  # of K
    BLOCK_T: tl.constexpr,  # rows in a step
    GROUP_M: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # dw is fp32 and where the accumulator starts
):
    """dw[e] (+)= g[rows of e].T @ x[rows of e], front to back. Where sums are carried on, an expert without rows keeps
    what it holds."""
    n_tiles_m = tl.cdiv(N, BLOCK_M)
    n_tiles_n = tl.cdiv(K, BLOCK_N)
    for tile in range(tl.program_id(0), E * n_tiles_m * n_tiles_n, tl.num_programs(0)):
        expert = tile // (n_tiles_m * n_tiles_n)
        i_m, i_n = _tile_of(tile % (n_tiles_m * n_tiles_n), n_tiles_m, n_tiles_n, GROUP_M)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.maximum(tl.load(p_offsets + expert), 0)
        last = tl.minimum(tl.load(p_offsets + expert + 1), R)
        m = (o_m < N)[:, None] & (o_n < K)[None, :]
        p_at = p_dw + (expert.to(tl.int64) * N + o_m)[:, None] * K + o_n[None, :]
        if ACCUMULATE:
            m = m & (o_m < tl.where(last > first, N, 0))[:, None]
            acc = tl.load(p_at, mask=m, other=0.0)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for t in range(first, last, BLOCK_T):
            o_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
            m_t = o_t < last
            b_g = tl.load(
                p_g + o_t[None, :] * stride_g + o_m[:, None], mask=m_t[None, :] & (o_m < N)[:, None], other=0.0
            )
            b_x = tl.load(
                p_x + o_t[:, None] * stride_x + o_n[None, :], mask=m_t[:, None] & (o_n < K)[None, :], other=0.0
            )
            acc = dot(b_g, b_x, acc)
        tl.store(p_at, cast(acc, p_dw.dtype.element_ty), mask=m)
