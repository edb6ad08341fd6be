"""What attention's arguments must be. Errors name the operator, what was given, and the way out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from bi_ops.attention.padding import LARGEST, SMALLEST, STEP, padded_head_dim
from bi_ops.attention.params import AttentionParams
from bi_ops.core import checks
from bi_ops.core.integers import cdiv


def check_qkv(op: str, scale: float | None, **tensors: torch.Tensor) -> float:
    """Check q, keys and values but for the number of tokens; the softmax scale."""
    q, k, v = tensors.values()
    for name, t in tensors.items():
        checks.tensor(op, name, t, ndim=3 if name in ("q", "k", "v") else 4)
        checks.dtype(op, name, t)
    checks.same_dtype(op, **tensors)
    checks.same_device(op, **tensors)
    hq, head_dim = q.shape[1:]
    hkv = k.shape[-2]

    def what() -> str:
        return ", ".join(f"{n} {list(t.shape)}" for n, t in tensors.items())

    one = k.shape[:-1] == v.shape[:-1]
    checks.shape(op, one, lambda: f"keys and values must have one shape, but for the head size, got {what()}")
    checks.shape(op, k.shape[-1] == head_dim, lambda: f"head sizes of queries and keys differ: {what()}")
    checks.shape(
        op,
        hkv > 0 and hq % hkv == 0,
        lambda: f"{hq} query heads are not a positive multiple of {hkv} key heads: {what()}",
    )
    ok = 0 < head_dim <= LARGEST and 0 < v.shape[-1] <= LARGEST
    checks.shape(op, ok, lambda: f"head sizes must be from 1 to {LARGEST}, got {what()}")
    scale = head_dim**-0.5 if scale is None else checks.real(op, "softmax_scale", scale)
    checks.shape(op, 0 < scale < math.inf, lambda: f"softmax_scale must be positive and finite, got {scale}")
    return scale


def check_cache_head_dim(op: str, head_dim: int, value_dim: int) -> None:
    """Pages are read where they lie, so their head size has to be one of the kernels'."""
    ok = head_dim == value_dim == padded_head_dim(head_dim)
    checks.shape(
        op,
        ok,
        lambda: (
            f"caches must have one head size, a multiple of {STEP} from {SMALLEST} to {LARGEST}, got {head_dim} for "
            f"keys and {value_dim} for values; pad q and the caches with zeros"
        ),
    )


#: A window of so many keys or more has no limit: no sequence is as long, and positions in the kernels are int32.
_UNLIMITED = 2**30


def check_features(
    op: str,
    q: torch.Tensor,
    causal: bool,
    scale: float,
    window_size: Sequence[int],
    softcap: float,
    sinks: torch.Tensor | None,
) -> AttentionParams:
    """Check what comes on top of plain attention; the softmax's parameters."""
    checks.boolean(op, "causal", causal)
    ok = isinstance(window_size, list | tuple) and len(window_size) == 2
    ok = ok and all(isinstance(n, int) and not isinstance(n, bool) and n >= -1 for n in window_size)
    checks.shape(
        op,
        ok,
        lambda: f"window_size must be (left, right), numbers of keys or -1 for no limit, got {window_size!r}",
    )
    ok = 0 <= checks.real(op, "softcap", softcap) < math.inf
    checks.shape(op, ok, lambda: f"softcap must be finite and at least 0, which is none, got {softcap}")
    if sinks is not None:
        checks.tensor(op, "sinks", sinks)
        checks.dtype(op, "sinks", sinks)
        checks.same_device(op, q=q, sinks=sinks)
        checks.shape(op, sinks.shape == q.shape[1:2], lambda: f"sinks must be [{q.shape[1]}], got {list(sinks.shape)}")
    left, right = (-1 if n >= _UNLIMITED else n for n in window_size)
    return AttentionParams(causal, scale, left, right, float(softcap))


def check_cu_seqlens(cu_seqlens: torch.Tensor, total: int, name: str = "cu_seqlens", op: str = "attention") -> int:
    """Check where packed sequences start and end, and return the longest length. Waits for the GPU.

    Args:
        cu_seqlens: int32 [B + 1], 0 first, never decreasing, `total` last.
        total: the number of packed tokens. name, op: what an error calls them.

    Raises:
        TypeError: not int32, or a total that is no int. ValueError: wrong rank or contents.
    """
    check_lengths_tensor(op, name, cu_seqlens)
    checks.integer(op, "total", total)
    checks.shape(op, not cu_seqlens.is_meta, lambda: f"{name} is a meta tensor, so it holds nothing to check")
    values = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    checks.shape(op, values[0] == 0, lambda: f"{name} must start at 0, got {values[0]}")
    falls = next((i for i, n in enumerate(lengths) if n < 0), None)
    if falls is not None:
        raise ValueError(
            f"{op}: {name} must never decrease, got {values[falls]} then {values[falls + 1]} at {falls + 1}"
        )
    checks.shape(op, values[-1] == total, lambda: f"{name} ends at {values[-1]} but there are {total} tokens")
    return max(lengths, default=0)


def check_rows(op: str, n_tokens: int, n_heads: int, n_seqs: int) -> None:
    """Rows (token, head) and tiles are counted in 32 bits. Offsets in memory are not."""
    ok = (n_tokens + n_seqs) * n_heads < 2**31
    checks.shape(
        op,
        ok,
        lambda: (
            f"{n_tokens} tokens in {n_seqs} sequences, times {n_heads} heads, are 2**31 rows or more; split the batch"
        ),
    )


def check_lengths_tensor(op: str, name: str, t: torch.Tensor) -> None:
    checks.tensor(op, name, t, ndim=1)
    checks.dtype(op, name, t, (torch.int32,))
    checks.shape(op, t.shape[0] >= 1, lambda: f"{name} must have B + 1 entries, got none")


def longest(op: str, name: str, cu_seqlens: torch.Tensor, total: int, given: int | None) -> int:
    """The longest length; contents are checked where that costs no wait for a GPU, or one is needed anyway."""
    if given is not None and cu_seqlens.device.type != "cpu":
        sequences = cu_seqlens.shape[0] - 1
        if given < 0 or given * sequences < total:
            raise ValueError(
                f"{op}: a given maximum of {given} for {sequences} sequences of {name} has no room for {total} tokens"
            )
        return given
    longest = check_cu_seqlens(cu_seqlens, total, name, op)
    if given is not None and given < longest:
        raise ValueError(f"{op}: the longest sequence of {name} has {longest} tokens, but the given maximum is {given}")
    return longest


def check_pages(k_cache: torch.Tensor, table: torch.Tensor, seqlens_k: torch.Tensor) -> None:
    """Every length fits its row of the table, and every page in use exists."""
    n_pages, page = k_cache.shape[:2]
    room = table.shape[1] * page
    for i, n in enumerate(seqlens_k.tolist()):
        if not 0 <= n <= room:
            raise ValueError(f"paged_attention: seqlens_k[{i}] is {n}, but the block table has room for 0 to {room}")
        used = table[i, : cdiv(n, page)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < n_pages:
            raise ValueError(f"paged_attention: block_table[{i}] names {used.tolist()}; blocks are 0 to {n_pages - 1}")
