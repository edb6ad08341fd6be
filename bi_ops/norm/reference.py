"""RMS normalisation in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""
    wide = x if x.dtype == torch.float64 else x.float()
    out = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(wide.dtype)
    return out.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual)."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads of queries and keys normalised, their halves (x1, x2) turned by their tokens' angles; and values."""
    heads = qkv.unflatten(1, (-1, q_weight.shape[0]))
    n_keys = (heads.shape[1] - num_heads) // 2
    q, k, v = heads.split([num_heads, n_keys, n_keys], 1)
    cos, sin = cos_sin[positions].to(qkv.dtype)[:, None].chunk(2, dim=-1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)

    return turned(rms_norm(q, q_weight, eps)), turned(rms_norm(k, k_weight, eps)), v
