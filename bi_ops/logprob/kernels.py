"""Softmax rows. `softmax_stats` spells out vLLM's sampler kernels so that its bits are the same."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, widen


@triton.jit
def softmax_max(p_row, m_r, N, BLOCK: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr):
    """max(x), [ROWS] fp32; 0 in rows past the end."""
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r[:, None] & (o_c < N)[None, :]
        b_x = tl.load(p_row + o_c[None, :], mask=m, other=float("-inf")).to(tl.float32)
        row_max = tl.maximum(row_max, tl.max(b_x, axis=1))
    return tl.where(m_r, row_max, 0.0)  # no inf - inf


@triton.jit
def softmax_stats(p_row, m_r, N, BLOCK: tl.constexpr, ROWS: tl.constexpr, LARGE: tl.constexpr):
    """(max(x), sum(exp(x - max))), both [ROWS] fp32; p_row: [ROWS, 1] pointers to rows of N columns."""
    row_max = softmax_max(p_row, m_r, N, BLOCK, ROWS, LARGE)
    sum_exp = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r[:, None] & (o_c < N)[None, :]
        b_x = tl.load(p_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        sum_exp += tl.sum(tl.where(m, tl.exp(b_x - row_max[:, None]), 0.0), axis=1)
    return row_max, sum_exp


@triton.jit(do_not_specialize=["R"])
def softmax_kernel(
    p_x,  # [R, N]
    p_y,  # [R, N]
    R,
    N,
    stride_x,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """y = x - max - log(sum) (LOG) or exp(x - max) / sum."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    p_row = p_x + o_r[:, None] * stride_x
    row_max, sum_exp = softmax_stats(p_row, m_r, N, BLOCK, ROWS, LARGE)
    sum_exp = tl.where(m_r, sum_exp, 1.0)
    lse = tl.log(sum_exp)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r[:, None] & (o_c < N)[None, :]
        b_x = tl.load(p_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        if LOG:
            b_y = b_x - row_max[:, None] - lse[:, None]
        else:
            b_y = tl.exp(b_x - row_max[:, None]) / sum_exp[:, None]
        tl.store(p_y + o_r[:, None] * N + o_c[None, :], cast(b_y, p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["R"])
def softmax_dx_kernel(
    p_g,  # [R, N]
    p_y,  # [R, N], the forward's result
    p_dx,  # [R, N]
    R,
    N,
    stride_g,
    stride_y,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """dx = g - exp(y) * sum(g) (LOG) or y * (g - sum(g * y))."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = (o_r < R)[:, None]
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r & (o_c < N)[None, :]
        b_g = tl.load(p_g + o_r[:, None] * stride_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        if not LOG:
            b_g = b_g * tl.load(p_y + o_r[:, None] * stride_y + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        total += tl.sum(b_g, axis=1)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r & (o_c < N)[None, :]
        b_g = tl.load(p_g + o_r[:, None] * stride_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o_r[:, None] * stride_y + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        if LOG:
            b_dx = b_g - tl.exp(b_y) * total[:, None]
        else:
            b_dx = b_y * (b_g - total[:, None])
        tl.store(p_dx + o_r[:, None] * N + o_c[None, :], cast(b_dx, p_dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["R"])
def token_logprobs_kernel(
    p_x,  # [R, N]
    p_ids,  # [R] int64
    p_out,  # [R] fp32
    p_max,  # [R] fp32
    p_lse,  # [R] fp32, log(sum(exp(x - max)))
    p_entropy,  # [R] fp32, or None
    R,
    N,
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """out = x[id] - max - lse; NaN for an id outside [0, N). entropy = -sum(p * log(p)), in a pass of its own."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    p_row = p_x + o_r[:, None] * stride_x
    row_max, sum_exp = softmax_stats(p_row, m_r, N, BLOCK, ROWS, LARGE)
    lse = tl.log(tl.where(m_r, sum_exp, 1.0))
    b_id = tl.load(p_ids + o_r, mask=m_r, other=0)
    known = m_r & (b_id >= 0) & (b_id < N)
    b_x = tl.load(p_x + o_r * stride_x + b_id, mask=known, other=float("nan")).to(tl.float32)
    tl.store(p_out + o_r, b_x - row_max - lse, mask=m_r)
    tl.store(p_max + o_r, row_max, mask=m_r)
    tl.store(p_lse + o_r, lse, mask=m_r)
    if ENTROPY:
        negated = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, widen(N, LARGE), BLOCK):
            o_c = start + tl.arange(0, BLOCK)
            m = m_r[:, None] & (o_c < N)[None, :]
            b_logits = tl.load(p_row + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            b_log_p = b_logits - row_max[:, None] - lse[:, None]
            # What has no probability adds nothing, where 0 * log(0) would be NaN.
            negated += tl.sum(tl.where(m & (b_logits != float("-inf")), tl.exp(b_log_p) * b_log_p, 0.0), axis=1)
        tl.store(p_entropy + o_r, -negated, mask=m_r)


@triton.jit(do_not_specialize=["R"])
def token_logprobs_dx_kernel(
    p_g,  # [R] fp32
    p_x,  # [R, N]
    p_ids,  # [R] int64
    p_max,  # [R] fp32
    p_lse,  # [R] fp32
    p_g_entropy,  # [R] fp32, or None
    p_entropy,  # [R] fp32, or None
    p_dx,  # [R, N]; may be x
    R,
    N,
    stride_x,
    stride_dx,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """dx = g * ((column == id) - p) - g_entropy * p * (log(p) + entropy); a program per (rows, block of columns)."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = widen(tl.program_id(1), LARGE) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    m = m_r[:, None] & (o_c < N)[None, :]
    b_g = tl.load(p_g + o_r, mask=m_r, other=0.0)[:, None]
    b_id = tl.load(p_ids + o_r, mask=m_r, other=-1)[:, None]
    row_max = tl.load(p_max + o_r, mask=m_r, other=0.0)[:, None]
    lse = tl.load(p_lse + o_r, mask=m_r, other=0.0)[:, None]
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    b_dx = b_g * (tl.where(o_c[None, :] == b_id, 1.0, 0.0) - tl.exp(b_x - row_max - lse))
    if ENTROPY:
        b_log_p = b_x - row_max - lse
        entropy = tl.load(p_entropy + o_r, mask=m_r, other=0.0)[:, None]
        b_dh = tl.where(b_x == float("-inf"), 0.0, tl.exp(b_log_p) * (b_log_p + entropy))
        b_dx -= tl.load(p_g_entropy + o_r, mask=m_r, other=0.0)[:, None] * b_dh
    tl.store(p_dx + o_r[:, None] * stride_dx + o_c[None, :], cast(b_dx, p_dx.dtype.element_ty), mask=m)
