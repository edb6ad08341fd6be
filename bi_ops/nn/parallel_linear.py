"""Linear layers that tensor-parallel ranks can share: a sum over features has segments, of which a rank has a subtree.

Shoeybi et al., "Megatron-LM" (2019), section 3: a column-parallel layer has some of the outputs on each rank, and a
row-parallel one behind it some of the inputs. The first needs a sum over ranks for dX, the second for its output; dW,
and the dX of the second, are a rank's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bi_ops import matmul
from bi_ops.core import rounding
from bi_ops.core.main_grad import MainGrad
from bi_ops.core.tensor_files import Rows
from bi_ops.core.transforms import Node
from bi_ops.nn.layers import Linear

#: Adds fp32 [M, N], a subtree, over the ranks in the order of the tree; the sum is rounded to the dtype.
AllReduce = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


class _ParallelLinear(Node):
    """x[T, K] @ weight[N, K].T, of which the result or the gradient of x is summed by segments."""

    operator = "linear with segments"

    @staticmethod
    def forward(ctx, x, weight, main_grad, layer):
        rounded = rounding.rounded(weight, x.dtype)
        ctx.save_for_backward(x, rounded)
        ctx.main_grad, ctx.layer, ctx.weight_dtype = main_grad, layer, weight.dtype
        return layer.product(x, rounded)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        layer = ctx.layer
        g = layer.own_outputs(g.contiguous())
        own = MainGrad(weight.shape, weight.device) if ctx.main_grad is None else ctx.main_grad
        dx = matmul.linear_backward(own, g, x, weight, need_x and not layer.sums_gradient, need_weight)
        if need_x and layer.sums_gradient:
            dx = layer.gradient(g, weight)
        dweight = own.collect().to(ctx.weight_dtype) if need_weight and ctx.main_grad is None else None
        return dx, dweight, None, None


class Shared:
    """A layer with a matrix of which tensor-parallel ranks may have a slice each.

    segments: of the axis that ranks may share, a power of two: pieces that are summed each for itself in fp32, then
        pairwise, and rounded once. Of a slice those of the rank. 1: the order of a layer that nobody shares.
    all_reduce: of a slice, goes on with the sum over ranks.
    """

    weight: torch.Tensor
    segments: int = 1
    all_reduce: AllReduce | None = None

    @property
    def is_shared(self) -> bool:
        """Is a sum over features one by segments, or over ranks?"""
        return self.segments > 1 or self.all_reduce is not None

    def place(self, own: torch.Tensor, rank: int, size: int) -> Rows:
        """Where `own` lies in the whole, if it is what rank `rank` of `size` has of the weight, or of each of its rows.

        own: [the weight's rows of the rank, any columns].
        """
        raise NotImplementedError

    def slice_of(self, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """What rank `rank` of `size` has of the whole weight; memory of its own."""
        raise NotImplementedError

    def filled(self, own: torch.Tensor, size: int) -> torch.Tensor:
        """`own` with as many rows as any of `size` ranks has; `place` drops what was filled up."""
        return own

    def cut(self, rank: int, size: int, all_reduce: AllReduce) -> None:
        """Keep the slice of rank `rank` alone, of `size` ranks, a divisor of the segments."""
        own = self.slice_of(self.weight.detach(), rank, size)
        self.weight = torch.nn.Parameter(own, self.weight.requires_grad)
        self.segments, self.all_reduce = self.segments // size, all_reduce


class ParallelLinear(Shared, Linear):
    """A linear layer without a bias, or a rank's slice of it.

    sums_gradient: the gradient of the input is a sum by segments, that of `gradient`.
    """

    sums_gradient = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`. Of a slice every rank makes the call, and its backward."""
        if not self.is_shared:
            return super().forward(input)
        # A view of a matrix would be one more node, in both passes.
        rows = input if input.ndim == 2 else input.reshape(-1, input.shape[-1])
        out = _ParallelLinear.apply(rows, self.weight, self.main_grad, self)
        return out if input.ndim == 2 else out.view(*input.shape[:-1], -1)  # type: ignore[no-any-return]

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weight.T; weight: rounded."""
        return matmul.linear(x, weight)

    def gradient(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """g @ weight by segments, over the ranks if they share it; weight: rounded."""
        raise NotImplementedError

    def own_outputs(self, g: torch.Tensor) -> torch.Tensor:
        """The gradients of this rank's outputs, contiguous, of those that `forward` returned."""
        return g

    def cut(self, rank: int, size: int, all_reduce: AllReduce) -> None:
        """See `Shared`."""
        super().cut(rank, size, all_reduce)
        self.out_features, self.in_features = self.weight.shape


class ColumnParallelLinear(ParallelLinear):
    """Ranks share the outputs: of each of `parts`, the sizes of queries, keys and values or of gate and up, a piece.

    The gradient of the input sums over the outputs, so its segments are those: the s-th of each part, one behind the
    other.
    """

    sums_gradient = True

    def __init__(self, in_features: int, parts: Sequence[int], segments: int = 1, **factory: Any) -> None:
        super().__init__(in_features, sum(parts), bias=False, **factory)
        self.parts, self.segments = tuple(parts), segments
        self._own_parts = self.parts

    def gradient(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `ParallelLinear`."""
        if self.all_reduce is None:
            return matmul.subtree_of(g, weight.t(), self.segments, self._own_parts, g.dtype)
        return self.all_reduce(matmul.subtree_of(g, weight.t(), self.segments, self._own_parts), g.dtype)

    def cut(self, rank: int, size: int, all_reduce: AllReduce) -> None:
        """See `Shared`."""
        super().cut(rank, size, all_reduce)
        self._own_parts = tuple(n // size for n in self.parts)

    def _runs(self, rank: int, size: int) -> tuple[tuple[int, int], ...]:
        starts = itertools.accumulate(self.parts[:-1], initial=0)
        return tuple((at + rank * n // size, n // size) for at, n in zip(starts, self.parts, strict=True))

    def place(self, own: torch.Tensor, rank: int, size: int) -> Rows:
        """See `Shared`."""
        return Rows(own, (sum(self.parts), own.shape[1]), runs=self._runs(rank, size))

    def slice_of(self, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """See `Shared`."""
        return torch.cat([weight[first : first + n] for first, n in self._runs(rank, size)])


class RowParallelLinear(ParallelLinear):
    """Ranks share the inputs, so the output is a sum over segments of them."""

    def __init__(self, in_features: int, out_features: int, segments: int = 1, **factory: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **factory)
        self.segments = segments

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `ParallelLinear`."""
        if self.all_reduce is None:
            return matmul.subtree(x, weight, self.segments, dtype=x.dtype)
        return self.all_reduce(matmul.subtree(x, weight, self.segments), x.dtype)

    def place(self, own: torch.Tensor, rank: int, size: int) -> Rows:
        """See `Shared`."""
        rows, columns = own.shape
        return Rows(own, (rows, columns * size), column=rank * columns)

    def slice_of(self, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """See `Shared`."""
        return weight.chunk(size, 1)[rank].clone(memory_format=torch.contiguous_format)
