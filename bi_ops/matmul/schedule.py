"""What fixes a product's bits (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from bi_ops.core import runtime
from bi_ops.core.rows import TOKEN_STEP


@dataclass(frozen=True)
class Order:
    """K is walked front to back in steps of `k_step` into one fp32 accumulator, rounded once at the end.

    On Hopper the tensor cores sum 16 elements of K per step whatever the tile, so every schedule below has these
    bits, and so have vLLM's `matmul_persistent` and a cuBLAS that does not split K.
    """

    k_step: int = 16
    accumulator: torch.dtype = torch.float32
    input_precision: str = "ieee"


def order(k: int, dtype: torch.dtype) -> Order:
    """The order of a product over `k` elements. Takes no row count: that is the contract."""
    return Order()


@dataclass(frozen=True)
class Schedule:
    """A tile, the number of tile rows that share L2, and the launch options."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


def _pow2(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds `n`, within [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def schedule(m: int, n: int, k: int, dtype: torch.dtype, over_tokens: bool = False) -> Schedule:
    """The fastest known tile for an [m, k] x [k, n] product. Any choice gives the same bits.

    over_tokens: k counts tokens; the sum of a weight gradient, which has to go on across launches.
    """
    if runtime.INTERPRET:
        # A program costs milliseconds whatever its size: few and large. block_k is fixed because the interpreter
        # rounds to fp32 once per tile step, so there it is part of the order.
        block_k = TOKEN_STEP if over_tokens else 128
        return Schedule(_pow2(m, 16, 512), _pow2(n, 16, 512), block_k, 1, 1, 1)
    if dtype == torch.float32:
        # No tensor cores in full fp32: small tiles keep the accumulators in registers.
        return Schedule(64, 64, 32, 8, 8, 2)
    if m <= 128:
        # Bound by reading B once: narrow tiles until every SM has one, deep K steps to keep loads in flight.
        block_n = 16 if n <= 2048 else 32 if n <= 8192 else 64
        return Schedule(_pow2(m, 16, 128), max(block_n, 32) if m > 64 else block_n, 128, 1, 4, 4)
    if m <= 512:
        return Schedule(64, 128, 64, 8, 4, 4)
    return Schedule(128, 256, 64, 8, 8, 3)


@dataclass(frozen=True)
class CarrySchedule:
    """Tiles of `hopper.carry_kernel`: 128 rows by `block_n` columns, `slots` steps of `block_t` tokens under way."""

    block_n: int
    block_t: int
    slots: int
    group_m: int


#: What fits beside the accumulators, which take half a KiB of shared memory per column.
WIDE = CarrySchedule(256, 16, 8, 8)
NARROW = CarrySchedule(128, 64, 4, 8)

#: Time of a narrow tile over that of a wide one. More than half: it fetches 4/3 of the bytes per product.
NARROW_COST = 0.545

#: Below as many tokens a tile is computed faster than a sum is handed on.
CUT_TOKENS = 2048


def carry_split(tiles: int, tokens: int, step: int, processors: int) -> tuple[int, int]:
    """(tiles that one program computes alone, tokens of the others that a program takes at a time).

    A last round of few tiles takes as long as a full one, so its tiles are cut along the tokens and every program takes
    a piece of one. The pieces of a tile are computed one after the other, in one round each. Where that is not possible
    no tile is cut, and the second number is 0.
    """
    rounds, left = divmod(tiles, processors)
    pieces = min(rounds + 1, processors // left) if left else 1
    if pieces < 2 or tokens < CUT_TOKENS:
        return tiles, 0
    return tiles - left, -(-tokens // (pieces * step)) * step


@functools.lru_cache
def carry_schedule(m: int, n: int, tokens: int, processors: int) -> CarrySchedule:
    """The tile of an [m, n] weight gradient that is carried on in fp32: the one that takes less time.

    Counted in rounds; a round is one tile on every multiprocessor.
    """

    def rounds(s: CarrySchedule) -> float:
        tiles = -(-m // 128) * -(-n // s.block_n)
        whole, piece = carry_split(tiles, tokens, s.block_t, processors)
        return -(-whole // processors) + piece / tokens

    return NARROW if rounds(NARROW) * NARROW_COST < rounds(WIDE) else WIDE
