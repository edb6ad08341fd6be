"""Attention's backward: what its passes start from, two passes for dQ and for dK and dV, and the sinks' gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.attention.kernels.common import (
    LOG2E,
    add_mask,
    apply_softcap,
    clear_outside,
    dot_nn,
    dot_nt,
    exponent_scale,
    find_tile,
    get_tile,
    key_ranges,
    load_rows,
    mask_bounds,
    pair_index,
    pair_offsets,
    seqlen_info,
    store_rows,
    visible,
)
from bi_ops.core.triton_helpers import cast


@triton.jit
def _row_offsets(o_r, stride_t, stride_h, HEADS: tl.constexpr):
    """Offsets, int64, of rows `o_r` of a pair. Cheap enough to compute where used: kept, they cost registers."""
    return (o_r // HEADS).to(tl.int64) * stride_t + (o_r % HEADS).to(tl.int64) * stride_h


@triton.jit
def _across(x, N: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr):
    """x [GROUPS * M], one value per column and pair, so that it broadcasts with [GROUPS * N, M]."""
    if GROUPS == 1:
        return x[None, :]
    else:
        x = tl.broadcast_to(tl.reshape(x, (GROUPS, 1, M)), (GROUPS, N, M))
        return tl.reshape(x, (GROUPS * N, M))


@triton.jit
def _clear_gradients(p_dq, p_dk, p_dv, p_cu_q, p_cu_k, n_seqs, n_tokens, n_keys, Q: tl.constexpr, KV: tl.constexpr):
    """Zeros in the gradients [n_tokens, Q], [n_keys, KV] of rows that belong to no sequence; None is skipped."""
    if p_dq is not None:
        clear_outside(p_dq, p_cu_q, n_seqs, n_tokens, Q, 1, Q)
    if p_dk is not None:
        clear_outside(p_dk, p_cu_k, n_seqs, n_keys, KV, 1, KV)
        clear_outside(p_dv, p_cu_k, n_seqs, n_keys, KV, 1, KV)


@triton.jit(do_not_specialize=["n_tokens", "n_keys", "n_seqs"])
def attention_delta_kernel(
    p_g,  # [T * H, D], contiguous
    p_out,  # [T * H, D], contiguous
    p_lse,  # fp32 [H, T]
    p_glse,  # fp32 [H, T], gradient of lse, or None
    p_delta,  # fp32 [H / HEADS, T, HEADS]: the rows of a pair lie side by side
    p_neg_lse,  # fp32 [H / HEADS, T, HEADS]: -lse in log2
    p_dq,  # [T, H, D], contiguous, as all gradients: zeros in rows that belong to no sequence; or None
    p_dk,  # [Tk, H / HEADS, D], or None
    p_dv,  # as p_dk
    p_cu_q,
    p_cu_k,
    n_tokens,
    n_keys,
    n_seqs,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_t = o_r // H
    o_h = o_r % H
    m_row = o_t < n_tokens
    # A row that belongs to no sequence has a weight of 0 in every sum.
    m_r = (o_t >= tl.load(p_cu_q)) & (o_t < tl.load(p_cu_q + n_seqs))
    b_g = load_rows(p_g, o_r * D, m_r, D, BLOCK_D, True).to(tl.float32)
    b_out = load_rows(p_out, o_r * D, m_r, D, BLOCK_D, True).to(tl.float32)
    o_row = (o_h // HEADS * n_tokens + o_t) * HEADS + o_h % HEADS
    delta = tl.sum(b_g * b_out, 1)
    if p_glse is not None:
        delta -= tl.load(p_glse + o_h * n_tokens + o_t, mask=m_r, other=0.0)
    tl.store(p_delta + o_row, delta, mask=m_row)
    lse = tl.load(p_lse + o_h * n_tokens + o_t, mask=m_r, other=float("inf"))
    tl.store(p_neg_lse + o_row, -(lse * LOG2E), mask=m_row)
    _clear_gradients(p_dq, p_dk, p_dv, p_cu_q, p_cu_k, n_seqs, n_tokens, n_keys, H * D, H // HEADS * D)


@triton.jit(do_not_specialize=["n_tokens", "n_keys", "n_seqs", "n_tiles", "n_slots"])
def attention_prepare_kernel(
    p_g,  # [T, H, D], contiguous
    p_out,  # [T, H, D], contiguous
    p_lse,  # fp32 [H, T]
    p_g_lse,  # fp32 [H, T] or None
    p_neg_lse,  # fp32 [H, n_tiles, BLOCK_M]: -lse in log2; 0 past the end of a sequence
    p_delta,  # as p_neg_lse: row sums of dO * O, less the gradient of the lse
    p_semaphores,  # int32 [H, n_slots]: zeros where a tile takes more than one tile of keys
    p_dq,  # [T, H, D], contiguous: zeros in rows that see no key, which no CTA of the main kernel writes
    p_dk,  # [Tk, H / HEADS, D], contiguous: zeros in rows that belong to no sequence
    p_dv,  # as p_dk
    p_cu_q,
    p_cu_k,
    n_tokens,
    n_keys,
    n_seqs,
    n_tiles,
    n_slots,  # of `hopper.backward.n_slots`
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # The heads of a tile run side by side: together they read whole rows of memory.
    i_tile = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_b, i_m = find_tile(p_cu_q, i_tile, n_seqs, 1, BLOCK_M)  # past a sequence's last tile are no rows
    start = tl.load(p_cu_q + i_b)
    q_len = tl.load(p_cu_q + i_b + 1) - start
    k_start = tl.load(p_cu_k + i_b)
    k_len = tl.load(p_cu_k + i_b + 1) - k_start
    lane = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_t = lane < q_len
    o_t = (start + lane).to(tl.int64)
    o_x = (o_t * H + i_h)[:, None] * D + tl.arange(0, D)[None, :]
    b_g = tl.load(p_g + o_x, mask=m_t[:, None], other=0.0).to(tl.float32)
    b_out = tl.load(p_out + o_x, mask=m_t[:, None], other=0.0).to(tl.float32)
    o_lse = i_h.to(tl.int64) * n_tokens + o_t
    lse = tl.load(p_lse + o_lse, mask=m_t, other=0.0)
    b_delta = tl.sum(b_g * b_out, 1)
    if p_g_lse is not None:
        b_delta -= tl.load(p_g_lse + o_lse, mask=m_t, other=0.0)
    if i_m * BLOCK_M < q_len:
        o_stat = (i_h.to(tl.int64) * n_tiles + start // BLOCK_M + i_b + i_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(p_neg_lse + o_stat, -(lse * LOG2E))
        tl.store(p_delta + o_stat, b_delta)
        if k_len > BLOCK_N:
            first_slot = start // BLOCK_M + tl.minimum(i_b, k_start // BLOCK_N)
            tl.store(p_semaphores + i_h.to(tl.int64) * n_slots + first_slot + i_m, 0)
    unseen = k_len == 0
    if CAUSAL:
        unseen = unseen | ((i_m + 1) * BLOCK_M <= q_len - k_len)
    if unseen:
        tl.store(p_dq + o_x, tl.zeros_like(b_g).to(p_dq.dtype.element_ty), mask=m_t[:, None])
    _clear_gradients(p_dq, p_dk, p_dv, p_cu_q, p_cu_k, n_seqs, n_tokens, n_keys, H * D, H // HEADS * D)


@triton.jit(do_not_specialize=["n_tokens"])
def attention_dsinks_kernel(
    p_sinks,  # [H]
    p_neg_lse,  # fp32 [H / HEADS, T, HEADS]: -lse in log2
    p_delta,  # fp32 [H / HEADS, T, HEADS]
    p_partial,  # fp32 [cdiv(T, CHUNK), H]
    n_tokens,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partial[i] = -exp(sink - lse) * delta of tokens i * CHUNK and on, front to back; ROWS chunks side by side."""
    o_i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    m_h = o_h < H
    b_sink = tl.load(p_sinks + o_h, mask=m_h, other=0.0).to(tl.float32)
    acc = tl.zeros((ROWS, BLOCK_H), dtype=tl.float32)
    for step in tl.static_range(CHUNK):
        o_t = o_i * CHUNK + step
        m = (o_t < n_tokens) & m_h
        o_stat = (o_h // HEADS * n_tokens + o_t) * HEADS + o_h % HEADS
        b_p = tl.exp2(tl.fma(b_sink, LOG2E, tl.load(p_neg_lse + o_stat, mask=m, other=0.0)))
        acc = tl.fma(-b_p, tl.load(p_delta + o_stat, mask=m, other=0.0), acc)
    tl.store(p_partial + o_i * H + o_h, acc, mask=(o_i * CHUNK < n_tokens) & m_h)


@triton.jit(do_not_specialize=["n_chunks"])
def attention_add_chunks_kernel(
    p_partial,  # fp32 [n_chunks, H]
    p_out,  # [H]
    n_chunks,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out = the chunks' partial sums, added one after another."""
    o_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    o_at, end = o_h.to(tl.int64), tl.cast(n_chunks, tl.int64) * H
    for _first in range(0, n_chunks, UNROLL):
        for _step in tl.static_range(UNROLL):
            acc += tl.load(p_partial + o_at, mask=(o_h < H) & (o_at < end), other=0.0)
            o_at += H
    tl.store(p_out + o_h, cast(acc, p_out.dtype.element_ty), mask=o_h < H)


@triton.jit(do_not_specialize=["n_pairs", "n_tokens", "left", "right", "stride_mb", "stride_mh", "stride_mq"])
def attention_dq_kernel(
    p_g,  # [T, HKV * HEADS, D], contiguous
    p_q,  # [T, HKV * HEADS, D]
    p_k,  # [Tk, HKV, D]
    p_v,  # [Tk, HKV, D]
    p_neg_lse,  # fp32 [HKV, T, HEADS]: -lse in log2
    p_delta,  # fp32 [HKV, T, HEADS]
    p_dq,  # [T, HKV * HEADS, D], contiguous
    p_cu_q,
    p_cu_k,
    p_mask,  # p_mask, p_neg_max and the mask's strides as in `attention_kernel`
    p_neg_max,
    p_dmask,  # [B, HKV * HEADS, queries, keys], contiguous, zeros; or None
    scale,  # softmax_scale
    left,  # left, right and softcap as in `attention_kernel`
    right,
    softcap,
    n_pairs,
    n_tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_mb,
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
):
    first_pair, i_m = get_tile(p_cu_q, n_pairs, HKV, HEADS, BLOCK_M, GROUPS, DENSE, True)

    pair_m = pair_index(first_pair, BLOCK_M, GROUPS)
    q_start, q_len = seqlen_info(p_cu_q, pair_m, n_pairs, HKV)
    _, key_len = seqlen_info(p_cu_k, pair_m, n_pairs, HKV)
    o_r = i_m * BLOCK_M + pair_offsets(BLOCK_M, GROUPS)
    o_t = o_r // HEADS
    o_h = ((pair_m % HKV) * HEADS + o_r % HEADS).to(tl.int64)
    m_r = o_t < q_len
    first, n_seen = mask_bounds(o_t, q_len, key_len, left, right, CAUSAL)
    n_seen = tl.where(m_r, n_seen, 0)
    o_q = (q_start + o_t).to(tl.int64)
    o_row = (o_q * (HKV * HEADS) + o_h) * D
    o_stat = ((pair_m % HKV).to(tl.int64) * n_tokens + q_start) * HEADS + o_r
    b_q = load_rows(p_q, o_q * stride_qt + o_h * stride_qh, m_r, D, BLOCK_D, True)
    b_g = load_rows(p_g, o_row, m_r, D, BLOCK_D, True)
    neg_lse = tl.load(p_neg_lse + o_stat, mask=m_r, other=0.0)
    b_delta = tl.load(p_delta + o_stat, mask=m_r, other=0.0)

    pair_n = pair_index(first_pair, BLOCK_N, GROUPS)
    k_start, k_len = seqlen_info(p_cu_k, pair_n, n_pairs, HKV)
    i_h = (pair_n % HKV).to(tl.int64)
    lane_n = pair_offsets(BLOCK_N, GROUPS)
    p_k += k_start.to(tl.int64) * stride_kt + i_h * stride_kh
    p_v += k_start.to(tl.int64) * stride_vt + i_h * stride_vh

    before, inner, full, end = key_ranges(m_r, first, n_seen, left, BLOCK_N, GROUPS)

    acc = tl.zeros((GROUPS * BLOCK_M, BLOCK_D), dtype=tl.float32)
    scale2 = exponent_scale(scale, softcap)
    if p_mask is not None:
        i_b = (pair_m // HKV).to(tl.int64)
        o_mask = i_b * stride_mb + o_h * stride_mh + o_t.to(tl.int64) * stride_mq
        o_dmask = ((i_b * (HKV * HEADS) + o_h) * q_len + o_t) * key_len
        neg_max = tl.load(p_neg_max + o_stat, mask=m_r, other=0.0)
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
            b_k = load_rows(p_k, o_n.to(tl.int64) * stride_kt, m_n, D, BLOCK_D, PART != 1)
            b_v = load_rows(p_v, o_n.to(tl.int64) * stride_vt, m_n, D, BLOCK_D, PART != 1)
            b_s = apply_softcap(dot_nt(b_q, b_k, BLOCK_M, BLOCK_N, BLOCK_D, GROUPS), scale, softcap)
            if p_mask is None:
                b_p = tl.exp2(tl.fma(b_s, scale2, neg_lse[:, None]))
            else:
                o_key = n + tl.arange(0, BLOCK_N)
                o_at = o_mask[:, None] + o_key.to(tl.int64)[None, :] * stride_mk
                m_there = o_key[None, :] < n_seen[:, None]
                b_s = add_mask(b_s, scale, p_mask, o_at, m_there)
                b_p = tl.exp2(tl.fma(b_s + neg_max[:, None], LOG2E, neg_lse[:, None]))
            if softcap is not None:
                b_p = b_p * tl.fma(-b_s, b_s, 1.0)  # the derivative of tanh
            b_dp = dot_nt(b_g, b_v, BLOCK_M, BLOCK_N, BLOCK_D, GROUPS)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if PART != 1:  # last: dP of a key that is not seen may be infinite, and 0 times that is NaN
                b_ds = tl.where(visible(n + tl.arange(0, BLOCK_N), first, n_seen, left), b_ds, 0.0)
            if p_dmask is not None:
                tl.store(
                    p_dmask + o_dmask[:, None] + o_key[None, :], cast(b_ds, p_dmask.dtype.element_ty), mask=m_there
                )
            acc = dot_nn(cast(b_ds, p_k.dtype.element_ty), b_k, acc, BLOCK_M, BLOCK_D, BLOCK_N, GROUPS)

    store_rows(p_dq, o_row, acc * scale, m_r, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_pairs", "n_tokens", "left", "right", "stride_mb", "stride_mh", "stride_mq"])
def attention_dkv_kernel(
    p_g,  # [T, HKV * HEADS, D], contiguous
    p_q,  # [T, HKV * HEADS, D]
    p_k,  # [Tk, HKV, D]
    p_v,  # [Tk, HKV, D]
    p_neg_lse,  # fp32 [HKV, T, HEADS]: -lse in log2
    p_delta,  # fp32 [HKV, T, HEADS]
    p_dk,  # [Tk, HKV, D], contiguous
    p_dv,  # [Tk, HKV, D], contiguous
    p_cu_q,
    p_cu_k,
    p_mask,  # p_mask, p_neg_max and the mask's strides as in `attention_kernel`
    p_neg_max,
    scale,  # softmax_scale
    left,  # left, right and softcap as in `attention_kernel`
    right,
    softcap,
    n_pairs,
    n_tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    HKV: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    DENSE: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    first_pair, i_n = get_tile(p_cu_k, n_pairs, HKV, 1, BLOCK_N, GROUPS, DENSE, False)

    pair_n = pair_index(first_pair, BLOCK_N, GROUPS)
    k_start, k_len = seqlen_info(p_cu_k, pair_n, n_pairs, HKV)
    _, q_len = seqlen_info(p_cu_q, pair_n, n_pairs, HKV)
    o_n = i_n * BLOCK_N + pair_offsets(BLOCK_N, GROUPS)
    m_n = o_n < k_len
    o_k = (k_start + o_n).to(tl.int64)
    i_h = (pair_n % HKV).to(tl.int64)
    b_k = load_rows(p_k, o_k * stride_kt + i_h * stride_kh, m_n, D, BLOCK_D, True)
    b_v = load_rows(p_v, o_k * stride_vt + i_h * stride_vh, m_n, D, BLOCK_D, True)

    # The queries that see each key, and the steps of rows that this tile takes: from the first row that sees any key,
    # through those that see only some (up to `full`), to the last whole step that sees all (`whole`), and what is left.
    first_q = o_n * 0
    if CAUSAL:
        first_q = tl.maximum(o_n - (k_len - q_len), 0)
    elif right is not None:
        first_q = tl.maximum(o_n - (k_len - q_len) - right, 0)
    n_rows = tl.max(tl.where(m_n, q_len * HEADS, 0), 0)
    first = tl.min(tl.where(m_n, first_q * HEADS, n_rows), 0) // BLOCK_R
    n_all = n_rows
    if left is not None:
        end_q = tl.minimum(tl.maximum(o_n - (k_len - q_len) + left + 1, 0), q_len)
        n_all = tl.min(tl.where(m_n, end_q * HEADS, n_rows), 0)
        n_rows = tl.max(tl.where(m_n, end_q * HEADS, 0), 0)
    end = (n_rows + BLOCK_R - 1) // BLOCK_R
    full = end
    if GROUPS == 1:
        full = (tl.max(tl.where(m_n, first_q * HEADS, 0), 0) + BLOCK_R - 1) // BLOCK_R
        full = tl.maximum(tl.minimum(full, end), first)
    whole = tl.maximum(n_all // BLOCK_R, full)

    pair_r = pair_index(first_pair, BLOCK_R, GROUPS)
    q_start, q_len = seqlen_info(p_cu_q, pair_r, n_pairs, HKV)
    lane_r = pair_offsets(BLOCK_R, GROUPS)
    first_h = ((pair_r % HKV) * HEADS).to(tl.int64)
    p_q += q_start.to(tl.int64) * stride_qt + first_h * stride_qh
    p_g += (q_start.to(tl.int64) * (HKV * HEADS) + first_h) * D
    first_stat = ((pair_r % HKV).to(tl.int64) * n_tokens + q_start) * HEADS

    acc_k = tl.zeros((GROUPS * BLOCK_N, BLOCK_D), dtype=tl.float32)
    acc_v = tl.zeros((GROUPS * BLOCK_N, BLOCK_D), dtype=tl.float32)
    scale2 = exponent_scale(scale, softcap)
    if p_mask is not None:
        o_mask = (pair_n // HKV).to(tl.int64) * stride_mb + o_n.to(tl.int64) * stride_mk
    for PART in tl.static_range(0, 3):
        if PART == 0:
            begin = first
            stop = full
        elif PART == 1:
            begin = full
            stop = whole
        else:
            begin = whole
            stop = end
        for i in range(begin, stop):
            o_r = i * BLOCK_R + lane_r
            m_r = o_r < q_len * HEADS
            # Rows past the end are zeros with a finite lse: they add exactly nothing.
            o_q = _row_offsets(o_r, stride_qt, stride_qh, HEADS)
            b_q = load_rows(p_q, o_q, m_r, D, BLOCK_D, PART != 1)
            o_g = _row_offsets(o_r, HKV * HEADS * D, D, HEADS)
            b_g = load_rows(p_g, o_g, m_r, D, BLOCK_D, PART != 1)
            o_stat = first_stat + o_r
            if PART == 1:
                neg_lse = tl.load(p_neg_lse + o_stat)
                b_delta = tl.load(p_delta + o_stat)
            else:
                neg_lse = tl.load(p_neg_lse + o_stat, mask=m_r, other=0.0)
                b_delta = tl.load(p_delta + o_stat, mask=m_r, other=0.0)

            b_s = apply_softcap(dot_nt(b_k, b_q, BLOCK_N, BLOCK_R, BLOCK_D, GROUPS), scale, softcap)
            if p_mask is None:
                b_p = tl.exp2(tl.fma(b_s, scale2, _across(neg_lse, BLOCK_N, BLOCK_R, GROUPS)))
            else:
                o_row = (first_h + o_r % HEADS) * stride_mh + (o_r // HEADS).to(tl.int64) * stride_mq
                o_at = o_mask[:, None] + _across(o_row, BLOCK_N, BLOCK_R, GROUPS)
                m_there = m_n[:, None] & (_across(m_r.to(tl.int32), BLOCK_N, BLOCK_R, GROUPS) != 0)
                b_s = add_mask(b_s, scale, p_mask, o_at, m_there)
                neg_max = tl.load(p_neg_max + o_stat, mask=m_r, other=0.0)
                b_p = b_s + _across(neg_max, BLOCK_N, BLOCK_R, GROUPS)
                b_p = tl.exp2(tl.fma(b_p, LOG2E, _across(neg_lse, BLOCK_N, BLOCK_R, GROUPS)))
            o_query = (i * BLOCK_R + tl.arange(0, BLOCK_R)) // HEADS
            if PART == 0:
                b_p = tl.where(first_q[:, None] <= o_query[None, :], b_p, 0.0)
            if left is not None and PART != 1:
                b_p = tl.where(o_query[None, :] < end_q[:, None], b_p, 0.0)
            acc_v = dot_nn(cast(b_p, p_v.dtype.element_ty), b_g, acc_v, BLOCK_N, BLOCK_D, BLOCK_R, GROUPS)
            if softcap is not None:
                b_p = b_p * tl.fma(-b_s, b_s, 1.0)
            b_dp = dot_nt(b_v, b_g, BLOCK_N, BLOCK_R, BLOCK_D, GROUPS)
            b_ds = b_p * (b_dp - _across(b_delta, BLOCK_N, BLOCK_R, GROUPS))
            # Again: dP of a query that does not see the key may be infinite, and 0 times that is NaN.
            if PART == 0:
                b_ds = tl.where(first_q[:, None] <= o_query[None, :], b_ds, 0.0)
            if left is not None and PART != 1:
                b_ds = tl.where(o_query[None, :] < end_q[:, None], b_ds, 0.0)
            acc_k = dot_nn(cast(b_ds, p_k.dtype.element_ty), b_q, acc_k, BLOCK_N, BLOCK_D, BLOCK_R, GROUPS)

    o_out = (o_k * HKV + i_h) * D
    store_rows(p_dk, o_out, acc_k * scale, m_n, D, BLOCK_D)
    store_rows(p_dv, o_out, acc_v, m_n, D, BLOCK_D)
