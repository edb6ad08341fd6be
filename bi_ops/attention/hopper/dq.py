"""dQ on Hopper at head_dim 256, warp-specialised, written in Gluon: `attention_dq_kernel`'s bits.

CTAs are persistent: each takes a tile of queries of one head, and another when that is done, until none is left.

    producer  1 warp       has TMA copy the tile's Q and dO, then K and V step by step: two steps of K, for S and later
                           for dQ, and one of V fit into shared memory beside Q and dO
    consumers 2 x 4 warps  64 rows each. dQ of a step, from dS in registers, is issued together with S and dP of the
                           next step, and P is taken while dP runs
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

from bi_ops.attention.config import DqConfig, check_order
from bi_ops.attention.hopper.common import ROWS, clear_share, wgmma_layout
from bi_ops.attention.kernels.common import LOG2E
from bi_ops.attention.order import TwoPass
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, filled, recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, arrive, opaque_zero, wait_empty, wait_full
from bi_ops.gluon.tile_scheduler import Sequences, fetch_add, get_tile, key_steps, lpt_order

WARP_GROUPS = gl.constexpr(2)
BLOCK_N = gl.constexpr(64)  # keys of a step: part of the order
STAGES = gl.constexpr(2)  # of K
BLOCK_M = gl.constexpr(128)  # queries of a tile, 64 for each warp group


@aggregate
class PartitionArgs:
    """What every partition is given."""

    q_desc: tma.tensor_descriptor
    g_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    neg_lse: gl.tensor
    delta: gl.tensor
    dq: gl.tensor
    q_smem: gl.shared_memory_descriptor  # a tile for each warp group, as dO has
    g_smem: gl.shared_memory_descriptor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    g_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    g_empty: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    cleared: gl.shared_memory_descriptor  # of a last K that is not full: each warp group has cleared its share
    sequences: Sequences
    scale: Scalar
    n_tokens: Scalar
    H: gl.constexpr
    HEADS: gl.constexpr
    CAUSAL: gl.constexpr
    EQUAL: gl.constexpr


@gluon.jit
def _load_k(args, step, row, column):
    stage = step % STAGES
    wait_empty(args.k_empty, step)
    full = args.k_full.index(stage)
    mbarrier.expect(full, args.k_desc.block_type.nbytes)
    tma.async_load(args.k_desc, [row, column], full, args.k_smem.index(stage))


@gluon.jit
def _producer(args):
    D: gl.constexpr = args.k_smem.shape[2]
    sequences = args.sequences
    n_tiles = sequences.n_tiles
    p_tile_id = sequences.tile_ids + gl.program_id(0) * WARP_GROUPS
    tiles = n_tiles * 0
    step = n_tiles * 0
    i_tile = gl.program_id(0)
    while i_tile < n_tiles * args.H:
        tile = get_tile(sequences, i_tile, args.H, BLOCK_M, args.EQUAL)
        n_steps, _ = key_steps(tile.m, tile.q_len, tile.k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
        if tile.m < tile.q_len:
            column = tile.head // args.HEADS * D
            # In the order in which stages become empty.
            if n_steps > 0:
                _load_k(args, step, tile.k_start, column)
            for group in gl.static_range(WARP_GROUPS):
                mbarrier.wait(args.q_empty.index(group), (tiles & 1) ^ 1)
                gl.store(p_tile_id + group, i_tile)
                q_full = args.q_full.index(group)
                mbarrier.expect(q_full, args.q_desc.block_type.nbytes)
                row = tile.q_start + tile.m + group * ROWS
                tma.async_load(args.q_desc, [row, tile.head * D], q_full, args.q_smem.index(group))
                mbarrier.wait(args.g_empty.index(group), (tiles & 1) ^ 1)
                g_full = args.g_full.index(group)
                mbarrier.expect(g_full, args.g_desc.block_type.nbytes)
                tma.async_load(args.g_desc, [row, tile.head * D], g_full, args.g_smem.index(group))
            for i in range(0, n_steps):
                row = tile.k_start + i * BLOCK_N
                mbarrier.wait(args.v_empty, (step & 1) ^ 1)
                mbarrier.expect(args.v_full, args.v_desc.block_type.nbytes)
                tma.async_load(args.v_desc, [row, column], args.v_full, args.v_smem.index(0))
                step += 1
                if i + 1 < n_steps:
                    _load_k(args, step, row + BLOCK_N, column)
            tiles += 1
        i_tile = gl.num_programs(0) + fetch_add(sequences.counter)
    # No tile is left: consumers find a number past the last.
    for group in gl.static_range(WARP_GROUPS):
        mbarrier.wait(args.q_empty.index(group), (tiles & 1) ^ 1)
        gl.store(p_tile_id + group, n_tiles * args.H)
        mbarrier.arrive(args.q_full.index(group))


@gluon.jit
def _issue_nt(a, b, zeros):
    """Issue a @ b.T."""
    return warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _clear_share(args, step, n_valid, WARP_GROUP: gl.constexpr):
    """Clear keys past the end of the sequence, a share by each warp group, also by one whose rows do not see them."""
    if n_valid < BLOCK_N:
        wait_full(args.k_full, step)
        clear_share(args.k_smem.index(step % STAGES), n_valid, WARP_GROUP, WARP_GROUPS)
        fence_async_shared()
        mbarrier.arrive(args.cleared)


@gluon.jit
def _clear_keys(args, step, n_valid, tails, WARP_GROUP: gl.constexpr):
    """Wait until the keys past the end of the sequence are cleared: dS is 0 there, but 0 * NaN would be NaN."""
    _clear_share(args, step, n_valid, WARP_GROUP)
    if n_valid < BLOCK_N:
        mbarrier.wait(args.cleared, tails & 1)


@gluon.jit
def _probabilities(b_s, neg_lse, scale2):
    return gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(neg_lse[:, None], b_s)[0]))


@gluon.jit
def _ds(b_p, b_dp, delta, n, n_seen, dtype: gl.constexpr, MASKED: gl.constexpr):
    """dS. Where a key is not seen it is 0: P there need not be, and dP of a row past the end may be NaN."""
    b_ds = b_p * (b_dp - delta[:, None])
    if MASKED:
        o_n = gl.arange(0, b_ds.shape[1], gl.SliceLayout(0, b_ds.type.layout))
        b_ds = gl.where(o_n[None, :] < (n_seen - n)[:, None], b_ds, 0.0)
    return b_ds.to(dtype)


@gluon.jit
def _mainloop(
    args,
    n_seen,
    k_len,
    neg_lse,
    delta,
    scale2,
    step,
    tiles,
    tails,
    n_steps,
    n_full,
    l_o: gl.constexpr,
    WARP_GROUP: gl.constexpr,
):
    """dQ before it is scaled, of a warp group's rows that see something, from `step` of the pipelines on."""
    q_smem, g_smem, k_smem, v_smem = args.q_smem, args.g_smem, args.k_smem, args.v_smem
    D: gl.constexpr = k_smem.shape[2]
    DTYPE: gl.constexpr = k_smem.dtype
    l_s: gl.constexpr = n_seen.type.layout.parent
    l_ds: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    wait_full(args.k_full, step)
    _clear_keys(args, step, k_len, tails, WARP_GROUP)
    b_s = _issue_nt(q_smem.index(opaque_zero(step) + WARP_GROUP), k_smem.index(step % STAGES), zeros)
    mbarrier.wait(args.g_full.index(WARP_GROUP), tiles & 1)
    mbarrier.wait(args.v_full, step & 1)
    b_dp = _issue_nt(g_smem.index(opaque_zero(step) + WARP_GROUP), v_smem.index(opaque_zero(step)), zeros)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    mbarrier.arrive(args.q_empty.index(WARP_GROUP), pred=n_steps == 1)
    b_p = _probabilities(b_s, neg_lse, scale2)
    mbarrier.wait(args.v_full, step & 1)  # again: without a barrier ptxas waits for dP before the exponentials
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    mbarrier.arrive(args.v_empty)
    b_ds = _ds(b_p, b_dp, delta, 0, n_seen, DTYPE, True)
    n_whole = gl.minimum(n_full, n_steps - 1)  # Q is released in the last step, which is in the masked loop
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + 1
            stop = n_whole
        else:
            begin = gl.maximum(n_whole, 1)
            stop = n_steps
        for i in range(begin, stop):
            now = step + i
            stage, before = now % STAGES, (now - 1) % STAGES
            if MASKED:
                _clear_keys(args, now, k_len - i * BLOCK_N, tails, WARP_GROUP)
            b_o = warpgroup_mma(gl.convert_layout(b_ds, l_ds), k_smem.index(before), acc, is_async=True)
            wait_full(args.k_full, now)
            b_s = _issue_nt(q_smem.index(opaque_zero(now) + WARP_GROUP), k_smem.index(stage), zeros)
            mbarrier.wait(args.v_full, now & 1)
            b_dp = _issue_nt(g_smem.index(opaque_zero(now) + WARP_GROUP), v_smem.index(opaque_zero(now)), zeros)
            acc = warpgroup_mma_wait(2, deps=(b_o,))
            mbarrier.arrive(args.k_empty.index(before))
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            if MASKED:
                mbarrier.arrive(args.q_empty.index(WARP_GROUP), pred=i + 1 == n_steps)
            b_p = _probabilities(b_s, neg_lse, scale2)
            mbarrier.wait(args.v_full, now & 1)  # again, as above
            b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
            mbarrier.arrive(args.v_empty)
            b_ds = _ds(b_p, b_dp, delta, i * BLOCK_N, n_seen, DTYPE, MASKED == 1)
    mbarrier.arrive(args.g_empty.index(WARP_GROUP))
    last = (step + n_steps - 1) % STAGES
    b_o = warpgroup_mma(gl.convert_layout(b_ds, l_ds), k_smem.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(args.k_empty.index(last))
    return acc


@gluon.jit
def _epilogue(args, acc, tile, WARP_GROUP: gl.constexpr):
    """Scale dQ and store it."""
    D: gl.constexpr = acc.shape[1]
    DTYPE: gl.constexpr = args.dq.dtype.element_ty
    # The accumulator's layout, but threads swap two of their values in a register with two in the next: rows are then
    # written 32 bytes at a time. To reorder more takes shared memory, and none is left.
    l_out: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS, D],
    )
    b_out = gl.convert_layout((acc * args.scale).to(DTYPE), l_out)
    o_t = tile.m + WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_out))
    o_out = ((tile.q_start + o_t).to(gl.int64) * args.H + tile.head) * D
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_out))
    gl.store(args.dq + o_out[:, None] + o_d[None, :], b_out, mask=(o_t < tile.q_len)[:, None])


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    D: gl.constexpr = args.k_smem.shape[2]
    HEADS: gl.constexpr = args.HEADS
    sequences = args.sequences
    n_tiles = sequences.n_tiles
    p_tile_id = sequences.tile_ids + gl.program_id(0) * WARP_GROUPS + WARP_GROUP
    l_s: gl.constexpr = wgmma_layout(BLOCK_N)
    l_o: gl.constexpr = wgmma_layout(D)
    lane = WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_s))
    scale2 = LOG2E * args.scale
    tiles = n_tiles * 0
    step = n_tiles * 0
    tails = n_tiles * 0
    mbarrier.wait(args.q_full.index(WARP_GROUP), 0)
    i_tile = gl.load(p_tile_id)
    while i_tile < n_tiles * args.H:
        tile = get_tile(sequences, i_tile, args.H, BLOCK_M, args.EQUAL)
        m, q_len, k_len = tile.m, tile.q_len, tile.k_len
        n_loaded, _ = key_steps(m, q_len, k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
        n_steps, n_full = key_steps(m + WARP_GROUP * ROWS, q_len, k_len, ROWS, BLOCK_N, args.CAUSAL)
        n_seen = lane * 0 + k_len
        if args.CAUSAL:
            n_seen = gl.minimum(gl.maximum(m + lane + (k_len - q_len) + 1, 0), k_len)
        m_r = m + lane < q_len
        o_row = (tile.head // HEADS).to(gl.int64) * args.n_tokens + tile.q_start + m + lane
        o_row = o_row * HEADS + tile.head % HEADS
        neg_lse = gl.load(args.neg_lse + o_row, mask=m_r, other=0.0)
        delta = gl.load(args.delta + o_row, mask=m_r, other=0.0)
        acc = gl.zeros((ROWS, D), gl.float32, l_o)
        if n_steps > 0:
            acc = _mainloop(
                args, n_seen, k_len, neg_lse, delta, scale2, step, tiles, tails, n_steps, n_full, l_o, WARP_GROUP
            )
        else:
            mbarrier.wait(args.g_full.index(WARP_GROUP), tiles & 1)
            mbarrier.arrive(args.q_empty.index(WARP_GROUP))
            mbarrier.arrive(args.g_empty.index(WARP_GROUP))
        for i in range(step + n_steps, step + n_loaded):  # what only the other warp group's rows see
            wait_full(args.k_full, i)
            _clear_share(args, i, k_len - (i - step) * BLOCK_N, WARP_GROUP)
            arrive(args.k_empty, i)
            mbarrier.wait(args.v_full, i & 1)
            mbarrier.arrive(args.v_empty)
        step += n_loaded
        tails += (n_loaded * BLOCK_N > k_len).to(gl.int32)
        _epilogue(args, acc, tile, WARP_GROUP)
        tiles += 1
        mbarrier.wait(args.q_full.index(WARP_GROUP), tiles & 1)
        i_tile = gl.load(p_tile_id)


@gluon.jit(do_not_specialize=["n_tokens", "n_seqs", "n_tiles"])
def attention_dq_hopper_kernel(
    d_q,  # [T, H * D], tiles [ROWS, D]
    d_g,  # as d_q
    d_k,  # [Tk, H / HEADS * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    p_neg_lse,  # fp32 [H / HEADS, T, HEADS]: -lse in log2
    p_delta,  # fp32 [H / HEADS, T, HEADS]: row sums of dO * O
    p_dq,  # [T, H, D], contiguous
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_order,  # int32 [2, B] of `lpt_order`; not read if EQUAL
    p_counter,  # int32 [1]: 0; tiles taken after each CTA's first
    p_tile_ids,  # int32 [CTAs, WARP_GROUPS], uninitialised: which tile a warp group's Q belongs to
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    n_tiles,  # of BLOCK_M queries: as many as there are if EQUAL, else at least
    H: gl.constexpr,
    HEADS: gl.constexpr,  # query heads of a KV head
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,  # all sequences have as many queries
):
    DTYPE: gl.constexpr = d_q.dtype
    q_smem = gl.allocate_shared_memory(DTYPE, [WARP_GROUPS, ROWS, D], d_q.layout)
    g_smem = gl.allocate_shared_memory(DTYPE, [WARP_GROUPS, ROWS, D], d_g.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], d_k.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    q_full = allocate_barriers(WARP_GROUPS)
    g_full = allocate_barriers(WARP_GROUPS)
    k_full = allocate_barriers(STAGES)
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = allocate_barriers(WARP_GROUPS)
    g_empty = allocate_barriers(WARP_GROUPS)
    k_empty = allocate_barriers(STAGES)
    v_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    cleared = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(cleared, count=WARP_GROUPS)
    for i in gl.static_range(WARP_GROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(g_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WARP_GROUPS)
    mbarrier.init(v_full, count=1)
    mbarrier.init(v_empty, count=WARP_GROUPS)
    fence_async_shared()

    sequences = Sequences(p_cu_q, p_cu_k, p_order, p_counter, p_tile_ids, n_seqs, n_tiles)
    args = PartitionArgs(
        *(d_q, d_g, d_k, d_v, p_neg_lse, p_delta, p_dq, q_smem, g_smem, k_smem, v_smem),
        *(q_full, g_full, k_full, v_full, q_empty, g_empty, k_empty, v_empty, cleared),
        *(sequences, scale, n_tokens, H, HEADS, CAUSAL, EQUAL),
    )
    gl.warp_specialize(
        [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
        [4, 1],
        [240, 24],
    )


def launch(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    neg_lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    causal: bool,
    scale: float,
    order: TwoPass,
    config: DqConfig,
) -> None:
    """Write dq as `attention_dq_kernel` does, bit for bit.

    Args:
        g: [T, Hq, D], contiguous, bf16 or fp16, D 256, T > 0. q: likewise, any strides. k, v: [Tk, Hkv, D], Tk > 0.
            neg_lse, delta: of `launch_delta`. dq: [T, Hq, D], contiguous. cu_q, cu_k: int32 [B + 1], B > 0. max_q: at
            least the most queries of one.

    Raises:
        ValueError: an order of other steps than 64 keys.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), hkv = q.shape, k.shape[1]
    n_seqs = cu_q.shape[0] - 1
    equal = max_q * n_seqs == n_tokens
    block_m = BLOCK_M.value
    n_tiles = cdiv(max_q, block_m) * n_seqs if equal else n_tokens // block_m + n_seqs
    tile_order, counter = (cu_q, filled(cu_q, 1)) if equal else lpt_order(cu_q, block_m)
    programs = min(n_tiles * hq, runtime.multiprocessors(q.device))
    recorded(attention_dq_hopper_kernel)[(programs,)](
        *(tma.head_descriptor(t, ROWS.value) for t in (q, g)),
        *(tma.head_descriptor(t, BLOCK_N.value) for t in (k, v)),
        *(neg_lse, delta, dq, cu_q, cu_k, tile_order, counter, empty(cu_q, (programs, WARP_GROUPS.value))),
        *(scale, n_tokens, n_seqs, n_tiles),
        H=hq,
        HEADS=hq // hkv,
        D=head_dim,
        CAUSAL=causal,
        EQUAL=equal,
        num_warps=4,
        **PINNED,
    )
