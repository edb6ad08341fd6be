"""The sum of gradients over atoms, each of them computed on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks

#: Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Elements that travel together: 256 MiB of fp32.
ELEMENTS = 1 << 26


def _buckets(sizes: Sequence[int]) -> Iterator[slice]:
    """Consecutive tensors of `ELEMENTS` together, or one that is larger."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > ELEMENTS:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))


class GradientTree:
    """Adds the gradients of `tree.atoms` atoms in the order `tree`; the same bits on every number of ranks.

    Rank r adds atoms r, r + size, r + 2 * size, ..., one call each. So the lower levels of the tree lie across ranks,
    and the upper ones in a rank. Ranks exchange shards (all-to-all), and each adds its shard of all of them, element by
    element: no library sums. A rank keeps at most log2(atoms / size) + 1 sums of a shard; alone, of whole gradients.

    Raises:
        ValueError: a number of ranks that does not divide the atoms.
    """

    def __init__(self, tree: AtomTree, ranks: Ranks = ALONE) -> None:
        if tree.atoms % ranks.size:
            raise ValueError(
                f"parallel: {ranks.size} ranks cannot share atoms={tree.atoms} evenly; declare as many atoms as "
                "ranks, or a multiple (another number has other bits), and start 1, 2, 4, ... ranks"
            )
        self.tree, self.ranks = tree, ranks
        self.steps = tree.atoms // ranks.size
        self._done = 0
        self._stack: list[list[torch.Tensor]] = []
        self._shapes: list[torch.Size] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add this rank's next atom. Every rank calls it as often; the tensors are the tree's own from then on.

        gradients: fp32, contiguous, of the same shapes in every call.

        Raises:
            TypeError: another dtype. ValueError: other shapes than before, or more atoms than there are.
        """
        shapes = [g.shape for g in gradients]
        for i, g in enumerate(gradients):
            if g.dtype != torch.float32:
                raise TypeError(f"parallel: gradient {i} {list(g.shape)} is {g.dtype}; sums over atoms are fp32")
        if self._done == self.steps:
            raise ValueError(f"parallel: rank {self.ranks.rank} has {self.steps} atoms, and all are added")
        if self._done and shapes != self._shapes:
            raise ValueError("parallel: an atom's gradients have other shapes than those before")
        self._shapes, self._done = shapes, self._done + 1
        sums = list(gradients) if self.ranks.size == 1 else self._across(gradients)
        for _ in range((self._done & -self._done).bit_length() - 1):  # as many subtrees end here
            left = self._stack.pop()
            torch._foreach_add_(left, sums)
            sums = left
        self._stack.append(sums)

    @torch.no_grad()
    def total(self) -> list[torch.Tensor]:
        """The sums, on every rank, in the shapes of the gradients; the tree can be used again.

        Raises:
            ValueError: atoms are missing.
        """
        if self._done != self.steps:
            raise ValueError(f"parallel: {self._done} of rank {self.ranks.rank}'s {self.steps} atoms are added")
        [sums], self._stack, self._done = self._stack, [], 0
        if self.ranks.size == 1:
            return sums
        out: list[torch.Tensor] = []
        for bucket, shard in zip(_buckets([s.numel() for s in self._shapes]), sums, strict=True):
            shapes = self._shapes[bucket]
            flat = shard.new_empty(shard.numel() * self.ranks.size)
            _all_gather(flat, shard, group=self.ranks.group)
            sizes = [s.numel() for s in shapes]
            parts = flat[: sum(sizes)].split(sizes)
            out += [p.view(s) for p, s in zip(parts, shapes, strict=True)]
        return out

    def _across(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of each bucket this rank's shard, added over the ranks."""
        sums = []
        for bucket in _buckets([g.numel() for g in gradients]):
            flat = torch.cat([g.reshape(-1) for g in gradients[bucket]])
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % (4 * self.ranks.size)))  # shards start at 16 bytes
            shards = torch.empty_like(flat)
            dist.all_to_all_single(shards, flat, group=self.ranks.group)
            level = list(shards.chunk(self.ranks.size))
            while len(level) > 1:
                level = [a.add_(b) for a, b in zip(level[::2], level[1::2], strict=True)]
            sums.append(level[0].clone())  # not a view, which would keep all shards
        return sums
