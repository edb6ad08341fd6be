"""Embedding kernels: a gather, and the sum of every id's gradient rows in token order."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, widen


@triton.jit(do_not_specialize=["N"])
def embedding_kernel(
    p_ids,  # [N] int
    p_w,  # [V, D]
    p_y,  # [N, D]
    N,
    D,
    V,
    stride_w,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LARGE: tl.constexpr,  # D is too long for columns in 32 bits
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_r < N)[:, None] & (o_c < D)
    ids = tl.load(p_ids + o_r, mask=o_r < N, other=0).to(tl.int64)
    # An id outside the table gives a row of NaN: seen at once, and nothing out of bounds is read.
    m_w = m & ((ids >= 0) & (ids < V))[:, None]
    b_w = tl.load(p_w + ids[:, None] * stride_w + o_c, mask=m_w, other=float("nan")).to(tl.float32)
    tl.store(p_y + o_r[:, None] * D + o_c, cast(b_w, p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["S", "N"])
def embedding_backward_kernel(
    p_g,  # [N, D]
    p_ids,  # [N] int64, sorted; V or more: no row of the table
    p_token,  # [N] int64, where each sorted id stood; ascending within one id
    p_start,  # [S + 1] int64, where each run of equal ids begins; N once there are no more
    p_dw,  # [V, D], zeros, or what the sums start from
    p_touched,  # bool [V + 1], where p_dw holds a sum; None: everywhere
    S,
    N,
    D,
    V,
    ACCUMULATE: tl.constexpr,  # dw is fp32 and where the sums start
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,
    LARGE: tl.constexpr,
):
    """dw[id] = the gradient rows of the id's tokens, added front to back in fp32; ROWS ids side by side."""
    o_s = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
    m_c = o_c < D
    start = tl.load(p_start + o_s, mask=o_s < S, other=N)
    end = tl.load(p_start + o_s + 1, mask=o_s < S, other=N)
    ids = tl.load(p_ids + start, mask=start < N, other=V).to(tl.int64)
    length = tl.where(ids < V, end - start, 0)
    p_run = p_token + start
    p_col = p_g + o_c

    p_out = p_dw + ids[:, None] * D + o_c
    m_out = (ids < V)[:, None] & m_c
    if ACCUMULATE:
        m_sum = m_out
        if p_touched is not None:
            m_sum = m_out & tl.load(p_touched + ids)[:, None]
        acc = tl.load(p_out, mask=m_sum, other=0.0)
    else:
        acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, tl.max(length, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            m_t = first + step < length
            token = tl.load(p_run + (first + step), mask=m_t, other=0).to(tl.int64)
            # A run that has ended adds 0.0, which changes no bit: a sum that began at 0.0 is never -0.0.
            acc += tl.load(p_col + token[:, None] * D, mask=m_t[:, None] & m_c, other=0.0).to(tl.float32)
    tl.store(p_out, cast(acc, p_dw.dtype.element_ty), mask=m_out)


@triton.jit
def add_touched_rows_kernel(
    p_total,  # [V, D] fp32
    p_rows,  # [V, D] fp32
    p_touched,  # bool [V + 1]
    V,
    D,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LARGE: tl.constexpr,
):
    """total += rows where a row is touched; of the others nothing is read.

    Zeros add nothing, not even to the sign of a zero: batches that are padded touch rows that others do not.
    """
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    touched = tl.load(p_touched + o_r, mask=o_r < V, other=0).to(tl.int32)
    if tl.max(touched, axis=0) > 0:
        o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
        m = (touched > 0)[:, None] & (o_c < D)
        o = o_r[:, None] * D + o_c
        total = tl.load(p_total + o, mask=m, other=0.0)
        row = tl.load(p_rows + o, mask=m, other=0.0)
        tl.store(p_total + o, tl.where(row == 0.0, total, total + row), mask=m)
