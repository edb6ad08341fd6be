"""Weights, gradients and optimizer states whole on every rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from bi_ops import nn, optim
from bi_ops.core.operators import CapturedHook
from bi_ops.core.tensor_files import Rows
from bi_ops.parallel.gradients import Exchange, GradientTree
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.overlap import SideStream, behind, separate_head, separate_layers
from bi_ops.parallel.ranks import ALONE, Ranks
from bi_ops.parallel.tables import TableRows, table_of


class Whole:
    """The trainable parameters of `model`, whole on every rank, and their gradients over the atoms of a batch.

    A step is `begin_step`, which may be left out; for each of this rank's `steps` atoms `begin_atom`, forward and
    backward of each micro-batch behind `before_backward`, `end_atom`; then `finish`. `FullySharded` has the same
    methods.

    Where ranks share a batch, the gradients of a layer (what stands in a `torch.nn.ModuleList`, and a language model's
    head) are exchanged when its backward in the atom's last micro-batch is through, on a stream of their own, and
    behind the last atom gathered. What stands outside of layers, or shares a weight with another module, follows in
    `end_atom`: of an embedding the rows that `begin_step` names (`TableRows`), else all, and a head tied to it then
    too. Every rank sends in one order, the head, then layers from the last to the first, whichever is through first,
    and in an atom without sequences too.

    A replay of a CUDA graph runs no Python in the middle of a backward. There a graph marks where a layer's backward
    ends, `end_atom` launches all exchanges, and each waits for its mark alone.

    Args:
        allocate: makes room for the sums of an atom; None: `nn.allocate_main_grads`. keeps_memory: the gradients lie in
            memory that the next atom takes again, as those of `StepGraphs`, so one rank alone copies them, in
            `end_atom`; micro-batches may be replays. overlap: False exchanges all gradients behind the atom's last
            backward; the bits are the same. exchange: how they travel; None: by collectives.

    Raises:
        ValueError: a number of ranks that does not divide the atoms.
    """

    #: Does this rank write its shards into a checkpoint? Else another rank has the same ones.
    writes = True

    def __init__(
        self,
        model: torch.nn.Module,
        tree: AtomTree,
        ranks: Ranks = ALONE,
        allocate: Callable[[], None] | None = None,
        keeps_memory: bool = False,
        overlap: bool = True,
        exchange: Exchange | None = None,
    ) -> None:
        self.model, self.tree, self.ranks = model, tree, ranks
        #: What the optimizer updates, by the names of the model.
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.steps = tree.atoms // ranks.size
        self._allocate = (lambda: nn.allocate_main_grads(model)) if allocate is None else allocate
        self._keeps_memory = keeps_memory
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
        inside = {p for module, parameters in layers.items() if module is not tied for p in parameters}
        #: The head, layers from the last to the first, then None for all else: what is exchanged together, in order.
        self._exchanged: list[torch.nn.Module | None] = [*layers, None]
        self._together = [*layers.values(), [p for p in self.parameters.values() if p not in inside]]
        #: The sums of each of these.
        self.sums = [GradientTree(tree, ranks, exchange) for _ in self._together]
        #: Of this step, if rows of the table are exchanged.
        self._rows: TableRows | None = None
        self._side = SideStream(next((p.device for p in self.parameters.values()), None) if overlap else None)
        self._overlaps = False
        self._begun: set[torch.nn.Module] = set()
        self._through: set[torch.nn.Module | None] = set()
        self._next = 0
        #: Of gradients that are there, until the norm is asked for.
        self._squares: dict[torch.Tensor, torch.Tensor] = {}

    def remove_hooks(self) -> None:
        """The model is as it was before; nothing is exchanged early any more."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self, ids: torch.Tensor | None = None) -> None:
        """ids: all that any rank computes with in this step, padding's too, each once: int64 [n] on the CPU, the same
        on every rank; None: unknown. With a token that is not among them the norm is NaN where a head is tied to the
        embedding; else its row has another gradient on each rank.

        Raises:
            ValueError: another dtype or shape, or an id that is no row.
        """
        self._rows = self._table if self._table is not None and self._table.begin_step(ids) else None

    def begin_atom(self) -> None:
        """Begin the sums of this rank's next atom."""
        for p in self.parameters.values():
            p.grad = None
        self._begun, self._through, self._next = set(), set(), self._first
        if self._marks:
            self._side.wait()  # what it reads is written again
        self._allocate()
        if self._marks:
            self._side.run(lambda: None)  # nor is a mark of an earlier atom before what was filled here

    def before_backward(self, last: bool) -> None:
        """The next micro-batch, of one forward and backward, is on its way, the `last` of its atom or not.

        Where gradients are exchanged early, a forward with gradients behind the last backward raises RuntimeError.
        """
        self._overlaps, self._begun = last, set()

    def _before_layer(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Behind the backward of a layer, or of the first of several calls, its sums are done."""
        if layer in self._through and torch.is_grad_enabled():
            raise RuntimeError(
                f"parallel: a {type(layer).__name__} has handed its sums over, and a forward came after the atom's "
                "last; say before_backward(last=True) before the last micro-batch alone, or compute without gradients"
            )
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
        handed = None if torch.compiler.is_compiling() else behind(args, lambda: self._side.mark(layer))
        if handed is None:
            self._side.unmark(layer)
        else:
            self._begun.add(layer)
        return handed

    def _after_layer(self, layer: torch.nn.Module) -> None:
        nn.collect_main_grads(layer)
        self._through.add(layer)
        self._exchange()

    def end_atom(self) -> None:
        """The atom's last backward was launched. Nothing waits for the GPU."""
        self._overlaps = False
        if self._marks:
            for at in range(self._first, len(self.sums)):
                self._side.run(functools.partial(self._collect_and_add, at), place=self._exchanged[at])
            return
        if self._rows is not None:
            self._rows.collect()
        self._collect()
        if self.tree.atoms > 1:
            self._through.update(self._exchanged)
            self._exchange()
        self._through = set()

    def _collect(self) -> None:
        """Every parameter gets its gradient of the atom."""
        nn.collect_main_grads(self.model)

    def _exchange(self) -> None:
        """Add what is through, if it is all that comes before it: ranks call their collectives in one order."""
        while self._next < len(self.sums) and self._exchanged[self._next] in self._through:
            each = self._taken(self._next)
            if self._keeps_memory and self.ranks.size == 1:  # else a sum over ranks has memory of its own
                each = [g.clone() for g in each]
            self._side.run(functools.partial(self.sums[self._next].add, each), each)
            self._next += 1

    def _collect_and_add(self, at: int) -> None:
        """What is exchanged at this place, whose backward is through where the current stream is."""
        layer = self._exchanged[at]
        if layer is not None:
            nn.collect_main_grads(layer)
        else:
            if self._rows is not None:
                self._rows.collect()
            self._collect()
        self.sums[at].add(self._taken(at))

    @property
    def _first(self) -> int:
        """A tied head is exchanged by itself only where rows of its table are."""
        return int(self._is_tied and self._rows is None)

    def _parameters_at(self, at: int) -> list[torch.nn.Parameter]:
        """Those whose gradients are exchanged at this place; rows of a table may follow."""
        parameters = self._together[at]
        if self._rows is None or self._exchanged[at] is not None:
            return parameters
        return [p for p in parameters if p is not self._rows.weight]

    def _taken(self, at: int) -> list[torch.Tensor]:
        """The gradients of what is exchanged at this place, which are the parameters' own no more."""
        parameters = self._parameters_at(at)
        each = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        if self._rows is not None and self._exchanged[at] is self._rows.head is not None:
            self._rows.keep(each[0])
        if self._rows is not None and self._exchanged[at] is None:
            each.append(self._rows.take())
        return each

    def finish(self) -> torch.Tensor:
        """Every parameter gets its gradient of the whole batch; the norm of all, fp32 []."""
        if self.tree.atoms == 1:
            return self.norm()
        totals: list[torch.Tensor] = []
        early: list[torch.Tensor] = []
        for at in range(self._first, len(self.sums)):
            totals, parameters = self.sums[at].total(), self._parameters_at(at)
            early += parameters if self._exchanged[at] is not None else []
            for p, total in zip(parameters, totals, strict=False):
                p.grad = total
        self._side.wait_but_last()
        self._squares = self._squares_of(early)
        self._side.wait()
        if (rows := self._rows) is not None:
            weight, of_rows = rows.weight, totals[-1]
            squares = self._squares.get(weight)
            squares = of_rows.new_zeros(len(weight)) if squares is None else squares  # of zeros, where no token is
            [found] = optim.row_sums([of_rows])
            self._squares[weight] = rows.put(squares, found)
            weight.grad, self._rows = rows.whole(of_rows), None
        return self.norm()

    def keep_rounded_weights(self, dtype: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """See `bi_ops.nn.keep_rounded_weights`: of this rank's matrices, for the optimizer to write."""
        return {p: copy for p, copy in nn.keep_rounded_weights(self.model, dtype).items() if p.requires_grad}

    def norm(self) -> torch.Tensor:
        """Of all gradients, fp32 []; `finish` calls it. Squares of most were added while the last ones travelled."""
        given: dict[torch.Tensor, torch.Tensor] = {p: p.grad for p in self.parameters.values() if p.grad is not None}
        if not self._squares:
            return optim.global_norm(self._in_rows(given))
        found = self._squares | self._squares_of([p for p in given if p not in self._squares])
        self._squares = {}
        return optim.norm_of_row_sums([found[p] for p in given])

    def _squares_of(self, parameters: Iterable[torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
        """The sums of squares of their gradients' rows, each of them a row's own."""
        given = {p: p.grad for p in parameters if p.grad is not None}
        return dict(zip(given, optim.row_sums(self._in_rows(given)), strict=True)) if given else {}

    def _in_rows(self, given: Mapping[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Gradients by their parameters, as the norm adds them: a row is everything behind the first axis."""
        return list(given.values())

    def rows(self) -> dict[str, tuple[Rows, torch.Tensor]] | None:
        """None: this rank has every parameter whole."""
        return None

    def collected(self) -> dict[str, torch.Tensor] | None:
        """None: they are where they are."""
        return None

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """While this is entered, the model's parameters are whole."""
        yield
