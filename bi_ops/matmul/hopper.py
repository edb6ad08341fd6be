"""wgrad accumulation in fp32 on Hopper, in Gluon: C[M, N] += G[T, M].T @ X[T, N], the traffic of C behind the GEMM.

The accumulator starts from memory, or from zero where C holds nothing yet, and ends there: 8 bytes per weight, a tenth
of the time of a gradient over 8,192 tokens where nothing hides it. CTAs are persistent: each takes a tile of C of 128
rows, and another when that is done. The tiles of a last wave that would not be full are split along the tokens (serial
split-K): CTAs add the slices of such a tile one after the other, front to back, each at another time between its own
tiles. Where it is split changes no bit.

    producer  1 warp       has TMA copy tiles of G and X, step by step, into stages of shared memory
    consumers 2 x 4 warps  64 rows each. During a tile's mainloop TMA stores the sums of the tile before and loads what
                           C holds of the next; between two tiles, registers and shared memory exchange their contents
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from bi_ops.core.integers import cdiv
from bi_ops.core.launches import filled, recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.accumulator import exchange, join_columns, load_halves, split_columns
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, next_stage
from bi_ops.gluon.semaphore import acquire, release
from bi_ops.gluon.wgrad import wgrad_mainloop
from bi_ops.matmul.config import WgradConfig, split_along_tokens

#: Rows of C that a consumer warp group owns, half a tile's.
HALF = gl.constexpr(64)
#: Warps of a warp group: as many add to a semaphore.
WARPS = gl.constexpr(4)


@aggregate
class Work:
    """A CTA's items: whole tiles, and at most one slice of a tile that is split along the tokens."""

    n_items: gl.tensor
    slice_item: gl.tensor  # which of the items is the slice
    tile: gl.tensor  # the split tile
    begin: gl.tensor  # tokens of the slice
    end: gl.tensor
    n_before: gl.tensor  # slices of that tile before this one


@aggregate
class PartitionArgs:
    """What every partition is given."""

    g_desc: tma.tensor_descriptor
    x_desc: tma.tensor_descriptor
    c_desc: tma.tensor_descriptor
    semaphores: gl.tensor
    g_smem: gl.shared_memory_descriptor
    x_smem: gl.shared_memory_descriptor
    c_smem_0: gl.shared_memory_descriptor  # of C, for each warp group: the left columns and the right
    c_smem_1: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    c_full_0: gl.shared_memory_descriptor
    c_full_1: gl.shared_memory_descriptor
    work: Work
    M: Scalar
    N: Scalar
    T: Scalar
    n_whole: Scalar
    slice_tokens: Scalar
    GROUP_M: gl.constexpr
    ACCUMULATE: gl.constexpr


@gluon.jit
def _get_work(n_tiles, n_whole, slice_tokens, T):
    """A CTA's `Work`. Tiles from `n_whole` on are split.

    CTAs 0, 1, ... take the first slices of all split tiles, before their whole tiles; as many CTAs after those take the
    second slices after their first whole tile, and so on. So CTAs that run at one time are at the same tokens, or at
    two places, and share G and X in L2.
    """
    n_items = gl.cdiv(n_whole - gl.program_id(0), gl.num_programs(0))
    n_split = n_tiles - n_whole
    n_before = gl.program_id(0) // gl.maximum(n_split, 1)
    begin = n_before * slice_tokens
    has_slice = (n_split > 0) & (begin < T)
    slice_item = gl.where(has_slice, n_before, 2**30)
    tile = n_whole + gl.program_id(0) % gl.maximum(n_split, 1)
    end = gl.minimum(begin + slice_tokens, T)
    return Work(n_items + has_slice.to(gl.int32), slice_item, tile, begin, end, n_before)


@gluon.jit
def _get_item(work, i, T):
    """(tile, first token, last) of a CTA's item `i`."""
    tile = gl.program_id(0) + (i - (i > work.slice_item).to(gl.int32)) * gl.num_programs(0)
    is_slice = i == work.slice_item
    return gl.where(is_slice, work.tile, tile), gl.where(is_slice, work.begin, 0), gl.where(is_slice, work.end, T)


