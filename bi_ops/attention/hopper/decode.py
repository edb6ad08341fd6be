"""Attention over a paged cache where few programs run, on Hopper, written in Gluon: `attention_kernel`'s bits.

The keys of a sequence are summed front to back by one program, so with few sequences one program's speed is what
counts, and one warp's is bound by its tensor cores. Here a program is

    products  4 warps  all rows of a pair in one tile of 64: S, the exponentials, O, as in `forward`
    loaders   1 warp for K and 1 for V: look pages up and have them copied into one ring of shared memory
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bi_ops.attention.config import DecodeConfig, check_order
from bi_ops.attention.hopper.descriptors import pages
from bi_ops.attention.hopper.parts import LOG2E, ROWS, clear_rows, inverse, softmax_step
from bi_ops.attention.order import KeySteps


@gluon.jit
def _pages(p_table, n, last, PAGE: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr):
    """The pages of the boxes of the step at key `n`; boxes past the one at key `last`, the last one, are that again."""
    found = ()
    for i in gl.static_range(BOXES):
        found += (gl.load(p_table + gl.minimum(n + i * BOX, last) // PAGE),)  # type: ignore[assignment]
    return found


@gluon.jit
def _load(descriptor, ring, bars, p_table, n_keys, place, IS_V: gl.constexpr, PAGE: gl.constexpr):
    SLOTS: gl.constexpr = ring.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    BOX: gl.constexpr = descriptor.block_type.shape[0]
    BOXES: gl.constexpr = BLOCK_N // BOX
    bar_full, bar_free = bars
    page_rows, row, column = place
    last = gl.maximum(n_keys - 1, 0) // BOX * BOX
    n_steps = (n_keys + BLOCK_N - 1) // BLOCK_N
    if n_steps > 0:
        found = _pages(p_table, 0, last, PAGE, BOX, BOXES)
        for i in range(0, n_steps):
            n = i * BLOCK_N
            # Asked for early: they are there when the next slot is free.
            later = _pages(p_table, n + BLOCK_N, last, PAGE, BOX, BOXES)
            # The ring is filled in the order in which it is read: K of a step before V of the step before it.
            if IS_V:
                position = 2 * i + 2
            else:
                position = gl.maximum(2 * i - 1, 0)
            slot = position % SLOTS
            mbarrier.wait(bar_free.index(slot), ((position // SLOTS) & 1) ^ 1)
            # The last tile of V goes to the products when the rows past the end are cleared, not when it has come.
            cut = IS_V and n_keys - n < BLOCK_N
            bar = bar_full.index(gl.where(cut, SLOTS, slot))
            mbarrier.expect(bar, BOXES * descriptor.block_type.nbytes)
            for j in gl.static_range(BOXES):
                key = gl.minimum(n + j * BOX, last)
                at = [found[j] * page_rows + row + key % PAGE, column]
                tma.async_copy_global_to_shared(descriptor, at, bar, ring.index(slot).slice(j * BOX, BOX))
            if IS_V and cut:
                mbarrier.wait(bar, 0)
                clear_rows(ring.index(slot), n_keys - n, 1)
                fence_async_shared()
                mbarrier.arrive(bar_full.index(slot))
            found = later


@gluon.jit
def _products(memory, tiles, bars, given, HKV: gl.constexpr, HEADS: gl.constexpr, CAUSAL: gl.constexpr):
    p_q, p_out = memory
    s_q, ring = tiles
    SLOTS: gl.constexpr = ring.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    D: gl.constexpr = ring.shape[2]
    DTYPE: gl.constexpr = ring.dtype
    bar_full, bar_free = bars
    pair_head, q_start, q_len, n_keys, stride_qt, stride_qh, scale = given
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    l_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    l_r: gl.constexpr = gl.SliceLayout(1, l_s)
    l_q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])

    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, l_q))
    o_h = pair_head * HEADS + o_r % HEADS
    o_q = (q_start + o_r // HEADS).to(gl.int64) * stride_qt + o_h * stride_qh
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_q))
    s_q.store(gl.load((p_q + o_q)[:, None] + o_d[None, :], mask=(o_r // HEADS < q_len)[:, None], other=0.0))
    fence_async_shared()

    lane = gl.arange(0, ROWS, l_r) // HEADS
    n_seen = lane * 0 + n_keys
    n_full = n_keys // BLOCK_N  # steps that every row sees wholly
    if CAUSAL:
        past = n_keys - q_len
        n_seen = gl.minimum(gl.maximum(lane + past + 1, 0), n_keys)
        n_full = gl.minimum(gl.maximum(past + 1, 0), n_keys) // BLOCK_N
    n_steps = (n_keys + BLOCK_N - 1) // BLOCK_N
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    total = gl.zeros((ROWS,), gl.float32, l_r)
    top = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
    scale2 = LOG2E * scale
    if n_steps > 0:
        mbarrier.wait(bar_full.index(0), 0)
        b_s = warpgroup_mma(s_q, ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(bar_free.index(0))
        b_p, top, decay, total = softmax_step(b_s, top, total, 0, n_seen, scale2, True)
        at = n_steps * 0 + 1  # of the step's K in the ring; V of the step before it comes next
        mbarrier.wait(bar_full.index(at % SLOTS), (at // SLOTS) & 1, pred=n_steps > 1)
        for MASKED in gl.static_range(2):
            if MASKED == 0:
                begin = n_steps * 0 + 1
                stop = n_full
            else:
                begin = gl.maximum(n_full, 1)
                stop = n_steps
            for i in range(begin, stop):
                slot = at % SLOTS
                slot_v = (at + 1) % SLOTS
                b_s = warpgroup_mma(s_q, ring.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
                mbarrier.wait(bar_full.index(slot_v), ((at + 1) // SLOTS) & 1)
                b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
                b_o = warpgroup_mma(b_pt, ring.index(slot_v), acc, is_async=True)
                b_s = warpgroup_mma_wait(1, deps=(b_s,))
                mbarrier.arrive(bar_free.index(slot))
                b_p, top, decay, total = softmax_step(b_s, top, total, i * BLOCK_N, n_seen, scale2, MASKED == 1)
                at += 2
                # Asked for early, as in `forward`.
                mbarrier.wait(bar_full.index(at % SLOTS), (at // SLOTS) & 1, pred=i + 1 < n_steps)
                acc = warpgroup_mma_wait(0, deps=(b_o,))
                mbarrier.arrive(bar_free.index(slot_v))
                acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, l_o))[:, None]
        at += 1
        mbarrier.wait(bar_full.index(at % SLOTS), (at // SLOTS) & 1)
        b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
        b_o = warpgroup_mma(b_pt, ring.index(at % SLOTS), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(b_o,))

    divisor = gl.where(total > 0, total, 1.0)
    b_out = (acc * gl.convert_layout(inverse(divisor), gl.SliceLayout(1, l_o))[:, None]).to(DTYPE)
    o_r = gl.arange(0, ROWS, gl.SliceLayout(1, l_o))
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_o))
    o_out = ((q_start + o_r // HEADS).to(gl.int64) * (HKV * HEADS) + pair_head * HEADS + o_r % HEADS) * D
    gl.store(p_out + o_out[:, None] + o_d[None, :], b_out, mask=(o_r // HEADS < q_len)[:, None])


@gluon.jit(
    do_not_specialize=[
        "stride_table",
        *("page_rows_k", "head_rows_k", "head_columns_k"),
        *("page_rows_v", "head_rows_v", "head_columns_v"),
    ]
)
def attention_decode_kernel(
    d_k,  # as `descriptors.pages` makes it, tiles [BOX, D]
    d_v,
    p_q,  # [T, HKV * HEADS, D]
    p_out,  # as p_q, contiguous
    p_cu_q,  # int32 [B + 1]
    p_lengths,  # int32 [B], of keys
    p_table,  # int32 [B, max_blocks]
    scale,  # softmax_scale
    stride_qt,
    stride_qh,
    stride_table,
    page_rows_k,  # rows of d_k from page to page
    head_rows_k,  # rows from head to head
    head_columns_k,  # and columns
    page_rows_v,
    head_rows_v,
    head_columns_v,
    HKV: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
    SLOTS: gl.constexpr,  # tiles of K or V in shared memory
    TOGETHER: gl.constexpr,  # programs that fit into a multiprocessor
    CAUSAL: gl.constexpr,
):
    DTYPE: gl.constexpr = d_k.dtype
    REGS: gl.constexpr = 56 if TOGETHER == 1 else 24  # with 24 what the last tile of V needs is spilled
    s_q = gl.allocate_shared_memory(DTYPE, [ROWS, D], gl.NVMMASharedLayout(128, 16, 2))
    ring = gl.allocate_shared_memory(DTYPE, [SLOTS, BLOCK_N, D], d_k.layout)
    bar_full = gl.allocate_shared_memory(gl.int64, [SLOTS + 1, 1], mbarrier.MBarrierLayout())
    bar_free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS + 1):
        mbarrier.init(bar_full.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(bar_free.index(i), count=1)
    fence_async_shared()

    i_b = gl.program_id(0) // HKV
    head = gl.program_id(0) % HKV
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    n_keys = gl.load(p_lengths + i_b)
    n_keys = gl.where(q_len > 0, n_keys, 0)
    p_table += i_b * stride_table
    bars = (bar_full, bar_free)
    given = (head, q_start, q_len, n_keys, stride_qt, stride_qh, scale)
    place_k = (page_rows_k, head * head_rows_k, head * head_columns_k)
    place_v = (page_rows_v, head * head_rows_v, head * head_columns_v)
    gl.warp_specialize(
        [
            (_products, ((p_q, p_out), (s_q, ring), bars, given, HKV, HEADS, CAUSAL)),
            (_load, (d_k, ring, bars, p_table, n_keys, place_k, False, PAGE)),
            (_load, (d_v, ring, bars, p_table, n_keys, place_v, True, PAGE)),
        ],
        [1, 1],
        [REGS, REGS],
    )


def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    lengths: torch.Tensor,
    causal: bool,
    scale: float,
    order: KeySteps,
    config: DecodeConfig,
) -> torch.Tensor:
    """[T, Hq, D], contiguous: as `attention_kernel` computes it in this order, bit for bit.

    Args:
        q: [T, Hq, D], bf16 or fp16, D 64, 128 or 256, at most 64 rows (query, head of a key head) in a sequence.
        k_cache, v_cache: [blocks, block_size, Hkv, D], as `descriptors.paged` asks. table: int32 [B, max_blocks], both
            > 0, dense in its last dimension. cu_q: int32 [B + 1]. lengths: int32 [B].

    Raises:
        ValueError: an order of other steps than 64 or 128 keys.
    """
    check_order(config, order)
    q = q if q.stride(2) == 1 else q.contiguous()
    hq, head_dim = q.shape[1:]
    page, hkv = k_cache.shape[1:3]
    out = q.new_empty(q.shape)
    box = math.gcd(page, order.block_n)
    (d_k, *place_k), (d_v, *place_v) = pages(k_cache, box), pages(v_cache, box)
    attention_decode_kernel[(table.shape[0] * hkv,)](
        *(d_k, d_v, q, out, cu_q, lengths, table, scale, *q.stride()[:2], table.stride(0), *place_k, *place_v),
        HKV=hkv,
        HEADS=hq // hkv,
        D=head_dim,
        BLOCK_N=order.block_n,
        PAGE=page,
        SLOTS=config.stages,
        TOGETHER=config.ctas_per_sm,
        CAUSAL=causal,
        num_warps=4,
        maxnreg=168 if config.ctas_per_sm == 1 else 128,  # at the start; then the products take from the loaders
    )
    return out
