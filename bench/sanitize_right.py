"""Kernels that are right, and that a tool may nevertheless report: each has one thing that tools may not understand.

What `bench/sanitize.py` finds of a kernel counts as unsupported where the tool says the same of one of these.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path

import bi_ops  # isort: skip  (before triton)
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from bi_ops.attention.hopper import dkv
from bi_ops.gluon import tma

SIZE = gl.constexpr(64)


@gluon.jit
def _fill(smem, PART: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    HALF: gl.constexpr = SIZE // 2
    smem.slice(PART * HALF, HALF).store(gl.full([HALF, SIZE], 1.0 + PART, smem.dtype, LAYOUT))


@gluon.jit
def specialized_right(p_out):
    """Two partitions fill a half of shared memory each; they share nothing."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    smem = gl.allocate_shared_memory(gl.float32, [SIZE, SIZE], SHARED)
    gl.warp_specialize([(_fill, (smem, 0)), (_fill, (smem, 1))], [4], [24])
    o_r, o_c = gl.arange(0, SIZE, gl.SliceLayout(1, LAYOUT)), gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))
    gl.store(p_out + o_r[:, None] * SIZE + o_c[None, :], smem.load(LAYOUT))


@gluon.jit
def _hand_over(smem, full):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    smem.store(gl.arange(0, 128, LAYOUT))
    mbarrier.arrive(full)


@gluon.jit
def _take(p_out, smem, full):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(full, 0)
    gl.store(p_out + gl.arange(0, 128, LAYOUT), smem.load(LAYOUT))


@gluon.jit
def handed_over_right(p_out):
    """A partition stores, another one loads what an mbarrier says is there."""
    smem = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    gl.warp_specialize([(_hand_over, (smem, full)), (_take, (p_out, smem, full))], [4], [24])


@gluon.jit
def stored_right(d_out):
    """TMA stores a tile."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    smem = gl.allocate_shared_memory(d_out.dtype, d_out.block_type.shape, d_out.layout)
    smem.store(gl.full([SIZE, SIZE], 1.0, d_out.dtype, LAYOUT))
    fence_async_shared()
    tma.async_store(d_out, [0, 0], smem)
    tma.store_wait(0)


#: CTAs: of a single one racecheck does not always report anything.
MANY = 256


def specialized() -> torch.Tensor:
    out = torch.zeros(SIZE.value, SIZE.value, device="cuda")
    specialized_right[(MANY,)](out, num_warps=4)
    return out


def stored() -> torch.Tensor:
    size = SIZE.value
    out = torch.empty(size, size, dtype=torch.bfloat16, device="cuda")
    stored_right[(1,)](tma.descriptor(out, (size, size), size, (size, size)), num_warps=4)
    return out + 1  # another kernel reads it


def handed_over() -> torch.Tensor:
    out = torch.zeros(128, dtype=torch.int32, device="cuda")
    handed_over_right[(MANY,)](out, num_warps=4)
    return out


#: By what they have.
RIGHT: dict[str, Callable[[], torch.Tensor]] = {
    **{"warp specialisation": specialized, "a hand-over by mbarrier": handed_over, "a store by TMA": stored},
}


def explained(tool: str, report: str) -> str | None:
    """Which of them a tool's report could be about."""
    # Where warps are started and ended: the compiler has words in shared memory that tell them so.
    places = re.findall(r"(\w+\.py):(\d+)", report)
    starts = all(int(number) in lines_of_specialisation().get(name, ()) for name, number in places)
    if tool == "racecheck" and places and starts:
        return "warp specialisation"
    # A store and loads of one partition would be a race.
    accesses = [access_of(name, int(number)) for name, number in places]
    if tool == "racecheck" and None not in accesses and len(set(accesses)) > 1:
        return "a hand-over by mbarrier"
    if tool == "initcheck" and report.startswith("Uninitialized __global__"):
        return "a store by TMA"
    return None


@functools.cache
def access_of(name: str, line: int) -> str | None:
    """The function of attention's backward whose line stores or loads statistics of rows, which no TMA brings."""
    path = Path(dkv.__file__)
    text = path.read_text(encoding="utf-8")
    if name == path.name and re.search(r"(neg_lse|delta)_smem\b.*\.(store|load)\(", text.splitlines()[line - 1]):
        functions = [f for f in ast.walk(ast.parse(text)) if isinstance(f, ast.FunctionDef)]
        return next((f.name for f in functions if f.lineno <= line <= (f.end_lineno or 0)), None)
    return None


@functools.cache
def lines_of_specialisation() -> dict[str, set[int]]:
    """By the file's name: the first line of each kernel that starts specialised warps, and the statement that does."""
    found: dict[str, set[int]] = {}
    for path in Path(bi_ops.__file__).parent.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Expr | ast.If) and "warp_specialize(" in ast.unparse(node):
                    last = node.end_lineno if isinstance(node, ast.Expr) else None  # of an `if` its head
                    lines = range(node.lineno, (last or node.lineno) + 1)
                    found.setdefault(path.name, set()).update((function.lineno, *lines))
    return found
