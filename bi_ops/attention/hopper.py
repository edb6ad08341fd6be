"""Where the warp-specialised kernels of Hopper can run, and how its copy engine sees a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bi_ops._common import runtime

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

#: Head sizes of `hopper_forward` and `hopper_decode`.
HEAD_DIMS = (64, 128, 256)

#: Head sizes of `hopper_backward`. At 256 what it keeps does not fit into shared memory.
ONE_PASS_HEAD_DIMS = (64, 128)


def serves(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Can `hopper_forward` and `hopper_decode` compute plain attention of this kind, with the Triton kernel's bits?"""
    return head_dim in HEAD_DIMS and dtype in (torch.bfloat16, torch.float16) and runtime.warp_specialised(device)


def serves_one_pass(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does `hopper_backward` compute plain gradients of this kind, in its own bits? Never a function of the batch."""
    return head_dim in ONE_PASS_HEAD_DIMS and serves(head_dim, dtype, device)


def serves_dkv(head_dim: int, heads: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Can `hopper_dkv` compute dK and dV of plain attention of this kind? It has the Triton kernel's bits.

    heads: query heads that share a key head. A step of 64 rows has them all for some queries.
    """
    return head_dim == 256 and 64 % heads == 0 and serves(head_dim, dtype, device)


def serves_dq(head_dim: int, max_q: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does `hopper_dq` compute dQ of plain attention of this kind? It has the Triton kernel's bits.

    max_q: of the longest sequence. A tile has 128 queries of one head, the Triton kernel's all heads of a group: where
    sequences are short, those are fuller.
    """
    return head_dim == 256 and max_q > 64 and serves(head_dim, dtype, device)


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
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, h, d = t.shape
    t = copyable(t)
    return TensorDescriptor(t, [n, h * d], [t.stride(0), 1], [block, d], NVMMASharedLayout(128, 16, 2))


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
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, size, h, d = cache.shape
    row, page_rows, head_rows, columns = _lattice(cache)
    shape = [(n - 1) * page_rows + (h - 1) * head_rows + size, (h - 1) * columns + d]
    layout = NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(cache, shape, [row, 1], [block, d], layout), page_rows, head_rows, columns
