"""Variances and norms, from ordered sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from bi_ops.mode.errors import unsupported
from bi_ops.mode.served.registry import Tensor, composes
from bi_ops.mode.served.scans import wide

# --------------------------------------------------------------------------------------------------------------
# variance: the mean first, then the squares of the differences from it


def _length(x: Tensor, dim: Any) -> int:
    dims = [dim] if isinstance(dim, int) else dim or range(x.ndim)
    return math.prod(x.shape[d] for d in dims) if x.ndim else 1


def _var_mean(op: str, x: Tensor, dim: Any, correction: float | None, keepdim: bool) -> tuple[Tensor, Tensor]:
    """The variance and the mean in fp32 (fp64 of fp64)."""
    if not x.is_floating_point():
        raise unsupported(f"aten::{op}", [x], "is served for real floating-point numbers")
    x = wide(x)
    mean = x.mean(dim, keepdim=True)
    total = (x - mean).square().sum(dim, keepdim=keepdim)
    degrees = max(_length(x, dim) - (1 if correction is None else correction), 0)
    total = total / degrees if degrees else total / torch.zeros_like(total)
    return total, mean.reshape(total.shape)


@composes("var.correction")
def _var(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean("var", x, dim, correction, keepdim)[0].to(x.dtype)


@composes("std.correction")
def _std(x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean("std", x, dim, correction, keepdim)[0].sqrt().to(x.dtype)


@composes("var_mean.correction")
def _var_and_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    var, mean = _var_mean("var_mean", x, dim, correction, keepdim)
    return var.to(x.dtype), mean.to(x.dtype)


@composes("std_mean.correction")
def _std_and_mean(
    x: Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    var, mean = _var_mean("std_mean", x, dim, correction, keepdim)
    return var.sqrt().to(x.dtype), mean.to(x.dtype)


# --------------------------------------------------------------------------------------------------------------
# norms


@composes("linalg_vector_norm")
def vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """(sum |x|^ord)^(1/ord) over `dim`, None for all; the largest or smallest |x| for +-inf, their count for 0."""
    x = x if dtype is None else x.to(dtype)
    out = torch.promote_types(x.dtype, torch.float32)
    size = x.abs().to(out)  # of a complex x, real from here on
    dims = tuple(range(x.ndim)) if dim is None or dim == [] else ((dim,) if isinstance(dim, int) else tuple(dim))
    if math.isinf(ord):
        norm = size.amax(dims, keepdim) if ord > 0 else size.amin(dims, keepdim)
    elif ord == 0:
        norm = (size != 0).to(size.dtype).sum(dims, keepdim)
    elif ord == 1:
        norm = size.sum(dims, keepdim)
    elif ord == 2:
        norm = size.square().sum(dims, keepdim).sqrt()
    else:
        norm = size.pow(ord).sum(dims, keepdim).pow(1 / ord)
    return norm.to(x.abs().dtype if x.is_complex() else x.dtype)


@composes("renorm")
def _renorm(x: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """x with each slice of axis `dim` scaled down to a norm of `maxnorm` where its own is larger."""
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    norm = vector_norm(wide(x), p, others, keepdim=True) if others else wide(x).abs()
    return (x * torch.where(norm > maxnorm, maxnorm / (norm + 1e-7), 1.0)).to(x.dtype)


@composes("norm.Scalar")
def _norm(x: Tensor, p: float = 2) -> Tensor:
    return vector_norm(x, p)


@composes("norm.ScalarOpt_dtype")
def _norm_in(x: Tensor, p: float | None, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(x, 2 if p is None else p, dtype=dtype)


@composes("norm.ScalarOpt_dim")
def _norm_over(x: Tensor, p: float | None, dim: list[int], keepdim: bool = False) -> Tensor:
    return vector_norm(x, 2 if p is None else p, dim, keepdim)


@composes("norm.ScalarOpt_dim_dtype")
def _norm_over_in(x: Tensor, p: float | None, dim: list[int], keepdim: bool, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(x, 2 if p is None else p, dim, keepdim, dtype=dtype)


@composes("_foreach_norm.Scalar")
def _norm_of_each(tensors: Sequence[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The norms that `torch.nn.utils.clip_grad_norm_` adds up."""
    return [vector_norm(t, ord, dtype=dtype) for t in tensors]
