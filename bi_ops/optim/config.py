"""What only sets the speed. Every function here may look at sizes and at the GPU.

Bytes bound both operators: the norm reads 4 a parameter; AdamW reads 16 and writes 12, besides 2 for a bf16 copy and 4
for a gradient that is zeroed.
"""

from __future__ import annotations

from typing import NamedTuple

from bi_ops.core import runtime


class NormConfig(NamedTuple):
    """One program sums `rows` spans side by side; then one adds up to `width` sums. Both are powers of two."""

    rows: int
    num_warps: int
    width: int
    tree_warps: int


class ElementwiseConfig(NamedTuple):
    """One program has `blocks` times `block` elements of one parameter."""

    block: int
    blocks: int
    num_warps: int


#: Sums that one program of the tree adds: few for few, so that a short list does not load a wide tile. The wide one has
#: a thread of 1024 hold 32, and takes the embedding of Qwen3 (151,936 rows) in one segment.
NARROW, WIDE = 1024, 32768

#: Spans of a program of the norm.
ROWS = 8


def norm(spans: int) -> NormConfig:
    """spans: how many the parameter that has most of them has.

    A warp has one span. The compiled kernel has 48 registers, so five programs fit a multiprocessor, and two loads of
    16 bytes a thread on their way at least: 40 KB, where a multiprocessor's share of 3.35 TB/s needs about 18 KB at
    700 ns. 16 spans take 103 registers. Read off the compiled kernel; `bench/optim.py --sweep` measures it.
    """
    width = NARROW if spans <= NARROW * ROWS else WIDE
    if runtime.INTERPRET:
        return NormConfig(rows=128, num_warps=4, width=width, tree_warps=4)
    return NormConfig(rows=ROWS, num_warps=8, width=width, tree_warps=4 if width == NARROW else 32)


def elementwise() -> ElementwiseConfig:
    """Of AdamW and of scaling.

    A thread has four elements at a time, and a load of 16 bytes from each of four tensors on its way: 80 KB a
    multiprocessor at 48 registers. With 8 elements the compiler would move them through shared memory, to store the
    bf16 copy too 16 bytes at once. Several blocks share one walk through the tables. Read off the compiled kernel;
    `bench/optim.py --sweep` measures it.
    """
    if runtime.INTERPRET:
        return ElementwiseConfig(block=1 << 16, blocks=1, num_warps=4)
    return ElementwiseConfig(block=1024, blocks=4, num_warps=8)
