"""The element of a certain rank: torch's value, and where several elements have it, the first of them.

On a GPU torch's threads race for the index of a tie, so it may differ from run to run and with the batch.
"""

from __future__ import annotations

import torch

from bi_ops.mode.served.registry import Tensor, aten, serves


def _first(x: Tensor, found: tuple[Tensor, Tensor], dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """`found`, values and indices over `dim` of x, with the first index of each value."""
    if x.ndim == 0 or found[0].numel() == 0:
        return found
    dim %= x.ndim
    value = found[0] if keepdim else found[0].unsqueeze(dim)
    same = (x == value) | ((x != x) & (value != value))
    positions = torch.arange(x.shape[dim], device=x.device).view(-1, *[1] * (x.ndim - dim - 1))
    index = torch.where(same, positions, x.shape[dim]).amin(dim, keepdim=True)
    value = x.gather(dim, index)  # of +0 and -0, the one that the index names
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))


@serves("median.dim", wide=True, integers=True)
def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _first(x, aten.median.dim(x, dim, keepdim), dim, keepdim)


@serves("nanmedian.dim", wide=True, integers=True)
def _nanmedian(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _first(x, aten.nanmedian.dim(x, dim, keepdim), dim, keepdim)


@serves("kthvalue", wide=True, integers=True)
def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _first(x, aten.kthvalue.default(x, k, dim, keepdim), dim, keepdim)


@serves("median", wide=True, integers=True)
def _median_of_all(x: Tensor) -> Tensor:
    return aten.median.default(x)


@serves("nanmedian", wide=True, integers=True)
def _nanmedian_of_all(x: Tensor) -> Tensor:
    return aten.nanmedian.default(x)
