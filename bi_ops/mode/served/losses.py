"""Losses: pointwise, then a sum or a mean of `bi_ops.reduction`."""

from __future__ import annotations

from typing import Any

import torch

from bi_ops import reduction
from bi_ops.mode.served.decompositions import decomposition
from bi_ops.mode.served.gradient import gradient
from bi_ops.mode.served.registry import SERVED, OpOverload, Tensor, aten, composes, overload, serves


def _class_weights(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each target in fp32, zero where it is ignored."""
    keep = target != ignore_index
    if weight is None:
        return keep.float()
    return torch.where(keep, weight.float()[torch.where(keep, target, 0)], 0.0)


@serves("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """x [C], [N, C] or [N, C, H, W]: the loss, and the sum of the weights, in fp32."""
    axis = min(x.ndim - 1, 1)
    keep = target != ignore_index
    picked = x.gather(axis, torch.where(keep, target, 0).unsqueeze(axis)).squeeze(axis)
    losses = torch.where(keep, -picked, 0.0)
    weights = _class_weights(x, target, weight, ignore_index)
    if weight is not None:
        losses = (losses * weights).to(x.dtype) if how == 0 else losses * weights
    count = keep.sum().float() if weight is None else reduction.sum(weights)
    if how == 0:
        return losses, count
    total = reduction.sum(losses, dtype=torch.float32)
    return (total / count if how == 1 else total).to(x.dtype), count


@serves("nll_loss_backward", "nll_loss2d_backward")
def _nll_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int, count: Tensor
) -> Tensor:
    axis = min(x.ndim - 1, 1)
    g = g.float() / count if how == 1 else g.float()
    values = (-g * _class_weights(x, target, weight, ignore_index)).to(x.dtype).unsqueeze(axis)
    values = torch.where((target != ignore_index).unsqueeze(axis), values, 0.0)
    where = torch.where(target != ignore_index, target, 0).unsqueeze(axis)
    return x.new_zeros(x.shape).scatter(axis, where, values)


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


# --------------------------------------------------------------------------------------------------------------
# margin losses


@composes("multi_margin_loss_backward")
def _multi_margin_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, p: float, margin: float, weight: Tensor | None = None, how: int = 1
) -> Tensor:
    forward = decomposition(aten.multi_margin_loss.default)
    assert forward is not None
    return gradient(lambda x: forward(x, target, p, margin, weight, how), (x,), g)[0]


def _multilabel_margin_loss(x: Tensor, target: Tensor, how: int) -> tuple[Tensor, Tensor]:
    """The loss, and which classes are targets [N, C]. torch's own decomposition counts labels after the first -1."""
    rows, labels = torch.atleast_2d(x), torch.atleast_2d(target)
    n = rows.shape[1]
    classes = torch.arange(n, device=x.device)
    end = torch.where(labels == -1, classes, n).amin(-1, keepdim=True)
    keep = classes < end
    labels = torch.where(keep, labels, 0)
    is_target = (keep[..., None] & (labels[..., None] == classes)).any(1)
    margins = (1 - rows.gather(-1, labels)[..., None] + rows[:, None]).clamp_min(0) / n
    losses = torch.where(keep[..., None] & ~is_target[:, None], margins, 0).sum((1, 2))
    if how == 0:
        return losses.reshape(x.shape[:-1]), is_target
    return losses.mean() if how == 1 else losses.sum(), is_target


@composes("multilabel_margin_loss_forward")
def _multilabel_margin_loss_forward(x: Tensor, target: Tensor, how: int) -> tuple[Tensor, Tensor]:
    loss, is_target = _multilabel_margin_loss(x, target, how)
    return loss, is_target.to(x.dtype).reshape(target.shape)


@composes("multilabel_margin_loss_backward")
def _multilabel_margin_loss_backward(g: Tensor, x: Tensor, target: Tensor, how: int, is_target: Tensor) -> Tensor:
    return gradient(lambda x: _multilabel_margin_loss(x, target, how)[0], (x,), g)[0]
