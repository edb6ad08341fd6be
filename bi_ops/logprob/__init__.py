"""Log-softmax, softmax and the log-probability of chosen tokens."""

from bi_ops.logprob.ops import log_softmax, softmax, token_logprobs

__all__ = ["log_softmax", "softmax", "token_logprobs"]
