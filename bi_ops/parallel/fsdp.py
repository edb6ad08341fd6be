"""Weights, gradients and optimizer states in shards: torch's FSDP2 moves weights, a tree over atoms adds gradients.

FSDP2 has the rounded weights alone: it gathers those of a layer when a forward or backward needs them, and frees them.
It never sees a gradient: its own way would copy all of them into messages, twice their bytes through memory, and a
library would add them. The fp32 sums that layers carry from one micro-batch to the next (`main_grad`) are finished
behind a layer's backward in the last micro-batch of an atom, and travel from where they lie (`ShardExchange`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bi_ops import nn, optim
from bi_ops.core import rounding
from bi_ops.core.integers import cdiv
from bi_ops.core.tensor_files import Rows
from bi_ops.nn.main_grad import without_main_grad
from bi_ops.parallel.gradients import Exchange, all_gather, check_ranks
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.overlap import layers_of, places_of
from bi_ops.parallel.ranks import Ranks
from bi_ops.parallel.shard_exchange import ShardExchange
from bi_ops.parallel.shards import rows_of

#: Layers that are gathered together at most: FSDP2 enters as many functions of Python for a gather as for a layer.
GATHERED_LAYERS = 4
#: Parameters of these at most, if they are several: four layers of 1.7B, or one of 8B. Nothing hides the first gather.
GATHERED_PARAMETERS = 200 << 20


class ExchangeAllGather:
    """The weights of one FSDP module, gathered by an `Exchange`, as torch asks for it."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As torch's own do."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> None:
        self._exchange.gather([output_tensor], [input_tensor])


