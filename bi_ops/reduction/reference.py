"""Sums and means in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def sum(x: torch.Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> torch.Tensor:
    """The sum over `dim` (None: over everything)."""
    return torch.sum(x, dim, keepdim)


def mean(x: torch.Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> torch.Tensor:
    """The mean over `dim` (None: over everything)."""
    return torch.mean(x, dim, keepdim)
