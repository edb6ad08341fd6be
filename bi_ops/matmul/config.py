"""What only sets a GEMM's speed: tiles and launch options. Any choice gives the same bits."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from bi_ops.core.arch import Arch
from bi_ops.core.integers import next_power_of_2


@dataclass(frozen=True)
class GemmConfig:
    """A tile, the number of tile rows that share L2, and launch options. block_k: where the order leaves it free."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


def _pow2(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds `n`, within [low, high]."""
    return min(max(next_power_of_2(n), low), high)


@functools.lru_cache(maxsize=4096)  # asked in every launch
def gemm_config(m: int, n: int, dtype: torch.dtype, arch: Arch) -> GemmConfig:
    """The fastest known tile for an [m, n] result."""
    if arch.interpreted:
        # A program costs milliseconds whatever its size: few and large.
        return GemmConfig(_pow2(m, 16, 512), _pow2(n, 16, 512), 128, 1, 1, 1)
    if dtype == torch.float32:
        # No tensor cores in full fp32: small tiles keep the accumulators in registers.
        return GemmConfig(64, 64, 32, 8, 8, 2)
    if m <= 128:
        # Bound by reading B once: narrow tiles until every SM has one, deep K steps to keep loads in flight.
        block_n = 16 if n <= 2048 else 32 if n <= 8192 else 64
        return GemmConfig(_pow2(m, 16, 128), max(block_n, 32) if m > 64 else block_n, 128, 1, 4, 4)
    if m <= 512:
        return GemmConfig(64, 128, 64, 8, 4, 4)
    return GemmConfig(128, 256, 64, 8, 8, 3)


@dataclass(frozen=True)
class SegmentsConfig(GemmConfig):
    """A tile of a GEMM whose K has segments.

    kept: of a subtree of so many segments both halves are in registers; of a larger one the left half waits in memory
    while the right one is computed.
    """

    kept: int


@functools.lru_cache(maxsize=4096)  # asked in every launch
def segments_config(m: int, n: int, segments: int, dtype: torch.dtype, arch: Arch) -> SegmentsConfig:
    """The tile of an [m, n] result whose K has segments.

    On Hopper the compiler spills no register in the loops of these tiles (bench/LOG.md).
    """
    config = gemm_config(m, n, dtype, arch)
    if segments > 1 and m > 128 and not arch.interpreted and dtype != torch.float32:
        # In a tile of 128 x 256 every half waits; of many segments less travels in a smaller one that adds two.
        if m > 512 and segments <= 4:
            return SegmentsConfig(128, 256, 64, 8, 8, 3, kept=1)
        return SegmentsConfig(64 if m <= 512 else 128, 128, 64, 8, 8, 4, kept=2)
    return SegmentsConfig(**dataclasses.asdict(config), kept=segments)


@dataclass(frozen=True)
class HopperSegmentsConfig:
    """Tiles of `hopper_segments`, 128 rows by `block_n` columns; `stages` steps of `block_k` elements in flight."""

    block_n: int
    block_k: int
    stages: int
    group_m: int

    def columns_leaving(self, dtype: torch.dtype) -> int:
        """Of 64 rows at a time, rounded to `dtype`: as many as fit in the 32 KiB where sums wait."""
        return min(512 // dtype.itemsize, self.block_n)

    @property
    def most_segments(self) -> int:
        """Of so many what waits has room beside a tile's sums, in registers and shared memory."""
        return 2 if self.block_n > 128 else 8


#: The tiles that are chosen from.
WIDE_SEGMENTS = HopperSegmentsConfig(256, 64, 3, 16)
NARROW_SEGMENTS = HopperSegmentsConfig(128, 64, 5, 8)


@functools.lru_cache(maxsize=4096)  # asked in every launch
def hopper_segments_config(m: int, n: int, segments: int, num_sms: int) -> HopperSegmentsConfig:
    """The tile of an [m, n] result whose K has segments: the narrow one of many, or where wide ones leave SMs idle."""
    if segments > WIDE_SEGMENTS.most_segments:
        return NARROW_SEGMENTS
    wide, narrow = (-(-m // 128) * -(-n // c.block_n) for c in (WIDE_SEGMENTS, NARROW_SEGMENTS))
    return WIDE_SEGMENTS if -(-wide // num_sms) <= 0.55 * -(-narrow // num_sms) else NARROW_SEGMENTS


@dataclass(frozen=True)
class DecodeConfig:
    """Tiles of `decode.decode_matmul_kernel`: `stages` steps of `block_k` elements of K in flight.

    padded: the rows of x have room for 64 in shared memory, all that wgmma reads.
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    padded: bool = False


@functools.lru_cache(maxsize=4096)  # asked in every launch
def decode_config(m: int, n: int, k: int) -> DecodeConfig:
    """The fastest of the tiles that were timed for an [m, n] result on an H200, m up to 64 (bench/LOG.md).

    TMA copies few large boxes faster than many small ones. About half of an SM's shared memory lets the next kernel's
    CTAs start beside those of this one.
    """
    block_m = _pow2(m, 8, 64)
    if block_m >= 32:
        if n >= 1 << 15:
            return DecodeConfig(block_m, 128, 128, 4)
        return DecodeConfig(block_m, 32 if n <= 4096 and k > 1024 else 64, 128, 6)
    if n >= 1 << 15:
        return DecodeConfig(block_m, 64, 128, 4 if block_m == 8 else 6)
    if n > 8192:
        return DecodeConfig(block_m, 32, 128, 5) if block_m == 8 else DecodeConfig(block_m, 128, 128, 4)
    if n >= 4096 and k <= 2560:
        return DecodeConfig(block_m, 64, 128, 6)
    if n <= 1024 or (block_m == 16 and k > 4096):
        return DecodeConfig(block_m, 16, 256, 8)
    return DecodeConfig(block_m, 32, 256, 5 if block_m == 8 else 4)


@functools.lru_cache(maxsize=4096)
def padded_decode_config(m: int, n: int, k: int) -> DecodeConfig:
    """`decode_config` where Triton lets no tile be read past its end: padded rows of x, 16 KiB a stage whatever m is.

    Not timed. Where a CTA does not get an SM to itself anyway, two share one.
    """
    block_m = _pow2(m, 8, 64)
    if n > 8192:
        return DecodeConfig(block_m, 128, 128, 2, True) if n >= 1 << 15 else DecodeConfig(block_m, 64, 128, 3, True)
    block_n = 16 if n <= 1024 else 32 if n <= 4096 else 64
    return DecodeConfig(block_m, block_n, 128, 4 if block_n == 64 else 7, True)


@dataclass(frozen=True)
class WgradConfig:
    """Tiles of `hopper.wgrad_kernel`: 128 rows by `block_n` columns; `stages` steps of `block_t` tokens in flight."""

    block_n: int
    block_t: int
    stages: int
    group_m: int


@dataclass(frozen=True)
class WgradTileConfig:
    """Tiles of `hopper_tile.wgrad_tile_kernel`: rows of 2 or 3 `warp_groups`, 64 each, by `block_n` columns.

    transposed: the rows of a tile are columns of C. `stages` steps of `block_t` tokens in flight.
    """

    warp_groups: int
    block_n: int
    block_t: int
    stages: int
    transposed: bool = False

    @property
    def block_m(self) -> int:
        return 64 * self.warp_groups

    def tiles(self, m: int, n: int) -> int:
        """Of an [m, n] gradient."""
        rows, columns = (n, m) if self.transposed else (m, n)
        return -(-rows // self.block_m) * -(-columns // self.block_n)


#: What fits beside the accumulators, which take half a KiB of shared memory per column.
WIDE = WgradConfig(256, 16, 8, 8)
NARROW = WgradConfig(128, 64, 5, 8)

#: Below as many tokens a tile is computed faster than a partial sum is passed on.
SPLIT_TOKENS = 2048


def split_along_tokens(tiles: int, tokens: int, step: int, num_sms: int) -> tuple[int, int]:
    """(tiles that one program computes whole, tokens of the other tiles that a program takes at a time).

    A last wave of few tiles takes as long as a full one, so its tiles are split along the tokens, in series: every
    program takes a piece of one, and the pieces of a tile are computed one after the other, in one wave each. Where
    that is not possible no tile is split, and the second number is 0.
    """
    waves, left = divmod(tiles, num_sms)
    pieces = min(waves + 1, num_sms // left) if left else 1
    if pieces < 2 or tokens < SPLIT_TOKENS:
        return tiles, 0
    return tiles - left, -(-tokens // (pieces * step)) * step


# Times in waves of whole wide tiles (bench/results/h200/dw_fp32_exploration.csv).

#: Of a wave of wide tiles where some are split; of narrow ones no more. CTAs are then at two places of the tokens, so
#: probably fewer loads hit L2, which the 128 tokens in flight of a wide tile bridge less well than the 320 of a narrow.
WIDE_AMONG_SPLIT = 1.03
#: Of a wave of narrow tiles, and once: a start and an end that nothing hides.
NARROW_WAVE, NARROW_ENDS = 0.5, 0.04
#: Of one wave with a CTA for each tile.
ONE_WAVE: dict[WgradTileConfig, float] = {
    WgradTileConfig(2, 128, 64, 7): 0.521,
    WgradTileConfig(3, 128, 64, 5, True): 0.785,
    WgradTileConfig(2, 256, 64, 4): 0.985,
    WgradTileConfig(3, 256, 32, 8): 1.429,
}


@functools.lru_cache
def wgrad_config(m: int, n: int, tokens: int, num_sms: int) -> WgradConfig | WgradTileConfig:
    """The tile of an [m, n] weight gradient that is accumulated in fp32: the one that takes less time.

    A wave is one tile on every SM.
    """

    def waves(c: WgradConfig) -> tuple[float, bool]:
        """(how many, are tiles split)"""
        tiles = -(-m // 128) * -(-n // c.block_n)
        whole, slice_tokens = split_along_tokens(tiles, tokens, c.block_t, num_sms)
        return -(-whole // num_sms) + slice_tokens / tokens, slice_tokens > 0

    (wide, split), (narrow, _) = waves(WIDE), waves(NARROW)
    costs: dict[WgradConfig | WgradTileConfig, float] = {
        WIDE: wide * (WIDE_AMONG_SPLIT if split else 1),
        NARROW: narrow * NARROW_WAVE + NARROW_ENDS,
    }
    costs |= {c: cost for c, cost in ONE_WAVE.items() if c.tiles(m, n) <= num_sms}
    return min(costs, key=costs.__getitem__)
