"""Attention's backward on Hopper in one pass: five GEMMs per tile, warp-specialised, written in Gluon.

A CTA owns a tile of keys, and sums their dK and dV in registers over the query tiles that see them. Its part of dQ goes
through shared memory to a warp that adds it to global memory, when the tile's semaphore says that it is its turn: a
tile of dQ takes the tiles of keys front to back, so the order of the sum follows from a sequence's own lengths. The CTA
with the last part closes the sum and rounds it.

    producer  1 warp       has TMA copy Q and dO of the next step, and two statistics per row, into stages
    consumers 2 x 4 warps  64 keys each: S, dP, dV, dK, and the exponentials. The dS that both leave in shared memory is
                           for both: each computes half the columns of dQ, two steps later, so that one may be most of a
                           step ahead, and keep the tensor cores busy while the other takes exponentials
    reduce    2 x 1 warp   every second step each: acquire the semaphore of a tile of dQ, add both halves, release it.
                           That takes longer than a step: poll, add, complete and publish are four round trips to L2
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bi_ops.attention.config import BackwardConfig, check_order
from bi_ops.attention.hopper.common import ROWS, clear_rows, wgmma_layout
from bi_ops.attention.kernels.backward import attention_prepare_kernel
from bi_ops.attention.kernels.common import LOG2E
from bi_ops.attention.order import OnePass
from bi_ops.core.integers import cdiv
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, arrive, opaque_zero, wait_empty, wait_full
from bi_ops.gluon.semaphore import acquire, release
from bi_ops.gluon.tile_scheduler import cta_pairs, lpt_order

WARP_GROUPS = gl.constexpr(2)


@aggregate
class KeyTile:
    """A CTA's tile of keys, and the steps of queries that see it: heads of a query tile, query tiles last to first."""

    q_start: gl.tensor
    q_len: gl.tensor
    n_tiles: Scalar  # query tiles of all sequences
    first_tile: gl.tensor  # the sequence's first among them
    n_slots: Scalar  # of tiles of dQ in global memory
    first_slot: gl.tensor  # the sequence's first among them, if it has more than one tile of keys
    k_row: gl.tensor  # the tile's first key
    n_keys: gl.tensor  # from there to the sequence's last
    kv_head: gl.tensor
    i_n: gl.tensor  # which tile of the sequence
    first: gl.tensor  # query tiles from `first` to `end` see a key of it, and from `full` on all
    full: gl.tensor
    end: gl.tensor
    n_open: gl.tensor  # steps whose dQ takes later key tiles too; this CTA closes the sums of the others


@aggregate
class PartitionArgs:
    """What every partition is given."""

    q_desc: tma.tensor_descriptor
    g_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    neg_lse_desc: tma.tensor_descriptor
    delta_desc: tma.tensor_descriptor
    dq_desc: tma.tensor_descriptor
    semaphores: gl.tensor
    dq: gl.tensor
    dk: gl.tensor
    dv: gl.tensor
    q_smem: gl.shared_memory_descriptor
    g_smem: gl.shared_memory_descriptor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    ds_smem: gl.shared_memory_descriptor
    dq_smem: gl.shared_memory_descriptor
    neg_lse_smem: gl.shared_memory_descriptor
    delta_smem: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # Q and neg_lse
    g_full: gl.shared_memory_descriptor  # dO and delta
    empty: gl.shared_memory_descriptor  # of both
    kv_full: gl.shared_memory_descriptor
    ds_full: gl.shared_memory_descriptor
    ds_empty: gl.shared_memory_descriptor
    dq_full: gl.shared_memory_descriptor  # a warp group's part of dQ is in its stage
    dq_ready: gl.shared_memory_descriptor  # its stage is empty; or, where the sum is closed, holds the parts before
    tile: KeyTile
    scale: Scalar
    q_offset: gl.tensor  # the first query that sees the tile's first key
    HKV: gl.constexpr
    HEADS: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    D: gl.constexpr
    CAUSAL: gl.constexpr
    KV_REGISTERS: gl.constexpr
    S_FIRST: gl.constexpr


