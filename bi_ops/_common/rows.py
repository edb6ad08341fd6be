"""Rows as kernels want them."""

from __future__ import annotations

import torch

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
    padded = t.new_empty((t.shape[0], -(-n // ALIGNMENT) * ALIGNMENT))
    return padded[:, :n].copy_(t)
