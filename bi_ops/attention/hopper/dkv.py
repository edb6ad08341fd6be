"""dK and dV on Hopper at head_dim 256, warp-specialised, written in Gluon: `attention_dkv_kernel`'s bits.

A CTA owns 64 keys of a sequence and a KV head, and steps through the rows (query, head of the group) that see them.

    producer  1 warp       has TMA copy Q and dO of the next rows into stages, and adds two statistics per row
    consumers 2 x 4 warps  P and dS of half the rows each, left in shared memory for both, and half the columns of dV
                           and dK. P is taken and exchanged while the tensor cores compute dP, and dS while they compute
                           dV. To issue the next rows' S before would take both stages, and leave none to load into
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

from bi_ops.attention.config import DkvConfig, check_order
from bi_ops.attention.hopper.common import clear_share, wgmma_layout
from bi_ops.attention.kernels.common import LOG2E
from bi_ops.attention.order import TwoPass
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, arrive, opaque_zero, wait_empty, wait_full
from bi_ops.gluon.tile_scheduler import cta_pairs, lpt_order

WARP_GROUPS = gl.constexpr(2)
BLOCK_N = gl.constexpr(64)  # keys: the M of a `wgmma`
BLOCK_R = gl.constexpr(64)  # rows of a step
HALF = gl.constexpr(32)  # of them a warp group's
# Stages of rows in shared memory, and of P and dS. They are the same on purpose: the rows of a step are there only when
# both warp groups are done with the step STAGES before it, and so with its P and dS, which may then be overwritten.
STAGES = gl.constexpr(2)


@aggregate
class KeyTile:
    """A CTA's tile of keys, and the steps of rows that see it."""

    q_start: gl.tensor
    n_rows: gl.tensor  # of the sequence and KV head
    k_row: gl.tensor  # the tile's first key
    n_keys: gl.tensor  # from there to the sequence's last
    kv_head: gl.tensor
    first: gl.tensor  # the first step, counted from the sequence's first row
    n_steps: gl.tensor


@aggregate
class PartitionArgs:
    """What every partition is given."""

    q_desc: tma.tensor_descriptor
    g_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    neg_lse: gl.tensor  # of the sequence and KV head, as `delta`
    delta: gl.tensor
    dk: gl.tensor
    dv: gl.tensor
    q_smem: gl.shared_memory_descriptor
    g_smem: gl.shared_memory_descriptor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    p_smem: gl.shared_memory_descriptor
    ds_smem: gl.shared_memory_descriptor
    neg_lse_smem: gl.shared_memory_descriptor
    delta_smem: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # Q, neg_lse and delta
    g_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor  # of all of them
    cleared: gl.shared_memory_descriptor  # both warp groups have cleared their shares of Q and dO
    kv_full: gl.shared_memory_descriptor
    p_full: gl.shared_memory_descriptor  # both halves of P are there
    ds_full: gl.shared_memory_descriptor
    tile: KeyTile
    scale: Scalar
    q_offset: gl.tensor  # the first query that sees the tile's first key
    HKV: gl.constexpr
    HEADS: gl.constexpr
    D: gl.constexpr
    CAUSAL: gl.constexpr


