"""Kernel configs: what sets the speed of attention's kernels and changes no bit. They may look at lengths and SMs."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bi_ops.attention.order import HALF_DTYPES, KeySteps, OnePass, TwoPass
from bi_ops.core.arch import Arch
from bi_ops.core.orders import Order

#: Head sizes of the Gluon kernels but for decoding, which has every multiple of 8 from 16 on.
GLUON_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class KernelConfig:
    """Of the Triton kernels: an output tile of `block` rows, `pairs` (sequence, KV head) pairs per CTA, launch options.

    The forward's sum along a row lives in one warp as long as warps are spread over rows only, so there `num_warps`
    never exceeds block / 16 on tensor cores. fp32 has no tensor cores and one tile, because there the tile shapes the
    row sum.
    """

    block: int
    pairs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ForwardConfig:
    """Of the Gluon forward.

    warp_groups: consumer warp groups of 64 rows each, 2 or 3. stages: of K and V in shared memory. q_stages: tiles of
    queries in it, so that the next one is there when a tile is done. overlap: a step's S is issued before the
    exponentials of the step before, within a warp group, from 3 stages on; else warp groups issue their GEMMs in turns
    (ping-pong), so that one multiplies while the others take exponentials. consumers_clear, of two in ping-pong: they
    clear what the last V has past the end of a sequence, else the producer, which loads nothing meanwhile. ahead: with
    2 q_stages, the producer takes a tile while it still loads for the one before, and consumers read which it is before
    they write theirs.
    """

    warp_groups: int
    stages: int
    q_stages: int
    overlap: bool = False
    consumers_clear: bool = False
    ahead: bool = False

    def __post_init__(self) -> None:
        if self.consumers_clear and not self.consumers_may_clear:
            raise ValueError(
                "ForwardConfig: consumers_clear takes two warp groups in ping-pong, each half of the last V"
            )

    @property
    def consumers_may_clear(self) -> bool:
        """Do all warp groups end with the same step, and is its V cut evenly into their shares?"""
        return self.warp_groups == 2 and not self.overlap

    @staticmethod
    def computes(order: Order) -> bool:
        return isinstance(order, KeySteps) and order.block_n in (64, 128)


@dataclass(frozen=True)
class DecodeConfig:
    """Of Gluon decoding. stages: tiles of K or V in shared memory, at least 2. ctas_per_sm: 1 or 2."""

    stages: int
    ctas_per_sm: int = 1

    #: Of a tile: (query, head of a KV head).
    rows: ClassVar[int] = 64

    @staticmethod
    def computes(order: Order) -> bool:
        return isinstance(order, KeySteps) and order.block_n in (64, 128)


@dataclass(frozen=True)
class DqConfig:
    """Of the Gluon dQ at head_dim 256: shared memory leaves no choice."""

    @staticmethod
    def computes(order: Order) -> bool:
        return isinstance(order, TwoPass) and order.block_dq == 64


@dataclass(frozen=True)
class DkvConfig:
    """Of the Gluon dK and dV at head_dim 256: shared memory leaves no choice."""

    @staticmethod
    def computes(order: Order) -> bool:
        # It takes 64 rows a step, of which the tensor cores sum 16 at a time: so do steps of 16 and 32.
        return isinstance(order, TwoPass) and order.block_r in (16, 32, 64)


@dataclass(frozen=True)
class BackwardConfig:
    """Of the Gluon backward in one pass.

    swizzle: (sequence, KV head) pairs of an L2 swizzle group, which run side by side, of one sequence unless all are as
    long. With few pairs CTAs wait longer on each other's semaphores, with many they lose their dQ from L2 in between.
    tail_bytes: the last pairs, those whose fp32 dQ fits into so many bytes, are all side by side, so that SMs end
    together.
    """

    swizzle: int
    tail_bytes: int

    @staticmethod
    def computes(order: Order) -> bool:
        return order == OnePass(64, 128)


@dataclass(frozen=True)
class SinkConfig:
    """Of the sinks' gradient: heads of a program, chunks side by side in it, chunks read ahead when they are added."""

    block_h: int
    rows: int
    unroll: int
    num_warps: int


