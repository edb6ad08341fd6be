"""The mainloop of a weight gradient: g of a stage, transposed, times x of it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from bi_ops.gluon.pipeline import next_stage, previous_stage


@gluon.jit
def wgrad_mainloop(args, acc, begin, end, stage, phase, WARP_GROUP: gl.constexpr):
    """Add rows [begin, end) to the accumulator, front to back. Nothing is in flight when it returns.

    args: full and empty, the barriers of a stage; g_smem, of each stage a tile for each warp group; x_smem.
    """
    STAGES: gl.constexpr = args.x_smem.type.shape[0]
    WARP_GROUPS: gl.constexpr = args.g_smem.type.shape[0] // STAGES
    BLOCK_T: gl.constexpr = args.x_smem.type.shape[1]
    for t in range(begin, end, BLOCK_T):
        mbarrier.wait(args.full.index(stage), phase)
        g = args.g_smem.index(WARP_GROUPS * stage + WARP_GROUP).permute((1, 0))
        acc = warpgroup_mma(g, args.x_smem.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its stage
        mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=t != begin)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(args.empty.index(previous_stage(stage, STAGES)), pred=end > begin)
    return acc, stage, phase
