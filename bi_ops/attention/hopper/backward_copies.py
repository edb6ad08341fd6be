"""The partitions of one warp of attention's backward, which move data: Q and dO into shared memory, dQ out of it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from bi_ops.attention.hopper.backward_args import DQ_STAGES, WARP_GROUPS
from bi_ops.gluon import tma
from bi_ops.gluon.pipeline import wait_empty
from bi_ops.gluon.semaphore import acquire, release


@gluon.jit
def producer(args):
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    D: gl.constexpr = args.D
    STAGES: gl.constexpr = args.q_smem.shape[0]
    mbarrier.expect(args.kv_full, args.k_desc.block_type.nbytes + args.v_desc.block_type.nbytes)
    tma.async_load(args.k_desc, [tile.k_row, tile.kv_head * D], args.kv_full, args.k_smem.index(0))
    tma.async_load(args.v_desc, [tile.k_row, tile.kv_head * D], args.kv_full, args.v_smem.index(0))
    for step in range(0, (tile.end - tile.first) * HEADS):
        i_m = tile.end - 1 - step // HEADS
        row = tile.q_start + i_m * args.BLOCK_M
        head = tile.kv_head * HEADS + step % HEADS
        stat = (head * tile.n_tiles + tile.first_tile + i_m) * args.BLOCK_M
        i = step % STAGES
        wait_empty(args.empty, step)
        q_full = args.q_full.index(i)
        mbarrier.expect(q_full, args.q_desc.block_type.nbytes + args.neg_lse_desc.block_type.nbytes)
        tma.async_load(args.q_desc, [row, head * D], q_full, args.q_smem.index(i))
        tma.async_load(args.neg_lse_desc, [stat], q_full, args.neg_lse_smem.index(i))
        g_full = args.g_full.index(i)
        mbarrier.expect(g_full, args.g_desc.block_type.nbytes + args.delta_desc.block_type.nbytes)
        tma.async_load(args.g_desc, [row, head * D], g_full, args.g_smem.index(i))
        tma.async_load(args.delta_desc, [stat], g_full, args.delta_smem.index(i))


@gluon.jit
def _dq_tile(tile, step, HEADS: gl.constexpr):
    """The slot of the tile of dQ, among those of all heads and sequences, that a step adds to."""
    return (tile.kv_head * HEADS + step % HEADS) * tile.n_slots + tile.first_slot + tile.end - 1 - step // HEADS


@gluon.jit
def reduce(args, WARP: gl.constexpr):
    """Serves one step of DQ_STAGES: adds its dQ to global memory, or loads the sum that the step closes."""
    tile = args.tile
    HEADS: gl.constexpr = args.HEADS
    dq_desc, dq_smem = args.dq_desc, args.dq_smem
    PARTS: gl.constexpr = 1 if args.DQ_GROUP else WARP_GROUPS  # of a tile of dQ
    DQ_ROWS: gl.constexpr = dq_smem.shape[1]
    i_n, n_open = tile.i_n, tile.n_open
    n_steps = (tile.end - tile.first) * HEADS
    seen = n_steps * 0 - 1
    if n_open > WARP:
        for part in gl.static_range(PARTS):
            mbarrier.arrive(args.dq_ready.index(part * DQ_STAGES + WARP))
    for step in range(WARP, n_steps, DQ_STAGES):
        i_tile = _dq_tile(tile, step, HEADS)
        if step < n_open:
            if seen != i_n:
                acquire(args.semaphores + i_tile, i_n)
            for part in gl.static_range(PARTS):
                i = part * DQ_STAGES + WARP
                mbarrier.wait(args.dq_full.index(i), step // DQ_STAGES & 1)
                if i_n == 0:
                    tma.async_store(dq_desc, [(i_tile * PARTS + part) * DQ_ROWS, 0], dq_smem.index(i))
                else:
                    tma.async_atomic_add(dq_desc, [(i_tile * PARTS + part) * DQ_ROWS, 0], dq_smem.index(i))
            tma.store_wait(0)
            if step + DQ_STAGES < n_open:
                for part in gl.static_range(PARTS):
                    mbarrier.arrive(args.dq_ready.index(part * DQ_STAGES + WARP))
            next_tile = _dq_tile(tile, gl.minimum(step + DQ_STAGES, n_steps - 1), HEADS)
            seen = release(args.semaphores + i_tile, args.semaphores + next_tile)
        else:
            if i_n > 0:
                acquire(args.semaphores + i_tile, i_n)
            for part in gl.static_range(PARTS):
                i = part * DQ_STAGES + WARP
                if step - DQ_STAGES >= n_open:
                    mbarrier.wait(args.dq_full.index(i), (step - DQ_STAGES) // DQ_STAGES & 1)
                if i_n == 0:
                    mbarrier.arrive(args.dq_ready.index(i))
                else:
                    ready = args.dq_ready.index(i)
                    mbarrier.expect(ready, dq_desc.block_type.nbytes)
                    tma.async_load(dq_desc, [(i_tile * PARTS + part) * DQ_ROWS, 0], ready, dq_smem.index(i))
