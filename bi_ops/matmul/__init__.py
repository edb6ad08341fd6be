"""Matrix products whose rows do not depend on how many rows there are."""

from bi_ops.core.rows import TOKEN_STEP
from bi_ops.matmul.ops import accumulate_weight_grad, addmm, bmm, linear, matmul, mm, providers

__all__ = ["TOKEN_STEP", "accumulate_weight_grad", "addmm", "bmm", "linear", "matmul", "mm", "providers"]
