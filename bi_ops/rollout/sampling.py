"""Seeded sampling that no other request can disturb."""

from __future__ import annotations

import torch


def _signed(x: int) -> int:
    """A 64-bit constant as torch's int64 holds it."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014) on int64, wrapping."""

    def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)  # logical: the sign must not be dragged in

    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def uniform(seeds: torch.Tensor, positions: torch.Tensor, columns: int) -> torch.Tensor:
    """fp64 [R, columns] in (0, 1): a function of (seed, position, column) alone; seeds, positions: int64 [R]."""
    step = _signed(0x9E3779B97F4A7C15)
    row = _mix(_mix(seeds * step) + positions * step)
    column = torch.arange(1, columns + 1, device=seeds.device) * step
    bits = (_mix(row[:, None] + column[None, :]) >> 11) & ((1 << 53) - 1)
    return (bits.double() + 0.5) * 2.0**-53


def sample(logits: torch.Tensor, greedy: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One token id per row, int64 [R], by the Gumbel-max trick.

    Args:
        logits: [R, V], of the distribution that is sampled; -inf is never drawn. greedy: bool [R], take the largest.
            seeds, positions: int64 [R], they fix the row's randomness whatever stands beside it.
    """
    scores = logits.double()
    gumbel = -torch.log(-torch.log(uniform(seeds, positions, logits.shape[1])))
    return torch.where(greedy[:, None], scores, scores + gumbel).argmax(-1)
