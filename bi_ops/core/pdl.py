"""Programmatic dependent launch (PDL): a kernel starts while the kernel before it in the stream still runs.

A kernel launched with `launch_pdl=True` may start as soon as every CTA of the kernel before has called
`launch_dependents` or ended. What it does until its own wait is hidden behind that kernel. Four rules keep it safe:

1. A kernel waits before it reads what an earlier kernel may write, and before it writes anything. The wait is over when
   the kernel before has ended and what that wrote is visible, to TMA too.
2. Every kernel that is launched so waits, in every CTA. By induction, a kernel has ended only after all kernels before
   it, so rule 1 holds for those further back.
3. Only what no kernel in flight writes may be read before the wait. Weights are such inside a captured CUDA graph that
   writes none: its first kernel starts when all earlier work of the stream has ended, a weight update say, and what
   follows starts when the graph has ended. Outside a graph the host cannot know: the kernel before may be that update.
4. A kernel that calls `launch_dependents` after its own wait lets the next one begin when all before it have ended. So
   that one may read, before its wait, whatever the kernel before it does not write: of any age, in a graph or not.

Rules 1 and 2 are the kernel's own business, so it may run anywhere, a training step included, whatever ran before it.
Rule 3 is the caller's: who captures a graph says what that does not write (`constant_weight`, `constant_metadata`).

A kernel launched without `launch_pdl`, a copy, or work of another stream behind an event starts when the kernel before
has ended, as ever: `launch_dependents` means nothing to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents as launch_dependents
from triton.language.extra.cuda import gdc_wait as wait_for_predecessors

from bi_ops.core.arch import Arch
from bi_ops.core.runtime import INTERPRET

__all__ = [
    *("begin", "begin_after_loads", "begin_in_order", "launch_dependents", "launch_options", "prefetch"),
    "wait_for_predecessors",
]


@triton.jit
def begin(prefetch, PDL: tl.constexpr):
    """First of all in a Triton kernel: let the next one start. Until `begin_after_loads` only constants may be read.

    prefetch: 1: they are such while kernels are in flight; 0: they are not, so the wait is here.
    """
    if PDL:
        launch_dependents()
        if prefetch == 0:
            wait_for_predecessors()


@triton.jit
def begin_in_order(PDL: tl.constexpr):
    """First of all in a Triton kernel, after which one may read ahead what is older than this kernel (rule 4)."""
    if PDL:
        wait_for_predecessors()
        launch_dependents()


@triton.jit
def begin_after_loads(PDL: tl.constexpr):
    """What follows may read what kernels before wrote, and write."""
    if PDL:
        wait_for_predecessors()


def prefetch(constant: bool, *taken: tuple[torch.Tensor | None, torch.Tensor | None]) -> int:
    """The kernels' `prefetch`: inside a captured graph what the caller calls constant is so, outside nothing is.

    taken: what the kernel reads, and the caller's tensor: a copy of that is written by the graph.
    """
    if not constant or INTERPRET:
        return 0
    if any(a is not None and b is not None and a.data_ptr() != b.data_ptr() for a, b in taken):
        return 0
    return int(torch.cuda.is_current_stream_capturing())


def launch_options(arch: Arch) -> dict[str, bool]:
    """How a Triton kernel with a constant PDL is launched: as a programmatic dependent where the GPU knows such."""
    return {"PDL": True, "launch_pdl": True} if arch.pdl else {"PDL": False}
