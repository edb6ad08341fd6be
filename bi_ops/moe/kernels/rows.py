"""Rows between tokens and experts: the stable sort of (token, slot) pairs by expert, copies, sums over slots.

A pair is token * TOP_K + slot. The sort counts whole numbers, so nothing in it has an order to fix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import cast


@triton.jit
def _pairs_of_chunk(p_experts, T, E, TOP_K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_P: tl.constexpr):
    """(pairs [BLOCK_P] of a program's tokens, their experts; -1 where there is no pair, or no such expert)."""
    o = tl.arange(0, BLOCK_P)
    pairs = tl.program_id(0) * (TOKENS * TOP_K) + o
    experts = tl.load(p_experts + pairs, mask=(o < TOKENS * TOP_K) & (pairs < T * TOP_K), other=-1)
    return pairs, tl.where(experts < E, experts, -1)


@triton.jit(do_not_specialize=["T"])
def count_pairs_kernel(
    p_experts,  # [T, TOP_K], int32
    p_counts,  # [chunks, E], int32
    T,
    E,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,  # of a chunk
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    _, experts = _pairs_of_chunk(p_experts, T, E, TOP_K, TOKENS, BLOCK_P)
    for e in range(0, E, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        counts = tl.sum((experts[:, None] == o_e[None, :]).to(tl.int32), axis=0)
        tl.store(p_counts + tl.program_id(0).to(tl.int64) * E + o_e, counts, mask=o_e < E)


@triton.jit(do_not_specialize=["C", "U"])
def chunk_starts_kernel(
    p_counts,  # [C, E], int32; becomes the rows of the expert before those of the chunk
    p_units,  # [U + 1], int32: the first token of each unit
    p_totals,  # [E], int32: rows of each expert
    C,
    U,
    E,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,  # a unit's rows of an expert start at a multiple of this
    HAS_UNITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_c = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    first = 0
    for u in range(0, U):
        last = C
        if HAS_UNITS:
            end = tl.load(p_units + u + 1) // TOKENS
            last = tl.where(u + 1 < U, tl.minimum(tl.maximum(end, first), C), C)
        for c in range(first, last, BLOCK_C):
            p = p_counts + (c + o_c).to(tl.int64)[:, None] * E + o_e[None, :]
            m = (c + o_c < last)[:, None] & (o_e < E)[None, :]
            counts = tl.load(p, mask=m, other=0)
            tl.store(p, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=m)
            total += tl.sum(counts, axis=0)
        total = (total + STEP - 1) // STEP * STEP
        first = last
    tl.store(p_totals + o_e, total, mask=o_e < E)


@triton.jit
def expert_offsets_kernel(
    p_totals,  # [E], int32
    p_offsets,  # [E + 1], int32
    E,
    BLOCK_E: tl.constexpr,
):
    o_e = tl.arange(0, BLOCK_E)
    totals = tl.load(p_totals + o_e, mask=o_e < E, other=0)
    tl.store(p_offsets + o_e, tl.cumsum(totals, axis=0) - totals, mask=o_e <= E)


@triton.jit(do_not_specialize=["T"])
def place_pairs_kernel(
    p_experts,  # [T, TOP_K], int32
    p_starts,  # [chunks, E], int32
    p_offsets,  # [E + 1], int32
    p_rows,  # [R], int32: the pair of a row
    p_places,  # [T, TOP_K], int32: the row of a pair; -1 for a pair without an expert
    T,
    E,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    pairs, experts = _pairs_of_chunk(p_experts, T, E, TOP_K, TOKENS, BLOCK_P)
    o = tl.arange(0, BLOCK_P)
    is_before = (experts[:, None] == experts[None, :]) & (o[None, :] < o[:, None])
    rank = tl.sum(is_before.to(tl.int32), axis=1)
    m = experts >= 0
    start = tl.load(p_starts + tl.program_id(0).to(tl.int64) * E + experts, mask=m, other=0)
    places = tl.load(p_offsets + experts, mask=m, other=0) + start + rank
    tl.store(p_rows + places, pairs, mask=m)
    is_pair = (o < TOKENS * TOP_K) & (pairs < T * TOP_K)
    tl.store(p_places + pairs, tl.where(m, places, -1), mask=is_pair)


@triton.jit
def _counts(p_experts, first, end, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """[BLOCK_E]: pairs of each expert among pairs [first, end)."""
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for p in range(first, end, BLOCK):
        o = p + tl.arange(0, BLOCK)
        experts = tl.load(p_experts + o, mask=o < end, other=-1)
        counts += tl.histogram(experts, BLOCK_E, mask=(experts >= 0) & (experts < E))
    return counts


@triton.jit(do_not_specialize=["P", "R"])
def dispatch_kernel(
    p_experts,  # [T, TOP_K], int32
    p_rows,  # [R], int32: the pair of a row; -1 for padding
    p_places,  # [T, TOP_K], int32: the row of a pair; -1 for a pair without an expert
    p_offsets,  # [E + 1], int32
    p_tiles,  # what `tile_table_kernel` writes; BLOCK_M == 0: nothing
    P,  # pairs
    E,
    R,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,  # pairs of a program
    BLOCK: tl.constexpr,  # pairs that are counted at a time
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """What the four kernels above do, in one, for one unit; and the tile table of the GEMMs that follow.

    Each program counts all pairs, those before its own first. Of the rest, experts' padding and tiles, it has a share.
    """
    pdl.begin(0, PDL)
    i, n = tl.program_id(0), tl.num_programs(0)
    o_e = tl.arange(0, BLOCK_E)
    before = _counts(p_experts, 0, i * BLOCK_P, E, BLOCK, BLOCK_E)
    counts = before + _counts(p_experts, i * BLOCK_P, P, E, BLOCK, BLOCK_E)
    padded = (counts + STEP - 1) // STEP * STEP
    starts = tl.cumsum(padded, axis=0) - padded
    total = tl.sum(padded, axis=0)
    if i == 0:
        tl.store(p_offsets + o_e, starts, mask=o_e < E)
        tl.store(p_offsets + E, total)

    o_p = tl.arange(0, BLOCK_P)
    pairs = i * BLOCK_P + o_p
    experts = tl.load(p_experts + pairs, mask=pairs < P, other=-1)
    experts = tl.where(experts < E, experts, -1)
    is_before = (experts[:, None] == experts[None, :]) & (o_p[None, :] < o_p[:, None])
    is_of = experts[:, None] == o_e[None, :]
    places = tl.sum(is_before.to(tl.int32), axis=1) + tl.sum(tl.where(is_of, (starts + before)[None, :], 0), axis=1)
    tl.store(p_rows + places, pairs, mask=experts >= 0)
    tl.store(p_places + pairs, tl.where(experts >= 0, places, -1), mask=pairs < P)

    is_own = (o_e % n == i) & (o_e < E)
    o_s = tl.arange(0, STEP)
    m_s = is_own[:, None] & (o_s[None, :] < (padded - counts)[:, None])
    tl.store(p_rows + (starts + counts)[:, None] + o_s[None, :], tl.full([BLOCK_E, STEP], -1, tl.int32), mask=m_s)
    for r in range(total + i * BLOCK_P, R, n * BLOCK_P):
        tl.store(p_rows + r + o_p, tl.full([BLOCK_P], -1, tl.int32), mask=r + o_p < R)

    if BLOCK_M > 0:
        tiles = tl.cdiv(padded, BLOCK_M)
        first = tl.cumsum(tiles, axis=0) - tiles
        n_tiles = tl.sum(tiles, axis=0)
        n_behind = tl.cdiv(R - total, BLOCK_M)
        if i == 0:
            tl.store(p_tiles, n_tiles + n_behind)
        for t in range(0, tl.max(tl.where(is_own, tiles, 0), axis=0)):
            p_tile = p_tiles + (1 + first + t) * 4
            m_t = is_own & (t < tiles)
            tl.store(p_tile, o_e, mask=m_t)
            tl.store(p_tile + 1, starts + t * BLOCK_M, mask=m_t)
            tl.store(p_tile + 2, starts + padded, mask=m_t)
        for t in range(i * BLOCK_P, n_behind, n * BLOCK_P):
            p_tile = p_tiles + (1 + n_tiles + t + o_p) * 4
            m_t = t + o_p < n_behind
            tl.store(p_tile, tl.zeros([BLOCK_P], tl.int32) + E, mask=m_t)
            tl.store(p_tile + 1, total + (t + o_p) * BLOCK_M, mask=m_t)
            tl.store(p_tile + 2, tl.zeros([BLOCK_P], tl.int32) + R, mask=m_t)


@triton.jit(do_not_specialize=["T", "R"])
def gather_rows_kernel(
    p_x,  # [T, N]
    p_rows,  # [R], int32
    p_places,  # [T, TOP_K], int32
    p_y,  # [R, N]
    T,
    R,
    N,
    stride_x,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of a program
    COLS: tl.constexpr,
    STEP: tl.constexpr,  # rows of a program that looks for padding
    PDL: tl.constexpr,
):
    """y[r] = x[token of row r]; zeros for a row without a pair. A token's row is read once."""
    if PDL:  # in turn: what follows may read ahead what an earlier kernel than this has written
        pdl.wait_for_predecessors()
        pdl.launch_dependents()
    i, n_t = tl.program_id(0), tl.cdiv(T, ROWS)
    o_n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_n = (o_n < N)[None, :]
    if i < n_t:
        o_t = i.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        m_t = o_t < T
        b_x = tl.load(p_x + o_t[:, None] * stride_x + o_n[None, :], mask=m_t[:, None] & m_n, other=0.0)
        for k in tl.static_range(TOP_K):
            place = tl.load(p_places + o_t * TOP_K + k, mask=m_t, other=-1).to(tl.int64)
            tl.store(p_y + place[:, None] * N + o_n[None, :], b_x, mask=(place >= 0)[:, None] & m_n)
    else:
        o_r = (i - n_t).to(tl.int64) * STEP + tl.arange(0, STEP)
        is_padding = tl.load(p_rows + o_r, mask=o_r < R, other=0) < 0
        zeros = tl.zeros([STEP, COLS], p_y.dtype.element_ty)
        tl.store(p_y + o_r[:, None] * N + o_n[None, :], zeros, mask=is_padding[:, None] & m_n)


@triton.jit(do_not_specialize=["T"])
def combine_rows_kernel(
    p_y,  # [R, N]
    p_places,  # [T, TOP_K], int32
    p_out,  # [T, N]
    T,
    N,
    stride_y,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = the sum of its rows of y, slot after slot in fp32, from +0; rounded once."""
    pdl.begin(0, PDL)
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    m_n = (o_n < N)[None, :]
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(p_places + o_t * TOP_K + k, mask=o_t < T, other=-1).to(tl.int64)
        p = p_y + place[:, None] * stride_y + o_n[None, :]
        acc += tl.load(p, mask=(place >= 0)[:, None] & m_n, other=0.0).to(tl.float32)
    p_at = p_out + o_t[:, None] * N + o_n[None, :]
    tl.store(p_at, cast(acc, p_out.dtype.element_ty), mask=(o_t < T)[:, None] & m_n)
