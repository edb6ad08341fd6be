"""Weights, gradients and optimizer states whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from bi_ops import nn, optim
from bi_ops.core.tensor_files import Rows
from bi_ops.parallel.early_exchange import EarlyExchange, Squares
from bi_ops.parallel.gradients import Exchange
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks


class Whole:
    """The trainable parameters of `model`, whole on every rank, and their gradients over the atoms of a batch.

    A step is `begin_step`, which may be left out; for each of this rank's `steps` atoms `begin_atom`, forward and
    backward of each micro-batch behind `before_backward`, `end_atom`; then `finish`. `FullySharded` has the same
    methods.

    Where ranks share a batch, they exchange the gradients of layers while the backward goes on (`EarlyExchange`).

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
        #: What ranks add, and when.
        self.early = EarlyExchange(model, self.parameters.values(), tree, ranks, keeps_memory, overlap, exchange)

    def begin_step(self, ids: torch.Tensor | None = None) -> None:
        """ids: all that any rank computes with in this step, padding's too, each once: int64 [n] on the CPU, the same
        on every rank; None: unknown. With a token that is not among them the gradient's norm is NaN.

        Raises:
            ValueError: another dtype or shape, or an id that is no row.
        """
        self.early.begin_step(ids)

    def begin_atom(self) -> None:
        """Begin the sums of this rank's next atom."""
        for p in self.parameters.values():
            p.grad = None
        self.early.begin_atom(self._allocate)

    def before_backward(self, last: bool) -> None:
        """The next micro-batch, of one forward and backward, is on its way, the `last` of its atom or not.

        Where gradients are exchanged early, a forward with gradients behind the last backward raises RuntimeError.
        """
        self.early.before_backward(last)

    def end_atom(self) -> None:
        """The atom's last backward was launched. Nothing waits for the GPU."""
        if self.tree.atoms > 1:
            self.early.end_atom(self._collect)
        else:
            self._collect()

    def _collect(self) -> None:
        """Every parameter gets its gradient of the atom."""
        nn.collect_main_grads(self.model)

    def finish(self) -> torch.Tensor:
        """Every parameter gets its gradient of the whole batch; the norm of all, fp32 []."""
        return self.norm(self.early.finish(self._squares_of) if self.tree.atoms > 1 else None)

    def keep_rounded_weights(self, dtype: torch.dtype) -> dict[torch.Tensor, torch.Tensor]:
        """See `bi_ops.nn.keep_rounded_weights`: of this rank's matrices, for the optimizer to write."""
        return {p: copy for p, copy in nn.keep_rounded_weights(self.model, dtype).items() if p.requires_grad}

    def norm(self, squares: Squares | None = None) -> torch.Tensor:
        """Of all gradients, fp32 []. squares: of some, which `finish` has added while the others travelled."""
        given: dict[torch.Tensor, torch.Tensor] = {p: p.grad for p in self.parameters.values() if p.grad is not None}
        if not squares:
            return optim.global_norm(self._in_rows(given))
        found = squares | self._squares_of([p for p in given if p not in squares])
        return optim.norm_of_row_sums([found[p] for p in given])

    def _squares_of(self, parameters: Iterable[torch.Tensor]) -> Squares:
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
