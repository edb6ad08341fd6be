"""Accumulators that start and end in memory: registers and shared memory exchange their contents, TMA does the rest."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from bi_ops.gluon import tma


@gluon.jit
def split_columns(acc, N: gl.constexpr):
    """The left and the right columns of an accumulator. Each value stays in its thread."""
    return gl.split(acc.reshape([acc.shape[0], 2, N // 2]).permute([0, 2, 1]))


@gluon.jit
def join_columns(left, right, N: gl.constexpr, LAYOUT: gl.constexpr):
    """The accumulator of these left and right columns."""
    return gl.convert_layout(
        gl.join(left, right).permute([0, 2, 1]).reshape([left.shape[0], N]), LAYOUT, assert_trivial=True
    )


@gluon.jit
def exchange(part, smem):
    """What was in shared memory; the part takes its place."""
    LAYOUT: gl.constexpr = part.type.layout
    loaded = smem.load(LAYOUT)
    smem.store(part)
    return loaded


@gluon.jit
def load_halves(c_desc, m, n, full, c_smem, wanted):
    """Start to load the left and the right columns of an accumulator from memory, if wanted."""
    mbarrier.expect(full, 2 * c_desc.block_type.nbytes, pred=wanted)
    tma.async_load(c_desc, [m, n], full, c_smem.index(0), pred=wanted)
    tma.async_load(c_desc, [m, n + c_desc.block_type.shape[1]], full, c_smem.index(1), pred=wanted)
