"""Where the warp-specialised kernels of Hopper can run, and how its copy engine sees a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bi_ops._common import runtime

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

#: Head sizes at which they were measured to be faster than the Triton kernels.
HEAD_DIMS = (128,)


def serves(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Do the warp-specialised kernels compute plain attention of this kind? Never a function of the batch."""
    return head_dim in HEAD_DIMS and dtype in (torch.bfloat16, torch.float16) and runtime.warp_specialised(device)


def serves_dkv(head_dim: int, heads: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does `hopper_dkv` compute dK and dV of plain attention of this kind, with the bits of the Triton kernel?

    heads: query heads that share a key head. A step of 64 rows has them all for some queries.
    """
    served = head_dim == 256 and 64 % heads == 0 and dtype in (torch.bfloat16, torch.float16)
    return served and runtime.warp_specialised(device)


def copied(t: torch.Tensor) -> bool:
    """Can the copy engine take t [T, H, D] as rows of H * D values?"""
    n, h, d = t.shape
    row = t.stride(0)
    dense = t.stride(2) == 1 and (h == 1 or t.stride(1) == d) and row >= h * d
    return n > 0 and dense and row * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def rows(t: torch.Tensor, block: int) -> TensorDescriptor:
    """t [T, H, D] as the copy engine sees it: rows of H * D values, taken `block` rows and one head at a time."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n, h, d = t.shape
    t = t if copied(t) else t.contiguous()
    return TensorDescriptor(t, [n, h * d], [t.stride(0), 1], [block, d], NVMMASharedLayout(128, 16, 2))
