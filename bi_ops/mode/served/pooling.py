"""Pooling and resizing: windows or gathered elements, then ordered sums; gradients of what is put together here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bi_ops.mode.served.decompositions import decomposition
from bi_ops.mode.served.gradient import gradient
from bi_ops.mode.served.registry import Tensor, aten, composes
from bi_ops.mode.served.windows import windows


def _mean_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    n = len(kernel)
    sizes, after = x.shape[-n:], []
    counts = torch.ones((), device=x.device)
    for size, k, step, pad in zip(sizes, kernel, stride, padding, strict=True):
        last = size + 2 * pad - k
        positions = (-(-last // step) if ceil_mode else last // step) + 1
        positions -= ceil_mode and (positions - 1) * step >= size + pad
        starts = torch.arange(positions, device=x.device) * step - pad
        ends = (starts + k).clamp(max=size + pad)
        length = ends - starts if count_include_pad else ends.clamp(max=size) - starts.clamp(min=0)
        counts = counts.unsqueeze(-1) * length
        after.append((positions - 1) * step + k - size - pad)
    x = F.pad(x, [p for pair in zip(reversed(padding), reversed(after), strict=True) for p in pair])
    total = windows(x.float(), [*kernel], [*stride], [1] * n).sum(list(range(-n, 0)))
    return (total / (counts if divisor is None else divisor)).to(x.dtype)


def _pool_arguments(n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    given = dict(zip(names, args, strict=False)) | kwargs
    kernel, stride, padding = (
        [*v] * n if len(v) == 1 else [*v]
        for v in (given["kernel_size"], given.get("stride") or given["kernel_size"], given.get("padding", [0]))
    )
    rest = given.get("ceil_mode", False), given.get("count_include_pad", True), given.get("divisor_override")
    return (kernel, stride, padding, *rest)


def _serve_mean_pools(n: int) -> None:
    @composes(f"avg_pool{n}d")
    def pool(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _mean_pool(x, *_pool_arguments(n, args, kwargs))

    @composes(f"avg_pool{n}d_backward")
    def pool_backward(g: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = _pool_arguments(n, args, kwargs)
        return gradient(lambda x: _mean_pool(x, *given), [x], g)[0]


def _adaptive_mean_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """The mean of elements floor(i S / O) to ceil((i + 1) S / O) of each axis."""
    y, n = x.float(), len(output_size)
    counts = torch.ones((), device=x.device)
    for i, out in enumerate(output_size):
        axis = x.ndim - n + 2 * i  # each axis before it became two: [O, elements of one output]
        size, at = y.shape[axis], torch.arange(out, device=x.device)
        starts, ends = at * size // max(out, 1), ((at + 1) * size + out - 1) // max(out, 1)
        widest = max((-(-(j + 1) * size // out) - j * size // out for j in range(out)), default=0)
        where = starts[:, None] + torch.arange(widest, device=x.device)
        inside = (where < ends[:, None]).view(out, widest, *[1] * (y.ndim - axis - 1))
        y = y.index_select(axis, where.clamp(max=max(size - 1, 0)).flatten()).unflatten(axis, (out, widest))
        y = y.masked_fill(~inside, 0)
        counts = counts.unsqueeze(-1) * (ends - starts)
    first = x.ndim - n
    total = y.sum([first + 2 * i + 1 for i in range(n)])
    return (total / counts).to(x.dtype)


def _serve_adaptive_mean_pools(n: int) -> None:
    @composes(f"_adaptive_avg_pool{n}d")
    def pool(x: Tensor, output_size: list[int]) -> Tensor:
        return _adaptive_mean_pool(x, output_size)

    @composes(f"_adaptive_avg_pool{n}d_backward")
    def pool_backward(g: Tensor, x: Tensor) -> Tensor:
        return gradient(lambda x: _adaptive_mean_pool(x, g.shape[-n:]), [x], g)[0]


for _n in (2, 3):
    _serve_mean_pools(_n)
    _serve_adaptive_mean_pools(_n)


# --------------------------------------------------------------------------------------------------------------
# what picks one element per output: the gradient adds into the picked ones


def _add_at(g: Tensor, x: Tensor, indices: Tensor, n: int) -> Tensor:
    """Zeros like x [..., *S] plus g at `indices` into its last n axes, flattened."""
    flat = g.new_zeros((*x.shape[:-n], math.prod(x.shape[-n:])))
    return flat.scatter_add(-1, indices.flatten(-n), g.flatten(-n)).view(x.shape)


@composes("adaptive_max_pool2d_backward")
def _adaptive_max_pool2d_backward(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return _add_at(g, x, indices, 2)


@composes("adaptive_max_pool3d_backward")
def _adaptive_max_pool3d_backward(g: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return _add_at(g, x, indices, 3)


@composes("max_pool2d_with_indices_backward", "fractional_max_pool2d_backward")
def _max_pool2d_backward(g: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _add_at(g, x, kwargs["indices"] if "indices" in kwargs else args[-1], 2)


@composes("max_pool3d_with_indices_backward", "fractional_max_pool3d_backward")
def _max_pool3d_backward(g: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _add_at(g, x, kwargs["indices"] if "indices" in kwargs else args[-1], 3)


# --------------------------------------------------------------------------------------------------------------
# resizing and padding: linear in x, so the gradient is that of the forward anywhere


def _serve_gradient(backward: str, forward: Callable[..., Tensor]) -> None:
    """`backward`(g, [output_size,] input_size, ...) as the gradient of `forward`(x, [output_size,] ...)."""

    @composes(backward)
    def resized_backward(g: Tensor, output_size: list[int], input_size: list[int], *args: Any, **kwargs: Any) -> Tensor:
        return gradient(lambda x: forward(x, output_size, *args, **kwargs), [g.new_zeros(input_size)], g)[0]


def _taken_apart(name: str) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        fn = decomposition(getattr(aten, name).default)
        assert fn is not None
        return fn(*args, **kwargs)

    return forward


for _name in (
    *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
):
    _serve_gradient(f"{_name}_backward", _taken_apart(_name))


@composes("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward")
def _replication_pad_backward(g: Tensor, x: Tensor, padding: list[int]) -> Tensor:
    n = len(padding) // 2
    for i in range(n):
        axis, size = x.ndim - 1 - i, x.shape[x.ndim - 1 - i]
        where = (torch.arange(g.shape[axis], device=g.device) - padding[2 * i]).clamp(0, size - 1)
        g = g.new_zeros((*g.shape[:axis], size, *g.shape[axis + 1 :])).index_add(axis, where, g)
    return g


@composes("grid_sampler_2d_backward")
def _grid_sampler_backward(
    g: Tensor, x: Tensor, grid: Tensor, mode: int, padding_mode: int, align_corners: bool, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    sample = _taken_apart("grid_sampler_2d")
    grads = gradient(lambda x, grid: sample(x, grid, mode, padding_mode, align_corners), [x, grid], g)
    return tuple(t if wanted else None for t, wanted in zip(grads, output_mask, strict=True))  # type: ignore[return-value]