@gluon.jit
def _producer(args):
    tile = args.tile
    D: gl.constexpr = args.D
    HEADS: gl.constexpr = args.HEADS
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lane = gl.arange(0, BLOCK_R, layout)
    if tile.n_steps > 0:
        mbarrier.expect(args.kv_full, args.k_desc.block_type.nbytes + args.v_desc.block_type.nbytes)
        tma.async_load(args.k_desc, [tile.k_row, tile.kv_head * D], args.kv_full, args.k_smem.index(0))
        tma.async_load(args.v_desc, [tile.k_row, tile.kv_head * D], args.kv_full, args.v_smem.index(0))
    for step in range(0, tile.n_steps):
        i = step % STAGES
        o_r = (tile.first + step) * BLOCK_R + lane
        query = tile.q_start + (tile.first + step) * (BLOCK_R // HEADS)
        # Loaded before the wait, which hides how long that takes.
        b_neg_lse = gl.load(args.neg_lse + o_r, mask=o_r < tile.n_rows, other=0.0)
        b_delta = gl.load(args.delta + o_r, mask=o_r < tile.n_rows, other=0.0)
        wait_empty(args.empty, step)
        mbarrier.expect(args.q_full.index(i), args.q_desc.block_type.nbytes)
        tma.async_load(args.q_desc, [query, tile.kv_head * HEADS, 0], args.q_full.index(i), args.q_smem.index(i))
        mbarrier.expect(args.g_full.index(i), args.g_desc.block_type.nbytes)
        tma.async_load(args.g_desc, [query, tile.kv_head * HEADS, 0], args.g_full.index(i), args.g_smem.index(i))
        args.neg_lse_smem.index(i).store(b_neg_lse)
        args.delta_smem.index(i).store(b_delta)
        mbarrier.arrive(args.q_full.index(i))


@gluon.jit
def _rows(smem, step):
    """The rows of a step, [BLOCK_R, D]."""
    return smem.index(step % STAGES).reshape([BLOCK_R, smem.shape[3]])


@gluon.jit
def _issue_s_dp(args, step, n_valid, b_k, zeros, WARP_GROUP: gl.constexpr):
    """Wait for the rows of a step, clear those past the end, and issue a warp group's S and dP."""
    q, g = _rows(args.q_smem, step), _rows(args.g_smem, step)
    wait_full(args.q_full, step)
    if n_valid < BLOCK_R:
        wait_full(args.g_full, step)
        clear_share(q, n_valid, WARP_GROUP, WARP_GROUPS)
        clear_share(g, n_valid, WARP_GROUP, WARP_GROUPS)
        fence_async_shared()
        mbarrier.arrive(args.cleared)
        mbarrier.wait(args.cleared, 0)  # only the last step has such rows
    q_t = q.slice(WARP_GROUP * HALF, HALF).permute((1, 0))
    g_t = g.slice(WARP_GROUP * HALF, HALF).permute((1, 0))
    FIRST: gl.constexpr = b_k.shape[1]
    REST: gl.constexpr = q_t.shape[0] - FIRST
    k = args.k_smem.index(opaque_zero(step)).slice(FIRST, REST, 1)
    b_s = warpgroup_mma(b_k, q_t.slice(0, FIRST), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma(k, q_t.slice(FIRST, REST), b_s, is_async=True)
    wait_full(args.g_full, step)
    b_dp = warpgroup_mma(args.v_smem.index(opaque_zero(step)), g_t, zeros, use_acc=False, is_async=True)
    return b_s, b_dp


@gluon.jit
def _store_smem(x, smem, full, step, WARP_GROUP: gl.constexpr):
    """A warp group's half of P or dS to shared memory."""
    smem.index(step % STAGES * WARP_GROUPS + WARP_GROUP).store(x.to(smem.dtype))
    fence_async_shared()
    arrive(full, step)


@gluon.jit
def _issue_sum(own, smem, full, rows_smem, acc, step, WARP_GROUP: gl.constexpr):
    """Issue a warp group's columns of dV or dK: its `own` half of P or dS, and the other half when that is full."""
    COLS: gl.constexpr = rows_smem.shape[3] // WARP_GROUPS
    l_own: gl.constexpr = gl.DotOperandLayout(0, wgmma_layout(COLS), 2)
    y = _rows(rows_smem, step).slice(WARP_GROUP * COLS, COLS, 1)
    for half in gl.static_range(WARP_GROUPS):
        if half == WARP_GROUP:
            # From registers: shared memory is what the tensor cores wait for.
            x = gl.convert_layout(own.to(smem.dtype), l_own)
            acc = warpgroup_mma(x, y.slice(half * HALF, HALF), acc, is_async=True)
        else:
            wait_full(full, step)
            x = smem.index(step % STAGES * WARP_GROUPS + half)
            acc = warpgroup_mma(x, y.slice(half * HALF, HALF), acc, is_async=True)
    return acc


@gluon.jit
def _epilogue(args, acc_k, acc_v, WARP_GROUP: gl.constexpr):
    """Scale dK, and store a warp group's columns of dK and dV."""
    COLS: gl.constexpr = acc_k.shape[1]
    DTYPE: gl.constexpr = args.dk.dtype.element_ty
    l_kv: gl.constexpr = acc_k.type.layout
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, l_kv))
    o_d = WARP_GROUP * COLS + gl.arange(0, COLS, gl.SliceLayout(0, l_kv))
    o_k = (args.tile.k_row + o_n).to(gl.int64) * args.HKV + args.tile.kv_head
    o_out = (o_k * args.D)[:, None] + o_d[None, :]
    m_n = (o_n < args.tile.n_keys)[:, None]
    gl.store(args.dv + o_out, acc_v.to(DTYPE), mask=m_n)
    gl.store(args.dk + o_out, (acc_k * args.scale).to(DTYPE), mask=m_n)


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    tile = args.tile
    D: gl.constexpr = args.D
    COLS: gl.constexpr = D // WARP_GROUPS
    l_s: gl.constexpr = wgmma_layout(HALF)
    l_kv: gl.constexpr = wgmma_layout(COLS)
    scale2 = LOG2E * args.scale
    zeros = gl.zeros((BLOCK_N, HALF), gl.float32, l_s)
    acc_k = gl.zeros((BLOCK_N, COLS), gl.float32, l_kv)
    acc_v = gl.zeros((BLOCK_N, COLS), gl.float32, l_kv)
    # The first row that sees each key.
    first_row = (args.q_offset + gl.arange(0, BLOCK_N, gl.SliceLayout(1, l_s))) * args.HEADS
    o_r = WARP_GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(0, l_s))
    mbarrier.wait(args.kv_full, 0, pred=tile.n_steps > 0)
    # Half of K stays in registers: shared memory is read less.
    b_k = args.k_smem.index(0).slice(0, D // 2, 1).load(gl.DotOperandLayout(0, l_s, 2))
    for step in range(0, tile.n_steps):
        row = (tile.first + step) * BLOCK_R
        b_s, b_dp = _issue_s_dp(args, step, tile.n_rows - row, b_k, zeros, WARP_GROUP)
        b_neg_lse = args.neg_lse_smem.index(step % STAGES).slice(WARP_GROUP * HALF, HALF).load(gl.SliceLayout(0, l_s))
        b_delta = args.delta_smem.index(step % STAGES).slice(WARP_GROUP * HALF, HALF).load(gl.SliceLayout(0, l_s))
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(b_neg_lse[None, :], b_s)[0]))
        if args.CAUSAL:
            b_p = gl.where(first_row[:, None] <= row + o_r[None, :], b_p, 0.0)
        _store_smem(b_p, args.p_smem, args.p_full, step, WARP_GROUP)
        acc_v = _issue_sum(b_p, args.p_smem, args.p_full, args.g_smem, acc_v, step, WARP_GROUP)
        b_dp = warpgroup_mma_wait(WARP_GROUPS, deps=(b_dp,))
        b_ds = b_p * (b_dp - b_delta[None, :])
        _store_smem(b_ds, args.ds_smem, args.ds_full, step, WARP_GROUP)
        acc_k = _issue_sum(b_ds, args.ds_smem, args.ds_full, args.q_smem, acc_k, step, WARP_GROUP)
        acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
        arrive(args.empty, step)
    _epilogue(args, acc_k, acc_v, WARP_GROUP)


