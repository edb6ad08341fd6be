"""Log-softmax, softmax and the log-probability of chosen tokens."""

from bi_ops.logprob.ops import log_softmax, softmax, token_logprobs
from bi_ops.logprob.order import order_of

__all__ = ["log_softmax", "order_of", "softmax", "token_logprobs"]
