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
from bi_ops.attention.hopper.common import ROWS, clear_outside, clear_rows, row_layout, wgmma_layout
from bi_ops.attention.hopper.mainloop import mainloop, mainloop_overlap
from bi_ops.attention.hopper.pages import CacheLayout, last_box, load_pages, lookup_pages
from bi_ops.attention.hopper.softmax import reciprocal
from bi_ops.attention.kernels.common import LN2, LOG2E
from bi_ops.attention.order import KeySteps
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, filled, recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, init_barriers, stage_and_phase, wait_empty
from bi_ops.gluon.tile_scheduler import Sequences, count_tiles, fetch_add, get_listed_tile, key_steps, tile_list


@aggregate
class PartitionArgs:
    """What every partition is given: stages of shared memory, each with a full and an empty barrier, and the rest."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    out: gl.tensor
    lse: gl.tensor
    q_smem: gl.shared_memory_descriptor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # one for each warp group's rows in a stage
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    v_tail: gl.shared_memory_descriptor  # the last, partial V has come, and is to be cleared past the end
    scheduler: gl.shared_memory_descriptor  # without OVERLAP: warp group i may issue its GEMMs
    sequences: Sequences
    table: Scalar  # None if packed, as are the next
    stride_table: Scalar
    page_rows: Scalar  # of K and V, which lie alike: as `CacheLayout`, for a head number of 1
    head_rows: Scalar
    head_columns: Scalar
    scale: Scalar
    n_tokens: Scalar
    H: gl.constexpr
    HEADS: gl.constexpr
    WARP_GROUPS: gl.constexpr
    CAUSAL: gl.constexpr
    OVERLAP: gl.constexpr
    EQUAL: gl.constexpr
    PAGE: gl.constexpr  # 0: packed
    CONSUMERS_CLEAR: gl.constexpr
    PACK: gl.constexpr  # heads of a tile
    AHEAD: gl.constexpr


@gluon.jit
def _get_tile(args, i_tile):
    """The tile and, for its `head`, the first one that it has."""
    BLOCK_M: gl.constexpr = args.WARP_GROUPS * ROWS // args.PACK
    return get_listed_tile(args.sequences, i_tile, args.H // args.PACK, BLOCK_M, args.EQUAL, args.PAGE != 0)


@gluon.jit
def _load_queries(args, i_tile, tile, tiles):
    """Have TMA copy a tile's Q into the stage of the CTA's tile number `tiles`, when that is empty."""
    D: gl.constexpr = args.k_smem.shape[2]
    PACK: gl.constexpr = args.PACK
    QUERIES: gl.constexpr = ROWS // PACK  # of a warp group
    Q_STAGES: gl.constexpr = args.q_empty.shape[0]
    SLOTS: gl.constexpr = args.q_full.shape[0] // Q_STAGES  # for warp groups: a power of two
    stage = tiles % Q_STAGES
    wait_empty(args.q_empty, tiles)
    gl.store(args.sequences.tile_ids + gl.program_id(0) * Q_STAGES + stage, i_tile)
    for group in gl.static_range(args.WARP_GROUPS):
        slot = stage * SLOTS + group
        full = args.q_full.index(slot)
        row = tile.q_start + tile.m + group * QUERIES
        if PACK == 1:
            mbarrier.expect(full, args.q_desc.block_type.nbytes)
            tma.async_load(args.q_desc, [row, tile.head * D], full, args.q_smem.index(slot))
        else:
            mbarrier.expect(full, PACK * args.q_desc.block_type.nbytes)
            for i in gl.static_range(PACK):
                column = (tile.head * PACK + i) * D
                tma.async_load(args.q_desc, [row, column], full, args.q_smem.index(slot).slice(i * QUERIES, QUERIES))


@gluon.jit
def _end_tiles(args, i_tile, tiles):
    """No tile is left: consumers find a number past the last."""
    Q_STAGES: gl.constexpr = args.q_empty.shape[0]
    SLOTS: gl.constexpr = args.q_full.shape[0] // Q_STAGES
    stage = tiles % Q_STAGES
    wait_empty(args.q_empty, tiles)
    gl.store(args.sequences.tile_ids + gl.program_id(0) * Q_STAGES + stage, i_tile)
    for group in gl.static_range(args.WARP_GROUPS):
        mbarrier.arrive(args.q_full.index(stage * SLOTS + group))


@gluon.jit
def _take_tile(args, n_items, tiles):
    """Take the next of `n_items` for the CTA's tile number `tiles`, and have its Q copied."""
    i_tile = gl.num_programs(0) + fetch_add(args.sequences.counter)
    if i_tile < n_items:
        _load_queries(args, i_tile, _get_tile(args, i_tile), tiles)
    return i_tile


