"""Programmatic dependent launch (PDL): a kernel starts while the kernel before it in the stream still runs.

A kernel launched with `launch_pdl=True` may start as soon as every CTA of the kernel before has called
`launch_dependents` or ended. What it does until its own wait is hidden behind that kernel. Three rules keep it safe:

1. A kernel waits before it reads what an earlier kernel may write, and before it writes anything. The wait is over when
   the kernel before has ended and what that wrote is visible, to TMA too.
2. Every kernel that is launched so waits, in every CTA. By induction, a kernel has ended only after all kernels before
   it, so rule 1 holds for those further back.
3. Only what no kernel in flight writes may be read before the wait. Weights are such inside a captured CUDA graph that
   writes none: its first kernel starts when all earlier work of the stream has ended, a weight update say, and what
   follows starts when the graph has ended. Outside a graph the host cannot know: the kernel before may be that update.

A kernel launched without `launch_pdl`, a copy, or work of another stream behind an event starts when the kernel before
has ended, as ever: `launch_dependents` means nothing to it.
"""

from __future__ import annotations

from triton.language.extra.cuda import gdc_launch_dependents as launch_dependents
from triton.language.extra.cuda import gdc_wait as wait_for_predecessors

__all__ = ["launch_dependents", "wait_for_predecessors"]
