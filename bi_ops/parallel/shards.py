"""The sum of gradients over atoms, of which every rank keeps its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.core.integers import cdiv
from bi_ops.parallel.gradients import Collectives, Exchange, Subtrees, check_ranks
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import Ranks

#: Elements of a rank's part from which on a gradient travels alone: all matrices of a layer of 8B between two ranks. Of
#: fewer its calls take the host longer than a copy takes the GPU, and a backward in shards waits for the host first.
ALONE_ELEMENTS = 1 << 23


def rows_of(n: int, ranks: Ranks) -> slice:
    """Which of `n` rows are this rank's: r * c to (r + 1) * c, with c = n / ranks rounded up."""
    c = cdiv(n, ranks.size)
    return slice(min(ranks.rank * c, n), min((ranks.rank + 1) * c, n))


class ShardTree:
    """As `GradientTree`, but the sums stay where they are added: a rank has its rows of each (`rows_of`).

    Large gradients travel from their own memory, others side by side.

    Raises:
        ValueError: one rank, or a number of ranks that does not divide the atoms.
    """

    def __init__(self, tree: AtomTree, ranks: Ranks, exchange: Exchange | None = None) -> None:
        check_ranks(tree, ranks, fsdp=True)
        self.ranks = ranks
        #: How parts travel.
        self.exchange: Exchange = Collectives(ranks) if exchange is None else exchange
        self._sums = Subtrees(tree.atoms // ranks.size)
        self._shapes: list[torch.Size] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add this rank's next atom. Every rank calls it as often.

        gradients: fp32 [rows, ...], contiguous, of the same shapes in every call.
        """
        self._shapes = [g.shape for g in gradients]
        small, flats = [], []
        for i, g in enumerate(gradients):
            if self._is_alone(g.shape):
                flats.append(g.view(-1))
            else:
                small.append(i)
        if small:  # side by side, what is for one rank together
            flats.append(torch.cat([self._in_parts(gradients[i]) for i in small], dim=1).view(-1))
        self._sums.add(self.exchange.sum(flats))

    def total(self) -> list[torch.Tensor]:
        """This rank's rows of the sums; the tree can be used again.

        Raises:
            ValueError: atoms are missing.
        """
        if self._sums.done != self._sums.steps:
            raise ValueError(
                f"parallel: {self._sums.done} of rank {self.ranks.rank}'s {self._sums.steps} atoms are added"
            )
        alone = iter(parts := self._sums.total())
        widths = [self._width(shape) for shape in self._shapes if not self._is_alone(shape)]
        together = iter(parts[-1].split(widths) if widths else ())
        found = []
        for shape in self._shapes:
            own = next(alone if self._is_alone(shape) else together)
            rows = rows_of(shape[0], self.ranks)
            found.append(own.view(-1, *shape[1:])[: rows.stop - rows.start])
        return found

    def _width(self, shape: torch.Size) -> int:
        """Elements of a rank's part, with those that fill it up."""
        return cdiv(shape[0], self.ranks.size) * shape[1:].numel()

    def _is_alone(self, shape: torch.Size) -> bool:
        return shape[0] % self.ranks.size == 0 and self._width(shape) >= ALONE_ELEMENTS

    def _in_parts(self, g: torch.Tensor) -> torch.Tensor:
        """[ranks, elements of a part], filled up with zeros."""
        flat = g.reshape(-1)
        missing = self.ranks.size * self._width(g.shape) - len(flat)
        return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(self.ranks.size, -1)