@dataclass(frozen=True)
class BackwardConfigs:
    """The configs of one backward; None: chosen from sizes. one_pass, or dq and dkv, and with sinks theirs."""

    one_pass: BackwardConfig | None = None
    dq: KernelConfig | DqConfig | None = None
    dkv: KernelConfig | DkvConfig | None = None
    sinks: SinkConfig | None = None


#: Every config chosen from sizes.
CHOSEN = BackwardConfigs()

GluonConfig = ForwardConfig | DecodeConfig | DqConfig | DkvConfig | BackwardConfig


def check_order(config: GluonConfig, order: Order) -> None:
    """Raise ValueError unless the kernel of `config` computes `order`: nothing is launched that has other bits."""
    if not config.computes(order):
        raise ValueError(
            f"attention: the Gluon kernel of a {type(config).__name__} does not compute {order}; give no config, or a "
            "KernelConfig, with which the Triton kernel computes it"
        )


def block_d(head_dim: int, least: int = 16) -> int:
    """head_dim padded to a power of two, at least `least`."""
    return _pow2(head_dim, least, 256)


def _pow2(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds `n`, within [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


# --------------------------------------------------------------------------------------------------------------
# Triton kernels: any of these gives the same bits, whatever the lengths


def _interpreted(n_rows: int, n_pairs: int, head_dim: int, step: int) -> KernelConfig:
    """A program costs milliseconds whatever its size: one takes many pairs, up to 2**18 elements in a tile."""
    block = _pow2(n_rows, 2, 128)
    per_pair = max(block, step) * max(step, block_d(head_dim))
    return KernelConfig(block, _pow2(n_pairs, 1, max(2**18 // per_pair, 1)), 1, 1)


def _fp32(head_dim: int) -> KernelConfig:
    """The one tile of fp32 on a GPU, where the tile shapes the row sum."""
    return KernelConfig(16 if head_dim > 128 else 32, 1, 8, 1)


def forward(
    max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype, order: KeySteps, arch: Arch
) -> KernelConfig:
    """Tile of query rows. max_rows: the longest query times the query heads per KV head. n_pairs: of `KernelConfig`."""
    if arch.interpreted:
        return _interpreted(max_rows, n_pairs, head_dim, order.block_n)
    if dtype == torch.float32:
        return _fp32(head_dim)
    # Measured on an H100 (bench/tune_attention.py). Decoding, 64 sequences of 8k: 16 rows and one warp read 2.93 TB/s
    # at head_dim 64 against 2.34 for 64 rows, and 2.84 at 128 against 2.73; at 256 a third stage brings 2.57 against
    # 2.11. 32 rows and two warps read 2.93 at 128, but the warps share rows there: other bits at steps of 64.
    wide = head_dim > 128
    if max_rows > 64:
        return KernelConfig(128, 1, 8, 2 if wide else 3)
    if max_rows <= 16 and 32 < head_dim <= 128:
        return KernelConfig(16, 1, 1, 4 if head_dim <= 64 else 3)
    return KernelConfig(64, 1, 4, 3)


def dq(max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype, order: TwoPass, arch: Arch) -> KernelConfig:
    """Tile of query rows for dQ. Arguments as `forward`."""
    if arch.interpreted:
        return _interpreted(max_rows, n_pairs, head_dim, order.block_dq)
    if dtype == torch.float32:
        return _fp32(head_dim)
    # Measured on an H100, 8k causal, counted TFLOP/s of this pass: 577 at head_dim 64 (378 with 8 warps and 2 stages),
    # 583 at 128 (525 with 2 stages), 482 at 256, where more stages do not fit (the Gluon kernel there: 705).
    if head_dim > 128:
        return KernelConfig(128, 1, 8, 1)
    return KernelConfig(128, 1, 8 if head_dim > 64 else 4, 3)


def masked_forward(
    max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype, order: KeySteps, arch: Arch
) -> KernelConfig:
    """`forward` under a mask, tiles of which are in shared memory too. Not tuned."""
    config = forward(max_rows, n_pairs, head_dim, dtype, order, arch)
    if arch.interpreted or dtype == torch.float32:
        return config
    return replace(config, num_stages=min(config.num_stages, 1 if head_dim > 128 else 2))


def masked_dq(
    max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype, order: TwoPass, arch: Arch
) -> KernelConfig:
    """`dq` under a mask, whose offsets take registers that a tile of 128 rows has not. Not tuned."""
    config = dq(max_rows, n_pairs, head_dim, dtype, order, arch)
    return config if arch.interpreted or dtype == torch.float32 else KernelConfig(64, 1, 8, 2)


def dkv(max_keys: int, n_pairs: int, head_dim: int, dtype: torch.dtype, order: TwoPass, arch: Arch) -> KernelConfig:
    """Tile of keys for dK and dV. max_keys: of the longest sequence."""
    if arch.interpreted:
        return _interpreted(max_keys, n_pairs, head_dim, order.block_r)
    if dtype == torch.float32:
        return _fp32(head_dim)
    # No sum runs along a row here, so warps may share one: two accumulators of 64 x 256 need eight. Measured on an
    # H100, 8k causal, counted TFLOP/s of this pass: 449 at head_dim 64 (326 with 128 keys and 2 stages), 491 at 128
    # (429 with 2 stages), 216 at 256 (203 with 2 stages; the Gluon kernel there: 589).
    if head_dim > 128:
        return KernelConfig(64, 1, 8, 3)
    return KernelConfig(128, 1, 8, 3) if head_dim > 64 else KernelConfig(64, 1, 4, 3)


def dsinks(n_heads: int, arch: Arch) -> SinkConfig:
    """How the sinks' gradient is launched: little work beside the rest of the backward, so not tuned."""
    block_h = _pow2(n_heads, 1, 128)
    return SinkConfig(block_h, 2**14 // block_h, 8, 1) if arch.interpreted else SinkConfig(block_h, 8, 32, 4)


# --------------------------------------------------------------------------------------------------------------
# Gluon kernels, of the Triton kernels' orders but for the backward in one pass; None where the Triton kernel serves


def gluon_serves(head_dim: int, dtype: torch.dtype, arch: Arch) -> bool:
    """Do the Gluon forward and backward compute plain attention of this kind?"""
    return arch.gluon and head_dim in GLUON_HEAD_DIMS and dtype in HALF_DTYPES


def gluon_forward(max_q: int, head_dim: int, dtype: torch.dtype, order: KeySteps, arch: Arch) -> ForwardConfig | None:
    """max_q: queries of the longest sequence.

    Measured on an H100 (bench/results/h100/attention_exploration.csv), causal: at head_dim 128 481 / 580 TFLOP/s at
    2k / 8k, where the Triton kernel has 370 / 473; at 256 543 / 653 and 436 / 516. At head_dim 64, where GEMMs take no
    longer than exponentials, 367 / 428 with three warp groups and S issued ahead, 338 / 435 without, and then below 2k
    less than the Triton kernel, which has 349 / 377.

    On an H200 (bench/results/h200/forward_exploration.csv) consumers that clear and tiles taken ahead bring a packed
    batch from 436 to 471 at head_dim 128; at 256 they lose up to 2% at equal lengths.
    """
    if max_q <= 64 or not gluon_serves(head_dim, dtype, arch) or not ForwardConfig.computes(order):
        return None
    if head_dim <= 64:
        return ForwardConfig(3, 8, 2, overlap=True)
    if head_dim <= 128:
        return ForwardConfig(2, 2, 2, consumers_clear=True, ahead=True)
    return ForwardConfig(2, 2, 1)


def gluon_decode(
    max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype, order: KeySteps, arch: Arch, num_sms: int
) -> DecodeConfig | None:
    """Arguments as `forward`; a tile has 64 rows, so of longer queries it takes several.

    Measured on an H100 (bench/results/h100/decode_exploration.csv), 8k keys, 4 key heads, head_dim 128: 16 sequences
    read 2.74 TB/s, of which the Triton kernel reads 1.03, and 128 read 3.00 and 2.49. With more CTAs than SMs two to an
    SM: a CTA of few keys mostly waits, for its length, its pages, then its keys. 40 sequences read 2.79 with two, 2.61
    with one, 128 read 2.95 and 3.00; 64 of 600 keys with 8 key heads, one of them prefill, take 67 us on an H200 and 72
    (bench/results/h200/paged_attention_exploration.csv). At head_dim 256 16 read 2.83 TB/s and 1.46; at 64 128 read
    2.94 by CTAs of one warp, many to an SM, and 2.82 so. On the H200 8k tokens of prefill at head_dim 96 take 1,064 us,
    by the Triton kernel 1,513; above 128 more than 2,048 rows were not measured.
    """
    if not arch.gluon or dtype not in HALF_DTYPES or not DecodeConfig.computes(order):
        return None
    if head_dim > 128 and max_rows > 2048:
        return None
    if head_dim <= 64 and n_pairs > 2 * num_sms and max_rows <= 64:
        return None
    # Two CTAs to an SM also where prefill is among it: one multiplies while the other takes exponentials.
    if head_dim <= 128 and (max_rows > 64 or n_pairs > num_sms):
        return DecodeConfig(12 if head_dim <= 64 else 3, 2)
    return DecodeConfig(16 if head_dim <= 64 else 4)


@functools.lru_cache(maxsize=4096)  # asked in every launch
def gluon_paged(
    longest: int,
    heads: int,
    n_pairs: int,
    head_dim: int,
    dtype: torch.dtype,
    order: KeySteps,
    arch: Arch,
    num_sms: int,
) -> DecodeConfig | ForwardConfig | None:
    """How a batch over pages runs whose longest query, or where that is unknown the mean, has `longest` tokens.

    Long prefill takes tiles of one head and more warp groups, as over packed keys. Tiles of 64 rows have all heads of a
    group, so they are full with few queries. heads: query heads of a KV head.
    """
    if longest >= 256:
        forward = gluon_forward(longest, head_dim, dtype, order, arch)
        if forward is not None:
            return forward
    return gluon_decode(longest * heads, n_pairs, head_dim, dtype, order, arch, num_sms)


def gluon_dq(max_q: int, head_dim: int, dtype: torch.dtype, order: TwoPass, arch: Arch) -> DqConfig | None:
    """max_q: of the longest sequence.

    A tile has 128 queries of one head, the Triton kernel's all heads of a group: where sequences are short, those are
    fuller.
    """
    served = head_dim == 256 and max_q > 64 and gluon_serves(head_dim, dtype, arch)
    return DqConfig() if served and DqConfig.computes(order) else None


def gluon_dkv(heads: int, head_dim: int, dtype: torch.dtype, order: TwoPass, arch: Arch) -> DkvConfig | None:
    """heads: query heads that share a key head. A step of 64 rows has them all for some queries."""
    served = head_dim == 256 and 64 % heads == 0 and gluon_serves(head_dim, dtype, arch)
    return DkvConfig() if served and DkvConfig.computes(order) else None


def one_pass(n_tiles: int, head_dim: int, num_sms: int) -> BackwardConfig:
    """The config for sequences of `n_tiles` tiles of keys.

    Measured on an H100 (bench/results/h100/attention_exploration.csv), causal, head_dim 128, 16k tokens: pairs that
    together just fill the SMs all wait for the first, and again in every wave: at 4k 4 pairs (128 CTAs) run at 433
    TFLOP/s and 5 at 505, at 8k 2 at 486 and 4 at 527. `tail_bytes` of 64 MiB costs a sixth at 1k. At head_dim 64, on an
    H200 (bench/results/h200/backward_exploration.csv), 8 pairs are at most 2% behind the best at 4k to 32k.
    """
    if head_dim == 64:
        return BackwardConfig(8, 2**25)
    fills = 0.75 < 4 * n_tiles / num_sms <= 1
    return BackwardConfig(5 if fills else 4, 2**25)