@gluon.jit
def _producer(args):
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    D: gl.constexpr = args.D
    STAGES: gl.constexpr = args.q_smem.shape[0]
    mbarrier.expect(args.kv_full, args.k_desc.block_type.nbytes + args.v_desc.block_type.nbytes)
    tma.async_load(args.k_desc, [tile.k_row, tile.kv_head * D], args.kv_full, args.k_smem.index(0))
    tma.async_load(args.v_desc, [tile.k_row, tile.kv_head * D], args.kv_full, args.v_smem.index(0))
    for step in range(0, (tile.end - tile.first) * HEADS):
        i_m = tile.end - 1 - step // HEADS
        row = tile.q_start + i_m * args.BLOCK_M
        head = tile.kv_head * HEADS + step % HEADS
        stat = (head * tile.n_tiles + tile.first_tile + i_m) * args.BLOCK_M
        i = step % STAGES
        wait_empty(args.empty, step)
        q_full = args.q_full.index(i)
        mbarrier.expect(q_full, args.q_desc.block_type.nbytes + args.neg_lse_desc.block_type.nbytes)
        tma.async_load(args.q_desc, [row, head * D], q_full, args.q_smem.index(i))
        tma.async_load(args.neg_lse_desc, [stat], q_full, args.neg_lse_smem.index(i))
        g_full = args.g_full.index(i)
        mbarrier.expect(g_full, args.g_desc.block_type.nbytes + args.delta_desc.block_type.nbytes)
        tma.async_load(args.g_desc, [row, head * D], g_full, args.g_smem.index(i))
        tma.async_load(args.delta_desc, [stat], g_full, args.delta_smem.index(i))


@gluon.jit
def _dq_tile(tile, step, HEADS: gl.constexpr):
    """The slot of the tile of dQ, among those of all heads and sequences, that a step adds to."""
    return (tile.kv_head * HEADS + step % HEADS) * tile.n_slots + tile.first_slot + tile.end - 1 - step // HEADS


