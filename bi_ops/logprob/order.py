"""What fixes the bits of a softmax row."""

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
    """What the order of a softmax may depend on: the length of a row, and the dtype that it is read in."""

    vocab_size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class RowOrder(Order):
    """exp(x - max) is summed in chunks of `block` columns, front to back, by `num_warps` warps.

    Both are those of vLLM's sampler kernels (1024 columns, Triton's default of 4 warps). The tree inside a chunk
    follows from them, from the dtype, of which a thread loads 16 bytes at a time (bf16 logits have other bits than the
    same logits in fp32), and from Triton's `thread_sums`.
    """

    block: int = 1024
    num_warps: int = 4
    thread_sums: str = "sequential"


@dataclass(frozen=True)
class FixedPointOrder(Order):
    """exp(z - max) is cut to a multiple of 2**-fraction_bits, and these are summed as integers, which have no order.

    So the sum has the same bits whatever the dtype of the logits, the tile, the warps, and whether a row lies in one
    piece: the mass of top-p and the log-probabilities of the sampled distribution come from it. What is cut off is less
    than 2**-fraction_bits a token, 1.4e-7 of the sum at most for a vocabulary of 152k.
    """

    fraction_bits: int


@functools.lru_cache
def order(problem: Problem, arch: Arch) -> RowOrder:
    """The order of a softmax row and of its gradient: vLLM's, for every row length."""
    return RowOrder(thread_sums=arch.thread_sums)


@functools.lru_cache
def sampled_order(problem: Problem) -> FixedPointOrder:
    """The order of log-probabilities under temperature, top-k, top-p and min-p: 40 bits, fewer where int64 is short."""
    return FixedPointOrder(min(40, 62 - problem.vocab_size.bit_length()))


def order_of(vocab_size: int, dtype: torch.dtype) -> RowOrder:
    """The order of log-probabilities over [vocab_size] logits of `dtype` here.

    Raises:
        TypeError: a size that is no int, or another dtype. ValueError: a size that is too small.
    """
    checks.size("logprob.order_of", "vocab_size", vocab_size)
    checks.result_dtype("logprob.order_of", dtype)
    return order(Problem(vocab_size, dtype), arches.current())


def sampled_order_of(vocab_size: int, dtype: torch.dtype) -> FixedPointOrder:
    """The order of `sampled_logprobs`. Arguments and errors as `order_of`."""
    checks.size("logprob.sampled_order_of", "vocab_size", vocab_size)
    checks.result_dtype("logprob.sampled_order_of", dtype)
    return sampled_order(Problem(vocab_size, dtype))
