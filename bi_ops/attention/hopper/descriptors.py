"""How Hopper's copy engine sees a tensor. Gluon is imported where a descriptor is made."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@functools.cache
def layout(swizzle: int, bits: int, rank: int) -> NVMMASharedLayout:
    """How a box lies in shared memory: in swizzled rows of so many bytes, 0 for none, of values of so many bits.

    Kept, because Triton makes one in Python, slowly.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle, bits, rank)


def copied(t: torch.Tensor) -> bool:
    """Can the copy engine take t [T, H, D] as rows of H * D values?"""
    n, h, d = t.shape
    row = t.stride(0)
    dense = t.stride(2) == 1 and (h == 1 or t.stride(1) == d) and row >= h * d
    return n > 0 and dense and row * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def copyable(t: torch.Tensor) -> torch.Tensor:
    """t [T, H, D], T > 0, or a copy of it that the copy engine can take.

    Not `contiguous`, which returns what it is given where that is dense but begins at an odd address, or is one token.
    """
    return t if copied(t) else t.clone(memory_format=torch.contiguous_format)


def rows(t: torch.Tensor, block: int) -> TensorDescriptor:
    """t [T, H, D] as the copy engine sees it: rows of H * D values, taken `block` rows and one head at a time."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, h, d = t.shape
    t = copyable(t)
    return TensorDescriptor(t, [n, h * d], [t.stride(0), 1], [block, d], layout(128, 16, 2))


def _lattice(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """A cache [blocks, block_size, H, D] as rows, all as far apart as two tokens of a page.

    (distance, rows from page to page, rows from head to head, columns from head to head)
    """
    row = max(cache.stride(1), 1)
    head = cache.stride(2) if cache.shape[2] > 1 else 0
    return row, cache.stride(0) // row, head // row, head % row


def paged(cache: torch.Tensor, block: int) -> bool:
    """Can the copy engine take boxes of `block` tokens and a head from the pages [blocks, block_size, H, D]?

    Tokens of a page lie a multiple of 16 bytes apart, pages a multiple of that. A head has columns in every token's row
    or, in a layout with heads first, rows of its own. Keys and values may lie in one tensor.
    """
    n, size, h, d = cache.shape
    row, page_rows, head_rows, columns = _lattice(cache)
    even = n == 1 or cache.stride(0) % row == 0
    dense = cache.stride(3) == 1 and (h - 1) * columns + d <= row
    aligned = row * cache.element_size() % 16 == 0 and cache.data_ptr() % 16 == 0
    few = (n - 1) * page_rows + (h - 1) * head_rows + size < 2**31
    return n > 0 and size % block == 0 and block >= 8 and even and dense and aligned and few


def pages(cache: torch.Tensor, block: int) -> tuple[TensorDescriptor, int, int, int]:
    """A cache as `paged` asks, as the copy engine sees it, in boxes of `block` tokens of a head.

    (descriptor, rows from page to page, rows from head to head, columns from head to head)
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, size, h, d = cache.shape
    row, page_rows, head_rows, columns = _lattice(cache)
    shape = [(n - 1) * page_rows + (h - 1) * head_rows + size, (h - 1) * columns + d]
    return TensorDescriptor(cache, shape, [row, 1], [block, d], layout(128, 16, 2)), page_rows, head_rows, columns
