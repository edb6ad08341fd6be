"""A team's way through the keys of its rows on Hopper: two schedules of the same sums, for `forward`.

`walk`: P V of a step runs with S of the next one, while that one's exponentials are taken. `walk_ahead`: S of the step
after runs then too.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from bi_ops.attention.hopper.parts import ROWS, exponents, softmax_step


@gluon.jit
def walk(
    q,
    tiles,
    bars,
    limits,
    step,
    n_steps,
    n_full,
    l_o: gl.constexpr,
    TEAM: gl.constexpr,
    TEAMS: gl.constexpr,
    TURNS: gl.constexpr,
):
    """(O before it is divided, top, total, next step of the ring) of a tile that sees something from `step` on."""
    s_k, s_v = tiles
    bar_k, bar_v, bar_k_free, bar_v_free, bar_q_free, bar_turn = bars
    n_seen, scale2 = limits
    STAGES: gl.constexpr = s_k.shape[0]
    BLOCK_N: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    DTYPE: gl.constexpr = s_k.dtype
    l_r: gl.constexpr = n_seen.type.layout
    l_s: gl.constexpr = l_r.parent
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    NEXT: gl.constexpr = (TEAM + 1) % TEAMS
    FIRST: gl.constexpr = 1 if TEAM == 0 else 0  # nobody goes before the first team's first turn
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    total = gl.zeros((ROWS,), gl.float32, l_r)
    top = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
    stage = step % STAGES
    mbarrier.wait(bar_k.index(stage), (step // STAGES) & 1)
    if TURNS:
        mbarrier.wait(bar_turn.index(TEAM), (step & 1) ^ FIRST)
    b_s = warpgroup_mma(q, s_k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if TURNS:
        mbarrier.arrive(bar_turn.index(NEXT))
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    mbarrier.arrive(bar_k_free.index(stage))
    if n_full > 0:
        b_p, top, decay, total = softmax_step(b_s, top, total, 0, n_seen, scale2, False)
    else:
        b_p, top, decay, total = softmax_step(b_s, top, total, 0, n_seen, scale2, True)
    step += 1
    mbarrier.wait(bar_k.index(step % STAGES), (step // STAGES) & 1, pred=n_steps > 1)
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + 1
            stop = n_full
        else:
            begin = gl.maximum(n_full, 1)
            stop = n_steps
        for i in range(begin, stop):
            stage = step % STAGES
            stage_v = (step - 1) % STAGES
            if TURNS:
                mbarrier.wait(bar_turn.index(TEAM), (step & 1) ^ FIRST)
            b_s = warpgroup_mma(q, s_k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(bar_v.index(stage_v), ((step - 1) // STAGES) & 1)
            b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
            b_o = warpgroup_mma(b_pt, s_v.index(stage_v), acc, is_async=True)
            if TURNS:
                mbarrier.arrive(bar_turn.index(NEXT))
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            mbarrier.arrive(bar_k_free.index(stage))
            b_p, top, decay, total = softmax_step(b_s, top, total, i * BLOCK_N, n_seen, scale2, MASKED == 1)
            step += 1
            # Asked for early: without a barrier here ptxas waits for O before it takes the exponentials.
            mbarrier.wait(bar_k.index(step % STAGES), (step // STAGES) & 1, pred=i + 1 < n_steps)
            acc = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(bar_v_free.index(stage_v))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, l_o))[:, None]
    mbarrier.arrive(bar_q_free)
    stage_v = (step - 1) % STAGES
    mbarrier.wait(bar_v.index(stage_v), ((step - 1) // STAGES) & 1)
    b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
    b_o = warpgroup_mma(b_pt, s_v.index(stage_v), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(bar_v_free.index(stage_v))
    return acc, top, total, step


@gluon.jit
def stage_of(step, STAGES: gl.constexpr):
    """(which stage of the ring a step is in, parity of its turn there)"""
    step = step.to(gl.uint32)  # whose remainders take fewer instructions
    return (step % STAGES).to(gl.int32), (step // STAGES & 1).to(gl.int32)


@gluon.jit
def walk_ahead(q, tiles, bars, limits, step, n_steps, n_full, l_o: gl.constexpr):
    """`walk` with S further ahead: the next step's S runs while exponentials of this one are taken, as P V does."""
    s_k, s_v = tiles
    bar_k, bar_v, _bar_k_free, bar_free, bar_q_free, _bar_turn = bars
    n_seen, scale2 = limits
    STAGES: gl.constexpr = s_k.shape[0]
    gl.static_assert(STAGES > 2)  # the next K comes while the V before is there
    BLOCK_N: gl.constexpr = s_k.shape[1]
    D: gl.constexpr = s_k.shape[2]
    DTYPE: gl.constexpr = s_k.dtype
    l_r: gl.constexpr = n_seen.type.layout
    l_s: gl.constexpr = l_r.parent
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    total = gl.zeros((ROWS,), gl.float32, l_r)
    top = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
    stage, parity = stage_of(step, STAGES)
    mbarrier.wait(bar_k.index(stage), parity)
    b_s = warpgroup_mma(q, s_k.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    # After the last step comes its S again, which nobody reads.
    after, parity_k = stage_of(gl.where(n_steps > 1, step + 1, step), STAGES)
    mbarrier.wait(bar_k.index(after), parity_k)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    b_x, top, decay = exponents(b_s, top, 0, n_seen, scale2, True)
    b_s = warpgroup_mma(q, s_k.index(after).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(bar_v.index(stage), parity)
    b_p = gl.exp2(b_x)
    total = gl.sum(b_p, 1)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + 1
            stop = n_full
        else:
            begin = gl.maximum(n_full, 1)
            stop = n_steps
        for i in range(begin, stop):
            before, _parity = stage_of(step + i - 1, STAGES)
            b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
            # Barriers, the last one a second time: between two of them ptxas puts nothing off. Else S would be handed
            # over after the exponentials, or these be taken after the wait for O.
            after, parity = stage_of(gl.where(i + 1 < n_steps, step + i + 1, step + i), STAGES)
            mbarrier.wait(bar_k.index(after), parity)
            b_x, top, decay = exponents(b_s, top, i * BLOCK_N, n_seen, scale2, MASKED == 1)
            b_o = warpgroup_mma(b_pt, s_v.index(before), acc, is_async=True)
            b_s = warpgroup_mma(q, s_k.index(after).permute((1, 0)), zeros, use_acc=False, is_async=True)
            stage, parity = stage_of(step + i, STAGES)
            mbarrier.wait(bar_v.index(stage), parity)
            b_p = gl.exp2(b_x)
            decay = gl.exp2(decay)
            total = gl.fma(total, decay, gl.sum(b_p, 1))
            mbarrier.wait(bar_v.index(stage), parity)
            acc, b_s = warpgroup_mma_wait(0, deps=(b_o, b_s))
            mbarrier.arrive(bar_free.index(before))
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, l_o))[:, None]
    mbarrier.arrive(bar_q_free)
    last, _parity = stage_of(step + n_steps - 1, STAGES)
    b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
    b_o = warpgroup_mma(b_pt, s_v.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(bar_free.index(last))
    return acc, top, total
