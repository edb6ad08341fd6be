"""Softmax rows of which a program has some columns, with the bits of `kernels.softmax_stats`.

The maximum has no order. Chunks of BLOCK columns are summed each by itself, as there, and then all of a row's front to
back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import widen
from bi_ops.logprob.kernels import softmax_max


@triton.jit(do_not_specialize=["R"])
def shard_max_kernel(
    p_x,  # [R, N]
    p_max,  # [R] fp32
    R,
    N,
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """max(x)."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    tl.store(p_max + o_r, softmax_max(p_x + o_r[:, None] * stride_x, m_r, N, BLOCK, ROWS, LARGE), mask=m_r)


@triton.jit(do_not_specialize=["R", "FIRST", "WIDTH"])
def shard_sums_kernel(
    p_x,  # [R, N], columns FIRST to FIRST + N of the whole rows
    p_ids,  # [R] int64, columns of the whole rows
    p_max,  # [R] fp32, of the whole rows
    p_sums,  # [R, WIDTH] fp32: a sum for each chunk, zeros behind the last, and x[id]
    R,
    N,
    FIRST,
    WIDTH,
    stride_x,
    CHUNKS: tl.constexpr,  # of a program
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """sum(exp(x - max)) of each chunk of columns; x[id], or -inf where that is another shard's."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part, m_r = tl.program_id(1), o_r < R
    p_row, p_out = p_x + o_r[:, None] * stride_x, p_sums + o_r * WIDTH
    row_max = tl.load(p_max + o_r, mask=m_r, other=0.0)
    for i in tl.static_range(CHUNKS):
        chunk = widen(part, LARGE) * CHUNKS + i
        o_c = chunk * BLOCK + tl.arange(0, BLOCK)
        m = m_r[:, None] & (o_c < N)[None, :]
        b_x = tl.load(p_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_sum = tl.sum(tl.where(m, tl.exp(b_x - row_max[:, None]), 0.0), axis=1)
        tl.store(p_out + chunk, b_sum, mask=o_r < tl.where(chunk < WIDTH - 1, R, 0))
    if part == 0:
        column = tl.load(p_ids + o_r, mask=m_r, other=-1) - FIRST
        m_own = m_r & (column >= 0) & (column < N)
        chosen = tl.load(p_x + o_r * stride_x + column, mask=m_own, other=float("-inf")).to(tl.float32)
        tl.store(p_out + WIDTH - 1, chosen, mask=m_r)


@triton.jit(do_not_specialize=["R", "V", "WIDTH"])
def add_shards_kernel(
    p_sums,  # [SHARDS, R, WIDTH] fp32, of `shard_sums_kernel`
    p_ids,  # [R] int64
    p_max,  # [R] fp32
    p_out,  # [R] fp32
    p_lse,  # [R] fp32, log(sum(exp(x - max)))
    R,
    V,
    WIDTH,
    SHARDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out = x[id] - max - lse; NaN for an id outside [0, V). Zeros behind a shard's chunks change no sum."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    total = tl.zeros([ROWS], dtype=tl.float32)
    chosen = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for shard in tl.static_range(SHARDS):
        p_shard = p_sums + (shard * R.to(tl.int64) + o_r) * WIDTH
        for chunk in range(0, WIDTH - 1):
            total += tl.load(p_shard + chunk, mask=m_r, other=0.0)
        # A NaN is dropped here, but then the sum of its row is one.
        chosen = tl.maximum(chosen, tl.load(p_shard + WIDTH - 1, mask=m_r, other=0.0))
    b_id = tl.load(p_ids + o_r, mask=m_r, other=0)
    chosen = tl.where((b_id >= 0) & (b_id < V), chosen, float("nan"))
    row_max = tl.load(p_max + o_r, mask=m_r, other=0.0)
    lse = tl.log(tl.where(m_r, total, 1.0))
    tl.store(p_out + o_r, chosen - row_max - lse, mask=m_r)
    tl.store(p_lse + o_r, lse, mask=m_r)
