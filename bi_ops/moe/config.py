"""What only sets the speed of a mixture-of-experts layer."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from bi_ops.core import runtime
from bi_ops.core.arch import Arch
from bi_ops.core.integers import cdiv, next_power_of_2


class GroupedConfig(NamedTuple):
    """A tile, the number of tile rows that share L2, and launch options. ctas: persistent programs on an SM."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    ctas: int = 1


@functools.lru_cache(maxsize=4096)  # asked in every launch
def grouped_config(rows: int, experts: int, n: int, dtype: torch.dtype, arch: Arch) -> GroupedConfig:
    """A tile for `rows` rows of all experts together, by their average; the host does not know more."""
    if arch.interpreted:
        return GroupedConfig(128, min(max(next_power_of_2(n), 16), 256), 128, 1, 1, 1)
    if dtype == torch.float32:
        return GroupedConfig(64, 64, 32, 8, 8, 2)
    average = cdiv(rows, experts)
    if average <= 16:
        return GroupedConfig(16, 64, 128, 1, 4, 4, 3)
    if average <= 64:
        return GroupedConfig(64, 128, 64, 1, 4, 4, 2)
    return GroupedConfig(128, 128, 64, 8, 8, 3)


#: Rows of an average expert, padding counted in, from which on tiles have 128 rows; and from which on tile rows that
#: share a weight go together.
WIDE_ROWS, MANY_ROWS = 48, 1024


class HopperConfig(NamedTuple):
    """Tiles of `hopper.grouped_matmul_hopper_kernel`: `stages` steps of `block_k` elements of K in flight."""

    block_m: int
    block_n: int
    block_k: int
    stages: int
    group_m: int


@functools.lru_cache(maxsize=4096)
def hopper_config(rows: int, experts: int, n: int, num_sms: int) -> HopperConfig:
    """Tiles of 128 rows read a weight once where an expert has up to as many; of few rows half a tile is skipped.

    With few experts in use, as in decoding, narrow tiles and more of them in flight keep more SMs reading weights.
    Weights stream through L2 in microseconds. While an expert has few tile rows, what tiles share is x: so CTAs side by
    side take a tile row's columns. With more, several tile rows go together and share the weight.
    """
    group_m = 8 if rows >= MANY_ROWS * experts else 1
    if rows >= WIDE_ROWS * experts:
        return HopperConfig(128, 256, 64, 4, group_m)
    in_use = min(experts, cdiv(rows, 16))
    narrow = in_use * cdiv(n, 256) < 2 * num_sms
    return HopperConfig(64, 128, 64, 8, group_m) if narrow else HopperConfig(64, 256, 64, 4, group_m)


class HopperWgradConfig(NamedTuple):
    """Tiles of `hopper.wgrad`: 128 rows by `block_n` columns; `stages` steps of `block_t` rows in flight."""

    block_n: int
    block_t: int
    stages: int
    group_m: int


def hopper_wgrad_config(dtype: torch.dtype) -> HopperWgradConfig:
    """What fits beside the sums on their way to memory in `dtype`, a KiB of shared memory for each two bytes."""
    return HopperWgradConfig(256, 16, 8 if dtype == torch.float32 else 12, 8)


@functools.lru_cache(maxsize=4096)
def wgrad_config(n: int, k: int, dtype: torch.dtype, arch: Arch) -> GroupedConfig:
    """A tile of an expert's [n, k] weight gradient; block_k: rows in a step."""
    if arch.interpreted:
        return GroupedConfig(min(max(next_power_of_2(n), 16), 256), min(max(next_power_of_2(k), 16), 256), 16, 1, 1, 1)
    if dtype == torch.float32:
        return GroupedConfig(64, 64, 16, 8, 8, 2)
    return GroupedConfig(128, 128, 32, 8, 8, 4)


class RowConfig(NamedTuple):
    """One program computes `rows` x `cols` elements."""

    rows: int
    cols: int
    num_warps: int = 4


@functools.lru_cache(maxsize=4096)
def row_config(n_rows: int, n_cols: int, elements: int = 2048) -> RowConfig:
    """Of kernels that copy rows, or compute them element by element."""
    elements = 1 << 18 if runtime.INTERPRET else elements
    dividing = n_cols & -n_cols  # no column is masked then
    cols = min(dividing if dividing >= 64 else next_power_of_2(n_cols), elements)
    return RowConfig(max(min(next_power_of_2(n_rows), elements // cols), 1), cols)


def gather_config(n_rows: int, n_cols: int) -> RowConfig:
    """Of the copy of tokens' rows: many are copied two at a time, of 2,048 columns."""
    return row_config(n_rows, n_cols, elements=4096 if n_rows >= 8192 else 2048)


@functools.lru_cache(maxsize=4096)
def router_config(num_tokens: int, block_e: int) -> RowConfig:
    """Tokens of a program of the router, which holds all experts."""
    elements = 1 << 16 if runtime.INTERPRET else 1024
    return RowConfig(max(min(next_power_of_2(num_tokens), elements // block_e), 1), block_e)


#: Tokens of which one program counts and places the pairs. A unit starts at a multiple.
CHUNK_TOKENS = 16

#: Pairs up to which a unit is dispatched by a program for each expert, which reads all of them.
FEW_PAIRS = 8192
