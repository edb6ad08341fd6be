"""The same mathematics in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q [Tq, Hq, D], k and v [Tk, Hkv, D], sinks [Hq] -> (out [Tq, Hq, D], lse [Hq, Tq]).

    A query that sees no key gives zeros, and an lse of +inf or of its sink.
    """
    n_q, n_k, heads = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size
    seen = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(n_k - n_q)
    if right >= 0:
        seen = seen.tril(n_k - n_q + right)
    if left >= 0:
        seen = seen.triu(n_k - n_q - left)
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    if sinks is not None:  # one more key, without a value
        scores = torch.cat([scores, sinks.to(q.dtype)[:, None, None].expand(-1, n_q, 1)], dim=-1)
        seen, v = torch.nn.functional.pad(seen, (0, 1), value=True), torch.nn.functional.pad(v, (0, 0, 0, 0, 0, 1))
    out = torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1) * seen, v)
    return out, torch.logsumexp(scores, dim=-1).masked_fill(~seen.any(-1), float("inf"))


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences one by one: q [T, Hq, D], k and v [Tk, Hkv, D], cu_seqlens int32 [B + 1], sinks [Hq]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lens_q = cu_seqlens.diff().tolist()
    lens_k = lens_q if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    outs, lses = zip(*(one_sequence(*part, causal, scale, window_size, softcap, sinks) for part in parts), strict=True)
    return (torch.cat(outs), torch.cat(lses, dim=1)) if return_lse else torch.cat(outs)
