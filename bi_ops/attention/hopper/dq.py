"""dQ on Hopper at head_dim 256, warp-specialised, written in Gluon: `attention_dq_kernel`'s bits.

A program takes a tile of queries of one head, and another when it is done, until none is left.

    loader   1 warp       copies the tile's Q and dO, then K and V step by step: two steps of K, for S and later for dQ,
                          and one of V fit into shared memory beside them
    products 2 x 4 warps  64 rows each. dQ of a step, from dS in registers, is handed to the tensor cores together with
                          S and dP of the next one, and P is taken while they are at dP
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

from bi_ops.attention.config import DqConfig, check_order
from bi_ops.attention.hopper.descriptors import rows
from bi_ops.attention.hopper.lists import by_length, steps_of, take, tile_of
from bi_ops.attention.hopper.parts import LOG2E, ROWS, clear_rows
from bi_ops.attention.order import TwoPass
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv

TEAMS = gl.constexpr(2)
BLOCK_N = gl.constexpr(64)  # keys of a step: part of the order
STAGES = gl.constexpr(2)  # of K


@gluon.jit
def _load(
    descriptors,
    tiles,
    bars,
    lists,
    sizes,
    H: gl.constexpr,
    HEADS: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,
):
    d_q, d_g, d_k, d_v = descriptors
    s_q, s_g, s_k, s_v = tiles
    bar_q, bar_g, bar_k, bar_v, bar_q_free, bar_g_free, bar_k_free, bar_v_free = bars
    p_cu_q, p_cu_k, p_lists, p_count, p_items = lists
    D: gl.constexpr = s_k.shape[2]
    n_seqs, n_tiles = sizes
    p_item = p_items + gl.program_id(0) * TEAMS
    items = n_tiles * 0
    step = n_tiles * 0
    i_item = gl.program_id(0)
    while i_item < n_tiles * H:
        head, q_start, k_start, m, q_len, k_len = tile_of(
            p_cu_q, p_cu_k, p_lists, i_item, n_seqs, n_tiles, H, TEAMS * ROWS, EQUAL
        )
        n_steps, _n_full = steps_of(m, q_len, k_len, TEAMS * ROWS, BLOCK_N, CAUSAL)
        if m < q_len:
            column = head // HEADS * D
            # In the order in which places become free.
            if n_steps > 0:
                stage = step % STAGES
                mbarrier.wait(bar_k_free.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(bar_k.index(stage), d_k.block_type.nbytes)
                tma.async_copy_global_to_shared(d_k, [k_start, column], bar_k.index(stage), s_k.index(stage))
            for team in gl.static_range(TEAMS):
                mbarrier.wait(bar_q_free.index(team), (items & 1) ^ 1)
                gl.store(p_item + team, i_item)
                mbarrier.expect(bar_q.index(team), d_q.block_type.nbytes)
                row = q_start + m + team * ROWS
                tma.async_copy_global_to_shared(d_q, [row, head * D], bar_q.index(team), s_q.index(team))
                mbarrier.wait(bar_g_free.index(team), (items & 1) ^ 1)
                mbarrier.expect(bar_g.index(team), d_g.block_type.nbytes)
                tma.async_copy_global_to_shared(d_g, [row, head * D], bar_g.index(team), s_g.index(team))
            for i in range(0, n_steps):
                row = k_start + i * BLOCK_N
                mbarrier.wait(bar_v_free, (step & 1) ^ 1)
                mbarrier.expect(bar_v, d_v.block_type.nbytes)
                tma.async_copy_global_to_shared(d_v, [row, column], bar_v, s_v.index(0))
                step += 1
                if i + 1 < n_steps:
                    stage = step % STAGES
                    mbarrier.wait(bar_k_free.index(stage), (step // STAGES & 1) ^ 1)
                    mbarrier.expect(bar_k.index(stage), d_k.block_type.nbytes)
                    tma.async_copy_global_to_shared(d_k, [row + BLOCK_N, column], bar_k.index(stage), s_k.index(stage))
            items += 1
        i_item = gl.num_programs(0) + take(p_count)
    for team in gl.static_range(TEAMS):
        mbarrier.wait(bar_q_free.index(team), (items & 1) ^ 1)
        gl.store(p_item + team, n_tiles * H)
        mbarrier.arrive(bar_q.index(team))


@gluon.jit
def _zero(step):
    """0, in a way that keeps the compiler from computing every descriptor of a tile ahead of the loop, and spilling."""
    return step >> 30


@gluon.jit
def _begin_nt(a, b, zeros):
    """Hand a @ b.T to the tensor cores."""
    return warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _clear(s_k, bar_k, step, n_valid):
    """Clear keys past the end of the sequence: dS is 0 there, but they may be NaNs, and are multiplied by it."""
    if n_valid < BLOCK_N:
        mbarrier.wait(bar_k.index(step % STAGES), step // STAGES & 1)
        clear_rows(s_k.index(step % STAGES), n_valid, 4)
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _probabilities(b_s, shift, scale2):
    return gl.exp2(gl.fma(b_s, gl.full_like(b_s, scale2), gl.broadcast(shift[:, None], b_s)[0]))


@gluon.jit
def _gradient(b_p, b_dp, delta, n, n_seen, dtype: gl.constexpr, MASKED: gl.constexpr):
    """dS. Where a key is not seen it is 0: P there need not be, and dP of a row past the end may be a NaN."""
    b_ds = b_p * (b_dp - delta[:, None])
    if MASKED:
        o_n = gl.arange(0, b_ds.shape[1], gl.SliceLayout(0, b_ds.type.layout))
        b_ds = gl.where(o_n[None, :] < (n_seen - n)[:, None], b_ds, 0.0)
    return b_ds.to(dtype)


@gluon.jit
def _walk(
    tiles,
    bars,
    row_numbers,
    scale2,
    step,
    items,
    n_steps,
    n_full,
    l_o: gl.constexpr,
    TEAM: gl.constexpr,
):
    """dQ before it is scaled, of a team's rows that see something, from `step` of the rings on."""
    s_q, s_g, s_k, s_v = tiles
    _bar_q, bar_g, bar_k, bar_v, bar_q_free, bar_g_free, bar_k_free, bar_v_free = bars
    n_seen, k_len, shift, delta = row_numbers
    D: gl.constexpr = s_k.shape[2]
    DTYPE: gl.constexpr = s_k.dtype
    l_s: gl.constexpr = n_seen.type.layout.parent
    l_ds: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    mbarrier.wait(bar_k.index(step % STAGES), step // STAGES & 1)
    _clear(s_k, bar_k, step, k_len)
    b_s = _begin_nt(s_q.index(_zero(step) + TEAM), s_k.index(step % STAGES), zeros)
    mbarrier.wait(bar_g.index(TEAM), items & 1)
    mbarrier.wait(bar_v, step & 1)
    b_dp = _begin_nt(s_g.index(_zero(step) + TEAM), s_v.index(_zero(step)), zeros)
    b_s = warpgroup_mma_wait(1, deps=(b_s,))
    mbarrier.arrive(bar_q_free.index(TEAM), pred=n_steps == 1)
    b_p = _probabilities(b_s, shift, scale2)
    mbarrier.wait(bar_v, step & 1)  # once more: without a barrier ptxas waits for dP before it takes the exponentials
    b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
    mbarrier.arrive(bar_v_free)
    b_ds = _gradient(b_p, b_dp, delta, 0, n_seen, DTYPE, True)
    n_whole = gl.minimum(n_full, n_steps - 1)  # the last step, masked or not, is where Q is given back
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + 1
            stop = n_whole
        else:
            begin = gl.maximum(n_whole, 1)
            stop = n_steps
        for i in range(begin, stop):
            now = step + i
            stage, before = now % STAGES, (now - 1) % STAGES
            if MASKED:
                _clear(s_k, bar_k, now, k_len - i * BLOCK_N)
            b_o = warpgroup_mma(gl.convert_layout(b_ds, l_ds), s_k.index(before), acc, is_async=True)
            mbarrier.wait(bar_k.index(stage), now // STAGES & 1)
            b_s = _begin_nt(s_q.index(_zero(now) + TEAM), s_k.index(stage), zeros)
            mbarrier.wait(bar_v, now & 1)
            b_dp = _begin_nt(s_g.index(_zero(now) + TEAM), s_v.index(_zero(now)), zeros)
            acc = warpgroup_mma_wait(2, deps=(b_o,))
            mbarrier.arrive(bar_k_free.index(before))
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            if MASKED:
                mbarrier.arrive(bar_q_free.index(TEAM), pred=i + 1 == n_steps)
            b_p = _probabilities(b_s, shift, scale2)
            mbarrier.wait(bar_v, now & 1)  # once more, as above
            b_dp = warpgroup_mma_wait(0, deps=(b_dp,))
            mbarrier.arrive(bar_v_free)
            b_ds = _gradient(b_p, b_dp, delta, i * BLOCK_N, n_seen, DTYPE, MASKED == 1)
    mbarrier.arrive(bar_g_free.index(TEAM))
    last = (step + n_steps - 1) % STAGES
    b_o = warpgroup_mma(gl.convert_layout(b_ds, l_ds), s_k.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(bar_k_free.index(last))
    return acc


@gluon.jit
def _products(
    memory,
    tiles,
    bars,
    given,
    TEAM: gl.constexpr,
    H: gl.constexpr,
    HEADS: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,
):
    p_shift, p_delta, p_dq = memory
    bar_q, bar_g, bar_k, bar_v, bar_q_free, bar_g_free, bar_k_free, bar_v_free = bars
    lists, sizes, scale, n_tokens = given
    p_cu_q, p_cu_k, p_lists, _p_count, p_items = lists
    D: gl.constexpr = tiles[2].shape[2]
    n_seqs, n_tiles = sizes
    p_item = p_items + gl.program_id(0) * TEAMS + TEAM
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    l_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    # `l_o` but that threads swap two of their values in a place for two in the next: rows are then written 32 bytes at
    # a time. To reorder more takes shared memory, and none is left.
    l_out: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        [[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS, D],
    )
    lane = TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_s))
    scale2 = LOG2E * scale
    items = n_tiles * 0
    step = n_tiles * 0
    mbarrier.wait(bar_q.index(TEAM), 0)
    i_item = gl.load(p_item)
    while i_item < n_tiles * H:
        head, q_start, _k_start, m, q_len, k_len = tile_of(
            p_cu_q, p_cu_k, p_lists, i_item, n_seqs, n_tiles, H, TEAMS * ROWS, EQUAL
        )
        n_loaded, _n_full = steps_of(m, q_len, k_len, TEAMS * ROWS, BLOCK_N, CAUSAL)
        n_steps, n_full = steps_of(m + TEAM * ROWS, q_len, k_len, ROWS, BLOCK_N, CAUSAL)
        n_seen = lane * 0 + k_len
        if CAUSAL:
            n_seen = gl.minimum(gl.maximum(m + lane + (k_len - q_len) + 1, 0), k_len)
        m_r = m + lane < q_len
        o_row = ((head // HEADS).to(gl.int64) * n_tokens + q_start + m + lane) * HEADS + head % HEADS
        shift = gl.load(p_shift + o_row, mask=m_r, other=0.0)
        delta = gl.load(p_delta + o_row, mask=m_r, other=0.0)
        acc = gl.zeros((ROWS, D), gl.float32, l_o)
        if n_steps > 0:
            acc = _walk(tiles, bars, (n_seen, k_len, shift, delta), scale2, step, items, n_steps, n_full, l_o, TEAM)
        else:
            mbarrier.wait(bar_g.index(TEAM), items & 1)
            mbarrier.arrive(bar_q_free.index(TEAM))
            mbarrier.arrive(bar_g_free.index(TEAM))
        for i in range(step + n_steps, step + n_loaded):  # what only the other team's rows see
            mbarrier.wait(bar_k.index(i % STAGES), i // STAGES & 1)
            mbarrier.arrive(bar_k_free.index(i % STAGES))
            mbarrier.wait(bar_v, i & 1)
            mbarrier.arrive(bar_v_free)
        step += n_loaded

        b_out = gl.convert_layout((acc * scale).to(p_dq.dtype.element_ty), l_out)
        o_t = m + TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_out))
        o_out = ((q_start + o_t).to(gl.int64) * H + head) * D
        o_d = gl.arange(0, D, gl.SliceLayout(0, l_out))
        gl.store(p_dq + o_out[:, None] + o_d[None, :], b_out, mask=(o_t < q_len)[:, None])
        items += 1
        mbarrier.wait(bar_q.index(TEAM), items & 1)
        i_item = gl.load(p_item)


@gluon.jit(do_not_specialize=["n_tokens", "n_seqs", "n_tiles"])
def attention_dq_hopper_kernel(
    d_q,  # [T, H * D], tiles [ROWS, D]
    d_g,  # as d_q
    d_k,  # [Tk, H / HEADS * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    p_shift,  # fp32 [H / HEADS, T, HEADS]: -lse in base 2
    p_delta,  # fp32 [H / HEADS, T, HEADS]: row sums of dO * O
    p_dq,  # [T, H, D], contiguous
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_lists,  # int32 [2, B]: as `by_length` makes them; not read if EQUAL
    p_count,  # int32 [1]: 0; how many items were taken after the first ones
    p_items,  # int32 [programs, TEAMS], uninitialised: which item a team's Q in place is of
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    n_tiles,  # of TEAMS * ROWS queries: as many as there are if EQUAL, else at least
    H: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    CAUSAL: gl.constexpr,
    EQUAL: gl.constexpr,  # every sequence has as many queries
):
    DTYPE: gl.constexpr = d_q.dtype
    s_q = gl.allocate_shared_memory(DTYPE, [TEAMS, ROWS, D], d_q.layout)
    s_g = gl.allocate_shared_memory(DTYPE, [TEAMS, ROWS, D], d_g.layout)
    s_k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], d_k.layout)
    s_v = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, D], d_v.layout)
    bar_q = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    bar_g = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bar_q_free = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    bar_g_free = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    bar_k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(TEAMS):
        mbarrier.init(bar_q.index(i), count=1)
        mbarrier.init(bar_g.index(i), count=1)
        mbarrier.init(bar_q_free.index(i), count=1)
        mbarrier.init(bar_g_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bar_k.index(i), count=1)
        mbarrier.init(bar_k_free.index(i), count=TEAMS)
    mbarrier.init(bar_v, count=1)
    mbarrier.init(bar_v_free, count=TEAMS)
    fence_async_shared()

    descriptors = (d_q, d_g, d_k, d_v)
    tiles = (s_q, s_g, s_k, s_v)
    bars = (bar_q, bar_g, bar_k, bar_v, bar_q_free, bar_g_free, bar_k_free, bar_v_free)
    lists = (p_cu_q, p_cu_k, p_lists, p_count, p_items)
    sizes = (n_seqs, n_tiles)
    memory = (p_shift, p_delta, p_dq)
    given = (lists, sizes, scale, n_tokens)
    gl.warp_specialize(
        [
            (_products, (memory, tiles, bars, given, 0, H, HEADS, CAUSAL, EQUAL)),
            (_products, (memory, tiles, bars, given, 1, H, HEADS, CAUSAL, EQUAL)),
            (_load, (descriptors, tiles, bars, lists, sizes, H, HEADS, CAUSAL, EQUAL)),
        ],
        [4, 1],
        [240, 24],
    )


