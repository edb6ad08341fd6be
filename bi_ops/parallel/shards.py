"""The sum of gradients over atoms, of which every rank keeps its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class _Part(NamedTuple):
    """Of a gradient of `shape` what a rank gets: `n_rows` of them.

    width: elements of each rank's part; `missing` fill the last ones up. is_alone: does it travel from its own memory?
    """

    shape: torch.Size
    n_rows: int
    width: int
    missing: int
    is_alone: bool


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
        #: Of gradients of these shapes; they are the same in every step.
        self._shapes: list[torch.Size] = []
        self._parts: list[_Part] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add this rank's next atom. Every rank calls it as often.

        gradients: fp32 [rows, ...], contiguous, of the same shapes in every call.
        """
        shapes = [g.shape for g in gradients]
        if shapes != self._shapes:
            self._shapes, self._parts = shapes, [self._part(shape) for shape in shapes]
        given = list(zip(gradients, self._parts, strict=True))
        flats = [g.view(-1) for g, part in given if part.is_alone]
        # Side by side: what is for one rank together.
        small = [self._in_parts(g, part.missing) for g, part in given if not part.is_alone]
        flats += [torch.cat(small, dim=1).view(-1)] if small else []
        self._sums.add(self.exchange.sum(flats))

    def reset(self) -> None:
        """See `GradientTree`."""
        self._sums.reset()

    def total(self) -> list[torch.Tensor]:
        """This rank's rows of the sums; the tree can be used again.

        Raises:
            ValueError: atoms are missing.
        """
        if self._sums.done != self._sums.steps:
            raise ValueError(
                f"parallel: {self._sums.done} of rank {self.ranks.rank}'s {self._sums.steps} atoms are added"
            )
        alone = iter(sums := self._sums.total())
        widths = [part.width for part in self._parts if not part.is_alone]
        together = iter(sums[-1].split(widths) if widths else ())
        rows = [next(alone if p.is_alone else together).view(-1, *p.shape[1:]) for p in self._parts]
        return [own if len(own) == p.n_rows else own[: p.n_rows] for own, p in zip(rows, self._parts, strict=True)]

    def _part(self, shape: torch.Size) -> _Part:
        size, rows = self.ranks.size, rows_of(shape[0], self.ranks)
        width = cdiv(shape[0], size) * shape[1:].numel()
        missing = size * width - shape.numel()
        return _Part(shape, rows.stop - rows.start, width, missing, not missing and width >= ALONE_ELEMENTS)

    def _in_parts(self, g: torch.Tensor, missing: int) -> torch.Tensor:
        """[ranks, elements of a part], filled up with zeros."""
        return (torch.nn.functional.pad(g.view(-1), (0, missing)) if missing else g).view(self.ranks.size, -1)
