"""Variable-length sequences in one row of tokens, back to back or padded to a common step, one by one or in units."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bi_ops.logprob import Distribution

#: A distribution's numbers that change nothing: those of rows that nothing scores.
DEFAULTS = Distribution().as_dict()


def common_distributions(each: Sequence[Distribution | None]) -> list[Distribution] | None:
    """Whose log-probabilities those of the sequences are, as `pack` takes it; None: the logits' own.

    Raises:
        ValueError: some are raw and others are not.
    """
    found = [distribution for distribution in each if distribution is not None]
    if found and len(found) != len(each):
        raise ValueError("pack: some have raw log-probabilities and others those of the sampled distribution")
    return found or None


#: The id of tokens that a unit is padded with; nothing scores them.
PADDING = 0

#: Tokens of a unit in training. Padding to a step of 16 is then below 2% of a batch of many units: 15 of 768.
UNIT_TOKENS = 768


def units(lengths: Sequence[int], unit_tokens: int) -> Iterator[slice]:
    """Consecutive sequences in units of at least `unit_tokens` tokens, but for the last; none is cut.

    A unit ends with the first sequence that fills it, so that units of a part that begins where one does are those of
    the whole.
    """
    start = tokens = 0
    for i, n in enumerate(lengths):
        tokens += n
        if tokens >= unit_tokens:
            yield slice(start, i + 1)
            start, tokens = i + 1, 0
    if start < len(lengths):
        yield slice(start, len(lengths))


@dataclass(frozen=True)
class PackedBatch:
    """Sequences back to back, and which of their tokens are scored.

    input_ids, positions: int64 [T]. cu_seqlens: int32 [B + 1], where padding counts as sequences of its own, which no
    other token attends to. max_seqlen: the longest of them.
    cu_units: int32 [U + 1], where each unit starts, with its padding, and the last one ends.
    logit_indices: int64 [S], the rows of [T] whose next token is scored; targets: int64 [S], those next tokens;
    lengths: how many of the S scores belong to each sequence.
    sampling: what `logprob.sampled_logprobs` takes beside logits and targets, [S] each; None: scores are of the logits'
    own distribution.
    scatter_indices: int64 [S], where each score stands among `scatter_size` once those of every sequence, or unit, are
    padded as its tokens are.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    cu_units: torch.Tensor
    logit_indices: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    scatter_indices: torch.Tensor
    scatter_size: int
    sampling: Mapping[str, torch.Tensor] | None = None

    def split(self, scores: torch.Tensor) -> list[torch.Tensor]:
        """Scores [S] as one tensor per sequence."""
        return list(scores.split(list(self.lengths)))

    def scatter(self, rows: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """Rows [S, ...] at their padded places, `fill` between; [scatter_size, ...]."""
        return rows.new_full((self.scatter_size, *rows.shape[1:]), fill).index_copy(0, self.scatter_indices, rows)


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device | str,
    align: int = 1,
    distributions: Sequence[Distribution] | None = None,
    unit_tokens: int = 1,
) -> PackedBatch:
    """Pack prompt + completion of every sequence; the completion's tokens are scored.

    Args:
        align: pad every unit to a multiple of so many tokens (`PADDING`, which nothing attends to and nothing scores).
            With `bi_ops.matmul.TOKEN_STEP` every cut between units is one where sums over tokens can be carried on.
        unit_tokens: sequences share a unit until they have so many tokens (`units`); 1: each is one.
        distributions: what each completion was sampled from, and is scored under; None: the logits' own distribution.

    Raises:
        ValueError: unequal counts, nothing to pack, an empty prompt or an empty completion, align or unit_tokens below
            1.
    """
    for name, value in (("align", align), ("unit_tokens", unit_tokens)):
        if value < 1:
            raise ValueError(f"pack: {name} must be at least 1, got {value}")
    if len(prompts) != len(completions):
        raise ValueError(f"pack: {len(prompts)} prompts but {len(completions)} completions")
    if distributions is not None and len(distributions) != len(prompts):
        raise ValueError(f"pack: {len(prompts)} prompts but {len(distributions)} distributions")
    if not prompts:
        raise ValueError("pack: no sequences")
    ids: list[int] = []
    positions: list[int] = []
    cu_seqlens, cu_units = [0], [0]
    logit_indices: list[int] = []
    targets: list[int] = []
    scatter_indices: list[int] = []
    scatter_size = 0
    ends = {u.stop for u in units([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], unit_tokens)}
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) == 0 or len(completion) == 0:
            raise ValueError(f"pack: sequence {i} has {len(prompt)} prompt and {len(completion)} completion tokens")
        start, length = len(ids), len(prompt) + len(completion)
        ids += [*prompt, *completion]
        positions += range(length)
        cu_seqlens.append(start + length)
        logit_indices += range(start + len(prompt) - 1, start + length - 1)
        targets += completion
        scatter_indices += range(scatter_size, scatter_size + len(completion))
        scatter_size += len(completion)
        if i + 1 not in ends:
            continue
        if padding := -len(ids) % align:
            ids += [PADDING] * padding
            positions += range(padding)
            cu_seqlens.append(len(ids))
        cu_units.append(len(ids))
        scatter_size += -scatter_size % align

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    sampling: dict[str, torch.Tensor] | None = None
    if distributions is not None:
        counts = torch.tensor([len(c) for c in completions], device=device)
        sampling = {}
        for name in DEFAULTS:
            dtype = torch.int64 if name == "top_k" else torch.float32
            values = torch.tensor([getattr(d, name) for d in distributions], dtype=dtype, device=device)
            sampling[name] = values.repeat_interleave(counts, output_size=len(targets))
    return PackedBatch(
        input_ids=tensor(ids),
        positions=tensor(positions),
        cu_seqlens=tensor(cu_seqlens, torch.int32),
        max_seqlen=max(b - a for a, b in itertools.pairwise(cu_seqlens)),
        cu_units=tensor(cu_units, torch.int32),
        logit_indices=tensor(logit_indices),
        targets=tensor(targets),
        lengths=tuple(len(c) for c in completions),
        scatter_indices=tensor(scatter_indices),
        scatter_size=scatter_size,
        sampling=sampling,
    )
