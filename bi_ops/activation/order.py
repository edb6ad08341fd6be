"""What fixes the bits of an activation: which values are rounded on the way."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.orders import ElementwiseOrder


class Problem(NamedTuple):
    """What the order of an activation may depend on: its dtype."""

    dtype: torch.dtype


#: vLLM's `silu_and_mul` rounds silu before the multiplication. The gradient is computed in fp32 and rounded once.
SILU_AND_MUL = ElementwiseOrder(forward=("silu(gate)", "silu(gate) * up"), backward=("dgate", "dup"))


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> ElementwiseOrder:
    """The order of `silu_and_mul`: the same for every dtype and architecture."""
    return SILU_AND_MUL


def order_of(dtype: torch.dtype) -> ElementwiseOrder:
    """The order of `silu_and_mul` in `dtype` here.

    Raises:
        TypeError: another dtype.
    """
    checks.result_dtype("activation.order_of", dtype)
    return order(Problem(dtype), arches.current())
