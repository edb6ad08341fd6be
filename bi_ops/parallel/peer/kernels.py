"""Kernels that write into other ranks' memory: the sum of partial outputs in the order of a fixed tree, and a gather.

A rank's memory is, in turn: signals, int32 [2, N_RANKS, MAX_PROGRAMS]; what each rank has sent it, 4 bytes each, [2,
N_RANKS, slot]; of a sum the rounded ones, [2, capacity] times 4 bytes, in the dtype of the result. A call uses one of
two halves, and the next call the other: a rank that has met the others in a call knows that they have ended the one
before, so nobody reads the half that it writes to. Ranks write to others and read their own: a store over a link waits
for nothing.

Program i of a rank meets program i of every other rank, and reads of theirs what those have written. The number of the
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
def _count(p_state, call):
    """The last program of a call, which all have read by then, counts it."""
    if tl.atomic_add(p_state + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(p_state + 1, 0)
        tl.store(p_state, call + 1)


@triton.jit
def _pairwise(p_own, slot, o, mask, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of what COUNT ranks from FIRST on have sent, at the offsets: halves first, which are subtrees."""
    if COUNT == 1:
        return tl.load(
            _row(p_own + FIRST * slot, o, BLOCK),
            mask=mask,
            cache_modifier=".cg",  # not in this SM's cache, which does not know what others write
        )
    else:
        left = _pairwise(p_own, slot, o, mask, FIRST, COUNT // 2, BLOCK)
        return left + _pairwise(p_own, slot, o, mask, FIRST + COUNT // 2, COUNT // 2, BLOCK)


@triton.jit(do_not_specialize=["n_fours", "slot", "capacity", "rank"])
def ordered_sum_kernel(
    p_partial,  # fp32 [n]: this rank's
    p_out,  # [n]: the sum
    p_peers,  # int64 [N_RANKS]: pointers to the memory of the ranks
    p_state,  # int32 [2]: calls that have ended, programs of this one that have
    n_fours,  # n / 4, at most 2**28: a mask then says nothing of single elements
    slot,  # elements that a rank can send to another
    capacity,  # elements of a half
    rank,
    N_RANKS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARES: tl.constexpr,  # 1: every rank adds all; N_RANKS: each adds a share, whose rounded sums all gather
    SEND: tl.constexpr,  # which phases run: all of them, but in a test
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    MEET: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    n, slot = n_fours * 4, slot.to(tl.int64)
    call = tl.load(p_state)
    half = (call % 2).to(tl.int64)
    o_sent = 8 * N_RANKS * MAX_PROGRAMS + 4 * half * N_RANKS * slot  # bytes
    o_sum = 8 * N_RANKS * MAX_PROGRAMS + 8 * N_RANKS * slot + 4 * half * capacity
    n_share = tl.cdiv(tl.cdiv(n, BLOCK), SHARES)  # tiles
    o_b = tl.arange(0, BLOCK)
    if SEND:
        for i in range(program, n_share, programs):
            for j in tl.static_range(N_RANKS):
                to = (rank + j) % N_RANKS  # not all to one
                p_theirs = _memory_of(p_peers, to, o_sent, tl.float32) + rank * slot
                o = i * BLOCK + o_b
                if SHARES > 1:
                    o += to * n_share * BLOCK
                b_partial = tl.load(p_partial + o, mask=o < n)
                tl.store(_row(p_theirs, i * BLOCK + o_b, BLOCK), b_partial, mask=o < n)
    if MEET:
        _meet(p_peers, rank, call + 1, 0, N_RANKS, MAX_PROGRAMS)
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    if ADD:
        p_own = _memory_of(p_peers, rank, o_sent, tl.float32)
        for i in range(program, n_share, programs):
            o = i * BLOCK + o_b
            if SHARES > 1:
                o += rank * n_share * BLOCK
            b_sum = cast(_pairwise(p_own, slot, i * BLOCK + o_b, o < n, 0, N_RANKS, BLOCK), DTYPE)
            tl.store(p_out + o, b_sum, mask=o < n)
            if SHARES > 1:
                for j in tl.static_range(1, N_RANKS):
                    p_sum = _memory_of(p_peers, (rank + j) % N_RANKS, o_sum, DTYPE)
                    tl.store(_row(p_sum, o, BLOCK), b_sum, mask=o < n)
    if SHARES > 1:
        if MEET:
            _meet(p_peers, rank, call + 1, 1, N_RANKS, MAX_PROGRAMS)
        if GATHER:
            p_sum = _memory_of(p_peers, rank, o_sum, DTYPE)
            for j in tl.static_range(1, N_RANKS):
                first = (rank + j) % N_RANKS * n_share
                for i in range(program, n_share, programs):
                    o = (first + i) * BLOCK + o_b
                    b_sum = tl.load(_row(p_sum, o, BLOCK), mask=o < n, cache_modifier=".cg")
                    tl.store(p_out + o, b_sum, mask=o < n)
    if MEET:
        _count(p_state, call)


@triton.jit(do_not_specialize=["M", "slot", "rank"])
def gather_kernel(
    p_own,  # int32 [M, K]: this rank's
    p_out,  # int32 [M, N_RANKS * K]: those of all ranks side by side
    p_peers,  # as above
    p_state,
    M,
    K,
    slot,
    rank,
    N_RANKS: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SEND: tl.constexpr,
    MEET: tl.constexpr,
    GATHER: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    slot = slot.to(tl.int64)
    call = tl.load(p_state)
    o_sent = 8 * N_RANKS * MAX_PROGRAMS + 4 * (call % 2).to(tl.int64) * N_RANKS * slot  # bytes
    n_cols = tl.cdiv(K, COLS)
    n_tiles = tl.cdiv(M, ROWS) * n_cols
    if SEND:
        for i in range(program, n_tiles, programs):
            o_r, o_c = i // n_cols * ROWS + tl.arange(0, ROWS)[:, None], i % n_cols * COLS + tl.arange(0, COLS)[None, :]
            m = (o_r < M) & (o_c < K)
            b_own = tl.load(p_own + o_r * K + o_c, mask=m)
            for j in tl.static_range(1, N_RANKS):
                p_theirs = _memory_of(p_peers, (rank + j) % N_RANKS, o_sent, tl.int32) + rank * slot
                tl.store(tl.multiple_of(p_theirs, 16) + o_r * K + o_c, b_own, mask=m)
            tl.store(p_out + o_r * (N_RANKS * K) + rank * K + o_c, b_own, mask=m)
    if MEET:
        _meet(p_peers, rank, call + 1, 0, N_RANKS, MAX_PROGRAMS)
    if GATHER:
        p_sent = _memory_of(p_peers, rank, o_sent, tl.int32)
        for i in range(program, n_tiles, programs):
            o_r, o_c = i // n_cols * ROWS + tl.arange(0, ROWS)[:, None], i % n_cols * COLS + tl.arange(0, COLS)[None, :]
            m = (o_r < M) & (o_c < K)
            for j in tl.static_range(1, N_RANKS):
                of = (rank + j) % N_RANKS
                p_theirs = tl.multiple_of(p_sent + of * slot, 16)
                b_theirs = tl.load(p_theirs + o_r * K + o_c, mask=m, cache_modifier=".cg")
                tl.store(p_out + o_r * (N_RANKS * K) + of * K + o_c, b_theirs, mask=m)
    if MEET:
        _count(p_state, call)
