"""The experts of a mixture-of-experts layer: dispatch, two grouped GEMMs, combine, and one backward."""

from __future__ import annotations

import torch

from bi_ops.core import checks as core_checks
from bi_ops.core import rounding
from bi_ops.core.main_grad import MainGrad
from bi_ops.core.operators import custom_op
from bi_ops.core.replay import replayed
from bi_ops.core.transforms import Node
from bi_ops.moe import checks
from bi_ops.moe.launch import launch_activation, launch_activation_backward, launch_experts, most_rows
from bi_ops.moe.ops import combine_op, gather_op, grouped_matmul, weight_grad


@custom_op("bi_ops::moe_activation")
@replayed
def activation_op(x: torch.Tensor) -> torch.Tensor:
    return launch_activation(x)


@activation_op.register_fake
def _(x):
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@custom_op("bi_ops::moe_activation_backward")
@replayed
def activation_grad_op(
    g: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_activation_backward(g, x, weights, rows)


@activation_grad_op.register_fake
def _(g, x, weights, rows):
    return x.new_empty(x.shape), x.new_empty(g.shape), weights.new_empty(weights.shape)


@custom_op("bi_ops::moe_experts")
@replayed
def experts_op(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    cu_units: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, h, rows, places, offsets): the layer, and what its backward needs; see `launch.launch_experts`."""
    return launch_experts(hidden, gate_up, down, weights, experts, cu_units)


@experts_op.register_fake
def _(hidden, gate_up, down, weights, experts, cu_units):
    num_experts, units = gate_up.shape[0], 1 if cu_units is None else cu_units.shape[0] - 1
    n_rows = most_rows(experts.shape[0] * experts.shape[1], num_experts, units)
    h = hidden.new_empty((n_rows, gate_up.shape[1]))
    ints = experts.new_empty(n_rows), experts.new_empty(experts.shape), experts.new_empty(num_experts + 1)
    return hidden.new_empty(hidden.shape), h, *ints


class _Experts(Node):
    """The gradient of a routing weight is dot(h, down.T @ dout), h the activation: no expert's output is kept."""

    operator = "experts"

    @staticmethod
    def forward(ctx, hidden, gate_up, down, weights, experts, cu_units, gate_up_main_grad, down_main_grad):
        w1, w2 = (rounding.rounded(w, hidden.dtype) for w in (gate_up, down))
        out, h, rows, places, offsets = experts_op(hidden, w1, w2, weights, experts, cu_units)
        # With a buffer the rounded weight stays in memory until the backward, so that a master is rounded once.
        kept = gate_up if gate_up_main_grad is None else w1, down if down_main_grad is None else w2
        ctx.save_for_backward(hidden, *kept, weights, h, rows, places, offsets)
        ctx.main_grads, ctx.dtypes = (gate_up_main_grad, down_main_grad), (gate_up.dtype, down.dtype)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        hidden, gate_up, down, weights, h, rows, places, offsets = ctx.saved_tensors
        need_hidden, need_gate_up, need_down, need_weights, *_ = ctx.needs_input_grad
        dhidden = dgate_up = ddown = None
        g_rows = gather_op(g, rows, places)
        dy = grouped_matmul(g_rows, down.to(g.dtype).mT, offsets)
        dh, y, dweights = activation_grad_op(dy, h, weights, rows)
        del dy
        if need_down:
            ddown = weight_grad(g_rows, y, offsets, ctx.dtypes[1], ctx.main_grads[1], aligned=True)
        del g_rows, y
        if need_gate_up:
            x_rows = gather_op(hidden, rows, places)
            dgate_up = weight_grad(dh, x_rows, offsets, ctx.dtypes[0], ctx.main_grads[0], aligned=True)
            del x_rows
        if need_hidden:
            dhidden = combine_op(grouped_matmul(dh, gate_up.to(g.dtype).mT, offsets), rows, places)
        return dhidden, dgate_up, ddown, dweights if need_weights else None, None, None, None, None


def experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    *,
    cu_units: torch.Tensor | None = None,
    gate_up_main_grad: torch.Tensor | MainGrad | None = None,
    down_main_grad: torch.Tensor | MainGrad | None = None,
) -> torch.Tensor:
    """``out[t] = sum over slots of weight * down[e] @ (silu(gate) * up)`` with (gate, up) = gate_up[e] @ hidden[t].

    The rounding steps of vLLM's Triton `fused_experts`: gate and up are rounded, silu, its product with up; the routing
    weight multiplies the second GEMM's fp32 accumulator, which is then rounded; slots are added in fp32, from +0, and
    rounded. A token's result and gradients have the same bits whatever shares the batch. No token is dropped, and
    nothing waits for the GPU.

    Weight gradients are sums over an expert's tokens, front to back. With `main_grad` buffers they are carried on from
    one batch to the next, and are the same bits however a batch is cut between units; see `dispatch`.

    Args:
        hidden: [T, H], bf16, fp16 or fp32. gate_up: [E, 2I, H], the gate's rows first, down: [E, H, I]; in the dtype
            of hidden, or fp32, which is cast first.
        weights: fp32 [T, k]. experts: int32 [T, k], distinct in a row; what is none of E experts adds nothing.
        cu_units: int32 [U + 1] as `dispatch`, or None.
        gate_up_main_grad, down_main_grad: as `grouped_linear`'s main_grad.

    Returns:
        [T, H] in the dtype of hidden.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: wrong rank, device or sizes.
    """
    op = "experts"
    checks.matrix(op, "hidden", hidden)
    checks.expert_weight(op, "gate_up", gate_up, hidden, hidden.shape[1])
    num_experts, doubled, size = gate_up.shape
    ok = doubled > 0 and doubled % 2 == 0
    core_checks.shape(op, ok, lambda: f"gate_up {list(gate_up.shape)} holds gate and up: axis 1 must be even")
    checks.expert_weight(op, "down", down, hidden, doubled // 2)
    ok = down.shape[:2] == (num_experts, size)
    core_checks.shape(op, ok, lambda: f"down {list(down.shape)} must be {[num_experts, size, doubled // 2]}")
    checks.slots(op, experts)
    core_checks.tensor(op, "weights", weights, ndim=2)
    core_checks.dtype(op, "weights", weights, (torch.float32,))
    core_checks.same_device(op, hidden=hidden, weights=weights, experts=experts)
    ok = weights.shape == experts.shape and experts.shape[0] == hidden.shape[0]
    core_checks.shape(
        op,
        ok,
        lambda: f"weights {list(weights.shape)} and experts {list(experts.shape)} for hidden {list(hidden.shape)}",
    )
    checks.units(op, cu_units, hidden)
    for name, buffer, weight in (
        ("gate_up_main_grad", gate_up_main_grad, gate_up),
        ("down_main_grad", down_main_grad, down),
    ):
        if buffer is not None:
            core_checks.main_grad(op, name, buffer, weight.shape, hidden.device)
    return _Experts.apply(
        hidden, gate_up, down, weights.contiguous(), experts, cu_units, gate_up_main_grad, down_main_grad
    )
