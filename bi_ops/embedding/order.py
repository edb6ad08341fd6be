"""What fixes the bits of an embedding's gradient. The lookup is a copy and sums nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.orders import Order


class Problem(NamedTuple):
    """What the order of an embedding may depend on: the length of a row, and the dtype of the table."""

    hidden_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class TokenOrder(Order):
    """dweight adds an id's tokens front to back, in chunks of `chunk` tokens, to one fp32 accumulator.

    A chunk of one token: the sum may be accumulated in `main_grad` from any token on. The kernel is written for it and
    takes no constant from it.
    """

    chunk: int = 1


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> TokenOrder:
    """The order of the gradient: the same for every table and architecture."""
    return TokenOrder()


def order_of(hidden_size: int, dtype: torch.dtype) -> TokenOrder:
    """The order of the gradient of a table [V, hidden_size] of `dtype` here.

    Raises:
        TypeError: a size that is no int, or another dtype. ValueError: a size that is too small.
    """
    checks.size("embedding.order_of", "hidden_size", hidden_size)
    checks.result_dtype("embedding.order_of", dtype)
    return order(Problem(hidden_size, dtype), arches.current())
