"""Data parallelism with the bits of one process: gradients of fixed parts of the batch, added by a fixed tree.

`bi_ops.parallel.fsdp` has `FullySharded`; torch's FSDP takes a second to import.
"""

from bi_ops.parallel.gradients import GradientTree, check_ranks, spans_hosts
from bi_ops.parallel.order import AtomTree, cut, order
from bi_ops.parallel.ranks import ALONE, Ranks
from bi_ops.parallel.watch import RankLost, watched
from bi_ops.parallel.whole import Whole

__all__ = [
    "ALONE",
    "AtomTree",
    "GradientTree",
    "RankLost",
    "Ranks",
    "Whole",
    "check_ranks",
    "cut",
    "order",
    "spans_hosts",
    "watched",
]
