"""What only sets the speed of a softmax."""

from __future__ import annotations

from typing import NamedTuple

from bi_ops.core import runtime
from bi_ops.core.integers import next_power_of_2


class RowConfig(NamedTuple):
    """One program has `rows` rows. `cols`: of them at a time where a gradient sums nothing."""

    rows: int
    cols: int = 1024


def row_config(n_rows: int) -> RowConfig:
    """One row a program on a GPU; all of them in the interpreter, where programs are dear."""
    return RowConfig(min(next_power_of_2(n_rows), 256) if runtime.INTERPRET else 1)
