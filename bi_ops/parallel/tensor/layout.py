"""A model that tensor-parallel ranks share, and its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

from bi_ops import nn, optim
from bi_ops.core import tensor_files
from bi_ops.core.pairwise import pairwise_
from bi_ops.core.tensor_files import Rows, whole
from bi_ops.nn.main_grad import without_main_grad
from bi_ops.nn.parallel_linear import AllReduce, ParallelLinear, RowParallelLinear
from bi_ops.parallel.gradients import all_gather
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks
from bi_ops.parallel.tensor.sums import OrderedAllReduce
from bi_ops.parallel.whole import Whole


class TensorParallel(Whole):
    """As `Whole`, but `tensor` ranks share the model: a rank has some heads and some of what an MLP multiplies.

    Of the layers of `bi_ops.nn.parallel_linear` a rank keeps a slice, with its gradient and the optimizer's states.
    Embedding, norms and head are whole on each rank, and compute the same there. Sums over features, and over heads in
    the gradients of their norms, have the segments that the model declares, so their bits do not depend on the number
    of ranks; nor does the norm, whose rows are those of (row, segment) where a layer's inputs are shared.

    Args:
        model: whole, with the same values on every rank; it is cut in place. data: ranks that share a batch, each with
            the same slice; tensor: those that share the model, and see the same batch.
        compute_dtype: of the whole weights that an engine is given. all_reduce: adds partial outputs over the tensor
            ranks; None: `OrderedAllReduce`. `parallel.peer.PeerAllReduce` has its bits; another one is a control.

    Raises:
        ValueError: tensor ranks that do not divide the segments, a model that has no layers to share, or parameters
            whose gradients layers cannot carry.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tree: AtomTree,
        data: Ranks = ALONE,
        tensor: Ranks = ALONE,
        compute_dtype: torch.dtype = torch.bfloat16,
        all_reduce: AllReduce | None = None,
    ) -> None:
        self.tensor = tensor
        #: Layers that the ranks share, by the names of their weights.
        self.layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, ParallelLinear)}
        self._head_norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm) and m.segments > 1]
        self.segments = min((m.segments for m in self.layers.values()), default=1)
        check_tensor_ranks(self.segments, tensor)
        if left := without_main_grad(model):
            raise ValueError(
                f"tensor parallel: {', '.join(left[:4])}{' and others' * (len(left) > 4)} would be summed by autograd, "
                "in another order; freeze them, or train without tensor parallelism"
            )
        if tensor.size > 1:
            add = OrderedAllReduce(tensor) if all_reduce is None else all_reduce
            for layer in self.layers.values():
                layer.cut(tensor.rank, tensor.size, add)
            for head_norm in self._head_norms:
                head_norm.segments //= tensor.size
        super().__init__(model, tree, data)
        self.data, self.compute_dtype, self.writes = data, compute_dtype, data.rank == 0

    def warmup(self) -> None:
        """The model's `warmup` of this rank's slices; it waits for no other rank."""
        add = {layer: layer.all_reduce for layer in self.layers.values()}
        try:
            for layer in add:
                layer.all_reduce = _rounded
            cast(Any, self.model).warmup()
        finally:
            for layer, all_reduce in add.items():
                layer.all_reduce = all_reduce

    def _collect(self) -> None:
        """As `Whole`; the gradients of the heads' norms are then added over the ranks that share the heads."""
        super()._collect()
        grads = [m.weight.grad for m in self._head_norms if m.weight.grad is not None]
        if self.tensor.size == 1 or not grads:
            return
        every = self._gathered(torch.cat(grads))
        for grad, total in zip(grads, pairwise_(every).split([len(g) for g in grads]), strict=True):
            grad.copy_(total)

    def _gathered(self, t: torch.Tensor) -> torch.Tensor:
        """[ranks, *t.shape]: what each tensor rank has."""
        t = t.contiguous()
        out = t.new_empty((self.tensor.size * len(t), *t.shape[1:]))
        all_gather(out, t, group=self.tensor.group)
        return out.view(self.tensor.size, *t.shape)

    def norm(self) -> torch.Tensor:
        """From the sums of squares of all rows, in segments where a row is shared; ranks gather those of their own."""
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        shared = {n: layer for n, layer in self.layers.items() if n in grads}
        spans = {n: layer.segments if isinstance(layer, RowParallelLinear) else 1 for n, layer in shared.items()}
        viewed = [g.view(len(g) * spans[n], -1) if n in spans else g for n, g in grads.items()]
        if self.tensor.size == 1:
            return optim.global_norm(viewed)
        sums = dict(zip(grads, optim.row_sums(viewed), strict=True))
        every = self._gathered(torch.cat([sums[n] for n in shared]))
        for n, parts in zip(shared, every.split([len(sums[n]) for n in shared], 1), strict=True):
            sums[n] = self._placed(shared[n], [part.view(-1, spans[n]) for part in parts]).view(-1)
        return optim.norm_of_row_sums(sums.values())

    # Slices, and whole weights.

    def _placed(self, layer: ParallelLinear, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of what each tensor rank has."""
        return tensor_files.joined([layer.place(part, rank, len(parts)) for rank, part in enumerate(parts)])

    def joined(self, layer: ParallelLinear, own: torch.Tensor) -> torch.Tensor:
        """The whole, on each tensor rank, of which `own` is this rank's slice; every rank asks for it."""
        return own if self.tensor.size == 1 else self._placed(layer, list(self._gathered(own)))

    def rows(self) -> dict[str, tuple[Rows, torch.Tensor]] | None:
        """Of every parameter what this rank has of it, and what the optimizer updates; None: all of each."""
        if self.tensor.size == 1:
            return None
        found: dict[str, tuple[Rows, torch.Tensor]] = {}
        for name, p in self.model.named_parameters():
            layer, own = self.layers.get(name), p.detach()
            placed = whole(own) if layer is None else layer.place(own, self.tensor.rank, self.tensor.size)
            found[name] = placed, p
        return found

    def collected(self) -> dict[str, torch.Tensor] | None:
        """On the first rank every whole parameter, in the host's memory: 4 bytes a parameter. Every rank calls it."""
        if self.tensor.size == 1:
            return None
        found = {}
        for name, p in self.model.named_parameters():
            layer, own = self.layers.get(name), p.detach()
            every = own if layer is None else self.joined(layer, own)
            if self.tensor.rank == 0 == self.data.rank:
                found[name] = every.cpu()
        return found

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """While this is entered, the model's parameters are whole, those of its slices in the compute dtype."""
        if self.tensor.size == 1:
            yield
            return
        own = {layer: layer.weight for layer in self.layers.values()}
        try:
            for layer, weight in own.items():
                every = self.joined(layer, weight.detach().to(self.compute_dtype))
                layer.weight = torch.nn.Parameter(every, requires_grad=False)
            yield
        finally:
            for layer, weight in own.items():
                layer.weight = weight


def _rounded(partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In place of a sum over ranks."""
    return partial.to(dtype)


def check_tensor_ranks(segments: int, tensor: Ranks) -> None:
    """Raise ValueError unless as many ranks can share sums of `segments` segments."""
    if segments % tensor.size:
        raise ValueError(
            f"tensor parallel: {tensor.size} ranks cannot share sums of segments={segments}; declare as many segments "
            "as ranks, or a multiple (another number has other bits)"
        )