@gluon.jit
def _reduce(args, WARP: gl.constexpr):
    """Serves every second step: adds dQ of both warp groups to global memory, or loads the sum that the step closes."""
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    dq_desc, dq_smem = args.dq_desc, args.dq_smem
    DQ_STAGES: gl.constexpr = args.ds_smem.shape[0]
    DQ_ROWS: gl.constexpr = dq_smem.shape[1]
    i_n, n_open = tile.i_n, tile.n_open
    n_steps = (tile.end - tile.first) * HEADS
    seen = n_steps * 0 - 1
    if n_open > WARP:
        for group in gl.static_range(WARP_GROUPS):
            mbarrier.arrive(args.dq_ready.index(group * DQ_STAGES + WARP))
    for step in range(WARP, n_steps, DQ_STAGES):
        i_tile = _dq_tile(tile, step, HEADS)
        if step < n_open:
            if seen != i_n:
                acquire(args.semaphores + i_tile, i_n)
            for group in gl.static_range(WARP_GROUPS):
                i = group * DQ_STAGES + WARP
                mbarrier.wait(args.dq_full.index(i), step // DQ_STAGES & 1)
                if i_n == 0:
                    tma.async_store(dq_desc, [(i_tile * WARP_GROUPS + group) * DQ_ROWS, 0], dq_smem.index(i))
                else:
                    tma.async_atomic_add(dq_desc, [(i_tile * WARP_GROUPS + group) * DQ_ROWS, 0], dq_smem.index(i))
            tma.store_wait(0)
            if step + DQ_STAGES < n_open:
                for group in gl.static_range(WARP_GROUPS):
                    mbarrier.arrive(args.dq_ready.index(group * DQ_STAGES + WARP))
            next_tile = _dq_tile(tile, gl.minimum(step + DQ_STAGES, n_steps - 1), HEADS)
            seen = release(args.semaphores + i_tile, args.semaphores + next_tile)
        else:
            if i_n > 0:
                acquire(args.semaphores + i_tile, i_n)
            for group in gl.static_range(WARP_GROUPS):
                i = group * DQ_STAGES + WARP
                if step - DQ_STAGES >= n_open:
                    mbarrier.wait(args.dq_full.index(i), (step - DQ_STAGES) // DQ_STAGES & 1)
                if i_n == 0:
                    mbarrier.arrive(args.dq_ready.index(i))
                else:
                    ready = args.dq_ready.index(i)
                    mbarrier.expect(ready, dq_desc.block_type.nbytes)
                    tma.async_load(dq_desc, [(i_tile * WARP_GROUPS + group) * DQ_ROWS, 0], ready, dq_smem.index(i))


@aggregate
class StepRows:
    """The query rows of a step, in shared memory."""

    q: gl.shared_memory_descriptor
    g: gl.shared_memory_descriptor
    neg_lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor


@gluon.jit
def _wait_rows(args, step, n_valid):
    """Wait for the Q of a step, and clear rows past the end of the sequence: `StepRows`, of which dO may yet come."""
    STAGES: gl.constexpr = args.q_smem.shape[0]
    i = step % STAGES
    q, g = args.q_smem.index(i), args.g_smem.index(i)
    wait_full(args.q_full, step)
    if n_valid < args.BLOCK_M:
        wait_full(args.g_full, step)
        clear_rows(q, n_valid, 4)
        clear_rows(g, n_valid, 4)
        fence_async_shared()
    return StepRows(q, g, args.neg_lse_smem.index(i), args.delta_smem.index(i))


@gluon.jit
def _issue_dq(args, step, zeros, WARP_GROUP: gl.constexpr):
    """Issue the GEMM of a warp group's half of a step's dQ."""
    COLS: gl.constexpr = zeros.shape[1]
    wait_full(args.ds_full, step)
    DQ_STAGES: gl.constexpr = args.ds_smem.shape[0]
    k = args.k_smem.index(opaque_zero(step)).slice(WARP_GROUP * COLS, COLS, 1)
    ds = args.ds_smem.index(step % DQ_STAGES).permute((1, 0))
    return warpgroup_mma(ds, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_by_key(args, held, smem, rows, step, zeros, WARP_GROUP: gl.constexpr):
    """Issue S or dP: the GEMM of a warp group's K or V, in shared memory or `held` in registers, and a step's rows."""
    if args.KV_REGISTERS:
        return warpgroup_mma(held, rows.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        keys = smem.index(opaque_zero(step)).slice(WARP_GROUP * ROWS, ROWS)
        return warpgroup_mma(keys, rows.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _p_dv(
    args, rows, held_v, b_s, acc_v, step, scale2, first_q, o_q, zeros, WARP_GROUP: gl.constexpr, MASKED: gl.constexpr
):
    """From a step's S, in flight, to P; dP and dV are in flight then, after what else was issued behind S."""
    PENDING: gl.constexpr = 2 if args.S_FIRST and MASKED == 0 else 1
    g = rows.g
    l_s: gl.constexpr = zeros.type.layout
    l_p: gl.constexpr = gl.DotOperandLayout(0, acc_v.type.layout, 2)
    b_neg_lse = rows.neg_lse.load(gl.SliceLayout(0, l_s))
    wait_full(args.g_full, step)
    b_dp = _issue_by_key(args, held_v, args.v_smem, g, step, zeros, WARP_GROUP)
    b_s = warpgroup_mma_wait(PENDING, deps=(b_s,))
    b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(b_neg_lse[None, :], b_s)[0]))
    if MASKED:
        b_p = gl.where(first_q[:, None] <= o_q[None, :], b_p, 0.0)
    b_pt = gl.convert_layout(b_p.to(g.dtype), l_p)
    acc_v = warpgroup_mma(b_pt, g, acc_v, is_async=True)
    return b_p, b_dp, acc_v


@gluon.jit
def _ds_dk(args, rows, b_p, b_dp, acc_k, acc_v, step, WARP_GROUP: gl.constexpr):
    """From P and dP, in flight, to dS in shared memory, and dK. Nothing is in flight afterwards."""
    DQ_STAGES: gl.constexpr = args.ds_smem.shape[0]
    q = rows.q
    l_p: gl.constexpr = gl.DotOperandLayout(0, acc_k.type.layout, 2)
    b_delta = rows.delta.load(gl.SliceLayout(0, b_p.type.layout))
    b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(q.dtype)
    acc_k = warpgroup_mma(gl.convert_layout(b_ds, l_p), q, acc_k, is_async=True)
    wait_empty(args.ds_empty, step)
    args.ds_smem.index(step % DQ_STAGES).slice(WARP_GROUP * ROWS, ROWS).store(b_ds)
    fence_async_shared()
    arrive(args.ds_full, step)
    acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
    arrive(args.empty, step)
    return acc_k, acc_v


@gluon.jit
def _by_thread(x):
    """An accumulator [64, COLS] in the order in which threads hold it, four values each: no bank conflicts."""
    COLS: gl.constexpr = x.shape[1]
    x = gl.permute(x.reshape([4, 2, 8, COLS // 16, 2, 4, 2]), (3, 1, 0, 2, 5, 4, 6))
    return x.reshape([COLS // 4, 256])


@gluon.jit
def _by_row(x, COLS: gl.constexpr):
    """What `_by_thread` was given."""
    x = gl.permute(x.reshape([COLS // 16, 2, 4, 8, 4, 2, 2]), (2, 1, 3, 0, 5, 4, 6))
    return x.reshape([64, COLS])


@gluon.jit
def _store_smem(args, b_dq, step, WARP_GROUP: gl.constexpr):
    """A part of dQ to shared memory, for the reduce warp."""
    DQ_STAGES: gl.constexpr = args.ds_smem.shape[0]
    i = WARP_GROUP * DQ_STAGES + step % DQ_STAGES
    mbarrier.wait(args.dq_ready.index(i), step // DQ_STAGES & 1)
    args.dq_smem.index(i).store(_by_thread(b_dq))
    fence_async_shared()
    mbarrier.arrive(args.dq_full.index(i))
    arrive(args.ds_empty, step)


@gluon.jit
def _epilogue(args, b_dq, step, WARP_GROUP: gl.constexpr):
    """Add the last part of a tile of dQ to the sum of those before, which the reduce warp has loaded; round, store."""
    tile = args.tile
    HKV: gl.constexpr = args.HKV
    HEADS: gl.constexpr = args.HEADS
    D: gl.constexpr = args.D
    BLOCK_M: gl.constexpr = b_dq.shape[0]
    COLS: gl.constexpr = b_dq.shape[1]
    l_dq: gl.constexpr = b_dq.type.layout
    DQ_STAGES: gl.constexpr = args.ds_smem.shape[0]
    i = WARP_GROUP * DQ_STAGES + step % DQ_STAGES
    mbarrier.wait(args.dq_ready.index(i), step // DQ_STAGES & 1)
    b_last = _by_thread(b_dq)
    b_sum = args.dq_smem.index(i).load(b_last.type.layout)
    mbarrier.arrive(args.dq_full.index(i))
    arrive(args.ds_empty, step)
    # Of the first tile of keys there is no part before.
    b_sum = gl.where(tile.i_n > 0, b_sum + b_last, b_last)
    b_sum = gl.convert_layout(_by_row(b_sum, COLS), l_dq, assert_trivial=True)
    row = (tile.end - 1 - step // HEADS) * BLOCK_M
    o_q = (tile.q_start + row).to(gl.int64) * HKV * HEADS + tile.kv_head * HEADS + step % HEADS
    p_tile = args.dq + o_q * D + WARP_GROUP * COLS
    o_r = gl.arange(0, BLOCK_M, gl.SliceLayout(1, l_dq))
    o_d = gl.arange(0, COLS, gl.SliceLayout(0, l_dq))
    mask = (row + o_r < tile.q_len)[:, None]
    DTYPE: gl.constexpr = args.dq.dtype.element_ty
    gl.store(p_tile + o_r[:, None] * (HKV * HEADS * D) + o_d[None, :], (b_sum * args.scale).to(DTYPE), mask)


@gluon.jit
def _store_dk_dv(args, acc_k, acc_v, WARP_GROUP: gl.constexpr):
    D: gl.constexpr = args.D
    l_kv: gl.constexpr = acc_k.type.layout
    o_k = (args.tile.k_row + WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_kv))).to(gl.int64)
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_kv))
    o_out = ((o_k * args.HKV + args.tile.kv_head) * D)[:, None] + o_d[None, :]
    m_k = (WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_kv)) < args.tile.n_keys)[:, None]
    gl.store(args.dv + o_out, acc_v.to(args.k_smem.dtype), mask=m_k)
    gl.store(args.dk + o_out, (acc_k * args.scale).to(args.k_smem.dtype), mask=m_k)


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    BLOCK_M: gl.constexpr = args.BLOCK_M
    D: gl.constexpr = args.D
    l_s: gl.constexpr = wgmma_layout(BLOCK_M)
    l_kv: gl.constexpr = wgmma_layout(D)
    l_dq: gl.constexpr = wgmma_layout(D // WARP_GROUPS)
    DQ_STAGES: gl.constexpr = args.ds_smem.shape[0]
    q_len, n_keys, end, n_open = tile.q_len, tile.n_keys, tile.end, tile.n_open
    scale2 = LOG2E * args.scale
    zeros = gl.zeros((ROWS, BLOCK_M), gl.float32, l_s)
    zeros_q = gl.zeros((BLOCK_M, D // WARP_GROUPS), gl.float32, l_dq)
    acc_k = gl.zeros((ROWS, D), gl.float32, l_kv)
    acc_v = gl.zeros((ROWS, D), gl.float32, l_kv)
    # The first query that sees each key; past the last key there is none.
    o_n = WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_s))
    first_q = o_n * 0
    if args.CAUSAL:
        first_q = o_n + args.q_offset
    first_q = gl.where(o_n < n_keys, first_q, 2147483647)
    o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, l_s))

    mbarrier.wait(args.kv_full, 0)
    if n_keys < args.BLOCK_N:
        clear_rows(args.k_smem.index(0), n_keys, 4)
        clear_rows(args.v_smem.index(0), n_keys, 4)
        fence_async_shared()
    held_k = zeros  # not used
    held_v = zeros
    if args.KV_REGISTERS:
        l_kv_s: gl.constexpr = gl.DotOperandLayout(0, l_s, 2)
        held_k = args.k_smem.index(0).slice(WARP_GROUP * ROWS, ROWS).load(l_kv_s)
        held_v = args.v_smem.index(0).slice(WARP_GROUP * ROWS, ROWS).load(l_kv_s)
    n_steps = (end - tile.first) * HEADS
    for i in gl.static_range(DQ_STAGES):
        if n_steps > i:
            m = end - 1 - i // HEADS
            step = n_steps * 0 + i
            rows = _wait_rows(args, i, q_len - m * BLOCK_M)
            b_s = _issue_by_key(args, held_k, args.k_smem, rows.q, step, zeros, WARP_GROUP)
            o_q = m * BLOCK_M + o_m
            b_p, b_dp, acc_v = _p_dv(args, rows, held_v, b_s, acc_v, i, scale2, first_q, o_q, zeros, WARP_GROUP, True)
            acc_k, acc_v = _ds_dk(args, rows, b_p, b_dp, acc_k, acc_v, i, WARP_GROUP)
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + DQ_STAGES
            stop = (end - tile.full) * HEADS
        else:
            begin = gl.maximum((end - tile.full) * HEADS, DQ_STAGES)
            stop = n_steps
        for step in range(begin, stop):
            m = end - 1 - step // HEADS
            rows = _wait_rows(args, step, q_len - m * BLOCK_M)
            if args.S_FIRST and MASKED == 0:
                b_s = _issue_by_key(args, held_k, args.k_smem, rows.q, step, zeros, WARP_GROUP)
                b_dq = _issue_dq(args, step - DQ_STAGES, zeros_q, WARP_GROUP)
            else:
                b_dq = _issue_dq(args, step - DQ_STAGES, zeros_q, WARP_GROUP)
                b_s = _issue_by_key(args, held_k, args.k_smem, rows.q, step, zeros, WARP_GROUP)
                b_dq = warpgroup_mma_wait(1, deps=(b_dq,))
                if MASKED and step - DQ_STAGES >= n_open:
                    _epilogue(args, b_dq, step - DQ_STAGES, WARP_GROUP)
                else:
                    _store_smem(args, b_dq, step - DQ_STAGES, WARP_GROUP)
            o_q = m * BLOCK_M + o_m
            b_p, b_dp, acc_v = _p_dv(
                args, rows, held_v, b_s, acc_v, step, scale2, first_q, o_q, zeros, WARP_GROUP, MASKED
            )
            if args.S_FIRST and MASKED == 0:
                b_dq = warpgroup_mma_wait(2, deps=(b_dq,))
                _store_smem(args, b_dq, step - DQ_STAGES, WARP_GROUP)
            acc_k, acc_v = _ds_dk(args, rows, b_p, b_dp, acc_k, acc_v, step, WARP_GROUP)
    for step in range(gl.maximum(n_steps - DQ_STAGES, 0), n_steps):
        b_dq = warpgroup_mma_wait(0, deps=(_issue_dq(args, step, zeros_q, WARP_GROUP),))
        if step >= n_open:
            _epilogue(args, b_dq, step, WARP_GROUP)
        else:
            _store_smem(args, b_dq, step, WARP_GROUP)
    _store_dk_dv(args, acc_k, acc_v, WARP_GROUP)


@gluon.jit
def _rasterize(
    p_cu_k,
    p_order,
    n_seqs,
    swizzle,
    last_group,
    HKV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    EQUAL: gl.constexpr,
):
    """(sequence, KV head, tile of keys) of a CTA.

    `swizzle` pairs of a sequence and a KV head run side by side: a tile of dQ is still in L2 when its next part comes.
    From pair `last_group` on all do: what starts at the end is short then, and the SMs finish at the same time.
    """
    i_b, n_pairs, n_of_pair, j = cta_pairs(p_cu_k, p_order, n_seqs, HKV, BLOCK_N, EQUAL)
    if not EQUAL:
        last_group = (HKV - 1) // swizzle * swizzle  # CTAs after those of the last pair have tiles that do not exist
    i = gl.minimum(j // (n_of_pair * swizzle) * swizzle, last_group)
    width = gl.where(i < last_group, gl.minimum(swizzle, n_pairs - i), n_pairs - last_group)
    j -= i * n_of_pair
    return i_b + (i + j % width) // HKV, (i + j % width) % HKV, j // width


@gluon.jit(do_not_specialize=["n_seqs", "swizzle", "last_group", "n_tiles", "n_slots"])
def attention_backward_kernel(
    d_q,  # [T, HKV * HEADS * D], tiles [BLOCK_M, D]
    d_g,  # as d_q
    d_k,  # [Tk, HKV * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    d_neg_lse,  # fp32 [HKV * HEADS * n_tiles * BLOCK_M], tiles [BLOCK_M]: -lse in log2
    d_delta,  # as d_neg_lse: row sums of dO * O
    d_dq,  # fp32 [HKV * HEADS * n_slots * D / 4, 256], a warp group's tiles [D / 8, 256] as `_by_thread`: dQ / scale
    p_semaphores,  # int32 zeros [HKV * HEADS, n_slots]: how many key tiles have added to a tile of dQ
    p_dq,  # [T, HKV * HEADS, D], contiguous; tiles of queries that see no key are not written
    p_dk,  # [Tk, HKV, D], contiguous
    p_dv,  # as p_dk
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_order,  # int32 [2, B] of `lpt_order`; not read if EQUAL
    scale,  # softmax_scale
    n_seqs,
    swizzle,  # pairs of a sequence and a KV head that run side by side
    last_group,  # a multiple of `swizzle`; only if EQUAL
    n_tiles,  # of queries: T // BLOCK_M + B
    n_slots,  # of `n_slots`
    HKV: gl.constexpr,
    HEADS: gl.constexpr,  # query heads of a KV head
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,  # of Q and dO
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,  # all sequences have as many keys
    DQ_STAGES: gl.constexpr,  # steps between dS and its dQ; stages of dS and of dQ; reduce warps: 2 or 4
    KV_REGISTERS: gl.constexpr,  # consumers hold K and V in registers for S and dP
    S_FIRST: gl.constexpr,  # S is issued before the dQ of an earlier step
):
    # A CTA waits only for CTAs with a lower id, which run or are done: no deadlock on any number of SMs.
    i_b, i_h, i_n = _rasterize(p_cu_k, p_order, n_seqs, swizzle, last_group, HKV, BLOCK_N, EQUAL)
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    k_start = gl.load(p_cu_k + i_b)
    k_len = gl.load(p_cu_k + i_b + 1) - k_start
    n_keys = k_len - i_n * BLOCK_N
    k_row = k_start + i_n * BLOCK_N
    # A CTA whose tile does not exist has no steps. It must not return: the warps of all partitions end together.
    end = gl.where(n_keys > 0, (q_len + BLOCK_M - 1) // BLOCK_M, 0)
    first = end * 0
    full = end * 0
    q_offset = i_n * BLOCK_N - (k_len - q_len)
    if CAUSAL:
        first = gl.minimum(gl.maximum(q_offset, 0) // BLOCK_M, end)
        full = gl.minimum((gl.maximum(q_offset + BLOCK_N - 1, 0) + BLOCK_M - 1) // BLOCK_M, end)
    # From `open` on no query sees a later tile of keys: the sums of dQ are closed here.
    open = full
    if CAUSAL:
        open = gl.minimum(gl.maximum(q_offset + BLOCK_N, 0) // BLOCK_M, end)
    if n_keys <= BLOCK_N:
        full = end
        open = end

    DTYPE: gl.constexpr = d_q.dtype
    k_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_k.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, D], d_q.layout)
    g_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, D], d_g.layout)
    ds_smem = gl.allocate_shared_memory(DTYPE, [DQ_STAGES, BLOCK_N, BLOCK_M], gl.NVMMASharedLayout(128, 16, 2))
    dq_smem = gl.allocate_shared_memory(gl.float32, [WARP_GROUPS * DQ_STAGES, D // 8, 256], d_dq.layout)
    neg_lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], d_neg_lse.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], d_delta.layout)
    q_full = allocate_barriers(STAGES)
    g_full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    ds_full = allocate_barriers(DQ_STAGES)
    ds_empty = allocate_barriers(DQ_STAGES)
    dq_full = allocate_barriers(WARP_GROUPS * DQ_STAGES)
    dq_ready = allocate_barriers(WARP_GROUPS * DQ_STAGES)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARP_GROUPS)
    for i in gl.static_range(DQ_STAGES):
        mbarrier.init(ds_full.index(i), count=WARP_GROUPS)
        mbarrier.init(ds_empty.index(i), count=WARP_GROUPS)
    for i in gl.static_range(WARP_GROUPS * DQ_STAGES):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_ready.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    fence_async_shared()

    first_tile = q_start // BLOCK_M + i_b
    first_slot = q_start // BLOCK_M + gl.minimum(i_b, k_start // BLOCK_N)
    n_open = (end - open) * HEADS
    tile = KeyTile(
        *(q_start, q_len, n_tiles, first_tile, n_slots, first_slot, k_row, n_keys, i_h, i_n),
        *(first, full, end, n_open),
    )
    args = PartitionArgs(
        *(d_q, d_g, d_k, d_v, d_neg_lse, d_delta, d_dq, p_semaphores, p_dq, p_dk, p_dv),
        *(q_smem, g_smem, k_smem, v_smem, ds_smem, dq_smem, neg_lse_smem, delta_smem),
        *(q_full, g_full, empty, kv_full, ds_full, ds_empty, dq_full, dq_ready),
        *(tile, scale, q_offset, HKV, HEADS, BLOCK_M, BLOCK_N, D, CAUSAL, KV_REGISTERS, S_FIRST),
    )
    if DQ_STAGES == 2:
        gl.warp_specialize(
            [
                (_consumer, (args, 0)),
                (_consumer, (args, 1)),
                (_producer, (args,)),
                (_reduce, (args, 0)),
                (_reduce, (args, 1)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )
    else:
        gl.static_assert(DQ_STAGES == 4)  # there is a reduce warp for each stage
        gl.warp_specialize(
            [
                (_consumer, (args, 0)),
                (_consumer, (args, 1)),
                (_producer, (args,)),
                (_reduce, (args, 0)),
                (_reduce, (args, 1)),
                (_reduce, (args, 2)),
                (_reduce, (args, 3)),
            ],
            [4, 1, 1, 1, 1, 1],
            [232, 24, 24, 24, 24, 24],
        )


def n_slots(n_tokens: int, n_keys: int, n_seqs: int, order: OnePass) -> int:
    """Tiles of dQ, of one head, that wait in global memory for more than one tile of keys.

    A sequence of one tile of keys has none. Sequence b, of more, has its first at
    q_start // block_m + min(b, k_start // block_n): the second term grows by one at least from one such sequence to the
    next, and rounding takes no more. So what they take grows with tokens, however many sequences there are.
    """
    return n_tokens // order.block_m + min(n_seqs, n_keys // order.block_n)


def workspace(
    n_tokens: int, n_keys: int, n_seqs: int, hq: int, head_dim: int, order: OnePass
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the memory that `launch` takes beside the gradients, 4 bytes an element.

    neg_lse and delta, which are padded to whole tiles of each sequence; the tiles of dQ; their semaphores.
    """
    statistics = (hq, n_tokens // order.block_m + n_seqs, order.block_m)
    slots = n_slots(n_tokens, n_keys, n_seqs, order)
    return statistics, statistics, (hq * max(slots, 1) * head_dim // 4, 256), (hq, slots)


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
        ValueError: an order of other tiles than this kernel's; more rows than 32 bits count.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), (n_keys, hkv, _) = q.shape, k.shape
    n_seqs = cu_q.shape[0] - 1
    shapes = workspace(n_tokens, n_keys, n_seqs, hq, head_dim, order)
    neg_lse, delta, total = (q.new_empty(shape, dtype=torch.float32) for shape in shapes[:3])
    semaphores = q.new_empty(shapes[3], dtype=torch.int32)
    n_tiles, slots = neg_lse.shape[1], semaphores.shape[1]
    if neg_lse.numel() >= 2**31:  # TMA counts in 32 bits
        raise ValueError(
            f"flash_attention: the backward pads {n_tokens} tokens in {n_seqs} sequences, times {hq} heads, to 2**31 "
            "rows or more; split the batch"
        )
    d_dq = TensorDescriptor.from_tensor(total, [head_dim // 8, 256], tma.smem_layout(0, 32, 2))
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
    attention_prepare_kernel[(n_tiles * hq,)](
        *(g, out, lse, g_lse, neg_lse, delta, semaphores, dq, dk, dv, cu_q, cu_k),
        *(n_tokens, n_keys, n_seqs, n_tiles, slots),
        H=hq,
        HEADS=hq // hkv,
        D=head_dim,
        BLOCK_M=order.block_m,
        BLOCK_N=order.block_n,
        CAUSAL=causal,
        **PINNED,
    )
    equal = max_k * n_seqs == n_keys
    last_group = max(n_seqs * hkv - config.tail_bytes // max(n_tokens // n_seqs * hq // hkv * head_dim * 4, 1), 0)
    last_group = last_group // config.swizzle * config.swizzle
    programs = cdiv(max_k, order.block_n) * n_seqs if equal else n_keys // order.block_n + n_seqs
    kv_order = cu_k if equal else lpt_order(cu_k, order.block_n)[0]
    attention_backward_kernel[(programs * hkv,)](
        *(tma.head_descriptor(t, order.block_m) for t in (q, g)),
        *(tma.head_descriptor(t, order.block_n) for t in (k, v)),
        *(tma.vector_descriptor(t, order.block_m) for t in (neg_lse, delta)),
        *(d_dq, semaphores, dq, dk, dv, cu_q, cu_k, kv_order, scale, n_seqs, config.swizzle, last_group),
        *(n_tiles, slots),
        HKV=hkv,
        HEADS=hq // hkv,
        D=head_dim,
        BLOCK_M=order.block_m,
        BLOCK_N=order.block_n,
        STAGES=config.stages,
        CAUSAL=causal,
        EQUAL=equal,
        DQ_STAGES=config.dq_stages,
        KV_REGISTERS=config.kv_registers,
        S_FIRST=config.s_first,
        num_warps=4,
        **PINNED,
    )
    return dq, dk, dv
