"""The reduction kernel. One program owns whole sums of one span: no atomics, and no tree that the compiler chooses."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast


@triton.jit(do_not_specialize=["M"])
def sum_kernel(
    p_x,  # [M, N, K]
    p_out,  # [M, C, K] with C = cdiv(N, SPAN)
    M,
    N,
    K,
    C,
    stride_m,
    stride_n,
    stride_k,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    SPAN: tl.constexpr,
    ALONG_K: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i_c = pid % C
    if ALONG_K:
        n_tiles = (K - 1) // ROWS + 1  # not cdiv: K + ROWS may pass 2**31
        o_m = (pid // C) // n_tiles
        o_k = ((pid // C) % n_tiles) * ROWS + tl.arange(0, ROWS)
        m_row = o_k < K
    else:
        o_row = (pid // C) * ROWS + tl.arange(0, ROWS)
        o_m = o_row // K
        o_k = o_row % K
        m_row = o_m < M
    p_row = p_x + o_m * stride_m + o_k * stride_k

    acc = tl.zeros([ROWS, LANES], dtype=tl.float32)
    first = i_c * SPAN
    last = tl.minimum(first + SPAN, N)
    for start in range(first, last, LANES):
        o_n = (start + tl.arange(0, LANES)).to(tl.int64)
        m = m_row[:, None] & (o_n < last)[None, :]
        acc += tl.load(p_row[:, None] + o_n[None, :] * stride_n, mask=m, other=0.0).to(tl.float32)

    # Halving by neighbours: each step adds two numbers, so the layout of the tile cannot choose the order.
    total = acc
    for i in tl.static_range(LOG2_LANES):
        total = tl.sum(tl.reshape(total, [ROWS, LANES >> (i + 1), 2]), axis=2)
    total = tl.reshape(total, [ROWS])
    tl.store(p_out + (o_m * C + i_c) * K + o_k, cast(total, p_out.dtype.element_ty), mask=m_row)
