"""When gradients of a model in shards are through, and their exchange: each rank gets its rows of the sums."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from bi_ops import nn
from bi_ops.parallel.gradients import Exchange, GradientTree
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.overlap import SideStream, already_through, behind, separate_head
from bi_ops.parallel.ranks import Ranks
from bi_ops.parallel.shards import ShardTree, rows_of
from bi_ops.parallel.tables import TableRows, table_of


class ShardExchange:
    """As `EarlyExchange`, for a model whose weights FSDP2 gathers and frees.

    While a backward goes on, a layer's parameters are whole ones that FSDP2 has made, and what is kept of them is their
    names. Every rank makes as many passes, so layers are through in one order.

    Args:
        model: in shards. layers: those that are exchanged by themselves, in order. names: of its trained parameters.
            exchange: how gradients travel; None: by collectives.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[torch.nn.Module],
        names: Mapping[torch.nn.Parameter, str],
        tree: AtomTree,
        ranks: Ranks,
        exchange: Exchange | None,
    ) -> None:
        self._model, self._ranks = model, ranks
        self._table = table_of(model)
        tied = None if self._table is None else self._table.head
        self._head, self._is_tied = tied or separate_head(model), tied is not None
        left = dict(names)
        #: Of each layer, of the head, and of all else: whose gradients are exchanged together, and where these are.
        self._own: dict[torch.nn.Module, dict[str, tuple[torch.nn.Module, str]]] = {}
        for layer in layers:
            if own := _parameters_of(layer, left):
                self._own[layer] = own
                layer.register_forward_pre_hook(self._before_layer)
        if self._head is not None:  # of a tied one all else has the weight too
            self._own[self._head] = _parameters_of(self._head, dict(left) if self._is_tied else left)
        self._own[model] = _parameters_of(model, left)
        # Before torch's own hook, so that all sums are collected before torch frees the weights.
        model.register_forward_hook(self._after_model, prepend=True)
        #: The sums of each of these.
        self.sums = {place: ShardTree(tree, ranks, exchange) for place in self._own}
        #: Of this step, if rows of the table are exchanged, and their sums; which are this rank's, and where.
        self._rows: TableRows | None = None
        self.row_sums = GradientTree(tree, ranks, exchange)
        self._rows_here: tuple[torch.Tensor, torch.Tensor] | None = None
        self._table_name = None if self._table is None else names[cast(torch.nn.Parameter, self._table.weight)]
        self._side = SideStream(next(model.parameters()).device)
        self._collects = False
        self._begun: set[torch.nn.Module] = set()
        self._through: set[torch.nn.Module] = set()

    def begin_step(self, ids: torch.Tensor | None) -> None:
        """See `Whole`."""
        for sums in self.sums.values():
            sums.reset()
        self.row_sums.reset()
        self._rows = self._table if self._table is not None and self._table.begin_step(ids) else None
        if self._rows is not None and ids is not None:
            own = rows_of(len(self._rows.weight), self._ranks)
            at = ((ids >= own.start) & (ids < own.stop)).nonzero()[:, 0]
            device = self._rows.weight.device
            self._rows_here = at.to(device), (ids[at] - own.start).to(device)

    def begin_atom(self) -> None:
        """See `Whole`."""
        self._collects, self._through = False, set()

    def before_backward(self, last: bool) -> None:
        """See `Whole`."""
        self._collects, self._begun = last, set()

    def end_atom(self) -> None:
        """See `Whole`."""
        if self._collects:
            self._collect_rest()  # where no backward went through the model: of a head alone
        self._collects, self._through = False, set()

    def finish(
        self,
        parameters: Mapping[str, torch.Tensor],
        squares_of: Callable[[Sequence[str]], dict[str, torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        """Every parameter, by its name, gets its rows of the gradient of the whole batch.

        squares_of: the sums of squares of the rows of these gradients. Returns those of all; layers' are added while
        the last gradients travel.
        """
        early: list[str] = []
        for place, sums in self.sums.items():
            if place is self._head and not self._head_leaves:
                continue
            names = self._names_at(place)
            for name, rows in zip(names, sums.total(), strict=True):
                parameters[name].grad = rows
            early += names if place is not self._model else []
        self._side.wait_but_last()
        squares = squares_of([name for name in early if name != self._table_name])
        self._side.wait()
        last = self._names_at(self._model)
        if self._rows is not None:
            assert self._table_name is not None
            self._finish_rows(self._rows, parameters[self._table_name])
            last.append(self._table_name)
        return squares | squares_of(last)

    def _finish_rows(self, table: TableRows, own: torch.Tensor) -> None:
        """The table's gradient: of the batch's ids the sums, of other rows a tied head's, which is there, or zeros."""
        assert self._rows_here is not None
        at, place = self._rows_here
        [total] = self.row_sums.total()
        grad = torch.zeros_like(own) if own.grad is None else own.grad
        own.grad = grad.index_copy_(0, place, total.index_select(0, at))
        table.forget()
        self._rows = None

    # When something is through.

    def _before_layer(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Behind the backward of everything in a layer, and before torch's own hook on the same inputs.

        Of several calls behind that of the first.
        """
        if layer in self._through and torch.is_grad_enabled():
            raise already_through(layer)
        if not self._collects or layer in self._begun:
            return None
        handed = behind(args, lambda: self._collect(layer))
        if handed is not None:
            self._begun.add(layer)
        return handed

    def _after_model(self, model: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Behind the backward of the head, and of all: what is outside of layers."""
        if not isinstance(output, torch.Tensor):
            raise TypeError(
                f"fsdp: the forward of {type(model).__name__} returns a {type(output).__name__}; its gradients are "
                "exchanged behind one tensor: return that, or train without fsdp"
            )
        if not (self._collects and output.requires_grad):
            return None

        def queue(grad: torch.Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(self._collect_rest)

        head = self._head if self._head_leaves else None
        handed = None if head is None else behind((output,), lambda: self._collect(head), as_views=False)
        output = output if handed is None else handed[0]
        output.register_hook(queue)
        return output

    @property
    def _head_leaves(self) -> bool:
        """A tied head is exchanged by itself only where rows of its table are."""
        return not self._is_tied or self._rows is not None

    def _names_at(self, place: torch.nn.Module) -> list[str]:
        """Whose gradients are exchanged together; of all else but a table's whose rows are."""
        by_rows = self._table_name if self._rows is not None and place is self._model else None
        return [name for name in self._own[place] if name != by_rows]

    def _collect_rest(self) -> None:
        """All else, behind a backward; before it layers whose inputs get no gradient, for what is before is frozen."""
        for place in self._own:
            if place not in self._through and (place is not self._head or self._head_leaves):
                self._collect(place)

    def _collect(self, place: torch.nn.Module) -> None:
        """The sums of what is in `place`, whose weights are gathered, are finished, and leave."""
        self._through.add(place)
        rows = self._rows if place is self._model else None
        if rows is not None:
            rows.collect()
        holders = [self._own[place][name] for name in self._names_at(place)]
        own = [cast(torch.Tensor, module._parameters[attribute]) for module, attribute in holders]
        for p in own:
            if p.dtype != torch.float32:
                p.grad_dtype = torch.float32  # of weights that were rounded
        nn.collect_main_grads(place)
        grads = [cast(torch.Tensor, p.grad) for p in own]
        for p in own:
            p.grad = None
        if self._rows is not None and place is self._rows.head:
            self._rows.keep(grads[0])
        of_ids = [] if rows is None else [rows.gradient()]
        self._side.run(functools.partial(self._add, place, grads, of_ids), [*grads, *of_ids])

    def _add(self, place: torch.nn.Module, grads: list[torch.Tensor], of_ids: list[torch.Tensor]) -> None:
        self.sums[place].add(grads)
        if of_ids:
            self.row_sums.add(of_ids)


def _parameters_of(
    place: torch.nn.Module, left: dict[torch.nn.Parameter, str]
) -> dict[str, tuple[torch.nn.Module, str]]:
    """Which parameters of `place` are trained, by the names of the model: of which module, by which name of its own.

    They are taken out of `left`. Where they are is asked, for they are others while weights are gathered.
    """
    found = {}
    for module in place.modules():
        for attribute, p in module._parameters.items():
            if p is not None and (name := left.pop(p, None)) is not None:
                found[name] = module, attribute
    return found
