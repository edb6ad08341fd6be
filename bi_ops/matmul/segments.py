"""A GEMM whose K is summed in segments, each by itself in fp32: what ranks that share K have of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.core.pairwise import pairwise_
from bi_ops.matmul.launch import launch_triton


def subtree(x: torch.Tensor, weight: torch.Tensor, segments: int, parts: Sequence[int] | None = None) -> torch.Tensor:
    """``x @ weight.T`` unrounded: `segments` equal pieces of K, each summed as `mm` does, then pairwise in fp32.

    A batch of GEMMs, one for each segment, in the Triton kernel. So fp32 [segments, M, N] are written, and read again.

    Args:
        x: [M, K], weight: [N, K], of one dtype, any strides. segments: a power of two that divides K.
        parts: sizes of consecutive parts of K, each a multiple of segments. A segment then has a piece of each part,
            one behind the other, in one accumulator. None: K is one part.

    Returns:
        fp32 [M, N], contiguous.
    """
    sums = x.new_empty((segments, len(x), len(weight)), dtype=torch.float32)
    parts = [x.shape[1]] if parts is None else list(parts)
    for i, (a, b) in enumerate(zip(x.split(parts, 1), weight.split(parts, 1), strict=True)):
        pieces = a.unflatten(1, (segments, -1)).transpose(0, 1), b.unflatten(1, (segments, -1)).permute(1, 2, 0)
        launch_triton(*pieces, None, sums, accumulate=i > 0)
    return pairwise_(sums)
