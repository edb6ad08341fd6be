"""Attention over a paged KV cache on Hopper, warp-specialised, written in Gluon: `attention_kernel`'s bits.

Decoding, and prefill beside it in one launch. One CTA sums the keys of a sequence front to back, for a tile of 64 rows
(query, head of a KV head). With few sequences the speed of one CTA is what counts, and that of a single warp would be
bound by its tensor core. Here a CTA is

    consumer  4 warps                      the rows of a tile: S, softmax, O
    producers 1 warp for K and 1 for V     look pages up in the block table and copy them into shared stages by TMA

The grid depends on the numbers of tokens and sequences alone, so a CUDA graph holds every split of its tokens into
sequences: `first_or_later_tile` says which tile a CTA takes. A head size that is no power of two has columns of what
lies beside it in shared memory, the same token's: Q is 0 there, and O is not stored.

In a captured graph the kernel starts while the one before still runs, and looks the pages up (`bi_ops.core.pdl`). Keys
wait, those of earlier tokens too: another sequence of the batch may compute a prefix that both share.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bi_ops.attention.config import DecodeConfig, block_d, check_order
from bi_ops.attention.hopper.common import ROWS, clear_end, clear_outside, row_layout, wgmma_layout
from bi_ops.attention.hopper.pages import CacheLayout, last_box, load_last_pages, load_pages, lookup_pages
from bi_ops.attention.hopper.softmax import online_softmax, reciprocal
from bi_ops.attention.kernels.common import LOG2E
from bi_ops.attention.order import KeySteps
from bi_ops.core import pdl
from bi_ops.core.launches import recorded
from bi_ops.core.pdl import launch_dependents, wait_for_predecessors
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, arrive, init_barriers, wait_empty
from bi_ops.gluon.tile_scheduler import first_or_later_tile


@aggregate
class PartitionArgs:
    """What every partition is given. K and V alternate in the stages of `kv_smem`: K0, K1, V0, K2, V1, and so on."""

    kv_smem: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # one for each stage, and one for the last V, which is yet to be cleared
    empty: gl.shared_memory_descriptor
    block_table: gl.tensor  # of the sequence
    n_keys: gl.tensor
    end: gl.tensor  # of the keys that any row of the tile sees
    q: gl.tensor
    out: gl.tensor
    cu_q: gl.tensor
    n_seqs: Scalar
    n_tokens: Scalar
    q_smem: gl.shared_memory_descriptor
    kv_head: gl.tensor
    q_start: gl.tensor
    q_len: gl.tensor
    row: gl.tensor  # the tile's first, among the sequence's (query, head of the KV head)
    stride_qt: Scalar
    stride_qh: Scalar
    scale: Scalar
    HKV: gl.constexpr
    HEADS: gl.constexpr
    D: gl.constexpr  # the head size; tiles in shared memory have a power of two
    PAGE: gl.constexpr
    CAUSAL: gl.constexpr
    LARGE: gl.constexpr


@gluon.jit
def _position(i, IS_V: gl.constexpr):
    """The place of a step's K or V among the tiles, which come as they are read: K before V of the step before it."""
    if IS_V:
        return 2 * i + 2
    else:
        return gl.maximum(2 * i - 1, 0)


