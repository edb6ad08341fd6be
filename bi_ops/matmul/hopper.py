"""Weight gradients carried on in fp32 on Hopper, in Gluon: C[M, N] += G[T, M].T @ X[T, N], C's traffic behind products.

The accumulator starts in memory and ends there: 8 bytes per weight, a tenth of the time of a gradient over 8,192 tokens
where nothing hides it. A program takes a tile of C of 128 rows, and another when it is done, until none is left. The
tiles of a last round that would not be full are cut along the tokens: programs carry such a sum on one after the other,
front to back, each at another time between its own tiles. Where it is cut changes no bit.

    fetcher   1 warp       copies tiles of G and X, step by step, into a ring of shared memory
    products  2 x 4 warps  64 rows each. While they multiply, the copy engine takes the sums of the tile before away and
                           brings what C holds of the next; between two tiles registers and shared memory change places
"""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bi_ops.core.integers import cdiv
from bi_ops.core.turns import end_turn, wait_turn
from bi_ops.matmul.config import WgradConfig, split_along_tokens

# Later releases than triton 3.6 call them by other names.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

#: Rows of C that one group of four warps owns, half a tile's.
HALF = gl.constexpr(64)
#: Warps of a group: as many end a turn.
WARPS = gl.constexpr(4)


@gluon.jit
def _plan(tiles, whole, piece, T):
    """(items, place of the piece among them, its tile, first token, last, pieces of that tile before).

    A program's items are whole tiles and at most one piece of a cut tile, [whole, tiles): programs 0, 1, ... take the
    first pieces of all of them and begin with these, the next as many programs take the second ones after their first
    whole tile, and so on. So those that work at one time are at the same tokens, or at two places, and share G and X.
    """
    items = gl.cdiv(whole - gl.program_id(0), gl.num_programs(0))
    cut = tiles - whole
    before = gl.program_id(0) // gl.maximum(cut, 1)
    begin = before * piece
    taken = (cut > 0) & (begin < T)
    place = gl.where(taken, before, 2147483647)
    tile = whole + gl.program_id(0) % gl.maximum(cut, 1)
    return items + taken.to(gl.int32), place, tile, begin, gl.minimum(begin + piece, T), before


@gluon.jit
def _item(i, plan, T):
    """(tile, first token, last) of a program's item `i`."""
    _, place, tile, begin, end, _ = plan
    alone = gl.program_id(0) + (i - (i > place).to(gl.int32)) * gl.num_programs(0)
    return gl.where(i == place, tile, alone), gl.where(i == place, begin, 0), gl.where(i == place, end, T)


