"""What only sets the speed of a softmax."""

from __future__ import annotations

import functools
from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2
from bi_ops.core.limits import columns_for_grid


class RowConfig(NamedTuple):
    """One program has `rows` rows. `cols`: of them at a time where a gradient sums nothing."""

    rows: int
    cols: int = 1024


@functools.lru_cache(maxsize=1024)
def row_config(n_rows: int, n_cols: int) -> RowConfig:
    """One row a program on a GPU; all of them in the interpreter, where programs are dear."""
    rows = min(next_power_of_2(n_rows), 256) if runtime.INTERPRET else 1
    return RowConfig(rows, max(1024, columns_for_grid(n_cols)))


class SplitConfig(NamedTuple):
    """A row is spread over programs of `chunks` chunks. One adds all sums, `ahead` of them loaded before the first."""

    chunks: int = 8
    ahead: int = 32


#: The most rows that are spread. A program per row keeps a GPU busy from a thousand on; until then it mostly waits.
MOST_SPLIT = 512


@functools.lru_cache(maxsize=1024)
def token_config(n_rows: int, n_cols: int, itemsize: int) -> RowConfig | SplitConfig:
    """Long rows, unless they are many, are spread over programs on a GPU: the log-probabilities of a decoding step.

    Not in fp32: there Triton adds each thread's columns over all chunks before it adds threads, which takes one program
    (its pass that optimises thread locality; `order.RowOrder` names the dtype).
    """
    split = not runtime.INTERPRET and n_rows <= MOST_SPLIT and n_cols >= 1 << 14 and itemsize == 2
    return SplitConfig() if split else row_config(n_rows, n_cols)


class SampledConfig(NamedTuple):
    """One program has `rows` rows and reads `block` columns of them at a time."""

    rows: int
    block: int
    num_warps: int = 16


def sampled_config(n_rows: int) -> SampledConfig:
    """A row a program, 8 logits a thread; not measured. In the interpreter all rows, where programs are dear."""
    return SampledConfig(min(next_power_of_2(n_rows), 64), 1024) if runtime.INTERPRET else SampledConfig(1, 4096)
