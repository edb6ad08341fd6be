"""The sum of gradients over atoms, each of them computed on one rank."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from bi_ops.core.integers import cdiv
from bi_ops.core.pairwise import pairwise
from bi_ops.parallel.order import AtomTree
from bi_ops.parallel.ranks import ALONE, Ranks

#: Renamed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

#: Elements of a message at most: 256 MiB of fp32.
ELEMENTS = 1 << 26
#: Elements of a rank's part from which on a gradient travels alone, so that it is not copied: 2 MiB.
ALONE_ELEMENTS = 1 << 19


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
    same bits; None: the first across hosts. Returns [n / size], in memory of its own.
    """
    halving = spans_hosts() if halving is None else halving
    return (_swapped if halving else _exchanged)(flat.view(size, -1), group)


def _exchanged(parts: torch.Tensor, group: Any) -> torch.Tensor:
    """Every rank sends each other one its part, and adds what it gets: one message from each to each."""
    level = torch.empty_like(parts)
    dist.all_to_all_single(level, parts, group=group)
    return pairwise(level)


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


class Exchange(Protocol):
    """How ranks exchange gradients. Every rank makes the same calls in the same order; no way has bits of its own."""

    def sum(self, flats: Sequence[torch.Tensor], outs: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """flats: [ranks * n] each, contiguous -> of each this rank's part [n] of the pairwise sum over the ranks.

        outs: where these are put, which may be this rank's part of a flat, for nobody else gets it; None: in memory of
        their own.
        """

    def gather(self, outs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]) -> None:
        """shards: [n] each, of each rank; outs: [ranks * n], where those of all lie side by side then."""


class Collectives:
    """By a library, which moves parts and adds none."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def sum(self, flats: Sequence[torch.Tensor], outs: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        sums = [sum_over_ranks(flat, self.ranks.size, self.ranks.group) for flat in flats]
        return sums if outs is None else [out.copy_(own) for out, own in zip(outs, sums, strict=True)]

    def gather(self, outs: Sequence[torch.Tensor], shards: Sequence[torch.Tensor]) -> None:
        for out, shard in zip(outs, shards, strict=True):
            all_gather(out, shard, group=self.ranks.group)


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
            if sums:
                torch._foreach_add_(left, sums)
            sums = left
        self._stack.append(sums)
        return sums

    def reset(self) -> None:
        """No leaf is added: of a step that failed some may be."""
        self._stack, self.done = [], 0

    def total(self) -> list[torch.Tensor]:
        """The root, when every leaf was added; the tree can be used again."""
        [sums], self._stack, self.done = self._stack, [], 0
        return sums


def messages(sizes: Sequence[int], ranks: int) -> Iterator[tuple[list[int], list[int]]]:
    """(which gradients of so many elements lie side by side, elements of the messages in which they travel).

    Large ones lie alone, in their own memory. Messages have multiples of 4 * ranks elements, at most `ELEMENTS`, so
    that parts start at 16 bytes.
    """
    unit = 4 * ranks
    large = [i for i, n in enumerate(sizes) if n >= ranks * ALONE_ELEMENTS and n % unit == 0]
    groups, total = [[i] for i in large], ELEMENTS + 1
    for i in sorted({*range(len(sizes))} - {*large}):
        if total + sizes[i] > ELEMENTS:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += sizes[i]
    for group in groups:
        n = cdiv(sum(sizes[i] for i in group), unit) * unit
        yield group, [min(ELEMENTS, n - start) for start in range(0, n, ELEMENTS)]


class GradientTree:
    """Adds the gradients of `tree.atoms` atoms in the order `tree`; the same bits on every number of ranks.

    Rank r adds atoms r, r + size, r + 2 * size, ..., one call each. So the lower levels of the tree lie across ranks,
    and the upper ones in a rank. Ranks exchange shards (all-to-all), and each adds its shard of all of them, element by
    element: no library sums. A rank keeps at most log2(atoms / size) + 1 sums of a shard; alone, of whole gradients.
    With the last atom the sums are gathered, large ones into the memory of its gradients.

    exchange: how shards travel; None: by collectives.

    Raises:
        ValueError: a number of ranks that does not divide the atoms.
    """

    def __init__(self, tree: AtomTree, ranks: Ranks = ALONE, exchange: Exchange | None = None) -> None:
        check_ranks(tree, ranks)
        self.tree, self.ranks = tree, ranks
        self._exchange = Collectives(ranks) if exchange is None else exchange
        self._sums = Subtrees(tree.atoms // ranks.size)
        self._shapes: list[torch.Size] = []
        #: Of gradients of these shapes; they are the same in every step.
        self._messages: list[tuple[list[int], list[int]]] = []
        self._totals: list[torch.Tensor] | None = None

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
        if self._totals is not None:
            raise ValueError(f"parallel: rank {self.ranks.rank} has {steps} atoms, and all are added")
        if self._sums.done and shapes != self._shapes:
            raise ValueError("parallel: an atom's gradients have other shapes than those before")
        if shapes != self._shapes:
            self._shapes, self._messages = shapes, list(messages([g.numel() for g in gradients], self.ranks.size))
        if self.ranks.size == 1:
            self._sums.add(list(gradients))
            if self._sums.done == steps:
                self._totals = self._sums.total()
            return
        sent, places = self._packed(gradients)
        own = [flat.view(self.ranks.size, -1)[self.ranks.rank] for flat in sent] if steps == 1 else None
        self._sums.add(self._exchange.sum(sent, own))  # where the sums will lie, if nothing is added to them
        if self._sums.done == steps:
            self._exchange.gather(sent, self._sums.total())
            self._totals = places

    def reset(self) -> None:
        """No atom is added: of a step that failed some may be."""
        self._sums.reset()
        self._totals = None

    def total(self) -> list[torch.Tensor]:
        """The sums, on every rank, in the shapes of the gradients; the tree can be used again.

        Raises:
            ValueError: atoms are missing.
        """
        if self._totals is None:
            raise ValueError(
                f"parallel: {self._sums.done} of rank {self.ranks.rank}'s {self._sums.steps} atoms are added"
            )
        totals, self._totals = self._totals, None
        return totals

    def _packed(self, gradients: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Messages, flat, and where each gradient lies in them."""
        sent: list[torch.Tensor] = []
        places: dict[int, torch.Tensor] = {}
        for group, elements in self._messages:
            sizes, total = [gradients[i].numel() for i in group], sum(elements)
            if len(group) == 1 and sizes[0] == total:
                places[group[0]] = whole = gradients[group[0]].contiguous()
                flat = whole.view(-1)
            else:
                flat = gradients[group[0]].new_empty(total)
                torch.cat([gradients[i].reshape(-1) for i in group], out=flat[: sum(sizes)])
                flat[sum(sizes) :].zero_()
                parts = flat[: sum(sizes)].split(sizes)
                places |= {i: part.view(gradients[i].shape) for i, part in zip(group, parts, strict=True)}
            sent += flat.split(elements) if len(elements) > 1 else [flat]
        return sent, [places[i] for i in range(len(gradients))]