@gluon.jit
def _corner(args, tile, WARP_GROUP: gl.constexpr):
    """(first row, first column) of a warp group's half of a tile. L2 swizzle: GROUP_M tile rows share G and X in L2."""
    BLOCK_N: gl.constexpr = args.x_smem.type.shape[2]
    GROUP_M: gl.constexpr = args.GROUP_M
    n_m = gl.cdiv(args.M, 2 * HALF)
    n_n = gl.cdiv(args.N, BLOCK_N)
    first_m = tile // (GROUP_M * n_n) * GROUP_M
    rows = min(n_m - first_m, GROUP_M)
    within = tile % (GROUP_M * n_n)
    return (2 * (first_m + within % rows) + WARP_GROUP) * HALF, within // rows * BLOCK_N


@gluon.jit
def _producer(args):
    """Tiles of G and X, in the order in which both warp groups need them."""
    STAGES: gl.constexpr = args.x_smem.type.shape[0]
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    g_smem, x_smem = args.g_smem, args.x_smem
    stage = 0
    phase = 1  # a stage that was never filled counts as empty
    for i in range(0, args.work.n_items):
        tile, begin, end = _get_item(args.work, i, args.T)
        m, n = _corner(args, tile, 0)
        for t in range(begin, end, BLOCK_T):
            mbarrier.wait(args.empty.index(stage), phase)
            full = args.full.index(stage)
            mbarrier.expect(full, 2 * args.g_desc.block_type.nbytes + args.x_desc.block_type.nbytes)
            tma.async_load(args.g_desc, [t, m], full, g_smem.index(2 * stage))
            tma.async_load(args.g_desc, [t, m + HALF], full, g_smem.index(2 * stage + 1))
            tma.async_load(args.x_desc, [t, n], full, x_smem.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    """Rows [64 WARP_GROUP, 64 WARP_GROUP + 64) of each tile."""
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    BLOCK_N: gl.constexpr = args.x_smem.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    c_desc = args.c_desc
    c_smem = args.c_smem_0 if WARP_GROUP == 0 else args.c_smem_1
    c_full = args.c_full_0 if WARP_GROUP == 0 else args.c_full_1
    work, T = args.work, args.T
    n_items, slice_item = work.n_items, work.slice_item
    p_semaphore = args.semaphores + (work.tile - args.n_whole) * 2 + WARP_GROUP
    tile, begin, end = _get_item(work, 0, T)  # no other CTA has a slice of it before
    m, n = _corner(args, tile, WARP_GROUP)
    acc = gl.zeros([HALF, BLOCK_N], gl.float32, LAYOUT)
    c_phase = 0
    if args.ACCUMULATE:
        load_halves(c_desc, m, n, c_full, c_smem, True)
        mbarrier.wait(c_full, 0)
        left, right = split_columns(acc, BLOCK_N)
        PART: gl.constexpr = left.type.layout
        acc = join_columns(c_smem.index(0).load(PART), c_smem.index(1).load(PART), BLOCK_N, LAYOUT)
        c_phase = 1
    stage = 0
    phase = 0
    for i in range(0, n_items):
        follows = i + 1 < n_items
        next_tile, next_begin, next_end = _get_item(work, i + 1, T)
        # CTAs access C at different times, a sixteenth to a half into a tile, so that not all load memory at once.
        # A slice's sum is released soon after it, and loaded late before it, when the CTA before has released it.
        sixteenths = gl.where(i == slice_item + 1, 1, 1 + gl.program_id(0) % 8)
        late = gl.minimum(gl.cdiv(args.slice_tokens * 16, T) + 2, 15)
        sixteenths = gl.where(i + 1 == slice_item, late, sixteenths)
        middle = begin + gl.cdiv(end - begin, BLOCK_T) * sixteenths // 16 * BLOCK_T
        acc, stage, phase = wgrad_mainloop(args, acc, begin, middle, stage, phase, WARP_GROUP)
        tma.store_wait(0)  # the sums of the tile before have left shared memory
        if (i == slice_item + 1) & (work.end < T):
            release(p_semaphore, p_semaphore)
        if (i + 1 == slice_item) & follows:
            acquire(p_semaphore, work.n_before * WARPS)
        fence_async_shared()
        next_m, next_n = _corner(args, next_tile, WARP_GROUP)
        is_sum = follows
        if not args.ACCUMULATE:
            is_sum = follows & (i + 1 == slice_item)  # the sum of the slice before
        load_halves(c_desc, next_m, next_n, c_full, c_smem, is_sum)
        acc, stage, phase = wgrad_mainloop(args, acc, middle, end, stage, phase, WARP_GROUP)

        mbarrier.wait(c_full, c_phase, pred=is_sum)
        left, right = split_columns(acc, BLOCK_N)
        left = exchange(left, c_smem.index(0))
        right = exchange(right, c_smem.index(1))
        acc = join_columns(left, right, BLOCK_N, LAYOUT)
        if not args.ACCUMULATE:
            acc = gl.where(is_sum, acc, 0.0)
        fence_async_shared()
        tma.async_store(c_desc, [m, n], c_smem.index(0))
        tma.async_store(c_desc, [m, n + BLOCK_N // 2], c_smem.index(1))
        begin = next_begin
        end = next_end
        m = next_m
        n = next_n
        if args.ACCUMULATE:  # else C is loaded for one item at most
            c_phase ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "T", "n_whole", "slice_tokens"])
def wgrad_kernel(
    d_g,  # descriptor of G [T, M] with tiles [BLOCK_T, 64]
    d_x,  # descriptor of X [T, N] with tiles [BLOCK_T, BLOCK_N]
    d_c,  # descriptor of C [M, N], fp32, with tiles [64, BLOCK_N // 2]
    p_semaphores,  # int32 zeros [tiles - n_whole, 2]: warps that have added their slice to half a tile
    M,
    N,
    T,
    n_whole,  # tiles that one CTA computes; the others are split along the tokens
    slice_tokens,  # tokens of a split tile that a CTA takes, a multiple of BLOCK_T
    STAGES: gl.constexpr,  # of G and X
    GROUP_M: gl.constexpr,
    ACCUMULATE: gl.constexpr,  # C holds a sum; else what it holds is not read
):
    """C += G.T @ X in the canonical order; any number of CTAs, each with a whole tile at least.

    A CTA waits only for CTAs with a lower id, which run or are done: no deadlock on any number of SMs.
    """
    BLOCK_T: gl.constexpr = d_x.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_x.block_type.shape[1]
    g_smem = gl.allocate_shared_memory(d_g.dtype, [2 * STAGES, BLOCK_T, HALF], d_g.layout)
    x_smem = gl.allocate_shared_memory(d_x.dtype, [STAGES, BLOCK_T, BLOCK_N], d_x.layout)
    c_smem_0 = gl.allocate_shared_memory(gl.float32, [2, HALF, BLOCK_N // 2], d_c.layout)
    c_smem_1 = gl.allocate_shared_memory(gl.float32, [2, HALF, BLOCK_N // 2], d_c.layout)
    full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    c_full_0 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    c_full_1 = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(c_full_0, count=1)
    mbarrier.init(c_full_1, count=1)
    work = _get_work(gl.cdiv(M, 2 * HALF) * gl.cdiv(N, BLOCK_N), n_whole, slice_tokens, T)
    args = PartitionArgs(
        *(d_g, d_x, d_c, p_semaphores, g_smem, x_smem, c_smem_0, c_smem_1, full, empty, c_full_0, c_full_1),
        *(work, M, N, T, n_whole, slice_tokens, GROUP_M, ACCUMULATE),
    )
    gl.warp_specialize(
        [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
        [4, 1],
        [240, 24],
    )


def launch(
    g: torch.Tensor, x: torch.Tensor, c: torch.Tensor, s: WgradConfig, num_sms: int, accumulate: bool = True
) -> None:
    """c[M, N] += g[T, M].T @ x[T, N], the accumulator starting from what c holds, or unless `accumulate` from zero.

    Args:
        g, x: bf16 or fp16, one dtype. c: fp32. Rows are contiguous, and everything starts at a multiple of 16 bytes.
        num_sms: as many CTAs run, if there are as many tiles.
    """
    (t, m), n = g.shape, x.shape[1]
    tiles = cdiv(m, 2 * HALF.value) * cdiv(n, s.block_n)
    n_whole, slice_tokens = split_along_tokens(tiles, t, s.block_t, num_sms)
    semaphores = filled(c, 2 * (tiles - n_whole), torch.int32)
    recorded(wgrad_kernel)[(min(tiles, num_sms),)](
        tma.matrix_descriptor(g, [s.block_t, HALF.value]),
        tma.matrix_descriptor(x, [s.block_t, s.block_n]),
        tma.matrix_descriptor(c, [HALF.value, s.block_n // 2]),
        semaphores,
        m,
        n,
        t,
        n_whole,
        slice_tokens,
        STAGES=s.stages,
        GROUP_M=s.group_m,
        ACCUMULATE=accumulate,
        num_warps=4,
        maxnreg=168,
        **PINNED,
    )