@gluon.jit
def _load_tile(args, desc, tile, column, n, full, smem):
    """Have TMA copy the keys or values from key `n` of the tile's sequence on; `full` completes when they are there.

    column: of the KV head in packed keys.
    """
    PAGE: gl.constexpr = args.PAGE
    if PAGE == 0:
        mbarrier.expect(full, desc.block_type.nbytes)
        tma.async_load(desc, [tile.k_start + n, column], full, smem)
    else:
        BOX: gl.constexpr = desc.block_type.shape[0]
        BOXES: gl.constexpr = smem.shape[0] // BOX
        mbarrier.expect(full, BOXES * desc.block_type.nbytes)
        kv_head = tile.head * args.PACK // args.HEADS
        cache = CacheLayout(args.page_rows, kv_head * args.head_rows, kv_head * args.head_columns)
        last = last_box(tile.k_len, BOX)
        p_table = args.table + tile.sequence.to(gl.int64) * args.stride_table
        pages = lookup_pages(p_table, n, last, PAGE, BOX, BOXES)
        load_pages(desc, pages, n, last, cache, full, smem, PAGE)


@gluon.jit
def _load_keys(args, step, tails, tile, n_steps, n_items, tiles):
    """(next step, next tail, next tile if AHEAD) after K and V of a tile, in the order in which consumers wait: V comes
    a step after its K.

    The rows of the last V past the end of the sequence are cleared before consumers see them, or by consumers: P is 0
    there, but 0 * NaN would be NaN.
    """
    STAGES: gl.constexpr = args.k_smem.shape[0]
    BLOCK_N: gl.constexpr = args.k_smem.shape[1]
    D: gl.constexpr = args.k_smem.shape[2]
    column = tile.head * args.PACK // args.HEADS * D
    i_next = step * 0
    taken = gl.minimum(gl.maximum(n_steps - 2, 1), n_steps)
    for i in range(0, n_steps + 1):
        if i < n_steps:
            stage = step % STAGES
            empty = args.v_empty if args.OVERLAP else args.k_empty
            wait_empty(empty, step)
            _load_tile(args, args.k_desc, tile, column, i * BLOCK_N, args.k_full.index(stage), args.k_smem.index(stage))
        if i > 0:
            stage = (step - 1) % STAGES
            n = (i - 1) * BLOCK_N
            if not args.OVERLAP:  # then K has waited for the stage, for both
                wait_empty(args.v_empty, step - 1)
            if args.CONSUMERS_CLEAR:
                _load_tile(args, args.v_desc, tile, column, n, args.v_full.index(stage), args.v_smem.index(stage))
            elif tile.k_len - n < BLOCK_N:
                _load_tile(args, args.v_desc, tile, column, n, args.v_tail, args.v_smem.index(stage))
                mbarrier.wait(args.v_tail, tails & 1)
                tails += 1
                clear_rows(args.v_smem.index(stage), tile.k_len - n, 1)
                fence_async_shared()
                mbarrier.arrive(args.v_full.index(stage))
            else:
                _load_tile(args, args.v_desc, tile, column, n, args.v_full.index(stage), args.v_smem.index(stage))
        if args.AHEAD:  # noqa: SIM102  (known when it is compiled)
            if i == taken:
                i_next = _take_tile(args, n_items, tiles)
        step += 1
    return step - 1, tails, i_next


