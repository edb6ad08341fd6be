"""RMS norm below autograd, as newer torch dispatches it: the operators of `bi_ops.norm`, forward and backward."""

from __future__ import annotations

import torch

from bi_ops.core import dtypes
from bi_ops.mode.functions import rms_norm_eps
from bi_ops.mode.served.registry import Tensor, serves

bi_ops = torch.ops.bi_ops


@serves("_fused_rms_norm")
def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    n_dims = len(normalized_shape)
    if weight is not None:
        weight = dtypes.norm_weight(x, weight).reshape(-1)
    y, rstd = bi_ops.rms_norm(x.flatten(-n_dims), weight, rms_norm_eps(eps))
    return y.view(x.shape), rstd.view(*x.shape[:-n_dims], *[1] * n_dims)


@serves("_fused_rms_norm_backward")
def _rms_norm_backward(
    g: Tensor, x: Tensor, normalized_shape: list[int], rstd: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    n_dims = len(normalized_shape)
    need_x, need_weight = output_mask
    weight_row = None if weight is None else dtypes.norm_weight(x, weight).reshape(-1)
    rows = g.to(x.dtype).flatten(-n_dims), None, x.flatten(-n_dims)
    dx, dw = bi_ops.rms_norm_backward(*rows, weight_row, rstd.reshape(-1), need_x, need_weight)
    dw = None if weight is None or not need_weight else dw.view(weight.shape).to(weight.dtype)
    return dx.view(x.shape) if need_x else None, dw
