"""Attention's backward on Hopper in one pass: five products per tile, warp-specialised, written in Gluon.

One program owns a tile of keys and sums their dK and dV in registers while it walks the queries that see them. Its
part of dQ goes through shared memory to a warp that adds it to memory when its turn has come: a tile of dQ takes the
tiles of keys front to back, so who adds, and when, follows from a sequence's own lengths. The last one closes the sum.

    loader   1 warp       copies Q and dO of the next step, with the two numbers per row, into a ring of shared memory
    products 2 x 4 warps  64 keys each: S, dP, dV, dK, with the exponentials between them. What a team leaves of dS in
                          shared memory is for both: each takes half the columns of dQ, two steps later, so that one
                          may run most of a step ahead and hand its products over while the other takes exponentials
    writers  2 x 1 warp   every second step each: wait for the turn at a tile of dQ, add both halves, pass the turn on.
                          That takes longer than a step: polled, added, complete and published are four trips to L2
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bi_ops.attention.config import BackwardConfig, check_order
from bi_ops.attention.hopper.descriptors import layout, rows
from bi_ops.attention.hopper.lists import by_length, pairs_of_program
from bi_ops.attention.hopper.parts import LOG2E, clear_rows
from bi_ops.attention.kernels.parts import find_tile
from bi_ops.attention.order import OnePass
from bi_ops.core.integers import cdiv
from bi_ops.core.turns import end_turn, wait_turn

TEAMS = gl.constexpr(2)
KEYS = gl.constexpr(64)  # of a team: what four warps hold of a product
LATER = gl.constexpr(2)  # steps between dS and its dQ; tiles of dS and of dQ in shared memory; writers


@builtin
def _copy_add(descriptor, coord, src, _semantic=None):
    """Global memory += a tile in shared memory, by the copy engine. As `tma.async_copy_shared_to_global`."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coord, src.handle)


@gluon.jit
def _load(descriptors, tiles, bars, place, HEADS: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr):
    d_q, d_g, d_k, d_v, d_shift, d_delta = descriptors
    s_q, s_g, s_k, s_v, _, _, s_shift, s_delta = tiles
    bar_q, bar_g, bar_free, bar_kv, _, _, _, _ = bars
    q_start, _, n_tiles, first_tile, k_row, _, i_h, _, first, _, end, _ = place
    STAGES: gl.constexpr = s_q.shape[0]
    mbarrier.expect(bar_kv, d_k.block_type.nbytes + d_v.block_type.nbytes)
    tma.async_copy_global_to_shared(d_k, [k_row, i_h * D], bar_kv, s_k.index(0))
    tma.async_copy_global_to_shared(d_v, [k_row, i_h * D], bar_kv, s_v.index(0))
    for step in range(0, (end - first) * HEADS):
        i_m = end - 1 - step // HEADS
        row = q_start + i_m * BLOCK_M
        head = i_h * HEADS + step % HEADS
        stat = (head * n_tiles + first_tile + i_m) * BLOCK_M
        i = step % STAGES
        mbarrier.wait(bar_free.index(i), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar_q.index(i), d_q.block_type.nbytes + d_shift.block_type.nbytes)
        tma.async_copy_global_to_shared(d_q, [row, head * D], bar_q.index(i), s_q.index(i))
        tma.async_copy_global_to_shared(d_shift, [stat], bar_q.index(i), s_shift.index(i))
        mbarrier.expect(bar_g.index(i), d_g.block_type.nbytes + d_delta.block_type.nbytes)
        tma.async_copy_global_to_shared(d_g, [row, head * D], bar_g.index(i), s_g.index(i))
        tma.async_copy_global_to_shared(d_delta, [stat], bar_g.index(i), s_delta.index(i))


