"""Sums, means and logsumexp."""

from __future__ import annotations

from typing import Any

import torch

from bi_ops import reduction
from bi_ops.mode.served.registry import Tensor, serves


@serves("sum", "sum.dim_IntList")
def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x if x.is_floating_point() else x.to(dtype)
    return reduction.sum(x, dim, keepdim, dtype)


@serves("mean", "mean.dim")
def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x if x.is_floating_point() else x.to(dtype)
    return reduction.mean(x, dim, keepdim, dtype)


@serves("logsumexp")
def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    row_max = x.amax(dim, keepdim=True).float()
    row_max = torch.where(row_max.isinf(), 0.0, row_max)
    out = reduction.sum((x.float() - row_max).exp(), dim, keepdim=True).log() + row_max
    return (out if keepdim else out.squeeze(tuple(dim))).to(x.dtype)
