"""The sum that ranks, segments and atoms have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pairwise_(parts: torch.Tensor) -> torch.Tensor:
    """[...], the sum of parts [a power of two, ...], neighbours first, element by element. Overwrites the parts."""
    return _added(parts, 1)[0]


def pairwise(parts: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `pairwise_`, of at least two parts, in memory of its own, or in `out`."""
    left, right = _added(parts, 2)
    return torch.add(left, right, out=out)


def pairwise_into(out: torch.Tensor, parts: Sequence[torch.Tensor], kept: int) -> None:
    """As `pairwise`, of parts that lie apart. Others than the one `kept` are overwritten; `out` may be that one."""
    level = list(parts)
    while len(level) > 2:
        spare = [i if i != kept else i - 1 for i in range(1, len(level), 2)]
        level = [torch.add(level[i - i % 2], level[i | 1], out=level[i]) for i in spare]
        kept = -1  # what is left is a sum
    torch.add(*level, out=out)


def _added(parts: torch.Tensor, most: int) -> torch.Tensor:
    while len(parts) > most:  # one kernel for all pairs
        parts[::2].add_(parts[1::2])
        parts = parts[::2]
    return parts
