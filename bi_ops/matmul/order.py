"""What fixes a GEMM's bits."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from bi_ops.core.arch import Arch
from bi_ops.core.orders import Order
from bi_ops.core.rows import TOKEN_STEP

#: "after_rounding": the GEMM is rounded, then the bias is added and the sum rounded, as vLLM 0.26 and
#: `torch.nn.functional.linear` over more than two dimensions do. "in_accumulator": the bias joins the fp32 accumulator.
BiasOrder = Literal["none", "after_rounding", "in_accumulator"]


class Problem(NamedTuple):
    """What a GEMM's order may depend on. over_tokens: K counts tokens, so the sum has to go on across launches."""

    dtype: torch.dtype
    over_tokens: bool = False
    bias: BiasOrder = "none"


@dataclass(frozen=True)
class GemmOrder(Order):
    """K is summed front to back, `k_step` elements at a time, into one fp32 accumulator that is rounded once.

    any_tile: tiles of any multiple of `k_step` have these bits, as on Hopper, whose tensor cores sum 16 elements of K
    per step whatever the tile; so have vLLM's `matmul_persistent` and a cuBLAS that does not split K. Else a tile has
    exactly `k_step` elements of K.
    """

    k_step: int
    any_tile: bool
    bias: BiasOrder = "none"
    accumulator: torch.dtype = torch.float32
    input_precision: str = "ieee"

    def block_k(self, wanted: int) -> int:
        """The elements of K in a tile: `wanted`, a multiple of `k_step`, where any tile has the bits."""
        return wanted if self.any_tile else self.k_step


@dataclass(frozen=True)
class SegmentedOrder(Order):
    """K is cut into `segments` equal pieces, or each of its parts is, of which a segment has a piece one behind the
    other. Each is summed as `each` says, from zero, in fp32; then these pairwise, neighbours first; rounded once."""

    segments: int
    each: GemmOrder

    def block_k(self, wanted: int) -> int:
        """As `GemmOrder.block_k`."""
        return self.each.block_k(wanted)


@functools.lru_cache(maxsize=4096)  # asked in every launch
def order(problem: Problem, arch: Arch) -> GemmOrder:
    """The order of a GEMM. Takes no count of rows: that is the contract."""
    k_step = TOKEN_STEP if problem.over_tokens else arch.gemm_step
    return GemmOrder(k_step, any_tile=not arch.interpreted, bias=problem.bias)


@functools.lru_cache(maxsize=4096)
def segmented_order(dtype: torch.dtype, segments: int, arch: Arch) -> SegmentedOrder:
    """The order of a GEMM whose K has so many segments, a power of two."""
    return SegmentedOrder(segments, order(Problem(dtype), arch))
