"""RMS normalisation kernels. The forward spells out vLLM's `_rms_norm_kernel` so that its bits are the same."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops._common.triton_helpers import cast


@triton.jit
def rms_norm_kernel(
    p_x,  # [R, N]
    p_residual,  # [R, N] or None: added to x, rounded, before the norm
    p_w,  # [N] or None
    p_y,  # [R, N]
    p_sum,  # [R, N], x + residual
    p_inv,  # [R] fp32, 1 / rms
    R,
    N,
    eps,
    stride_x,
    stride_residual,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = (o_r < R)[:, None]
    dtype: tl.constexpr = p_y.dtype.element_ty

    sum_sq = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r & (o_c < N)[None, :]
        b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            p_res = p_residual + o_r[:, None] * stride_residual + o_c[None, :]
            b_sum = cast(b_x + tl.load(p_res, mask=m, other=0.0).to(tl.float32), dtype)
            tl.store(p_sum + o_r[:, None] * N + o_c[None, :], b_sum, mask=m)
            b_x = b_sum.to(tl.float32)
        sum_sq += tl.sum(tl.where(m, b_x * b_x, 0.0), axis=1)

    # eps may arrive as fp64 from a compiled caller: pinned, so that the bits do not depend on who calls.
    inv = 1.0 / tl.sqrt(sum_sq / N + tl.cast(eps, tl.float32))
    tl.store(p_inv + o_r, inv, mask=o_r < R)

    for start in range(0, N, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r & (o_c < N)[None, :]
        if HAS_RESIDUAL:
            b_x = tl.load(p_sum + o_r[:, None] * N + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        else:
            b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_y = b_x * inv[:, None]
        if HAS_WEIGHT:
            b_y = b_y * tl.load(p_w + o_c, mask=o_c < N, other=1.0).to(tl.float32)[None, :]
        tl.store(p_y + o_r[:, None] * N + o_c[None, :], cast(b_y, dtype), mask=m)


@triton.jit
def rms_norm_dx_kernel(
    p_g,  # [R, N], gradient of y
    p_gsum,  # [R, N] or None: gradient that reaches x + residual directly
    p_x,  # [R, N], what was normalised
    p_w,  # [N] or None
    p_inv,  # [R] fp32
    p_dx,  # [R, N]
    R,
    N,
    stride_g,  # of g and gsum
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """dx = inv * (g*w - xhat * mean(g*w*xhat)) with xhat = x * inv."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = (o_r < R)[:, None]
    inv = tl.load(p_inv + o_r, mask=o_r < R, other=0.0)[:, None]

    dot = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, N, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r & (o_c < N)[None, :]
        b_g = tl.load(p_g + o_r[:, None] * stride_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            b_g = b_g * tl.load(p_w + o_c, mask=o_c < N, other=0.0).to(tl.float32)[None, :]
        dot += tl.sum(b_g * (b_x * inv), axis=1)
    mean = (dot / N)[:, None]

    for start in range(0, N, BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r & (o_c < N)[None, :]
        b_g = tl.load(p_g + o_r[:, None] * stride_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            b_g = b_g * tl.load(p_w + o_c, mask=o_c < N, other=0.0).to(tl.float32)[None, :]
        b_dx = inv * (b_g - (b_x * inv) * mean)
        if HAS_SUM:
            b_dx += tl.load(p_gsum + o_r[:, None] * stride_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + o_r[:, None] * N + o_c[None, :], cast(b_dx, p_dx.dtype.element_ty), mask=m)


@triton.jit
def rms_norm_dweight_kernel(
    p_g,  # [R, N]
    p_x,  # [R, N]
    p_inv,  # [R] fp32
    p_partial,  # [cdiv(R, CHUNK), N] fp32
    R,
    N,
    stride_g,
    stride_x,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """partial[i] = g * xhat of rows i * CHUNK and on, added front to back; ROWS chunks side by side."""
    o_i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for step in tl.static_range(CHUNK):
        o_r = o_i * CHUNK + step
        m = (o_r < R)[:, None] & (o_c < N)
        # A row past the end adds 0.0, which changes no bit: a sum that began at 0.0 is never -0.0.
        b_g = tl.load(p_g + o_r[:, None] * stride_g + o_c, mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c, mask=m, other=0.0).to(tl.float32)
        inv = tl.load(p_inv + o_r, mask=o_r < R, other=0.0)
        acc += b_g * (b_x * inv[:, None])
    tl.store(p_partial + o_i[:, None] * N + o_c, acc, mask=(o_i * CHUNK < R)[:, None] & (o_c < N))


@triton.jit
def add_chunks_kernel(
    p_partial,  # [C, N] fp32
    p_out,  # [N]
    C,
    N,
    ACCUMULATE: tl.constexpr,  # out is fp32 and where the sum starts
    COLS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out = the chunks' partial sums, added one after another."""
    o_c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    m_c = o_c < N
    if ACCUMULATE:
        acc = tl.load(p_out + o_c, mask=m_c, other=0.0)
    else:
        acc = tl.zeros([COLS], dtype=tl.float32)
    o_at, end = o_c.to(tl.int64), tl.cast(C, tl.int64) * N
    for _first in range(0, C, UNROLL):
        for _step in tl.static_range(UNROLL):
            acc += tl.load(p_partial + o_at, mask=m_c & (o_at < end), other=0.0)
            o_at += N
    tl.store(p_out + o_c, cast(acc, p_out.dtype.element_ty), mask=m_c)