class FullySharded:
    """As `Whole`, but a rank keeps a shard of every parameter's rows, of its gradient and of what an optimizer keeps.

    Rank r of d has rows r * c to (r + 1) * c of n, with c = n / d rounded up: of the masters, and rounded ones, which
    FSDP2 gathers and an optimizer writes in its own pass (`keep_rounded_weights`). Layers (what stands in a
    `torch.nn.ModuleList`) are gathered by themselves, small ones together (`together`); what stands outside of them is
    gathered once for forward and backward. A rank makes as many forwards and backwards as every other:
    `TrainConfig.fsdp`.

    While an atom has several micro-batches, their sums are whole: 4 bytes a parameter. In the last one a layer's leave
    when its backward is through (`ShardExchange`). The parameters of the model get no `.grad`; `parameters` do, in
    `finish`.

    Args:
        model: whose parameters are sharded in place; on every rank the same values. Its own are rounded ones from then
            on; `rows`, `whole_weight` and `collected` have the masters.
        compute_dtype: what weights are rounded to; gradients are fp32.
        exchange: makes what gradients, and another what weights travel by, for their streams go on beside each other;
            None: collectives.
        reshard_after_forward: False keeps weights whole from a step's first forward to `finish`, in `compute_dtype`:
            they are gathered once, not twice a micro-batch. The bits are the same.

    Raises:
        ValueError: one rank, ranks that do not divide the atoms, or parameters whose gradient has no `main_grad`, or
            that several layers have. A forward of the model raises TypeError unless it returns one tensor.
    """

    #: See `Whole`.
    writes = True

    def __init__(
        self,
        model: torch.nn.Module,
        tree: AtomTree,
        ranks: Ranks,
        compute_dtype: torch.dtype = torch.bfloat16,
        exchange: Callable[[], Exchange] | None = None,
        reshard_after_forward: bool = True,
    ) -> None:
        check_ranks(tree, ranks, fsdp=True)
        if left := without_main_grad(model):
            raise ValueError(
                f"fsdp: {', '.join(left[:4])}{' and others' * (len(left) > 4)} would be summed by autograd, in another "
                "order; freeze them, or train without fsdp"
            )
        self.model, self.tree, self.ranks = model, tree, ranks
        self.steps = tree.atoms // ranks.size
        self._is_in_a_step, self._keeps_weights = False, not reshard_after_forward
        layers = layers_of(model)
        _check_apart(model, layers)
        masters = _rounded_off(model, ranks, compute_dtype)
        _shard(model, layers, ranks, reshard_after_forward)
        #: Of those that are gathered together the first one, which stands for all; then the model.
        self._groups = [cast(FSDPModule, m) for m in (*(each[0] for each in together(layers)), model)]
        of_gradients = None if exchange is None else exchange()
        if exchange is not None:
            self.gather_by(exchange())
        for module in self._groups:
            module.set_reshard_after_backward(reshard_after_forward, recurse=False)
        shards = {n: local_rows(p) for n, p in model.named_parameters()}
        #: This rank's rows of every parameter, by the names of the model, and what they are rounded to.
        self._masters = {n: masters.get(n, shard) for n, shard in shards.items()}
        self._rounded = {self._masters[n]: rounding.keep_in(self._masters[n], shards[n]) for n in masters}
        #: `_versions` at the last forward.
        self._gathered: list[int] = []
        names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        #: What the optimizer updates: those that are trained.
        self.parameters = {n: self._masters[n].requires_grad_() for n in names.values()}
        self._n_rows = {n: len(p) for n, p in model.named_parameters()}
        # Before torch's own hook, which gathers.
        model.register_forward_pre_hook(lambda module, args: self._round(), prepend=True)
        #: What ranks add, and when.
        self.early = ShardExchange(model, layers, names, tree, ranks, of_gradients)

    def gather_by(self, exchange: Exchange) -> None:
        """From now on weights travel by it."""
        for module in self._groups:
            module.set_custom_all_gather(ExchangeAllGather(exchange))  # type: ignore[arg-type]

    def _round(self) -> None:
        """Masters that were written are rounded again, those that an optimizer has not rounded in its own pass.

        What is still gathered of their values before is freed. Ranks write alike, so all of them do.
        """
        if self._gathered != self._versions():
            self._reshard()
        for master, kept in self._rounded.items():  # each forward asks: a call for each master takes ten times as long
            if kept.is_behind(master):
                rounding.refresh(master)
        self._gathered = self._versions()

    def _versions(self) -> list[int]:
        """Of all that is gathered, and of what it is rounded from."""
        rounded = [kept.copy._version for kept in self._rounded.values()]
        return [*(master._version for master in self._masters.values()), *rounded]

    def _reshard(self) -> None:
        for module in self._groups:
            module.reshard()

    # Gradients.

    def begin_step(self, ids: torch.Tensor | None = None) -> None:
        """See `Whole`."""
        self._is_in_a_step = False  # nor in one that has failed
        self.early.begin_step(ids)

    def begin_atom(self) -> None:
        """See `Whole`."""
        if not (self._keeps_weights and self._is_in_a_step and self._gathered == self._versions()):
            self._reshard()  # a forward without a backward leaves the root's weights of that time
        self._is_in_a_step = True
        self.early.begin_atom()
        for rows in self.parameters.values():
            rows.grad = None
        nn.allocate_main_grads(self.model)

    def before_backward(self, last: bool) -> None:
        """See `Whole`. Called before the forward, which is gathered for."""
        self.early.before_backward(last)

    def end_atom(self) -> None:
        """See `Whole`."""
        self.early.end_atom()

    def finish(self) -> torch.Tensor:
        """See `Whole`; every parameter is this rank's rows. The norm is that of whole gradients, bit for bit."""
        self._is_in_a_step = False
        if self._keeps_weights:
            self._reshard()
        return self._norm(self.early.finish(self.parameters, self._squares_of))

    def whole_gradient(self, name: str) -> torch.Tensor:
        """All rows of a parameter's gradient, behind `finish`, on every rank; all of them call it."""
        rows = self.parameters[name].grad
        assert rows is not None
        return self._whole(rows, self._n_rows[name])

    def _squares_of(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """The sums of squares of the rows of these gradients."""
        grads = [cast(torch.Tensor, self.parameters[name].grad) for name in names]
        return dict(zip(names, optim.row_sums(grads), strict=True)) if grads else {}

    def _norm(self, squares: dict[str, torch.Tensor]) -> torch.Tensor:
        """From the sums of squares of all rows, which the ranks gather."""
        sums, n_rows = [squares[name] for name in self.parameters], [self._n_rows[name] for name in self.parameters]
        chunks = [cdiv(n, self.ranks.size) for n in n_rows]
        pad = torch.nn.functional.pad
        flat = torch.cat([s if len(s) == c else pad(s, (0, c - len(s))) for s, c in zip(sums, chunks, strict=True)])
        every = flat.new_empty(self.ranks.size * len(flat))
        all_gather(every, flat, group=self.ranks.group)
        # Each parameter's rows of all ranks, one after the other, in one copy.
        in_order = flat.new_empty(len(every)).split([self.ranks.size * c for c in chunks])
        out = [t.view(self.ranks.size, -1) for t in in_order]
        torch.split_with_sizes_copy(every.view(self.ranks.size, -1), chunks, dim=1, out=out)
        return optim.norm_of_row_sums([t[:n] for t, n in zip(in_order, n_rows, strict=True)])

    # Rows, and whole weights.

    def keep_rounded_weights(self, dtype: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """See `bi_ops.nn.keep_rounded_weights`: of this rank's rows, for an optimizer; they are kept anyway."""
        return {p: kept.copy for p, kept in self._rounded.items() if p.requires_grad and kept.copy.dtype == dtype}

    def rows(self) -> dict[str, tuple[Rows, torch.Tensor]]:
        """Of every parameter this rank's rows, and what the optimizer updates."""
        found = {}
        for name, p in self.model.named_parameters():
            own = self._masters[name]
            found[name] = Rows(own.detach(), tuple(p.shape), rows_of(len(p), self.ranks).start), own
        return found

    def whole_weight(self, name: str) -> torch.Tensor:
        """All rows of a parameter's master, on every rank; all of them call it."""
        return self._whole(self._masters[name].detach(), self._n_rows[name])

    def collected(self) -> dict[str, torch.Tensor]:
        """On the first rank every whole parameter, in the host's memory: 4 bytes a parameter. Every rank calls it."""
        found = {}
        for name in self._masters:
            every = self.whole_weight(name)
            if self.ranks.rank == 0:
                found[name] = every.cpu()
        return found

    def _whole(self, rows: torch.Tensor, n: int) -> torch.Tensor:
        """All `n` rows of what each rank has some of."""
        own = rows.new_zeros(cdiv(n, self.ranks.size), *rows.shape[1:])
        own[: len(rows)] = rows
        every = own.new_empty(self.ranks.size * len(own), *own.shape[1:])
        all_gather(every, own, group=self.ranks.group)
        return every[:n]

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """While this is entered, the model's parameters are whole, in the compute dtype."""
        self._reshard()
        self._round()
        for module in self._groups:
            module.unshard()
        try:
            yield
        finally:
            self._reshard()


def local_rows(t: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, the same memory; a whole one as it is. Without a gradient."""
    if isinstance(t, DTensor):
        with torch.no_grad():  # else both calls go through DTensor's dispatch, which takes ten times as long
            t = t.to_local()
    return t.detach()


def together(layers: Sequence[torch.nn.Module]) -> list[Sequence[torch.nn.Module]]:
    """Which layers are gathered together, in order: up to `GATHERED_LAYERS` with up to `GATHERED_PARAMETERS`."""
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=1)
    n = min(max(GATHERED_PARAMETERS // largest, 1), GATHERED_LAYERS)
    return [layers[i : i + n] for i in range(0, len(layers), n)]


@torch.no_grad()
def _rounded_off(model: torch.nn.Module, ranks: Ranks, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Round the parameters of `model` to `dtype`; this rank's rows of what they were, by name."""
    masters = {}
    for name, p in model.named_parameters():
        if p.dtype != dtype:
            masters[name] = p.detach()[rows_of(len(p), ranks)].clone()
            p.data = p.data.to(dtype)
    return masters


def _check_apart(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """A layer's sums leave when its backward is through, so no other may add to them."""
    places = places_of(model, layers)
    if shared := [name for name, p in model.named_parameters() if p.requires_grad and len(places[p]) > 1]:
        raise ValueError(
            f"fsdp: {', '.join(shared[:4])}{' and others' * (len(shared) > 4)} would be summed by several layers, "
            "which are exchanged one by one; give each layer a weight of its own, or train without fsdp"
        )


def _shard(
    model: torch.nn.Module, layers: Sequence[torch.nn.Module], ranks: Ranks, reshard_after_forward: bool
) -> None:
    """Layers, small ones together, and what is left become FSDP modules."""
    device = next(model.parameters()).device.type
    mesh = DeviceMesh.from_group(cast(Any, dist.group.WORLD if ranks.group is None else ranks.group), device)
    for each in together(layers):
        fully_shard([*each], mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh)
