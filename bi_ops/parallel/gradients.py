"""The sum of gradients over atoms, each of them computed on one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bi_ops.core.pairwise import pairwise_
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks

#: Renamed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Elements that travel together: 256 MiB of fp32.
ELEMENTS = 1 << 26


def check_ranks(tree: AtomTree, ranks: Ranks, fsdp: bool = False) -> None:
    """Raise ValueError unless as many ranks can share the atoms of `tree` evenly; with `fsdp`, if there is but one."""
    if fsdp and ranks.size == 1:
        raise ValueError("fsdp: one rank has nothing to share; start several with torchrun, or leave fsdp out")
    if tree.atoms % ranks.size:
        raise ValueError(
            f"parallel: {ranks.size} ranks cannot share atoms={tree.atoms} evenly; declare as many atoms as "
            "ranks, or a multiple (another number has other bits), and start 1, 2, 4, ... ranks"
        )


def spans_hosts() -> bool:
    """Did torchrun start processes on more than one host?"""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ.get("WORLD_SIZE", "1"))


def sum_over_ranks(flat: torch.Tensor, size: int, group: Any, halving: bool | None = None) -> torch.Tensor:
    """This rank's part, of `size`, of the pairwise sum of `flat` over the ranks: neighbours first, no library sums.

    flat: [n], n a multiple of size, a power of two. halving: how parts travel, `_swapped` or `_exchanged`, with the
    same bits; None: the first across hosts. Returns [n / size], perhaps a view of memory that holds all parts.
    """
    halving = spans_hosts() if halving is None else halving
    return (_swapped if halving else _exchanged)(flat.view(size, -1), group)


def _exchanged(parts: torch.Tensor, group: Any) -> torch.Tensor:
    """Every rank sends each other one its part, and adds what it gets: one message from each to each."""
    level = torch.empty_like(parts)
    dist.all_to_all_single(level, parts, group=group)
    return pairwise_(level)


def _swapped(parts: torch.Tensor, group: Any) -> torch.Tensor:
    """Level k of the tree is a swap with the rank whose bit k differs: each keeps the parts that end on its side.

    Half of the sums travel at the first level, a half of these at the next: over a host's own links first.
    """
    rank, size = dist.get_rank(group), len(parts)
    for k in range(size.bit_length() - 1):
        upper = rank >> k & 1
        pairs = parts.view(-1, 2, parts.shape[1])
        kept, sent = pairs[:, upper], pairs[:, 1 - upper].contiguous()
        received, rows = torch.empty_like(sent), [0] * size
        rows[rank ^ 1 << k] = len(sent)
        dist.all_to_all_single(received, sent, rows, rows, group=group)
        parts = received.add_(kept) if upper else kept + received  # the lower subtree first
    return parts[0]


class Subtrees:
    """The upper levels of a tree over `steps` leaves, a power of two, that come one after the other.

    At most log2(steps) + 1 sums are held: of every subtree that is whole and whose neighbour is not.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.done = steps, 0
        self._stack: list[list[torch.Tensor]] = []

    def add(self, sums: list[torch.Tensor]) -> list[torch.Tensor]:
        """Add the next leaf; the largest subtree that ends with it, in the memory of its first leaf."""
        self.done += 1
        for _ in range((self.done & -self.done).bit_length() - 1):  # as many subtrees end here
            left = self._stack.pop()
            torch._foreach_add_(left, sums)
            sums = left
        self._stack.append(sums)
        return sums

    def total(self) -> list[torch.Tensor]:
        """The root, when every leaf was added; the tree can be used again."""
        [sums], self._stack, self.done = self._stack, [], 0
        return sums


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
        check_ranks(tree, ranks)
        self.tree, self.ranks = tree, ranks
        self._sums = Subtrees(tree.atoms // ranks.size)
        self._shapes: list[torch.Size] = []

    @torch.no_grad()
    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add this rank's next atom. Every rank calls it as often; the tensors are the tree's own from then on.

        gradients: fp32, contiguous, of the same shapes in every call.

        Raises:
            TypeError: another dtype. ValueError: other shapes than before, or more atoms than there are.
        """
        shapes, steps = [g.shape for g in gradients], self._sums.steps
        for i, g in enumerate(gradients):
            if g.dtype != torch.float32:
                raise TypeError(f"parallel: gradient {i} {list(g.shape)} is {g.dtype}; sums over atoms are fp32")
        if self._sums.done == steps:
            raise ValueError(f"parallel: rank {self.ranks.rank} has {steps} atoms, and all are added")
        if self._sums.done and shapes != self._shapes:
            raise ValueError("parallel: an atom's gradients have other shapes than those before")
        self._shapes = shapes
        self._sums.add(list(gradients) if self.ranks.size == 1 else self._across(gradients))

    @torch.no_grad()
    def total(self) -> list[torch.Tensor]:
        """The sums, on every rank, in the shapes of the gradients; the tree can be used again.

        Raises:
            ValueError: atoms are missing.
        """
        if self._sums.done != self._sums.steps:
            raise ValueError(
                f"parallel: {self._sums.done} of rank {self.ranks.rank}'s {self._sums.steps} atoms are added"
            )
        sums = self._sums.total()
        if self.ranks.size == 1:
            return sums
        out: list[torch.Tensor] = []
        for bucket, shard in zip(_buckets([s.numel() for s in self._shapes]), sums, strict=True):
            shapes = self._shapes[bucket]
            flat = shard.new_empty(shard.numel() * self.ranks.size)
            all_gather(flat, shard, group=self.ranks.group)
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
            sums.append(sum_over_ranks(flat, self.ranks.size, self.ranks.group).clone())  # not a view of all shards
        return sums
