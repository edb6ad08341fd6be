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


@triton.jit(do_not_specialize=["P"])
def count_expert_kernel(
    p_experts,  # [T, TOP_K], int32
    p_counts,  # [E], int32
    P,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Pairs of a program's expert, of few: each program reads all of them."""
    pdl.begin(0, PDL)
    counts = tl.zeros([BLOCK], dtype=tl.int32)
    for p in range(0, P, BLOCK):
        o_p = p + tl.arange(0, BLOCK)
        counts += (tl.load(p_experts + o_p, mask=o_p < P, other=-1) == tl.program_id(0)).to(tl.int32)
    tl.store(p_counts + tl.program_id(0), tl.sum(counts, axis=0))


@triton.jit(do_not_specialize=["P", "R"])
def place_expert_kernel(
    p_experts,  # [T, TOP_K], int32
    p_counts,  # [E], int32
    p_rows,  # [R], int32: the pair of a row; -1 for padding
    p_places,  # [T, TOP_K], int32: the row of a pair; -1 for a pair without an expert
    p_offsets,  # [E + 1], int32
    P,
    E,
    R,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows of a program's expert, in one unit. Program E has the pairs of no expert, and the rows behind the last."""
    pdl.begin(0, PDL)
    i_e = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    padded = tl.cdiv(tl.load(p_counts + o_e, mask=o_e < E, other=0), STEP) * STEP
    start = tl.sum(tl.where(o_e < i_e, padded, 0), axis=0)
    end = tl.where(i_e < E, start + tl.sum(tl.where(o_e == i_e, padded, 0), axis=0), R)
    tl.store(p_offsets + i_e, start)
    o = tl.arange(0, BLOCK)
    for p in range(0, P, BLOCK):
        experts = tl.load(p_experts + p + o, mask=p + o < P, other=0)
        experts = tl.where((experts >= 0) & (experts < E), experts, E)
        is_own = (experts == i_e) & (p + o < P)
        is_row = is_own & (experts < E)
        places = start + tl.cumsum(is_row.to(tl.int32), axis=0) - 1
        tl.store(p_rows + places, p + o, mask=is_row)
        tl.store(p_places + p + o, tl.where(is_row, places, -1), mask=is_own)
        start += tl.sum(is_row.to(tl.int32), axis=0)
    for r in range(start, end, BLOCK):
        tl.store(p_rows + r + o, tl.full([BLOCK], -1, tl.int32), mask=r + o < end)


@triton.jit(do_not_specialize=["R"])
def gather_rows_kernel(
    p_x,  # [T, N]
    p_rows,  # [R], int32
    p_y,  # [R, N]
    R,
    N,
    stride_x,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[r] = x[token of row r]; zeros for a row without a pair."""
    pdl.begin_in_order(PDL)
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_n = tl.program_id(1) * COLS + tl.arange(0, COLS)
    pairs = tl.load(p_rows + o_r, mask=o_r < R, other=-1)
    m_n = (o_n < N)[None, :]
    tokens = (pairs // TOP_K).to(tl.int64)
    b_x = tl.load(p_x + tokens[:, None] * stride_x + o_n[None, :], mask=(pairs >= 0)[:, None] & m_n, other=0.0)
    tl.store(p_y + o_r[:, None] * N + o_n[None, :], b_x, mask=(o_r < R)[:, None] & m_n)


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
