"""Activation kernels. The forward spells out vLLM's CUDA `silu_and_mul` so that its bits are the same."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from bi_ops.core import pdl
from bi_ops.core.runtime import INTERPRET
from bi_ops.core.triton_helpers import cast, widen

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def _one_plus_exp_neg(x):
    """1 + exp(-x) in fp32 with CUDA's own `expf`; `tl.exp` is a faster approximation with other bits."""
    if _INTERPRET:
        return 1.0 + tl.exp(-x)
    return 1.0 + libdevice.exp(-x)


@triton.jit
def _div(x, y):
    """x / y correctly rounded, as CUDA's `/`; the plain operator of Triton is an approximation on a GPU."""
    if _INTERPRET:
        return x / y
    return tl.div_rn(x, y)


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
    # silu is rounded to the dtype of x before the product, which is rounded again.
    b_silu = cast(_div(b_gate, _one_plus_exp_neg(b_gate)), dtype).to(tl.float32)
    tl.store(p_y + o_r * D + o_c, cast(b_silu * b_up, dtype), mask=m)


@triton.jit(do_not_specialize=["R"])
def silu_and_mul_backward_kernel(
    p_g,  # [R, D], gradient of y
    p_x,  # [R, 2D]
    p_dx,  # [R, 2D]
    R,
    D,
    stride_x,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LARGE: tl.constexpr,  # D is too long for columns in 32 bits
):
    """With s = sigmoid(gate): dgate = g * up * (s + gate * s * (1 - s)), dup = g * gate * s; rounded once."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = widen(tl.program_id(1), LARGE) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_r < R) & (o_c < D)
    dtype: tl.constexpr = p_dx.dtype.element_ty

    b_g = tl.load(p_g + o_r * D + o_c, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_x + o_r * stride_x + o_c, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + o_r * stride_x + D + o_c, mask=m, other=0.0).to(tl.float32)
    b_s = _div(1.0, _one_plus_exp_neg(b_gate))
    b_dgate = b_g * b_up * (b_s + b_gate * b_s * (1.0 - b_s))
    p_out = p_dx + o_r * (2 * widen(D, LARGE)) + o_c
    tl.store(p_out, cast(b_dgate, dtype), mask=m)
    tl.store(p_out + D, cast(b_g * (b_gate * b_s), dtype), mask=m)
