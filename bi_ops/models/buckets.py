"""Packed batches padded to a few sizes, so that one CUDA graph serves many of them. Padding changes no bit.

What is appended is tokens, in sequences of their own, and scored rows whose values are 0. No sum sees them:

    attention           sums within a sequence, and appended tokens share none with others
    rows                norms, activations, GEMMs' outputs and log-probabilities are sums within a row
    gradients of x      the same; those of appended tokens and rows are zeros, because their scores' gradients are
    gradients of        sum over tokens front to back in steps of TOKEN_STEP. Appended tokens come last, in steps of
    weights             their own, and add 0.0 or -0.0 to a sum that began at 0.0 and so is never -0.0: nothing
    experts' weights    the same by units: appended tokens are units of their own, which no step shares with others
    the embedding's     sums each id's tokens front to back: the same
    the head's          sums over scored rows front to back, which are padded to the step for themselves: the same

All of that asks for finite values in the forward, as every padding does: 0.0 times infinity is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bi_ops.core.integers import cdiv
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.models.packing import DEFAULTS, PackedBatch

#: Sizes between two powers of two: tokens, which cost everything, and scored rows, which cost the head alone.
TOKEN_SIZES, ROW_SIZES = 16, 8
#: Sequences of a bucket at least; most are empty then, which costs nothing.
MIN_SEQUENCES = 16


class Bucket(NamedTuple):
    """What a graph's kernels are launched for: tokens, scored rows, sequences, and the longest of these at most."""

    tokens: int
    rows: int
    sequences: int
    max_seqlen: int


def size_of(n: int, sizes: int) -> int:
    """The smallest size that holds n: `sizes` of them between two powers of two, all multiples of TOKEN_STEP."""
    step = max((1 << max(n - 1, 0).bit_length()) // (2 * sizes), TOKEN_STEP)
    return cdiv(n, step) * step


def bucket_of(batch: PackedBatch, longest: int) -> Bucket:
    """The bucket of a batch that was packed with align=TOKEN_STEP. longest: positions that the model has.

    Raises:
        ValueError: tokens or scored rows that are no multiple of TOKEN_STEP.
    """
    n_tokens, n_seqs = len(batch.input_ids), len(batch.cu_seqlens) - 1
    if n_tokens % TOKEN_STEP or batch.scatter_size % TOKEN_STEP:
        raise ValueError(
            f"bucket_of: {n_tokens} tokens and {batch.scatter_size} rows; sums over tokens are kept in steps of "
            f"{TOKEN_STEP}: pack with align={TOKEN_STEP}"
        )
    tokens = size_of(n_tokens, TOKEN_SIZES)
    rows = min(size_of(batch.scatter_size, ROW_SIZES), tokens)
    max_seqlen = max(min(1 << (batch.max_seqlen - 1).bit_length(), longest), batch.max_seqlen)
    if n_tokens == tokens == n_seqs * max_seqlen:
        return Bucket(tokens, rows, n_seqs, max_seqlen)  # equal lengths, for which attention has simpler launches
    # Appended tokens are sequences as long as the bucket's longest at most; others are empty.
    sequences = max(1 << (n_seqs + cdiv(tokens - n_tokens, max_seqlen) - 1).bit_length(), MIN_SEQUENCES)
    return Bucket(tokens, rows, sequences, max_seqlen)


def pad(
    batch: PackedBatch, bucket: Bucket, values: Sequence[torch.Tensor] = (), unit_tokens: int = 1
) -> tuple[PackedBatch, list[torch.Tensor]]:
    """`batch` with the sizes of `bucket`, of which it is, and `values` [S] of its scored tokens as [bucket.rows].

    Scored rows are at `batch.scatter_indices` then. Those between them score hidden states of other tokens: their
    values are 0, and what comes of them has to be dropped, with weight 0 in a loss.

    unit_tokens: with which the batch was packed.
    """
    wide = dataclasses.replace(batch, scatter_size=bucket.rows)
    device, extra = batch.input_ids.device, bucket.tokens - len(batch.input_ids)
    n_tokens, n_seqs = len(batch.input_ids), len(batch.cu_seqlens) - 1
    # Any ids will do: unlike ones, because a token's gradient is a chain of additions per id, and none that the batch
    # has not, so that its rows of an embedding are all there are.
    ids = batch.input_ids[torch.arange(extra, device=device) % n_tokens]
    added = bucket.sequences - n_seqs
    ends = [n_tokens + extra * i // added for i in range(1, added + 1)]
    # The appended tokens are a unit, and others are empty. Each takes memory where experts sum over tokens.
    most = min(bucket.tokens // unit_tokens + 2, bucket.sequences)
    if len(batch.cu_units) > most:  # in smaller units, which are never more than sequences
        most = bucket.sequences
    units = torch.full((most + 1 - len(batch.cu_units),), bucket.tokens, dtype=torch.int32, device=device)
    places = torch.arange(bucket.rows, device=device)  # rows of tokens, each at most once besides the scored ones
    sampling = batch.sampling
    padded = dataclasses.replace(
        batch,
        input_ids=torch.cat((batch.input_ids, ids)),
        positions=torch.cat((batch.positions, torch.zeros_like(ids))),
        cu_seqlens=torch.cat((batch.cu_seqlens, torch.tensor(ends, dtype=torch.int32, device=device))),
        max_seqlen=bucket.max_seqlen,
        cu_units=torch.cat((batch.cu_units, units)),
        logit_indices=places.index_copy_(0, batch.scatter_indices, batch.logit_indices),
        targets=wide.scatter(batch.targets),
        lengths=(bucket.rows,),
        scatter_indices=torch.arange(bucket.rows, device=device),
        scatter_size=bucket.rows,
        sampling=sampling and {n: wide.scatter(v, DEFAULTS[n]) for n, v in sampling.items()},
    )
    return padded, [wide.scatter(v) for v in values]


def tensors_of(batch: PackedBatch) -> list[torch.Tensor]:
    """Every tensor of a batch that a forward reads, in one order."""
    own: Sequence[torch.Tensor] = (batch.input_ids, batch.positions, batch.cu_seqlens, batch.cu_units)
    return [*own, batch.logit_indices, batch.targets, *(batch.sampling or {}).values()]


def copied(batch: PackedBatch) -> PackedBatch:
    """`batch` with `tensors_of` in memory of its own."""
    sampling = batch.sampling
    return dataclasses.replace(
        batch,
        input_ids=batch.input_ids.clone(),
        positions=batch.positions.clone(),
        cu_seqlens=batch.cu_seqlens.clone(),
        cu_units=batch.cu_units.clone(),
        logit_indices=batch.logit_indices.clone(),
        targets=batch.targets.clone(),
        sampling=sampling and {n: v.clone() for n, v in sampling.items()},
    )
