"""The same mathematics in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    """One sequence: q [Tq, Hq, D], k and v [Tk, Hkv, D]. A query that sees no key gives zeros."""
    n_q, n_k, heads = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(n_k - n_q)
    probs = torch.softmax(scores.masked_fill(~seen, torch.finfo(q.dtype).min), dim=-1) * seen
    return torch.einsum("hqk,khd->qhd", probs, v)


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Packed sequences one by one: q [T, Hq, D], k and v [Tk, Hkv, D], cu_seqlens int32 [B + 1]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lens_q = cu_seqlens.diff().tolist()
    lens_k = lens_q if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    return torch.cat([attend(*part, causal, scale) for part in parts])
