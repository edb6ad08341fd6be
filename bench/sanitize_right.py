"""Kernels that are right, and that a tool may nevertheless report: each has one thing that tools may not understand.

What `bench/sanitize.py` finds of a kernel counts as unsupported where the tool says the same of one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from bi_ops.gluon import tma

SIZE = gl.constexpr(64)


@gluon.jit
def _write(p_out, PART: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o = gl.arange(0, 128, LAYOUT)
    gl.store(p_out + PART * 128 + o, o + PART)


@gluon.jit
def specialized_right(p_out):
    """Two partitions write; they share nothing."""
    gl.warp_specialize([(_write, (p_out, 0)), (_write, (p_out, 1))], [4], [24])


@gluon.jit
def stored_right(d_out):
    """TMA stores a tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    smem = gl.allocate_shared_memory(d_out.dtype, d_out.block_type.shape, d_out.layout)
    smem.store(gl.full([SIZE, SIZE], 1.0, d_out.dtype, LAYOUT))
    fence_async_shared()
    tma.async_store(d_out, [0, 0], smem)
    tma.store_wait(0)


@gluon.jit
def _fill(smem):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    smem.store(gl.full([SIZE, SIZE], 1.0, smem.dtype, LAYOUT))


@gluon.jit
def filled_right(p_out):
    """Two partitions store the same values in the same places, as both consumers of attention's backward may."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    smem = gl.allocate_shared_memory(gl.float32, [SIZE, SIZE], SHARED)
    gl.warp_specialize([(_fill, (smem,)), (_fill, (smem,))], [4], [24])
    o_r, o_c = gl.arange(0, SIZE, gl.SliceLayout(1, LAYOUT)), gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))
    gl.store(p_out + o_r[:, None] * SIZE + o_c[None, :], smem.load(LAYOUT))


def specialized() -> torch.Tensor:
    out = torch.zeros(256, dtype=torch.int32, device="cuda")
    specialized_right[(1,)](out, num_warps=4)
    return out


def stored() -> torch.Tensor:
    size = SIZE.value
    out = torch.empty(size, size, dtype=torch.bfloat16, device="cuda")
    stored_right[(1,)](tma.descriptor(out, (size, size), size, (size, size)), num_warps=4)
    return out + 1  # another kernel reads it


def filled() -> torch.Tensor:
    out = torch.zeros(SIZE.value, SIZE.value, device="cuda")
    filled_right[(1,)](out, num_warps=4)
    return out


#: By what they have.
RIGHT: dict[str, Callable[[], torch.Tensor]] = {
    **{"warp specialisation": specialized, "a store by TMA": stored, "equal values, stored twice": filled},
}


def explained(tool: str, report: str, lines: Sequence[str]) -> str | None:
    """Which of them a tool's report could be about. lines: of bi_ops' source, all that the report names."""
    if tool == "racecheck" and lines and all("warp_specialize" in line for line in lines):
        return "warp specialisation"
    if tool == "racecheck" and lines and all("part.load(" in line or "part.store(" in line for line in lines):
        return "equal values, stored twice"  # by `clear_rows` of attention
    if tool == "initcheck" and report.startswith("Uninitialized __global__"):
        return "a store by TMA"
    return None
