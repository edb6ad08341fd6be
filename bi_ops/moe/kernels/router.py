"""The router: softmax over the experts of a token, its largest probabilities, and the gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, div_rn, exp, fma


@triton.jit
def _softmax(
    p_row, m_row, E, VECTOR: tl.constexpr, LANES: tl.constexpr, LOG2_LANES: tl.constexpr, BLOCK_E: tl.constexpr
):
    """(numerators [ROWS, BLOCK_E], reciprocal of their sum [ROWS]).

    A lane adds its vectors of experts, one expert after the other; then lanes at a distance of half of them are added,
    of a quarter, and so on: the butterfly of vLLM's CUDA kernel.
    """
    ROWS: tl.constexpr = p_row.shape[0]
    o_e = tl.arange(0, BLOCK_E)
    x = tl.load(p_row[:, None] + o_e[None, :], mask=m_row[:, None] & (o_e < E)[None, :], other=float("-inf"))
    x = tl.where(m_row[:, None], x.to(tl.float32), 0.0)
    row_max = tl.max(x, axis=1)
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for first in range(0, E, VECTOR * LANES):
        for i in tl.static_range(VECTOR):
            o = first + tl.arange(0, LANES) * VECTOR + i
            m = m_row[:, None] & (o < E)[None, :]
            lane = tl.load(p_row[:, None] + o[None, :], mask=m, other=float("-inf")).to(tl.float32)
            total += tl.where(m, exp(lane - row_max[:, None]), 0.0)
    for i in tl.static_range(LOG2_LANES):
        total = tl.sum(tl.reshape(total, [ROWS, 2, LANES >> (i + 1)]), axis=1)
    return exp(x - row_max[:, None]), div_rn(1.0, tl.where(m_row, tl.reshape(total, [ROWS]), 1.0))


@triton.jit(do_not_specialize=["T"])
def router_kernel(
    p_logits,  # [T, E]
    p_weights,  # [T, TOP_K], fp32
    p_experts,  # [T, TOP_K], int32
    T,
    E,
    stride_t,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,  # slots, a power of two
    ROWS: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)
    b_p, scale = _softmax(p_logits + o_t * stride_t, m_t, E, VECTOR, LANES, LOG2_LANES, BLOCK_E)
    b_p = b_p * scale[:, None]
    b_p = tl.where(b_p < float("inf"), b_p, 0.0)  # NaN too: the experts stay distinct, as in vLLM
    b_p = tl.where((o_e < E)[None, :], b_p, -2.0)
    weights = tl.zeros([ROWS, BLOCK_K], dtype=tl.float32)
    experts = tl.zeros([ROWS, BLOCK_K], dtype=tl.int32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        largest = tl.max(b_p, axis=1)
        expert = tl.min(tl.where(b_p == largest[:, None], o_e[None, :], BLOCK_E), axis=1)  # of equal ones the lowest
        weights = tl.where((o_k == k)[None, :], largest[:, None], weights)
        experts = tl.where((o_k == k)[None, :], expert[:, None], experts)
        total += largest
        b_p = tl.where(o_e[None, :] == expert[:, None], -1.0, b_p)
    if NORMALIZE:
        weights = weights * div_rn(1.0, tl.where(total > 0, total, 1.0))[:, None]
    m = m_t[:, None] & (o_k < TOP_K)[None, :]
    o = o_t[:, None] * TOP_K + o_k[None, :]
    tl.store(p_weights + o, weights, mask=m)
    tl.store(p_experts + o, experts, mask=m)


@triton.jit(do_not_specialize=["T"])
def router_backward_kernel(
    p_g,  # [T, TOP_K], fp32, gradient of the weights
    p_logits,  # [T, E]
    p_weights,  # [T, TOP_K], fp32
    p_experts,  # [T, TOP_K], int32
    p_dlogits,  # [T, E]
    T,
    E,
    stride_t,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    LANES: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
):
    """With c the sum of g * w over the slots: normalised weights are a softmax over the chosen logits, so w * (g - c)
    there and 0 elsewhere; else p * (g - c), g being 0 where an expert is not chosen."""
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_t = o_t < T
    o_e = tl.arange(0, BLOCK_E)
    total = tl.zeros([ROWS], dtype=tl.float32)
    b_g = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    b_w = tl.zeros([ROWS, BLOCK_E], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        g = tl.load(p_g + o_t * TOP_K + k, mask=m_t, other=0.0)
        w = tl.load(p_weights + o_t * TOP_K + k, mask=m_t, other=0.0)
        expert = tl.load(p_experts + o_t * TOP_K + k, mask=m_t, other=0)
        total = fma(g, w, total)
        is_chosen = o_e[None, :] == expert[:, None]
        b_g = tl.where(is_chosen, g[:, None], b_g)
        b_w = tl.where(is_chosen, w[:, None], b_w)
    if not NORMALIZE:
        b_p, scale = _softmax(p_logits + o_t * stride_t, m_t, E, VECTOR, LANES, LOG2_LANES, BLOCK_E)
        b_w = b_p * scale[:, None]
    b_dx = b_w * (b_g - total[:, None])
    m = m_t[:, None] & (o_e < E)[None, :]
    tl.store(p_dlogits + o_t[:, None] * E + o_e[None, :], cast(b_dx, p_dlogits.dtype.element_ty), mask=m)
