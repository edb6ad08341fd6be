"""Softmax and its logarithm, forward and backward: the kernels of `bi_ops.logprob`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_ops import logprob
from bi_ops.mode.served.registry import Tensor, serves

bi_ops = torch.ops.bi_ops


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
    return _last(lambda g, y, dtype: bi_ops.softmax_backward(g, y, False, dtype), dim, g, y, dtype=input_dtype)


@serves("_log_softmax_backward_data")
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return _last(lambda g, y, dtype: bi_ops.softmax_backward(g, y, True, dtype), dim, g, y, dtype=input_dtype)
