"""The same mathematics in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b + bias`` for a [M, K], b [K, N], bias [N]."""
    out = a @ b
    return out if bias is None else out + bias


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a[i] @ b[i]`` for a [B, M, K], b [B, K, N]."""
    return torch.einsum("bmk,bkn->bmn", a, b)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` for x [..., K], weight [N, K], bias [N]."""
    out = torch.einsum("...k,nk->...n", x, weight)
    return out if bias is None else out + bias
