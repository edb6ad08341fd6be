"""Variable-length sequences in one row of tokens, back to back or each padded to a common step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedBatch:
    """Sequences back to back, and which of their tokens are scored.

    input_ids, positions: int64 [T]. cu_seqlens: int32 [B + 1], where padding counts as sequences of its own, which no
    other token attends to. max_seqlen: the longest of them.
    predictors: int64 [S], the rows of [T] whose next token is scored; targets: int64 [S], those next tokens;
    lengths: how many of the S scores belong to each sequence.
    slots: int64 [S], where each score stands among `n_slots` once those of every sequence are padded like its tokens.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    predictors: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    slots: torch.Tensor
    n_slots: int

    def split(self, scores: torch.Tensor) -> list[torch.Tensor]:
        """Scores [S] as one tensor per sequence."""
        return list(scores.split(list(self.lengths)))

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [S, ...] at their slots, zeros between; [n_slots, ...]."""
        return rows.new_zeros((self.n_slots, *rows.shape[1:])).index_copy(0, self.slots, rows)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device | str,
    align: int = 1,
) -> PackedBatch:
    """Pack prompt + completion of every sequence; the completion's tokens are scored.

    Args:
        align: pad every sequence to a multiple of so many tokens (zeros, which nothing attends to and nothing scores).
            With `bi_ops.matmul.TOKEN_STEP` every cut between sequences is one where sums over tokens can be carried on.

    Raises:
        ValueError: unequal counts, nothing to pack, an empty prompt or an empty completion, align below 1.
    """
    if align < 1:
        raise ValueError(f"pack: align must be at least 1, got {align}")
    if len(prompts) != len(completions):
        raise ValueError(f"pack: {len(prompts)} prompts but {len(completions)} completions")
    if not prompts:
        raise ValueError("pack: no sequences")
    ids: list[int] = []
    positions: list[int] = []
    cu_seqlens = [0]
    predictors: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    n_slots = 0
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) == 0 or len(completion) == 0:
            raise ValueError(f"pack: sequence {i} has {len(prompt)} prompt and {len(completion)} completion tokens")
        start, length = len(ids), len(prompt) + len(completion)
        ids += [*prompt, *completion]
        positions += range(length)
        cu_seqlens.append(start + length)
        predictors += range(start + len(prompt) - 1, start + length - 1)
        targets += completion
        if padding := -length % align:
            ids += [0] * padding
            positions += range(padding)
            cu_seqlens.append(len(ids))
        slots += range(n_slots, n_slots + len(completion))
        n_slots += len(completion) + -len(completion) % align

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PackedBatch(
        input_ids=tensor(ids),
        positions=tensor(positions),
        cu_seqlens=tensor(cu_seqlens, torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(cu_seqlens)),
        predictors=tensor(predictors),
        targets=tensor(targets),
        lengths=tuple(len(c) for c in completions),
        slots=tensor(slots),
        n_slots=n_slots,
    )
