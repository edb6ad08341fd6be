"""Sums and means whose bits depend on how many elements are reduced and on nothing else."""

from bi_ops.reduction.ops import mean, sum

__all__ = ["mean", "sum"]
