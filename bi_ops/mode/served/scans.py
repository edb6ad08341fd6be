"""Products and running sums from pointwise operators, each tree spelled out: halving, and doubling steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from bi_ops.mode.served.registry import Tensor, composes

Combine = Callable[[Tensor, Tensor], Tensor]


def halved(combine: Combine, x: Tensor, neutral: float) -> Tensor:
    """x [..., N] combined over its last axis: its first half with its second, until one is left.

    The tree depends on N alone. Gradients by autograd are products of what was multiplied, without a division.
    """
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], neutral)
    while (n := x.shape[-1]) > 1:
        both = combine(x[..., : n // 2], x[..., n // 2 : 2 * (n // 2)])
        x = torch.cat((both, x[..., n - 1 :]), -1) if n % 2 else both
    return x[..., 0]


def scanned(combine: Combine, x: Tensor) -> Tensor:
    """x [..., N] combined over its last axis up to each element (Hillis and Steele, 1986): steps of 1, 2, 4, ...

    The tree of an element depends on its position alone: what follows it changes no bit.
    """
    step = 1
    while step < x.shape[-1]:
        x = torch.cat((x[..., :step], combine(x[..., :-step], x[..., step:])), -1)
        step *= 2
    return x


def wide(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x in the dtype to compute in: fp32 at least."""
    dtype = x.dtype if dtype is None else dtype
    return x.to(torch.promote_types(dtype, torch.float32))


def moved(x: Tensor, dim: int) -> Tensor:
    """x with axis `dim` last; a scalar has one of size 1. Its gradient is contiguous, as it comes flattened."""
    return x.reshape(-1).view(x.shape).movedim(dim, -1) if x.ndim else x[None]


def _scan(combine: Combine, x: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise IndexError(f"Dimension out of range (expected to be in range of {x.ndim} axes, but got {dim})")
    out = scanned(combine, moved(wide(x, dtype), dim))
    out = out.movedim(-1, dim) if x.ndim else out[0]
    return out.to(x.dtype if dtype is None else dtype).contiguous()


@composes("cumsum")
def cumsum(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Running sums, in fp32, rounded once."""
    return _scan(torch.add, x, dim, dtype)


@composes("cumprod")
def cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Running products, in fp32, rounded once."""
    return _scan(torch.mul, x, dim, dtype)


@composes("_logcumsumexp", "logcumsumexp")
def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Running log(sum(exp)), in fp32, rounded once."""
    return _scan(torch.logaddexp, x, dim, None)


@composes("prod")
def prod(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product of all elements, in fp32, rounded once."""
    return halved(torch.mul, wide(x, dtype).reshape(-1), 1).to(x.dtype if dtype is None else dtype)


@composes("prod.dim_int")
def prod_dim(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """The product over `dim`, in fp32, rounded once."""
    out = halved(torch.mul, moved(wide(x, dtype), dim), 1).to(x.dtype if dtype is None else dtype)
    return out.unsqueeze(dim) if keepdim and x.ndim else out


def sum_wide(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """The sum of an fp64 or complex x over `dim`, in its dtype, by halving; None and [] mean all axes."""
    dims = sorted({d % x.ndim for d in ([dim] if isinstance(dim, int) else dim or range(x.ndim))}) if x.ndim else []
    kept = [d for d in range(x.ndim) if d not in dims]
    n = math.prod(x.shape[d] for d in dims)
    out = halved(torch.add, x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), n), 0)
    return out.reshape([1 if d in dims else x.shape[d] for d in range(x.ndim)]) if keepdim else out
