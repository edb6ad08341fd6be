"""Softmax and its logarithm, forward and backward: the kernels of `bi_ops.logprob`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_ops import logprob
from bi_ops.mode.served.registry import Tensor, serves
from bi_ops.mode.served.scans import sum_wide

bi_ops = torch.ops.bi_ops


def _last(fn: Callable[..., Tensor], dim: int, *tensors: Tensor, dtype: torch.dtype) -> Tensor:
    """fn over `dim` as the last one; strides are torch's: contiguous, or channels last where the first tensor is."""
    x = tensors[0]
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=dtype)
    if x.ndim == 0:
        return fn(*(t[None] for t in tensors), dtype)[0]
    if dim in (-1, x.ndim - 1):
        out = fn(*tensors, dtype)
    else:
        out = fn(*(t.movedim(dim, -1) for t in tensors), dtype).movedim(-1, dim)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return out.contiguous(memory_format=torch.channels_last)
    return out.contiguous()


def _softmax_wide(x: Tensor, log: bool) -> Tensor:
    """Of fp64, over the last axis."""
    if x.numel() == 0:
        return torch.empty_like(x)
    shifted = x - x.amax(-1, keepdim=True)
    total = sum_wide(shifted.exp(), -1, keepdim=True)
    return shifted - total.log() if log else shifted.exp() / total


def _softmax_backward_wide(g: Tensor, y: Tensor, log: bool) -> Tensor:
    if log:
        return g - y.exp() * sum_wide(g, -1, keepdim=True)
    return y * (g - sum_wide(g * y, -1, keepdim=True))


def _forward(x: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return _last(lambda x, _: _softmax_wide(x, log), dim, x, dtype=dtype)
    return _last(logprob.log_softmax if log else logprob.softmax, dim, x, dtype=dtype)


def _backward(g: Tensor, y: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    if y.dtype == torch.float64:
        return _last(lambda g, y, dtype: _softmax_backward_wide(g, y, log).to(dtype), dim, g, y, dtype=dtype)
    return _last(lambda g, y, dtype: bi_ops.softmax_backward(g, y, log, dtype), dim, g, y, dtype=dtype)


@serves("_softmax", wide=True)
def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _forward(x, dim, False, torch.float32 if half_to_float else x.dtype)


@serves("_log_softmax", wide=True)
def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _forward(x, dim, True, torch.float32 if half_to_float else x.dtype)


@serves("_softmax_backward_data", wide=True)
def _softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return _backward(g, y, dim, False, input_dtype)


@serves("_log_softmax_backward_data", wide=True)
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return _backward(g, y, dim, True, input_dtype)
