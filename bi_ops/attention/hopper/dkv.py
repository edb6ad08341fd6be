"""dK and dV on Hopper at head_dim 256, warp-specialised, written in Gluon: `attention_dkv_kernel`'s bits.

One program owns 64 keys of a sequence and a key head, and walks the rows (query, head of the group) that see them.

    loader   1 warp       copies Q and dO of the next rows, with the two numbers per row, into a ring of shared memory
    products 2 x 4 warps  P and dS of half the rows each, left in shared memory for both, and half the columns of dV and
                          dK. P is taken and exchanged while the tensor cores are at dP, and dS while they are at dV.
                          To hand over the next rows' S before that would take both stages, and leave none to load into
"""

from __future__ import annotations

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

from bi_ops.attention.config import DkvConfig, check_order
from bi_ops.attention.hopper.descriptors import copyable, layout, rows
from bi_ops.attention.hopper.lists import by_length, pairs_of_program
from bi_ops.attention.hopper.parts import LOG2E, clear_rows
from bi_ops.attention.order import TwoPass
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv

TEAMS = gl.constexpr(2)
BLOCK_N = gl.constexpr(64)  # keys: what four warps hold of a product
BLOCK_R = gl.constexpr(64)  # rows of a step
HALF = gl.constexpr(32)  # of them a team's
# Of rows in shared memory, and of P and dS. They are the same on purpose: rows of a step are there only when both teams
# are done with those of the step STAGES before it, and so with its P and dS, whose places may then be written again.
STAGES = gl.constexpr(2)


