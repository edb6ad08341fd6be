"""Attention's forward, from dense keys or from a paged cache."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.attention.kernels.common import (
    LN2,
    LOG2E,
    add_mask,
    apply_softcap,
    clear_outside,
    dot_nn,
    dot_nt,
    exponent_scale,
    first_or_later_tile,
    get_tile,
    key_ranges,
    load_rows,
    mask_bounds,
    masked_online_softmax,
    online_softmax,
    pair_index,
    pair_offsets,
    seqlen_info,
    store_rows,
    visible,
)
from bi_ops.core.triton_helpers import cast


@triton.jit
def _key_seqlen_info(p_cu, pair, n_pairs, HKV: tl.constexpr, PAGE: tl.constexpr):
    """As `seqlen_info` for keys; a paged sequence starts at 0 of its own pages and `p_cu` holds lengths."""
    if PAGE == 0:
        return seqlen_info(p_cu, pair, n_pairs, HKV)
    else:
        length = tl.load(p_cu + tl.minimum(pair, n_pairs - 1) // HKV)
        return length * 0, tl.where(pair < n_pairs, length, 0)


@triton.jit(do_not_specialize=["n_pairs", "n_tokens", "left", "right", "stride_mb", "stride_mh", "stride_mq"])
def attention_kernel(
    p_q,  # [T, HKV * HEADS, D]
    p_k,  # [Tk, HKV, D], or pages [n, PAGE, HKV, D]
    p_v,  # as p_k
    p_out,  # [T, HKV * HEADS, D]
    p_lse,  # fp32 [HKV * HEADS, T], natural logarithm
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1], or lengths int32 [B] if paged
    p_table,  # int32 [B, max_blocks] if paged
    p_sinks,  # [HKV * HEADS]: a score per head that takes no value; or None
    p_mask,  # [B, HKV * HEADS, queries, keys], numbers added to scores or bytes of a bool; or None
    p_neg_max,  # fp32 [HKV, T, HEADS]: with a mask, -row_max; p_lse is then the logarithm of the row sums alone
    scale,  # softmax_scale
    left,  # keys seen before a query's own; None: all
    right,  # and after it, unless CAUSAL
    softcap,  # scores become softcap * tanh(score / softcap); None: they stay
    n_pairs,
    n_tokens,
    stride_qt,
    stride_qh,
    stride_kp,  # page; 0 if dense
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    stride_table,
    stride_mb,  # of the mask: sequence, head, query, key
    stride_mh,
    stride_mq,
    stride_mk,
    HKV: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    DENSE: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,  # tokens per page; 0 means dense
    HAS_LSE: tl.constexpr,
):
    # Causal tiles at the end have most to do: they start first.
    if PAGE == 0 or DENSE:
        first_pair, i_m = get_tile(p_cu_q, n_pairs, HKV, HEADS, BLOCK_M, GROUPS, DENSE, True)
    else:
        first_pair, i_m = first_or_later_tile(p_cu_q, n_pairs, HKV, HEADS, BLOCK_M)

    pair_m = pair_index(first_pair, BLOCK_M, GROUPS)
    q_start, q_len = seqlen_info(p_cu_q, pair_m, n_pairs, HKV)
    _, k_len = _key_seqlen_info(p_cu_k, pair_m, n_pairs, HKV, PAGE)
    o_r = i_m * BLOCK_M + pair_offsets(BLOCK_M, GROUPS)
    o_t = o_r // HEADS
    o_h = ((pair_m % HKV) * HEADS + o_r % HEADS).to(tl.int64)
    m_r = o_t < q_len
    first, n_seen = mask_bounds(o_t, q_len, k_len, left, right, CAUSAL)
    n_seen = tl.where(m_r, n_seen, 0)
    o_q = (q_start + o_t).to(tl.int64)
    b_q = load_rows(p_q, o_q * stride_qt + o_h * stride_qh, m_r, D, BLOCK_D, True)
    # While Q comes.
    clear_outside(p_out, p_cu_q, n_pairs // HKV, n_tokens, HKV * HEADS * D, 1, HKV * HEADS * D)
    if HAS_LSE:
        clear_outside(p_lse, p_cu_q, n_pairs // HKV, n_tokens, 1, n_tokens, HKV * HEADS)

    pair_n = pair_index(first_pair, BLOCK_N, GROUPS)
    k_start, k_len = _key_seqlen_info(p_cu_k, pair_n, n_pairs, HKV, PAGE)
    i_h = (pair_n % HKV).to(tl.int64)
    lane_n = pair_offsets(BLOCK_N, GROUPS)
    if PAGE == 0:
        p_k += k_start.to(tl.int64) * stride_kt + i_h * stride_kh
        p_v += k_start.to(tl.int64) * stride_vt + i_h * stride_vh
    else:
        p_pages = p_table + (pair_n // HKV).to(tl.int64) * stride_table
    if PAGE != 0 and left is not None:
        # No row of the tile sees a key before those of its first row. The pages there may be another sequence's by now,
        # and a weight of 0 would not hide a value that is not finite.
        _, pair_len = seqlen_info(p_cu_q, pair_n, n_pairs, HKV)
        live, _ = mask_bounds(i_m * BLOCK_M // HEADS, pair_len, k_len, left, right, CAUSAL)

    before, inner, full, end = key_ranges(m_r, first, n_seen, left, BLOCK_N, GROUPS)

    acc = tl.zeros((GROUPS * BLOCK_M, BLOCK_D), dtype=tl.float32)
    if p_sinks is None:
        row_sum = tl.zeros((GROUPS * BLOCK_M,), dtype=tl.float32)
        row_max = tl.full((GROUPS * BLOCK_M,), float("-inf"), dtype=tl.float32)
    else:
        # The sink is what every row has seen before its first key.
        row_max = tl.load(p_sinks + o_h, mask=m_r, other=float("-inf")).to(tl.float32) * LOG2E
        row_sum = tl.where(row_max > float("-inf"), 1.0, 0.0)
    scale2 = exponent_scale(scale, softcap)
    if p_mask is not None:
        o_mask = (pair_m // HKV).to(tl.int64) * stride_mb + o_h * stride_mh + o_t.to(tl.int64) * stride_mq
    for PART in tl.static_range(1 if left is None else 0, 3):
        if PART == 0:
            begin = before
            stop = inner
        elif PART == 1:
            begin = inner
            stop = full
        else:
            begin = full
            stop = end
        for n in range(begin, stop, BLOCK_N):
            o_n = n + lane_n
            m_n = o_n < k_len
            if PART == 0:
                if PAGE != 0:
                    m_n = m_n & (o_n >= live)
            if PAGE == 0:
                o_k = o_n.to(tl.int64) * stride_kt
                o_v = o_n.to(tl.int64) * stride_vt
            else:
                page = tl.load(p_pages + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
                o_page = (o_n % PAGE).to(tl.int64)
                o_k = page * stride_kp + o_page * stride_kt + i_h * stride_kh
                o_v = page * stride_vp + o_page * stride_vt + i_h * stride_vh
            b_k = load_rows(p_k, o_k, m_n, D, BLOCK_D, PART != 1)
            b_s = apply_softcap(dot_nt(b_q, b_k, BLOCK_M, BLOCK_N, BLOCK_D, GROUPS), scale, softcap)
            if p_mask is not None:
                o_key = n + tl.arange(0, BLOCK_N)
                o_at = o_mask[:, None] + o_key.to(tl.int64)[None, :] * stride_mk
                b_s = add_mask(b_s, scale, p_mask, o_at, o_key[None, :] < n_seen[:, None])
            if PART != 1:
                b_s = tl.where(visible(n + tl.arange(0, BLOCK_N), first, n_seen, left), b_s, float("-inf"))
            if p_mask is None:
                b_p, row_max, rescale, row_sum = online_softmax(b_s, row_max, row_sum, scale2)
            else:
                b_p, row_max, rescale, row_sum = masked_online_softmax(b_s, row_max, row_sum)
            b_v = load_rows(p_v, o_v, m_n, D, BLOCK_D, PART != 1)
            acc = acc * rescale[:, None]
            acc = dot_nn(cast(b_p, p_v.dtype.element_ty), b_v, acc, BLOCK_M, BLOCK_D, BLOCK_N, GROUPS)

    seen = row_sum > 0
    b_out = acc / tl.where(seen, row_sum, 1.0)[:, None]
    o_out = (o_q * (HKV * HEADS) + o_h) * D
    store_rows(p_out, o_out, b_out, m_r, D, BLOCK_D)
    if HAS_LSE:
        # +inf where no key is seen: the backward's exp(score - lse) is then 0.
        log_sum = tl.log2(tl.where(seen, row_sum, 1.0))
        if p_neg_max is None:
            log_sum += row_max
        else:
            o_stat = ((pair_m % HKV).to(tl.int64) * n_tokens + q_start) * HEADS + o_r
            tl.store(p_neg_max + o_stat, tl.where(seen, -row_max, 0.0), mask=m_r)
        lse = tl.where(seen, log_sum * LN2, float("inf"))
        tl.store(p_lse + o_h * n_tokens + o_q, lse, mask=m_r)


@triton.jit(do_not_specialize=["n_seqs", "n_tokens"])
def attention_clear_kernel(
    p_out,  # [T, H, D], contiguous
    p_lse,  # fp32 [H, T], or None
    p_cu,  # int32 [B + 1]
    n_seqs,
    n_tokens,
    H: tl.constexpr,
    D: tl.constexpr,
):
    """Zeros in the rows that belong to no sequence, after a kernel that is not ours."""
    clear_outside(p_out, p_cu, n_seqs, n_tokens, H * D, 1, H * D)
    if p_lse is not None:
        clear_outside(p_lse, p_cu, n_seqs, n_tokens, 1, n_tokens, H)