@gluon.jit
def _rasterize(p_cu_k, p_order, n_seqs, num_sms, HKV: gl.constexpr, EQUAL: gl.constexpr):
    """(sequence, KV head, tile of keys) of a CTA.

    Pairs of a sequence and a KV head run side by side, as many as fill the SMs, and of each pair the tiles from the
    first: that has most rows, and what runs at one time reads rows that are in L2 together.
    """
    i_b, n_pairs, n_of_pair, j = cta_pairs(p_cu_k, p_order, n_seqs, HKV, BLOCK_N, EQUAL)
    swizzle = gl.maximum(num_sms // n_of_pair, 1)
    i = gl.minimum(j // (n_of_pair * swizzle) * swizzle, n_pairs - 1)
    width = gl.minimum(swizzle, n_pairs - i)
    j -= i * n_of_pair
    return i_b + (i + j % width) // HKV, (i + j % width) % HKV, j // width


@gluon.jit(do_not_specialize=["n_tokens", "n_seqs", "num_sms"])
def attention_dkv_hopper_kernel(
    d_q,  # [T, HKV * HEADS, D], tiles [BLOCK_R / HEADS, HEADS, D]
    d_g,  # as d_q
    d_k,  # [Tk, HKV * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    p_neg_lse,  # fp32 [HKV, T, HEADS]: -lse in log2
    p_delta,  # fp32 [HKV, T, HEADS]: row sums of dO * O
    p_dk,  # [Tk, HKV, D], contiguous
    p_dv,  # as p_dk
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_order,  # int32 [2, B] of `lpt_order`; not read if EQUAL
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    num_sms,
    HKV: gl.constexpr,
    HEADS: gl.constexpr,  # query heads of a KV head: divides BLOCK_R
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,  # all sequences have as many keys
):
    i_b, i_h, i_n = _rasterize(p_cu_k, p_order, n_seqs, num_sms, HKV, EQUAL)
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    k_start = gl.load(p_cu_k + i_b)
    k_len = gl.load(p_cu_k + i_b + 1) - k_start
    # A CTA whose tile does not exist has no steps. It must not return: the warps of all partitions end together.
    n_keys = k_len - i_n * BLOCK_N
    n_rows = q_len * HEADS
    q_offset = i_n * BLOCK_N - (k_len - q_len)
    first = n_rows * 0
    if CAUSAL:
        first = gl.maximum(q_offset, 0) * HEADS // BLOCK_R
    n_steps = gl.where(n_keys > 0, gl.maximum((n_rows + BLOCK_R - 1) // BLOCK_R - first, 0), 0)

    DTYPE: gl.constexpr = d_q.dtype
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_R // HEADS, HEADS, D], d_q.layout)
    g_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_R // HEADS, HEADS, D], d_g.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_k.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    l_half: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    p_smem = gl.allocate_shared_memory(DTYPE, [STAGES * WARP_GROUPS, BLOCK_N, HALF], l_half)
    ds_smem = gl.allocate_shared_memory(DTYPE, [STAGES * WARP_GROUPS, BLOCK_N, HALF], l_half)
    l_rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    neg_lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_R], l_rows)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_R], l_rows)
    q_full = allocate_barriers(STAGES)
    g_full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    p_full = allocate_barriers(STAGES)
    ds_full = allocate_barriers(STAGES)
    cleared = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)  # Q, and the producer's own stores of neg_lse and delta
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARP_GROUPS)
        mbarrier.init(p_full.index(i), count=WARP_GROUPS)
        mbarrier.init(ds_full.index(i), count=WARP_GROUPS)
    mbarrier.init(cleared, count=WARP_GROUPS)
    mbarrier.init(kv_full, count=1)
    fence_async_shared()

    first_row = (i_h.to(gl.int64) * n_tokens + q_start) * HEADS
    k_row = k_start + i_n * BLOCK_N
    tile = KeyTile(q_start, n_rows, k_row, n_keys, i_h, first, n_steps)
    args = PartitionArgs(
        *(d_q, d_g, d_k, d_v, p_neg_lse + first_row, p_delta + first_row, p_dk, p_dv),
        *(q_smem, g_smem, k_smem, v_smem, p_smem, ds_smem, neg_lse_smem, delta_smem),
        *(q_full, g_full, empty, cleared, kv_full, p_full, ds_full, tile, scale, q_offset, HKV, HEADS, D, CAUSAL),
    )
    gl.warp_specialize(
        [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
        [4, 1],
        [240, 24],
    )


def _group_descriptor(t: torch.Tensor, heads: int) -> TensorDescriptor:
    """t [T, H, D] in tiles of `BLOCK_R` rows: tokens, and of each `heads` heads side by side."""
    tma.bind_context()
    t = tma.compatible(t)
    block = [BLOCK_R.value // heads, heads, t.shape[2]]
    return TensorDescriptor(t, list(t.shape), [t.stride(0), t.shape[2], 1], block, tma.smem_layout(128, 16, 3))


def launch(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    neg_lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_k: int,
    causal: bool,
    scale: float,
    order: TwoPass,
    config: DkvConfig,
) -> None:
    """Write dk and dv as `attention_dkv_kernel` does, bit for bit.

    Args:
        g: [T, Hq, D], contiguous, bf16 or fp16, D 256, T > 0. q: likewise, any strides. k, v: [Tk, Hkv, D], Tk > 0,
            Hq / Hkv a power of two up to 64. neg_lse, delta: of `launch_delta`. dk, dv: [Tk, Hkv, D], contiguous.
            cu_q, cu_k: int32 [B + 1], B > 0. max_k: at least the most keys of one.

    Raises:
        ValueError: an order of other steps than 16, 32 or 64 rows.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), (n_keys, hkv, _) = q.shape, k.shape
    n_seqs, block_n = cu_q.shape[0] - 1, BLOCK_N.value
    equal = max_k * n_seqs == n_keys
    programs = cdiv(max_k, block_n) * n_seqs if equal else n_keys // block_n + n_seqs
    num_sms = runtime.multiprocessors(q.device)
    tile_order = cu_k if equal else lpt_order(cu_k, block_n)[0]
    recorded(attention_dkv_hopper_kernel)[(programs * hkv,)](
        *(_group_descriptor(t, hq // hkv) for t in (q, g)),
        *(tma.head_descriptor(t, block_n) for t in (k, v)),
        *(neg_lse, delta, dk, dv, cu_q, cu_k, tile_order, scale, n_tokens, n_seqs, num_sms),
        HKV=hkv,
        HEADS=hq // hkv,
        D=head_dim,
        CAUSAL=causal,
        EQUAL=equal,
        num_warps=4,
        **PINNED,
    )
