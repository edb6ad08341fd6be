"""Sums and means whose bits depend on how many elements are reduced and on nothing else."""

from bi_ops.reduction.ops import mean, sum
from bi_ops.reduction.order import order_of

__all__ = ["mean", "order_of", "sum"]
