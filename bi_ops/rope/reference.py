"""Rotary position embedding in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def apply_rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with the halves (x1, x2) of every head turned by its token's angles (Su et al., 2021)."""
    cos, sin = cos_sin[positions].to(x.dtype)[:, None].chunk(2, dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
