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