@gluon.jit
def _write(d_sum, p_turns, tiles, bars, place, WRITER: gl.constexpr, HEADS: gl.constexpr):
    """Serves every second step: adds dQ of both teams to memory, or brings the sums that the step closes."""
    _, _, _, _, _, s_dq, _, _ = tiles
    _, _, _, _, _, _, bar_dq, bar_dq_ready = bars
    _, _, n_tiles, first_tile, _, _, i_h, i_n, first, _, end, open_steps = place
    ROWS: gl.constexpr = s_dq.shape[1]
    n_steps = (end - first) * HEADS
    seen = n_steps * 0 - 1
    if open_steps > WRITER:
        for team in gl.static_range(TEAMS):
            mbarrier.arrive(bar_dq_ready.index(team * LATER + WRITER))
    for step in range(WRITER, n_steps, LATER):
        tile = (i_h * HEADS + step % HEADS) * n_tiles + first_tile + end - 1 - step // HEADS
        if step < open_steps:
            if seen != i_n:
                wait_turn(p_turns + tile, i_n)
            for team in gl.static_range(TEAMS):
                i = team * LATER + WRITER
                mbarrier.wait(bar_dq.index(i), step // LATER & 1)
                if i_n == 0:
                    tma.async_copy_shared_to_global(d_sum, [(tile * TEAMS + team) * ROWS, 0], s_dq.index(i))
                else:
                    _copy_add(d_sum, [(tile * TEAMS + team) * ROWS, 0], s_dq.index(i))
            tma.store_wait(0)
            if step + LATER < open_steps:
                for team in gl.static_range(TEAMS):
                    mbarrier.arrive(bar_dq_ready.index(team * LATER + WRITER))
            after = gl.minimum(step + LATER, n_steps - 1)
            next_tile = (i_h * HEADS + after % HEADS) * n_tiles + first_tile + end - 1 - after // HEADS
            seen = end_turn(p_turns + tile, p_turns + next_tile)
        else:
            if i_n > 0:
                wait_turn(p_turns + tile, i_n)
            for team in gl.static_range(TEAMS):
                i = team * LATER + WRITER
                if step - LATER >= open_steps:
                    mbarrier.wait(bar_dq.index(i), (step - LATER) // LATER & 1)
                if i_n == 0:
                    mbarrier.arrive(bar_dq_ready.index(i))
                else:
                    mbarrier.expect(bar_dq_ready.index(i), d_sum.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        d_sum, [(tile * TEAMS + team) * ROWS, 0], bar_dq_ready.index(i), s_dq.index(i)
                    )


@gluon.jit
def _zero(step):
    """0, in a way that keeps the compiler from computing every descriptor of a tile ahead of the loop, and spilling."""
    return step >> 30


@gluon.jit
def _begin(step, tiles, bars, n_valid, BLOCK_M: gl.constexpr, D: gl.constexpr):
    """Wait for the rows of a step, and clear those past the end of the sequence: (q, g, shift, delta)."""
    s_q, s_g, _, _, _, _, s_shift, s_delta = tiles
    bar_q, bar_g, _, _, _, _, _, _ = bars
    STAGES: gl.constexpr = s_q.shape[0]
    i = step % STAGES
    q, g = s_q.index(i), s_g.index(i)
    mbarrier.wait(bar_q.index(i), step // STAGES & 1)
    if n_valid < BLOCK_M:
        mbarrier.wait(bar_g.index(i), step // STAGES & 1)
        clear_rows(q, n_valid, 4)
        clear_rows(g, n_valid, 4)
        fence_async_shared()
    return q, g, s_shift.index(i), s_delta.index(i)


@gluon.jit
def _begin_dq(step, tiles, bars, zeros_q, TEAM: gl.constexpr):
    """Hand a team's half of dQ of a step to the tensor cores."""
    _, _, s_k, _, s_ds, _, _, _ = tiles
    _, _, _, _, bar_ds, _, _, _ = bars
    COLS: gl.constexpr = zeros_q.shape[1]
    mbarrier.wait(bar_ds.index(step % LATER), step // LATER & 1)
    k = s_k.index(_zero(step)).slice(TEAM * COLS, COLS, 1)
    return warpgroup_mma(s_ds.index(step % LATER).permute((1, 0)), k, zeros_q, use_acc=False, is_async=True)


@gluon.jit
def _begin_s(step, tiles, q, zeros, TEAM: gl.constexpr):
    _, _, s_k, _, _, _, _, _ = tiles
    k = s_k.index(_zero(step)).slice(TEAM * KEYS, KEYS)
    return warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _finish(
    b_s,
    acc_k,
    acc_v,
    step,
    tiles,
    bars,
    rows_of_step,
    scale2,
    first_q,
    o_q,
    zeros,
    TEAM: gl.constexpr,
    MASKED: gl.constexpr,
):
    """S, in flight, to dS in shared memory, dV and dK. Nothing is in flight afterwards."""
    s_q, _, _, s_v, s_ds, _, _, _ = tiles
    _, bar_g, bar_free, _, bar_ds, bar_ds_free, _, _ = bars
    q, g, shift, delta = rows_of_step
    STAGES: gl.constexpr = s_q.shape[0]
    l_s: gl.constexpr = zeros.type.layout
    l_p: gl.constexpr = gl.DotOperandLayout(0, acc_v.type.layout, 2)
    b_shift = shift.load(gl.SliceLayout(0, l_s))
    mbarrier.wait(bar_g.index(step % STAGES), step // STAGES & 1)
    v = s_v.index(_zero(step)).slice(TEAM * KEYS, KEYS)
    b_dp = warpgroup_mma(v, g.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(b_shift[None, :], b_s)[0]))
    if MASKED:
        b_p = gl.where(first_q[:, None] <= o_q[None, :], b_p, 0.0)
    b_pt = gl.convert_layout(b_p.to(g.dtype), l_p)
    acc_v = warpgroup_mma(b_pt, g, acc_v, is_async=True)
    b_delta = delta.load(gl.SliceLayout(0, l_s))
    b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(g.dtype)
    acc_k = warpgroup_mma(gl.convert_layout(b_ds, l_p), q, acc_k, is_async=True)
    mbarrier.wait(bar_ds_free.index(step % LATER), (step // LATER & 1) ^ 1)
    s_ds.index(step % LATER).slice(TEAM * KEYS, KEYS).store(b_ds)
    fence_async_shared()
    mbarrier.arrive(bar_ds.index(step % LATER))
    acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
    mbarrier.arrive(bar_free.index(step % STAGES))
    return acc_k, acc_v


@gluon.jit
def _by_thread(x):
    """A product [64, COLS] in the order in which threads hold it, four values each: stored without bank conflicts."""
    COLS: gl.constexpr = x.shape[1]
    x = gl.permute(x.reshape([4, 2, 8, COLS // 16, 2, 4, 2]), (3, 1, 0, 2, 5, 4, 6))
    return x.reshape([COLS // 4, 256])


@gluon.jit
def _by_row(x, COLS: gl.constexpr):
    """What `_by_thread` was given."""
    x = gl.permute(x.reshape([COLS // 16, 2, 4, 8, 4, 2, 2]), (2, 1, 3, 0, 5, 4, 6))
    return x.reshape([64, COLS])


@gluon.jit
def _hand_over(b_dq, step, tiles, bars, TEAM: gl.constexpr):
    """Leave a part of dQ to the writer."""
    _, _, _, _, _, s_dq, _, _ = tiles
    _, _, _, _, _, bar_ds_free, bar_dq, bar_dq_ready = bars
    i = TEAM * LATER + step % LATER
    mbarrier.wait(bar_dq_ready.index(i), step // LATER & 1)
    s_dq.index(i).store(_by_thread(b_dq))
    fence_async_shared()
    mbarrier.arrive(bar_dq.index(i))
    mbarrier.arrive(bar_ds_free.index(step % LATER))


@gluon.jit
def _close(
    p_dq,
    b_dq,
    step,
    tiles,
    bars,
    place,
    scale,
    TEAM: gl.constexpr,
    HKV: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
):
    """Add the last part of a tile of dQ to those before it, which the writer has brought, and round."""
    q_start, q_len, _, _, _, _, i_h, i_n, _, _, end, _ = place
    _, _, _, _, _, s_dq, _, _ = tiles
    _, _, _, _, _, bar_ds_free, bar_dq, bar_dq_ready = bars
    ROWS: gl.constexpr = b_dq.shape[0]
    COLS: gl.constexpr = b_dq.shape[1]
    l_dq: gl.constexpr = b_dq.type.layout
    i = TEAM * LATER + step % LATER
    mbarrier.wait(bar_dq_ready.index(i), step // LATER & 1)
    b_last = _by_thread(b_dq)
    b_sum = s_dq.index(i).load(b_last.type.layout)
    mbarrier.arrive(bar_dq.index(i))
    mbarrier.arrive(bar_ds_free.index(step % LATER))
    # With no tile of keys before this one, nothing was brought.
    b_sum = gl.convert_layout(_by_row(gl.where(i_n > 0, b_sum + b_last, b_last), COLS), l_dq, assert_trivial=True)
    row = (end - 1 - step // HEADS) * ROWS
    p_tile = p_dq + ((q_start + row).to(gl.int64) * HKV * HEADS + i_h * HEADS + step % HEADS) * D + TEAM * COLS
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, l_dq))
    o_d = gl.arange(0, COLS, gl.SliceLayout(0, l_dq))
    mask = (row + o_r < q_len)[:, None]
    gl.store(p_tile + o_r[:, None] * (HKV * HEADS * D) + o_d[None, :], (b_sum * scale).to(p_dq.dtype.element_ty), mask)


@gluon.jit
def _products(
    memory,
    tiles,
    bars,
    place,
    scale,
    shift_q,
    TEAM: gl.constexpr,
    HKV: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    p_dq, p_dk, p_dv = memory
    _, _, s_k, s_v, _, _, _, _ = tiles
    _, _, _, bar_kv, _, _, _, _ = bars
    _, q_len, _, _, k_row, n_keys, i_h, _, first, full, end, open_steps = place
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    l_kv: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    l_dq: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D // TEAMS, 16])
    scale2 = LOG2E * scale
    zeros = gl.zeros((KEYS, BLOCK_M), gl.float32, l_s)
    zeros_q = gl.zeros((BLOCK_M, D // TEAMS), gl.float32, l_dq)
    acc_k = gl.zeros((KEYS, D), gl.float32, l_kv)
    acc_v = gl.zeros((KEYS, D), gl.float32, l_kv)
    # The first query that sees each key; past the last key there is none.
    o_n = TEAM * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, l_s))
    first_q = o_n * 0
    if CAUSAL:
        first_q = o_n + shift_q
    first_q = gl.where(o_n < n_keys, first_q, 2147483647)
    o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, l_s))

    mbarrier.wait(bar_kv, 0)
    if n_keys < BLOCK_N:
        clear_rows(s_k.index(0), n_keys, 4)
        clear_rows(s_v.index(0), n_keys, 4)
        fence_async_shared()
    n_steps = (end - first) * HEADS
    for i in gl.static_range(LATER):
        if n_steps > i:
            m = end - 1 - i // HEADS
            rows_of_step = _begin(i, tiles, bars, q_len - m * BLOCK_M, BLOCK_M, D)
            b_s = _begin_s(n_steps * 0 + i, tiles, rows_of_step[0], zeros, TEAM)
            o_q = m * BLOCK_M + o_m
            acc_k, acc_v = _finish(
                b_s, acc_k, acc_v, i, tiles, bars, rows_of_step, scale2, first_q, o_q, zeros, TEAM, True
            )
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + LATER
            stop = (end - full) * HEADS
        else:
            begin = gl.maximum((end - full) * HEADS, LATER)
            stop = n_steps
        for step in range(begin, stop):
            m = end - 1 - step // HEADS
            rows_of_step = _begin(step, tiles, bars, q_len - m * BLOCK_M, BLOCK_M, D)
            b_dq = _begin_dq(step - LATER, tiles, bars, zeros_q, TEAM)
            b_s = _begin_s(step, tiles, rows_of_step[0], zeros, TEAM)
            b_dq = warpgroup_mma_wait(1, deps=(b_dq,))
            if MASKED and step - LATER >= open_steps:
                _close(p_dq, b_dq, step - LATER, tiles, bars, place, scale, TEAM, HKV, HEADS, D)
            else:
                _hand_over(b_dq, step - LATER, tiles, bars, TEAM)
            o_q = m * BLOCK_M + o_m
            acc_k, acc_v = _finish(
                b_s, acc_k, acc_v, step, tiles, bars, rows_of_step, scale2, first_q, o_q, zeros, TEAM, MASKED
            )
    for step in range(gl.maximum(n_steps - LATER, 0), n_steps):
        b_dq = warpgroup_mma_wait(0, deps=(_begin_dq(step, tiles, bars, zeros_q, TEAM),))
        if step >= open_steps:
            _close(p_dq, b_dq, step, tiles, bars, place, scale, TEAM, HKV, HEADS, D)
        else:
            _hand_over(b_dq, step, tiles, bars, TEAM)
    o_k = (k_row + TEAM * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, l_kv))).to(gl.int64)
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_kv))
    o_out = ((o_k * HKV + i_h) * D)[:, None] + o_d[None, :]
    m_k = (TEAM * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, l_kv)) < n_keys)[:, None]
    gl.store(p_dv + o_out, acc_v.to(s_k.dtype), mask=m_k)
    gl.store(p_dk + o_out, (acc_k * scale).to(s_k.dtype), mask=m_k)


@gluon.jit(do_not_specialize=["n_seqs", "together", "last", "n_tiles"])
def attention_backward_kernel(
    d_q,  # [T, HKV * HEADS * D], tiles [BLOCK_M, D]
    d_g,  # as d_q
    d_k,  # [Tk, HKV * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    d_shift,  # fp32 [HKV * HEADS * n_tiles * BLOCK_M], tiles [BLOCK_M]: -lse in base 2
    d_delta,  # as d_shift: row sums of dO * O
    d_sum,  # fp32 [HKV * HEADS * n_tiles * D / 4, 256], a team's tiles [D / 8, 256] as `_by_thread`: sums of dQ / scale
    p_turns,  # int32 zeros [HKV * HEADS, n_tiles]: how many have added to a tile of dQ
    p_dq,  # [T, HKV * HEADS, D], contiguous; tiles of queries that see no key are not written
    p_dk,  # [Tk, HKV, D], contiguous
    p_dv,  # as p_dk
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_lists,  # int32 [2, B]: as `by_length` makes them; not read if EQUAL
    scale,  # softmax_scale
    n_seqs,
    together,
    last,  # a multiple of `together`; only if EQUAL
    n_tiles,  # of queries: T // BLOCK_M + B; those of a sequence lie as `find_tile` says
    HKV: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,  # every sequence is as long
):
    # Whoever is waited for has a lower program id, so it runs or is done: no deadlock on any number of SMs.
    # `together` pairs of a sequence and a key head at a time: a tile of dQ is in L2 while its turns are near. From pair
    # `last` on all are side by side: then what is begun at the end is short, and the SMs are done at the same time.
    i_b, n_pairs, n_of_pair, j = pairs_of_program(p_cu_k, p_lists, n_seqs, HKV, BLOCK_N, EQUAL)
    if not EQUAL:
        last = (HKV - 1) // together * together  # what comes after a last pair's tiles is a tile that does not exist
    i = gl.minimum(j // (n_of_pair * together) * together, last)
    width = gl.where(i < last, gl.minimum(together, n_pairs - i), n_pairs - last)
    j -= i * n_of_pair
    i_n = j // width
    i_b += (i + j % width) // HKV
    i_h = (i + j % width) % HKV
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    k_start = gl.load(p_cu_k + i_b)
    k_len = gl.load(p_cu_k + i_b + 1) - k_start
    n_keys = k_len - i_n * BLOCK_N
    k_row = k_start + i_n * BLOCK_N
    # Tiles of queries this tile of keys is seen by, those from `full` on wholly.
    # A program whose tile does not exist walks none; it must not return, the warps of all parts end together.
    end = gl.where(n_keys > 0, (q_len + BLOCK_M - 1) // BLOCK_M, 0)
    first = end * 0
    full = end * 0
    seen = i_n * BLOCK_N - (k_len - q_len)  # the first query that sees the first of these keys
    if CAUSAL:
        first = gl.minimum(gl.maximum(seen, 0) // BLOCK_M, end)
        full = gl.minimum((gl.maximum(seen + BLOCK_N - 1, 0) + BLOCK_M - 1) // BLOCK_M, end)
    # From `open` on no later tile of keys sees them: the sums of dQ are closed here.
    open = full
    if CAUSAL:
        open = gl.minimum(gl.maximum(seen + BLOCK_N, 0) // BLOCK_M, end)
    if n_keys <= BLOCK_N:
        full = end
        open = end

    DTYPE: gl.constexpr = d_q.dtype
    s_k = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_k.layout)
    s_v = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    s_q = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, D], d_q.layout)
    s_g = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, D], d_g.layout)
    s_ds = gl.allocate_shared_memory(DTYPE, [LATER, BLOCK_N, BLOCK_M], gl.NVMMASharedLayout(128, 16, 2))
    s_dq = gl.allocate_shared_memory(gl.float32, [TEAMS * LATER, D // 8, 256], d_sum.layout)
    s_shift = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], d_shift.layout)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], d_delta.layout)
    bar_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_ds = gl.allocate_shared_memory(gl.int64, [LATER, 1], mbarrier.MBarrierLayout())
    bar_ds_free = gl.allocate_shared_memory(gl.int64, [LATER, 1], mbarrier.MBarrierLayout())
    bar_dq = gl.allocate_shared_memory(gl.int64, [TEAMS * LATER, 1], mbarrier.MBarrierLayout())
    bar_dq_ready = gl.allocate_shared_memory(gl.int64, [TEAMS * LATER, 1], mbarrier.MBarrierLayout())
    bar_kv = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bar_q.index(i), count=1)
        mbarrier.init(bar_g.index(i), count=1)
        mbarrier.init(bar_free.index(i), count=TEAMS)
    for i in gl.static_range(LATER):
        mbarrier.init(bar_ds.index(i), count=TEAMS)
        mbarrier.init(bar_ds_free.index(i), count=TEAMS)
    for i in gl.static_range(TEAMS * LATER):
        mbarrier.init(bar_dq.index(i), count=1)
        mbarrier.init(bar_dq_ready.index(i), count=1)
    mbarrier.init(bar_kv, count=1)
    fence_async_shared()

    memory = (p_dq, p_dk, p_dv)
    tiles = (s_q, s_g, s_k, s_v, s_ds, s_dq, s_shift, s_delta)
    bars = (bar_q, bar_g, bar_free, bar_kv, bar_ds, bar_ds_free, bar_dq, bar_dq_ready)
    first_tile = q_start // BLOCK_M + i_b
    place = (q_start, q_len, n_tiles, first_tile, k_row, n_keys, i_h, i_n, first, full, end, (end - open) * HEADS)
    descriptors = (d_q, d_g, d_k, d_v, d_shift, d_delta)
    gl.warp_specialize(
        [
            (_products, (memory, tiles, bars, place, scale, seen, 0, HKV, HEADS, BLOCK_M, BLOCK_N, D, CAUSAL)),
            (_products, (memory, tiles, bars, place, scale, seen, 1, HKV, HEADS, BLOCK_M, BLOCK_N, D, CAUSAL)),
            (_load, (descriptors, tiles, bars, place, HEADS, BLOCK_M, D)),
            (_write, (d_sum, p_turns, tiles, bars, place, 0, HEADS)),
            (_write, (d_sum, p_turns, tiles, bars, place, 1, HEADS)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )


@triton.jit(do_not_specialize=["n_tokens", "n_seqs", "n_tiles"])
def _prepare_kernel(
    p_g,  # [T, H, D], contiguous
    p_out,  # [T, H, D], contiguous
    p_lse,  # fp32 [H, T]
    p_g_lse,  # fp32 [H, T] or None
    p_shift,  # fp32 [H, n_tiles, BLOCK_M]: -lse in base 2; 0 past the end of a sequence
    p_delta,  # as p_shift: row sums of dO * O, less the gradient of the lse
    p_turns,  # int32 [H, n_tiles]: zeros
    p_dq,  # [T, H, D], contiguous: zeros where no key is seen by a whole tile, which no program will write
    p_cu_q,
    p_cu_k,
    n_tokens,
    n_seqs,
    n_tiles,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    # Heads of a tile side by side: together they read whole rows of memory.
    i_tile = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_b, i_m = find_tile(p_cu_q, i_tile, n_seqs, 1, BLOCK_M)  # past a sequence's last tile are no rows
    start = tl.load(p_cu_q + i_b)
    q_len = tl.load(p_cu_q + i_b + 1) - start
    k_len = tl.load(p_cu_k + i_b + 1) - tl.load(p_cu_k + i_b)
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
    tile = i_h.to(tl.int64) * n_tiles + i_tile
    o_stat = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(p_shift + o_stat, -(lse * 1.4426950408889634))
    tl.store(p_delta + o_stat, b_delta)
    tl.store(p_turns + tile, 0)
    unseen = k_len == 0
    if CAUSAL:
        unseen = unseen | ((i_m + 1) * BLOCK_M <= q_len - k_len)
    if unseen:
        tl.store(p_dq + o_x, tl.zeros_like(b_g).to(p_dq.dtype.element_ty), mask=m_t[:, None])


def _numbers(t: torch.Tensor, block: int) -> TensorDescriptor:
    return TensorDescriptor(t, [t.numel()], [1], [block], layout(0, 32, 1))


def launch(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    g_lse: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_k: int,
    causal: bool,
    scale: float,
    order: OnePass,
    config: BackwardConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, of packed sequences.

    Args:
        g, out: [T, Hq, D], contiguous, bf16 or fp16, D 64 or 128, T > 0. q: likewise, any strides. k, v: [Tk, Hkv, D],
            Tk > 0. lse, g_lse: fp32 [Hq, T]. cu_q, cu_k: int32 [B + 1], B > 0. max_k: at least the most keys of one.

    Raises:
        ValueError: an order of other tiles than this kernel's.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), (n_keys, hkv, _) = q.shape, k.shape
    n_seqs = cu_q.shape[0] - 1
    n_tiles = n_tokens // order.block_m + n_seqs
    numbers = (hq, n_tiles, order.block_m)
    shift, delta = (torch.empty(numbers, dtype=torch.float32, device=q.device) for _ in range(2))
    turns = torch.empty((hq, n_tiles), dtype=torch.int32, device=q.device)
    total = torch.empty((hq * n_tiles * head_dim // 4, 256), dtype=torch.float32, device=q.device)
    d_sum = TensorDescriptor.from_tensor(total, [head_dim // 8, 256], layout(0, 32, 2))
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
    _prepare_kernel[(n_tiles * hq,)](
        *(g, out, lse, g_lse, shift, delta, turns, dq, cu_q, cu_k, n_tokens, n_seqs, n_tiles),
        H=hq,
        D=head_dim,
        BLOCK_M=order.block_m,
        CAUSAL=causal,
    )
    equal = max_k * n_seqs == n_keys
    last = max(n_seqs * hkv - config.tail_bytes // max(n_tokens // n_seqs * hq // hkv * head_dim * 4, 1), 0)
    last = last // config.swizzle * config.swizzle
    programs = cdiv(max_k, order.block_n) * n_seqs if equal else n_keys // order.block_n + n_seqs
    lists = cu_k if equal else by_length(cu_k, order.block_n)[0]
    attention_backward_kernel[(programs * hkv,)](
        *(rows(q, order.block_m), rows(g, order.block_m), rows(k, order.block_n), rows(v, order.block_n)),
        *(_numbers(shift, order.block_m), _numbers(delta, order.block_m), d_sum),
        *(turns, dq, dk, dv, cu_q, cu_k, lists, scale, n_seqs, config.swizzle, last, n_tiles),
        HKV=hkv,
        HEADS=hq // hkv,
        D=head_dim,
        BLOCK_M=order.block_m,
        BLOCK_N=order.block_n,
        STAGES=config.stages,
        CAUSAL=causal,
        EQUAL=equal,
        num_warps=4,
    )
    return dq, dk, dv
