"""Matrix products whose rows do not depend on how many rows there are."""

from bi_ops.matmul.ops import addmm, bmm, linear, matmul, mm, providers

__all__ = ["addmm", "bmm", "linear", "matmul", "mm", "providers"]