@gluon.jit
def _load(descriptors, numbers, tiles, bars, place, HEADS: gl.constexpr, D: gl.constexpr):
    d_q, d_g, d_k, d_v = descriptors
    p_shift, p_delta = numbers
    s_q, s_g, s_k, s_v, _, _, s_shift, s_delta = tiles
    bar_q, bar_g, bar_free, bar_kv, _, _ = bars
    q_start, n_rows, k_row, _, i_h, first, n_steps = place
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    lane = gl.arange(0, BLOCK_R, layout)
    if n_steps > 0:
        mbarrier.expect(bar_kv, d_k.block_type.nbytes + d_v.block_type.nbytes)
        tma.async_copy_global_to_shared(d_k, [k_row, i_h * D], bar_kv, s_k.index(0))
        tma.async_copy_global_to_shared(d_v, [k_row, i_h * D], bar_kv, s_v.index(0))
    for step in range(0, n_steps):
        i = step % STAGES
        o_r = (first + step) * BLOCK_R + lane
        query = q_start + (first + step) * (BLOCK_R // HEADS)
        # Asked for before the wait, which hides how long they take.
        b_shift = gl.load(p_shift + o_r, mask=o_r < n_rows, other=0.0)
        b_delta = gl.load(p_delta + o_r, mask=o_r < n_rows, other=0.0)
        mbarrier.wait(bar_free.index(i), (step // STAGES & 1) ^ 1)
        mbarrier.expect(bar_q.index(i), d_q.block_type.nbytes)
        tma.async_copy_global_to_shared(d_q, [query, i_h * HEADS, 0], bar_q.index(i), s_q.index(i))
        mbarrier.expect(bar_g.index(i), d_g.block_type.nbytes)
        tma.async_copy_global_to_shared(d_g, [query, i_h * HEADS, 0], bar_g.index(i), s_g.index(i))
        s_shift.index(i).store(b_shift)
        s_delta.index(i).store(b_delta)
        mbarrier.arrive(bar_q.index(i))


@gluon.jit
def _zero(step):
    """0, in a way that keeps the compiler from computing every descriptor of a tile ahead of the loop, and spilling."""
    return step >> 30


@gluon.jit
def _rows(s_rows, step):
    """The rows of a step, [BLOCK_R, D]."""
    return s_rows.index(step % STAGES).reshape([BLOCK_R, s_rows.shape[3]])


@gluon.jit
def _begin(step, tiles, bars, n_valid, b_k, zeros, TEAM: gl.constexpr):
    """Wait for the rows of a step, clear those past the end, and hand a team's S and dP to the tensor cores."""
    s_q, s_g, s_k, s_v, _, _, _, _ = tiles
    bar_q, bar_g, _, _, _, _ = bars
    q, g = _rows(s_q, step), _rows(s_g, step)
    mbarrier.wait(bar_q.index(step % STAGES), step // STAGES & 1)
    if n_valid < BLOCK_R:
        mbarrier.wait(bar_g.index(step % STAGES), step // STAGES & 1)
        clear_rows(q, n_valid, 4)
        clear_rows(g, n_valid, 4)
        fence_async_shared()
        gl.thread_barrier()
    q_t = q.slice(TEAM * HALF, HALF).permute((1, 0))
    g_t = g.slice(TEAM * HALF, HALF).permute((1, 0))
    FIRST: gl.constexpr = b_k.shape[1]
    REST: gl.constexpr = q_t.shape[0] - FIRST
    k = s_k.index(_zero(step)).slice(FIRST, REST, 1)
    b_s = warpgroup_mma(b_k, q_t.slice(0, FIRST), zeros, use_acc=False, is_async=True)
    b_s = warpgroup_mma(k, q_t.slice(FIRST, REST), b_s, is_async=True)
    mbarrier.wait(bar_g.index(step % STAGES), step // STAGES & 1)
    b_dp = warpgroup_mma(s_v.index(_zero(step)), g_t, zeros, use_acc=False, is_async=True)
    return b_s, b_dp


@gluon.jit
def _leave(x, s_x, bar, step, TEAM: gl.constexpr):
    """A team's half of P or dS to shared memory."""
    s_x.index(step % STAGES * TEAMS + TEAM).store(x.to(s_x.dtype))
    fence_async_shared()
    mbarrier.arrive(bar.index(step % STAGES))


@gluon.jit
def _begin_sum(own, s_x, bar, s_rows, acc, step, TEAM: gl.constexpr):
    """Hand a team's columns of dV or dK to the tensor cores: `own` half of P or dS, and the other team's when left."""
    COLS: gl.constexpr = s_rows.shape[3] // TEAMS
    l_own: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16]), 2)
    y = _rows(s_rows, step).slice(TEAM * COLS, COLS, 1)
    for half in gl.static_range(TEAMS):
        if half == TEAM:
            # From registers: shared memory is what the tensor cores wait for.
            x = gl.convert_layout(own.to(s_x.dtype), l_own)
            acc = warpgroup_mma(x, y.slice(half * HALF, HALF), acc, is_async=True)
        else:
            mbarrier.wait(bar.index(step % STAGES), step // STAGES & 1)
            x_s = s_x.index(step % STAGES * TEAMS + half)
            acc = warpgroup_mma(x_s, y.slice(half * HALF, HALF), acc, is_async=True)
    return acc


@gluon.jit
def _products(
    memory,
    tiles,
    bars,
    place,
    scale,
    shift_q,
    TEAM: gl.constexpr,
    HKV: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    p_dk, p_dv = memory
    s_q, s_g, s_k, _, s_p, s_ds, s_shift, s_delta = tiles
    _, _, bar_free, bar_kv, bar_p, bar_ds = bars
    _, n_rows, k_row, n_keys, i_h, first, n_steps = place
    COLS: gl.constexpr = D // TEAMS
    DTYPE: gl.constexpr = p_dk.dtype.element_ty
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    l_kv: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    scale2 = LOG2E * scale
    zeros = gl.zeros((BLOCK_N, HALF), gl.float32, l_s)
    acc_k = gl.zeros((BLOCK_N, COLS), gl.float32, l_kv)
    acc_v = gl.zeros((BLOCK_N, COLS), gl.float32, l_kv)
    # The first row that sees each key.
    first_row = (shift_q + gl.arange(0, BLOCK_N, gl.SliceLayout(1, l_s))) * HEADS
    o_r = TEAM * HALF + gl.arange(0, HALF, gl.SliceLayout(0, l_s))
    mbarrier.wait(bar_kv, 0, pred=n_steps > 0)
    # Half of K stays in registers: shared memory is read less.
    b_k = s_k.index(0).slice(0, D // 2, 1).load(gl.DotOperandLayout(0, l_s, 2))
    for step in range(0, n_steps):
        row = (first + step) * BLOCK_R
        b_s, b_dp = _begin(step, tiles, bars, n_rows - row, b_k, zeros, TEAM)
        b_shift = s_shift.index(step % STAGES).slice(TEAM * HALF, HALF).load(gl.SliceLayout(0, l_s))
        b_delta = s_delta.index(step % STAGES).slice(TEAM * HALF, HALF).load(gl.SliceLayout(0, l_s))
        b_s = warpgroup_mma_wait(1, deps=(b_s,))
        b_p = gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(b_shift[None, :], b_s)[0]))
        if CAUSAL:
            b_p = gl.where(first_row[:, None] <= row + o_r[None, :], b_p, 0.0)
        _leave(b_p, s_p, bar_p, step, TEAM)
        acc_v = _begin_sum(b_p, s_p, bar_p, s_g, acc_v, step, TEAM)
        b_dp = warpgroup_mma_wait(TEAMS, deps=(b_dp,))
        b_ds = b_p * (b_dp - b_delta[None, :])
        _leave(b_ds, s_ds, bar_ds, step, TEAM)
        acc_k = _begin_sum(b_ds, s_ds, bar_ds, s_q, acc_k, step, TEAM)
        acc_k, acc_v = warpgroup_mma_wait(0, deps=(acc_k, acc_v))
        mbarrier.arrive(bar_free.index(step % STAGES))
    o_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, l_kv))
    o_d = TEAM * COLS + gl.arange(0, COLS, gl.SliceLayout(0, l_kv))
    o_out = (((k_row + o_n).to(gl.int64) * HKV + i_h) * D)[:, None] + o_d[None, :]
    m_n = (o_n < n_keys)[:, None]
    gl.store(p_dv + o_out, acc_v.to(DTYPE), mask=m_n)
    gl.store(p_dk + o_out, (acc_k * scale).to(DTYPE), mask=m_n)


@gluon.jit(do_not_specialize=["n_tokens", "n_seqs", "n_processors"])
def attention_dkv_hopper_kernel(
    d_q,  # [T, HKV * HEADS, D], tiles [BLOCK_R / HEADS, HEADS, D]
    d_g,  # as d_q
    d_k,  # [Tk, HKV * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    p_shift,  # fp32 [HKV, T, HEADS]: -lse in base 2
    p_delta,  # fp32 [HKV, T, HEADS]: row sums of dO * O
    p_dk,  # [Tk, HKV, D], contiguous
    p_dv,  # as p_dk
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_lists,  # int32 [2, B]: as `by_length` makes them; not read if EQUAL
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    n_processors,
    HKV: gl.constexpr,
    HEADS: gl.constexpr,  # divides BLOCK_R
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,  # every sequence has as many keys
):
    # Pairs of a sequence and a key head run side by side, as many as fill the multiprocessors, and of each the tiles
    # from the first: that has most rows, and what runs at one time reads rows that are in L2 together.
    i_b, n_pairs, n_of_pair, j = pairs_of_program(p_cu_k, p_lists, n_seqs, HKV, BLOCK_N, EQUAL)
    together = gl.maximum(n_processors // n_of_pair, 1)
    i = gl.minimum(j // (n_of_pair * together) * together, n_pairs - 1)
    width = gl.minimum(together, n_pairs - i)
    j -= i * n_of_pair
    i_n = j // width
    i_b += (i + j % width) // HKV
    i_h = (i + j % width) % HKV
    q_start = gl.load(p_cu_q + i_b)
    q_len = gl.load(p_cu_q + i_b + 1) - q_start
    k_start = gl.load(p_cu_k + i_b)
    k_len = gl.load(p_cu_k + i_b + 1) - k_start
    # A program whose tile does not exist walks none; it must not return, the warps of all parts end together.
    n_keys = k_len - i_n * BLOCK_N
    n_rows = q_len * HEADS
    seen = i_n * BLOCK_N - (k_len - q_len)  # the first query that sees the first of these keys
    first = n_rows * 0
    if CAUSAL:
        first = gl.maximum(seen, 0) * HEADS // BLOCK_R
    n_steps = gl.where(n_keys > 0, gl.maximum((n_rows + BLOCK_R - 1) // BLOCK_R - first, 0), 0)

    DTYPE: gl.constexpr = d_q.dtype
    s_q = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_R // HEADS, HEADS, D], d_q.layout)
    s_g = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_R // HEADS, HEADS, D], d_g.layout)
    s_k = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_k.layout)
    s_v = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    l_half: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    s_p = gl.allocate_shared_memory(DTYPE, [STAGES * TEAMS, BLOCK_N, HALF], l_half)
    s_ds = gl.allocate_shared_memory(DTYPE, [STAGES * TEAMS, BLOCK_N, HALF], l_half)
    l_numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    s_shift = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_R], l_numbers)
    s_delta = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_R], l_numbers)
    bar_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_p = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_ds = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_kv = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bar_q.index(i), count=2)  # Q, and the two numbers per row
        mbarrier.init(bar_g.index(i), count=1)
        mbarrier.init(bar_free.index(i), count=TEAMS)
        mbarrier.init(bar_p.index(i), count=TEAMS)
        mbarrier.init(bar_ds.index(i), count=TEAMS)
    mbarrier.init(bar_kv, count=1)
    fence_async_shared()

    first_number = (i_h.to(gl.int64) * n_tokens + q_start) * HEADS
    descriptors = (d_q, d_g, d_k, d_v)
    numbers = (p_shift + first_number, p_delta + first_number)
    memory = (p_dk, p_dv)
    tiles = (s_q, s_g, s_k, s_v, s_p, s_ds, s_shift, s_delta)
    bars = (bar_q, bar_g, bar_free, bar_kv, bar_p, bar_ds)
    place = (q_start, n_rows, k_start + i_n * BLOCK_N, n_keys, i_h, first, n_steps)
    gl.warp_specialize(
        [
            (_products, (memory, tiles, bars, place, scale, seen, 0, HKV, HEADS, D, CAUSAL)),
            (_products, (memory, tiles, bars, place, scale, seen, 1, HKV, HEADS, D, CAUSAL)),
            (_load, (descriptors, numbers, tiles, bars, place, HEADS, D)),
        ],
        [4, 1],
        [240, 24],
    )


