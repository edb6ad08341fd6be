"""Aten operators that run through bi_ops, by what they compute."""

from bi_ops.mode.served import (  # noqa: F401  (they register)
    convolution,
    distances,
    indexing,
    losses,
    matmul,
    norm,
    pooling,
    reductions,
    scans,
    selection,
    softmax,
    statistics,
    windows,
)
from bi_ops.mode.served.as_torch import on_meta, strided_as
from bi_ops.mode.served.decompositions import decomposition
from bi_ops.mode.served.preconditions import check_arguments
from bi_ops.mode.served.registry import COMPOSED, INTEGERS, SERVED, WIDE, functional_form, overload, refuse, write

__all__ = [
    "COMPOSED",
    "INTEGERS",
    "SERVED",
    "WIDE",
    "check_arguments",
    "decomposition",
    "functional_form",
    "on_meta",
    "overload",
    "refuse",
    "strided_as",
    "write",
]
