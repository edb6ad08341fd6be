"""The partitions that compute in attention's backward at head_dim 64, where a warp group of its own takes dQ.

There are registers for a third warp group there, and for K and V of the two that hold keys, which then wait for no dQ.
They issue S of the next step behind dK of this one, so that a step begins with its exponentials. Sums and their orders
are those of `backward_consumer`, and so are the bits.
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

from bi_ops.attention.hopper.backward_args import DQ_STAGES
from bi_ops.attention.hopper.backward_consumer import (
    epilogue,
    issue_dq,
    store_dk_dv,
    store_smem,
    wait_keys,
    wait_rows,
)
from bi_ops.attention.hopper.common import ROWS, wgmma_layout
from bi_ops.attention.kernels.common import LOG2E
from bi_ops.gluon.pipeline import arrive, wait_empty, wait_full


@gluon.jit
def _issue_by_key(held, rows, zeros):
    """Issue S or dP: the GEMM of a warp group's K or V, in registers, and a step's rows."""
    return warpgroup_mma(held, rows.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _step(
    args, held_k, held_v, b_s, acc_k, acc_v, step, n_steps, first_q, WARP_GROUP: gl.constexpr, MASKED: gl.constexpr
):
    """(S of the next step, dK, dV) after a step of which S is there. Nothing is in flight before or afterwards."""
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    BLOCK_M: gl.constexpr = args.BLOCK_M
    STAGES: gl.constexpr = args.q_smem.shape[0]
    l_s: gl.constexpr = b_s.type.layout
    l_p: gl.constexpr = gl.DotOperandLayout(0, acc_k.type.layout, 2)
    zeros = gl.zeros((ROWS, BLOCK_M), gl.float32, l_s)
    # After the last step its own S is computed once more, which nothing reads.
    last = step + 1 == n_steps
    following = gl.where(last, step, step + 1)
    m_next = tile.end - 1 - following // HEADS
    rows_next = wait_rows(args, following, gl.where(last, BLOCK_M, tile.q_len - m_next * BLOCK_M), WARP_GROUP)
    i = step % STAGES
    q, g = args.q_smem.index(i), args.g_smem.index(i)
    b_neg_lse = args.neg_lse_smem.index(i).load(gl.SliceLayout(0, l_s))
    wait_full(args.g_full, step)
    b_dp = _issue_by_key(held_v, g, zeros)
    scale2 = LOG2E * args.scale
    b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(b_neg_lse[None, :], b_s)[0]))
    if MASKED:
        o_q = (tile.end - 1 - step // HEADS) * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, l_s))
        b_p = gl.where(first_q[:, None] <= o_q[None, :], b_p, 0.0)
    acc_v = warpgroup_mma(gl.convert_layout(b_p.to(g.dtype), l_p), g, acc_v, is_async=True)
    b_delta = args.delta_smem.index(i).load(gl.SliceLayout(0, l_s))
    b_dp = warpgroup_mma_wait(1, deps=(b_dp,))
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(q.dtype)
    acc_k = warpgroup_mma(gl.convert_layout(b_ds, l_p), q, acc_k, is_async=True)
    b_next = _issue_by_key(held_k, rows_next.q, zeros)
    wait_empty(args.ds_empty, step)
    args.ds_smem.index(step % DQ_STAGES).slice(WARP_GROUP * ROWS, ROWS).store(b_ds)
    fence_async_shared()
    arrive(args.ds_full, step)
    acc_k, acc_v, b_next = warpgroup_mma_wait(0, deps=(acc_k, acc_v, b_next))
    arrive(args.empty, step)
    return b_next, acc_k, acc_v


@gluon.jit
def consumer_ahead(args, WARP_GROUP: gl.constexpr):
    """dK and dV of a warp group's keys; dS goes to `dq_group`."""
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    BLOCK_M: gl.constexpr = args.BLOCK_M
    l_s: gl.constexpr = wgmma_layout(BLOCK_M)
    l_kv: gl.constexpr = wgmma_layout(args.D)
    zeros = gl.zeros((ROWS, BLOCK_M), gl.float32, l_s)
    acc_k = gl.zeros((ROWS, args.D), gl.float32, l_kv)
    acc_v = gl.zeros((ROWS, args.D), gl.float32, l_kv)
    first_q = wait_keys(args, l_s, WARP_GROUP)
    l_held: gl.constexpr = gl.DotOperandLayout(0, l_s, 2)
    held_k = args.k_smem.index(0).slice(WARP_GROUP * ROWS, ROWS).load(l_held)
    held_v = args.v_smem.index(0).slice(WARP_GROUP * ROWS, ROWS).load(l_held)
    n_steps = (tile.end - tile.first) * HEADS
    if n_steps > 0:
        rows = wait_rows(args, n_steps * 0, tile.q_len - (tile.end - 1) * BLOCK_M, WARP_GROUP)
        b_s = _issue_by_key(held_k, rows.q, zeros)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        n_full = (tile.end - tile.full) * HEADS
        for MASKED in gl.static_range(2):
            for step in range(n_full * MASKED, n_full if MASKED == 0 else n_steps):
                b_s, acc_k, acc_v = _step(
                    *(args, held_k, held_v, b_s, acc_k, acc_v, step, n_steps, first_q, WARP_GROUP, MASKED == 1)
                )
    store_dk_dv(args, acc_k, acc_v, WARP_GROUP)


@gluon.jit
def dq_group(args):
    """dQ of each step, from the dS of both consumers: to the reduce warp, or closed, as each consumer's half is."""
    tile = args.tile
    l_dq: gl.constexpr = wgmma_layout(args.D)
    zeros = gl.zeros((args.BLOCK_M, args.D), gl.float32, l_dq)
    mbarrier.wait(args.kv_full, 0)
    for step in range(0, (tile.end - tile.first) * args.HEADS):
        b_dq = warpgroup_mma_wait(0, deps=(issue_dq(args, step, zeros, 0),))
        arrive(args.ds_empty, step)
        if step >= tile.n_open:
            epilogue(args, b_dq, step, 0)
        else:
            store_smem(args, b_dq, step, 0)
