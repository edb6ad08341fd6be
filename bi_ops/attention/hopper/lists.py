"""Which tile of which sequence a program of the Hopper kernels takes: the longest sequence's first.

What is begun last should be short, or multiprocessors are idle at the end. The order of programs is a schedule: it
changes no bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bi_ops.core.integers import cdiv

#: Sequences of a program, and how many others it compares them with at a time.
ROWS, STEP = 32, 128


# Where these lie depends on the number of sequences, for which nothing should be compiled anew.
@triton.jit(do_not_specialize=["n_seqs"], do_not_specialize_on_alignment=["p_sequence", "p_count"])
def by_length_kernel(
    p_cu,  # int32 [B + 1]
    p_first,  # int32 [B]: tiles before those of the sequence that is as long as so many others, ascending
    p_sequence,  # int32 [B]: which sequence that is
    p_count,  # int32 [1]: 0
    n_seqs,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Every sequence counts those before it: longer ones, and of those as long the ones with a lower index."""
    o_i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_i = o_i < n_seqs
    length_i = tl.load(p_cu + o_i + 1, mask=m_i, other=0) - tl.load(p_cu + o_i, mask=m_i, other=0)
    place = tl.zeros((ROWS,), tl.int32)
    first = tl.zeros((ROWS,), tl.int32)
    for j in range(0, n_seqs, STEP):
        o_j = j + tl.arange(0, STEP)
        m_j = o_j < n_seqs
        length_j = tl.load(p_cu + o_j + 1, mask=m_j, other=0) - tl.load(p_cu + o_j, mask=m_j, other=0)
        longer = length_j[None, :] > length_i[:, None]
        as_long = (length_j[None, :] == length_i[:, None]) & (o_j[None, :] < o_i[:, None])
        before = (longer | as_long) & m_j[None, :]
        place += tl.sum(before.to(tl.int32), 1)
        first += tl.sum(tl.where(before, ((length_j + BLOCK - 1) // BLOCK)[None, :], 0), 1)
    tl.store(p_first + place, first, mask=m_i)
    tl.store(p_sequence + place, o_i, mask=m_i)
    tl.store(p_count, 0, mask=tl.program_id(0) == 0)


def by_length(cu_seqlens: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [2, B]: (tiles of `block` tokens before it, sequence), longest sequence first; and int32 [1]: 0, to count.

    Args:
        cu_seqlens: int32 [B + 1], B > 0.
    """
    n_seqs = cu_seqlens.shape[0] - 1
    numbers = cu_seqlens.new_empty(2 * n_seqs + 1)
    first, sequence, count = numbers.split((n_seqs, n_seqs, 1))
    by_length_kernel[(cdiv(n_seqs, ROWS),)](
        *(cu_seqlens, first, sequence, count, n_seqs), BLOCK=block, ROWS=ROWS, STEP=STEP, num_warps=4
    )
    return numbers[: 2 * n_seqs].view(2, n_seqs), count


@gluon.jit
def find_sequence(p_lists, i_tile, n_seqs):
    """(sequence, its first tile) of tile `i_tile` in the lists of `by_length`; past the last tile, the last ones."""
    low = n_seqs * 0
    high = n_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(p_lists + middle) <= i_tile:
            low = middle
        else:
            high = middle
    return gl.load(p_lists + n_seqs + low), gl.load(p_lists + low)


@gluon.jit
def tile_of(
    p_cu_q,
    p_cu_k,
    p_lists,
    i_item,
    n_seqs,
    n_tiles,
    H: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EQUAL: gl.constexpr,
):
    """What item `i_item` of the work is: a tile of queries of one head. Tiles with most keys come first.

    (head, start of the queries, of the keys, first query, queries, keys)
    """
    if EQUAL:
        of_one = n_tiles // n_seqs
        i_b = i_item // H // of_one
        from_last = i_item // H % of_one
    else:
        i_b, first = find_sequence(p_lists, i_item // H, n_seqs)
        from_last = i_item // H - first
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    k_start = gl.load(p_cu_k + i_b)
    k_len = gl.load(p_cu_k + i_b + 1) - k_start
    i_m = (q_len + BLOCK_M - 1) // BLOCK_M - 1 - from_last
    return i_item % H, q_start, k_start, gl.where(i_m >= 0, i_m * BLOCK_M, q_len), q_len, k_len


@gluon.jit
def steps_of(m, q_len, k_len, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(steps that any of the BLOCK_M queries from `m` on sees, steps that all of them see wholly)"""
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
def take(p_count):
    """Add 1 to `p_count`; what it was, in all lanes of the one warp. `gl.atomic_add` would go through shared memory."""
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
        [p_count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def pairs_of_program(p_cu, p_lists, n_seqs, HKV: gl.constexpr, BLOCK: gl.constexpr, EQUAL: gl.constexpr):
    """The pairs of a sequence and a key head among which a program's tile is: those of one sequence, or all if EQUAL.

    (first sequence, how many pairs, tiles of each, the program's number among theirs)
    """
    if EQUAL:
        i_b = n_seqs * 0
        n_pairs = n_seqs * HKV
        n_tiles = gl.num_programs(0) // n_pairs
        j = gl.program_id(0)
    else:
        i_b, first = find_sequence(p_lists, gl.program_id(0) // HKV, n_seqs)
        n_pairs = n_seqs * 0 + HKV
        n_tiles = gl.maximum((gl.load(p_cu + i_b + 1) - gl.load(p_cu + i_b) + BLOCK - 1) // BLOCK, 1)
        j = gl.program_id(0) - first * HKV
    return i_b, n_pairs, n_tiles, j
