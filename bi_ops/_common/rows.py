"""Rows as kernels want them."""

from __future__ import annotations

import torch

#: Triton specialises a kernel on pointers (in bytes) and integers divisible by this.
ALIGNMENT = 16


def aligned_rows(t: torch.Tensor) -> torch.Tensor:
    """`t` as [R, N] rows whose memory layout follows from N and the dtype alone; a copy only where it does not yet.

    Triton chooses the register layout of a load, and with it the tree of a sum over the row, by whether the base
    pointer and the row stride are divisible by 16. So a view that starts at an odd address could have other bits than
    its copy; here both come out alike.
    """
    n = t.shape[-1]
    t = t.reshape(-1, n)
    packed = t.is_contiguous()
    strided = t.stride(1) == 1 and t.stride(0) % ALIGNMENT == 0 and n % ALIGNMENT == 0
    if (packed or strided) and t.data_ptr() % ALIGNMENT == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)
