"""The sum of partial outputs over tensor-parallel ranks: the upper levels of a fixed tree, rounded once."""

from __future__ import annotations

import torch
import torch.distributed as dist

from bi_ops.core.pairwise import pairwise_
from bi_ops.parallel.gradients import all_gather
from bi_ops.parallel.ranks import ALONE, Ranks

#: Bytes of fp32 partial outputs up to which every rank gets all of them: one wait for the others instead of two.
ONE_SHOT = 1 << 20


class OrderedAllReduce:
    """Adds what the ranks hold pairwise, neighbours first, in fp32, and rounds the sum once; the same on every rank.

    Each rank holds the sum of a subtree of segments (`matmul`), so the result is the root of one tree, whatever the
    number of ranks. No library sums: ranks exchange what they have, and each adds.

    Few rows are gathered by all ranks (one-shot). Of many, each rank gets its share of the rows, adds it, and the
    rounded rows are gathered (two-shot): 4 (t - 1) / t + 2 (t - 1) / t bytes an element, for a result of 16 bits, where
    one-shot takes 4 (t - 1). Both have the same bits.

    Args:
        ranks: 1, 2, 4, ... of them. one_shot: bytes of a partial output from which on rows are shared.
    """

    def __init__(self, ranks: Ranks = ALONE, one_shot: int = ONE_SHOT) -> None:
        self.ranks, self.one_shot = ranks, one_shot

    @torch.no_grad()
    def __call__(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """partial: fp32 [M, N], contiguous, of one shape on every rank -> [M, N] in `dtype`. Every rank calls it."""
        size, group = self.ranks.size, self.ranks.group
        if size == 1 or partial.numel() == 0:
            return partial.to(dtype)
        m, n = partial.shape
        if partial.numel() * partial.element_size() <= self.one_shot:
            every = partial.new_empty((size, m, n))
            all_gather(every.view(size * m, n), partial, group=group)
            return pairwise_(every).to(dtype)
        filled = torch.nn.functional.pad(partial, (0, 0, 0, -m % size))
        parts = torch.empty_like(filled)
        dist.all_to_all_single(parts, filled, group=group)
        own = pairwise_(parts.view(size, -1, n)).to(dtype)
        out = own.new_empty((len(filled), n))
        all_gather(out, own, group=group)
        return out[:m]


class VocabularyExchange:
    """Brings together what ranks that share a vocabulary have (`nn.parallel_vocab.Exchange`), exactly."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @torch.no_grad()
    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """See `Exchange`."""
        out = own.new_empty((self.ranks.size, *own.shape))
        if own.numel() > 0:
            own = own.contiguous()
            all_gather(out.view(self.ranks.size * len(own), *own.shape[1:]), own, group=self.ranks.group)
        return out

    @torch.no_grad()
    def pick(self, own: torch.Tensor) -> torch.Tensor:
        """See `Exchange`. Bit patterns are added as integers, which no order changes; as numbers, -0.0 + 0.0 is 0.0."""
        flat = own.reshape(-1)
        if rest := flat.numel() * flat.element_size() % 4:
            flat = torch.nn.functional.pad(flat, (0, (4 - rest) // flat.element_size()))
        if own.numel() > 0:
            dist.all_reduce(flat.view(torch.int32), group=self.ranks.group)
        return flat[: own.numel()].view(own.shape)
