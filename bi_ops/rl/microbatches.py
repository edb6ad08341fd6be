"""The completions of a rollout in micro-batches, and what a rank finds of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bi_ops.models.packing import units


def microbatches(lengths: Sequence[int], max_tokens: int | None, unit_tokens: int = 1) -> Iterator[slice]:
    """Consecutive units (`models.packing.units`) in packs of at most `max_tokens` tokens; a longer one is a pack."""
    if not lengths:
        return
    start = tokens = 0
    for unit in units(lengths, unit_tokens):
        n = sum(lengths[unit])
        if max_tokens is not None and unit.start > start and tokens + n > max_tokens:
            yield slice(start, unit.start)
            start, tokens = unit.start, 0
        tokens += n
    yield slice(start, len(lengths))


@dataclass(frozen=True)
class Pack:
    """What a rank found of the completions `part`. n_bad: tokens whose loss is not finite, counted where it is not."""

    part: slice
    scores: list[torch.Tensor]
    loss: float
    kl: float
    clip_fraction: float
    n_bad: int
    n_tokens: int


def check_equal(packs: Sequence[Pack], others: Sequence[Pack], rank: int) -> None:
    """Raise RuntimeError unless tensor-parallel rank `rank` found the same bits as the first."""
    for mine, theirs in zip(packs, others, strict=True):
        for i, (a, b) in enumerate(zip(mine.scores, theirs.scores, strict=True)):
            if not torch.equal(a.view(torch.int32), b.view(torch.int32)):
                raise RuntimeError(
                    f"train: tensor-parallel ranks 0 and {rank} have other log-probabilities for sequence "
                    f"{mine.part.start + i}, though both have the same hidden states; a GPU or a link is faulty"
                )
