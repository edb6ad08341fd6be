"""Head sizes that no kernel has: zeros beside q, k and v up to one that kernels have, whose order and bits it takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: Kernels have the multiples of this, from SMALLEST to LARGEST.
STEP, SMALLEST, LARGEST = 8, 16, 256


def padded_head_dim(head_dim: int, value_dim: int | None = None) -> int:
    """The kernels' head size for q and k of `head_dim`, and v of `value_dim` if that is another."""
    widest = max(head_dim, value_dim or 0, SMALLEST)
    return -(-widest // STEP) * STEP


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q and k [T, H, D], v [T, H, Dv], all at the kernels' head size; as they are where that is theirs.

    Products with zeros add nothing to scores, and zeros of v come out as zeros: `unpadded` cuts them off.
    """
    head_dim, value_dim = q.shape[2], v.shape[2]
    if head_dim == value_dim and head_dim % STEP == 0 and head_dim >= SMALLEST:
        return q, k, v
    n = padded_head_dim(head_dim, value_dim)
    q, k, v = (t if t.shape[2] == n else F.pad(t, (0, n - t.shape[2])) for t in (q, k, v))
    return q, k, v


def unpadded(out: torch.Tensor, value_dim: int) -> torch.Tensor:
    """out [T, H, n] of `padded` q, k and v, without what was added."""
    return out if out.shape[2] == value_dim else out[..., :value_dim]
