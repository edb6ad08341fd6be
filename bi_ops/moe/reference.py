"""Mixture-of-experts layers in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def router(logits: torch.Tensor, top_k: int, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts), [T, k] each: the largest of softmax(logits [T, E]), of equal ones the lowest expert first."""
    probabilities = logits.softmax(-1)
    experts = probabilities.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = probabilities.gather(1, experts)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[R, N]: x[r] @ weight[e].T for rows offsets[e] <= r < offsets[e + 1]; zeros behind the last."""
    ends = offsets.tolist()
    parts = [x[a:b] @ w.t() for w, a, b in zip(weight, ends, ends[1:], strict=False)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])])


def experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
) -> torch.Tensor:
    """[T, H]: the sum over slots of weight * down[e] @ (silu(gate) * up) with (gate, up) = gate_up[e] @ hidden."""
    out = torch.zeros_like(hidden)
    for e in range(gate_up.shape[0]):
        tokens, slots = (experts == e).nonzero(as_tuple=True)
        gate, up = (hidden[tokens] @ gate_up[e].t()).chunk(2, -1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].t()
        out = out.index_add(0, tokens, y * weights[tokens, slots, None].to(y.dtype))
    return out
