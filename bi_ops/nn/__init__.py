"""Drop-in layers: torch's constructors and state_dict, bi_ops' operators inside; and `convert` for whole models."""

from bi_ops.core.main_grad import MainGrad
from bi_ops.nn.convert import convert
from bi_ops.nn.experts import Experts, GroupedLinear, MoE
from bi_ops.nn.layers import Attention, Embedding, Linear, RMSNorm, SiluAndMul
from bi_ops.nn.lm_head import linear_token_logprobs
from bi_ops.nn.main_grad import allocate_main_grads, collect_main_grads
from bi_ops.nn.rounded_weights import keep_rounded_weights

__all__ = [
    "Attention",
    "Embedding",
    "Experts",
    "GroupedLinear",
    "Linear",
    "MainGrad",
    "MoE",
    "RMSNorm",
    "SiluAndMul",
    "allocate_main_grads",
    "collect_main_grads",
    "convert",
    "keep_rounded_weights",
    "linear_token_logprobs",
]
