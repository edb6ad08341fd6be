"""silu-and-mul between an expert's two GEMMs, and what its backward computes in the same pass."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core import pdl
from bi_ops.core.triton_helpers import cast, fma, silu_and_mul, silu_and_mul_backward


@triton.jit(do_not_specialize=["R"])
def expert_activation_kernel(
    p_x,  # [R, 2D]: gate, then up
    p_y,  # [R, D]
    R,
    D,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.begin_in_order(PDL)
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    m = (o_r < R) & (o_c < D)
    b_gate = tl.load(p_x + o_r * 2 * D + o_c, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + o_r * 2 * D + D + o_c, mask=m, other=0.0).to(tl.float32)
    dtype: tl.constexpr = p_y.dtype.element_ty
    tl.store(p_y + o_r * D + o_c, cast(silu_and_mul(b_gate, b_up, dtype), dtype), mask=m)


@triton.jit(do_not_specialize=["R"])
def expert_activation_backward_kernel(
    p_g,  # [R, D], gradient of y, not yet multiplied by the routing weight
    p_x,  # [R, 2D]
    p_weights,  # [T, TOP_K], fp32
    p_rows,  # [R], int32: the pair of a row, or -1
    p_dx,  # [R, 2D]
    p_y,  # [R, D]: the activation times the routing weight, of which the second GEMM's dW is computed
    p_dweights,  # [T, TOP_K], fp32
    R,
    D,
    LANES: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pairs = tl.load(p_rows + o_r, mask=o_r < R, other=-1)
    weight = tl.load(p_weights + pairs, mask=pairs >= 0, other=0.0)
    dtype: tl.constexpr = p_dx.dtype.element_ty
    acc = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for c in range(0, D, LANES):
        o_c = c + tl.arange(0, LANES)[None, :]
        m = (o_r < R) & (o_c < D)
        b_g = tl.load(p_g + o_r * D + o_c, mask=m, other=0.0).to(tl.float32)
        b_gate = tl.load(p_x + o_r * 2 * D + o_c, mask=m, other=0.0).to(tl.float32)
        b_up = tl.load(p_x + o_r * 2 * D + D + o_c, mask=m, other=0.0).to(tl.float32)
        b_y = cast(silu_and_mul(b_gate, b_up, dtype), dtype).to(tl.float32)
        acc = fma(b_y, b_g, acc)
        tl.store(p_y + o_r * D + o_c, cast(b_y * weight, dtype), mask=m)
        b_dgate, b_dup = silu_and_mul_backward(b_g * weight, b_gate, b_up)
        tl.store(p_dx + o_r * 2 * D + o_c, cast(b_dgate, dtype), mask=m)
        tl.store(p_dx + o_r * 2 * D + D + o_c, cast(b_dup, dtype), mask=m)
    # Halving by neighbours: each step adds two numbers, so the layout of the tile cannot choose the order.
    for i in tl.static_range(LOG2_LANES):
        acc = tl.sum(tl.reshape(acc, [ROWS, LANES >> (i + 1), 2]), axis=2)
    tl.store(p_dweights + pairs, tl.reshape(acc, [ROWS, 1]), mask=pairs >= 0)
