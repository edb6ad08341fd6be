"""What fixes the bits of a reduction (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

from bi_ops.core import runtime


@dataclass(frozen=True)
class Order:
    """How n elements are added, in fp32.

    They are cut into spans of `span` elements. In a span, lane i adds elements i, i + lanes, i + 2*lanes, ... front
    to back; the lanes are then added pairwise, neighbours first. Several spans leave several partial sums, which are
    reduced by the same rule.
    """

    lanes: int
    span: int


#: Widest row of lanes, and how many of them one span walks. The interpreter pays per step: few, wide steps.
_LANES, _STEPS = (1024, 64) if runtime.INTERPRET else (256, 16)


def order(n: int) -> Order:
    """The order of a sum of `n` elements. Takes no count of sums: that is the contract."""
    return Order(lanes=min(_pow2(n), _LANES), span=_LANES * _STEPS)


@dataclass(frozen=True)
class Schedule:
    """`rows` sums per program; `along_k`: they are neighbours on the inner axis of one outer index."""

    rows: int
    along_k: bool
    num_warps: int = 4


def schedule(m: int, k: int, lanes: int) -> Schedule:
    """How m * k sums are dealt to programs. The pairwise tree is spelled out, so no choice here changes bits."""
    if runtime.INTERPRET:
        # One program for everything that fits Triton's limit of 2**20 elements in a tile.
        return Schedule(min(_pow2(m * k), 2**20 // lanes // 2), along_k=False)
    # 64 fp32 accumulators per thread. Sums that are neighbours in memory share a program, so that loads coalesce.
    rows = max(8192 // lanes, 1)
    if k > 1:
        return Schedule(min(_pow2(k), rows, 128), along_k=True)
    return Schedule(min(_pow2(m), rows // 8 or 1), along_k=False)


def _pow2(n: int) -> int:
    """The smallest power of two that holds `n`."""
    return 1 << max(n - 1, 0).bit_length()
