"""Pipelines through shared memory: which stage a step uses, and the barriers that say a stage is full or empty.

Step i of a pipeline of N stages uses stage i % N for the (i // N)-th time. A barrier's phase, the number of times it
has completed, is known modulo 2: a consumer waits for phase i // N of a full barrier, a producer for the one before of
an empty barrier, which has passed for the first N steps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

#: Synchronises the warps of a partition; Triton 3.6 has another name for it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def allocate_barriers(N: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())


@gluon.jit
def init_barriers(barriers, count: gl.constexpr):
    """A phase of each of the barriers completes after `count` arrivals, and the bytes that were expected."""
    N: gl.constexpr = barriers.shape[0]
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=count)


@gluon.jit
def wait_full(full, step, pred=True):
    """Wait for what the producer brings for a step."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(step % STAGES), step // STAGES & 1, pred=pred)


@gluon.jit
def wait_empty(empty, step):
    """Wait until the consumers are done with what a step's stage held before."""
    STAGES: gl.constexpr = empty.shape[0]
    mbarrier.wait(empty.index(step % STAGES), (step // STAGES & 1) ^ 1)


@gluon.jit
def arrive(barriers, step):
    """At a step's barrier."""
    STAGES: gl.constexpr = barriers.shape[0]
    mbarrier.arrive(barriers.index(step % STAGES))


@gluon.jit
def stage_and_phase(step, STAGES: gl.constexpr):
    """(a step's stage, the phase in which it is full)"""
    step = step.to(gl.uint32)  # unsigned remainders take fewer instructions
    return (step % STAGES).to(gl.int32), (step // STAGES & 1).to(gl.int32)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """(stage, phase) of the next step, without a division."""
    wraps = stage == STAGES - 1
    return gl.where(wraps, 0, stage + 1), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def previous_stage(stage, STAGES: gl.constexpr):
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def opaque_zero(step):
    """0, in a form that the compiler does not fold.

    A tile of shared memory indexed with it has its descriptors computed where they are used. With a constant index the
    compiler computes all of them ahead of the loop, and spills them.
    """
    return step >> 30
