"""Sums, means and logsumexp."""

from __future__ import annotations

import math
from typing import Any

import torch

from bi_ops import reduction
from bi_ops.core.checks import FLOAT_DTYPES
from bi_ops.mode.served.registry import Tensor, aten, composes, serves
from bi_ops.mode.served.scans import sum_wide


def _is_wide(x: Tensor, dtype: torch.dtype | None) -> bool:
    return x.dtype in (torch.float64, torch.complex64, torch.complex128) or (dtype or x.dtype) not in FLOAT_DTYPES


@serves("sum", "sum.dim_IntList", wide=True)
def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    if _is_wide(x, dtype):
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            return aten.sum.dim_IntList(x, dim, keepdim, dtype=dtype)  # of integers
        return sum_wide(x.to(torch.promote_types(x.dtype, dtype or x.dtype)), dim, keepdim).to(dtype or x.dtype)
    return reduction.sum(x if x.is_floating_point() else x.to(dtype), dim, keepdim, dtype)


@serves("mean", "mean.dim", wide=True)
def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    if _is_wide(x, dtype):
        total = _sum(x, dim, keepdim, dtype=torch.promote_types(x.dtype, dtype or x.dtype))
        return (total / (x.numel() / total.numel() if total.numel() and x.numel() else math.nan)).to(dtype or x.dtype)
    return reduction.mean(x if x.is_floating_point() else x.to(dtype), dim, keepdim, dtype)


@serves("logsumexp")
def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    x32, dims = x.float(), tuple(dim) or tuple(range(x.ndim))
    if x.numel() == 0:
        return reduction.sum(x32, dims, keepdim).log().to(x.dtype)
    row_max = x32.amax(dims, keepdim=True)
    row_max = torch.where(row_max.isinf(), 0.0, row_max)
    out = reduction.sum((x32 - row_max).exp(), dims, keepdim=True).log() + row_max
    return (out if keepdim else out.squeeze(dims)).to(x.dtype)


@composes("nansum")
def _nansum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return x.masked_fill(x.isnan(), 0).sum(dim, keepdim, dtype=dtype)


@composes("trace")
def _trace(x: Tensor) -> Tensor:
    if x.ndim != 2:
        raise RuntimeError(f"trace: expected a matrix, but got tensor with dim {x.ndim}")
    return x.diagonal().sum()
