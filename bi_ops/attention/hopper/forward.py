"""Attention's forward on Hopper, warp-specialised, written in Gluon: `attention_kernel`'s order, and its bits.

Keys and values are packed, or in pages, as prefill finds them. The grid depends on no length of a sequence.

A tile has queries of up to 8 heads that share a KV head, so that less of a sequence's last tile is empty. CTAs are
persistent: each takes a tile, those with most keys first, and another when that is done, until none is left.

    producer  1 warp                           has TMA copy the tile's Q, then K and V step by step, into their stages
    consumers 2 or 3 warp groups of 4 warps    64 rows each: S, the online softmax, O, as `mainloop` says; the epilogue
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from bi_ops.attention.config import ForwardConfig, check_order
from bi_ops.attention.hopper.common import ROWS
from bi_ops.attention.hopper.forward_args import PartitionArgs
from bi_ops.attention.hopper.forward_consumer import consumer
from bi_ops.attention.hopper.forward_copies import producer
from bi_ops.attention.order import KeySteps
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, filled, recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.pipeline import allocate_barriers, init_barriers
from bi_ops.gluon.tile_scheduler import Sequences, tile_list


@gluon.jit(
    do_not_specialize=["n_tokens", "n_seqs", "n_tiles", "stride_table", "page_rows", "head_rows", "head_columns"],
    do_not_specialize_on_alignment=["p_counter"],
)
def attention_forward_kernel(
    d_q,  # [T, H * D], tiles [ROWS, D]
    d_k,  # [Tk, H / HEADS * D], tiles [BLOCK_N, D]; if paged of `tma.cache_descriptor`, tiles [BOX, D]
    d_v,  # as d_k
    p_out,  # [T, H, D], contiguous
    p_lse,  # fp32 [H, T], natural logarithm
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1], or lengths int32 [B] if paged
    p_table,  # int32 [B, max_blocks] if paged
    p_order,  # int32 [8 * n_tiles + 1] of `tile_list`; not read if EQUAL
    p_counter,  # int32 [1]: 0; tiles taken after each CTA's first
    p_tile_ids,  # int32 [CTAs, Q_STAGES], uninitialised: which tile the Q in each stage belongs to
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    n_tiles,  # of WARP_GROUPS * ROWS // PACK queries: as many as there are if EQUAL, else at least
    stride_table,
    page_rows,  # of d_k and d_v if paged: rows from page to page
    head_rows,  # rows from head to head
    head_columns,  # and columns
    H: gl.constexpr,
    HEADS: gl.constexpr,  # query heads of a KV head
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WARP_GROUPS: gl.constexpr,
    STAGES: gl.constexpr,  # of K, and of V
    Q_STAGES: gl.constexpr,  # of Q: this tile's, and the next ones'
    CAUSAL: gl.constexpr,
    OVERLAP: gl.constexpr,  # a step's S is issued before the exponentials of the step before; else ping-pong
    EQUAL: gl.constexpr,  # all sequences have as many queries
    PAGE: gl.constexpr,  # tokens of a page; 0: packed
    CONSUMERS_CLEAR: gl.constexpr,  # of the last V what is past the end of its sequence; else the producer does
    PACK: gl.constexpr,  # heads of a tile, which share a KV head; it has as many fewer queries
    AHEAD: gl.constexpr,  # with 2 Q_STAGES: a tile is taken while K and V of the one before are being loaded
):
    DTYPE: gl.constexpr = d_q.dtype
    SLOTS: gl.constexpr = 4 if WARP_GROUPS == 3 else WARP_GROUPS
    q_smem = gl.allocate_shared_memory(DTYPE, [Q_STAGES * SLOTS, ROWS, D], d_q.layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], d_k.layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], d_v.layout)
    q_full = allocate_barriers(Q_STAGES * SLOTS)
    q_empty = allocate_barriers(Q_STAGES)
    k_full = allocate_barriers(STAGES)
    v_full = allocate_barriers(STAGES)
    v_empty = allocate_barriers(STAGES)
    # Every initialised barrier is used: the compiler gives the place of an unused one to other data, in which the
    # barrier's bits were then seen.
    if OVERLAP:
        k_empty = v_empty
        scheduler = q_full
    else:
        k_empty = allocate_barriers(STAGES)
        scheduler = allocate_barriers(SLOTS)
    v_tail = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(q_full, 1)
    init_barriers(q_empty, WARP_GROUPS)
    if not OVERLAP:
        for i in gl.static_range(WARP_GROUPS):
            mbarrier.init(scheduler.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=WARP_GROUPS)
        if not OVERLAP:
            mbarrier.init(k_empty.index(i), count=WARP_GROUPS)
    mbarrier.init(v_tail, count=WARP_GROUPS if CONSUMERS_CLEAR else 1)
    fence_async_shared()

    sequences = Sequences(p_cu_q, p_cu_k, p_order, p_counter, p_tile_ids, n_seqs, n_tiles)
    args = PartitionArgs(
        *(d_q, d_k, d_v, p_out, p_lse, q_smem, k_smem, v_smem, q_full, k_full, v_full, q_empty, k_empty, v_empty),
        *(v_tail, scheduler, sequences, p_table, stride_table, page_rows, head_rows, head_columns, scale, n_tokens),
        *(H, HEADS, WARP_GROUPS, CAUSAL, OVERLAP, EQUAL, PAGE, CONSUMERS_CLEAR, PACK, AHEAD),
    )
    if WARP_GROUPS == 2:
        gl.warp_specialize(
            [(consumer, (args, 0)), (consumer, (args, 1)), (producer, (args,))],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [(consumer, (args, 0)), (consumer, (args, 1)), (consumer, (args, 2)), (producer, (args,))],
            [4, 4, 1],
            [160, 160, 32],
        )


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    table: torch.Tensor | None,
    max_q: int | None,
    causal: bool,
    scale: float,
    order: KeySteps,
    config: ForwardConfig,
) -> None:
    """Write out and lse as `attention_kernel` does in this order, bit for bit.

    Args:
        q: [T, Hq, D], bf16 or fp16, D 64, 128 or 256, T > 0. k, v: [Tk, Hkv, D], Tk > 0. out: [T, Hq, D], contiguous.
        lse: fp32 [Hq, T]. cu_q, cu_k: int32 [B + 1], B > 0. max_q: at least the most queries of one; None: any split of
            the tokens is served. With a table, int32 [B, max_blocks], k and v are pages [blocks, block_size, Hkv, D] of
            one layout, as `tma.is_cache_compatible` asks, and cu_k lengths int32 [B].

    Raises:
        ValueError: an order of other steps than 64 or 128 keys.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), hkv = q.shape, k.shape[-2]
    n_seqs = cu_q.shape[0] - 1
    equal = max_q is not None and max_q * n_seqs == n_tokens
    pack = math.gcd(hq // hkv, 8)
    block_m = config.warp_groups * ROWS.value // pack
    n_tiles = cdiv(n_tokens // n_seqs, block_m) * n_seqs if equal else n_tokens // block_m + n_seqs
    if equal:
        tile_order, counter = cu_q, filled(cu_q, 1)
    else:
        tile_order, counter = tile_list(cu_q, cu_k, n_tiles, block_m, causal, table is not None)
    programs = min(n_tiles * hq // pack, runtime.multiprocessors(q.device))
    tile_ids = empty(cu_q, (programs, config.q_stages))
    if table is None:
        page = 0
        layout: list[int | None] = [None] * 4
        d_k, d_v = (tma.head_descriptor(t, order.block_n) for t in (k, v))
    else:
        page = k.shape[1]
        (d_k, *rows), (d_v, *_) = (tma.cache_descriptor(t, math.gcd(page, order.block_n), head_dim) for t in (k, v))
        layout = [table.stride(0), *rows]
    recorded(attention_forward_kernel)[(programs,)](
        *(tma.head_descriptor(q, ROWS.value // pack), d_k, d_v, out, lse, cu_q, cu_k, table),
        *(tile_order, counter, tile_ids, scale, n_tokens, n_seqs, n_tiles),
        *layout,
        H=hq,
        HEADS=hq // hkv,
        D=head_dim,
        BLOCK_N=order.block_n,
        WARP_GROUPS=config.warp_groups,
        STAGES=config.stages,
        Q_STAGES=config.q_stages,
        CAUSAL=causal,
        OVERLAP=config.overlap,
        EQUAL=equal,
        PAGE=page,
        CONSUMERS_CLEAR=config.consumers_clear,
        PACK=pack,
        AHEAD=config.ahead,
        num_warps=4,
        **PINNED,
    )