@gluon.jit
def _producer(args):
    D: gl.constexpr = args.k_smem.shape[2]
    BLOCK_M: gl.constexpr = args.WARP_GROUPS * ROWS // args.PACK
    BLOCK_N: gl.constexpr = args.k_smem.shape[1]
    TILE_HEADS: gl.constexpr = args.H // args.PACK
    sequences = args.sequences
    n_items = count_tiles(sequences, args.EQUAL) * TILE_HEADS
    tiles = n_items * 0
    step = n_items * 0
    tails = n_items * 0
    i_tile = gl.program_id(0)
    if args.AHEAD:
        if i_tile < n_items:
            _load_queries(args, i_tile, _get_tile(args, i_tile), tiles)
        while i_tile < n_items:
            tile = _get_tile(args, i_tile)
            tiles += 1
            n_steps, _ = key_steps(tile.m, tile.q_len, tile.k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
            step, tails, i_tile = _load_keys(args, step, tails, tile, n_steps, n_items, tiles)
    else:
        while i_tile < n_items:
            tile = _get_tile(args, i_tile)
            n_steps, _ = key_steps(tile.m, tile.q_len, tile.k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
            _load_queries(args, i_tile, tile, tiles)
            tiles += 1
            step, tails, _ = _load_keys(args, step, tails, tile, n_steps, n_items, tiles)
            i_tile = gl.num_programs(0) + fetch_add(sequences.counter)
    _end_tiles(args, sequences.n_tiles * TILE_HEADS, tiles)
    # While consumers compute the last tile.
    clear_outside(args.out, sequences.cu_q, sequences.n_seqs, args.n_tokens, args.H * D, 1, args.H * D)
    clear_outside(args.lse, sequences.cu_q, sequences.n_seqs, args.n_tokens, 1, args.n_tokens, args.H)


@gluon.jit
def _query_and_head(rows, tile, WARP_GROUP: gl.constexpr, PACK: gl.constexpr):
    """(query from the tile's first on, head) of a warp group's rows: queries of the first head, then of the next one.

    rows: 0 to 63.
    """
    if PACK == 1:
        query = WARP_GROUP * ROWS + rows
        head = tile.head
    else:
        QUERIES: gl.constexpr = ROWS // PACK
        query = WARP_GROUP * QUERIES + rows % QUERIES
        head = tile.head * PACK + rows // QUERIES
    return query, head


@gluon.jit
def _epilogue(args, acc, row_max, row_sum, tile, WARP_GROUP: gl.constexpr):
    """Divide O by the row sums, and store O and the logarithms of the row sums."""
    D: gl.constexpr = acc.shape[1]
    l_o: gl.constexpr = acc.type.layout
    l_r: gl.constexpr = row_sum.type.layout
    l_out: gl.constexpr = row_layout(D, 4)
    m = tile.m
    seen = row_sum > 0
    divisor = gl.where(seen, row_sum, 1.0)
    lse = gl.where(seen, (row_max + gl.log2(divisor)) * LN2, float("inf"))
    lane, head = _query_and_head(gl.arange(0, ROWS, l_r), tile, WARP_GROUP, args.PACK)
    m_r = m + lane < tile.q_len
    gl.store(args.lse + head.to(gl.int64) * args.n_tokens + tile.q_start + m + lane, lse, mask=m_r)
    b_out = acc * gl.convert_layout(reciprocal(divisor), gl.SliceLayout(1, l_o))[:, None]
    b_out = gl.convert_layout(b_out.to(args.q_smem.dtype), l_out)
    o_r, o_head = _query_and_head(gl.arange(0, ROWS, gl.SliceLayout(1, l_out)), tile, WARP_GROUP, args.PACK)
    o_t = m + o_r
    o_out = ((tile.q_start + o_t).to(gl.int64) * args.H + o_head) * D
    o_d = gl.arange(0, D, gl.SliceLayout(0, l_out))
    gl.store(args.out + o_out[:, None] + o_d[None, :], b_out, mask=(o_t < tile.q_len)[:, None])


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    STAGES: gl.constexpr = args.k_smem.shape[0]
    BLOCK_M: gl.constexpr = args.WARP_GROUPS * ROWS // args.PACK
    QUERIES: gl.constexpr = ROWS // args.PACK
    BLOCK_N: gl.constexpr = args.k_smem.shape[1]
    D: gl.constexpr = args.k_smem.shape[2]
    Q_STAGES: gl.constexpr = args.q_empty.shape[0]
    SLOTS: gl.constexpr = args.q_full.shape[0] // Q_STAGES  # for warp groups: a power of two
    sequences = args.sequences
    p_tile_id = sequences.tile_ids + gl.program_id(0) * Q_STAGES
    end = sequences.n_tiles * (args.H // args.PACK)
    l_s: gl.constexpr = wgmma_layout(BLOCK_N)
    l_o: gl.constexpr = wgmma_layout(D)
    l_r: gl.constexpr = gl.SliceLayout(1, l_s)
    scale2 = LOG2E * args.scale
    tiles = end * 0
    step = end * 0
    stage = end * 0
    mbarrier.wait(args.q_full.index(WARP_GROUP), 0)
    i_tile = gl.load(p_tile_id)
    if args.AHEAD:
        following = _get_tile(args, i_tile)
    while i_tile < end:
        tile = following if args.AHEAD else _get_tile(args, i_tile)
        m, q_len, k_len = tile.m, tile.q_len, tile.k_len
        n_steps, n_full = key_steps(m, q_len, k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
        n_loaded = n_steps
        if args.OVERLAP:  # the steps of the warp group's own rows: without ping-pong it need not keep pace
            n_steps, n_full = key_steps(m + WARP_GROUP * QUERIES, q_len, k_len, QUERIES, BLOCK_N, args.CAUSAL)
        n_valid = k_len - (n_steps - 1) * BLOCK_N
        lane, _ = _query_and_head(gl.arange(0, ROWS, l_r), tile, WARP_GROUP, args.PACK)
        n_seen = lane * 0 + k_len
        if args.CAUSAL:
            n_seen = gl.minimum(gl.maximum(m + lane + (k_len - q_len) + 1, 0), k_len)
        q = args.q_smem.index(stage * SLOTS + WARP_GROUP)
        q_empty = args.q_empty.index(stage)
        acc = gl.zeros((ROWS, D), gl.float32, l_o)
        row_sum = gl.zeros((ROWS,), gl.float32, l_r)
        row_max = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
        if n_steps > 0:
            if args.OVERLAP:
                acc, row_max, row_sum = mainloop_overlap(
                    args, q, q_empty, n_seen, scale2, step, n_steps, n_full, n_valid, l_o
                )
            else:
                acc, row_max, row_sum, step = mainloop(
                    args, q, q_empty, n_seen, scale2, step, n_steps, n_full, n_valid, l_o, WARP_GROUP
                )
        else:
            mbarrier.arrive(q_empty)
        if args.OVERLAP:
            for i in range(step + n_steps, step + n_loaded):  # what only other warp groups' rows see
                k_stage, phase = stage_and_phase(i, STAGES)
                mbarrier.wait(args.k_full.index(k_stage), phase)
                mbarrier.arrive(args.v_empty.index(k_stage))
            step += n_loaded
        tiles += 1
        stage = tiles % Q_STAGES
        if args.AHEAD:  # what is read here is on its way while O is written
            mbarrier.wait(args.q_full.index(stage * SLOTS + WARP_GROUP), tiles // Q_STAGES & 1)
            i_tile = gl.load(p_tile_id + stage)
            following = _get_tile(args, i_tile)
        _epilogue(args, acc, row_max, row_sum, tile, WARP_GROUP)
        if not args.AHEAD:
            mbarrier.wait(args.q_full.index(stage * SLOTS + WARP_GROUP), tiles // Q_STAGES & 1)
            i_tile = gl.load(p_tile_id + stage)


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
    if CONSUMERS_CLEAR:
        v_tail = q_full
    else:
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
    if not CONSUMERS_CLEAR:
        mbarrier.init(v_tail, count=1)
    fence_async_shared()

    sequences = Sequences(p_cu_q, p_cu_k, p_order, p_counter, p_tile_ids, n_seqs, n_tiles)
    args = PartitionArgs(
        *(d_q, d_k, d_v, p_out, p_lse, q_smem, k_smem, v_smem, q_full, k_full, v_full, q_empty, k_empty, v_empty),
        *(v_tail, scheduler, sequences, p_table, stride_table, page_rows, head_rows, head_columns, scale, n_tokens),
        *(H, HEADS, WARP_GROUPS, CAUSAL, OVERLAP, EQUAL, PAGE, CONSUMERS_CLEAR, PACK, AHEAD),
    )
    if WARP_GROUPS == 2:
        gl.warp_specialize(
            [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (args, 0)), (_consumer, (args, 1)), (_consumer, (args, 2)), (_producer, (args,))],
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
