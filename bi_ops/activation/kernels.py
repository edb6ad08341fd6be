"""Activation kernels. The forward spells out vLLM's CUDA `silu_and_mul` so that its bits are the same."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import cast, silu_and_mul, silu_and_mul_backward, widen


@triton.jit(do_not_specialize=["R"])
def silu_and_mul_kernel(
    p_x,  # [R, 2D]: gate, then up
    p_y,  # [R, D]
    R,
    D,
    stride_x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LARGE: tl.constexpr,  # D is too long for columns in 32 bits
    PDL: tl.constexpr,
):
    pdl.begin(0, PDL)
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_r < R) & (o_c < D)
    dtype: tl.constexpr = p_y.dtype.element_ty

    b_gate = tl.load(p_x + o_r * stride_x + o_c, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + o_r * stride_x + D + o_c, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o_r * D + o_c, cast(silu_and_mul(b_gate, b_up, dtype), dtype), mask=m)


@triton.jit(do_not_specialize=["R"])
def silu_and_mul_backward_kernel(
    p_g,  # [R, D], gradient of y
    p_x,  # [R, 2D]
    p_dx,  # [R, 2D]
    p_y,  # [R, D], or None: the forward's, with its bits
    R,
    D,
    stride_x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LARGE: tl.constexpr,  # D is too long for columns in 32 bits
    HAS_Y: tl.constexpr,
):
    """The gradients of gate and up, rounded once."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_r < R) & (o_c < D)
    dtype: tl.constexpr = p_dx.dtype.element_ty

    b_g = tl.load(p_g + o_r * D + o_c, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + o_r * stride_x + o_c, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + o_r * stride_x + D + o_c, mask=m, other=0.0).to(tl.float32)
    b_dgate, b_dup = silu_and_mul_backward(b_g, b_gate, b_up)
    p_out = p_dx + o_r * (2 * widen(D, LARGE)) + o_c
    tl.store(p_out, cast(b_dgate, dtype), mask=m)
    tl.store(p_out + D, cast(b_dup, dtype), mask=m)
    if HAS_Y:
        tl.store(p_y + o_r * D + o_c, cast(silu_and_mul(b_gate, b_up, dtype), dtype), mask=m)
