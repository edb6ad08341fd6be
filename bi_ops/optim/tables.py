"""Tables in the GPU's memory that let one launch walk a list of tensors.

What follows from sizes alone is made once per list of sizes. Addresses are sent again where they changed, from pinned
memory, so nobody waits for the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.optim.order import NormOrder


class Tiles(NamedTuple):
    """sizes: int64 [P, S], as the kernel wants them. tiles: int32 [T, 2], parameter and number of each tile."""

    sizes: torch.Tensor
    tiles: torch.Tensor


def _firsts(counts: Sequence[int]) -> list[int]:
    """Where each of the counts starts when they follow one another; then their sum."""
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + count)
    return firsts


def _owners(counts: Sequence[int]) -> torch.Tensor:
    """int32 [T, 2] on the CPU: the parameter of each tile, and the tile's number."""
    i_p = torch.arange(len(counts), dtype=torch.int32, device="cpu")
    i_p = i_p.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"))
    return torch.stack([i_p, torch.arange(len(i_p), dtype=torch.int32, device="cpu")], dim=1)


@functools.lru_cache(maxsize=64)
def elementwise(numels: tuple[int, ...], tile: int, device: torch.device) -> Tiles:
    """Tiles of `tile` elements; sizes are (elements, first tile)."""
    counts = [cdiv(n, tile) for n in numels]
    sizes = [[n, first] for n, first in zip(numels, _firsts(counts), strict=False)]
    return Tiles(torch.tensor(sizes, dtype=torch.int64, device=device), _owners(counts).to(device))


class Rows(NamedTuple):
    """A gradient as the norm walks it: `numel` elements in rows of `row`."""

    numel: int
    row: int

    def spans(self, order: NormOrder) -> int:
        """How many spans there are, with those that fill a row up."""
        return cdiv(self.numel, self.row) << order.log2_spans(self.row) if self.numel else 0


def rows_of(shape: torch.Size, order: NormOrder) -> Rows:
    """Everything behind the first axis is a row.

    Where a row is a power of two and no longer than the lanes, its tree and that of the rows are one tree over all
    elements, in which any lanes' worth of them is a row.
    """
    numel = shape.numel()
    row = numel // shape[0] if len(shape) > 0 and numel else 1
    return Rows(numel, order.lanes if row <= order.lanes and row == next_power_of_2(row) else row)


@functools.lru_cache(maxsize=64)
def norm(
    rows: tuple[Rows, ...], at_16: bytes, order: NormOrder, spans: int, device: torch.device
) -> tuple[tuple[Tiles, Tiles], tuple[int, ...]]:
    """Tiles of `spans` spans, those of parameters that a thread cannot read 16 bytes at once and those of the others.

    at_16: of each parameter, whether its address is a multiple of 16. Sizes are (elements, elements of a row, log2 of a
    row's spans, first tile). And the number of tiles of each parameter; tiles are numbered in the order of the
    parameters.
    """
    counts = tuple(cdiv(r.spans(order), spans) for r in rows)
    firsts = _firsts(counts)
    sizes = [[*r, order.log2_spans(r.row), first] for r, first in zip(rows, firsts, strict=False)]
    table, owners = torch.tensor(sizes, dtype=torch.int64, device=device), _owners(counts)
    aligned = [at and r.numel % 4 == 0 and r.row % 4 == 0 for at, r in zip(at_16, rows, strict=True)]
    mask = torch.tensor(aligned, dtype=torch.bool, device="cpu")[owners[:, 0].long()]
    return (Tiles(table, owners[~mask].to(device)), Tiles(table, owners[mask].to(device))), counts


@functools.lru_cache(maxsize=64)
def tree(counts: tuple[int, ...], width: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The launches that add `counts[p]` sums of each parameter, then the parameters; the last one leaves one sum.

    A launch is int64 [T, 2]: where each segment starts in what the launch before left, and how many sums it has. A
    segment is `width` sums, counted from the start of its parameter: a subtree, so `width` shapes no sum.
    """
    launches = []
    while True:
        if all(count == 1 for count in counts):
            counts = (len(counts),)
        segments, left = [], []
        for first, count in zip(_firsts(counts), counts, strict=False):
            starts = range(0, max(count, 1), width)
            segments += [[first + start, min(width, count - start)] for start in starts]
            left.append(len(starts))
        launches.append(torch.tensor(segments, dtype=torch.int64, device=device))
        if left == [1]:
            return tuple(launches)
        counts = tuple(left)


@functools.lru_cache(maxsize=64)
def _addresses(flat: bytes, device: torch.device, stream: int) -> torch.Tensor:
    """stream: who reads it has to have sent it."""
    table = torch.frombuffer(bytearray(flat), dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def addresses(table: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64, flat: the table of these addresses, sent where the GPU does not have it yet."""
    return _addresses(
        table.tobytes(), device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    )
