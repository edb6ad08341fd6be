"""Weights, gradients and optimizer states whole on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from bi_ops import nn, optim
from bi_ops.core.tensor_files import Rows
from bi_ops.parallel.gradients import GradientTree
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks


class Whole:
    """The trainable parameters of `model`, whole on every rank, and their gradients over the atoms of a batch.

    A step is, for each of this rank's `steps` atoms, `begin_atom`, the backward of each micro-batch behind
    `before_backward`, `end_atom`; then `finish`. `FullySharded` has the same methods.

    Args:
        allocate: makes room for the sums of an atom; None: `nn.allocate_main_grads`. keeps_memory: the gradients lie in
            memory that the next atom takes again, so they are copied.

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
    ) -> None:
        self.model, self.tree, self.ranks = model, tree, ranks
        #: What the optimizer updates, by the names of the model.
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.sums = GradientTree(tree, ranks)
        self.steps = tree.atoms // ranks.size
        self._allocate = (lambda: nn.allocate_main_grads(model)) if allocate is None else allocate
        self._keeps_memory = keeps_memory

    def begin_atom(self) -> None:
        """Begin the sums of this rank's next atom."""
        for p in self.parameters.values():
            p.grad = None
        self._allocate()

    def before_backward(self, last: bool) -> None:
        """The next micro-batch is on its way, the `last` of its atom or not."""

    def end_atom(self) -> None:
        """The atom's last backward was launched. Nothing waits for the GPU."""
        self._collect()
        if self.tree.atoms == 1:
            return
        parameters = self.parameters.values()
        each = [torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad for p in parameters]
        self.sums.add([g.clone() for g in each] if self._keeps_memory else each)

    def _collect(self) -> None:
        """Every parameter gets its gradient of the atom."""
        nn.collect_main_grads(self.model)

    def finish(self) -> torch.Tensor:
        """Every parameter gets its gradient of the whole batch; the norm of all, fp32 []."""
        if self.tree.atoms > 1:
            for p, total in zip(self.parameters.values(), self.sums.total(), strict=True):
                p.grad = total
        return self.norm()

    def norm(self) -> torch.Tensor:
        return optim.global_norm([p.grad for p in self.parameters.values() if p.grad is not None])

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
