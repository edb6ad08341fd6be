"""What fixes the bits of the global norm. AdamW sums nothing, so it has no order."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_ops.core import arch as arches
from bi_ops.core.arch import Arch
from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.orders import Order


class Problem(NamedTuple):
    """What the order of a norm may depend on: the dtype of the gradients."""

    dtype: torch.dtype


@dataclass(frozen=True)
class NormOrder(Order):
    """How squares are added, in fp32. A gradient is rows [shape[0]] of everything behind the first axis.

    1. A row is cut into spans of `span` elements. In a span, lane i adds the squares of elements i, i + lanes,
       i + 2*lanes, ... front to back, each with one fused multiply-add. Then the lanes are added pairwise.
    2. The spans of a row are added pairwise, then the rows of a parameter, then the parameters of the list.

    Pairwise: neighbours first, and zeros fill up to a power of two. Zeros change no sum of squares, so 2**k neighbours
    that start at a multiple of 2**k are a subtree wherever they lie, and who adds which subtree is free.

    A cut along the first axis leaves every row whole, so it changes no row's sum. In a parameter of one dimension a row
    is one element, and so every cut is one between rows.
    """

    lanes: int = 512
    span: int = 4096

    @property
    def log2_lanes(self) -> int:
        return self.lanes.bit_length() - 1

    def log2_spans(self, row: int) -> int:
        """Spans of a row of `row` elements, filled up to 2 to the power of this."""
        return next_power_of_2(cdiv(row, self.span)).bit_length() - 1


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> NormOrder:
    """The order of a norm: the same on every architecture."""
    return NormOrder()


def order_of(dtype: torch.dtype = torch.float32) -> NormOrder:
    """The order in which the norm of gradients of `dtype` is taken here."""
    return order(Problem(dtype), arches.current())
