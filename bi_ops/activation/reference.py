"""Gated activations in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` with gate the first half of the last dimension (SwiGLU; Shazeer, 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
