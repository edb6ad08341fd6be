"""What fixes the bits of a sum."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.integers import next_power_of_2
from bi_ops.core.orders import Order


class Problem(NamedTuple):
    """What the order of a sum may depend on: how many elements it adds."""

    n: int


@dataclass(frozen=True)
class SumOrder(Order):
    """How n elements are added, in fp32.

    They are cut into spans of `span` elements. In a span, lane i adds elements i, i + lanes, i + 2*lanes, ... front
    to back; the lanes are then added pairwise, neighbours first. Several spans leave several partial sums, which are
    reduced by the same rule.
    """

    lanes: int
    span: int

    @property
    def log2_lanes(self) -> int:
        """How often the lanes are halved; `lanes` is a power of two."""
        return self.lanes.bit_length() - 1


@functools.lru_cache(maxsize=4096)
def order(problem: Problem, arch: Arch) -> SumOrder:
    """The order of a sum. The interpreter pays per step: few, wide steps."""
    widest = arch.reduction_lanes
    return SumOrder(min(next_power_of_2(problem.n), widest), widest * arch.reduction_steps)


def order_of(n: int) -> SumOrder:
    """The order in which `n` elements are added here.

    Raises:
        TypeError: an n that is no int. ValueError: it is negative.
    """
    checks.size("reduction.order_of", "n", n, 0)
    return order(Problem(n), arches.current())
