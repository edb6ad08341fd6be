"""Grouped GEMMs on Hopper, in Gluon: y[R, N] of x[R, K] and the weight of each row's expert; forward and dX.

CTAs are persistent and take tiles of a table that another kernel has made of the experts' counts on the device.

    producer  1 warp       has TMA copy tiles of x and the weight, step by step, into stages of shared memory
    consumers 2 x 4 warps  64 rows each of a tile of 128, none where the expert has no such rows; of a tile of 64 rows
                           half the columns each. A tile whose rows are all the expert's is stored by TMA during the
                           next mainloop, others with a mask

ACTIVATION: the weight is that of gate and up. A consumer's columns are then half the gate's and half up's, so that
silu(gate) * up is computed where the accumulator is. Rounding steps are those of `expert_activation_kernel`.

In a layer the kernel starts while the one before runs (`bi_ops.core.pdl`), and loads weights of its first tile.
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
from bi_ops.core.triton_helpers import PINNED, silu_and_mul
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
    h_desc: tma.tensor_descriptor | gl.constexpr
    p_tiles: gl.tensor
    p_y: gl.tensor
    p_h: Scalar
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
    ACTIVATION: gl.constexpr
    HAS_H: gl.constexpr
    PREFETCH: gl.constexpr


@gluon.jit
def _load_tile(p, AHEAD: gl.constexpr):
    """Of the tile table. AHEAD of the wait for the kernels before, L1 might still have what was there earlier."""
    CACHE: gl.constexpr = ".cg" if AHEAD else ""
    return gl.load(p, cache_modifier=CACHE)


@gluon.jit
def _n_tiles(args, COLUMNS: gl.constexpr, AHEAD: gl.constexpr = False):
    return _load_tile(args.p_tiles, AHEAD) * gl.cdiv(args.N, COLUMNS)


@gluon.jit
def _get_tile(args, tile, COLUMNS: gl.constexpr, AHEAD: gl.constexpr = False):
    """(expert, first row, end of the expert's rows, first column). L2 swizzle: GROUP_M tile rows share the weight."""
    GROUP_M: gl.constexpr = args.GROUP_M
    n_n = gl.cdiv(args.N, COLUMNS)
    first_m = tile // (GROUP_M * n_n) * GROUP_M
    rows = min(_load_tile(args.p_tiles, AHEAD) - first_m, GROUP_M)
    within = tile % (GROUP_M * n_n)
    p_tile = args.p_tiles + 4 * (1 + first_m + within % rows)
    expert, m, last = _load_tile(p_tile, AHEAD), _load_tile(p_tile + 1, AHEAD), _load_tile(p_tile + 2, AHEAD)
    return expert, m, last, within // rows * COLUMNS


@gluon.jit
def _load_weight(args, expert, n, k, full, stage, wanted):
    """A step's tiles of the weight: of each consumer's columns where these differ, of the gate's and of up's."""
    n_w: gl.constexpr = 2 if args.SPLIT_N else 1
    WIDTH: gl.constexpr = args.w_smem.type.shape[2 if args.TRANSPOSED else 1]
    for i in gl.static_range(n_w):
        tile = args.w_smem.index(n_w * stage + i)
        if args.ACTIVATION:
            halves = tma.reinterpret(tile, [2, WIDTH // 2, args.w_smem.type.shape[2]])
            for j in gl.static_range(2):
                row = expert * args.N + j * (args.N // 2) + n // 2 + i * (WIDTH // 2)
                tma.async_load(args.w_desc, [row, k], full, halves.index(j), pred=wanted)
        else:
            if args.TRANSPOSED:
                at = [expert * args.K + k, n + i * WIDTH]
            else:
                at = [expert * args.N + n + i * WIDTH, k]
            tma.async_load(args.w_desc, at, full, tile, pred=wanted)


@gluon.jit
def _n_boxes(args, m, last):
    """TMA tiles of x that hold an expert's rows from m on, of those that a tile has."""
    X_ROWS: gl.constexpr = args.x_desc.block_type.shape[0]
    return gl.cdiv(min(last - m, HALF if args.SPLIT_N else 2 * HALF), X_ROWS)


@gluon.jit
def _expect(args, full, n_boxes, wanted):
    """The bytes of a step, with n_boxes TMA tiles of x."""
    N_W: gl.constexpr = (2 if args.SPLIT_N else 1) * (2 if args.ACTIVATION else 1) * args.w_desc.block_type.nbytes
    MOST: gl.constexpr = (1 if args.SPLIT_N else 2) * HALF // args.x_desc.block_type.shape[0]
    for i in gl.static_range(1, MOST + 1):  # constants alone can be expected
        mbarrier.expect(full, i * args.x_desc.block_type.nbytes + N_W, pred=wanted & (n_boxes == i))


@gluon.jit
def _load_x(args, m, k, full, stage, n_boxes):
    """A step's rows of x, as far as the expert has any."""
    X_ROWS: gl.constexpr = args.x_desc.block_type.shape[0]
    N: gl.constexpr = HALF // X_ROWS
    n_x: gl.constexpr = 1 if args.SPLIT_N else 2
    for i in gl.static_range(n_x):
        boxes = tma.reinterpret(args.x_smem.index(n_x * stage + i), [N, X_ROWS, args.x_smem.type.shape[2]])
        for j in gl.static_range(N):
            at = [m + i * HALF + j * X_ROWS, k]
            tma.async_load(args.x_desc, at, full, boxes.index(j), pred=i * N + j < n_boxes)


@gluon.jit
def _producer(args):
    """Tiles of x and the weight, in the order in which both warp groups need them."""
    SPLIT_N: gl.constexpr = args.SPLIT_N
    STAGES: gl.constexpr = args.full.shape[0]
    BLOCK_K: gl.constexpr = args.x_smem.type.shape[2]
    WIDTH: gl.constexpr = args.w_smem.type.shape[2 if args.TRANSPOSED else 1]
    COLUMNS: gl.constexpr = 2 * WIDTH if SPLIT_N else WIDTH
    n_ahead = 0
    if args.PREFETCH:  # the first tile's weights, before x is there
        n_tiles = _n_tiles(args, COLUMNS, True)
        if gl.program_id(0) < n_tiles:
            expert, m, last, n = _get_tile(args, gl.program_id(0), COLUMNS, True)
            n_ahead = min(gl.cdiv(gl.where(expert < args.E, args.K, 0), BLOCK_K), STAGES)
            for s in range(0, n_ahead):
                _expect(args, args.full.index(s), _n_boxes(args, m, last), True)
                _load_weight(args, expert, n, s * BLOCK_K, args.full.index(s), s, True)
    wait_for_predecessors()
    launch_dependents()
    step = 0
    stage = 0
    phase = 1  # a stage that was never filled counts as empty
    for tile in range(gl.program_id(0), _n_tiles(args, COLUMNS), gl.num_programs(0)):
        expert, m, last, n = _get_tile(args, tile, COLUMNS)
        n_boxes = _n_boxes(args, m, last)
        for k in range(0, gl.where(expert < args.E, args.K, 0), BLOCK_K):
            mbarrier.wait(args.empty.index(stage), phase)
            full = args.full.index(stage)
            _expect(args, full, n_boxes, step >= n_ahead)
            _load_x(args, m, k, full, stage, n_boxes)
            _load_weight(args, expert, n, k, full, stage, step >= n_ahead)
            step += 1
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _store(desc, p, part, m, last, n, n_columns, y_smem):
    """Columns from n on, as many as a TMA tile has, of up to 64 rows from m on, in a matrix of n_columns."""
    WIDTH: gl.constexpr = part.shape[1]
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    tma.store_wait(0)  # the columns before have left shared memory
    y_smem.store(part)
    if m + HALF <= last:
        fence_async_shared()
        tma.async_store(desc, [m, n], y_smem)
    else:
        o_m = m + gl.arange(0, HALF, gl.SliceLayout(1, STORE))
        o_n = n + gl.arange(0, WIDTH, gl.SliceLayout(0, STORE))
        m_y = (o_m < last)[:, None] & (o_n < n_columns)[None, :]
        gl.store(p + o_m.to(gl.int64)[:, None] * n_columns + o_n[None, :], y_smem.load(STORE), mask=m_y)


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    """Rows [64 WARP_GROUP, 64 WARP_GROUP + 64) of each tile, or half the columns."""
    SPLIT_N: gl.constexpr = args.SPLIT_N
    STAGES: gl.constexpr = args.full.shape[0]
    BLOCK_K: gl.constexpr = args.x_smem.type.shape[2]
    WIDTH: gl.constexpr = args.w_smem.type.shape[2 if args.TRANSPOSED else 1]
    COLUMNS: gl.constexpr = 2 * WIDTH if SPLIT_N else WIDTH
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    y_smem = args.y_smem_0 if WARP_GROUP == 0 else args.y_smem_1
    dtype: gl.constexpr = args.y_desc.dtype
    wait_for_predecessors()
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), _n_tiles(args, COLUMNS), gl.num_programs(0)):
        expert, m, last, n = _get_tile(args, tile, COLUMNS)
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
        if SPLIT_N and not args.ACTIVATION:
            _store(args.y_desc, args.p_y, y, m, last, n, args.N, y_smem)
        elif m < last:
            left, right = gl.split(y.reshape([HALF, 2, WIDTH // 2]).permute([0, 2, 1]))
            if args.ACTIVATION:
                size = args.N // 2
                n = n // 2
                if args.HAS_H:
                    _store(args.h_desc, args.p_h, left, m, last, n, args.N, y_smem)
                    _store(args.h_desc, args.p_h, right, m, last, size + n, args.N, y_smem)
                product = silu_and_mul(left.to(gl.float32), right.to(gl.float32), dtype).to(dtype)
                _store(args.y_desc, args.p_y, product, m, last, n, size, y_smem)
            else:
                _store(args.y_desc, args.p_y, left, m, last, n, args.N, y_smem)
                _store(args.y_desc, args.p_y, right, m, last, n + WIDTH // 2, args.N, y_smem)
    tma.store_wait(0)


@gluon.jit
def grouped_matmul_hopper_kernel(
    d_x,  # descriptor of x [R, K] with tiles of 16 to 64 rows and BLOCK_K columns
    d_w,  # of the weights [E * N, K] with tiles [WIDTH, BLOCK_K], half as wide if ACTIVATION; TRANSPOSED: [E * K, N]
    d_y,  # of y [R, N], or [R, N // 2] if ACTIVATION, with tiles of 64 rows
    d_h,  # of h [R, N], with the same tiles
    p_tiles,  # [tile rows + 1, 4], int32: their number; then the expert of each, its first row, the expert's last
    p_y,  # [R, N], or [R, N // 2]
    p_h,  # [R, N]
    p_weights,  # [T, TOP_K], fp32: routing weights
    p_rows,  # [R], int32: the pair of a row, or -1
    N,
    K,
    E,
    WIDTH: gl.constexpr,  # columns of a consumer's wgmma
    STAGES: gl.constexpr,
    SPLIT_N: gl.constexpr,  # tiles of 64 rows
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_H: gl.constexpr,  # ACTIVATION: gate and up, rounded, are stored too
    PREFETCH: gl.constexpr,  # the kernel before writes neither the weight nor the tiles, nor do those before it still
):
    """y[r] = x[r] @ w[expert of r].T (* routing weight of r, in the accumulator); zeros behind the last expert.

    ACTIVATION: y[r] = silu(gate) * up of (gate, up) = h[r], which is that product.
    """
    n_x: gl.constexpr = 1 if SPLIT_N else 2
    n_w: gl.constexpr = 2 if SPLIT_N else 1
    x_smem = gl.allocate_shared_memory(d_x.dtype, [n_x * STAGES, HALF, d_x.block_type.shape[1]], d_x.layout)
    w_smem = gl.allocate_shared_memory(
        d_w.dtype,
        [n_w * STAGES, d_w.block_type.shape[0] if TRANSPOSED else WIDTH, d_w.block_type.shape[1]],
        d_w.layout,
    )
    y_smem_0 = gl.allocate_shared_memory(d_y.dtype, d_y.block_type.shape, d_y.layout)
    y_smem_1 = gl.allocate_shared_memory(d_y.dtype, d_y.block_type.shape, d_y.layout)
    full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    init_barriers(full, 1)
    init_barriers(empty, 2)
    args = PartitionArgs(
        *(d_x, d_w, d_y, d_h, p_tiles, p_y, p_h, p_weights, p_rows, x_smem, w_smem, y_smem_0, y_smem_1, full, empty),
        *(N, K, E, SPLIT_N, GROUP_M, TRANSPOSED, HAS_WEIGHTS, ACTIVATION, HAS_H, PREFETCH),
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
    *,
    activation: bool = False,
    h: torch.Tensor | None = None,
    prefetch: bool = False,
) -> None:
    """y[R, N] of x [R, K] and weight [E, N, K], contiguous or the transpose of what is; see `launch.hopper_serves`.

    tiles: of `c.block_m` rows. activation: y [R, N / 2] is silu(gate) * up of what the product is, and that is h [R, N]
    where it is given; N / 2 is a multiple of half the columns of a tile, and the weight is contiguous.
    prefetch: neither the kernel before, nor one that it began before the end of, writes the weight or the tiles.
    """
    (n_rows, k), (num_experts, n, _) = x.shape, weight.shape
    transposed = weight.stride(2) != 1
    split_n = c.block_m == HALF.value
    width = c.block_n // 2 if split_n else c.block_n
    w_rows = width // 2 if activation else width
    y_block = HALF.value, (width // 2 if activation else c.block_n // 2)
    stored = (num_experts * k, n) if transposed else (num_experts * n, k)
    weights, rows = routing or (None, None)
    recorded(grouped_matmul_hopper_kernel)[(num_sms,)](
        tma.descriptor(x, (n_rows, k), x.stride(0), (c.x_rows, c.block_k)),
        tma.descriptor(weight, stored, stored[1], (c.block_k, width) if transposed else (w_rows, c.block_k)),
        tma.descriptor(y, (n_rows, y.shape[1]), y.shape[1], y_block),
        None if h is None else tma.descriptor(h, (n_rows, n), n, y_block),
        *(tiles, y, h, weights, rows, n, k, num_experts),
        WIDTH=width,
        STAGES=c.stages,
        SPLIT_N=split_n,
        GROUP_M=c.group_m,
        TRANSPOSED=transposed,
        HAS_WEIGHTS=routing is not None,
        ACTIVATION=activation,
        HAS_H=h is not None,
        PREFETCH=prefetch,
        num_warps=4,
        maxnreg=168,
        launch_pdl=True,
        **PINNED,
    )
