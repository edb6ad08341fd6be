"""Where the warp-specialised kernels of Hopper can run."""

from __future__ import annotations

import torch

from bi_ops.core import runtime

#: Head sizes of `forward` and `decode`.
HEAD_DIMS = (64, 128, 256)

#: Head sizes of `backward`. At 256 what it keeps does not fit into shared memory.
ONE_PASS_HEAD_DIMS = (64, 128)


def serves(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Can `forward` and `decode` compute plain attention of this kind, with the Triton kernel's bits?"""
    return head_dim in HEAD_DIMS and dtype in (torch.bfloat16, torch.float16) and runtime.warp_specialised(device)


def serves_one_pass(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does `backward` compute plain gradients of this kind, in its own bits? Never a function of the batch."""
    return head_dim in ONE_PASS_HEAD_DIMS and serves(head_dim, dtype, device)


def serves_dkv(head_dim: int, heads: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Can `dkv` compute dK and dV of plain attention of this kind? It has the Triton kernel's bits.

    heads: query heads that share a key head. A step of 64 rows has them all for some queries.
    """
    return head_dim == 256 and 64 % heads == 0 and serves(head_dim, dtype, device)


def serves_dq(head_dim: int, max_q: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does `dq` compute dQ of plain attention of this kind? It has the Triton kernel's bits.

    max_q: of the longest sequence. A tile has 128 queries of one head, the Triton kernel's all heads of a group: where
    sequences are short, those are fuller.
    """
    return head_dim == 256 and max_q > 64 and serves(head_dim, dtype, device)
