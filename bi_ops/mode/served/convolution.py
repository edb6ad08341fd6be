"""Convolution: windows, then a GEMM per group."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bi_ops.mode.served.gradient import gradient
from bi_ops.mode.served.registry import Tensor, composes
from bi_ops.mode.served.windows import windows


def _spread(t: Tensor, step: list[int]) -> Tensor:
    """Zeros between the elements of t's last axes, step - 1 of them."""
    for axis, n in enumerate(step, t.ndim - len(step)):
        if n > 1:
            t = torch.stack((t, *[torch.zeros_like(t)] * (n - 1)), axis + 1).flatten(axis, axis + 1)
            t = t.narrow(axis, 0, t.shape[axis] - n + 1)
    return t


def _padded(x: Tensor, before: list[int], after: list[int]) -> Tensor:
    """x with so many zeros before and after each of its last axes; negative: fewer elements."""
    return F.pad(x, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair])


def _convolved(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """x [B, C, *S] with weight [O, C / groups, *K]: [B, O, *positions]."""
    kernel, batch = weight.shape[2:], x.shape[0]
    n = len(kernel)
    cols = windows(x, kernel, stride, dilation)
    where = cols.shape[2 : 2 + n]
    cols = cols.unflatten(1, (groups, x.shape[1] // groups))  # [B, G, C / G, *positions, *K]
    cols = cols.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    rows = cols.reshape(groups, batch * math.prod(where), math.prod(weight.shape[1:]))
    filters = weight.reshape(groups, weight.shape[0] // groups, math.prod(weight.shape[1:]))
    out = torch.bmm(rows, filters.mT).view(groups, batch, *where, filters.shape[1])
    return out.permute(1, 0, 2 + n, *range(2, 2 + n)).reshape(batch, weight.shape[0], *where)


@composes("convolution", "_convolution", "convolution_overrideable")
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    *flags: bool,
) -> Tensor:
    n = weight.ndim - 2
    stride, padding, dilation, output_padding = (
        [*v] * n if len(v) == 1 else [*v] for v in (stride, padding, dilation, output_padding)
    )
    single = x.ndim == n + 1
    x = x[None] if single else x
    if transposed:  # the gradient of a convolution: over its spread output, with the filters turned round
        reach = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        x = _padded(_spread(x, stride), reach, [r + o for r, o in zip(reach, output_padding, strict=True)])
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(list(range(2, 2 + n)))
        stride = [1] * n
    else:
        x = _padded(x, padding, padding)
    out = _convolved(x, weight, stride, dilation, groups)
    out = out if bias is None else out + bias.view(-1, *[1] * n)
    return (out[0] if single else out).contiguous()


@composes("convolution_backward")
def _convolution_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    def convolved(x: Tensor, weight: Tensor) -> Tensor:
        return _convolution(x, weight, None, stride, padding, dilation, transposed, output_padding, groups)

    dx, dweight = gradient(convolved, [x, weight], g) if any(output_mask[:2]) else (None, None)
    spatial = list(range(g.ndim - weight.ndim + 2, g.ndim))
    dbias = g.sum([*range(g.ndim - weight.ndim + 1), *spatial]) if output_mask[2] else None
    return dx if output_mask[0] else None, dweight if output_mask[1] else None, dbias
