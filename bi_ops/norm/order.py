"""What fixes the bits of a norm."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.integers import next_power_of_2
from bi_ops.core.orders import Order
from bi_ops.core.rows import ALIGNMENT, TOKEN_STEP


class Problem(NamedTuple):
    """What the order of a norm may depend on: the length of a row, its dtype, and declared segments of heads."""

    hidden_size: int
    dtype: torch.dtype
    segments: int = 1


@dataclass(frozen=True)
class RowOrder(Order):
    """One row is summed in chunks of `block` columns, front to back, by `num_warps` warps.

    Both are vLLM's (`rms_norm_batch_invariant`: 1024 columns, Triton's default of 4 warps). The tree inside a chunk
    follows from them, from the dtype, of which a thread loads 16 bytes at a time, and from Triton's `thread_sums`. So
    they are no config.
    """

    block: int = 1024
    num_warps: int = 4
    thread_sums: str = "sequential"

    def tile(self, hidden_size: int, held: bool) -> int:
        """Columns of a tile: a whole chunk, or if rows are `held` in registers, as many as a short row needs.

        Both have one tree. With fewer columns a row lies in the first threads of those that it would have to itself. A
        thread adds its elements as `thread_sums` says, lanes then meet at distances 16, 8, ..., 1 and warps at 2, 1.
        The distances that are gone are those at which the row would have met zeros, which change no bit.
        """
        return min(max(next_power_of_2(hidden_size), ALIGNMENT), self.block) if held else self.block


@dataclass(frozen=True)
class TokenOrder(Order):
    """dweight adds rows front to back inside chunks of `chunk` rows, then the chunks front to back.

    A chunk divides TOKEN_STEP tokens whatever number of rows (heads) a token has, so a batch that is cut there can
    accumulate its sum in `main_grad`. It is counted in rows, never in SMs: the bits belong to no GPU size.
    """

    chunk: int = TOKEN_STEP


@dataclass(frozen=True)
class HeadsOrder(Order):
    """dweight of a norm per head: the heads of a token are cut into `segments` of as many, consecutive ones.

    A segment's rows, its heads of each token, are added as `TokenOrder` says; then segments are added pairwise,
    neighbours first. So a rank that has some of the heads, a whole subtree, sums what it has.
    """

    segments: int = 1


@dataclass(frozen=True)
class NormOrder(Order):
    """`rows`: of y and dX. `tokens`: of dweight; `heads`: where a token has several rows."""

    rows: RowOrder = RowOrder()
    tokens: TokenOrder = TokenOrder()
    heads: HeadsOrder = HeadsOrder()


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> NormOrder:
    """The order of a norm: vLLM's, the same for every row length."""
    return NormOrder(RowOrder(thread_sums=arch.thread_sums), heads=HeadsOrder(problem.segments))


def order_of(hidden_size: int, dtype: torch.dtype) -> NormOrder:
    """The order in which rows [hidden_size] of `dtype` are normalised here.

    Raises:
        TypeError: a size that is no int, or another dtype. ValueError: a size that is too small.
    """
    checks.size("norm.order_of", "hidden_size", hidden_size)
    checks.result_dtype("norm.order_of", dtype)
    return order(Problem(hidden_size, dtype), arches.current())
