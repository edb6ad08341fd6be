"""Data parallelism with the bits of one process: gradients of fixed parts of the batch, added by a fixed tree."""

from bi_ops.parallel.gradients import GradientTree
from bi_ops.parallel.order import AtomTree, cut, order
from bi_ops.parallel.ranks import ALONE, Ranks

__all__ = ["ALONE", "AtomTree", "GradientTree", "Ranks", "cut", "order"]
