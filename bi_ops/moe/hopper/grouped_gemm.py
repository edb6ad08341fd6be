"""Grouped GEMMs on Hopper, in Gluon: y[R, N] of x[R, K] and the weight of each row's expert; forward and dX.

CTAs are persistent and take tiles of a table that another kernel has made of the experts' counts on the device.

    producer  1 warp       has TMA copy tiles of x and the weight, step by step, into stages of shared memory
    consumers 2 x 4 warps  64 rows each of a tile of 128, none where the expert has no such rows; of a tile of 64 rows
                           half the columns each. A tile whose rows are all the expert's is stored by TMA during the
                           next mainloop, others with a mask

The kernel starts while the one before it runs (`bi_ops.core.pdl`). In a layer it then loads its first tile's weights.
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

from bi_ops.core.launches import recorded
from bi_ops.core.pdl import launch_dependents, wait_for_predecessors
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, init_barriers, next_stage, previous_stage
from bi_ops.moe.config import HopperConfig

#: Rows that a wgmma computes.
HALF = gl.constexpr(64)


@aggregate
class PartitionArgs:
    """What every partition is given."""

    x_desc: tma.tensor_descriptor
    w_desc: tma.tensor_descriptor
    y_desc: tma.tensor_descriptor
    p_tiles: gl.tensor
    p_y: gl.tensor
    p_weights: Scalar
    p_rows: Scalar
    x_smem: gl.shared_memory_descriptor
    w_smem: gl.shared_memory_descriptor
    y_smem_0: gl.shared_memory_descriptor  # for each warp group
    y_smem_1: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    N: Scalar
    K: Scalar
    E: Scalar
    SPLIT_N: gl.constexpr
    GROUP_M: gl.constexpr
    TRANSPOSED: gl.constexpr
    HAS_WEIGHTS: gl.constexpr
    PREFETCH: gl.constexpr


@gluon.jit
def _load_tile(p):
    """A number of the tile table, past L1: that may hold what was there before the kernels before ended."""
    return gl.load(p, cache_modifier=".cg")


@gluon.jit
def _get_tile(args, tile, n_m, n_n, COLUMNS: gl.constexpr):
    """(expert, first row, end of the expert's rows, first column). L2 swizzle: GROUP_M tile rows share the weight."""
    GROUP_M: gl.constexpr = args.GROUP_M
    first_m = tile // (GROUP_M * n_n) * GROUP_M
    rows = min(n_m - first_m, GROUP_M)
    within = tile % (GROUP_M * n_n)
    p_tile = args.p_tiles + 4 * (1 + first_m + within % rows)
    return _load_tile(p_tile), _load_tile(p_tile + 1), _load_tile(p_tile + 2), within // rows * COLUMNS


@gluon.jit
def _expect(args, full, has_upper, wanted):
    """A step's bytes. has_upper: rows for the second consumer are among them."""
    X: gl.constexpr = args.x_desc.block_type.nbytes
    W: gl.constexpr = (2 if args.SPLIT_N else 1) * args.w_desc.block_type.nbytes
    if args.SPLIT_N:
        mbarrier.expect(full, X + W, pred=wanted)
    else:  # constants alone can be expected
        mbarrier.expect(full, 2 * X + W, pred=wanted & has_upper)
        mbarrier.expect(full, X + W, pred=wanted & (not has_upper))


@gluon.jit
def _load_weight(args, expert, n, k, full, stage, wanted):
    """A step's columns of the weight, in a tile for each consumer if these differ."""
    N_W: gl.constexpr = 2 if args.SPLIT_N else 1
    WIDTH: gl.constexpr = args.y_desc.block_type.shape[1] if args.SPLIT_N else 2 * args.y_desc.block_type.shape[1]
    for i in gl.static_range(N_W):
        if args.TRANSPOSED:
            at = [expert * args.K + k, n + i * WIDTH]
        else:
            at = [expert * args.N + n + i * WIDTH, k]
        tma.async_load(args.w_desc, at, full, args.w_smem.index(N_W * stage + i), pred=wanted)


@gluon.jit
def _producer(args):
    """Tiles of x and the weight, in the order in which both warp groups need them."""
    SPLIT_N: gl.constexpr = args.SPLIT_N
    STAGES: gl.constexpr = args.full.shape[0]
    BLOCK_K: gl.constexpr = args.x_smem.type.shape[2]
    COLUMNS: gl.constexpr = 2 * args.y_desc.block_type.shape[1]
    n_x: gl.constexpr = 1 if SPLIT_N else 2
    n_n = gl.cdiv(args.N, COLUMNS)
    n_ahead = 0
    if args.PREFETCH:
        n_m = _load_tile(args.p_tiles)
        if gl.program_id(0) < n_m * n_n:
            expert, m, last, n = _get_tile(args, gl.program_id(0), n_m, n_n, COLUMNS)
            n_ahead = min(gl.cdiv(gl.where(expert < args.E, args.K, 0), BLOCK_K), STAGES)
            for i in range(0, n_ahead):
                _expect(args, args.full.index(i), m + HALF < last, True)
                _load_weight(args, expert, n, i * BLOCK_K, args.full.index(i), i, True)
    wait_for_predecessors()
    launch_dependents()
    n_m = _load_tile(args.p_tiles)
    step = 0
    stage = 0
    phase = 1  # a stage that was never filled counts as empty
    for tile in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        expert, m, last, n = _get_tile(args, tile, n_m, n_n, COLUMNS)
        has_upper = m + HALF < last
        for k in range(0, gl.where(expert < args.E, args.K, 0), BLOCK_K):
            mbarrier.wait(args.empty.index(stage), phase)
            full = args.full.index(stage)
            _expect(args, full, has_upper, step >= n_ahead)
            for i in gl.static_range(n_x):
                wanted = has_upper if i == 1 else True
                tma.async_load(args.x_desc, [m + i * HALF, k], full, args.x_smem.index(n_x * stage + i), pred=wanted)
            _load_weight(args, expert, n, k, full, stage, step >= n_ahead)
            step += 1
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _store(args, part, m, last, n, y_smem):
    """Columns from n on, as many as a TMA tile has, of up to 64 rows from m on."""
    WIDTH: gl.constexpr = part.shape[1]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    tma.store_wait(0)  # the columns before have left shared memory
    y_smem.store(part)
    if m + HALF <= last:
        fence_async_shared()
        tma.async_store(args.y_desc, [m, n], y_smem)
    else:
        o_m = m + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
        o_n = n + gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
        m_y = (o_m < last)[:, None] & (o_n < args.N)[None, :]
        gl.store(args.p_y + o_m.to(gl.int64)[:, None] * args.N + o_n[None, :], y_smem.load(STORE), mask=m_y)


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    """Rows [64 WARP_GROUP, 64 WARP_GROUP + 64) of each tile, or half the columns."""
    SPLIT_N: gl.constexpr = args.SPLIT_N
    STAGES: gl.constexpr = args.full.shape[0]
    BLOCK_K: gl.constexpr = args.x_smem.type.shape[2]
    WIDTH: gl.constexpr = args.y_desc.block_type.shape[1] if SPLIT_N else 2 * args.y_desc.block_type.shape[1]
    COLUMNS: gl.constexpr = 2 * args.y_desc.block_type.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    y_smem = args.y_smem_0 if WARP_GROUP == 0 else args.y_smem_1
    dtype: gl.constexpr = args.y_desc.dtype
    n_n = gl.cdiv(args.N, COLUMNS)
    wait_for_predecessors()
    n_m = _load_tile(args.p_tiles)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), n_m * n_n, gl.num_programs(0)):
        expert, m, last, n = _get_tile(args, tile, n_m, n_n, COLUMNS)
        if SPLIT_N:
            n += WARP_GROUP * WIDTH
        else:
            m += WARP_GROUP * HALF
        acc = gl.zeros([HALF, WIDTH], gl.float32, LAYOUT)
        end = gl.where(expert < args.E, args.K, 0)
        n_multiplied = end if SPLIT_N or WARP_GROUP == 0 else gl.where(m < last, end, 0)
        for k in range(0, n_multiplied, BLOCK_K):
            mbarrier.wait(args.full.index(stage), phase)
            x = args.x_smem.index(stage if SPLIT_N else 2 * stage + WARP_GROUP)
            w = args.w_smem.index(2 * stage + WARP_GROUP if SPLIT_N else stage)
            if not args.TRANSPOSED:
                w = w.permute((1, 0))
            acc = warpgroup_mma(x, w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its stage
            mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=k != 0)
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=n_multiplied > 0)
        for _ in range(n_multiplied, end, BLOCK_K):  # no rows
            mbarrier.wait(args.full.index(stage), phase)
            mbarrier.arrive(args.empty.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        if args.HAS_WEIGHTS:
            o_m = m + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
            pairs = gl.load(args.p_rows + o_m, mask=o_m < last, other=-1)
            acc *= gl.load(args.p_weights + pairs, mask=pairs >= 0, other=0.0)[:, None]
        y = acc.to(dtype)
        if SPLIT_N:
            _store(args, y, m, last, n, y_smem)
        elif m < last:
            left, right = gl.split(y.reshape([HALF, 2, WIDTH // 2]).permute([0, 2, 1]))
            _store(args, left, m, last, n, y_smem)
            _store(args, right, m, last, n + WIDTH // 2, y_smem)
    tma.store_wait(0)


@gluon.jit
def grouped_matmul_hopper_kernel(
    d_x,  # descriptor of x [R, K] with tiles [64, BLOCK_K]
    d_w,  # of the weights [E * N, K] with tiles [columns of a consumer's wgmma, BLOCK_K]; TRANSPOSED: [E * K, N]
    d_y,  # of y [R, N] with tiles [64, COLUMNS // 2]
    p_tiles,  # [tile rows + 1, 4], int32: their number; then the expert of each, its first row, the expert's last
    p_y,  # [R, N]
    p_weights,  # [T, TOP_K], fp32: routing weights
    p_rows,  # [R], int32: the pair of a row, or -1
    N,
    K,
    E,
    STAGES: gl.constexpr,
    SPLIT_N: gl.constexpr,  # tiles of 64 rows
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr,
    PREFETCH: gl.constexpr,  # the table and the weight are older than the kernel before (rule 4 of `bi_ops.core.pdl`)
):
    """y[r] = x[r] @ w[expert of r].T (* routing weight of r, in the accumulator); zeros behind the last expert."""
    n_x: gl.constexpr = 1 if SPLIT_N else 2
    n_w: gl.constexpr = 2 if SPLIT_N else 1
    x_smem = gl.allocate_shared_memory(
        d_x.dtype, [n_x * STAGES, d_x.block_type.shape[0], d_x.block_type.shape[1]], d_x.layout
    )
    w_smem = gl.allocate_shared_memory(
        d_w.dtype, [n_w * STAGES, d_w.block_type.shape[0], d_w.block_type.shape[1]], d_w.layout
    )
    y_smem_0 = gl.allocate_shared_memory(d_y.dtype, d_y.block_type.shape, d_y.layout)
    y_smem_1 = gl.allocate_shared_memory(d_y.dtype, d_y.block_type.shape, d_y.layout)
    full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    init_barriers(full, 1)
    init_barriers(empty, 2)
    args = PartitionArgs(
        *(d_x, d_w, d_y, p_tiles, p_y, p_weights, p_rows, x_smem, w_smem, y_smem_0, y_smem_1, full, empty),
        *(N, K, E, SPLIT_N, GROUP_M, TRANSPOSED, HAS_WEIGHTS, PREFETCH),
    )
    gl.warp_specialize(
        [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
        [4, 1],
        [232, 40],
    )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    tiles: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor] | None,
    c: HopperConfig,
    num_sms: int,
    prefetch: bool,
) -> None:
    """y[R, N] of x [R, K] and weight [E, N, K], contiguous or the transpose of what is; see `launch.hopper_serves`.

    tiles: of `c.block_m` rows. prefetch: tiles and the weight are older than the kernel before, which begins in order.
    """
    (n_rows, k), (num_experts, n, _) = x.shape, weight.shape
    transposed = weight.stride(2) != 1
    split_n = c.block_m == HALF.value
    width = c.block_n // 2 if split_n else c.block_n
    stored = (num_experts * k, n) if transposed else (num_experts * n, k)
    weights, rows = routing or (None, None)
    recorded(grouped_matmul_hopper_kernel)[(num_sms,)](
        tma.descriptor(x, (n_rows, k), x.stride(0), (HALF.value, c.block_k)),
        tma.descriptor(weight, stored, stored[1], (c.block_k, width) if transposed else (width, c.block_k)),
        tma.descriptor(y, (n_rows, n), n, (HALF.value, c.block_n // 2)),
        *(tiles, y, weights, rows, n, k, num_experts),
        STAGES=c.stages,
        SPLIT_N=split_n,
        GROUP_M=c.group_m,
        TRANSPOSED=transposed,
        HAS_WEIGHTS=routing is not None,
        PREFETCH=prefetch,
        num_warps=4,
        maxnreg=168,
        launch_pdl=True,
        **PINNED,
    )