def _grouped(t: torch.Tensor, heads: int) -> TensorDescriptor:
    """t [T, H, D] as the copy engine sees it: `BLOCK_R` rows (token, one of `heads` heads side by side) at a time."""
    t = copyable(t)
    block = [BLOCK_R.value // heads, heads, t.shape[2]]
    return TensorDescriptor(t, list(t.shape), [t.stride(0), t.shape[2], 1], block, layout(128, 16, 3))


def launch(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_k: int,
    causal: bool,
    scale: float,
    order: TwoPass,
    config: DkvConfig,
) -> None:
    """Write dk and dv as `attention_dkv_kernel` does, bit for bit.

    Args:
        g: [T, Hq, D], contiguous, bf16 or fp16, D 256, T > 0. q: likewise, any strides. k, v: [Tk, Hkv, D], Tk > 0,
            Hq / Hkv a power of two up to 64. shift, delta: of `launch_delta`. dk, dv: [Tk, Hkv, D], contiguous.
            cu_q, cu_k: int32 [B + 1], B > 0. max_k: at least the most keys of one.

    Raises:
        ValueError: an order of other steps than 16, 32 or 64 rows.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), (n_keys, hkv, _) = q.shape, k.shape
    n_seqs, block_n = cu_q.shape[0] - 1, BLOCK_N.value
    equal = max_k * n_seqs == n_keys
    programs = cdiv(max_k, block_n) * n_seqs if equal else n_keys // block_n + n_seqs
    processors = runtime.multiprocessors(q.device)
    lists = cu_k if equal else by_length(cu_k, block_n)[0]
    attention_dkv_hopper_kernel[(programs * hkv,)](
        *(_grouped(q, hq // hkv), _grouped(g, hq // hkv), rows(k, block_n), rows(v, block_n)),
        *(shift, delta, dk, dv, cu_q, cu_k, lists, scale, n_tokens, n_seqs, processors),
        HKV=hkv,
        HEADS=hq // hkv,
        D=head_dim,
        CAUSAL=causal,
        EQUAL=equal,
        num_warps=4,
    )
