"""`token_logprobs` over a vocabulary of which each rank has some columns: the bits of whole rows.

A row's maximum has no order, and its sum is one of chunks of columns, front to back (`order.RowOrder`). So shards begin
where a chunk does. Each rank sums its chunks; the sums are gathered, 4 bytes a chunk and row, and every rank adds them.
"""

from __future__ import annotations

import itertools

import torch

from bi_ops.core import arch as arches
from bi_ops.core.integers import cdiv
from bi_ops.core.limits import SMALL, check_programs
from bi_ops.core.operators import on_device_of_first
from bi_ops.core.rows import aligned_rows
from bi_ops.core.triton_helpers import PINNED
from bi_ops.logprob import order as orders
from bi_ops.logprob.config import SplitConfig, row_config
from bi_ops.logprob.ops import TokenStats, check_tokens, launch_token_logprobs_backward
from bi_ops.logprob.shard_kernels import add_shards_kernel, shard_max_kernel, shard_sums_kernel

#: Columns of a chunk.
CHUNK = orders.RowOrder.block


def unsegmented(vocab_size: int, segments: int) -> str | None:
    """Why a vocabulary is not cut into so many segments; None: it is."""
    chunks = cdiv(vocab_size, CHUNK)
    if chunks >= segments:
        return None
    return (
        f"vocab_size {vocab_size} has {chunks} chunk{'s' * (chunks > 1)} of {CHUNK} columns, the pieces that a row of "
        "logits is summed in; each segment takes one at least: take fewer segments"
    )


def segments_of(vocab_size: int, segments: int) -> tuple[tuple[int, int], ...]:
    """(first column, number of columns) of each segment of a vocabulary: whole chunks, one more in the first ones.

    151,936 columns are 149 chunks; 8 segments have 19, 19, 19, 19, 19, 18, 18, 18, the last of them a short one.

    Raises:
        ValueError: fewer chunks than segments.
    """
    if why := unsegmented(vocab_size, segments):
        raise ValueError(f"logprob: segments={segments}: {why}")
    least, more = divmod(cdiv(vocab_size, CHUNK), segments)
    starts = [min((s * least + min(s, more)) * CHUNK, vocab_size) for s in range(segments + 1)]
    return tuple((a, b - a) for a, b in itertools.pairwise(starts))


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless rows of `dtype` are summed chunk by chunk on `device`."""
    arch = arches.of(device)
    if arch.interpreted:
        return
    if dtype == torch.float32:
        raise ValueError(
            "logprob: a row of fp32 logits is summed thread by thread over all chunks, which ranks cannot share; "
            "compute in bfloat16 or float16, or let no ranks share the vocabulary (tp 1)"
        )
    if arch.thread_sums != "sequential":
        raise ValueError(
            "logprob: how this release of Triton adds a chunk was not compared between whole rows and shards; install "
            "Triton 3.6 or 3.7, or let no ranks share the vocabulary (tp 1)"
        )


@torch.no_grad()
@on_device_of_first
def row_max(logits: torch.Tensor) -> torch.Tensor:
    """The maximum of each row of a shard [T, N]: fp32 [T]."""
    out = logits.new_empty(len(logits), dtype=torch.float32)
    if out.numel() > 0:
        rows = aligned_rows(logits)
        c = row_config(*rows.shape)
        if large := max(rows.shape) >= SMALL:
            check_programs("logprob.shards", len(rows))
        shard_max_kernel[(cdiv(len(rows), c.rows),)](
            *(rows, out, *rows.shape, rows.stride(0)), ROWS=c.rows, BLOCK=CHUNK, LARGE=large, **PINNED
        )
    return out


@torch.no_grad()
@on_device_of_first
def chunk_sums(
    logits: torch.Tensor, ids: torch.Tensor, row_max: torch.Tensor, first: int, chunks: int, vocab_size: int
) -> torch.Tensor:
    """What a shard adds to the statistics of its rows.

    logits: [T, N], columns first to first + N of `vocab_size`. ids: int64 [T], of all columns. row_max: fp32 [T], of
    the whole rows. chunks: of a row of the largest shard.

    Returns:
        fp32 [T, chunks + 1], for `token_stats`.

    Raises:
        TypeError, ValueError, IndexError: as `logprob.token_logprobs`; ValueError: as `check_dtype`.
    """
    check_tokens("logprob.shards", logits, ids, vocab_size)
    check_dtype(logits.dtype, logits.device)
    out = logits.new_empty((len(logits), chunks + 1), dtype=torch.float32)
    if out.numel() > 0:
        rows = aligned_rows(logits)
        order = orders.order(orders.Problem(vocab_size, logits.dtype), arches.of(logits.device))
        c, of_program = row_config(*rows.shape), SplitConfig().chunks
        if large := max(rows.shape) >= SMALL:
            check_programs("logprob.shards", len(rows))
        shard_sums_kernel[(cdiv(len(rows), c.rows), cdiv(chunks, of_program))](
            *(rows, ids.contiguous(), row_max, out, *rows.shape, first, chunks + 1, rows.stride(0)),
            CHUNKS=of_program,
            ROWS=c.rows,
            BLOCK=order.block,
            LARGE=large,
            num_warps=order.num_warps,
            **PINNED,
        )
    return out


@torch.no_grad()
@on_device_of_first
def token_stats(sums: torch.Tensor, ids: torch.Tensor, row_max: torch.Tensor, vocab_size: int) -> TokenStats:
    """`logprob.token_stats` of whole rows, bit for bit, from the `chunk_sums` of all shards, [shards, T, chunks + 1].

    ids: int64 [T]. row_max: fp32 [T]. No entropy.
    """
    shards, n_rows, width = sums.shape
    out, lse = torch.empty_like(row_max), torch.empty_like(row_max)
    if n_rows > 0:
        add_shards_kernel[(cdiv(n_rows, 128),)](
            *(sums.contiguous(), ids.contiguous(), row_max, out, lse, n_rows, vocab_size, width),
            SHARDS=shards,
            ROWS=128,
            **PINNED,
        )
    return TokenStats(out, row_max, lse, row_max.new_empty(0))


@torch.no_grad()
@on_device_of_first
def token_stats_backward_(
    logits: torch.Tensor, ids: torch.Tensor, stats: TokenStats, grad: torch.Tensor, first: int
) -> torch.Tensor:
    """Overwrite a shard's logits [T, N], from column `first` on, with their gradient; `grad`: fp32 [T]."""
    launch_token_logprobs_backward(grad, logits, ids - first, stats.row_max, stats.lse, out=logits)
    return logits
