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

At head_dim 64 a third warp group takes dQ, and one reduce warp a step whole, as `backward_ahead` says.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bi_ops.attention.config import BackwardConfig, check_order
from bi_ops.attention.hopper.backward_ahead import consumer_ahead, dq_group
from bi_ops.attention.hopper.backward_args import DQ_STAGES, WARP_GROUPS, KeyTile, PartitionArgs
from bi_ops.attention.hopper.backward_consumer import consumer
from bi_ops.attention.hopper.backward_copies import producer, reduce
from bi_ops.attention.kernels.backward import attention_prepare_kernel
from bi_ops.attention.order import OnePass
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.pipeline import allocate_barriers
from bi_ops.gluon.tile_scheduler import cta_pairs, lpt_order


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
    d_dq,  # fp32 [HKV * HEADS * n_slots * D / 4, 256], a warp group's tiles as `_by_thread`: dQ / scale
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
    DQ_GROUP: gl.constexpr = D == 64  # a warp group of its own takes dQ
    PARTS: gl.constexpr = 1 if DQ_GROUP else WARP_GROUPS
    DQ_SLOTS: gl.constexpr = PARTS * DQ_STAGES
    k_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_k.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, D], d_q.layout)
    g_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, D], d_g.layout)
    ds_smem = gl.allocate_shared_memory(DTYPE, [DQ_STAGES, BLOCK_N, BLOCK_M], gl.NVMMASharedLayout(128, 16, 2))
    dq_smem = gl.allocate_shared_memory(gl.float32, [DQ_SLOTS, D // (4 * PARTS), 256], d_dq.layout)
    neg_lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], d_neg_lse.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], d_delta.layout)
    q_full = allocate_barriers(STAGES)
    g_full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    cleared = allocate_barriers(1)
    ds_full = allocate_barriers(DQ_STAGES)
    ds_empty = allocate_barriers(DQ_STAGES)
    dq_full = allocate_barriers(DQ_SLOTS)
    dq_ready = allocate_barriers(DQ_SLOTS)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(g_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARP_GROUPS)
    for i in gl.static_range(DQ_STAGES):
        mbarrier.init(ds_full.index(i), count=WARP_GROUPS)
        mbarrier.init(ds_empty.index(i), count=PARTS)
    for i in gl.static_range(DQ_SLOTS):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_ready.index(i), count=1)
    mbarrier.init(cleared.index(0), count=WARP_GROUPS)
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
        *(q_full, g_full, empty, cleared, kv_full, ds_full, ds_empty, dq_full, dq_ready),
        *(tile, scale, q_offset, HKV, HEADS, BLOCK_M, BLOCK_N, D, CAUSAL, DQ_GROUP),
    )
    if DQ_GROUP:
        gl.static_assert(STAGES > 2)  # Q of the next step is there while that of the step before still is
        gl.warp_specialize(
            [
                (consumer_ahead, (args, 0)),
                (consumer_ahead, (args, 1)),
                (dq_group, (args,)),
                (producer, (args,)),
                (reduce, (args, 0)),
                (reduce, (args, 1)),
            ],
            [4, 4, 1, 1, 1],
            [208, 72, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (args, 0)),
                (consumer, (args, 1)),
                (producer, (args,)),
                (reduce, (args, 0)),
                (reduce, (args, 1)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
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
    neg_lse, delta, total = (empty(q, shape, torch.float32) for shape in shapes[:3])
    semaphores = empty(q, shapes[3], torch.int32)
    n_tiles, slots = neg_lse.shape[1], semaphores.shape[1]
    if neg_lse.numel() >= 2**31:  # TMA counts in 32 bits
        raise ValueError(
            f"flash_attention: the backward pads {n_tokens} tokens in {n_seqs} sequences, times {hq} heads, to 2**31 "
            "rows or more; split the batch"
        )
    rows = head_dim // (4 if head_dim == 64 else 8)
    d_dq = TensorDescriptor.from_tensor(total, [rows, 256], tma.smem_layout(0, 32, 2))
    dq, dk, dv = empty(q, q.shape), empty(k, k.shape), empty(k, k.shape)
    recorded(attention_prepare_kernel)[(n_tiles * hq,)](
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
    recorded(attention_backward_kernel)[(programs * hkv,)](
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
        STAGES=4 if head_dim == 64 else 2,
        CAUSAL=causal,
        EQUAL=equal,
        num_warps=4,
        **PINNED,
    )
    return dq, dk, dv
