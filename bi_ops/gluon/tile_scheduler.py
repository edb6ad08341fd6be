"""Which tile a CTA takes: longest sequences or tiles first (LPT), from an atomic counter where CTAs are persistent.

What starts last should be short, or SMs are idle at the end. Which CTA computes a tile, and when, changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon.aggregate import Scalar, aggregate

#: Sequences of a program of `lpt_order_kernel`, and how many others it compares them with at a time.
ROWS, STEP = 32, 128
#: Tiles of a program of `tile_list_kernel`, and how many sequences it looks at at a time.
TILES = 64


# Where these pointers lie depends on the number of sequences, for which nothing should be compiled anew.
@triton.jit(do_not_specialize=["n_seqs"], do_not_specialize_on_alignment=["p_sequence", "p_counter"])
def lpt_order_kernel(
    p_cu,  # int32 [B + 1]
    p_first,  # int32 [B]: tiles before those of each sequence, longest sequence first
    p_sequence,  # int32 [B]: which sequence that is
    p_counter,  # int32 [1]: becomes 0
    n_seqs,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Each sequence counts those before it: the longer ones, and of equal length those with a lower index."""
    o_i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i = o_i < n_seqs
    length_i = tl.load(p_cu + o_i + 1, mask=m_i, other=0) - tl.load(p_cu + o_i, mask=m_i, other=0)
    rank = tl.zeros((ROWS,), tl.int32)
    first = tl.zeros((ROWS,), tl.int32)
    for j in range(0, n_seqs, STEP):
        o_j = j + tl.arange(0, STEP)
        m_j = o_j < n_seqs
        length_j = tl.load(p_cu + o_j + 1, mask=m_j, other=0) - tl.load(p_cu + o_j, mask=m_j, other=0)
        longer = length_j[None, :] > length_i[:, None]
        as_long = (length_j[None, :] == length_i[:, None]) & (o_j[None, :] < o_i[:, None])
        before = (longer | as_long) & m_j[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
        first += tl.sum(tl.where(before, ((length_j + BLOCK - 1) // BLOCK)[None, :], 0), 1)
    tl.store(p_first + rank, first, mask=m_i)
    tl.store(p_sequence + rank, o_i, mask=m_i)
    tl.store(p_counter, 0, mask=tl.program_id(0) == 0)


def lpt_order(cu_seqlens: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 [2, B]: tiles of `block` tokens before a sequence, its index, longest first; int32 [1]: a counter at 0).

    Args:
        cu_seqlens: int32 [B + 1], B > 0.
    """
    n_seqs = cu_seqlens.shape[0] - 1
    memory = empty(cu_seqlens, 2 * n_seqs + 1)
    first, sequence, counter = memory.split((n_seqs, n_seqs, 1))
    recorded(lpt_order_kernel)[(cdiv(n_seqs, ROWS),)](
        *(cu_seqlens, first, sequence, counter, n_seqs), BLOCK=block, ROWS=ROWS, STEP=STEP, num_warps=4, **PINNED
    )
    return memory[: 2 * n_seqs].view(2, n_seqs), counter


#: Integers of a tile in `tile_list`: its sequence, first query, and where its sequence starts and how long it is, in
#: queries and keys.
RECORD = gl.constexpr(8)


@triton.jit(do_not_specialize=["n_seqs", "n_tiles"])
def tile_list_kernel(
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1], or lengths int32 [B] if PAGED
    p_list,  # int32 [n_tiles, 8], then how many tiles exist, and a counter that becomes 0
    n_seqs,
    n_tiles,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGED: tl.constexpr,
    RECORD: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Each tile counts those before it: with more blocks of keys, or as many in a sequence of a lower index.

    Sequence b has the numbers from (cu[b] - cu[0]) // BLOCK + b on, of which it may leave the last one out.
    """
    o_i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.load(p_cu_q)
    i_b = tl.full((ROWS,), -1, tl.int32)
    exist = tl.zeros((1,), tl.int32)
    for b in range(0, n_seqs, STEP):
        o_b = b + tl.arange(0, STEP)
        m_b = o_b < n_seqs
        begin_b = tl.load(p_cu_q + o_b, mask=m_b, other=0)
        length_b = tl.load(p_cu_q + o_b + 1, mask=m_b, other=0) - begin_b
        first_b = (begin_b - start) // BLOCK + o_b
        i_b += tl.sum(((first_b[None, :] <= o_i[:, None]) & m_b[None, :]).to(tl.int32), 1)
        exist += tl.sum((length_b + BLOCK - 1) // BLOCK, 0)
    q_start = tl.load(p_cu_q + i_b)
    q_len = tl.load(p_cu_q + i_b + 1) - q_start
    k_start = tl.load(p_cu_k + i_b)
    k_len = k_start if PAGED else tl.load(p_cu_k + i_b + 1) - k_start
    tile = o_i - (q_start - start) // BLOCK - i_b
    of_one = (q_len + BLOCK - 1) // BLOCK
    if CAUSAL:
        blocks = (k_len - q_len) // BLOCK + tile
        position = tl.zeros((ROWS,), tl.int32)
    else:
        blocks = k_len
        position = of_one - 1 - tile
    for b in range(0, n_seqs, STEP):
        o_b = b + tl.arange(0, STEP)
        m_b = o_b < n_seqs
        length_b = tl.load(p_cu_q + o_b + 1, mask=m_b, other=0) - tl.load(p_cu_q + o_b, mask=m_b, other=0)
        keys_b = tl.load(p_cu_k + o_b, mask=m_b, other=0)
        if not PAGED:
            keys_b = tl.load(p_cu_k + o_b + 1, mask=m_b, other=0) - keys_b
        tiles_b = ((length_b + BLOCK - 1) // BLOCK)[None, :]
        lower = o_b[None, :] < i_b[:, None]
        if CAUSAL:
            same = blocks[:, None] - ((keys_b - length_b) // BLOCK)[None, :]  # the tile with as many blocks of keys
            before = tiles_b - tl.minimum(tl.maximum(same + 1, 0), tiles_b)
            before += (lower & (same >= 0) & (same < tiles_b)).to(tl.int32)
        else:
            more = (keys_b[None, :] > blocks[:, None]) | ((keys_b[None, :] == blocks[:, None]) & lower)
            before = tl.where(more, tiles_b, 0)
        position += tl.sum(before, 1)
    m_i = (tile < of_one) & (o_i < n_tiles)
    p_record = p_list + position * RECORD
    tl.store(p_record, i_b, mask=m_i)
    tl.store(p_record + 1, tile * BLOCK, mask=m_i)
    tl.store(p_record + 2, q_start, mask=m_i)
    tl.store(p_record + 3, q_len, mask=m_i)
    tl.store(p_record + 4, k_start, mask=m_i)
    tl.store(p_record + 5, k_len, mask=m_i)
    if tl.program_id(0) == 0:
        tl.store(p_list + n_tiles * RECORD + tl.arange(0, 1), exist)
        tl.store(p_list + n_tiles * RECORD + 1, 0)


def tile_list(
    cu_q: torch.Tensor, cu_k: torch.Tensor, n_tiles: int, block: int, causal: bool, paged: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 [8 * n_tiles + 1]: the tiles of `block` queries, most keys first, and their number; int32 [1]: 0).

    Args:
        cu_q: int32 [B + 1], B > 0. cu_k: int32 [B + 1], or lengths int32 [B] if paged. n_tiles: at least
            n_tokens // block + B.
    """
    n_seqs = cu_q.shape[0] - 1
    memory = empty(cu_q, RECORD.value * n_tiles + 2)
    recorded(tile_list_kernel)[(cdiv(n_tiles, TILES),)](
        *(cu_q, cu_k, memory, n_seqs, n_tiles),
        BLOCK=block,
        CAUSAL=causal,
        PAGED=paged,
        RECORD=RECORD.value,
        ROWS=TILES,
        STEP=TILES,
        num_warps=4,
        **PINNED,
    )
    return memory[:-1], memory[-1:]


@gluon.jit
def find_sequence(p_order, i_tile, n_seqs):
    """(sequence, its first tile) of tile `i_tile` in the order of `lpt_order`; past the last tile, the last sequence's.

    A binary search.
    """
    low = n_seqs * 0
    high = n_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(p_order + middle) <= i_tile:
            low = middle
        else:
            high = middle
    return gl.load(p_order + n_seqs + low), gl.load(p_order + low)


@gluon.jit
def first_or_later_tile(p_cu, i, n_tiles, n_seqs, PER_TOKEN: gl.constexpr, BLOCK: gl.constexpr):
    """(sequence, its tile) number `i` of `n_tiles`: the first tile of each sequence, then the later ones, last first.

    A tile has BLOCK rows, a token PER_TOKEN. As `n_tiles` are enough n_seqs + n_tokens * PER_TOKEN // BLOCK, however
    the tokens are split; some then do not exist, and start past their sequence. First tiles need no search: all that
    decoding has. The later ones of sequence b start at (cu[b] - cu[0]) * PER_TOKEN // BLOCK.
    """
    i_b = i
    i_tile = i * 0
    if i >= n_seqs:
        later = n_tiles - 1 - i
        start = gl.load(p_cu)
        low = n_seqs * 0
        high = n_seqs
        while high - low > 1:
            middle = (low + high) // 2
            if (gl.load(p_cu + middle) - start).to(gl.int64) * PER_TOKEN // BLOCK <= later:
                low = middle
            else:
                high = middle
        i_b = low
        before = (gl.load(p_cu + low) - start).to(gl.int64) * PER_TOKEN // BLOCK
        i_tile = later - before.to(gl.int32) + 1
    return i_b, i_tile


@aggregate
class Sequences:
    """Packed sequences of queries and keys, in which order their tiles are taken, and how many there are."""

    cu_q: gl.tensor  # int32 [B + 1]
    cu_k: gl.tensor  # int32 [B + 1], or lengths int32 [B] if paged
    order: gl.tensor  # of `lpt_order` or `tile_list`; not read if the lengths are equal
    counter: gl.tensor  # int32 [1], 0 at the start: tiles taken after each CTA's first
    tile_ids: gl.tensor  # int32 [CTAs, stages of Q]: which tile the Q in each stage belongs to
    n_seqs: Scalar
    n_tiles: Scalar  # of queries, of one head


@aggregate
class QueryTile:
    """A tile of queries of one head: where its sequence starts and how long that is, in queries and keys."""

    sequence: gl.tensor
    head: gl.tensor
    q_start: gl.tensor
    k_start: gl.tensor
    m: gl.tensor  # the tile's first query; q_len where the tile does not exist
    q_len: gl.tensor
    k_len: gl.tensor


@gluon.jit
def get_tile(sequences, i_tile, H: gl.constexpr, BLOCK_M: gl.constexpr, EQUAL: gl.constexpr):
    """The query tile `i_tile`: heads side by side, so that KV heads are shared in L2; longest sequences first,
    of one its tiles with most keys. sequences.order is of `lpt_order`. EQUAL: all sequences have as many queries.
    """
    if EQUAL:
        of_one = sequences.n_tiles // sequences.n_seqs
        i_b = i_tile // H // of_one
        from_last = i_tile // H % of_one
    else:
        i_b, first = find_sequence(sequences.order, i_tile // H, sequences.n_seqs)
        from_last = i_tile // H - first
    q_start = gl.load(sequences.cu_q + i_b)
    q_len = gl.load(sequences.cu_q + i_b + 1) - q_start
    k_start = gl.load(sequences.cu_k + i_b)
    k_len = gl.load(sequences.cu_k + i_b + 1) - k_start
    i_m = (q_len + BLOCK_M - 1) // BLOCK_M - 1 - from_last
    return QueryTile(i_b, i_tile % H, q_start, k_start, gl.where(i_m >= 0, i_m * BLOCK_M, q_len), q_len, k_len)


@gluon.jit
def count_tiles(sequences, EQUAL: gl.constexpr):
    """How many tiles of a head, or of heads packed together, there are in `get_listed_tile`'s order."""
    n_tiles = sequences.n_tiles
    if not EQUAL:
        n_tiles = gl.load(sequences.order + sequences.n_tiles * RECORD)
    return n_tiles


@gluon.jit
def get_listed_tile(
    sequences, i_tile, H: gl.constexpr, BLOCK_M: gl.constexpr, EQUAL: gl.constexpr, PAGED: gl.constexpr
):
    """`get_tile` with the tiles with most keys first, of whichever sequence: sequences.order is of `tile_list`.

    One trip to memory. Past the last tile it is some tile. PAGED: a sequence's keys start at 0 of its own pages.
    """
    i_tile = gl.minimum(i_tile, sequences.n_tiles * H - 1)
    head = i_tile % H
    i = i_tile // H
    if EQUAL:
        i_b = i % sequences.n_seqs
        q_start = gl.load(sequences.cu_q + i_b)
        q_len = gl.load(sequences.cu_q + i_b + 1) - q_start
        k_start = gl.load(sequences.cu_k + i_b)
        if PAGED:
            k_len = k_start
        else:
            k_len = gl.load(sequences.cu_k + i_b + 1) - k_start
        i_m = (q_len + BLOCK_M - 1) // BLOCK_M - 1 - i // sequences.n_seqs
        m = gl.where(i_m >= 0, i_m * BLOCK_M, q_len)
    else:
        p_record = sequences.order + i * RECORD
        i_b = gl.load(p_record)
        m = gl.load(p_record + 1)
        q_start = gl.load(p_record + 2)
        q_len = gl.load(p_record + 3)
        k_start = gl.load(p_record + 4)
        k_len = gl.load(p_record + 5)
    return QueryTile(i_b, head, q_start, k_start, m, q_len, k_len)


@gluon.jit
def key_steps(m, q_len, k_len, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(steps of keys that any of the BLOCK_M queries from `m` on sees, steps that all of them see wholly)"""
    end = k_len
    full = k_len
    if CAUSAL:
        past = k_len - q_len
        end = gl.minimum(gl.maximum(gl.minimum(m + BLOCK_M, q_len) + past, 0), k_len)
        full = gl.minimum(gl.maximum(m + 1 + past, 0), k_len)
    if m >= q_len:
        end = m * 0
    return (end + BLOCK_N - 1) // BLOCK_N, full // BLOCK_N


@gluon.jit
def fetch_add(p_counter):
    """Add 1 to the counter; its value before, in all lanes of the one warp. Without a way through shared memory, which
    `gl.atomic_add` takes."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred %first;
        .reg .b32 %lane;
        mov.u32 %lane, %laneid;
        setp.eq.u32 %first, %lane, 0;
        mov.b32 $0, 0;
        @%first atom.relaxed.gpu.global.add.s32 $0, [$1], 1;
        shfl.sync.idx.b32 $0, $0, 0, 31, -1;
        }""",
        "=&r,l",
        [p_counter],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def cta_pairs(p_cu, p_order, n_seqs, HKV: gl.constexpr, BLOCK: gl.constexpr, EQUAL: gl.constexpr):
    """The (sequence, KV head) pairs among which a CTA's tile of keys is: those of one sequence, or all if EQUAL.

    (first sequence, number of pairs, tiles of each, the CTA's number among theirs)
    """
    if EQUAL:
        i_b = n_seqs * 0
        n_pairs = n_seqs * HKV
        n_tiles = gl.num_programs(0) // n_pairs
        j = gl.program_id(0)
    else:
        i_b, first = find_sequence(p_order, gl.program_id(0) // HKV, n_seqs)
        n_pairs = n_seqs * 0 + HKV
        n_tiles = gl.maximum((gl.load(p_cu + i_b + 1) - gl.load(p_cu + i_b) + BLOCK - 1) // BLOCK, 1)
        j = gl.program_id(0) - first * HKV
    return i_b, n_pairs, n_tiles, j
