"""Log-softmax, softmax, and the log-probability of chosen tokens, of the logits' distribution or the sampled one."""

from bi_ops.logprob.distribution import Distribution
from bi_ops.logprob.ops import (
    TokenStats,
    log_softmax,
    ranked_logprobs,
    softmax,
    token_logprobs,
    token_stats,
    token_stats_backward_,
)
from bi_ops.logprob.order import order_of, sampled_order_of
from bi_ops.logprob.sampled_ops import processed_logits, sampled_logprobs, sampled_stats

__all__ = [
    "Distribution",
    "TokenStats",
    "log_softmax",
    "order_of",
    "processed_logits",
    "ranked_logprobs",
    "sampled_logprobs",
    "sampled_order_of",
    "sampled_stats",
    "softmax",
    "token_logprobs",
    "token_stats",
    "token_stats_backward_",
]
