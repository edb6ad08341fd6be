"""Attention kernels. Every output row is owned by one program that walks its sum front to back: no splits, no atomics.

A pair is (sequence, key head). The query heads that share a key head are packed into the rows of a tile: row r of a
pair is query r // HEADS and head r % HEADS of the group. A program takes GROUPS pairs; on a GPU that is one, and what
is written as a vector over pairs below is then a scalar.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops._common.triton_helpers import cast, dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _pairs(first, PER: tl.constexpr, GROUPS: tl.constexpr):
    """The pair that each of the GROUPS * PER lanes belongs to."""
    if GROUPS == 1:
        return first
    else:
        return first + tl.arange(0, GROUPS * PER) // PER


@triton.jit
def _lanes(PER: tl.constexpr, GROUPS: tl.constexpr):
    """The index of each lane inside its pair."""
    if GROUPS == 1:
        return tl.arange(0, PER)
    else:
        return tl.arange(0, GROUPS * PER) % PER


@triton.jit
def find_tile(p_cu, i_tile, n_seqs, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, tile of it) of tile `i_tile` in a list that holds those of sequence 0, then those of 1, and so on.

    Sequence b starts at cu[b] * PER_TOKEN // BLOCK + b, which leaves room for its rows, and at most one tile more.
    """
    low = n_seqs * 0
    high = n_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(p_cu + middle) * PER_TOKEN // BLOCK + middle <= i_tile:
            low = middle
        else:
            high = middle
    return low, i_tile - (tl.load(p_cu + low) * PER_TOKEN // BLOCK + low)


@triton.jit
def _own_tile(
    p_cu,
    n_pairs,
    HKV: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    DENSE: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):
    """(first pair, tile) of this program, in a grid of pairs and tiles if DENSE, else in a list of tiles that exist."""
    if DENSE:
        return tl.program_id(0) * GROUPS, tl.program_id(1)
    else:
        i_tile = tl.program_id(0) // HKV
        if LAST_FIRST:
            i_tile = tl.num_programs(0) // HKV - 1 - i_tile
        i_b, i_tile = find_tile(p_cu, i_tile, n_pairs // HKV, PER_TOKEN, BLOCK)
        return i_b * HKV + tl.program_id(0) % HKV, i_tile


@triton.jit
def _span(p_cu, pair, n_pairs, HKV: tl.constexpr):
    """(start, length) of the sequence that `pair` belongs to; past the last pair the length is 0."""
    i_b = tl.minimum(pair, n_pairs - 1) // HKV
    start = tl.load(p_cu + i_b)
    return start, tl.where(pair < n_pairs, tl.load(p_cu + i_b + 1) - start, 0)


@triton.jit
def _key_span(p_cu, pair, n_pairs, HKV: tl.constexpr, PAGE: tl.constexpr):
    """As `_span` for keys; a paged sequence starts at 0 of its own pages and `p_cu` holds lengths."""
    if PAGE == 0:
        return _span(p_cu, pair, n_pairs, HKV)
    else:
        length = tl.load(p_cu + tl.minimum(pair, n_pairs - 1) // HKV)
        return length * 0, tl.where(pair < n_pairs, length, 0)


@triton.jit
def _seen(o_t, q_len, k_len, left, right, CAUSAL: tl.constexpr):
    """Query `o_t` sees the keys from the first number to before the second; its last query and key are aligned.

    left, right: how many keys it sees before and after its own; None: all. CAUSAL: none after.
    """
    first = o_t * 0
    if left is not None:
        first = tl.minimum(tl.maximum(o_t + (k_len - q_len) - left, 0), k_len)
    if CAUSAL:
        return first, tl.minimum(tl.maximum(o_t + (k_len - q_len) + 1, 0), k_len)
    elif right is not None:
        return first, tl.minimum(tl.maximum(o_t + (k_len - q_len) + 1 + right, 0), k_len)
    else:
        return first, o_t * 0 + k_len


@triton.jit
def _steps(m_r, first, n_seen, left, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """(begin, inner, full, end): rows see keys from begin to end only, and every row sees all from inner to full.

    There no mask is needed, and the arithmetic is the same with one. Steps are counted from the start of the sequence;
    those before begin and after end are skipped, for a row that sees nothing of a step keeps its bits.
    """
    end = tl.max(n_seen, 0)
    full = end * 0
    if GROUPS == 1:
        full = tl.min(tl.where(m_r, n_seen, end), 0) // BLOCK_N * BLOCK_N
    if left is None:
        return full * 0, full * 0, full, end
    else:
        begin = tl.min(tl.where(m_r, first, end), 0) // BLOCK_N * BLOCK_N
        inner = tl.minimum((tl.max(tl.where(m_r, first, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N, end)
        return begin, inner, tl.maximum(full, inner), end


@triton.jit
def _visible(o_n, first, n_seen, left):
    """Which of the keys `o_n` [N] each row sees: [R, N]."""
    if left is None:
        return o_n[None, :] < n_seen[:, None]
    else:
        return (o_n[None, :] < n_seen[:, None]) & (o_n[None, :] >= first[:, None])


@triton.jit
def _exponent_scale(scale, softcap):
    """What makes an exponent of 2 of a score that `_capped` returned."""
    if softcap is None:
        return tl.full((), LOG2E, tl.float32) * scale
    else:
        return tl.full((), LOG2E, tl.float32) * softcap


@triton.jit
def _capped(b_s, scale, softcap):
    """The products themselves; with a softcap tanh(b_s * scale / softcap), to an ulp or two.

    Near 0 a polynomial, because 1 - 2 / (e^2x + 1) cancels there. Explicit fma, as everywhere in a loop.
    """
    if softcap is None:
        return b_s
    else:
        b_x = b_s * (tl.full((), 1.0, tl.float32) * scale / softcap)
        b_far = tl.fma(1.0 / (tl.exp2(tl.abs(b_x) * (2 * LOG2E)) + 1.0), -2.0, 1.0)
        b_sq = b_x * b_x
        b_near = tl.fma(b_sq, 0.0157396831, -0.0523039624)
        b_near = tl.fma(b_near, b_sq, 0.133152977)
        b_near = tl.fma(b_near, b_sq, -0.333327681)
        b_near = tl.fma(b_near * b_sq, b_x, b_x)
        return tl.where(tl.abs(b_x) < 0.55, b_near, tl.where(b_x < 0, -b_far, b_far))


@triton.jit
def _row_offsets(o_r, stride_t, stride_h, HEADS: tl.constexpr):
    """Offsets, int64, of rows `o_r` of a pair. Cheap enough to compute where used: kept, they cost registers."""
    return (o_r // HEADS).to(tl.int64) * stride_t + o_r % HEADS * stride_h


@triton.jit
def _load_rows(p, offsets, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows [R, BLOCK_D] at `offsets` [R] from p (one pointer, or [R]); zeros past D, and outside `m_rows` if MASKED."""
    o_d = tl.arange(0, BLOCK_D)
    ptrs = (p + offsets)[:, None] + o_d[None, :]
    if MASKED:
        return tl.load(ptrs, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        return tl.load(ptrs, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _store_rows(p, offsets, x, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x [R, BLOCK_D] at `offsets` [R] where `m_rows`, rounded to the dtype of `p`."""
    o_d = tl.arange(0, BLOCK_D)
    mask = m_rows[:, None] & (o_d < D)[None, :]
    tl.store(p + offsets[:, None] + o_d[None, :], cast(x, p.dtype.element_ty), mask=mask)


@triton.jit
def _dot_nt(a, b, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr):
    """a @ b.T pair by pair: a [GROUPS * M, K], b [GROUPS * N, K] -> fp32 [GROUPS * M, N]."""
    if GROUPS == 1:
        return dot(a, tl.trans(b), tl.zeros((M, N), dtype=tl.float32))
    else:
        a = tl.reshape(a, (GROUPS, M, K))
        b = tl.permute(tl.reshape(b, (GROUPS, N, K)), (0, 2, 1))
        return tl.reshape(dot(a, b, tl.zeros((GROUPS, M, N), dtype=tl.float32)), (GROUPS * M, N))


@triton.jit
def _dot_nn(a, b, acc, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr):
    """acc + a @ b pair by pair: a [GROUPS * M, K], b [GROUPS * K, N], acc [GROUPS * M, N]."""
    if GROUPS == 1:
        return dot(a, b, acc)
    else:
        a = tl.reshape(a, (GROUPS, M, K))
        b = tl.reshape(b, (GROUPS, K, N))
        return tl.reshape(dot(a, b, tl.reshape(acc, (GROUPS, M, N))), (GROUPS * M, N))


@triton.jit
def _across(x, N: tl.constexpr, M: tl.constexpr, GROUPS: tl.constexpr):
    """x [GROUPS * M], one value per column and pair, so that it broadcasts with [GROUPS * N, M]."""
    if GROUPS == 1:
        return x[None, :]
    else:
        x = tl.broadcast_to(tl.reshape(x, (GROUPS, 1, M)), (GROUPS, N, M))
        return tl.reshape(x, (GROUPS * N, M))


@triton.jit(do_not_specialize=["n_pairs", "n_tokens", "left", "right"])
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
    first_pair, i_m = _own_tile(p_cu_q, n_pairs, HKV, HEADS, BLOCK_M, GROUPS, DENSE, True)

    pair_m = _pairs(first_pair, BLOCK_M, GROUPS)
    q_start, q_len = _span(p_cu_q, pair_m, n_pairs, HKV)
    _, k_len = _key_span(p_cu_k, pair_m, n_pairs, HKV, PAGE)
    o_r = i_m * BLOCK_M + _lanes(BLOCK_M, GROUPS)
    o_t = o_r // HEADS
    o_h = (pair_m % HKV) * HEADS + o_r % HEADS
    m_r = o_t < q_len
    first, n_seen = _seen(o_t, q_len, k_len, left, right, CAUSAL)
    n_seen = tl.where(m_r, n_seen, 0)
    o_q = (q_start + o_t).to(tl.int64)
    b_q = _load_rows(p_q, o_q * stride_qt + o_h * stride_qh, m_r, D, BLOCK_D, True)

    pair_n = _pairs(first_pair, BLOCK_N, GROUPS)
    k_start, k_len = _key_span(p_cu_k, pair_n, n_pairs, HKV, PAGE)
    i_h = (pair_n % HKV).to(tl.int64)
    lane_n = _lanes(BLOCK_N, GROUPS)
    if PAGE == 0:
        p_k += k_start.to(tl.int64) * stride_kt + i_h * stride_kh
        p_v += k_start.to(tl.int64) * stride_vt + i_h * stride_vh
    elif left is not None:
        # No row of the tile sees a key before those of its first row. The pages there may be another sequence's by now,
        # and a weight of 0 would not hide a value that is not finite.
        _, pair_len = _span(p_cu_q, pair_n, n_pairs, HKV)
        live, _ = _seen(i_m * BLOCK_M // HEADS, pair_len, k_len, left, right, CAUSAL)

    before, inner, full, end = _steps(m_r, first, n_seen, left, BLOCK_N, GROUPS)

    acc = tl.zeros((GROUPS * BLOCK_M, BLOCK_D), dtype=tl.float32)
    if p_sinks is None:
        total = tl.zeros((GROUPS * BLOCK_M,), dtype=tl.float32)
        top = tl.full((GROUPS * BLOCK_M,), float("-inf"), dtype=tl.float32)
    else:
        # The sink is what every row has seen before its first key.
        top = tl.load(p_sinks + o_h, mask=m_r, other=float("-inf")).to(tl.float32) * LOG2E
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    scale2 = _exponent_scale(scale, softcap)
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
                page = tl.load(p_table + (pair_n // HKV) * stride_table + o_n // PAGE, mask=m_n, other=0).to(tl.int64)
                o_k = page * stride_kp + (o_n % PAGE) * stride_kt + i_h * stride_kh
                o_v = page * stride_vp + (o_n % PAGE) * stride_vt + i_h * stride_vh
            b_k = _load_rows(p_k, o_k, m_n, D, BLOCK_D, PART != 1)
            b_s = _capped(_dot_nt(b_q, b_k, BLOCK_M, BLOCK_N, BLOCK_D, GROUPS), scale, softcap)
            if PART != 1:
                b_s = tl.where(_visible(n + tl.arange(0, BLOCK_N), first, n_seen, left), b_s, float("-inf"))
            # Explicit fma: left to the compiler, contraction could differ between the two loops.
            new_top = tl.maximum(top, tl.max(b_s, 1) * scale2)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            b_p = tl.exp2(tl.fma(b_s, scale2, -shift[:, None]))
            decay = tl.exp2(top - shift)
            total = tl.fma(total, decay, tl.sum(b_p, 1))
            top = new_top
            b_v = _load_rows(p_v, o_v, m_n, D, BLOCK_D, PART != 1)
            acc = acc * decay[:, None]
            acc = _dot_nn(cast(b_p, p_v.dtype.element_ty), b_v, acc, BLOCK_M, BLOCK_D, BLOCK_N, GROUPS)

    seen = total > 0
    b_out = acc / tl.where(seen, total, 1.0)[:, None]
    o_out = (o_q * (HKV * HEADS) + o_h) * D
    _store_rows(p_out, o_out, b_out, m_r, D, BLOCK_D)
    if HAS_LSE:
        # +inf where no key is seen: the backward's exp(score - lse) is then 0.
        lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("inf"))
        tl.store(p_lse + o_h.to(tl.int64) * n_tokens + o_q, lse, mask=m_r)


@triton.jit(do_not_specialize=["n_rows", "n_tokens"])
def attention_delta_kernel(
    p_g,  # [T * H, D], contiguous
    p_out,  # [T * H, D], contiguous
    p_lse,  # fp32 [H, T]
    p_glse,  # fp32 [H, T], gradient of lse, or None
    p_delta,  # fp32 [H / HEADS, T, HEADS]: the rows of a pair lie side by side
    p_shift,  # fp32 [H / HEADS, T, HEADS]: -lse in base 2
    n_rows,
    n_tokens,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < n_rows
    b_g = _load_rows(p_g, o_r * D, m_r, D, BLOCK_D, True).to(tl.float32)
    b_out = _load_rows(p_out, o_r * D, m_r, D, BLOCK_D, True).to(tl.float32)
    o_t = o_r // H
    o_h = o_r % H
    o_row = (o_h // HEADS * n_tokens + o_t) * HEADS + o_h % HEADS
    delta = tl.sum(b_g * b_out, 1)
    if p_glse is not None:
        delta -= tl.load(p_glse + o_h * n_tokens + o_t, mask=m_r, other=0.0)
    tl.store(p_delta + o_row, delta, mask=m_r)
    lse = tl.load(p_lse + o_h * n_tokens + o_t, mask=m_r, other=0.0)
    tl.store(p_shift + o_row, -(lse * LOG2E), mask=m_r)


@triton.jit(do_not_specialize=["n_tokens"])
def attention_dsinks_kernel(
    p_sinks,  # [H]
    p_shift,  # fp32 [H / HEADS, T, HEADS]: -lse in base 2
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
        b_p = tl.exp2(tl.fma(b_sink, LOG2E, tl.load(p_shift + o_stat, mask=m, other=0.0)))
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


@triton.jit(do_not_specialize=["n_pairs", "n_tokens", "left", "right"])
def attention_dq_kernel(
    p_g,  # [T, HKV * HEADS, D], contiguous
    p_q,  # [T, HKV * HEADS, D]
    p_k,  # [Tk, HKV, D]
    p_v,  # [Tk, HKV, D]
    p_shift,  # fp32 [HKV, T, HEADS]: -lse in base 2
    p_delta,  # fp32 [HKV, T, HEADS]
    p_dq,  # [T, HKV * HEADS, D], contiguous
    p_cu_q,
    p_cu_k,
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
    first_pair, i_m = _own_tile(p_cu_q, n_pairs, HKV, HEADS, BLOCK_M, GROUPS, DENSE, True)

    pair_m = _pairs(first_pair, BLOCK_M, GROUPS)
    q_start, q_len = _span(p_cu_q, pair_m, n_pairs, HKV)
    _, k_len = _span(p_cu_k, pair_m, n_pairs, HKV)
    o_r = i_m * BLOCK_M + _lanes(BLOCK_M, GROUPS)
    o_t = o_r // HEADS
    o_h = ((pair_m % HKV) * HEADS + o_r % HEADS).to(tl.int64)
    m_r = o_t < q_len
    first, n_seen = _seen(o_t, q_len, k_len, left, right, CAUSAL)
    n_seen = tl.where(m_r, n_seen, 0)
    o_q = (q_start + o_t).to(tl.int64)
    o_row = (o_q * (HKV * HEADS) + o_h) * D
    o_stat = ((pair_m % HKV).to(tl.int64) * n_tokens + q_start) * HEADS + o_r
    b_q = _load_rows(p_q, o_q * stride_qt + o_h * stride_qh, m_r, D, BLOCK_D, True)
    b_g = _load_rows(p_g, o_row, m_r, D, BLOCK_D, True)
    shift = tl.load(p_shift + o_stat, mask=m_r, other=0.0)
    b_delta = tl.load(p_delta + o_stat, mask=m_r, other=0.0)

    pair_n = _pairs(first_pair, BLOCK_N, GROUPS)
    k_start, k_len = _span(p_cu_k, pair_n, n_pairs, HKV)
    i_h = (pair_n % HKV).to(tl.int64)
    lane_n = _lanes(BLOCK_N, GROUPS)
    p_k += k_start.to(tl.int64) * stride_kt + i_h * stride_kh
    p_v += k_start.to(tl.int64) * stride_vt + i_h * stride_vh

    before, inner, full, end = _steps(m_r, first, n_seen, left, BLOCK_N, GROUPS)

    acc = tl.zeros((GROUPS * BLOCK_M, BLOCK_D), dtype=tl.float32)
    scale2 = _exponent_scale(scale, softcap)
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
            b_k = _load_rows(p_k, o_n.to(tl.int64) * stride_kt, m_n, D, BLOCK_D, PART != 1)
            b_v = _load_rows(p_v, o_n.to(tl.int64) * stride_vt, m_n, D, BLOCK_D, PART != 1)
            b_s = _capped(_dot_nt(b_q, b_k, BLOCK_M, BLOCK_N, BLOCK_D, GROUPS), scale, softcap)
            b_p = tl.exp2(tl.fma(b_s, scale2, shift[:, None]))
            if PART != 1:
                b_p = tl.where(_visible(n + tl.arange(0, BLOCK_N), first, n_seen, left), b_p, 0.0)
            if softcap is not None:
                b_p = b_p * tl.fma(-b_s, b_s, 1.0)  # the derivative of tanh
            b_dp = _dot_nt(b_g, b_v, BLOCK_M, BLOCK_N, BLOCK_D, GROUPS)
            b_ds = cast(b_p * (b_dp - b_delta[:, None]), p_k.dtype.element_ty)
            acc = _dot_nn(b_ds, b_k, acc, BLOCK_M, BLOCK_D, BLOCK_N, GROUPS)

    _store_rows(p_dq, o_row, acc * scale, m_r, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_pairs", "n_tokens", "left", "right"])
def attention_dkv_kernel(
    p_g,  # [T, HKV * HEADS, D], contiguous
    p_q,  # [T, HKV * HEADS, D]
    p_k,  # [Tk, HKV, D]
    p_v,  # [Tk, HKV, D]
    p_shift,  # fp32 [HKV, T, HEADS]: -lse in base 2
    p_delta,  # fp32 [HKV, T, HEADS]
    p_dk,  # [Tk, HKV, D], contiguous
    p_dv,  # [Tk, HKV, D], contiguous
    p_cu_q,
    p_cu_k,
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
    first_pair, i_n = _own_tile(p_cu_k, n_pairs, HKV, 1, BLOCK_N, GROUPS, DENSE, False)

    pair_n = _pairs(first_pair, BLOCK_N, GROUPS)
    k_start, k_len = _span(p_cu_k, pair_n, n_pairs, HKV)
    _, q_len = _span(p_cu_q, pair_n, n_pairs, HKV)
    o_n = i_n * BLOCK_N + _lanes(BLOCK_N, GROUPS)
    m_n = o_n < k_len
    o_k = (k_start + o_n).to(tl.int64)
    i_h = (pair_n % HKV).to(tl.int64)
    b_k = _load_rows(p_k, o_k * stride_kt + i_h * stride_kh, m_n, D, BLOCK_D, True)
    b_v = _load_rows(p_v, o_k * stride_vt + i_h * stride_vh, m_n, D, BLOCK_D, True)

    # The queries that see each key, and the steps of rows this tile walks: from the first row that sees any key,
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

    pair_r = _pairs(first_pair, BLOCK_R, GROUPS)
    q_start, q_len = _span(p_cu_q, pair_r, n_pairs, HKV)
    lane_r = _lanes(BLOCK_R, GROUPS)
    first_h = ((pair_r % HKV) * HEADS).to(tl.int64)
    p_q += q_start.to(tl.int64) * stride_qt + first_h * stride_qh
    p_g += (q_start.to(tl.int64) * (HKV * HEADS) + first_h) * D
    first_stat = ((pair_r % HKV).to(tl.int64) * n_tokens + q_start) * HEADS

    acc_k = tl.zeros((GROUPS * BLOCK_N, BLOCK_D), dtype=tl.float32)
    acc_v = tl.zeros((GROUPS * BLOCK_N, BLOCK_D), dtype=tl.float32)
    scale2 = _exponent_scale(scale, softcap)
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
            b_q = _load_rows(p_q, o_q, m_r, D, BLOCK_D, PART != 1)
            o_g = _row_offsets(o_r, HKV * HEADS * D, D, HEADS)
            b_g = _load_rows(p_g, o_g, m_r, D, BLOCK_D, PART != 1)
            o_stat = first_stat + o_r
            if PART == 1:
                shift = tl.load(p_shift + o_stat)
                b_delta = tl.load(p_delta + o_stat)
            else:
                shift = tl.load(p_shift + o_stat, mask=m_r, other=0.0)
                b_delta = tl.load(p_delta + o_stat, mask=m_r, other=0.0)

            b_s = _capped(_dot_nt(b_k, b_q, BLOCK_N, BLOCK_R, BLOCK_D, GROUPS), scale, softcap)
            b_p = tl.exp2(tl.fma(b_s, scale2, _across(shift, BLOCK_N, BLOCK_R, GROUPS)))
            o_query = (i * BLOCK_R + tl.arange(0, BLOCK_R)) // HEADS
            if PART == 0:
                b_p = tl.where(first_q[:, None] <= o_query[None, :], b_p, 0.0)
            if left is not None and PART != 1:
                b_p = tl.where(o_query[None, :] < end_q[:, None], b_p, 0.0)
            acc_v = _dot_nn(cast(b_p, p_v.dtype.element_ty), b_g, acc_v, BLOCK_N, BLOCK_D, BLOCK_R, GROUPS)
            if softcap is not None:
                b_p = b_p * tl.fma(-b_s, b_s, 1.0)
            b_dp = _dot_nt(b_v, b_g, BLOCK_N, BLOCK_R, BLOCK_D, GROUPS)
            b_ds = b_p * (b_dp - _across(b_delta, BLOCK_N, BLOCK_R, GROUPS))
            acc_k = _dot_nn(cast(b_ds, p_k.dtype.element_ty), b_q, acc_k, BLOCK_N, BLOCK_D, BLOCK_R, GROUPS)

    o_row = (o_k * HKV + i_h) * D
    _store_rows(p_dk, o_row, acc_k * scale, m_n, D, BLOCK_D)
    _store_rows(p_dv, o_row, acc_v, m_n, D, BLOCK_D)
