"""The partition that computes in attention's forward: a warp group's rows of each tile, from S to the stored O."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from bi_ops.attention.hopper.common import ROWS, row_layout, wgmma_layout
from bi_ops.attention.hopper.forward_args import get_tile
from bi_ops.attention.hopper.mainloop import mainloop, mainloop_overlap
from bi_ops.attention.hopper.softmax import reciprocal
from bi_ops.attention.kernels.common import LN2, LOG2E
from bi_ops.gluon.pipeline import stage_and_phase
from bi_ops.gluon.tile_scheduler import key_steps


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
def consumer(args, WARP_GROUP: gl.constexpr):
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
    tails = end * 0
    stage = end * 0
    mbarrier.wait(args.q_full.index(WARP_GROUP), 0)
    i_tile = gl.load(p_tile_id)
    if args.AHEAD:
        following = get_tile(args, i_tile)
    while i_tile < end:
        tile = following if args.AHEAD else get_tile(args, i_tile)
        m, q_len, k_len = tile.m, tile.q_len, tile.k_len
        n_steps, n_full = key_steps(m, q_len, k_len, BLOCK_M, BLOCK_N, args.CAUSAL)
        n_loaded = n_steps
        if args.OVERLAP:  # the steps of the warp group's own rows: without ping-pong it need not keep pace
            n_steps, n_full = key_steps(m + WARP_GROUP * QUERIES, q_len, k_len, QUERIES, BLOCK_N, args.CAUSAL)
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
                acc, row_max, row_sum = mainloop_overlap(args, q, q_empty, n_seen, scale2, step, n_steps, n_full, l_o)
            else:
                n_valid = k_len - (n_steps - 1) * BLOCK_N
                acc, row_max, row_sum, step = mainloop(
                    args, q, q_empty, n_seen, scale2, step, n_steps, n_full, n_valid, tails, l_o, WARP_GROUP
                )
                if args.CONSUMERS_CLEAR:
                    tails += (n_valid < BLOCK_N).to(gl.int32)
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
            following = get_tile(args, i_tile)
        _epilogue(args, acc, row_max, row_sum, tile, WARP_GROUP)
        if not args.AHEAD:
            mbarrier.wait(args.q_full.index(stage * SLOTS + WARP_GROUP), tiles // Q_STAGES & 1)
            i_tile = gl.load(p_tile_id + stage)
