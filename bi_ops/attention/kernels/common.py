"""What forward and backward share: tile and seqlen info, mask bounds, scores and softmax, and GEMMs pair by pair."""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast, dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def pair_index(first, PER: tl.constexpr, GROUPS: tl.constexpr):
    """The pair that each of GROUPS * PER rows or keys belongs to."""
    if GROUPS == 1:
        return first
    else:
        return first + tl.arange(0, GROUPS * PER) // PER


@triton.jit
def pair_offsets(PER: tl.constexpr, GROUPS: tl.constexpr):
    """The index of each row or key inside its pair."""
    if GROUPS == 1:
        return tl.arange(0, PER)
    else:
        return tl.arange(0, GROUPS * PER) % PER


@triton.jit
def find_tile(p_cu, i_tile, n_seqs, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, tile of it) of tile `i_tile` in a list that holds those of sequence 0, then those of 1, and so on.

    Sequence b starts at (cu[b] - cu[0]) * PER_TOKEN // BLOCK + b, which leaves room for its rows, and at most one tile
    more.
    """
    start = tl.load(p_cu)
    low = n_seqs * 0
    high = n_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(p_cu + middle) - start) * PER_TOKEN // BLOCK + middle <= i_tile:
            low = middle
        else:
            high = middle
    return low, i_tile - ((tl.load(p_cu + low) - start) * PER_TOKEN // BLOCK + low)


@triton.jit
def get_tile(
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
def first_or_later_tile(p_cu, n_pairs, HKV: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """(pair, tile) of this program: the first tile of each pair, then the later ones, last first.

    As `gluon.tile_scheduler.first_or_later_tile`: first tiles, all that decoding has, need no search.
    """
    pair = tl.program_id(0)
    i_tile = pair * 0
    if pair >= n_pairs:
        later = (tl.num_programs(0) - 1 - pair) // HKV
        n_seqs = n_pairs // HKV
        start = tl.load(p_cu)
        i_seq = n_seqs * 0
        end = n_seqs
        while end - i_seq > 1:
            middle = (i_seq + end) // 2
            if (tl.load(p_cu + middle) - start).to(tl.int64) * PER_TOKEN // BLOCK <= later:
                i_seq = middle
            else:
                end = middle
        before = (tl.load(p_cu + i_seq) - start).to(tl.int64) * PER_TOKEN // BLOCK
        i_tile = later - before.to(tl.int32) + 1
        pair = i_seq * HKV + pair % HKV
    return pair, i_tile


@triton.jit
def seqlen_info(p_cu, pair, n_pairs, HKV: tl.constexpr):
    """(start, length) of the sequence that `pair` belongs to; past the last pair the length is 0."""
    i_b = tl.minimum(pair, n_pairs - 1) // HKV
    start = tl.load(p_cu + i_b)
    return start, tl.where(pair < n_pairs, tl.load(p_cu + i_b + 1) - start, 0)


@triton.jit
def clear_outside(p, p_cu, n_seqs, n_tokens, stride_t, stride_n, N: tl.constexpr):
    """Zeros in the rows of p [n_tokens, N] that belong to no sequence. Every program of the grid clears its share.

    They lie before the first sequence and after the last. Where there are none, that takes two loads.
    """
    BLOCK: tl.constexpr = 256
    start = tl.load(p_cu)
    end = tl.load(p_cu + n_seqs)
    i_program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    for i in range(i_program, n_tokens - (end - start), tl.num_programs(0) * tl.num_programs(1)):
        o_t = tl.where(i < start, i, i - start + end).to(tl.int64)
        for n in range(0, N, BLOCK):
            o_n = (n + tl.arange(0, BLOCK)).to(tl.int64)
            zeros = tl.zeros((BLOCK,), dtype=p.dtype.element_ty)
            tl.store(p + o_t * stride_t + o_n * stride_n, zeros, mask=o_n < N)


@triton.jit
def mask_bounds(o_t, q_len, k_len, left, right, CAUSAL: tl.constexpr):
    """(first key that query `o_t` sees, end of those keys); the last query and the last key of a sequence are aligned.

    left, right: how many keys a query sees before and after its own; None: all. CAUSAL: none after.
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
def key_ranges(m_r, first, n_seen, left, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """(begin, inner, full, end): rows see keys from begin to end only, and every row sees all from inner to full.

    From inner to full no mask is needed, and the arithmetic is the same with one. Steps are counted from the start of
    the sequence; steps before begin and after end are skipped, for a row that sees nothing of a step keeps its bits.
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
def visible(o_n, first, n_seen, left):
    """Which of the keys `o_n` [N] each row sees: [R, N]."""
    if left is None:
        return o_n[None, :] < n_seen[:, None]
    else:
        return (o_n[None, :] < n_seen[:, None]) & (o_n[None, :] >= first[:, None])


@triton.jit
def exponent_scale(scale, softcap):
    """The factor that makes an exponent of 2 of what `apply_softcap` returned."""
    if softcap is None:
        return tl.full((), LOG2E, tl.float32) * scale
    else:
        return tl.full((), LOG2E, tl.float32) * softcap


@triton.jit
def apply_softcap(b_s, scale, softcap):
    """b_s, the products of queries and keys; with a softcap tanh(b_s * scale / softcap), to an ulp or two.

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
def add_mask(b_s, scale, p_mask, offsets, m_there):
    """b_s, the products of queries and keys, times `scale`, plus the mask at `offsets`: numbers, or bytes of a bool."""
    b_mask = tl.load(p_mask + offsets, mask=m_there, other=0)
    if p_mask.dtype.element_ty == tl.uint8:
        b_mask = tl.where(b_mask != 0, 0.0, float("-inf"))
    return tl.fma(b_s, tl.full((), 1.0, tl.float32) * scale, b_mask.to(tl.float32))


@triton.jit
def masked_online_softmax(b_s, row_max, row_sum):
    """`online_softmax` of `add_mask`'s scores. The maximum is subtracted before anything is multiplied: two scores of
    -1e30 differ by 0, but times log2(e) by a rounding error that no exponent of 2 holds.
    """
    new_max = tl.maximum(row_max, tl.max(b_s, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_p = tl.exp2((b_s - safe_max[:, None]) * LOG2E)
    rescale = tl.exp2((row_max - safe_max) * LOG2E)
    return b_p, new_max, rescale, tl.fma(row_sum, rescale, tl.sum(b_p, 1))


@triton.jit
def online_softmax(b_s, row_max, row_sum, scale2):
    """(P in fp32, row_max, rescale, row_sum) with a step of scores. `rescale` is for what was summed before.

    `hopper.softmax` has the same operations, for the same bits. Explicit fma: left to the compiler, which additions and
    multiplications are fused could differ from loop to loop.
    """
    new_max = tl.maximum(row_max, tl.max(b_s, 1) * scale2)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    b_p = tl.exp2(tl.fma(b_s, scale2, -safe_max[:, None]))
    rescale = tl.exp2(row_max - safe_max)
    return b_p, new_max, rescale, tl.fma(row_sum, rescale, tl.sum(b_p, 1))


@triton.jit
def load_rows(p, offsets, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
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
def store_rows(p, offsets, x, m_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x [R, BLOCK_D] at `offsets` [R] where `m_rows`, rounded to the dtype of `p`."""
    o_d = tl.arange(0, BLOCK_D)
    mask = m_rows[:, None] & (o_d < D)[None, :]
    tl.store(p + offsets[:, None] + o_d[None, :], cast(x, p.dtype.element_ty), mask=mask)


@triton.jit
def dot_nt(a, b, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr):
    """a @ b.T pair by pair: a [GROUPS * M, K], b [GROUPS * N, K] -> fp32 [GROUPS * M, N]."""
    if GROUPS == 1:
        return dot(a, tl.trans(b), tl.zeros((M, N), dtype=tl.float32))
    else:
        a = tl.reshape(a, (GROUPS, M, K))
        b = tl.permute(tl.reshape(b, (GROUPS, N, K)), (0, 2, 1))
        return tl.reshape(dot(a, b, tl.zeros((GROUPS, M, N), dtype=tl.float32)), (GROUPS * M, N))


@triton.jit
def dot_nn(a, b, acc, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr):
    """acc + a @ b pair by pair: a [GROUPS * M, K], b [GROUPS * K, N], acc [GROUPS * M, N]."""
    if GROUPS == 1:
        return dot(a, b, acc)
    else:
        a = tl.reshape(a, (GROUPS, M, K))
        b = tl.reshape(b, (GROUPS, K, N))
        return tl.reshape(dot(a, b, tl.reshape(acc, (GROUPS, M, N))), (GROUPS * M, N))
