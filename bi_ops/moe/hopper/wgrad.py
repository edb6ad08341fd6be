"""Weight gradients of experts on Hopper, in Gluon: dw[e] of g[R, N] and x[R, K], e's rows front to back.

CTAs are persistent: each takes every num_programs-th tile of 128 rows of an expert's dw. dw is rounded once, or is fp32
and perhaps where the accumulator starts.

    producer  1 warp       has TMA copy tiles of g and x, step by step, into stages of shared memory
    consumers 2 x 4 warps  64 rows of dw each. During a tile's mainloop TMA stores the sums of the tile before and loads
                           what dw holds of the next
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from bi_ops.core.launches import recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.accumulator import exchange, join_columns, load_halves, split_columns
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, init_barriers, next_stage
from bi_ops.gluon.wgrad import wgrad_mainloop
from bi_ops.moe.config import HopperWgradConfig

#: Rows of dw that a consumer warp group owns, half a tile's.
HALF = gl.constexpr(64)


@aggregate
class PartitionArgs:
    """What every partition is given."""

    g_desc: tma.tensor_descriptor
    x_desc: tma.tensor_descriptor
    dw_desc: tma.tensor_descriptor
    p_offsets: gl.tensor
    g_smem: gl.shared_memory_descriptor
    x_smem: gl.shared_memory_descriptor
    dw_smem_0: gl.shared_memory_descriptor  # for each warp group: the left columns and the right
    dw_smem_1: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    dw_full_0: gl.shared_memory_descriptor
    dw_full_1: gl.shared_memory_descriptor
    N: Scalar
    K: Scalar
    E: Scalar
    GROUP_M: gl.constexpr
    ACCUMULATE: gl.constexpr


@gluon.jit
def _n_tiles(args):
    return args.E * (args.N // (2 * HALF)) * gl.cdiv(args.K, args.x_smem.type.shape[2])


@gluon.jit
def _get_tile(args, tile):
    """(expert, its first row, their end, first row of dw[expert], first column). L2 swizzle: GROUP_M tile rows."""
    BLOCK_N: gl.constexpr = args.x_smem.type.shape[2]
    GROUP_M: gl.constexpr = args.GROUP_M
    n_m = args.N // (2 * HALF)
    n_n = gl.cdiv(args.K, BLOCK_N)
    expert = gl.minimum(tile // (n_m * n_n), args.E - 1)  # of the tile after the last, too
    within = tile % (n_m * n_n)
    first_m = within // (GROUP_M * n_n) * GROUP_M
    rows = min(n_m - first_m, GROUP_M)
    within = within % (GROUP_M * n_n)
    m = (first_m + within % rows) * (2 * HALF)
    return expert, gl.load(args.p_offsets + expert), gl.load(args.p_offsets + expert + 1), m, within // rows * BLOCK_N


@gluon.jit
def _producer(args):
    """Tiles of g and x, in the order in which both warp groups need them."""
    STAGES: gl.constexpr = args.x_smem.type.shape[0]
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    stage = 0
    phase = 1  # a stage that was never filled counts as empty
    for tile in range(gl.program_id(0), _n_tiles(args), gl.num_programs(0)):
        _, begin, end, m, n = _get_tile(args, tile)
        for t in range(begin, end, BLOCK_T):
            mbarrier.wait(args.empty.index(stage), phase)
            full = args.full.index(stage)
            mbarrier.expect(full, 2 * args.g_desc.block_type.nbytes + args.x_desc.block_type.nbytes)
            tma.async_load(args.g_desc, [t, m], full, args.g_smem.index(2 * stage))
            tma.async_load(args.g_desc, [t, m + HALF], full, args.g_smem.index(2 * stage + 1))
            tma.async_load(args.x_desc, [t, n], full, args.x_smem.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    """Rows [64 WARP_GROUP, 64 WARP_GROUP + 64) of each tile."""
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    BLOCK_N: gl.constexpr = args.x_smem.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dtype: gl.constexpr = args.dw_desc.dtype
    dw_desc = args.dw_desc
    dw_smem = args.dw_smem_0 if WARP_GROUP == 0 else args.dw_smem_1
    dw_full = args.dw_full_0 if WARP_GROUP == 0 else args.dw_full_1
    n_tiles = _n_tiles(args)
    expert, begin, end, m, n = _get_tile(args, gl.program_id(0))
    row = expert * args.N + m + WARP_GROUP * HALF
    acc = gl.zeros([HALF, BLOCK_N], gl.float32, LAYOUT)
    dw_phase = 0
    if args.ACCUMULATE:
        is_sum = end > begin
        load_halves(dw_desc, row, n, dw_full, dw_smem, is_sum)
        mbarrier.wait(dw_full, 0, pred=is_sum)
        left, right = split_columns(acc, BLOCK_N)
        PART: gl.constexpr = left.type.layout
        acc = join_columns(dw_smem.index(0).load(PART), dw_smem.index(1).load(PART), BLOCK_N, LAYOUT)
        dw_phase = is_sum.to(gl.int32)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        next_tile = tile + gl.num_programs(0)
        expert, next_begin, next_end, m, next_n = _get_tile(args, next_tile)
        next_row = expert * args.N + m + WARP_GROUP * HALF
        # CTAs access dw at different times, so that not all load memory at once.
        middle = begin + gl.cdiv(end - begin, BLOCK_T) * (1 + gl.program_id(0) % 8) // 16 * BLOCK_T
        acc, stage, phase = wgrad_mainloop(args, acc, begin, middle, stage, phase, WARP_GROUP)
        tma.store_wait(0)  # the sums of the tile before have left shared memory
        is_sum = (next_tile < n_tiles) & (next_end > next_begin)
        if args.ACCUMULATE:
            fence_async_shared()
            load_halves(dw_desc, next_row, next_n, dw_full, dw_smem, is_sum)
        acc, stage, phase = wgrad_mainloop(args, acc, middle, end, stage, phase, WARP_GROUP)

        left, right = split_columns(acc, BLOCK_N)
        if args.ACCUMULATE:  # an expert without rows is neither loaded nor stored
            mbarrier.wait(dw_full, dw_phase, pred=is_sum)
            dw_phase ^= is_sum.to(gl.int32)
            left = exchange(left, dw_smem.index(0))
            right = exchange(right, dw_smem.index(1))
            acc = join_columns(left, right, BLOCK_N, LAYOUT)
            fence_async_shared()
            if end > begin:
                tma.async_store(dw_desc, [row, n], dw_smem.index(0))
                tma.async_store(dw_desc, [row, n + BLOCK_N // 2], dw_smem.index(1))
        else:
            dw_smem.index(0).store(left.to(dtype))
            dw_smem.index(1).store(right.to(dtype))
            acc = gl.zeros([HALF, BLOCK_N], gl.float32, LAYOUT)
            fence_async_shared()
            tma.async_store(dw_desc, [row, n], dw_smem.index(0))
            tma.async_store(dw_desc, [row, n + BLOCK_N // 2], dw_smem.index(1))
        begin = next_begin
        end = next_end
        row = next_row
        n = next_n
    tma.store_wait(0)


@gluon.jit
def grouped_wgrad_hopper_kernel(
    d_g,  # descriptor of g [R, N] with tiles [BLOCK_T, 64]
    d_x,  # descriptor of x [R, K] with tiles [BLOCK_T, BLOCK_N]
    d_dw,  # descriptor of dw [E * N, K] with tiles [64, BLOCK_N // 2]
    p_offsets,  # [E + 1], int32: every expert has a multiple of BLOCK_T rows
    N,  # a multiple of 128
    K,
    E,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    ACCUMULATE: gl.constexpr,  # dw, fp32, holds a sum; else what it holds is not read
):
    """dw[e] (+)= g[rows of e].T @ x[rows of e] in the canonical order."""
    BLOCK_T: gl.constexpr = d_x.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_x.block_type.shape[1]
    g_smem = gl.allocate_shared_memory(d_g.dtype, [2 * STAGES, BLOCK_T, HALF], d_g.layout)
    x_smem = gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_T, BLOCK_N], d_x.layout)
    dw_smem_0 = gl.allocate_shared_memory(d_dw.dtype, [2, HALF, BLOCK_N // 2], d_dw.layout)
    dw_smem_1 = gl.allocate_shared_memory(d_dw.dtype, [2, HALF, BLOCK_N // 2], d_dw.layout)
    full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    dw_full_0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    dw_full_1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    init_barriers(full, 1)
    init_barriers(empty, 2)
    mbarrier.init(dw_full_0, count=1)
    mbarrier.init(dw_full_1, count=1)
    args = PartitionArgs(
        *(d_g, d_x, d_dw, p_offsets, g_smem, x_smem, dw_smem_0, dw_smem_1, full, empty, dw_full_0, dw_full_1),
        *(N, K, E, GROUP_M, ACCUMULATE),
    )
    gl.warp_specialize(
        [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
        [4, 1],
        [240, 24],
    )


def launch(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    dw: torch.Tensor,
    accumulate: bool,
    c: HopperWgradConfig,
    num_sms: int,
) -> None:
    """dw[E, N, K] of g [R, N] and x [R, K]; see `launch.wgrad_hopper_serves`."""
    num_experts, n, k = dw.shape
    recorded(grouped_wgrad_hopper_kernel)[(num_sms,)](
        tma.descriptor(g, (g.shape[0], n), g.stride(0), (c.block_t, HALF.value)),
        tma.descriptor(x, (x.shape[0], k), x.stride(0), (c.block_t, c.block_n)),
        tma.descriptor(dw, (num_experts * n, k), k, (HALF.value, c.block_n // 2)),
        *(offsets, n, k, num_experts),
        STAGES=c.stages,
        GROUP_M=c.group_m,
        ACCUMULATE=accumulate,
        num_warps=4,
        maxnreg=168,
        **PINNED,
    )