@gluon.jit
def _producer(desc, args, cache, IS_V: gl.constexpr):
    STAGES: gl.constexpr = args.kv_smem.shape[0]
    BLOCK_N: gl.constexpr = args.kv_smem.shape[1]
    BOX: gl.constexpr = desc.block_type.shape[0]
    BOXES: gl.constexpr = BLOCK_N // BOX
    PAGE: gl.constexpr = args.PAGE
    n_keys = args.n_keys
    last = last_box(n_keys, BOX)
    n_steps = (args.end + BLOCK_N - 1) // BLOCK_N
    if n_steps > 0:
        pages = lookup_pages(args.block_table, 0, last, PAGE, BOX, BOXES)
        wait_for_predecessors()
        n_whole = gl.minimum(n_keys // BLOCK_N, n_steps)
        for i in range(0, n_whole):
            # Looked up early: the pages are known when the next stage is empty.
            next_pages = lookup_pages(args.block_table, (i + 1) * BLOCK_N, last, PAGE, BOX, BOXES)
            position = _position(i, IS_V)
            stage = position % STAGES
            wait_empty(args.empty, position)
            mbarrier.expect(args.full.index(stage), BOXES * desc.block_type.nbytes)
            load_pages(desc, pages, i * BLOCK_N, last, cache, args.full.index(stage), args.kv_smem.index(stage), PAGE)
            pages = next_pages
        for i in range(n_whole, n_steps):  # at most one; as a loop it takes fewer registers
            n = i * BLOCK_N
            position = _position(i, IS_V)
            stage = position % STAGES
            tile = args.kv_smem.index(stage)
            wait_empty(args.empty, position)
            # V is full for the consumer when its rows past the end are cleared, not when it has come.
            full = args.full.index(STAGES if IS_V else stage)
            load_last_pages(desc, pages, n, last, cache, full, tile, PAGE)
            if IS_V:
                clear_end(tile, n_keys - n, last - n + BOX, False)
                mbarrier.wait(full, 0)
                clear_end(tile, n_keys - n, last - n + BOX, True)
                fence_async_shared()
                mbarrier.arrive(args.full.index(stage))
    if not IS_V:  # while the consumer takes the last steps
        wait_for_predecessors()
        N: gl.constexpr = args.HKV * args.HEADS * args.D
        clear_outside(args.out, args.cu_q, args.n_seqs, args.n_tokens, N, 1, N)


@gluon.jit
def _wait_full(args, step, pred=True):
    STAGES: gl.constexpr = args.empty.shape[0]
    mbarrier.wait(args.full.index(step % STAGES), step // STAGES & 1, pred=pred)


@gluon.jit
def _store_q(args):
    """Q of the tile to shared memory, the heads packed into rows; zeros past the last query and past the head size."""
    BLOCK_D: gl.constexpr = args.kv_smem.shape[2]
    HEADS: gl.constexpr = args.HEADS
    l_q: gl.constexpr = row_layout(BLOCK_D, 4)
    o_r = args.row + gl.arange(0, ROWS, gl.SliceLayout(1, l_q))
    o_h = args.kv_head * HEADS + o_r % HEADS
    LARGE: gl.constexpr = args.LARGE
    if LARGE:
        o_h = o_h.to(gl.int64)
    o_q = (args.q_start + o_r // HEADS).to(gl.int64) * args.stride_qt + o_h * args.stride_qh
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, l_q))
    mask = (o_r // HEADS < args.q_len)[:, None] & (o_d < args.D)[None, :]
    args.q_smem.store(gl.load((args.q + o_q)[:, None] + o_d[None, :], mask=mask, other=0.0))
    fence_async_shared()


@gluon.jit
def _epilogue(args, acc, row_sum):
    """Divide O by the row sums and store it."""
    BLOCK_D: gl.constexpr = acc.shape[1]
    HEADS: gl.constexpr = args.HEADS
    l_o: gl.constexpr = acc.type.layout
    divisor = gl.where(row_sum > 0, row_sum, 1.0)
    b_out = (acc * gl.convert_layout(reciprocal(divisor), gl.SliceLayout(1, l_o))[:, None]).to(args.q_smem.dtype)
    o_r = args.row + gl.arange(0, ROWS, gl.SliceLayout(1, l_o))
    o_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, l_o))
    o_t = (args.q_start + o_r // HEADS).to(gl.int64)
    o_out = (o_t * (args.HKV * HEADS) + args.kv_head * HEADS + o_r % HEADS) * args.D
    mask = (o_r // HEADS < args.q_len)[:, None] & (o_d < args.D)[None, :]
    gl.store(args.out + o_out[:, None] + o_d[None, :], b_out, mask=mask)


@gluon.jit
def _consumer(args):
    q_smem, kv_smem = args.q_smem, args.kv_smem
    STAGES: gl.constexpr = kv_smem.shape[0]
    BLOCK_N: gl.constexpr = kv_smem.shape[1]
    BLOCK_D: gl.constexpr = kv_smem.shape[2]
    DTYPE: gl.constexpr = kv_smem.dtype
    l_s: gl.constexpr = wgmma_layout(BLOCK_N)
    l_o: gl.constexpr = wgmma_layout(BLOCK_D)
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    l_r: gl.constexpr = gl.SliceLayout(1, l_s)
    n_keys = args.n_keys
    wait_for_predecessors()
    _store_q(args)

    o_t = (args.row + gl.arange(0, ROWS, l_r)) // args.HEADS
    n_seen = o_t * 0 + n_keys
    n_full = n_keys // BLOCK_N  # steps that every row sees wholly
    if args.CAUSAL:
        past = n_keys - args.q_len
        n_seen = gl.minimum(gl.maximum(o_t + past + 1, 0), n_keys)
        n_full = gl.minimum(gl.maximum(args.row // args.HEADS + past + 1, 0), n_keys) // BLOCK_N
    n_steps = (args.end + BLOCK_N - 1) // BLOCK_N
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, BLOCK_D), gl.float32, l_o)
    row_sum = gl.zeros((ROWS,), gl.float32, l_r)
    row_max = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
    scale2 = LOG2E * args.scale
    if n_steps > 0:
        mbarrier.wait(args.full.index(0), 0)
        b_s = warpgroup_mma(q_smem, kv_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_s = warpgroup_mma_wait(0, deps=(b_s,))
        mbarrier.arrive(args.empty.index(0))
        b_p, row_max, rescale, row_sum = online_softmax(b_s, row_max, row_sum, 0, n_seen, scale2, True)
        position = n_steps * 0 + 1  # of the step's K among the stages; V of the step before comes next
        _wait_full(args, position, n_steps > 1)
        for MASKED in gl.static_range(2):
            if MASKED == 0:
                begin = n_steps * 0 + 1
                stop = n_full
            else:
                begin = gl.maximum(n_full, 1)
                stop = n_steps
            for i in range(begin, stop):
                k_stage = position % STAGES
                v_stage = (position + 1) % STAGES
                b_s = warpgroup_mma(q_smem, kv_smem.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                _wait_full(args, position + 1)
                b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
                b_o = warpgroup_mma(b_pt, kv_smem.index(v_stage), acc, is_async=True)
                b_s = warpgroup_mma_wait(1, deps=(b_s,))
                arrive(args.empty, position)
                b_p, row_max, rescale, row_sum = online_softmax(
                    b_s, row_max, row_sum, i * BLOCK_N, n_seen, scale2, MASKED == 1
                )
                position += 2
                # Waited for early, as in `mainloop`.
                _wait_full(args, position, i + 1 < n_steps)
                acc = warpgroup_mma_wait(0, deps=(b_o,))
                mbarrier.arrive(args.empty.index(v_stage))
                acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, l_o))[:, None]
        position += 1
        _wait_full(args, position)
        b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
        b_o = warpgroup_mma(b_pt, kv_smem.index(position % STAGES), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(b_o,))
    _epilogue(args, acc, row_sum)


@gluon.jit(
    do_not_specialize=[
        *("n_tokens", "n_seqs", "stride_table"),
        *("page_rows_k", "head_rows_k", "head_columns_k"),
        *("page_rows_v", "head_rows_v", "head_columns_v", "prefetch"),
    ]
)
def attention_decode_kernel(
    d_k,  # of `tma.cache_descriptor`, tiles [BOX, BLOCK_D]
    d_v,
    p_q,  # [T, HKV * HEADS, D]
    p_out,  # as p_q, contiguous
    p_cu_q,  # int32 [B + 1]
    p_lengths,  # int32 [B], of keys
    p_table,  # int32 [B, max_blocks]
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    stride_qt,
    stride_qh,
    stride_table,
    page_rows_k,  # rows of d_k from page to page
    head_rows_k,  # rows from head to head
    head_columns_k,  # and columns
    page_rows_v,
    head_rows_v,
    head_columns_v,
    prefetch,  # 1: no kernel in flight writes p_cu_q, p_lengths or p_table
    HKV: gl.constexpr,
    HEADS: gl.constexpr,  # query heads of a KV head
    D: gl.constexpr,
    BLOCK_D: gl.constexpr,  # D, rounded up to a power of two
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
    STAGES: gl.constexpr,  # tiles of K or V in shared memory
    CTAS_PER_SM: gl.constexpr,
    CAUSAL: gl.constexpr,
    LARGE: gl.constexpr,  # offsets of heads in q or of sequences in the table need 64 bits
):
    DTYPE: gl.constexpr = d_k.dtype
    # Registers of a producer: with 24 what the last V's clearing needs is spilled.
    REGS: gl.constexpr = 56 if CTAS_PER_SM == 1 else 24
    q_smem = gl.allocate_shared_memory(DTYPE, [ROWS, BLOCK_D], gl.NVMMASharedLayout(128, 16, 2))
    kv_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, BLOCK_D], d_k.layout)
    full = allocate_barriers(STAGES + 1)
    empty = allocate_barriers(STAGES)
    init_barriers(full, 1)
    init_barriers(empty, 1)
    fence_async_shared()
    launch_dependents()
    if prefetch == 0:
        wait_for_predecessors()

    i_b, i_tile = first_or_later_tile(p_cu_q, gl.program_id(0) // HKV, gl.num_programs(0) // HKV, n_seqs, HEADS, ROWS)
    head = gl.program_id(0) % HKV
    row = i_tile * ROWS
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    n_keys = gl.load(p_lengths + i_b)
    end = n_keys
    if CAUSAL:
        end = gl.minimum(gl.maximum(n_keys - q_len + (row + ROWS - 1) // HEADS + 1, 0), n_keys)
    end = gl.where(row < q_len * HEADS, end, 0)
    i_table = i_b
    if LARGE:
        i_table = i_table.to(gl.int64)
    p_table += i_table * stride_table
    args = PartitionArgs(
        *(kv_smem, full, empty, p_table, n_keys, end, p_q, p_out, p_cu_q, n_seqs, n_tokens, q_smem, head, q_start),
        *(q_len, row, stride_qt, stride_qh, scale, HKV, HEADS, D, PAGE, CAUSAL, LARGE),
    )
    k_layout = CacheLayout(page_rows_k, head * head_rows_k, head * head_columns_k)
    v_layout = CacheLayout(page_rows_v, head * head_rows_v, head * head_columns_v)
    gl.warp_specialize(
        [(_consumer, (args,)), (_producer, (d_k, args, k_layout, False)), (_producer, (d_v, args, v_layout, True))],
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
    out: torch.Tensor,
    decoding: bool,
    causal: bool,
    scale: float,
    order: KeySteps,
    config: DecodeConfig,
    constant_metadata: bool = False,
) -> None:
    """Write out as `attention_kernel` computes it in this order, bit for bit.

    Args:
        q: [T, Hq, D], bf16 or fp16, D a multiple of 8 from 16 to 256. k_cache, v_cache: [blocks, block_size, Hkv, D],
            as `tma.is_cache_compatible` asks. table: int32 [B, max_blocks], both > 0, dense in its last dimension.
            cu_q: int32 [B + 1]. lengths: int32 [B]. out: [T, Hq, D], contiguous.
        decoding: no sequence has more than `config.rows` rows (query, head of a KV head). False: any split of the
            tokens is served.
        constant_metadata: no kernel of the graph that is being captured writes table, cu_q or lengths.

    Raises:
        ValueError: an order of other steps than 64 or 128 keys.
    """
    check_order(config, order)
    q = q if q.stride(2) == 1 else q.contiguous()
    n_tokens, hq, head_dim = q.shape
    page, hkv = k_cache.shape[1:3]
    n_seqs, heads = table.shape[0], hq // hkv
    box, width = math.gcd(page, order.block_n), block_d(head_dim, 64)
    d_k, *k_layout = tma.cache_descriptor(k_cache, box, width)
    d_v, *v_layout = tma.cache_descriptor(v_cache, box, width)
    n_tiles = n_seqs + (0 if decoding else n_tokens * heads // ROWS.value)
    recorded(attention_decode_kernel)[(n_tiles * hkv,)](
        *(d_k, d_v, q, out, cu_q, lengths, table, scale, n_tokens, n_seqs),
        *(*q.stride()[:2], table.stride(0), *k_layout, *v_layout, pdl.prefetch(constant_metadata)),
        HKV=hkv,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=width,
        BLOCK_N=order.block_n,
        PAGE=page,
        STAGES=config.stages,
        CTAS_PER_SM=config.ctas_per_sm,
        CAUSAL=causal,
        LARGE=max(hq * q.stride(1), n_seqs * table.stride(0)) >= 2**31,
        num_warps=4,
        maxnreg=168 if config.ctas_per_sm == 1 else 128,  # at the start; then the consumer takes from the producers
        launch_pdl=True,
        **PINNED,
    )
