"""A model that tensor-parallel ranks share, and its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from bi_ops import nn, optim
from bi_ops.core import tensor_files
from bi_ops.core.pairwise import pairwise_
from bi_ops.core.tensor_files import Rows, whole
from bi_ops.nn.main_grad import without_main_grad
from bi_ops.nn.parallel_linear import AllReduce, RowParallelLinear, Shared
from bi_ops.nn.parallel_vocab import SharedVocabulary
from bi_ops.parallel.early_exchange import Squares
from bi_ops.parallel.gradients import all_gather
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks
from bi_ops.parallel.tensor.sums import OrderedAllReduce, VocabularyExchange
from bi_ops.parallel.whole import Whole


class TensorParallel(Whole):
    """As `Whole`, but `tensor` ranks share the model: its heads, what MLPs multiply, and the vocabulary.

    Of the layers of `bi_ops.nn.parallel_linear` and `parallel_vocab` a rank keeps a slice, with its gradient and the
    optimizer's states; layers that share a weight share its slice. Norms are whole on each rank, and compute the same
    there. Sums over features, and over heads in
    the gradients of their norms, have the segments that the model declares, so their bits do not depend on the number
    of ranks; nor does the norm, whose rows are those of (row, segment) where a layer's inputs are shared.

    Args:
        model: whole, with the same values on every rank; it is cut in place. data: ranks that share a batch, each with
            the same slice; tensor: those that share the model, and see the same batch.
        compute_dtype: of the whole weights that an engine is given. all_reduce: adds partial outputs over the tensor
            ranks; None: `OrderedAllReduce`. `parallel.peer.PeerAllReduce` has its bits; another one is a control.
        allocate, keeps_memory: as `Whole`.

    Raises:
        ValueError: tensor ranks that do not divide the segments, a model that has no layers to share, parameters whose
            gradients layers cannot carry, a weight that a layer shares with one that cannot be cut, or logits whose
            rows ranks cannot share (`logprob.shards.check_dtype`).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tree: AtomTree,
        data: Ranks = ALONE,
        tensor: Ranks = ALONE,
        compute_dtype: torch.dtype = torch.bfloat16,
        all_reduce: AllReduce | None = None,
        allocate: Callable[[], None] | None = None,
        keeps_memory: bool = False,
    ) -> None:
        self.tensor = tensor
        #: Layers that the ranks share, by the names of their weights; a weight of several layers has all of them.
        self.sharers = _sharers(model)
        #: The first of each, and all of them.
        self.layers = {name: layers[0] for name, layers in self.sharers.items()}
        self.shared = [layer for layers in self.sharers.values() for layer in layers]
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
                if isinstance(layer, SharedVocabulary):
                    layer.check_dtype(compute_dtype)
            self.exchange = VocabularyExchange(tensor)
            for first, *others in self.sharers.values():
                for layer in (first, *others):
                    layer.cut(tensor.rank, tensor.size, add)
                    if isinstance(layer, SharedVocabulary):
                        layer.exchange = self.exchange
                for layer in others:
                    layer.weight = first.weight
            for head_norm in self._head_norms:
                head_norm.segments //= tensor.size
        # Partial outputs travel in the backward of ranks that share a model, and the norms' gradients behind it.
        super().__init__(model, tree, data, allocate, keeps_memory, overlap=tensor.size == 1)
        self.data, self.compute_dtype, self.writes = data, compute_dtype, data.rank == 0

    def warmup(self) -> None:
        """The model's `warmup` of this rank's slices; it waits for no other rank."""
        shared = [(layer, layer.all_reduce) for layer in self.shared if layer.all_reduce is not None]
        try:
            for layer, _ in shared:
                layer.all_reduce = _rounded
                if isinstance(layer, SharedVocabulary):
                    layer.exchange = _Alone(self.tensor.size)
            cast(Any, self.model).warmup()
        finally:
            for layer, all_reduce in shared:
                layer.all_reduce = all_reduce
                if isinstance(layer, SharedVocabulary):
                    layer.exchange = self.exchange

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

    def norm(self, squares: Squares | None = None) -> torch.Tensor:
        """From the sums of squares of all rows, in segments where a row is shared; ranks gather those of their own."""
        if self.tensor.size == 1:
            return super().norm(squares)
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        shared = {n: layer for n, layer in self.layers.items() if n in grads}
        in_rows = self._in_rows({self.parameters[n]: g for n, g in grads.items()})
        sums = dict(zip(grads, optim.row_sums(in_rows), strict=True))
        filled = [layer.filled(sums[n], self.tensor.size) for n, layer in shared.items()]
        every = self._gathered(torch.cat(filled))
        for (n, layer), parts in zip(shared.items(), every.split([len(own) for own in filled], 1), strict=True):
            sums[n] = self._placed(layer, [part.view(-1, _spans(layer)) for part in parts]).view(-1)
        return optim.norm_of_row_sums(sums.values())

    def _in_rows(self, given: Mapping[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """As `Whole`, but a row that ranks may share is as many as it has segments."""
        layers = {n: layer for n, layer in self.layers.items() if n in self.parameters}
        spans: dict[torch.Tensor, int] = {self.parameters[n]: _spans(layer) for n, layer in layers.items()}
        return [g.view(len(g) * spans.get(p, 1), -1) if spans.get(p, 1) > 1 else g for p, g in given.items()]

    # Slices, and whole weights.

    def _placed(self, layer: Shared, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of what each tensor rank has."""
        return tensor_files.joined([layer.place(part, rank, len(parts)) for rank, part in enumerate(parts)])

    def joined(self, layer: Shared, own: torch.Tensor) -> torch.Tensor:
        """The whole, on each tensor rank, of which `own` is this rank's slice; every rank asks for it."""
        if self.tensor.size == 1:
            return own
        return self._placed(layer, list(self._gathered(layer.filled(own, self.tensor.size))))

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
        own = {name: layer.weight for name, layer in self.layers.items()}
        try:
            for name, weight in own.items():
                every = self.joined(self.layers[name], weight.detach().to(self.compute_dtype))
                whole_weight = torch.nn.Parameter(every, requires_grad=False)
                for layer in self.sharers[name]:
                    layer.weight = whole_weight
            yield
        finally:
            for name, weight in own.items():
                for layer in self.sharers[name]:
                    layer.weight = weight


def _spans(layer: Shared) -> int:
    """Pieces of a row of its weight that have a sum of squares each."""
    return layer.segments if isinstance(layer, RowParallelLinear) else 1


def _sharers(model: torch.nn.Module) -> dict[str, list[Shared]]:
    """Layers that ranks can share, by the names of their weights, those that `named_parameters` gives.

    Raises:
        ValueError: a weight that is another layer's too.
    """
    modules = dict(model.named_modules())
    names: dict[torch.Tensor, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    found = {}
    for first, *others in names.values():
        layers = {n: modules[n.rpartition(".")[0]] for n in (first, *others)}
        shared = {n: m for n, m in layers.items() if isinstance(m, Shared)}
        if shared and len(shared) < len(layers):
            left = ", ".join(n for n in layers if n not in shared)
            raise ValueError(
                f"tensor parallel: {left} has the weight of {', '.join(shared)}, but is no layer that ranks can share; "
                "make it one of bi_ops.nn.parallel_vocab or parallel_linear, or give it a weight of its own"
            )
        if shared:
            found[first] = list(shared.values())
    return found


class _Alone:
    """In place of an exchange between so many ranks."""

    def __init__(self, size: int) -> None:
        self.size = size

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return own.expand(self.size, *own.shape).contiguous()

    def pick(self, own: torch.Tensor) -> torch.Tensor:
        return own


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
