"""The global norm and AdamW in plain torch; give fp64 tensors for an oracle.

In fp32 `adamw` and `ordered_norm` keep the kernels' order: their bits, on any device. A fused multiply-add is an fp64
product, which is exact, and a sum that is rounded to fp64 and then to fp32; that is seen once in 2**29 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def global_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together."""
    return torch.stack([g.square().sum() for g in grads]).sum().sqrt()


def _fma(a: torch.Tensor | float, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c, rounded once."""
    product = torch.as_tensor(a, dtype=b.dtype, device=b.device).double() * b.double()
    return (product + c.double()).to(b.dtype)


def _sqrt(x: torch.Tensor) -> torch.Tensor:
    """The square root, rounded once: torch's own may be the next number on a CPU."""
    return x.double().sqrt().to(x.dtype)


def _pairwise(x: torch.Tensor) -> torch.Tensor:
    """[...] from [..., n]: neighbours first, zeros fill up to a power of two."""
    while x.shape[-1] > 1:
        x = torch.nn.functional.pad(x, (0, x.shape[-1] % 2))
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def ordered_norm(grads: Sequence[torch.Tensor], lanes: int, span: int) -> torch.Tensor:
    """`global_norm` in the order of the kernel, spelled out."""
    sums = []
    for g in grads:
        rows = g.reshape(g.shape[0] if g.ndim else 1, -1) if g.numel() else g.new_zeros(1, 1)
        n = rows.shape[1]
        spans = 1 << (math.ceil(n / span) - 1).bit_length()
        rows = torch.nn.functional.pad(rows, (0, spans * span - n)).view(len(rows), spans, span // lanes, lanes)
        acc = torch.zeros_like(rows[:, :, 0])
        for step in rows.unbind(2):
            acc = _fma(step, step, acc)
        sums.append(_pairwise(_pairwise(_pairwise(acc))))
    return _sqrt(_pairwise(torch.stack(sums)))


def adamw(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, exp_avg and exp_avg_sq after the `step`-th step, counted from 1."""
    beta1, beta2 = betas
    one = torch.ones((), dtype=p.dtype, device=p.device)
    p = p * (1 - lr * weight_decay) if weight_decay else p
    weight = (one * (1 - beta1)).item()
    m = _fma(weight, g - m, m) if weight < 0.5 else _fma(-(one - weight), g - m, g)
    v = _fma(1 - beta2, g * g, v * beta2)
    d = _sqrt(v) * (one * (1 / (1 - beta2**step) ** 0.5)) + eps
    return _fma(-lr / (1 - beta1**step), m / d, p), m, v
