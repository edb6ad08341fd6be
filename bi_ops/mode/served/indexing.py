"""What adds rows into a tensor by index: front to back, where torch lets atomics add in any order."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bi_ops import embedding
from bi_ops.mode.errors import unsupported
from bi_ops.mode.served.registry import Tensor, aten, composes, serves


@serves("embedding_dense_backward")
def _embedding_backward(g: Tensor, ids: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    if scale_grad_by_freq:
        raise unsupported("aten::embedding_dense_backward", [g, ids], "is not served with scale_grad_by_freq")
    return embedding.embedding_backward(g, ids, rows, padding_idx, g.dtype)


def _accumulate(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [V, D] + the sum of values [n, D] over rows [n], front to back: what atomics would add in any order."""
    return x + embedding.embedding_backward(values.to(x.dtype), rows, x.shape[0], -1, x.dtype)


def _integers(x: Tensor, indices: list[Tensor | None]) -> list[Tensor | None]:
    """The indices, beside x, with each mask as the positions where it holds, one index per axis of it."""
    indices = [None if i is None else i.to(x.device) for i in indices]  # torch takes indices on the CPU everywhere
    found: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        found.extend(index.nonzero().unbind(1) if is_mask else [index])  # type: ignore[union-attr]
    return found


@serves("index_put", "_unsafe_index_put")
def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    if not accumulate or all(i is None or i.dtype == torch.bool for i in indices):  # a mask names no element twice
        return aten.index_put.default(x, indices, values, accumulate)
    indices = _integers(x, indices)
    axes = [axis for axis, i in enumerate(indices) if i is not None]
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    used = torch.broadcast_tensors(*(i.long() for i in indices if i is not None))
    # What x[indices] looks like: the axes of the indices where the first of them is, in front if they are apart.
    is_together = axes[-1] - axes[0] == len(axes) - 1
    front = axes[0] if is_together else 0
    shape = [x.shape[d] for d in rest]
    values = values.expand(*shape[:front], *used[0].shape, *shape[front:])
    values = values.movedim(tuple(range(front, front + used[0].ndim)), tuple(range(used[0].ndim)))
    flat = torch.zeros_like(used[0])
    for index, axis in zip(used, axes, strict=True):
        flat = flat * x.shape[axis] + torch.where(index < 0, index + x.shape[axis], index)
    moved = x.permute(*axes, *rest)
    width = math.prod(x.shape[d] for d in rest)
    rows = moved.reshape(math.prod(x.shape[d] for d in axes), width)
    out = _accumulate(rows, flat.reshape(-1), values.reshape(flat.numel(), width)).view(moved.shape)
    return out.permute([(axes + rest).index(d) for d in range(x.ndim)]).contiguous()


@serves("_index_put_impl_")
def _index_put_impl(
    x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> Tensor:
    return x.copy_(_index_put(x, indices, values, accumulate))


@serves("put")
def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    if not accumulate:
        return aten.put.default(x, index, source)
    return _index_put(x.reshape(-1), [index.reshape(-1)], source.reshape(-1), True).view(x.shape)


@serves("index_add")
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    source = source if alpha == 1 else source * alpha
    moved = x.movedim(dim, 0) if x.ndim else x[None]
    width = math.prod(moved.shape[1:])
    values = (source.movedim(dim, 0) if source.ndim else source[None]).reshape(index.numel(), width)
    out = _accumulate(moved.reshape(moved.shape[0], width), index.reshape(-1), values).view(moved.shape)
    return out.movedim(0, dim).contiguous() if x.ndim else out[0]


@serves("scatter_add")
def _scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if index.numel() == 0:
        return x.clone()
    if x.ndim == 0 or index.ndim == 0:
        return _scatter_add(x.reshape(-1), 0, index.reshape(-1), src.reshape(-1)).view(x.shape)
    if index.shape[dim] <= 1:  # one addition per element at most: there is no order
        return aten.scatter_add.default(x, dim, index, src)
    where = [torch.arange(n, device=x.device) for n in index.shape]
    where = list(torch.meshgrid(*where, indexing="ij"))
    where[dim] = index
    return _index_put(x, where, src[tuple(slice(n) for n in index.shape)], True)


# --------------------------------------------------------------------------------------------------------------
# reductions by index


_EXTREMES = ("amax", "amin")


def _reduced(
    add: Callable[[Tensor, Tensor], Tensor], op: str, x: Tensor, src: Tensor, how: str, include_self: bool
) -> Tensor:
    """x with `src` reduced into it. add(x, src): the sum where the operator would put src."""
    if how not in ("sum", "mean"):
        raise unsupported(f"aten::{op}", [x, src], f"is not served with reduce={how!r}")
    count = add(torch.zeros_like(x), torch.ones_like(src))
    start = x if include_self else x.masked_fill(count > 0, 0)
    total = add(start, src)
    return total if how == "sum" else total / (count + 1 if include_self else count.clamp(min=1))


@serves("scatter_reduce.two")
def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce in _EXTREMES:  # the largest of some numbers, in any order
        return aten.scatter_reduce.two(x, dim, index, src, reduce, include_self=include_self)
    return _reduced(lambda x, src: _scatter_add(x, dim, index, src), "scatter_reduce", x, src, reduce, include_self)


@serves("index_reduce")
def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce in _EXTREMES:
        return aten.index_reduce.default(x, dim, index, source, reduce, include_self=include_self)
    return _reduced(lambda x, src: _index_add(x, dim, index, src), "index_reduce", x, source, reduce, include_self)


@composes("scatter.reduce")
def _scatter_with(x: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    if reduce != "add":
        raise unsupported("aten::scatter", [x, src], f"is not served with reduce={reduce!r}")
    return x.scatter_add(dim, index, src)


@composes("scatter.value_reduce")
def _scatter_value_with(x: Tensor, dim: int, index: Tensor, value: float, *, reduce: str) -> Tensor:
    return _scatter_with(x, dim, index, x.new_full(index.shape, value), reduce=reduce)


@composes("bincount")
def _bincount(x: Tensor, weights: Tensor, minlength: int = 0) -> Tensor:
    if weights.dtype != torch.float32:  # torch adds those in fp64
        raise unsupported("aten::bincount", [x, weights], "is served with fp32 weights")
    n = max(minlength, int(x.max()) + 1 if x.numel() else 0)
    return weights.new_zeros(n).index_add(0, x, weights)
