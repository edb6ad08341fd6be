"""What fixes the bits of a rotation: which values are rounded on the way."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.orders import ElementwiseOrder


class Problem(NamedTuple):
    """What the order of a rotation may depend on: the size of a head, and the dtype."""

    head_dim: int
    dtype: torch.dtype


#: The product with the sine is rounded to fp32, the product with the cosine is fused with the addition. It matters for
#: fp32 alone: products of 16-bit floats are exact there. The gradient is the same rotation by the negated angle.
_STEPS = ("partner * sin in fp32", "fma(x, cos, partner * sin)")
ROTATION = ElementwiseOrder(forward=_STEPS, backward=_STEPS)


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> ElementwiseOrder:
    """The order of a rotation: the same for every head size, dtype and architecture."""
    return ROTATION


def order_of(head_dim: int, dtype: torch.dtype) -> ElementwiseOrder:
    """The order in which heads [head_dim] of `dtype` are rotated here.

    Raises:
        TypeError: a size that is no int, or another dtype. ValueError: a size that is too small.
    """
    checks.size("rope.order_of", "head_dim", head_dim)
    checks.result_dtype("rope.order_of", dtype)
    return order(Problem(head_dim, dtype), arches.current())
