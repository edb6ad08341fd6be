"""wgrad accumulation in fp32 on Hopper where one wave is enough: a CTA for each tile of C[M, N] += G[T, M].T @ X[T, N].

`hopper.wgrad_kernel` keeps half of its shared memory for C, so that the traffic of C hides behind the next tile's
mainloop. A gradient of no more tiles than SMs has no next tile: here the accumulators are loaded from C and stored to
it by their own threads, and all shared memory holds stages of G and X. Registers are left for three consumer warp
groups too, whose tiles of 192 rows cut small gradients into just as many tiles as there are SMs. The rows of a tile
may be columns of X as well as of G, whichever is a multiple of them: the tensor cores' product commutes, so the sums
have the same bits.

    producer  1 warp           has TMA copy tiles of A and B, step by step, into stages of shared memory
    consumers 2 or 3 x 4 warps 64 rows each

Three accumulators of 256 columns leave no registers for a warp of the producer: there the first consumer does its work.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from bi_ops.core.integers import cdiv
from bi_ops.core.launches import recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, next_stage, previous_stage
from bi_ops.gluon.wgrad import wgrad_mainloop
from bi_ops.matmul.config import WgradTileConfig

#: Rows of a tile that a consumer warp group owns.
ROWS = gl.constexpr(64)


@aggregate
class PartitionArgs:
    """What every partition is given. A's columns are the tile's rows: G and X, or X and G if TRANSPOSED."""

    a_desc: tma.tensor_descriptor
    b_desc: tma.tensor_descriptor
    c: gl.tensor
    g_smem: gl.shared_memory_descriptor  # of A; named as `wgrad_mainloop` has them
    x_smem: gl.shared_memory_descriptor  # of B
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    m: gl.tensor  # the tile's first row
    n: gl.tensor  # and column
    M: Scalar
    N: Scalar
    T: Scalar
    ACCUMULATE: gl.constexpr
    TRANSPOSED: gl.constexpr
    FEEDS: gl.constexpr  # the first warp group does the producer's work


@gluon.jit
def _issue_load(args, t, stage):
    """Start to load the tiles of a step into an empty stage."""
    WARP_GROUPS: gl.constexpr = args.g_smem.type.shape[0] // args.x_smem.type.shape[0]
    full = args.full.index(stage)
    mbarrier.expect(full, WARP_GROUPS * args.a_desc.block_type.nbytes + args.b_desc.block_type.nbytes)
    for group in gl.static_range(WARP_GROUPS):
        tma.async_load(args.a_desc, [t, args.m + group * ROWS], full, args.g_smem.index(WARP_GROUPS * stage + group))
    tma.async_load(args.b_desc, [t, args.n], full, args.x_smem.index(stage))


@gluon.jit
def _producer(args):
    """Tiles of A and B, in the order in which all warp groups need them."""
    STAGES: gl.constexpr = args.x_smem.type.shape[0]
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    stage = 0
    phase = 1  # a stage that was never filled counts as empty
    for t in range(0, args.T, BLOCK_T):
        mbarrier.wait(args.empty.index(stage), phase)
        _issue_load(args, t, stage)
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _feeding_mainloop(args, acc):
    """`wgrad_mainloop` of the first warp group, over all tokens, which also does the work of `_producer`.

    It refills the stage of two steps before, which the other warp groups have released by then, or nearly.
    """
    STAGES: gl.constexpr = args.x_smem.type.shape[0]
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    WARP_GROUPS: gl.constexpr = args.g_smem.type.shape[0] // STAGES
    for i in gl.static_range(STAGES):
        if i * BLOCK_T < args.T:
            _issue_load(args, i * BLOCK_T, i)
    stage = args.T * 0
    phase = args.T * 0
    for t in range(0, args.T, BLOCK_T):
        mbarrier.wait(args.full.index(stage), phase)
        a = args.g_smem.index(WARP_GROUPS * stage).permute((1, 0))
        acc = warpgroup_mma(a, args.x_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        before = previous_stage(stage, STAGES)
        mbarrier.arrive(args.empty.index(before), pred=t > 0)
        refill = t + (STAGES - 2) * BLOCK_T
        if (t >= 2 * BLOCK_T) & (refill < args.T):
            two_before = previous_stage(before, STAGES)
            mbarrier.wait(args.empty.index(two_before), gl.where(two_before > stage, phase ^ 1, phase))
            _issue_load(args, refill, two_before)
        stage, phase = next_stage(stage, phase, STAGES)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit
def _pointers(args, LAYOUT: gl.constexpr, WARP_GROUP: gl.constexpr):
    """(pointers to a warp group's part of C, which of them are in C)"""
    BLOCK_N: gl.constexpr = args.x_smem.type.shape[2]
    o_m = args.m + WARP_GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    o_n = args.n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    M = args.M // 4 * 4  # a multiple of 4 it is: rows of C are aligned, and two columns are loaded at once
    N = args.N // 4 * 4
    mask = (o_m < M)[:, None] & (o_n < N)[None, :]
    if args.TRANSPOSED:
        return args.c + o_m[:, None] + (o_n.to(gl.int64) * M)[None, :], mask
    else:
        return args.c + (o_m.to(gl.int64) * N)[:, None] + o_n[None, :], mask


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    """Rows [64 WARP_GROUP, 64 WARP_GROUP + 64) of the tile."""
    BLOCK_N: gl.constexpr = args.x_smem.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    p_c, mask = _pointers(args, LAYOUT, WARP_GROUP)
    if args.ACCUMULATE:
        acc = gl.load(p_c, mask, 0.0)
    else:
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    if args.FEEDS and WARP_GROUP == 0:
        acc = _feeding_mainloop(args, acc)
    else:
        start = args.T * 0
        acc, _stage, _phase = wgrad_mainloop(args, acc, start, args.T, start, start, WARP_GROUP)
    gl.store(p_c, acc, mask)


@gluon.jit(do_not_specialize=["M", "N", "T"])
def wgrad_tile_kernel(
    d_a,  # descriptor of A [T, M] with tiles [BLOCK_T, 64]
    d_b,  # descriptor of B [T, N] with tiles [BLOCK_T, BLOCK_N]
    p_c,  # fp32 [M, N], [N, M] if TRANSPOSED
    M,
    N,
    T,
    STAGES: gl.constexpr,  # of A and B
    WARP_GROUPS: gl.constexpr,  # 2 or 3
    ACCUMULATE: gl.constexpr,  # C holds a sum; else what it holds is not read
    TRANSPOSED: gl.constexpr,
):
    """C += A.T @ B in the canonical order, a tile of it."""
    BLOCK_T: gl.constexpr = d_b.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_b.block_type.shape[1]
    a_smem = gl.allocate_shared_memory(d_a.dtype, [WARP_GROUPS * STAGES, BLOCK_T, ROWS], d_a.layout)
    b_smem = gl.allocate_shared_memory(d_b.dtype, [STAGES, BLOCK_T, BLOCK_N], d_b.layout)
    full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARP_GROUPS)
    n_m = gl.cdiv(M, WARP_GROUPS * ROWS)
    m = gl.program_id(0) % n_m * (WARP_GROUPS * ROWS)
    n = gl.program_id(0) // n_m * BLOCK_N
    FEEDS: gl.constexpr = WARP_GROUPS == 3 and BLOCK_N == 256
    args = PartitionArgs(d_a, d_b, p_c, a_smem, b_smem, full, empty, m, n, M, N, T, ACCUMULATE, TRANSPOSED, FEEDS)
    if FEEDS:
        gl.warp_specialize(
            [(_consumer, (args, 0)), (_consumer, (args, 1)), (_consumer, (args, 2))],
            [4, 4],
            [168, 168],
        )
    elif WARP_GROUPS == 2:
        gl.warp_specialize(
            [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (args, 0)), (_consumer, (args, 1)), (_consumer, (args, 2)), (_producer, (args,))],
            [4, 4, 1],
            [160, 160, 24],
        )


def launch(g: torch.Tensor, x: torch.Tensor, c: torch.Tensor, s: WgradTileConfig, accumulate: bool = True) -> None:
    """c[M, N] += g[T, M].T @ x[T, N], as `hopper.launch`, whose arguments these are; N and M are multiples of 4."""
    a, b = (x, g) if s.transposed else (g, x)
    (t, m), n = a.shape, b.shape[1]
    recorded(wgrad_tile_kernel)[(cdiv(m, s.block_m) * cdiv(n, s.block_n),)](
        tma.matrix_descriptor(a, [s.block_t, ROWS.value]),
        tma.matrix_descriptor(b, [s.block_t, s.block_n]),
        c,
        m,
        n,
        t,
        STAGES=s.stages,
        WARP_GROUPS=s.warp_groups,
        ACCUMULATE=accumulate,
        TRANSPOSED=s.transposed,
        num_warps=4,
        maxnreg=128 if s.warp_groups == 3 and s.block_n < 256 else 168,
        **PINNED,
    )
