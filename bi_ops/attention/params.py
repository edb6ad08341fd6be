"""What every kernel of attention is told besides its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class AttentionParams(NamedTuple):
    """The softmax's parameters: what becomes of Q K^T before the softmax.

    causal: query i of n sees key j of m when j <= i + m - n. scale: softmax_scale. left, right: how many keys a query
    sees before and after its own, -1: all. softcap: 0 leaves the scores alone.
    """

    causal: bool
    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0

    def features(self, sinks: torch.Tensor | None = None) -> tuple[str, ...]:
        """The features in use beyond plain attention: their arguments' names, sorted as `order.FEATURES`."""
        used: tuple[str, ...] = ("window_size",) if self.left >= 0 or self.right >= 0 else ()
        if self.softcap > 0:
            used += ("softcap",)
        return used if sinks is None else (*used, "sinks")

    def arguments(self) -> tuple[float, int | None, int | None, float | None]:
        """The kernels' scale, left, right and softcap; None where one is off, and compiled out."""
        left = self.left if self.left >= 0 else None
        right = self.right if self.right >= 0 and not self.causal else None
        return self.scale, left, right, self.softcap if self.softcap > 0 else None


class Seqlens(NamedTuple):
    """Packed sequences. cu_q, cu_k: int32 [B + 1], where each starts in q and k. max_q, max_k: at least the longest.

    read: cu_q and cu_k were read, and every row belongs to a sequence; where they were not, only the GPU knows.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    read: bool = False
