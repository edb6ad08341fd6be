"""RMS norm below autograd, as newer torch dispatches it."""

from __future__ import annotations

import torch

from bi_ops import reduction
from bi_ops.mode.functions import rms_norm, rms_norm_eps
from bi_ops.mode.served.registry import Tensor, serves


@serves("_fused_rms_norm")
def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    rstd = torch.rsqrt(reduction.mean(x.float().pow(2), dims, keepdim=True) + rms_norm_eps(eps))
    return rms_norm(x, normalized_shape, weight, eps), rstd


@serves("_fused_rms_norm_backward")
def _rms_norm_backward(
    g: Tensor, x: Tensor, normalized_shape: list[int], rstd: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    rows, cols = list(range(x.ndim - len(normalized_shape))), list(range(x.ndim - len(normalized_shape), x.ndim))
    normed, wide = x.float() * rstd.float(), g.float()
    scaled = wide if weight is None else wide * weight.float()
    dx = (rstd.float() * (scaled - normed * reduction.mean(scaled * normed, cols, keepdim=True))).to(x.dtype)
    if weight is None or not output_mask[1]:
        return dx if output_mask[0] else None, None
    dw = reduction.sum(wide * normed, rows) if rows else wide * normed
    return dx if output_mask[0] else None, dw.to(weight.dtype)
