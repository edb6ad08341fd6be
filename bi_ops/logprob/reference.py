"""Log-probabilities in plain torch; give fp64 inputs for an oracle."""

from __future__ import annotations

import torch


def log_softmax(x: torch.Tensor) -> torch.Tensor:
    """``x - log(sum(exp(x)))`` over the last dimension."""
    return torch.log_softmax(x, -1)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """``exp(x) / sum(exp(x))`` over the last dimension."""
    return torch.softmax(x, -1)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log_softmax(logits) at ids, in fp32 (fp64 for fp64 logits)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1).gather(-1, ids[:, None]).squeeze(-1)


def kept(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Which tokens may be sampled, bool [T, V]: min-p, then top-k, then top-p of what is left. Equals stay together.

    min-p keeps p >= min_p * max(p). top-k keeps what is at least the k-th largest. top-p keeps a token if those above
    it have less than top_p of the mass (Holtzman et al., 2020). logits: [T, V]; the others [T].
    """
    z = logits / temperature[:, None]
    keep = z >= z.amax(-1, keepdim=True) + min_p.log()[:, None]
    ranked = z.sort(-1, descending=True).values
    last = torch.where((top_k < 1) | (top_k > z.shape[-1]), z.shape[-1], top_k).long()
    keep &= z >= ranked.gather(-1, last[:, None] - 1)
    shares = torch.softmax(z.masked_fill(~keep, float("-inf")), -1)
    for row, share in enumerate(shares):
        values, mass = z[row].unique(), torch.zeros_like(share)
        for v in values:
            mass = torch.where(z[row] == v, share[z[row] > v].sum(), mass)
        if top_p[row] < 1:
            keep[row] &= (mass < top_p[row]) | (z[row] == values[-1])
    return keep


def sampled_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """log_softmax(logits / temperature) over the tokens that are `kept`, at ids; -inf for one that is not."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    options = [o.to(wide.dtype) for o in (temperature, top_k, top_p, min_p)]
    keep = kept(wide.detach(), *options)
    z = (wide / options[0][:, None]).masked_fill(~keep, float("-inf"))
    return torch.log_softmax(z, -1).gather(-1, ids[:, None]).squeeze(-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """-sum(p * log(p)) of each row's softmax, in fp32 (fp64 for fp64 logits)."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)
