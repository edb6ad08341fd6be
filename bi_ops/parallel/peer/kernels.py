"""The sum over ranks of partial outputs, in the order of a fixed tree, by kernels that read other ranks' memory.

A rank's memory is, in turn: signals, int32 [2, N_RANKS, MAX_PROGRAMS]; partial outputs, fp32 [2, capacity]; rounded
sums, [2, capacity] times 4 bytes, in the dtype of the result. A call uses one of two halves, and the next call the
other: a rank that has met the others in a call knows that they have ended the one before, so nobody reads its half.

Program i of a rank meets program i of every other rank, and reads of them what those have written. The number of the
call lies on the GPU, so that a CUDA graph may be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast


@triton.jit
def _memory_of(p_peers, rank, o_bytes, dtype: tl.constexpr):
    """The memory of a rank from `o_bytes` on as `dtype`."""
    return (tl.load(p_peers + rank) + o_bytes).to(tl.pointer_type(dtype))


@triton.jit
def _row(p, o, BLOCK: tl.constexpr):
    """p + o, of a tile that starts at a multiple of 16 bytes, which a pointer from a table does not say."""
    return tl.max_contiguous(tl.multiple_of(p + o, 16), BLOCK)


@triton.jit
def _meet(p_peers, rank, call, ROW: tl.constexpr, N_RANKS: tl.constexpr, MAX_PROGRAMS: tl.constexpr):
    """Wait for this program of every rank. What theirs have written is visible then."""
    tl.debug_barrier()  # all threads have written
    program = tl.program_id(0)
    for i in tl.static_range(N_RANKS):
        p_theirs = _memory_of(p_peers, i, 0, tl.int32) + (ROW * N_RANKS + rank) * MAX_PROGRAMS + program
        tl.atomic_xchg(p_theirs, call, sem="release", scope="sys")
    p_own = _memory_of(p_peers, rank, 0, tl.int32) + ROW * N_RANKS * MAX_PROGRAMS + program
    for i in tl.static_range(N_RANKS):
        seen = tl.atomic_add(p_own + i * MAX_PROGRAMS, 0, sem="acquire", scope="sys")
        while seen - call < 0:  # of numbers that wrap
            seen = tl.atomic_add(p_own + i * MAX_PROGRAMS, 0, sem="acquire", scope="sys")
    tl.debug_barrier()


@triton.jit
def _pairwise(p_peers, o_bytes, o, mask, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of what COUNT ranks from FIRST on have at the offsets: halves first, which are subtrees."""
    if COUNT == 1:
        return tl.load(
            _row(_memory_of(p_peers, FIRST, o_bytes, tl.float32), o, BLOCK),
            mask=mask,
            cache_modifier=".cg",  # not in this SM's cache, which does not know what others write
        )
    else:
        left = _pairwise(p_peers, o_bytes, o, mask, FIRST, COUNT // 2, BLOCK)
        return left + _pairwise(p_peers, o_bytes, o, mask, FIRST + COUNT // 2, COUNT // 2, BLOCK)


@triton.jit(do_not_specialize=["n_fours", "capacity", "rank"])
def ordered_sum_kernel(
    p_partial,  # fp32 [n]: this rank's
    p_out,  # [n]: the sum
    p_peers,  # int64 [N_RANKS]: pointers to the memory of the ranks
    p_state,  # int32 [2]: calls that have ended, programs of this one that have
    n_fours,  # n / 4, at most 2**28: a mask then says nothing of single elements
    capacity,  # elements of a half
    rank,
    N_RANKS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,  # 1: every rank adds all; N_RANKS: each adds a share, whose rounded sums all gather
    COPY: tl.constexpr,  # which phases run: all of them, but in a test
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    MEET: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    n = n_fours * 4
    call = tl.load(p_state)
    half = (call % 2).to(tl.int64) * capacity
    o_partial = 8 * N_RANKS * MAX_PROGRAMS + 4 * half  # bytes
    o_sum = 8 * N_RANKS * MAX_PROGRAMS + 8 * capacity.to(tl.int64) + 4 * half
    n_share = tl.cdiv(tl.cdiv(n, BLOCK), SHARES)  # tiles
    o_b = tl.arange(0, BLOCK)
    if COPY:
        p_own = _memory_of(p_peers, rank, o_partial, tl.float32)
        for i in range(program, n_share, programs):
            for share in tl.static_range(SHARES):
                o = (share * n_share + i) * BLOCK + o_b
                tl.store(_row(p_own, o, BLOCK), tl.load(p_partial + o, mask=o < n), mask=o < n)
    if MEET:
        _meet(p_peers, rank, call + 1, 0, N_RANKS, MAX_PROGRAMS)
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    if ADD:
        first = 0
        if SHARES > 1:
            first = rank * n_share
        for i in range(program, n_share, programs):
            o = (first + i) * BLOCK + o_b
            b_sum = cast(_pairwise(p_peers, o_partial, o, o < n, 0, N_RANKS, BLOCK), DTYPE)
            if SHARES > 1:
                p_sum = _memory_of(p_peers, rank, o_sum, DTYPE)
                tl.store(_row(p_sum, i * BLOCK + o_b, BLOCK), b_sum)
            else:
                tl.store(p_out + o, b_sum, mask=o < n)
    if SHARES > 1:
        if MEET:
            _meet(p_peers, rank, call + 1, 1, N_RANKS, MAX_PROGRAMS)
        if GATHER:
            for share in tl.static_range(SHARES):
                p_sum = _memory_of(p_peers, share, o_sum, DTYPE)
                for i in range(program, n_share, programs):
                    o = (share * n_share + i) * BLOCK + o_b
                    b_sum = tl.load(_row(p_sum, i * BLOCK + o_b, BLOCK), cache_modifier=".cg")
                    tl.store(p_out + o, b_sum, mask=o < n)
    if MEET:
        # The last program of a call, which all have read by then, counts it.
        if tl.atomic_add(p_state + 1, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(p_state + 1, 0)
            tl.store(p_state, call + 1)
