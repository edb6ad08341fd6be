"""Rows as kernels want them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.core.integers import cdiv

#: Triton specialises a kernel on pointers (in bytes) and strides (in elements) divisible by this.
ALIGNMENT = 16

#: Cut at multiples of this many tokens, a batch's sums over tokens can be carried on in the bits of one pass: it is the
#: step in which tensor cores sum, and every other such sum keeps to it. `bi_ops.models.packing.pack` pads to it.
TOKEN_STEP = 16


def aligned_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` as [R, N] rows that start at multiples of 16, in bytes and in elements; a copy only where they do not yet.

    Triton chooses the register layout of a load, and with it the tree of a sum over the row, by whether the base
    pointer and the row stride are divisible by 16. So a view that starts at an odd address could have other bits than
    its copy, and vLLM's logits, a slice of a padded vocabulary, others than the same logits without the padding.
    """
    n = t.shape[-1]
    t = t.reshape(-1, n)
    if t.stride(1) == 1 and t.stride(0) % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0:
        return t
    padded = t.new_empty((t.shape[0], cdiv(n, ALIGNMENT) * ALIGNMENT))
    return padded[:, :n].copy_(t)


def head_rows(tensors: Sequence[torch.Tensor | None]) -> tuple[int, list[tuple[torch.Tensor | None, int, int]]]:
    """Tensors of one shape [..., N] as rows (token, head) that start at multiples of 16; copies only where they do not.

    Row r is head r % H of token r // H. Heads inside a fused projection need no copy that way: [T, H, N] of it has one
    stride from token to token and another from head to head.

    Returns:
        H, which is 1 where one stride leads from row to row of all of them, and (tensor, stride of a token, stride of a
        head) of each; None stays None.
    """
    shape = next(t.shape for t in tensors if t is not None)
    heads = 1
    if len(shape) > 2 and any(t is not None and _strides(t, 1) is None and _strides(t, shape[-2]) for t in tensors):
        heads = shape[-2]
    rows: list[tuple[torch.Tensor | None, int, int]] = []
    for t in tensors:
        strides = None if t is None else _strides(t, heads)
        if t is not None and strides is None:
            t = aligned_rows(t)
            strides = heads * t.stride(0), t.stride(0)
        rows.append((t, *(strides or (0, 0))))
    return heads, rows


def _strides(t: torch.Tensor, heads: int) -> tuple[int, int] | None:
    """Strides (of a token, of a head) of aligned rows of t [..., N], or None where t has to be copied."""
    if t.is_contiguous():
        head = 0 if heads == 1 else t.shape[-1]
        token: int | None = t.shape[-1] * heads
    else:
        outer = t.ndim - 1 if heads == 1 else t.ndim - 2
        token = _one_stride(t.shape[:outer], t.stride()[:outer])
        head = 0 if heads == 1 else t.stride(-2)
    if token is None or t.stride(-1) != 1 or any(n % ALIGNMENT for n in (token, head, t.data_ptr())):
        return None
    return token, head


def _one_stride(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these dimensions taken as one, or None where they have none."""
    inner, extent = None, 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if inner is None:
            inner = stride
        elif stride != extent:
            return None
        extent = size * stride
    return inner or 0
