"""The distribution that a token was sampled from: temperature, min-p, top-k and top-p, one row of logits at a time.

Every sum is one of integers, so any tile and any number of warps has its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, widen


@triton.jit
def order_key(x):
    """int32 that compare as the fp32 numbers x do; applied to the bits of a key it gives the number back."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weigh(b_x, m, t, row_max, cutoff, MASS: tl.constexpr, FRACTION_BITS: tl.constexpr):
    """What an element counts for, int64: 1; with MASS exp(z - max) in fixed point if z = x / t reaches the cutoff."""
    if MASS:
        z = tl.div_rn(b_x, tl.broadcast_to(t[:, None], b_x.shape))
        share = tl.exp(z - row_max[:, None]) * (1 << FRACTION_BITS)
        kept = m & (z >= cutoff[:, None]) & (share == share)
        return tl.where(kept, share, 0.0).to(tl.int64)
    else:
        return tl.where(m, 1, 0).to(tl.int64)


@triton.jit
def mass(
    p_row, m_r, t, row_max, cutoff, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, FRACTION_BITS: tl.constexpr,
    LARGE: tl.constexpr,
):  # fmt: skip
    """[ROWS] int64: the sum of exp(x / t - max) over x / t >= cutoff, in units of 2**-FRACTION_BITS."""
    total = tl.zeros([ROWS, BLOCK], dtype=tl.int64)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r[:, None] & (o_c < N)[None, :]
        b_x = tl.load(p_row + o_c[None, :], mask=m, other=float("-inf")).to(tl.float32)
        total += weigh(b_x, m, t, row_max, cutoff, True, FRACTION_BITS)
    return tl.sum(total, axis=1)


