"""Losses: pointwise, then a sum or a mean of `bi_ops.reduction`."""

from __future__ import annotations

from typing import Any

import torch

from bi_ops import reduction
from bi_ops.mode.served.decompositions import decomposition
from bi_ops.mode.served.gradient import gradient
from bi_ops.mode.served.registry import SERVED, OpOverload, Tensor, composes, overload, serves


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
# margin losses: torch takes the forward apart (`decompositions`), and the gradient is that of these parts


def _margin_gradient(forward: str, g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    op = overload(forward)
    assert op is not None
    parts = decomposition(op)
    assert parts is not None

    def loss(x: Tensor) -> Tensor:
        out = parts(x, *rest)
        return out if isinstance(out, Tensor) else out[0]

    return gradient(loss, (x,), g)[0]


@composes("multi_margin_loss_backward")
def _multi_margin_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, p: float, margin: float, weight: Tensor | None = None, how: int = 1
) -> Tensor:
    return _margin_gradient("multi_margin_loss", g, x, target, p, margin, weight, how)


@composes("multilabel_margin_loss_backward")
def _multilabel_margin_loss_backward(g: Tensor, x: Tensor, target: Tensor, how: int, is_target: Tensor) -> Tensor:
    return _margin_gradient("multilabel_margin_loss_forward", g, x, target, how)
