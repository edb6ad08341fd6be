"""An embedding of which each rank has some rows: the gradient of these, bit for bit that of the whole table's."""

from __future__ import annotations

import torch

from bi_ops.core import checks
from bi_ops.core.main_grad import MainGrad, open_rows
from bi_ops.core.operators import on_device_of_first
from bi_ops.embedding.ops import launch_gradient

_launch = on_device_of_first(launch_gradient)


@torch.no_grad()
def accumulate_rows(
    main_grad: torch.Tensor | MainGrad, grad: torch.Tensor, ids: torch.Tensor, first: int, padding_idx: int = -1
) -> None:
    """Add to main_grad[id - first] the rows of `grad` of each id, front to back; ids of other rows add nothing.

    main_grad: fp32 [n, D], of rows first to first + n of the table. grad: [..., D]. ids: [...], int64 or int32.
    padding_idx: of the table.

    Raises:
        ValueError: a gradient of another width.
    """
    buffer, touched = open_rows(main_grad)
    fits = grad.shape[:-1] == ids.shape and grad.shape[-1:] == buffer.shape[1:]
    shapes = f"grad {list(grad.shape)}, ids {list(ids.shape)}, main_grad {list(buffer.shape)}"
    checks.shape("accumulate_rows", fits, lambda: f"{shapes} do not fit")
    own = ids.long() - first
    _launch(buffer, grad, own.masked_fill(ids == padding_idx, -1), -1, True, touched)
