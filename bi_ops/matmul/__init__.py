"""GEMMs whose rows do not depend on how many rows there are."""

from bi_ops.core.rows import TOKEN_STEP
from bi_ops.matmul.backends import backends
from bi_ops.matmul.inference import inference_linear
from bi_ops.matmul.linear import accumulate_weight_grad, linear, linear_backward
from bi_ops.matmul.ops import addmm, backend_of, bmm, matmul, mm, order_of
from bi_ops.matmul.segments import subtree, subtree_of
from bi_ops.matmul.warmup import Warmup, warmup

__all__ = [
    "TOKEN_STEP",
    "Warmup",
    "accumulate_weight_grad",
    "addmm",
    "backend_of",
    "backends",
    "bmm",
    "inference_linear",
    "linear",
    "linear_backward",
    "matmul",
    "mm",
    "order_of",
    "subtree",
    "subtree_of",
    "warmup",
]
