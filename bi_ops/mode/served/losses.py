"""Losses: pointwise, then a sum or a mean of `bi_ops.reduction`."""

from __future__ import annotations

from typing import Any

import torch

from bi_ops import reduction
from bi_ops.mode.errors import unsupported
from bi_ops.mode.served.registry import SERVED, OpOverload, Tensor, overload, serves


@serves("nll_loss_forward")
def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    if weight is not None:
        raise unsupported("aten::nll_loss_forward", [x, target, weight], "is not served with class weights")
    keep = target != ignore_index
    picked = x.gather(-1, torch.where(keep, target, 0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(keep, -picked, 0.0)
    count = keep.sum().float()
    if how == 0:
        return losses, count
    total = reduction.sum(losses, dtype=torch.float32)
    return (total / count if how == 1 else total).to(x.dtype), count


@serves("nll_loss_backward")
def _nll_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int, count: Tensor
) -> Tensor:
    keep = target != ignore_index
    g = g.float() / count if how == 1 else g.float()
    values = torch.where(keep, -g, 0.0).to(x.dtype).unsqueeze(-1)
    return x.new_zeros(x.shape).scatter(-1, torch.where(keep, target, 0).unsqueeze(-1), values)


def _serve_loss(op: OpOverload) -> None:
    """A loss that is pointwise but for its reduction."""
    names = [a.name for a in op._schema.arguments]

    def impl(*args: Any, **kwargs: Any) -> Tensor:
        bound = dict(zip(names, args, strict=False)) | kwargs
        how = bound.pop("reduction", 1)
        losses = op(**bound, reduction=0)
        return losses if how == 0 else reduction.mean(losses) if how == 1 else reduction.sum(losses)

    SERVED[op] = impl


_LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")
for _name in (*_LOSSES, "binary_cross_entropy_with_logits"):
    _serve_loss(overload(_name))  # type: ignore[arg-type]
