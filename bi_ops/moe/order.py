"""What fixes the bits of a mixture-of-experts layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.orders import Order
from bi_ops.core.rows import TOKEN_STEP

#: Counts of experts beside powers of two up to 512 for which vLLM's router has a kernel that this order follows.
VLLM_EXPERTS = frozenset({192, 320, 384, 448, 576})


class Problem(NamedTuple):
    """What the order may depend on. over_tokens: the reduced axis of the GEMM counts rows of an expert."""

    dtype: torch.dtype
    num_experts: int = 1
    over_tokens: bool = False


@dataclass(frozen=True)
class GroupedGemmOrder(Order):
    """As `bi_ops.matmul`'s order of one expert's rows: front to back, `k_step` elements at a time, into one fp32
    accumulator that is rounded once. any_tile: tiles of any multiple of `k_step` have these bits."""

    k_step: int
    any_tile: bool
    accumulator: torch.dtype = torch.float32
    input_precision: str = "ieee"

    def block_k(self, wanted: int) -> int:
        """The elements of the reduced axis in a tile."""
        return wanted if self.any_tile else self.k_step


@dataclass(frozen=True)
class RouterOrder(Order):
    """The softmax's denominator: lane i adds experts [i * vector, (i + 1) * vector), then those `lanes * vector`
    further on, one after the other; lanes are added by halves, i and i + lanes / 2 first. Weights are normalised by the
    reciprocal of their sum, slot after slot."""

    vector: int
    lanes: int

    @property
    def log2_lanes(self) -> int:
        return self.lanes.bit_length() - 1


@dataclass(frozen=True)
class MoeOrder(Order):
    """The orders of a layer. dot_lanes: of the gradient of a routing weight, columns of a row at this distance one
    after the other, then neighbours pairwise. Rows of a token are added slot after slot in fp32, from +0."""

    gemm: GroupedGemmOrder
    router: RouterOrder
    dot_lanes: int = 256

    @property
    def log2_dot_lanes(self) -> int:
        return self.dot_lanes.bit_length() - 1


def _router(num_experts: int, dtype: torch.dtype) -> RouterOrder:
    """vLLM's `topk_softmax` where its lanes hold whole vectors: 16 bytes, or two experts; else lanes of one expert."""
    if num_experts & (num_experts - 1) == 0 and num_experts <= 512:
        vector = min(16 // dtype.itemsize, num_experts)
        return RouterOrder(vector, min(32, num_experts // vector))
    return RouterOrder(2 if num_experts in VLLM_EXPERTS else 1, 32)


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> MoeOrder:
    """The orders of a layer. Takes no count of tokens, nor of rows of an expert: that is the contract."""
    k_step = TOKEN_STEP if problem.over_tokens else arch.gemm_step
    gemm = GroupedGemmOrder(k_step, any_tile=not arch.interpreted)
    return MoeOrder(gemm, _router(problem.num_experts, problem.dtype))


def order_of(dtype: torch.dtype, num_experts: int) -> MoeOrder:
    """The orders of a layer of so many experts in `dtype` here.

    Raises:
        TypeError: another dtype, or a count that is no whole number. ValueError: a count below 1.
    """
    checks.result_dtype("moe.order_of", dtype)
    checks.size("moe.order_of", "num_experts", num_experts)
    return order(Problem(dtype, num_experts), arches.current())
