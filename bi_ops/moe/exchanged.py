"""Experts that ranks share, in training: every rank has tokens of its own, and each expert is one rank's.

A rank sorts its rows by expert as `experts` does, filled up expert by expert and unit by unit, and sends each owner the
consecutive rows of its experts. The owner computes what came from each rank by itself, so its weight gradients are the
sums that rank would have had, and stay apart, one for each. Rows travel home and are combined there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from bi_ops.core import rounding
from bi_ops.core.main_grad import MainGrad
from bi_ops.core.transforms import Node
from bi_ops.moe.layer import activation_grad_op, activation_op
from bi_ops.moe.ops import accumulate_grad_op, combine_op, dispatch, gather_op, grouped_matmul


class Routes(Protocol):
    """Where rows of one batch go."""

    @property
    def offsets(self) -> Sequence[torch.Tensor]:
        """Of what each rank sent, int32: where the rows of this rank's experts start, and where the last one's end."""

    def there(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [R, n] of all experts, sorted by expert -> of each rank those of this rank's experts."""

    def back(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """The way home: rows [R', n], without those behind the last expert's."""


class Exchange(Protocol):
    """Ranks that share experts; all make the same calls."""

    def routes(self, offsets: torch.Tensor) -> Routes:
        """offsets: int32 [E + 1] of `Dispatch`, of all experts."""


class _Exchanged(Node):
    operator = "experts over ranks"

    @staticmethod
    def forward(ctx, hidden, gate_up, down, weights, experts, cu_units, num_experts, exchange, main_grads):
        rows, places, offsets = dispatch(experts, num_experts, cu_units)
        routes = exchange.routes(offsets)
        w1, w2 = (rounding.rounded(w, hidden.dtype) for w in (gate_up, down))
        pairs = rows.clamp_min(0).long()
        routing = torch.stack([weights.view(-1)[pairs].view(torch.int32), rows], 1)  # one message
        sent = list(zip(routes.there(gather_op(hidden, rows, places)), routes.there(routing), strict=True))
        kept, out = [], []
        for (x, told), own in zip(sent, routes.offsets, strict=True):
            of_rows = told[:, :1].contiguous().view(torch.float32)
            own_rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
            own_rows = torch.where(told[:, 1] < 0, -1, own_rows)  # of padding
            h = grouped_matmul(x, w1, own)
            out.append(grouped_matmul(activation_op(h), w2, own, of_rows, own_rows))
            kept += [x, h, of_rows, own_rows, own]
        ctx.save_for_backward(w1, w2, rows, places, *kept)
        ctx.routes, ctx.main_grads = routes, main_grads
        return combine_op(routes.back(out), rows, places)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        w1, w2, rows, places, *kept = ctx.saved_tensors
        opened = [None if m is None else m.open() for m in ctx.main_grads]
        dxs, dweights = [], []
        for i, g_rows in enumerate(ctx.routes.there(gather_op(g.contiguous(), rows, places))):
            x, h, of_rows, own_rows, own = kept[5 * i : 5 * i + 5]
            dh, y, dw = activation_grad_op(grouped_matmul(g_rows, w2.mT, own), h, of_rows, own_rows)
            for found, a, b in zip(opened, (dh, g_rows), (x, y), strict=True):
                if found is not None:
                    accumulate_grad_op(found[0][i], a, b, own, found[1], True)
            dxs.append(grouped_matmul(dh, w1.mT, own))
            dweights.append(dw)
        dhidden = combine_op(ctx.routes.back(dxs), rows, places)
        dw = ctx.routes.back(dweights).view(-1)[places.long()]
        return dhidden, None, None, dw, None, None, None, None, None


def exchanged_experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    num_experts: int,
    exchange: Exchange,
    main_grads: tuple[MainGrad | None, MainGrad | None],
    cu_units: torch.Tensor | None = None,
) -> torch.Tensor:
    """`experts` of this rank's tokens, bit for bit, where ranks share the experts; all ranks call it.

    Args:
        hidden, weights, experts, cu_units: as `experts`, of this rank's tokens. gate_up, down: of this rank's experts.
        num_experts: of all. main_grads: of gate_up and down, [ranks, *shape of the weight]: a sum for what each rank
            sent, carried on from one batch to the next. None: there is no gradient.

    Returns:
        [T, H] in the dtype of hidden. The weights get no other gradient.
    """
    return _Exchanged.apply(
        *(hidden, gate_up, down, weights.contiguous(), experts, cu_units, num_experts, exchange, main_grads)
    )
