"""Numbers made by integer arithmetic, the same on every machine, and fingerprints of tensors."""

from __future__ import annotations

import torch

Tensor = torch.Tensor

MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)


def mixed(n: int, seed: int, device: torch.device | None = None) -> Tensor:
    """int64 [n], well mixed."""
    x = (torch.arange(n, device=device) + seed * 1_000_003) * MULTIPLIER
    x = (x ^ ((x >> 29) & 0x7FFFFFFFF)) * MULTIPLIER
    return x ^ ((x >> 32) & 0xFFFFFFFF)


def values(*shape: int, seed: int, scale: float = 1.0, device: torch.device | None = None) -> Tensor:
    """bf16 in (-scale, scale)."""
    bits = mixed(torch.Size(shape).numel(), seed, device) & 0xFFFF
    return ((bits.double() - 32767.5) / 32768 * scale).bfloat16().view(shape)


def wide(*shape: int, seed: int, device: torch.device | None = None) -> Tensor:
    """fp32 in (-1, 1), of 24 bits and over 8 binades. Sums of `values` may be exact, which hides their order."""
    bits = mixed(torch.Size(shape).numel(), seed, device)
    numbers = ((bits & 0xFFFFFF).double() - 8388607.5) / 8388608
    return (numbers / torch.bitwise_left_shift(torch.ones_like(bits), (bits >> 24) & 7)).float().view(shape)


def fingerprint(t: Tensor) -> str:
    """64 bits that depend on every bit of `t` and on where it is."""
    t = t.detach().contiguous()
    words = t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    total = 0
    for i, part in enumerate(words.flatten().long().split(1 << 24)):
        total ^= int(((part + 1) * mixed(part.numel(), i + 1, t.device)).sum())
    return f"{total & (1 << 64) - 1:016x}"
