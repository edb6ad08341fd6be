"""The end of a gated MLP: silu-and-mul and the row-parallel layer behind it, whose backward reads gate and up once.

The layer's weight gradient needs the activation, and what computes the activation's gradient has gate and up at hand.
"""

from __future__ import annotations

import torch

from bi_ops import activation, matmul
from bi_ops.core import dtypes, rounding
from bi_ops.core.operators import dispatcher_is_watched, has_hooks
from bi_ops.core.transforms import Node
from bi_ops.nn.layers import SiluAndMul
from bi_ops.nn.parallel_linear import RowParallelLinear
from bi_ops.nn.recompute import recomputed


class _Gated(Node):
    """The layer's product of silu_and_mul(gate_up [T, 2K]), the weight's gradient added to its `main_grad`."""

    operator = "silu_and_mul with a linear layer"

    @staticmethod
    def forward(ctx, gate_up, weight, main_grad, layer):
        rounded = rounding.rounded(weight, gate_up.dtype)  # once for both passes
        ctx.save_for_backward(gate_up, rounded)
        ctx.main_grad = main_grad
        y = activation.silu_and_mul(gate_up)
        return layer.product(y, rounded) if layer.is_shared else matmul.linear(y, rounded)

    @staticmethod
    def backward(ctx, g):
        gate_up, weight = ctx.saved_tensors
        need_x, need_weight, *_ = ctx.needs_input_grad
        g = g.contiguous()
        dy = matmul.linear_backward(ctx.main_grad, g, g, weight, need_x=True, need_weight=False)
        assert dy is not None
        dx, y = activation.silu_and_mul_backward(dy, gate_up)
        if need_weight:
            matmul.accumulate_weight_grad(ctx.main_grad, g, y)
        return dx if need_x else None, None, None, None


def _is_plain(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Is it just that, and nobody watches or replaces its forward?"""
    return type(module) is kind and not has_hooks(module) and "forward" not in vars(module)


def gated_linear(again: bool, gate_up: torch.Tensor, act: torch.nn.Module, layer: torch.nn.Module) -> torch.Tensor:
    """``layer(act(gate_up))``; the activation is computed `again` in the backward, or kept.

    Where gradients are carried on in a `main_grad` and the modules are plain ones, that is one node, which computes the
    activation again beside its gradient. The bits are those of the two modules.
    """
    plain = _is_plain(act, SiluAndMul) and _is_plain(layer, RowParallelLinear)
    if again and plain and layer.main_grad is not None and torch.is_grad_enabled():
        watched = dispatcher_is_watched() or torch.nn.modules.module._has_any_global_hook()
        if not (watched or dtypes.autocast_is_on(gate_up)):
            return _Gated.apply(gate_up, layer.weight, layer.main_grad, layer)  # type: ignore[no-any-return]
    y, kept = act(gate_up), gate_up.detach()
    with recomputed(again, (y,), lambda: (act.forward(kept),)):
        return layer(y)  # type: ignore[no-any-return]
