"""Kernels that are right, and that a tool may nevertheless report: each has one thing that tools may not understand.

What `bench/sanitize.py` finds of a kernel counts as unsupported where the tool says the same of one of these.
"""

from __future__ import annotations

from collections.abc import Callable

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


def specialized() -> torch.Tensor:
    out = torch.zeros(256, dtype=torch.int32, device="cuda")
    specialized_right[(1,)](out, num_warps=4)
    return out


def stored() -> torch.Tensor:
    size = SIZE.value
    out = torch.empty(size, size, dtype=torch.bfloat16, device="cuda")
    stored_right[(1,)](tma.descriptor(out, (size, size), size, (size, size)), num_warps=4)
    return out + 1  # another kernel reads it


#: By what they have.
RIGHT: dict[str, Callable[[], torch.Tensor]] = {"warp specialisation": specialized, "a store by TMA": stored}


def explained(tool: str, report: str, line: str) -> str | None:
    """Which of them a tool's report could be about. line: of the source that it names."""
    if tool == "racecheck" and "warp_specialize" in line:
        return "warp specialisation"
    if tool == "initcheck" and report.startswith("Uninitialized __global__"):
        return "a store by TMA"
    return None
