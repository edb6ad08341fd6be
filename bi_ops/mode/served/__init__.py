"""Aten operators that run through bi_ops, by what they compute."""

from bi_ops.mode.served import indexing, losses, matmul, norm, reductions, softmax  # noqa: F401  (they register)
from bi_ops.mode.served.registry import SERVED, overload

__all__ = ["SERVED", "overload"]
