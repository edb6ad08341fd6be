"""GEMMs with K in segments on Hopper, in Gluon: C[M, N] = A[M, K] @ B[K, N], segments added pairwise, rounded once.

CTAs are persistent: each takes every num_programs-th tile of 128 rows. Of each level of the tree one left half waits.
A tile of 128 columns has room for two in registers and for a third in shared memory, so for eight segments; of one of
256, for two segments, half the columns wait in registers, half in shared memory.

    producer  1 warp       has TMA copy tiles of A and B, step by step, into stages of shared memory
    consumers 2 x 4 warps  64 rows each of a tile. While one adds and stores its sums the other one has the tensor cores
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

from bi_ops.core.integers import cdiv
from bi_ops.core.launches import recorded
from bi_ops.core.triton_helpers import PINNED
from bi_ops.gluon import tma
from bi_ops.gluon.accumulator import join_columns, split_columns
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.pipeline import allocate_barriers, init_barriers, next_stage, previous_stage
from bi_ops.matmul.config import HopperSegmentsConfig
from bi_ops.matmul.order import SegmentedOrder

#: Rows of a tile that a consumer warp group owns, half of them.
HALF = gl.constexpr(64)
#: Columns of sums that a warp group has room for in shared memory, and beside an accumulator of 256 in registers.
HELD = gl.constexpr(128)
#: A vector in shared memory.
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@aggregate
class PartitionArgs:
    """What every partition is given."""

    a_desc: tma.tensor_descriptor
    b_desc: tma.tensor_descriptor
    c_desc: tma.tensor_descriptor
    a_smem: gl.shared_memory_descriptor
    b_smem: gl.shared_memory_descriptor
    c_smem_0: gl.shared_memory_descriptor  # for each warp group: sums that leave, or HELD columns that wait
    c_smem_1: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    M: Scalar
    N: Scalar
    K_0: Scalar
    K_1: Scalar
    K_2: Scalar
    segments: Scalar
    SEGMENTS: gl.constexpr
    GROUP_M: gl.constexpr
    TRANSPOSED: gl.constexpr


@gluon.jit
def _corner(args, tile, BLOCK_N: gl.constexpr):
    """(first row, first column) of a tile. L2 swizzle: GROUP_M tile rows share A and B in L2."""
    GROUP_M: gl.constexpr = args.GROUP_M
    n_m = gl.cdiv(args.M, 2 * HALF)
    n_n = gl.cdiv(args.N, BLOCK_N)
    first_m = tile // (GROUP_M * n_n) * GROUP_M
    rows = min(n_m - first_m, GROUP_M)
    within = tile % (GROUP_M * n_n)
    return (first_m + within % rows) * (2 * HALF), within // rows * BLOCK_N


@gluon.jit
def _load_steps(args, m, n, begin, end, stage, phase):
    """Have TMA copy elements [begin, end) of K."""
    STAGES: gl.constexpr = args.full.shape[0]
    BLOCK_K: gl.constexpr = args.a_smem.type.shape[2]
    for k in range(begin, end, BLOCK_K):
        mbarrier.wait(args.empty.index(stage), phase)
        full = args.full.index(stage)
        mbarrier.expect(full, 2 * args.a_desc.block_type.nbytes + args.b_desc.block_type.nbytes)
        tma.async_load(args.a_desc, [m, k], full, args.a_smem.index(2 * stage))
        tma.async_load(args.a_desc, [m + HALF, k], full, args.a_smem.index(2 * stage + 1))
        if args.TRANSPOSED:
            tma.async_load(args.b_desc, [n, k], full, args.b_smem.index(stage))
        else:
            tma.async_load(args.b_desc, [k, n], full, args.b_smem.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _producer(args):
    """Tiles of A and B, in the order in which both warp groups need them: of a segment, its piece of each part of K."""
    BLOCK_N: gl.constexpr = args.b_smem.type.shape[1] if args.TRANSPOSED else args.b_smem.type.shape[2]
    K_0, K_1, K_2 = args.K_0, args.K_1, args.K_2
    stage = args.M * 0
    phase = args.M * 0 + 1  # a stage that was never filled counts as empty
    n_tiles = gl.cdiv(args.M, 2 * HALF) * gl.cdiv(args.N, BLOCK_N)
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        m, n = _corner(args, tile, BLOCK_N)
        for segment in range(0, args.SEGMENTS):
            begin = segment * K_0
            stage, phase = _load_steps(args, m, n, begin, begin + K_0, stage, phase)
            begin = args.SEGMENTS * K_0 + segment * K_1
            stage, phase = _load_steps(args, m, n, begin, begin + K_1, stage, phase)
            begin = args.SEGMENTS * (K_0 + K_1) + segment * K_2
            stage, phase = _load_steps(args, m, n, begin, begin + K_2, stage, phase)


@gluon.jit
def _segment(args, stage, phase, LAYOUT: gl.constexpr, WARP_GROUP: gl.constexpr):
    """A warp group's sum of the next segment. Nothing is in flight when it returns."""
    STAGES: gl.constexpr = args.full.shape[0]
    BLOCK_K: gl.constexpr = args.a_smem.type.shape[2]
    BLOCK_N: gl.constexpr = args.b_smem.type.shape[1] if args.TRANSPOSED else args.b_smem.type.shape[2]
    acc = gl.zeros([HALF, BLOCK_N], gl.float32, LAYOUT)
    size = args.K_0 + args.K_1 + args.K_2
    for k in range(0, size, BLOCK_K):
        mbarrier.wait(args.full.index(stage), phase)
        b = args.b_smem.index(stage)
        if args.TRANSPOSED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(args.a_smem.index(2 * stage + WARP_GROUP), b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its stage
        mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=k != 0)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=size > 0)
    return acc, stage, phase


