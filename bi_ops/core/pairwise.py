"""The sum that ranks, segments and atoms have in common."""

from __future__ import annotations

import torch


def pairwise_(parts: torch.Tensor) -> torch.Tensor:
    """[...], the sum of parts [a power of two, ...], neighbours first, element by element. Overwrites the parts."""
    return _added(parts, 1)[0]


def pairwise(parts: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `pairwise_`, of at least two parts, in memory of its own, or in `out`."""
    left, right = _added(parts, 2)
    return torch.add(left, right, out=out)


def _added(parts: torch.Tensor, most: int) -> torch.Tensor:
    while len(parts) > most:  # one kernel for all pairs
        parts[::2].add_(parts[1::2])
        parts = parts[::2]
    return parts
