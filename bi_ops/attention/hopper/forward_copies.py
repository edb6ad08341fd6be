"""The partition of one warp of attention's forward: it takes tiles, and has TMA copy their Q, K and V."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from bi_ops.attention.hopper.common import ROWS, clear_outside, clear_rows
from bi_ops.attention.hopper.forward_args import get_tile
from bi_ops.attention.hopper.pages import CacheLayout, last_box, load_pages, lookup_pages
from bi_ops.gluon import tma
from bi_ops.gluon.pipeline import wait_empty
from bi_ops.gluon.tile_scheduler import count_tiles, fetch_add, key_steps


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
        _load_queries(args, i_tile, get_tile(args, i_tile), tiles)
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
def producer(args):
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
            _load_queries(args, i_tile, get_tile(args, i_tile), tiles)
        while i_tile < n_items:
            tile = get_tile(args, i_tile)
            tiles += 1
            n_steps, _ = key_steps(tile.m, tile.q_len, tile.k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
            step, tails, i_tile = _load_keys(args, step, tails, tile, n_steps, n_items, tiles)
    else:
        while i_tile < n_items:
            tile = get_tile(args, i_tile)
            n_steps, _ = key_steps(tile.m, tile.q_len, tile.k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
            _load_queries(args, i_tile, tile, tiles)
            tiles += 1
            step, tails, _ = _load_keys(args, step, tails, tile, n_steps, n_items, tiles)
            i_tile = gl.num_programs(0) + fetch_add(sequences.counter)
    _end_tiles(args, sequences.n_tiles * TILE_HEADS, tiles)
    # While consumers compute the last tile.
    clear_outside(args.out, sequences.cu_q, sequences.n_seqs, args.n_tokens, args.H * D, 1, args.H * D)
    clear_outside(args.lse, sequences.cu_q, sequences.n_seqs, args.n_tokens, 1, args.n_tokens, args.H)
