"""What adds rows into a tensor by index: front to back, where torch lets atomics add in any order."""

from __future__ import annotations

import math

import torch

from bi_ops import embedding
from bi_ops.mode.errors import unsupported
from bi_ops.mode.served.registry import Tensor, aten, serves, serves_writing


@serves("embedding_dense_backward")
def _embedding_backward(g: Tensor, ids: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    if scale_grad_by_freq:
        raise unsupported("aten::embedding_dense_backward", [g, ids], "is not served with scale_grad_by_freq")
    return embedding.embedding_backward(g, ids, rows, padding_idx, g.dtype)


def _accumulate(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [V, D] + the sum of values [n, D] over rows [n], front to back: what atomics would add in any order."""
    return x + embedding.embedding_backward(values.to(x.dtype), rows, x.shape[0], -1, x.dtype)


@serves("index_put")
def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    used = [i for i in indices if i is not None]
    if not accumulate or all(i.dtype == torch.bool for i in used):  # a mask names no element twice
        return aten.index_put.default(x, indices, values, accumulate)
    if any(i is None for i in indices[: len(used)]) or any(i.dtype not in (torch.int64, torch.int32) for i in used):
        why = "accumulates over indices that are not integers on leading axes"
        raise unsupported("aten::index_put", [x, *used], why)
    used = list(torch.broadcast_tensors(*used))
    flat = torch.zeros_like(used[0], dtype=torch.int64)
    for index, size in zip(used, x.shape, strict=False):
        flat = flat * size + torch.where(index < 0, index + size, index)
    rest = x.shape[len(used) :]
    values = values.expand(*flat.shape, *rest).reshape(flat.numel(), math.prod(rest))
    return _accumulate(x.reshape(-1, math.prod(rest)), flat.reshape(-1), values).view(x.shape)


@serves("index_add")
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    source = source if alpha == 1 else source * alpha
    moved = x.movedim(dim, 0) if x.ndim else x[None]
    values = (source.movedim(dim, 0) if source.ndim else source[None]).reshape(index.numel(), -1)
    out = _accumulate(moved.reshape(moved.shape[0], -1), index.reshape(-1), values).view(moved.shape)
    return out.movedim(0, dim).contiguous() if x.ndim else out[0]


@serves("scatter_add")
def _scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if index.ndim == 0 or index.shape[dim] <= 1:  # one addition per element at most: there is no order
        return aten.scatter_add.default(x, dim, index, src)
    where = [torch.arange(n, device=x.device) for n in index.shape]
    where = list(torch.meshgrid(*where, indexing="ij"))
    where[dim] = index
    return _index_put(x, where, src[tuple(slice(n) for n in index.shape)], True)


serves_writing("index_put_", "index_add_", "scatter_add_")