@gluon.jit
def _corner(tile, M, N, GROUP: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """(first row, first column) of a group's part of a tile. Neighbours share rows of G and X in L2."""
    n_m = gl.cdiv(M, 2 * HALF)
    n_n = gl.cdiv(N, BLOCK_N)
    first_m = tile // (GROUP_M * n_n) * GROUP_M
    rows = min(n_m - first_m, GROUP_M)
    within = tile % (GROUP_M * n_n)
    return (2 * (first_m + within % rows) + GROUP) * HALF, within // rows * BLOCK_N


@gluon.jit
def _fetch(d_g, d_x, s_g, s_x, full, empty, plan, M, N, T, GROUP_M: gl.constexpr):
    """Brings tiles of G and X, in the order in which both groups need them."""
    SLOTS: gl.constexpr = s_x.type.shape[0]
    BLOCK_T: gl.constexpr = s_x.type.shape[1]
    BLOCK_N: gl.constexpr = s_x.type.shape[2]
    slot = 0
    phase = 1  # a slot that was never filled counts as emptied
    for i in range(0, plan[0]):
        tile, begin, end = _item(i, plan, T)
        m, n = _corner(tile, M, N, 0, BLOCK_N, GROUP_M)
        for t in range(begin, end, BLOCK_T):
            mbarrier.wait(empty.index(slot), phase)
            filled = full.index(slot)
            mbarrier.expect(filled, 2 * d_g.block_type.nbytes + d_x.block_type.nbytes)
            _load(d_g, [t, m], filled, s_g.index(2 * slot))
            _load(d_g, [t, m + HALF], filled, s_g.index(2 * slot + 1))
            _load(d_x, [t, n], filled, s_x.index(slot))
            slot, phase = _next(slot, phase, SLOTS)


@gluon.jit
def _next(slot, phase, SLOTS: gl.constexpr):
    """The slot after this one, and the phase of its barriers."""
    wraps = slot == SLOTS - 1
    return gl.where(wraps, 0, slot + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def _before(slot, SLOTS: gl.constexpr):
    return gl.where(slot == 0, SLOTS - 1, slot - 1)


@gluon.jit
def _walk(acc, begin, end, slot, phase, s_g, s_x, full, empty, GROUP: gl.constexpr):
    """Tokens [begin, end) into the accumulator, front to back. Nothing is under way when it returns."""
    SLOTS: gl.constexpr = s_x.type.shape[0]
    BLOCK_T: gl.constexpr = s_x.type.shape[1]
    for t in range(begin, end, BLOCK_T):
        mbarrier.wait(full.index(slot), phase)
        a = s_g.index(2 * slot + GROUP).permute((1, 0))
        acc = warpgroup_mma(a, s_x.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its slot
        mbarrier.arrive(empty.index(_before(slot, SLOTS)), pred=t != begin)
        slot, phase = _next(slot, phase, SLOTS)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(_before(slot, SLOTS)), pred=end > begin)
    return acc, slot, phase


@gluon.jit
def _halves(acc, N: gl.constexpr):
    """The left and the right columns of an accumulator; which thread holds what stays as it is."""
    return gl.split(acc.reshape([HALF, 2, N // 2]).permute([0, 2, 1]))


@gluon.jit
def _whole(left, right, N: gl.constexpr, LAYOUT: gl.constexpr):
    """The accumulator whose halves these are."""
    return gl.convert_layout(gl.join(left, right).permute([0, 2, 1]).reshape([HALF, N]), LAYOUT, assert_trivial=True)


@gluon.jit
def _exchange(part, buffer):
    """What was in the buffer; the part takes its place."""
    LAYOUT: gl.constexpr = part.type.layout
    there = buffer.load(LAYOUT)
    buffer.store(part)
    return there


@gluon.jit
def _bring(d_c, m, n, here, s_c, wanted):
    """Starts to fetch what C holds of a group's rows of a tile."""
    mbarrier.expect(here, 2 * d_c.block_type.nbytes, pred=wanted)
    _load(d_c, [m, n], here, s_c.index(0), pred=wanted)
    _load(d_c, [m, n + d_c.block_type.shape[1]], here, s_c.index(1), pred=wanted)


@gluon.jit
def _multiply(
    d_c,
    p_turns,
    s_g,
    s_x,
    s_c,
    full,
    empty,
    here,
    plan,
    M,
    N,
    T,
    whole,
    piece,
    GROUP: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """Carries rows [64 GROUP, 64 GROUP + 64) of each tile on."""
    BLOCK_T: gl.constexpr = s_x.type.shape[1]
    BLOCK_N: gl.constexpr = s_x.type.shape[2]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    items, place, cut_tile, _, cut_end, before = plan
    p_turn = p_turns + (cut_tile - whole) * 2 + GROUP
    tile, begin, end = _item(0, plan, T)  # no other program has a part of it before
    m, n = _corner(tile, M, N, GROUP, BLOCK_N, GROUP_M)
    _bring(d_c, m, n, here, s_c, True)
    mbarrier.wait(here, 0)
    left, right = _halves(gl.zeros([HALF, BLOCK_N], gl.float32, LAYOUT), BLOCK_N)
    PART: gl.constexpr = left.type.layout
    acc = _whole(s_c.index(0).load(PART), s_c.index(1).load(PART), BLOCK_N, LAYOUT)
    slot = 0
    phase = 0
    turn = 1
    for i in range(0, items):
        follows = i + 1 < items
        next_tile, next_begin, next_end = _item(i + 1, plan, T)
        # Programs turn to C at different times, a sixteenth to a half into a tile: not all of them to memory at once.
        # A piece is handed on soon, and brought when whoever had it before is through with his.
        sixteenths = gl.where(i == place + 1, 1, 1 + gl.program_id(0) % 8)
        sixteenths = gl.where(i + 1 == place, gl.minimum(gl.cdiv(piece * 16, T) + 2, 15), sixteenths)
        middle = begin + gl.cdiv(end - begin, BLOCK_T) * sixteenths // 16 * BLOCK_T
        acc, slot, phase = _walk(acc, begin, middle, slot, phase, s_g, s_x, full, empty, GROUP)
        tma.store_wait(0)  # the sums of the tile before have left shared memory
        if (i == place + 1) & (cut_end < T):
            end_turn(p_turn, p_turn)
        if (i + 1 == place) & follows:
            wait_turn(p_turn, before * WARPS)
        fence_async_shared()
        next_m, next_n = _corner(next_tile, M, N, GROUP, BLOCK_N, GROUP_M)
        _bring(d_c, next_m, next_n, here, s_c, follows)
        acc, slot, phase = _walk(acc, middle, end, slot, phase, s_g, s_x, full, empty, GROUP)

        mbarrier.wait(here, turn, pred=follows)
        left, right = _halves(acc, BLOCK_N)
        left = _exchange(left, s_c.index(0))
        right = _exchange(right, s_c.index(1))
        acc = _whole(left, right, BLOCK_N, LAYOUT)
        fence_async_shared()
        _store(d_c, [m, n], s_c.index(0))
        _store(d_c, [m, n + BLOCK_N // 2], s_c.index(1))
        begin = next_begin
        end = next_end
        m = next_m
        n = next_n
        turn ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "T", "whole", "piece"])
def carry_kernel(
    d_g,  # descriptor of G [T, M] with tiles [BLOCK_T, 64]
    d_x,  # descriptor of X [T, N] with tiles [BLOCK_T, BLOCK_N]
    d_c,  # descriptor of C [M, N], fp32, with tiles [64, BLOCK_N // 2]
    p_turns,  # int32 zeros [tiles - whole, 2]: warps that have ended their turn at half a tile
    M,
    N,
    T,
    whole,  # tiles that one program computes alone; the others are cut
    piece,  # tokens of a cut tile that a program takes, a multiple of BLOCK_T
    SLOTS: gl.constexpr,  # steps of G and X that shared memory holds
    GROUP_M: gl.constexpr,
):
    """C += G.T @ X in the canonical order; any number of programs, each with a whole tile at least.

    A program waits for those with a lower id only, which run or are done: no deadlock on any number of SMs.
    """
    BLOCK_T: gl.constexpr = d_x.block_type.shape[0]
    BLOCK_N: gl.constexpr = d_x.block_type.shape[1]
    s_g = gl.allocate_shared_memory(d_g.dtype, [2 * SLOTS, BLOCK_T, HALF], d_g.layout)
    s_x = gl.allocate_shared_memory(d_x.dtype, [SLOTS, BLOCK_T, BLOCK_N], d_x.layout)
    s_above = gl.allocate_shared_memory(gl.float32, [2, HALF, BLOCK_N // 2], d_c.layout)
    s_below = gl.allocate_shared_memory(gl.float32, [2, HALF, BLOCK_N // 2], d_c.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    above = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    below = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    mbarrier.init(above, count=1)
    mbarrier.init(below, count=1)
    plan = _plan(gl.cdiv(M, 2 * HALF) * gl.cdiv(N, BLOCK_N), whole, piece, T)
    gl.warp_specialize(
        [
            (_multiply, (d_c, p_turns, s_g, s_x, s_above, full, empty, above, plan, M, N, T, whole, piece, 0, GROUP_M)),
            (_multiply, (d_c, p_turns, s_g, s_x, s_below, full, empty, below, plan, M, N, T, whole, piece, 1, GROUP_M)),
            (_fetch, (d_g, d_x, s_g, s_x, full, empty, plan, M, N, T, GROUP_M)),
        ],
        [4, 1],
        [240, 24],
    )


@functools.cache
def _layout(rows: int, columns: int, element_size: int) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory. Kept, because Triton makes one in Python, slowly."""
    dtype = gl.float32 if element_size == 4 else gl.bfloat16  # fp16 lies as bf16 does
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


def _descriptor(t: torch.Tensor, tile: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, tile, _layout(*tile, t.element_size()))


def launch(g: torch.Tensor, x: torch.Tensor, c: torch.Tensor, s: WgradConfig, processors: int) -> None:
    """c[M, N] += g[T, M].T @ x[T, N], the accumulator starting from what c holds.

    Args:
        g, x: bf16 or fp16, one dtype. c: fp32. Rows are contiguous, and everything starts at a multiple of 16 bytes.
        processors: as many programs run, if there are as many tiles.
    """
    (t, m), n = g.shape, x.shape[1]
    tiles = cdiv(m, 2 * HALF.value) * cdiv(n, s.block_n)
    whole, piece = split_along_tokens(tiles, t, s.block_t, processors)
    turns = torch.zeros(2 * (tiles - whole), dtype=torch.int32, device=c.device)
    carry_kernel[(min(tiles, processors),)](
        _descriptor(g, [s.block_t, HALF.value]),
        _descriptor(x, [s.block_t, s.block_n]),
        _descriptor(c, [HALF.value, s.block_n // 2]),
        turns,
        m,
        n,
        t,
        whole,
        piece,
        SLOTS=s.stages,
        GROUP_M=s.group_m,
        num_warps=4,
        maxnreg=168,
    )
