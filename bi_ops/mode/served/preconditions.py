"""Arguments that torch refuses: torch's own error, whatever the kernels that serve the operator would do with them.

Indices out of range: on the CPU torch's error, on a GPU torch's assertion on the device, which nothing waits for. Both
come from torch itself, which looks the indices up in a tensor of the operator's shape that is one number in memory.
Shapes and dtypes come first: where torch refuses those, it looks at no index, and an assertion would end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bi_ops.mode.served.registry import OpOverload, Tensor, aten, overload

#: Operator to a function that has its arguments and says whether torch takes them, or raises what torch would.
TAKES: dict[OpOverload, Callable[..., bool]] = {}


def check_arguments(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what torch would for these arguments, or a TypeError that `refuse` makes torch's error of.

    The TypeError stays where a release of torch takes what others refuse.
    """
    takes = TAKES.get(op)
    if takes is None:
        return
    with torch._C.DisableTorchFunction():
        if not takes(*args, **kwargs):
            given = [f"{str(a.dtype).removeprefix('torch.')} {list(a.shape)}" for a in args if isinstance(a, Tensor)]
            raise TypeError(
                f"{op._schema.name} is not served for {', '.join(given)}: use one dtype, and shapes that fit"
            )


def judges(*names: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    """Register a function in `TAKES`."""

    def register(fn: Callable[..., bool]) -> Callable[..., bool]:
        TAKES.update({op: fn for name in names if (op := overload(name)) is not None})
        return fn

    return register


def _fits(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether torch expands `shape` to `target`."""
    if len(shape) > len(target):
        return False
    return all(s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False))


def _number(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape beside x that is one number in memory."""
    return x.new_zeros((), dtype=torch.bool).expand(shape)


@judges("addmm", "baddbmm")
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> bool:
    return bias.dtype == a.dtype and _fits(bias.shape, (*a.shape[:-1], b.shape[-1]))


@judges("addmv")
def _addmv(bias: Tensor, a: Tensor, v: Tensor, *, beta: float = 1, alpha: float = 1) -> bool:
    return bias.dtype == a.dtype and _fits(bias.shape, a.shape[:1])


@judges("addbmm")
def _addbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> bool:
    return bias.dtype == a.dtype and _fits(bias.shape, (a.shape[1], b.shape[-1]))


@judges("index_add", "index_reduce")
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *_: Any, **__: Any) -> bool:
    rank = max(x.ndim, 1)
    if source.dtype != x.dtype or source.ndim != x.ndim or index.ndim > 1 or not -rank <= dim < rank:
        return False
    dim %= rank
    size = x.shape[dim] if x.ndim else 1
    same = source.shape[:dim] == x.shape[:dim] and source.shape[dim + 1 :] == x.shape[dim + 1 :]
    if not same or index.numel() != (source.shape[dim] if x.ndim else 1):
        return False
    aten.index_select.default(_number(x, (size,)), 0, index)
    return True


@judges("scatter_add", "scatter_reduce.two")
def _scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor, *_: Any, **__: Any) -> bool:
    rank = max(x.ndim, 1)
    if index.numel() == 0:  # adds nothing, and torch looks at no shape
        return src.dtype == x.dtype and -rank <= dim < rank
    if index.ndim == 0 or index.shape[dim] <= 1:
        return True  # torch's own operator serves it
    if src.dtype != x.dtype or not src.ndim == index.ndim == rank:
        return False
    if any(i > s for i, s in zip(index.shape, src.shape, strict=True)):
        return False
    aten.gather.default(_number(x, x.shape), dim, index)
    return True


@judges("index_put", "_index_put_impl_")
def _index_put(
    x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False
) -> bool:
    if not accumulate or all(i is None or i.dtype == torch.bool for i in indices):
        return True  # torch's own operator serves it
    masks = (torch.bool, torch.uint8)
    axes = sum(i.ndim if i is not None and i.dtype in masks else 1 for i in indices)
    picked = aten.index.Tensor(_number(x, x.shape[:axes]), indices)
    return values.dtype == x.dtype and _fits(values.shape, (*picked.shape, *x.shape[axes:]))


@judges("put")
def _put(x: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> bool:
    if not accumulate:
        return True
    if source.dtype != x.dtype or source.numel() != index.numel():
        return False
    aten.take.default(_number(x, (x.numel(),)), index)
    return True


@judges("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int) -> bool:
    axis = min(x.ndim - 1, 1)
    if target.shape != x.shape[:axis] + x.shape[axis + 1 :] or target.dtype != torch.int64:
        return False
    if weight is not None and (weight.shape != (x.shape[axis],) or weight.dtype != x.dtype):
        return False
    if not target.is_cpu:
        return True  # gather asserts it on the device
    return bool(((target == ignore_index) | ((target >= 0) & (target < x.shape[axis]))).all())


@judges("avg_pool2d", "avg_pool3d")
def _avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> bool:
    n = max(len(kernel), len(padding))
    sizes, pads = (tuple(t) * (n if len(t) == 1 else 1) for t in (kernel, padding))
    return divisor != 0 and all(0 <= pad <= size // 2 for size, pad in zip(sizes, pads, strict=True))


@judges("mean", "mean.dim")
def _mean(*args: Any, dtype: torch.dtype | None = None, **_: Any) -> bool:
    return dtype is None or dtype.is_floating_point or dtype.is_complex


@judges("renorm")
def _renorm(x: Tensor, *_: Any) -> bool:
    return x.ndim >= 2
