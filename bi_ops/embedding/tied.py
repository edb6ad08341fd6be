"""The sum of a table of which a batch touches few rows, added to another sum of the same weight."""

from __future__ import annotations

import torch

from bi_ops.core.integers import cdiv
from bi_ops.core.limits import SMALL
from bi_ops.core.operators import on_device_of_first
from bi_ops.core.triton_helpers import PINNED
from bi_ops.embedding.config import TileConfig, touched_config
from bi_ops.embedding.kernels import add_touched_rows_kernel


@on_device_of_first
def add_touched_rows(
    total: torch.Tensor, rows: torch.Tensor, touched: torch.Tensor, config: TileConfig | None = None
) -> None:
    """``total[v] += rows[v]`` where touched[v]. total, rows: fp32 [V, D], contiguous. touched: bool [V + 1].

    What `rows` holds elsewhere is not read. Zeros add nothing, not even to the sign of a zero. config: None for the one
    of this size.
    """
    n_rows, n_cols = total.shape
    if total.numel() == 0:
        return
    c = config or touched_config(n_rows, n_cols)
    add_touched_rows_kernel[(cdiv(n_rows, c.rows), cdiv(n_cols, c.cols))](
        total,
        rows,
        touched,
        n_rows,
        n_cols,
        ROWS=c.rows,
        COLS=c.cols,
        LARGE=n_cols >= SMALL,
        num_warps=c.num_warps,
        **PINNED,
    )
