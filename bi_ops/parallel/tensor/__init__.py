"""Tensor parallelism in training, with bits that do not depend on the number of ranks that share a model."""

from bi_ops.parallel.tensor.layout import TensorParallel, check_tensor_ranks
from bi_ops.parallel.tensor.sums import OrderedAllReduce

__all__ = ["OrderedAllReduce", "TensorParallel", "check_tensor_ranks"]