@gluon.jit
def _flat(part):
    """[64, C] as a vector in which four neighbours are one thread's registers, in their order, and 128 a warp's."""
    C: gl.constexpr = part.shape[1]
    return part.reshape([4, 2, 8, C // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([HALF * C])


@gluon.jit
def _columns(flat, LAYOUT: gl.constexpr):
    """`_flat`'s inverse."""
    C: gl.constexpr = flat.shape[0] // HALF
    part = flat.reshape([C // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([HALF, C])
    return gl.convert_layout(part, LAYOUT, assert_trivial=True)


@gluon.jit
def _put_aside(part, smem):
    """Store a warp group's sums where `_add_waiting` finds them."""
    tma.store_wait(0)  # the sums of the tile before have left it
    tma.reinterpret(smem, [HALF * part.shape[1]], gl.float32, VECTOR).store(_flat(part))


@gluon.jit
def _add_waiting(part, smem):
    """What waits in shared memory + part."""
    flat = _flat(part)
    FLAT: gl.constexpr = flat.type.layout
    LAYOUT: gl.constexpr = part.type.layout
    return _columns(tma.reinterpret(smem, [flat.shape[0]], gl.float32, VECTOR).load(FLAT) + flat, LAYOUT)


@gluon.jit
def _store(args, part, m, n, c_smem):
    """The sums, rounded, to columns from n on of rows from m on; as many at a time as c_smem has."""
    C: gl.constexpr = part.shape[1]
    if c_smem.shape[2] < C:
        left, right = split_columns(part, C)
        _store(args, left, m, n, c_smem)
        _store(args, right, m, n + C // 2, c_smem)
    else:
        tma.store_wait(0)  # the sums before have left shared memory
        c_smem.index(0).store(part.to(args.c_desc.dtype))
        fence_async_shared()
        tma.async_store(args.c_desc, [m, n], c_smem.index(0))


@gluon.jit
def _add_left(total, held, held_pair, c_smem, segment, SEGMENTS: gl.constexpr):
    """The sum of the largest subtree that ends with a segment: level by level what waits is added to the segment's."""
    BLOCK_N: gl.constexpr = total.shape[1]
    LAYOUT: gl.constexpr = total.type.layout
    if segment % 2 == 1:
        if BLOCK_N > HELD:
            left, right = split_columns(total, BLOCK_N)
            left = held + left
            right = _add_waiting(right, c_smem)
            total = join_columns(left, right, BLOCK_N, LAYOUT)
        else:
            total = held + total
            if SEGMENTS > 2 and segment % 4 == 3:
                total = held_pair + total
                if SEGMENTS > 4 and segment == 7:
                    total = _add_waiting(total, c_smem)
    return total


@gluon.jit
def _consumer(args, WARP_GROUP: gl.constexpr):
    """Rows [64 WARP_GROUP, 64 WARP_GROUP + 64) of each tile."""
    BLOCK_N: gl.constexpr = args.b_smem.type.shape[1] if args.TRANSPOSED else args.b_smem.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SPLIT: gl.constexpr = BLOCK_N > HELD
    c_smem = args.c_smem_0 if WARP_GROUP == 0 else args.c_smem_1
    segments = args.SEGMENTS if SPLIT else args.segments  # ptxas spills 200 bytes if it knows that they are four
    stage = args.M * 0
    phase = args.M * 0
    held = gl.zeros([HALF, BLOCK_N], gl.float32, LAYOUT)
    held_pair = held
    if SPLIT:
        held, _ = split_columns(held, BLOCK_N)
    n_tiles = gl.cdiv(args.M, 2 * HALF) * gl.cdiv(args.N, BLOCK_N)
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        m, n = _corner(args, tile, BLOCK_N)
        m += WARP_GROUP * HALF
        if args.SEGMENTS == 1:
            total, stage, phase = _segment(args, stage, phase, LAYOUT, WARP_GROUP)
            _store(args, total, m, n, c_smem)
        else:
            for segment in range(0, segments):
                total, stage, phase = _segment(args, stage, phase, LAYOUT, WARP_GROUP)
                total = _add_left(total, held, held_pair, c_smem, segment, args.SEGMENTS)
                if segment == segments - 1:
                    _store(args, total, m, n, c_smem)
                elif SPLIT:
                    _, right = split_columns(total, BLOCK_N)
                    _put_aside(right, c_smem)
                elif args.SEGMENTS > 4 and segment == 3:
                    _put_aside(total, c_smem)
                held = total  # after every segment: registers that are written either way hold nothing before
                if SPLIT:
                    held, _ = split_columns(total, BLOCK_N)
                elif args.SEGMENTS > 2 and segment % 4 == 1:
                    held_pair = total
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "K_0", "K_1", "K_2", "segments"])
def matmul_segments_hopper_kernel(
    d_a,  # descriptor of A [M, K] with tiles [64, BLOCK_K]
    d_b,  # of B [K, N] with tiles [BLOCK_K, BLOCK_N]; TRANSPOSED: of [N, K] with tiles [BLOCK_N, BLOCK_K]
    d_c,  # of C [M, N] with tiles [64, columns that leave at a time]
    M,
    N,
    K_0,  # elements of each part of K that a segment has, multiples of BLOCK_K
    K_1,
    K_2,
    segments,  # a power of two: up to two if BLOCK_N is 256, to eight if it is 128
    SEGMENTS: gl.constexpr,  # the same
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    TRANSPOSED: gl.constexpr,
):
    """Each segment of K in an accumulator of its own, from zero; these are added pairwise and rounded once."""
    a_smem = gl.allocate_shared_memory(
        d_a.dtype, [2 * STAGES, d_a.block_type.shape[0], d_a.block_type.shape[1]], d_a.layout
    )
    b_smem = gl.allocate_shared_memory(
        d_b.dtype, [STAGES, d_b.block_type.shape[0], d_b.block_type.shape[1]], d_b.layout
    )
    PLACES: gl.constexpr = 4 * HALF * HELD // d_c.block_type.nbytes
    c_shape: gl.constexpr = [PLACES, d_c.block_type.shape[0], d_c.block_type.shape[1]]
    c_smem_0 = gl.allocate_shared_memory(d_c.dtype, c_shape, d_c.layout)
    c_smem_1 = gl.allocate_shared_memory(d_c.dtype, c_shape, d_c.layout)
    full = allocate_barriers(STAGES)
    empty = allocate_barriers(STAGES)
    init_barriers(full, 1)
    init_barriers(empty, 2)
    args = PartitionArgs(
        *(d_a, d_b, d_c, a_smem, b_smem, c_smem_0, c_smem_1, full, empty),
        *(M, N, K_0, K_1, K_2, segments, SEGMENTS, GROUP_M, TRANSPOSED),
    )
    gl.warp_specialize(
        [(_consumer, (args, 0)), (_consumer, (args, 1)), (_producer, (args,))],
        [4, 1],
        [240, 24],
    )


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    order: SegmentedOrder,
    sizes: list[int],
    c: HopperSegmentsConfig,
    num_sms: int,
) -> None:
    """out[M, N] = x[M, K] @ weight[N, K].T; sizes: what a segment has of each part; see `segments.hopper_serves`."""
    (m, k), n = x.shape, weight.shape[0]
    assert order.segments <= c.most_segments
    assert all(size % c.block_k == 0 for size in sizes)  # else a step would be of two segments
    transposed = weight.stride(1) == 1
    programs = min(cdiv(m, 2 * HALF.value) * cdiv(n, c.block_n), num_sms)
    stored = weight if transposed else weight.t()
    b_tile = (c.block_n, c.block_k) if transposed else (c.block_k, c.block_n)
    recorded(matmul_segments_hopper_kernel)[(programs,)](
        tma.descriptor(x, (m, k), x.stride(0), (HALF.value, c.block_k)),
        tma.descriptor(stored, (stored.shape[0], stored.shape[1]), stored.stride(0), b_tile),
        tma.descriptor(out, (m, n), n, (HALF.value, c.columns_leaving(out.dtype))),
        m,
        n,
        *sizes,
        *[0] * (3 - len(sizes)),
        order.segments,
        SEGMENTS=order.segments,
        STAGES=c.stages,
        GROUP_M=c.group_m,
        TRANSPOSED=transposed,
        num_warps=4,
        maxnreg=168,
        **PINNED,
    )
