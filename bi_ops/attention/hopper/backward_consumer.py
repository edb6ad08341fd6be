"""The partition that computes in attention's backward at head_dim 128: a warp group's keys, and half the columns of dQ.

And what it shares with those of `backward_ahead`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bi_ops.attention.hopper.backward_args import DQ_STAGES, WARP_GROUPS
from bi_ops.attention.hopper.common import ROWS, clear_share, wgmma_layout
from bi_ops.attention.kernels.common import LOG2E
from bi_ops.gluon.aggregate import aggregate
from bi_ops.gluon.pipeline import arrive, opaque_zero, wait_empty, wait_full


@aggregate
class StepRows:
    """The query rows of a step, in shared memory."""

    q: gl.shared_memory_descriptor
    g: gl.shared_memory_descriptor
    neg_lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor


@gluon.jit
def wait_rows(args, step, n_valid, WARP_GROUP: gl.constexpr):
    """Wait for the Q of a step, and clear rows past the end of the sequence: `StepRows`, of which dO may yet come.

    Those are rows of the last query tile, which comes first, a head to a step.
    """
    STAGES: gl.constexpr = args.q_smem.shape[0]
    i = step % STAGES
    q, g = args.q_smem.index(i), args.g_smem.index(i)
    wait_full(args.q_full, step)
    if n_valid < args.BLOCK_M:
        wait_full(args.g_full, step)
        clear_share(q, n_valid, WARP_GROUP, WARP_GROUPS)
        clear_share(g, n_valid, WARP_GROUP, WARP_GROUPS)
        fence_async_shared()
        arrive(args.cleared, step)
        wait_full(args.cleared, step)
    return StepRows(q, g, args.neg_lse_smem.index(i), args.delta_smem.index(i))


@gluon.jit
def issue_dq(args, step, zeros, WARP_GROUP: gl.constexpr):
    """Issue the GEMM of a warp group's half of a step's dQ."""
    COLS: gl.constexpr = zeros.shape[1]
    wait_full(args.ds_full, step)
    k = args.k_smem.index(opaque_zero(step)).slice(WARP_GROUP * COLS, COLS, 1)
    ds = args.ds_smem.index(step % DQ_STAGES).permute((1, 0))
    return warpgroup_mma(ds, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_by_key(smem, rows, step, zeros, WARP_GROUP: gl.constexpr):
    """Issue S or dP: the GEMM of a warp group's K or V and a step's rows."""
    keys = smem.index(opaque_zero(step)).slice(WARP_GROUP * ROWS, ROWS)
    return warpgroup_mma(keys, rows.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _p_dv(args, rows, b_s, acc_v, step, scale2, first_q, o_q, zeros, WARP_GROUP: gl.constexpr, MASKED: gl.constexpr):
    """From a step's S, in flight, to P; dP and dV are in flight then."""
    g = rows.g
    l_s: gl.constexpr = zeros.type.layout
    l_p: gl.constexpr = gl.DotOperandLayout(0, acc_v.type.layout, 2)
    b_neg_lse = rows.neg_lse.load(gl.SliceLayout(0, l_s))
    wait_full(args.g_full, step)
    b_dp = _issue_by_key(args.v_smem, g, step, zeros, WARP_GROUP)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(b_neg_lse[None, :], b_s)[0]))
    if MASKED:
        b_p = gl.where(first_q[:, None] <= o_q[None, :], b_p, 0.0)
    b_pt = gl.convert_layout(b_p.to(g.dtype), l_p)
    acc_v = warpgroup_mma(b_pt, g, acc_v, is_async=True)
    return b_p, b_dp, acc_v


@gluon.jit
def _ds_dk(args, rows, b_p, b_dp, acc_k, acc_v, step, WARP_GROUP: gl.constexpr):
    """From P and dP, in flight, to dS in shared memory, and dK. Nothing is in flight afterwards."""
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
def store_smem(args, b_dq, step, WARP_GROUP: gl.constexpr):
    """A part of dQ to shared memory, for the reduce warp."""
    i = WARP_GROUP * DQ_STAGES + step % DQ_STAGES
    mbarrier.wait(args.dq_ready.index(i), step // DQ_STAGES & 1)
    args.dq_smem.index(i).store(_by_thread(b_dq))
    fence_async_shared()
    mbarrier.arrive(args.dq_full.index(i))
    if not args.DQ_GROUP:
        arrive(args.ds_empty, step)


@gluon.jit
def epilogue(args, b_dq, step, WARP_GROUP: gl.constexpr):
    """Add the last part of a tile of dQ to the sum of those before, which the reduce warp has loaded; round, store."""
    tile = args.tile
    HKV: gl.constexpr = args.HKV
    HEADS: gl.constexpr = args.HEADS
    D: gl.constexpr = args.D
    BLOCK_M: gl.constexpr = b_dq.shape[0]
    COLS: gl.constexpr = b_dq.shape[1]
    l_dq: gl.constexpr = b_dq.type.layout
    i = WARP_GROUP * DQ_STAGES + step % DQ_STAGES
    mbarrier.wait(args.dq_ready.index(i), step // DQ_STAGES & 1)
    b_last = _by_thread(b_dq)
    b_sum = args.dq_smem.index(i).load(b_last.type.layout)
    mbarrier.arrive(args.dq_full.index(i))
    if not args.DQ_GROUP:
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
def store_dk_dv(args, acc_k, acc_v, WARP_GROUP: gl.constexpr):
    D: gl.constexpr = args.D
    l_kv: gl.constexpr = acc_k.type.layout
    o_k = (args.tile.k_row + WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_kv))).to(gl.int64)
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_kv))
    o_out = ((o_k * args.HKV + args.tile.kv_head) * D)[:, None] + o_d[None, :]
    m_k = (WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_kv)) < args.tile.n_keys)[:, None]
    gl.store(args.dv + o_out, acc_v.to(args.k_smem.dtype), mask=m_k)
    gl.store(args.dk + o_out, (acc_k * args.scale).to(args.k_smem.dtype), mask=m_k)


