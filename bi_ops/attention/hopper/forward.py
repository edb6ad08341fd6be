"""Attention's forward on Hopper, warp-specialised, written in Gluon: `attention_kernel`'s order, and its bits.

A program takes a tile of queries of one head, and another when it is done, until none is left.

    loader    1 warp       copies the tile's Q, then K and V step by step, into rings of shared memory
    products  2 or 3 teams of 4 warps  64 rows each: S, the exponentials, O, as `walk` says
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from bi_ops.attention.config import ForwardConfig, check_order
from bi_ops.attention.hopper.descriptors import rows
from bi_ops.attention.hopper.lists import by_length, steps_of, take, tile_of
from bi_ops.attention.hopper.parts import LN2, LOG2E, ROWS, clear_rows, inverse
from bi_ops.attention.hopper.walk import stage_of, walk, walk_ahead
from bi_ops.attention.order import KeySteps
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv


@gluon.jit
def _load(
    descriptors,
    tiles,
    bars,
    lists,
    sizes,
    H: gl.constexpr,
    HEADS: gl.constexpr,
    TEAMS: gl.constexpr,
    CAUSAL: gl.constexpr,
    AHEAD: gl.constexpr,
    STAY: gl.constexpr,
    EQUAL: gl.constexpr,
):
    d_q, d_k, d_v = descriptors
    s_q, s_k, s_v = tiles
    STAGES: gl.constexpr = s_k.shape[0]
    BLOCK_N: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    bar_q, bar_k, bar_v, bar_q_free, bar_k_free, bar_v_free, bar_tail, _bar_turn = bars
    p_cu_q, p_cu_k, p_lists, p_count, p_items = lists
    PLACES: gl.constexpr = bar_q.shape[0] // bar_q_free.shape[0]  # of teams: a power of two
    QUERIES: gl.constexpr = bar_q_free.shape[0]
    p_item = p_items + gl.program_id(0) * QUERIES
    n_seqs, n_tiles = sizes
    items = n_tiles * 0
    step = n_tiles * 0
    tails = n_tiles * 0
    i_item = gl.program_id(0)
    while i_item < n_tiles * H:
        head, q_start, k_start, m, q_len, k_len = tile_of(
            p_cu_q, p_cu_k, p_lists, i_item, n_seqs, n_tiles, H, TEAMS * ROWS, EQUAL
        )
        n_steps, _n_full = steps_of(m, q_len, k_len, TEAMS * ROWS, BLOCK_N, CAUSAL)
        if m < q_len:
            place = items % QUERIES
            mbarrier.wait(bar_q_free.index(place), (items // QUERIES & 1) ^ 1)
            items += 1
            gl.store(p_item + place, i_item)
            for team in gl.static_range(TEAMS):
                bar = bar_q.index(place * PLACES + team)
                mbarrier.expect(bar, d_q.block_type.nbytes)
                row = q_start + m + team * ROWS
                tma.async_copy_global_to_shared(d_q, [row, head * D], bar, s_q.index(place * PLACES + team))
            column = head // HEADS * D
            # In the order in which they are asked for: K of a step before V of the step before it.
            for i in range(0, n_steps + 1):
                if i < n_steps:
                    stage = step % STAGES
                    bar_free = bar_v_free if AHEAD else bar_k_free
                    mbarrier.wait(bar_free.index(stage), ((step // STAGES) & 1) ^ 1)
                    mbarrier.expect(bar_k.index(stage), d_k.block_type.nbytes)
                    tma.async_copy_global_to_shared(
                        d_k, [k_start + i * BLOCK_N, column], bar_k.index(stage), s_k.index(stage)
                    )
                if i > 0:
                    stage = (step - 1) % STAGES
                    n = (i - 1) * BLOCK_N
                    if not AHEAD:  # where K of the step has found the stage free, for both
                        mbarrier.wait(bar_v_free.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
                    if k_len - n < BLOCK_N:
                        mbarrier.expect(bar_tail, d_v.block_type.nbytes)
                        tma.async_copy_global_to_shared(d_v, [k_start + n, column], bar_tail, s_v.index(stage))
                        mbarrier.wait(bar_tail, tails & 1)
                        tails += 1
                        clear_rows(s_v.index(stage), k_len - n, 1)
                        fence_async_shared()
                        mbarrier.arrive(bar_v.index(stage))
                    else:
                        mbarrier.expect(bar_v.index(stage), d_v.block_type.nbytes)
                        tma.async_copy_global_to_shared(
                            d_v, [k_start + n, column], bar_v.index(stage), s_v.index(stage)
                        )
                step += 1
            step -= 1
        i_item = n_tiles * H
        if STAY:
            i_item = gl.num_programs(0) + take(p_count)
    place = items % QUERIES
    mbarrier.wait(bar_q_free.index(place), (items // QUERIES & 1) ^ 1)
    gl.store(p_item + place, n_tiles * H)
    for team in gl.static_range(TEAMS):
        mbarrier.arrive(bar_q.index(place * PLACES + team))


@gluon.jit
def _products(
    memory,
    tiles,
    bars,
    given,
    TEAM: gl.constexpr,
    H: gl.constexpr,
    TEAMS: gl.constexpr,
    CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,
    AHEAD: gl.constexpr,
    EQUAL: gl.constexpr,
):
    p_out, p_lse = memory
    s_q, s_k, s_v = tiles
    STAGES: gl.constexpr = s_k.shape[0]
    BLOCK_N: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    bar_q, bar_k, bar_v, bar_q_free, bar_k_free, bar_v_free, _bar_tail, bar_turn = bars
    lists, sizes, scale, n_tokens = given
    p_cu_q, p_cu_k, p_lists, _p_count, p_items = lists
    PLACES: gl.constexpr = bar_q.shape[0] // bar_q_free.shape[0]  # of teams: a power of two
    QUERIES: gl.constexpr = bar_q_free.shape[0]
    p_item = p_items + gl.program_id(0) * QUERIES
    n_seqs, n_tiles = sizes
    DTYPE: gl.constexpr = s_q.dtype
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    l_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    l_r: gl.constexpr = gl.SliceLayout(1, l_s)
    l_out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    lane = TEAM * ROWS + gl.arange(0, ROWS, l_r)
    scale2 = LOG2E * scale
    items = n_tiles * 0
    step = n_tiles * 0
    place = n_tiles * 0
    mbarrier.wait(bar_q.index(TEAM), 0)
    i_item = gl.load(p_item)
    while i_item < n_tiles * H:
        head, q_start, _k_start, m, q_len, k_len = tile_of(
            p_cu_q, p_cu_k, p_lists, i_item, n_seqs, n_tiles, H, TEAMS * ROWS, EQUAL
        )
        n_steps, n_full = steps_of(m, q_len, k_len, TEAMS * ROWS, BLOCK_N, CAUSAL)
        n_loaded = n_steps
        if AHEAD:  # the team's own rows: no turn is waited for
            n_steps, n_full = steps_of(m + TEAM * ROWS, q_len, k_len, ROWS, BLOCK_N, CAUSAL)
        n_seen = lane * 0 + k_len
        if CAUSAL:
            n_seen = gl.minimum(gl.maximum(m + lane + (k_len - q_len) + 1, 0), k_len)
        q = s_q.index(place * PLACES + TEAM)
        bar_done = bar_q_free.index(place)
        acc = gl.zeros((ROWS, D), gl.float32, l_o)
        total = gl.zeros((ROWS,), gl.float32, l_r)
        top = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
        if n_steps > 0:
            ring_bars = (bar_k, bar_v, bar_k_free, bar_v_free, bar_done, bar_turn)
            limits = (n_seen, scale2)
            if AHEAD:
                acc, top, total = walk_ahead(q, (s_k, s_v), ring_bars, limits, step, n_steps, n_full, l_o)
            else:
                acc, top, total, step = walk(
                    q, (s_k, s_v), ring_bars, limits, step, n_steps, n_full, l_o, TEAM, TEAMS, TURNS
                )
        else:
            mbarrier.arrive(bar_done)
        if AHEAD:
            for i in range(step + n_steps, step + n_loaded):  # what only other teams' rows see
                stage, parity = stage_of(i, STAGES)
                mbarrier.wait(bar_k.index(stage), parity)
                mbarrier.arrive(bar_v_free.index(stage))
            step += n_loaded

        seen = total > 0
        divisor = gl.where(seen, total, 1.0)
        lse = gl.where(seen, (top + gl.log2(divisor)) * LN2, float("inf"))
        gl.store(p_lse + head.to(gl.int64) * n_tokens + q_start + m + lane, lse, mask=m + lane < q_len)
        b_out = acc * gl.convert_layout(inverse(divisor), gl.SliceLayout(1, l_o))[:, None]
        b_out = gl.convert_layout(b_out.to(DTYPE), l_out)
        o_t = m + TEAM * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, l_out))
        o_out = ((q_start + o_t).to(gl.int64) * H + head) * D
        o_d = gl.arange(0, D, gl.SliceLayout(0, l_out))
        gl.store(p_out + o_out[:, None] + o_d[None, :], b_out, mask=(o_t < q_len)[:, None])
        items += 1
        place = items % QUERIES
        mbarrier.wait(bar_q.index(place * PLACES + TEAM), items // QUERIES & 1)
        i_item = gl.load(p_item + place)


@gluon.jit(do_not_specialize=["n_tokens", "n_seqs", "n_tiles"], do_not_specialize_on_alignment=["p_count"])
def attention_forward_kernel(
    d_q,  # [T, H * D], tiles [ROWS, D]
    d_k,  # [Tk, H / HEADS * D], tiles [BLOCK_N, D]
    d_v,  # as d_k
    p_out,  # [T, H, D], contiguous
    p_lse,  # fp32 [H, T], natural logarithm
    p_cu_q,  # int32 [B + 1]
    p_cu_k,  # int32 [B + 1]
    p_lists,  # int32 [2, B]: as `by_length` makes them; not read if EQUAL
    p_count,  # int32 [1]: 0; how many items were taken after the first ones
    p_items,  # int32 [programs, QUERIES], uninitialised: which item each Q in place is of
    scale,  # softmax_scale
    n_tokens,
    n_seqs,
    n_tiles,  # of TEAMS * ROWS queries: as many as there are if EQUAL, else at least
    H: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TEAMS: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,  # tiles of Q in shared memory: that of an item, and those of the next ones
    CAUSAL: gl.constexpr,
    TURNS: gl.constexpr,  # teams hand their products to the tensor cores in turns
    AHEAD: gl.constexpr,  # a step's S is handed over before the exponentials of the step before; then without turns
    STAY: gl.constexpr,  # a program takes items until none is left, else one
    EQUAL: gl.constexpr,  # every sequence has as many queries
):
    DTYPE: gl.constexpr = d_q.dtype
    PLACES: gl.constexpr = 4 if TEAMS == 3 else TEAMS
    s_q = gl.allocate_shared_memory(DTYPE, [QUERIES * PLACES, ROWS, D], d_q.layout)
    s_k = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], d_k.layout)
    s_v = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, D], d_v.layout)
    bar_q = gl.allocate_shared_memory(gl.int64, [QUERIES * PLACES, 1], mbarrier.MBarrierLayout())
    bar_q_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    bar_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar_v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # No barrier that nobody uses: its place is given to what is written, which was seen with a barrier's bits in it.
    if AHEAD:
        bar_k_free = bar_v_free
    else:
        bar_k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if TURNS:
        bar_turn = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    else:
        bar_turn = bar_q
    bar_tail = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUERIES * PLACES):
        mbarrier.init(bar_q.index(i), count=1)
    for i in gl.static_range(QUERIES):
        mbarrier.init(bar_q_free.index(i), count=TEAMS)
    if TURNS:
        for i in gl.static_range(TEAMS):
            mbarrier.init(bar_turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(bar_k.index(i), count=1)
        mbarrier.init(bar_v.index(i), count=1)
        mbarrier.init(bar_v_free.index(i), count=TEAMS)
        if not AHEAD:
            mbarrier.init(bar_k_free.index(i), count=TEAMS)
    mbarrier.init(bar_tail, count=1)
    fence_async_shared()

    descriptors = (d_q, d_k, d_v)
    tiles = (s_q, s_k, s_v)
    bars = (bar_q, bar_k, bar_v, bar_q_free, bar_k_free, bar_v_free, bar_tail, bar_turn)
    lists = (p_cu_q, p_cu_k, p_lists, p_count, p_items)
    sizes = (n_seqs, n_tiles)
    memory = (p_out, p_lse)
    given = (lists, sizes, scale, n_tokens)
    if TEAMS == 2:
        gl.warp_specialize(
            [
                (_products, (memory, tiles, bars, given, 0, H, TEAMS, CAUSAL, TURNS, AHEAD, EQUAL)),
                (_products, (memory, tiles, bars, given, 1, H, TEAMS, CAUSAL, TURNS, AHEAD, EQUAL)),
                (_load, (descriptors, tiles, bars, lists, sizes, H, HEADS, TEAMS, CAUSAL, AHEAD, STAY, EQUAL)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_products, (memory, tiles, bars, given, 0, H, TEAMS, CAUSAL, TURNS, AHEAD, EQUAL)),
                (_products, (memory, tiles, bars, given, 1, H, TEAMS, CAUSAL, TURNS, AHEAD, EQUAL)),
                (_products, (memory, tiles, bars, given, 2, H, TEAMS, CAUSAL, TURNS, AHEAD, EQUAL)),
                (_load, (descriptors, tiles, bars, lists, sizes, H, HEADS, TEAMS, CAUSAL, AHEAD, STAY, EQUAL)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    causal: bool,
    scale: float,
    order: KeySteps,
    config: ForwardConfig,
) -> None:
    """Write out and lse as `attention_kernel` does in this order, bit for bit.

    Args:
        q: [T, Hq, D], bf16 or fp16, D 64, 128 or 256, T > 0. k, v: [Tk, Hkv, D], Tk > 0. out: [T, Hq, D], contiguous.
        lse: fp32 [Hq, T]. cu_q, cu_k: int32 [B + 1], B > 0. max_q: at least the most queries of one.

    Raises:
        ValueError: an order of other steps than 64 or 128 keys.
    """
    check_order(config, order)
    (n_tokens, hq, head_dim), hkv = q.shape, k.shape[1]
    n_seqs = cu_q.shape[0] - 1
    equal = max_q * n_seqs == n_tokens
    block_m = config.warp_groups * ROWS.value
    n_tiles = cdiv(max_q, block_m) * n_seqs if equal else n_tokens // block_m + n_seqs
    lists, count = (cu_q, cu_q.new_zeros(1)) if equal else by_length(cu_q, block_m)
    programs = n_tiles * hq
    if config.persistent:
        programs = min(programs, runtime.multiprocessors(q.device))
    items = cu_q.new_empty((programs, config.q_stages))
    attention_forward_kernel[(programs,)](
        *(rows(q, ROWS.value), rows(k, order.block_n), rows(v, order.block_n), out, lse, cu_q, cu_k, lists),
        *(count, items, scale, n_tokens, n_seqs, n_tiles),
        H=hq,
        HEADS=hq // hkv,
        D=head_dim,
        BLOCK_N=order.block_n,
        TEAMS=config.warp_groups,
        STAGES=config.stages,
        QUERIES=config.q_stages,
        CAUSAL=causal,
        TURNS=config.ping_pong,
        AHEAD=config.overlap,
        STAY=config.persistent,
        EQUAL=equal,
        num_warps=4,
    )
