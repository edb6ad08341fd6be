"""Distances between vectors: the norms of their differences."""

from __future__ import annotations

import torch

from bi_ops.mode.served.gradient import gradient
from bi_ops.mode.served.registry import Tensor, composes
from bi_ops.mode.served.statistics import vector_norm


@composes("dist")
def _dist(x: Tensor, y: Tensor, p: float = 2) -> Tensor:
    return vector_norm(x - y, p)


@composes("_cdist_forward")
def _cdist(x: Tensor, y: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


@composes("_euclidean_dist")
def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    return vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), 2, -1)


@composes("_cdist_backward")
def _cdist_backward(g: Tensor, x: Tensor, y: Tensor, p: float, distances: Tensor) -> Tensor:
    def distance(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)

    return gradient(distance, [x], g)[0]


def _pairs(x: Tensor) -> Tensor:
    """x_i - x_j for i < j, row after row."""
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return x.index_select(0, i) - x.index_select(0, j)


@composes("_pdist_forward")
def _pdist(x: Tensor, p: float = 2) -> Tensor:
    return vector_norm(_pairs(x), p, -1)


@composes("_pdist_backward")
def _pdist_backward(g: Tensor, x: Tensor, p: float, distances: Tensor) -> Tensor:
    return gradient(lambda x: torch.linalg.vector_norm(_pairs(x), p, -1), [x], g)[0]


@composes("_trilinear")
def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: list[int],
    expand2: list[int],
    expand3: list[int],
    sumdim: list[int],
    unroll_dim: int = 1,
) -> Tensor:
    for axis in expand1:
        a = a.unsqueeze(axis)
    for axis in expand2:
        b = b.unsqueeze(axis)
    for axis in expand3:
        c = c.unsqueeze(axis)
    product = a.float() * b.float() * c.float()
    return (product.sum(sumdim) if sumdim else product).to(a.dtype)
