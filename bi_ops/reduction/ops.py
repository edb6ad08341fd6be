"""Sums and means: check, allocate, launch, differentiate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.integers import cdiv
from bi_ops.core.limits import check_programs
from bi_ops.core.operators import custom_op
from bi_ops.core.triton_helpers import PINNED
from bi_ops.reduction import order as orders
from bi_ops.reduction.config import SumConfig, sum_config
from bi_ops.reduction.kernels import sum_kernel


def _launch(x: torch.Tensor, out: torch.Tensor, order: orders.SumOrder, config: SumConfig | None) -> None:
    """out[M, C, K] = the sums of the C spans of x[M, N, K]; any strides of x, contiguous out."""
    m, n, k = x.shape
    n_spans = out.shape[1]
    c = config or sum_config(m, k, order.lanes)
    tiles = m * cdiv(k, c.rows) if c.along_k else cdiv(m * k, c.rows)
    check_programs("sum", tiles * n_spans)
    sum_kernel[(tiles * n_spans,)](
        x,
        out,
        m,
        n,
        k,
        n_spans,
        *x.stride(),
        ROWS=c.rows,
        LANES=order.lanes,
        LOG2_LANES=order.log2_lanes,
        SPAN=order.span,
        ALONG_K=c.along_k,
        num_warps=c.num_warps,
        **PINNED,
    )


def launch(x: torch.Tensor, dtype: torch.dtype, config: SumConfig | None = None) -> torch.Tensor:
    """x[M, N, K] summed over N in fp32, rounded once to `dtype`: [M, K]. config: None for the one of this size."""
    m, n, k = x.shape
    if x.numel() == 0:
        return x.new_zeros((m, k), dtype=dtype)
    arch = arches.of(x.device)
    while True:
        order = orders.order(orders.Problem(n), arch)
        n_spans = cdiv(n, order.span)
        out = x.new_empty((m, n_spans, k), dtype=dtype if n_spans == 1 else torch.float32)
        _launch(x, out, order, config)
        if n_spans == 1:
            return out.view(m, k)
        x, n = out, n_spans


# --------------------------------------------------------------------------------------------------------------
# custom operator


@custom_op("bi_ops::sum")
def _sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x[M, N, K] summed over N in fp32, rounded once to `dtype`: [M, K]."""
    return launch(x, dtype)


@_sum.register_fake
def _(x, dtype):
    return x.new_empty((x.shape[0], x.shape[2]), dtype=dtype)


def _sum_setup(ctx, inputs, output):
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _sum_backward(ctx, g):
    return g[:, None, :].expand(ctx.shape).to(ctx.dtype), None


_sum.register_autograd(_sum_backward, setup_context=_sum_setup)


# --------------------------------------------------------------------------------------------------------------
# public functions


def _dims(op: str, x: torch.Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """`dim` as sorted non-negative axes; None and an empty list mean all of them."""
    rank = max(x.ndim, 1)  # a scalar may be reduced over its axis 0, as in torch
    dims = set()
    given: Sequence[Any] = () if dim is None else dim if isinstance(dim, list | tuple) else [dim]
    for d in given:
        checks.integer(op, "dim", d)
        checks.shape(op, -rank <= d < rank, lambda: f"dim {dim} is out of range for x {list(x.shape)}")
        checks.shape(op, d % rank not in dims, lambda: f"dim {dim} names an axis of x {list(x.shape)} twice")
        dims.add(d % rank)
    return sorted(dims) if dims and x.ndim > 0 else list(range(x.ndim))


def _reduce(
    op: str, x: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """(the sums in `dtype`, the number of elements in each)."""
    checks.boolean(op, "keepdim", keepdim)
    dims = _dims(op, x, dim)
    kept = [d for d in range(x.ndim) if d not in dims]
    shape = [1 if d in dims else x.shape[d] for d in range(x.ndim)]
    n = math.prod([x.shape[d] for d in dims])
    if len(dims) == 0 or dims[-1] - dims[0] == len(dims) - 1:
        first = dims[0] if dims else 0
        m, k = math.prod(x.shape[:first]), math.prod(x.shape[first + len(dims) :])
    else:
        x = x.permute(*kept, *dims)
        m, k = math.prod(x.shape[: len(kept)]), 1
    out = _sum(x.reshape(m, n, k), dtype)
    return out.reshape(shape if keepdim else [shape[d] for d in kept]), n


def _check(op: str, x: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the result."""
    checks.tensor(op, "x", x)
    checks.dtype(op, "x", x)
    return x.dtype if dtype is None else checks.result_dtype(op, dtype)


def sum(
    x: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The sum over `dim`, accumulated in fp32 in an order that the number of summed elements alone decides.

    Args:
        x: any shape and strides; bf16, fp16 or fp32.
        dim: an axis, several, or None for all. Several are walked in row-major order.
        keepdim: keep reduced axes with size 1.
        dtype: of the result, the dtype of x by default; the sum is rounded to it once.

    Returns:
        x's shape without the reduced axes. The gradient is broadcast back.

    Raises:
        TypeError: an unsupported dtype. ValueError: another device, or a `dim` out of range or named twice.
    """
    return _reduce("sum", x, dim, keepdim, _check("sum", x, dtype))[0]


def mean(
    x: torch.Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The mean over `dim`: the fp32 `sum` divided by its length, rounded once; NaN over no elements. See `sum`."""
    dtype = _check("mean", x, dtype)
    total, n = _reduce("mean", x, dim, keepdim, torch.float32)
    return (total / n if n else total * math.nan).to(dtype)
