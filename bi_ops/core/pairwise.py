"""The sum that ranks, segments and atoms have in common."""

from __future__ import annotations

import torch


def pairwise_(parts: torch.Tensor) -> torch.Tensor:
    """[...], the sum of parts [a power of two, ...], neighbours first, element by element. Overwrites the parts."""
    while len(parts) > 1:  # one kernel for all pairs
        parts[::2].add_(parts[1::2])
        parts = parts[::2]
    return parts[0]
