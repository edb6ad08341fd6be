"""Experts that ranks share, in inference: `experts` bit for bit, for no rank adds numbers of another one's.

Every rank has every token. An output of a GEMM knows neither the others nor the number of ranks, and moving data
changes no bit. So ranks gather what a GEMM needs whole, or bring together rows that were computed whole, and the sum
over a token's slots is that of one GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_ops.moe.layer import activation_op
from bi_ops.moe.ops import combine_op, dispatch, gather_op, grouped_matmul

#: [R, n] of each rank -> [R, ranks * n], side by side.
Gather = Callable[[torch.Tensor], torch.Tensor]
#: (rows [T * k, H], k, combine) -> [T, H]. A row is one rank's, and zeros on the others. `combine` makes [t, H] of all
#: rows [t * k, H] of some consecutive tokens, on whichever rank.
Exchange = Callable[[torch.Tensor, int, Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]


def sliced_experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gather: Gather,
) -> torch.Tensor:
    """`experts` of which each rank has a slice of every one: of `ranks`, each computes some columns of both GEMMs.

    hidden: [T, H]. gate_up: [E, 2I / ranks, H], the slice of the gate, then that of up. down: [E, H / ranks, I], cut
    along its outputs. weights, experts: [T, k], of all experts. Two gathers, of the activation and of the result.
    """
    rows, places, offsets = dispatch(experts, gate_up.shape[0])
    y = gather(activation_op(grouped_matmul(gather_op(hidden, rows, places), gate_up, offsets)))
    return gather(combine_op(grouped_matmul(y, down, offsets, weights, rows), rows, places))


def owned_experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    exchange: Exchange,
) -> torch.Tensor:
    """`experts` of which each rank has some whole.

    hidden: [T, H]. gate_up, down: of the rank's own E. weights: [T, k]. experts: int32 [T, k], the number of an own
    expert, or -1. A rank's rows travel, T * k of them, and zeros where a row is another rank's.
    """
    rows, places, offsets = dispatch(experts, gate_up.shape[0])
    y = activation_op(grouped_matmul(gather_op(hidden, rows, places), gate_up, offsets))
    y = grouped_matmul(y, down, offsets, weights, rows)
    k = experts.shape[1]

    def combine(of_slots: torch.Tensor) -> torch.Tensor:
        at = torch.arange(len(of_slots), dtype=torch.int32, device=of_slots.device)
        return combine_op(of_slots, at, at.view(-1, k))

    return exchange(gather_op(y, places.view(-1), places.view(-1, 1)), k, combine)
