"""The forward's mainloop over keys, of one consumer warp group: two schedules of the same sums.

`mainloop`: P V of a step runs on the tensor cores with S of the next step, while that step's predecessor is rescaled
and its exponentials are taken. `mainloop_overlap`: S of the step after that runs then too (intra-warp-group overlap).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from bi_ops.attention.hopper.common import ROWS, clear_share
from bi_ops.attention.hopper.softmax import exponents, online_softmax
from bi_ops.gluon.pipeline import arrive, stage_and_phase, wait_full


@gluon.jit
def _clear_tail(args, v, n_valid, tails, WARP_GROUP: gl.constexpr):
    """Clear rows of the last V past the end of its sequence, a share by each warp group; wait for the others."""
    if n_valid < v.shape[0]:
        clear_share(v, n_valid, WARP_GROUP, args.WARP_GROUPS)
        fence_async_shared()
        mbarrier.arrive(args.v_tail)
        mbarrier.wait(args.v_tail, tails & 1)


@gluon.jit
def mainloop(
    args,
    q,
    q_empty,
    n_seen,
    scale2,
    step,
    n_steps,
    n_full,
    n_valid,
    tails,
    l_o: gl.constexpr,
    WARP_GROUP: gl.constexpr,
):
    """(O before it is divided, row_max, row_sum, next step of the pipeline) of a tile that sees keys from `step` on.

    Warp groups issue their GEMMs in turns (ping-pong).

    args: `forward.PartitionArgs`. q_empty: where the warp group arrives when Q has been read. n_valid: keys from the
    last step's first to the sequence's last. tails: tiles before whose last step had fewer keys than others.
    """
    k_smem, v_smem = args.k_smem, args.v_smem
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    DTYPE: gl.constexpr = k_smem.dtype
    l_r: gl.constexpr = n_seen.type.layout
    l_s: gl.constexpr = l_r.parent
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    NEXT: gl.constexpr = (WARP_GROUP + 1) % args.WARP_GROUPS
    FIRST: gl.constexpr = 1 if WARP_GROUP == 0 else 0  # the first warp group waits for no one at its first step
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    row_sum = gl.zeros((ROWS,), gl.float32, l_r)
    row_max = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
    wait_full(args.k_full, step)
    mbarrier.wait(args.scheduler.index(WARP_GROUP), (step & 1) ^ FIRST)
    b_s = warpgroup_mma(q, k_smem.index(step % STAGES).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.arrive(args.scheduler.index(NEXT))
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    arrive(args.k_empty, step)
    if n_full > 0:
        b_p, row_max, rescale, row_sum = online_softmax(b_s, row_max, row_sum, 0, n_seen, scale2, False)
    else:
        b_p, row_max, rescale, row_sum = online_softmax(b_s, row_max, row_sum, 0, n_seen, scale2, True)
    step += 1
    wait_full(args.k_full, step, n_steps > 1)
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + 1
            stop = n_full
        else:
            begin = gl.maximum(n_full, 1)
            stop = n_steps
        for i in range(begin, stop):
            k_stage = step % STAGES
            v_stage = (step - 1) % STAGES
            mbarrier.wait(args.scheduler.index(WARP_GROUP), (step & 1) ^ FIRST)
            b_s = warpgroup_mma(q, k_smem.index(k_stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            wait_full(args.v_full, step - 1)
            b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
            b_o = warpgroup_mma(b_pt, v_smem.index(v_stage), acc, is_async=True)
            mbarrier.arrive(args.scheduler.index(NEXT))
            b_s = warpgroup_mma_wait(1, deps=(b_s,))
            arrive(args.k_empty, step)
            b_p, row_max, rescale, row_sum = online_softmax(
                b_s, row_max, row_sum, i * BLOCK_N, n_seen, scale2, MASKED == 1
            )
            step += 1
            # Waited for early: without a barrier here ptxas waits for O before it takes the exponentials.
            wait_full(args.k_full, step, i + 1 < n_steps)
            acc = warpgroup_mma_wait(0, deps=(b_o,))
            mbarrier.arrive(args.v_empty.index(v_stage))
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, l_o))[:, None]
    mbarrier.arrive(q_empty)
    v_stage = (step - 1) % STAGES
    wait_full(args.v_full, step - 1)
    if args.CONSUMERS_CLEAR:
        _clear_tail(args, v_smem.index(v_stage), n_valid, tails, WARP_GROUP)
    b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
    b_o = warpgroup_mma(b_pt, v_smem.index(v_stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(args.v_empty.index(v_stage))
    return acc, row_max, row_sum, step


@gluon.jit
def mainloop_overlap(args, q, q_empty, n_seen, scale2, step, n_steps, n_full, l_o: gl.constexpr):
    """`mainloop` with S further ahead: the next step's S runs while this step's exponentials are taken, as P V does.

    Without ping-pong. K and V of a step leave their stage together. (O before it is divided, row_max, row_sum)
    """
    k_smem, v_smem = args.k_smem, args.v_smem
    STAGES: gl.constexpr = k_smem.shape[0]
    gl.static_assert(STAGES > 2)  # the next K is there while the V before still is
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    DTYPE: gl.constexpr = k_smem.dtype
    l_r: gl.constexpr = n_seen.type.layout
    l_s: gl.constexpr = l_r.parent
    l_p: gl.constexpr = gl.DotOperandLayout(0, l_o, 2)
    zeros = gl.zeros((ROWS, BLOCK_N), gl.float32, l_s)
    acc = gl.zeros((ROWS, D), gl.float32, l_o)
    row_sum = gl.zeros((ROWS,), gl.float32, l_r)
    row_max = gl.full((ROWS,), float("-inf"), gl.float32, l_r)
    stage, phase = stage_and_phase(step, STAGES)
    mbarrier.wait(args.k_full.index(stage), phase)
    b_s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    # After the last step its own S is computed once more, which nothing reads.
    after, k_phase = stage_and_phase(gl.where(n_steps > 1, step + 1, step), STAGES)
    mbarrier.wait(args.k_full.index(after), k_phase)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    b_x, row_max, rescale = exponents(b_s, row_max, 0, n_seen, scale2, True)
    b_s = warpgroup_mma(q, k_smem.index(after).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(args.v_full.index(stage), phase)
    b_p = gl.exp2(b_x)
    row_sum = gl.sum(b_p, 1)
    b_s = warpgroup_mma_wait(0, deps=(b_s,))
    for MASKED in gl.static_range(2):
        if MASKED == 0:
            begin = n_steps * 0 + 1
            stop = n_full
        else:
            begin = gl.maximum(n_full, 1)
            stop = n_steps
        for i in range(begin, stop):
            before, _ = stage_and_phase(step + i - 1, STAGES)
            b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
            # Barriers, the last one a second time: ptxas moves nothing past one. Without them S would be issued after
            # the exponentials, or the exponentials be taken after the wait for O.
            after, phase = stage_and_phase(gl.where(i + 1 < n_steps, step + i + 1, step + i), STAGES)
            mbarrier.wait(args.k_full.index(after), phase)
            b_x, row_max, rescale = exponents(b_s, row_max, i * BLOCK_N, n_seen, scale2, MASKED == 1)
            b_o = warpgroup_mma(b_pt, v_smem.index(before), acc, is_async=True)
            b_s = warpgroup_mma(q, k_smem.index(after).permute((1, 0)), zeros, use_acc=False, is_async=True)
            stage, phase = stage_and_phase(step + i, STAGES)
            mbarrier.wait(args.v_full.index(stage), phase)
            b_p = gl.exp2(b_x)
            rescale = gl.exp2(rescale)
            row_sum = gl.fma(row_sum, rescale, gl.sum(b_p, 1))
            mbarrier.wait(args.v_full.index(stage), phase)
            acc, b_s = warpgroup_mma_wait(0, deps=(b_o, b_s))
            mbarrier.arrive(args.v_empty.index(before))
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, l_o))[:, None]
    mbarrier.arrive(q_empty)
    last, _ = stage_and_phase(step + n_steps - 1, STAGES)
    b_pt = gl.convert_layout(b_p.to(DTYPE), l_p)
    b_o = warpgroup_mma(b_pt, v_smem.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(b_o,))
    mbarrier.arrive(args.v_empty.index(last))
    return acc, row_max, row_sum
