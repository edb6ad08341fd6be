"""Softmax and its logarithm, forward and backward: the kernels of `bi_ops.logprob`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_ops import logprob, reduction
from bi_ops.mode.served.registry import Tensor, serves


def _last(fn: Callable[..., Tensor], dim: int, *tensors: Tensor, dtype: torch.dtype) -> Tensor:
    """fn over `dim` as the last one."""
    if tensors[0].ndim == 0:
        return fn(*(t[None] for t in tensors), dtype)[0]
    return fn(*(t.movedim(dim, -1) for t in tensors), dtype).movedim(-1, dim)


@serves("_softmax")
def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _last(logprob.softmax, dim, x, dtype=torch.float32 if half_to_float else x.dtype)


@serves("_log_softmax")
def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _last(logprob.log_softmax, dim, x, dtype=torch.float32 if half_to_float else x.dtype)


@serves("_softmax_backward_data")
def _softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    y, product = y.float(), g.float() * y.float()
    return (product - y * reduction.sum(product, dim, keepdim=True)).to(input_dtype)


@serves("_log_softmax_backward_data")
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    g = g.float()
    return (g - y.float().exp() * reduction.sum(g, dim, keepdim=True)).to(input_dtype)