@triton.jit
def smallest_kept(
    p_row, m_r, t, row_max, cutoff, target, N, MASS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SHIFT: tl.constexpr, FRACTION_BITS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """[ROWS] fp32: the smallest number v, as logits hold it, such that the logits above v weigh less than `target`.

    The weight of the logits above v falls as v rises, so v is found two bits of its key at a time, whatever the order
    of the logits. SHIFT: bits of fp32 that logits of their dtype leave zero.
    """
    HALF: tl.constexpr = 1 << (31 - SHIFT)
    low = tl.zeros([ROWS], dtype=tl.int64)
    step = tl.full([ROWS], 1 << (32 - SHIFT + SHIFT % 2), dtype=tl.int64)
    for _ in range(16 - SHIFT // 2):
        step = step // 4
        # a key above all that are is a pivot that nothing exceeds
        one = tl.minimum(low + step - 1 - HALF, HALF - 1).to(tl.int32)
        two = tl.minimum(low + 2 * step - 1 - HALF, HALF - 1).to(tl.int32)
        three = tl.minimum(low + 3 * step - 1 - HALF, HALF - 1).to(tl.int32)
        above_one = tl.zeros([ROWS, BLOCK], dtype=tl.int64)
        above_two = tl.zeros([ROWS, BLOCK], dtype=tl.int64)
        above_three = tl.zeros([ROWS, BLOCK], dtype=tl.int64)
        for start in range(0, widen(N, LARGE), BLOCK):
            o_c = start + tl.arange(0, BLOCK)
            m = m_r[:, None] & (o_c < N)[None, :]
            b_x = tl.load(p_row + o_c[None, :], mask=m, other=float("-inf")).to(tl.float32)
            key = order_key(b_x) >> SHIFT
            weight = weigh(b_x, m, t, row_max, cutoff, MASS, FRACTION_BITS)
            above_one += tl.where(key > one[:, None], weight, 0)
            above_two += tl.where(key > two[:, None], weight, 0)
            above_three += tl.where(key > three[:, None], weight, 0)
        passed = (tl.sum(above_one, axis=1).to(tl.float64) >= target).to(tl.int64)
        passed += (tl.sum(above_two, axis=1).to(tl.float64) >= target).to(tl.int64)
        passed += (tl.sum(above_three, axis=1).to(tl.float64) >= target).to(tl.int64)
        low += passed * step
    key = (low - HALF).to(tl.int32)
    zeros: tl.constexpr = (1 << SHIFT) - 1
    key = (key << SHIFT) | tl.where(key < 0, zeros, 0)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["R"])
def sampled_logprobs_kernel(
    p_x,  # [R, N]
    p_ids,  # [R] int64, where HAS_IDS
    p_t,  # [R] fp32, temperatures above 0
    p_k,  # [R] int32, top-k; below 1 or from N on: all
    p_p,  # [R] fp32, top-p; from 1 on: all
    p_min,  # [R] fp32, min-p; 0: all
    p_out,  # [R] fp32, where HAS_IDS
    p_max,  # [R] fp32, the maximum of z = x / t
    p_cutoff,  # [R] fp32, the smallest z that is kept
    p_lse,  # [R] fp32, log(sum(exp(z - max))) over z >= cutoff
    R,
    N,
    stride_x,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    FRACTION_BITS: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """out = z[id] - max - lse; -inf below the cutoff; NaN for an id outside [0, N), and in a row with a NaN or +inf."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    p_row = p_x + o_r[:, None] * stride_x
    t = tl.load(p_t + o_r, mask=m_r, other=1.0)
    top_k = tl.load(p_k + o_r, mask=m_r, other=0)
    top_p = tl.load(p_p + o_r, mask=m_r, other=1.0)
    min_p = tl.load(p_min + o_r, mask=m_r, other=0.0)

    tops = tl.full([ROWS, BLOCK], float("-inf"), dtype=tl.float32)
    bad = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for start in range(0, widen(N, LARGE), BLOCK):
        o_c = start + tl.arange(0, BLOCK)
        m = m_r[:, None] & (o_c < N)[None, :]
        b_x = tl.load(p_row + o_c[None, :], mask=m, other=float("-inf")).to(tl.float32)
        tops = tl.maximum(tops, b_x)
        bad |= (b_x != b_x).to(tl.int32)
    row_max = tl.div_rn(tl.where(m_r, tl.max(tops, axis=1), 0.0), t)
    finite = (tl.abs(row_max) < float("inf")) & (tl.max(bad, axis=1) == 0)
    row_max = tl.where(finite, row_max, float("nan"))

    cutoff = tl.where(min_p > 0.0, row_max + tl.log(tl.where(min_p > 0.0, min_p, 1.0)), float("-inf"))
    by_k = (top_k > 0) & (top_k < N) & finite
    if tl.max(by_k.to(tl.int32), axis=0) > 0:
        target = tl.where(by_k, top_k, 1).to(tl.float64)
        x = smallest_kept(
            p_row, m_r, t, row_max, cutoff, target, N, False, ROWS, BLOCK, SHIFT, FRACTION_BITS, LARGE
        )  # fmt: skip
        cutoff = tl.where(by_k, tl.maximum(cutoff, tl.div_rn(x, t)), cutoff)
    total = mass(p_row, m_r, t, row_max, cutoff, N, ROWS, BLOCK, FRACTION_BITS, LARGE)
    by_p = (top_p < 1.0) & finite
    if tl.max(by_p.to(tl.int32), axis=0) > 0:
        target = tl.maximum(top_p.to(tl.float64) * total.to(tl.float64), 1.0)  # the largest is always kept
        x = smallest_kept(
            p_row, m_r, t, row_max, cutoff, target, N, True, ROWS, BLOCK, SHIFT, FRACTION_BITS, LARGE
        )  # fmt: skip
        cutoff = tl.where(by_p, tl.maximum(cutoff, tl.div_rn(x, t)), cutoff)
        total = mass(p_row, m_r, t, row_max, cutoff, N, ROWS, BLOCK, FRACTION_BITS, LARGE)
    total = tl.where(m_r & finite, total, 1)
    lse = tl.log(total.to(tl.float64) / (1 << FRACTION_BITS)).to(tl.float32)

    if HAS_IDS:
        b_id = tl.load(p_ids + o_r, mask=m_r, other=0)
        known = m_r & (b_id >= 0) & (b_id < N)
        b_x = tl.load(p_x + o_r * stride_x + b_id, mask=known, other=float("nan")).to(tl.float32)
        z = tl.div_rn(b_x, t)
        tl.store(p_out + o_r, tl.where(z < cutoff, float("-inf"), z - row_max - lse), mask=m_r)
    tl.store(p_max + o_r, row_max, mask=m_r)
    tl.store(p_cutoff + o_r, cutoff, mask=m_r)
    tl.store(p_lse + o_r, lse, mask=m_r)


@triton.jit(do_not_specialize=["R"])
def sampled_logprobs_dx_kernel(
    p_g,  # [R] fp32
    p_x,  # [R, N]
    p_ids,  # [R] int64
    p_t,  # [R] fp32
    p_max,  # [R] fp32
    p_cutoff,  # [R] fp32
    p_lse,  # [R] fp32
    p_dx,  # [R, N]
    R,
    N,
    stride_x,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGE: tl.constexpr,  # N is too long for columns in 32 bits
):
    """dx = g / t * ((column == id) - exp(z - max - lse)) where z = x / t reaches the cutoff, else 0."""
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_c = widen(tl.program_id(1), LARGE) * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    m = m_r[:, None] & (o_c < N)[None, :]
    t = tl.load(p_t + o_r, mask=m_r, other=1.0)
    b_g = tl.div_rn(tl.load(p_g + o_r, mask=m_r, other=0.0), t)[:, None]
    b_id = tl.load(p_ids + o_r, mask=m_r, other=-1)[:, None]
    row_max = tl.load(p_max + o_r, mask=m_r, other=0.0)[:, None]
    cutoff = tl.load(p_cutoff + o_r, mask=m_r, other=0.0)[:, None]
    lse = tl.load(p_lse + o_r, mask=m_r, other=0.0)[:, None]
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
    z = tl.div_rn(b_x, tl.broadcast_to(t[:, None], b_x.shape))
    b_dx = b_g * (tl.where(o_c[None, :] == b_id, 1.0, 0.0) - tl.exp(z - row_max - lse))
    b_dx = tl.where(z < cutoff, 0.0, b_dx)
    tl.store(p_dx + o_r[:, None] * N + o_c[None, :], cast(b_dx, p_dx.dtype.element_ty), mask=m)