def launch(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    causal: bool,
    scale: float,
    order: TwoPass,
    config: DqConfig,
) -> None:
    """Write dq as `attention_dq_kernel` does, bit for bit.

    Args:
        g: [T, Hq, D], contiguous, bf16 or fp16, D 256, T > 0. q: likewise, any strides. k, v: [Tk, Hkv, D], Tk > 0.
            shift, delta: of `launch_delta`. dq: [T, Hq, D], contiguous. cu_q, cu_k: int32 [B + 1], B > 0. max_q: at
            least the most queries of one.

    Raises:
        ValueError: an order of other steps than 64 keys.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), hkv = q.shape, k.shape[1]
    n_seqs = cu_q.shape[0] - 1
    equal = max_q * n_seqs == n_tokens
    block_m = TEAMS.value * ROWS.value
    n_tiles = cdiv(max_q, block_m) * n_seqs if equal else n_tokens // block_m + n_seqs
    lists, count = (cu_q, cu_q.new_zeros(1)) if equal else by_length(cu_q, block_m)
    programs = min(n_tiles * hq, runtime.multiprocessors(q.device))
    attention_dq_hopper_kernel[(programs,)](
        *(rows(q, ROWS.value), rows(g, ROWS.value), rows(k, BLOCK_N.value), rows(v, BLOCK_N.value)),
        *(shift, delta, dq, cu_q, cu_k, lists, count, cu_q.new_empty((programs, TEAMS.value))),
        *(scale, n_tokens, n_seqs, n_tiles),
        H=hq,
        HEADS=hq // hkv,
        D=head_dim,
        CAUSAL=causal,
        EQUAL=equal,
        num_warps=4,
    )