@gluon.jit
def wait_keys(args, l_s: gl.constexpr, WARP_GROUP: gl.constexpr):
    """Wait for a warp group's keys: the first query that sees each."""
    n_keys = args.tile.n_keys
    # Past the last key there is none.
    o_n = WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_s))
    first_q = o_n * 0
    if args.CAUSAL:
        first_q = o_n + args.q_offset
    first_q = gl.where(o_n < n_keys, first_q, 2147483647)
    mbarrier.wait(args.kv_full, 0)
    if n_keys < args.BLOCK_N:
        # The other warp group's share of K is read for dQ alone, behind its arrival with dS.
        clear_share(args.k_smem.index(0), n_keys, WARP_GROUP, WARP_GROUPS)
        clear_share(args.v_smem.index(0), n_keys, WARP_GROUP, WARP_GROUPS)
        fence_async_shared()
    return first_q


@gluon.jit
def consumer(args, WARP_GROUP: gl.constexpr):
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    BLOCK_M: gl.constexpr = args.BLOCK_M
    D: gl.constexpr = args.D
    l_s: gl.constexpr = wgmma_layout(BLOCK_M)
    l_kv: gl.constexpr = wgmma_layout(D)
    l_dq: gl.constexpr = wgmma_layout(D // WARP_GROUPS)
    q_len, end, n_open = tile.q_len, tile.end, tile.n_open
    scale2 = LOG2E * args.scale
    zeros = gl.zeros((ROWS, BLOCK_M), gl.float32, l_s)
    zeros_q = gl.zeros((BLOCK_M, D // WARP_GROUPS), gl.float32, l_dq)
    acc_k = gl.zeros((ROWS, D), gl.float32, l_kv)
    acc_v = gl.zeros((ROWS, D), gl.float32, l_kv)
    o_m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, l_s))
    first_q = wait_keys(args, l_s, WARP_GROUP)
    n_steps = (end - tile.first) * HEADS
    for i in gl.static_range(DQ_STAGES):
        if n_steps > i:
            m = end - 1 - i // HEADS
            step = n_steps * 0 + i
            rows = wait_rows(args, i, q_len - m * BLOCK_M, WARP_GROUP)
            b_s = _issue_by_key(args.k_smem, rows.q, step, zeros, WARP_GROUP)
            o_q = m * BLOCK_M + o_m
            b_p, b_dp, acc_v = _p_dv(args, rows, b_s, acc_v, i, scale2, first_q, o_q, zeros, WARP_GROUP, True)
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
            rows = wait_rows(args, step, q_len - m * BLOCK_M, WARP_GROUP)
            b_dq = issue_dq(args, step - DQ_STAGES, zeros_q, WARP_GROUP)
            b_s = _issue_by_key(args.k_smem, rows.q, step, zeros, WARP_GROUP)
            b_dq = warpgroup_mma_wait(1, deps=(b_dq,))
            if MASKED and step - DQ_STAGES >= n_open:
                epilogue(args, b_dq, step - DQ_STAGES, WARP_GROUP)
            else:
                store_smem(args, b_dq, step - DQ_STAGES, WARP_GROUP)
            o_q = m * BLOCK_M + o_m
            b_p, b_dp, acc_v = _p_dv(args, rows, b_s, acc_v, step, scale2, first_q, o_q, zeros, WARP_GROUP, MASKED)
            acc_k, acc_v = _ds_dk(args, rows, b_p, b_dp, acc_k, acc_v, step, WARP_GROUP)
    for step in range(gl.maximum(n_steps - DQ_STAGES, 0), n_steps):
        b_dq = warpgroup_mma_wait(0, deps=(issue_dq(args, step, zeros_q, WARP_GROUP),))
        if step >= n_open:
            epilogue(args, b_dq, step, WARP_GROUP)
        else:
            store_smem(args, b_dq, step, WARP_GROUP)
    store_dk_dv(args, acc_k, acc_v, WARP_GROUP)
