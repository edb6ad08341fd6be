"""The rotation kernel; its backward is the same kernel with the angle negated."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, widen


@triton.jit(do_not_specialize=["R"])
def rope_kernel(
    p_x,  # [T, H, D]
    p_pos,  # [T] int
    p_cos_sin,  # [P, D]: cos, then sin
    p_y,  # [T, H, D] contiguous
    R,  # T * H
    H,
    P,
    stride_t,
    stride_h,
    HALF: tl.constexpr,  # D / 2
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # the power of two that holds HALF
    INVERSE: tl.constexpr,
    LARGE: tl.constexpr,  # there are too many rows for 32 bits
):
    o_r = widen(tl.program_id(0), LARGE) * ROWS + tl.arange(0, ROWS)  # a 64-bit division is slow
    o_t, o_h = (o_r // H).to(tl.int64), (o_r % H).to(tl.int64)
    o_c = tl.arange(0, COLS)[None, :]
    m = (o_r < R)[:, None] & (o_c < HALF)
    dtype: tl.constexpr = p_y.dtype.element_ty

    pos = tl.load(p_pos + o_t, mask=o_r < R, other=0).to(tl.int64)
    # A position outside the cache turns its token into NaN: seen at once, and nothing out of bounds is read.
    m_cache = m & ((pos >= 0) & (pos < P))[:, None]
    p_cos = p_cos_sin + pos[:, None] * (2 * HALF) + o_c
    b_cos = tl.load(p_cos, mask=m_cache, other=float("nan")).to(tl.float32)
    b_sin = tl.load(p_cos + HALF, mask=m_cache, other=float("nan")).to(tl.float32)
    if INVERSE:
        b_sin = -b_sin

    p_1 = p_x + (o_t * stride_t + o_h * stride_h)[:, None] + o_c
    b_1 = tl.load(p_1, mask=m, other=0.0).to(tl.float32)
    b_2 = tl.load(p_1 + HALF, mask=m, other=0.0).to(tl.float32)
    # The fused multiply-add is spelled out, so that no compiler chooses which product it swallows. It matters for
    # fp32 alone: products of 16-bit floats are exact in fp32, and the sum is rounded once, as in vLLM's CUDA kernel.
    b_y1 = tl.fma(b_1, b_cos, -(b_2 * b_sin))
    b_y2 = tl.fma(b_2, b_cos, b_1 * b_sin)
    p_out = p_y + o_r.to(tl.int64)[:, None] * (2 * HALF) + o_c
    tl.store(p_out, cast(b_y1, dtype), mask=m)
    tl.store(p_out + HALF, cast(b_y2, dtype), mask=m)
