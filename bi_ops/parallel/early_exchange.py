"""When gradients of a model's parts are through, and their exchange, in one order on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch

from bi_ops import nn
from bi_ops.core.operators import CapturedHook
from bi_ops.parallel.gradients import Exchange, GradientTree
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.overlap import SideStream, already_through, behind, separate_head, separate_layers
from bi_ops.parallel.ranks import Ranks
from bi_ops.parallel.tables import TableRows, table_of

#: Sums of squares of gradients' rows, by their parameters.
Squares = dict[torch.Tensor, torch.Tensor]


class EarlyExchange:
    """Adds the gradients of `parameters` over atoms and ranks, a layer's while the backward of earlier ones goes on.

    A layer is what stands in a `torch.nn.ModuleList`, and a language model's head. Its gradients leave when its
    backward in the atom's last micro-batch is through, on a stream of their own. What stands outside of layers, or
    shares a weight with another module, leaves behind the backward: of an embedding the rows that `begin_step` names
    (`TableRows`), else all, and a head tied to it then too. Every rank sends in one order, the head, then layers from
    the last to the first, whichever is through first, and in an atom without sequences too.

    A replay of a CUDA graph runs no Python in the middle of a backward. There a graph marks where a layer's backward
    ends, `end_atom` launches all exchanges, and each waits for its mark alone.

    Args: as `Whole`'s. parameters: those that are trained.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Iterable[torch.nn.Parameter],
        tree: AtomTree,
        ranks: Ranks,
        keeps_memory: bool,
        overlap: bool,
        exchange: Exchange | None,
    ) -> None:
        parameters = list(parameters)
        self._copies = keeps_memory and ranks.size == 1  # else a sum over ranks has memory of its own
        overlap = overlap and ranks.size > 1
        self._marks = overlap and keeps_memory
        layers = dict(reversed(separate_layers(model).items())) if overlap else {}
        before = CapturedHook(self._mark_behind) if self._marks else self._before_layer
        self._hooks = [layer.register_forward_pre_hook(before) for layer in layers]
        self._table = table_of(model) if overlap else None
        tied = None if self._table is None else self._table.head
        self._is_tied = tied is not None
        head = tied or (separate_head(model) if overlap else None)
        if head is not None:
            after = functools.partial(self._before_head, head)
            self._hooks.append(model.register_forward_hook(CapturedHook(after) if self._marks else after))
            layers = {head: [p for p in head.parameters() if p.requires_grad]} | layers
        inside = {p for module, own in layers.items() if module is not tied for p in own}
        #: The head, layers from the last to the first, then None for all else: what is exchanged together, in order.
        self.places: list[torch.nn.Module | None] = [*layers, None]
        self._together = [*layers.values(), [p for p in parameters if p not in inside]]
        #: The sums of each of these.
        self.sums = [GradientTree(tree, ranks, exchange) for _ in self._together]
        #: Of this step, if rows of the table are exchanged.
        self.rows: TableRows | None = None
        self.side = SideStream(next((p.device for p in parameters), None) if overlap else None)
        self._overlaps = False
        self._begun: set[torch.nn.Module] = set()
        self._through: set[torch.nn.Module | None] = set()
        self._next = 0

    def add_apart(self, parameters: Container[torch.nn.Parameter], sums: GradientTree) -> None:
        """Of what stands outside of layers `parameters` are added by `sums`, behind all else."""
        rest = self._together.pop()
        self._together += [[p for p in rest if (p in parameters) == is_apart] for is_apart in (False, True)]
        self.places.append(None)
        self.sums.append(sums)

    def remove_hooks(self) -> None:
        """The model is as it was before; nothing is exchanged early any more."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self, ids: torch.Tensor | None) -> None:
        """See `Whole`."""
        for sums in self.sums:
            sums.reset()
        self.rows = self._table if self._table is not None and self._table.begin_step(ids) else None

    def begin_atom(self, allocate: Callable[[], None]) -> None:
        """allocate: makes room for the sums of an atom."""
        self._begun, self._through, self._next = set(), set(), self._first
        if self._marks:
            self.side.wait()  # what it reads is written again
        allocate()
        if self._marks:
            self.side.run(lambda: None)  # nor is a mark of an earlier atom before what was filled here

    def before_backward(self, last: bool) -> None:
        """See `Whole`."""
        self._overlaps, self._begun = last, set()

    def end_atom(self, collect: Callable[[], None]) -> None:
        """collect: every parameter gets its gradient of the atom."""
        self._overlaps = False
        if self._marks:
            for at in range(self._first, len(self.sums)):
                self.side.run(functools.partial(self._collect_and_add, at, collect), place=self.places[at])
            return
        self._collect(None, collect)
        self._through.update(self.places)
        self._exchange()
        self._through = set()

    def finish(self, squares_of: Callable[[Iterable[torch.Tensor]], Squares]) -> Squares:
        """Every parameter gets its gradient of the whole batch, when the last atom has ended.

        squares_of: the sums of squares of parameters' gradients. Returns those of layers, and of a table of which rows
        were exchanged: these are added while the last gradients travel.
        """
        totals: list[torch.Tensor] = []
        early: list[torch.Tensor] = []
        for at in range(self._first, len(self.sums)):
            totals, parameters = self.sums[at].total(), self._parameters_at(at)
            early += parameters if self.places[at] is not None else []
            for p, total in zip(parameters, totals, strict=False):
                p.grad = total
        self.side.wait_but_last()
        squares = squares_of(early)
        self.side.wait()
        if self.rows is not None:
            self.rows.finish(totals[-1], squares)
            self.rows = None
        return squares

    # When a layer is through.

    def _before_layer(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Behind the backward of a layer, or of the first of several calls, its sums are done."""
        if layer in self._through and torch.is_grad_enabled():
            raise already_through(layer)
        if not self._overlaps or layer in self._begun or torch.compiler.is_compiling():
            return None
        handed = behind(args, lambda: self._after_layer(layer))
        if handed is not None:
            self._begun.add(layer)
        return handed

    def _before_head(self, head: torch.nn.Module, model: torch.nn.Module, args: Any, output: torch.Tensor) -> Any:
        """As before a layer, which gets what the model returns."""
        if self._first and not self._marks:
            return None
        handed = (self._mark_behind if self._marks else self._before_layer)(head, (output,))
        return None if handed is None else handed[0]

    def _mark_behind(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """As `_before_layer`, in every micro-batch: a graph of one does not know whether it is the last."""
        if not torch.is_grad_enabled() or layer in self._begun:
            return None
        handed = None if torch.compiler.is_compiling() else behind(args, lambda: self.side.mark(layer))
        if handed is None:
            self.side.unmark(layer)
        else:
            self._begun.add(layer)
        return handed

    def _after_layer(self, layer: torch.nn.Module) -> None:
        nn.collect_main_grads(layer)
        self._through.add(layer)
        self._exchange()

    # What is exchanged.

    @property
    def _first(self) -> int:
        """A tied head is exchanged by itself only where rows of its table are."""
        return int(self._is_tied and self.rows is None)

    def _collect(self, layer: torch.nn.Module | None, collect: Callable[[], None]) -> None:
        """The gradients of a layer, or of everything, are there."""
        if layer is not None:
            nn.collect_main_grads(layer)
            return
        if self.rows is not None:
            self.rows.collect()
        collect()

    def _collect_and_add(self, at: int, collect: Callable[[], None]) -> None:
        """What is exchanged at this place, whose backward is through where the current stream is."""
        self._collect(self.places[at], collect)
        self.sums[at].add(self._taken(at))

    def _exchange(self) -> None:
        """Add what is through, if it is all that comes before it: ranks call their collectives in one order."""
        while self._next < len(self.sums) and self.places[self._next] in self._through:
            each = self._taken(self._next)
            each = [g.clone() for g in each] if self._copies else each
            self.side.run(functools.partial(self.sums[self._next].add, each), each)
            self._next += 1

    def _parameters_at(self, at: int) -> list[torch.nn.Parameter]:
        """Those whose gradients are exchanged at this place; rows of a table may follow."""
        parameters = self._together[at]
        if self.rows is None or self.places[at] is not None:
            return parameters
        return [p for p in parameters if p is not self.rows.weight]

    def _taken(self, at: int) -> list[torch.Tensor]:
        """The gradients of what is exchanged at this place, which are the parameters' own no more."""
        parameters = self._parameters_at(at)
        each = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        if self.rows is not None and self.places[at] is self.rows.head is not None:
            self.rows.keep(each[0])
        if self.rows is not None and self.places[at] is None:
            each.append(self.rows.gradient())
        return each
