"""Operators of a mixture-of-experts layer: check, run, differentiate. `experts` has the whole layer."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bi_ops.core import checks as core_checks
from bi_ops.core import rounding
from bi_ops.core.launches import empty
from bi_ops.core.main_grad import MainGrad, open_buffer
from bi_ops.core.operators import custom_op
from bi_ops.core.replay import replayed
from bi_ops.core.transforms import Node
from bi_ops.moe import checks
from bi_ops.moe.launch import (
    launch_combine,
    launch_dispatch,
    launch_gather,
    launch_grouped_matmul,
    launch_grouped_wgrad,
    launch_router,
    launch_router_backward,
    most_rows,
)

# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::moe_router")
@replayed
def _router(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_router(logits, top_k, normalize)


@_router.register_fake
def _(logits, top_k, normalize):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@custom_op("bi_ops::moe_router_backward")
@replayed
def _router_grad(
    g: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, normalize: bool
) -> torch.Tensor:
    return launch_router_backward(g, logits, weights, experts, normalize)


@_router_grad.register_fake
def _(g, logits, weights, experts, normalize):
    return logits.new_empty(logits.shape)


def _router_setup(ctx, inputs, output):
    logits, _, ctx.normalize = inputs
    ctx.save_for_backward(logits, *output)


def _router_backward(ctx, g, _):
    return _router_grad(g, *ctx.saved_tensors, ctx.normalize), None, None


_router.register_autograd(_router_backward, setup_context=_router_setup)


@custom_op("bi_ops::moe_dispatch")
@replayed
def _dispatch(
    experts: torch.Tensor, num_experts: int, cu_units: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_dispatch(experts, num_experts, cu_units)


@_dispatch.register_fake
def _(experts, num_experts, cu_units=None):
    units = 1 if cu_units is None else cu_units.shape[0] - 1
    rows = most_rows(experts.shape[0] * experts.shape[1], num_experts, units)
    return experts.new_empty(rows), experts.new_empty(experts.shape), experts.new_empty(num_experts + 1)


@custom_op("bi_ops::moe_gather")
@replayed
def gather_op(x: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return launch_gather(x, rows, places.shape[1])


@gather_op.register_fake
def _(x, rows, places):
    return x.new_empty((rows.shape[0], x.shape[1]))


@custom_op("bi_ops::moe_combine")
@replayed
def combine_op(y: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return launch_combine(y, places)


@combine_op.register_fake
def _(y, rows, places):
    return y.new_empty((places.shape[0], y.shape[1]))


def _rows_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


gather_op.register_autograd(lambda ctx, g: (combine_op(g, *ctx.saved_tensors), None, None), setup_context=_rows_setup)
combine_op.register_autograd(lambda ctx, g: (gather_op(g, *ctx.saved_tensors), None, None), setup_context=_rows_setup)


@custom_op("bi_ops::grouped_matmul")
@replayed
def grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """x[r] @ weight[e].T, times weights[rows[r]] if given."""
    return launch_grouped_matmul(x, weight, offsets, None if weights is None or rows is None else (weights, rows))


@grouped_matmul.register_fake
def _(x, weight, offsets, weights=None, rows=None):
    return x.new_empty((x.shape[0], weight.shape[1]))


@custom_op("bi_ops::grouped_weight_grad")
@replayed
def grouped_weight_grad(
    g: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype, aligned: bool
) -> torch.Tensor:
    """[E, N, K] in `dtype`: g[rows of e].T @ x[rows of e], zeros for an expert without rows."""
    dw = empty(g, (offsets.shape[0] - 1, g.shape[1], x.shape[1]), dtype)
    launch_grouped_wgrad(g, x, offsets, dw, False, aligned)
    return dw


@grouped_weight_grad.register_fake
def _(g, x, offsets, dtype, aligned):
    return g.new_empty((offsets.shape[0] - 1, g.shape[1], x.shape[1]), dtype=dtype)


@custom_op("bi_ops::accumulate_grouped_weight_grad", mutates_args={"main_grad"})
@replayed
def accumulate_grad_op(
    main_grad: torch.Tensor, g: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, accumulate: bool, aligned: bool
) -> None:
    launch_grouped_wgrad(g, x, offsets, main_grad, accumulate, aligned)


@accumulate_grad_op.register_fake
def _(main_grad, g, x, offsets, accumulate, aligned):
    return None


def weight_grad(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
    main_grad: torch.Tensor | MainGrad | None,
    aligned: bool,
) -> torch.Tensor | None:
    """The gradient of an [E, N, K] weight; None where it was added to `main_grad`.

    aligned: every expert has a multiple of `TOKEN_STEP` rows, which are faster to add up.
    """
    if main_grad is None:
        return grouped_weight_grad(g, x, offsets, dtype, aligned)
    buffer, holds_sum = open_buffer(main_grad)
    accumulate_grad_op(buffer, g, x, offsets, holds_sum, aligned)
    return None


class _GroupedLinear(Node):
    """x[r] @ weight[e].T, whose weight gradient goes into `main_grad` if there is one."""

    operator = "grouped_linear"

    @staticmethod
    def forward(ctx, x, weight, offsets, main_grad, aligned):
        rounded = rounding.rounded(weight, x.dtype)
        ctx.save_for_backward(x, weight if main_grad is None else rounded, offsets)
        ctx.main_grad, ctx.dtype, ctx.aligned = main_grad, weight.dtype, aligned
        return grouped_matmul(x, rounded, offsets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, offsets = ctx.saved_tensors
        g = g.contiguous()
        dx = grouped_matmul(g, weight.to(g.dtype).mT, offsets) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        return dx, weight_grad(g, x, offsets, ctx.dtype, ctx.main_grad, ctx.aligned), None, None, None


# --------------------------------------------------------------------------------------------------------------
# public functions


class Dispatch(NamedTuple):
    """Where the (token, slot) pairs of a batch lie when they are sorted by expert.

    rows: int32 [R], the pair token * k + slot of each row; -1 for padding. places: int32 [T, k], the row of each pair;
    -1 for a pair whose expert is none of these. offsets: int32 [E + 1]: rows offsets[e] to offsets[e + 1] are expert
    e's, in the order of the tokens. R is an upper bound that follows from the shapes; rows behind offsets[E] are
    padding.
    """

    rows: torch.Tensor
    places: torch.Tensor
    offsets: torch.Tensor


def router(logits: torch.Tensor, top_k: int, *, normalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token: the `top_k` largest of softmax(logits), in descending order, and their probabilities.

    Of equal probabilities the lowest expert comes first. The softmax is computed in fp32 over all experts in a fixed
    order, that of vLLM's CUDA `topk_softmax` for counts of experts that are powers of two up to 512, or 192, 320, 384,
    448, 576; the bits are vLLM's there. (Shazeer et al., 2017; Fedus et al., 2021.) A token with a NaN or an infinite
    logit has the experts 0, 1, ... with weights of 0, as in vLLM.

    Args:
        logits: [T, E], bf16, fp16 or fp32. top_k: experts of a token, at most E and 64.
        normalize: divide the weights by their sum, as Qwen3's `norm_topk_prob`.

    Returns:
        weights, fp32 [T, top_k], which have a gradient, and experts, int32 [T, top_k].

    Raises:
        TypeError: an unsupported dtype, or a top_k that is no whole number. ValueError: wrong rank or device, or a
        top_k out of range.
    """
    checks.matrix("router", "logits", logits)
    core_checks.size("router", "top_k", top_k)
    core_checks.boolean("router", "normalize", normalize)
    num_experts = logits.shape[1]
    checks.count("router", num_experts)
    most = min(num_experts, checks.MOST_SLOTS)
    core_checks.shape("router", top_k <= most, lambda: f"top_k is {top_k}; logits {list(logits.shape)} allow {most}")
    return _router(logits, top_k, normalize)


def dispatch(experts: torch.Tensor, num_experts: int, cu_units: torch.Tensor | None = None) -> Dispatch:
    """Sort the (token, slot) pairs by expert, stably. Whole numbers only; nothing waits for the GPU.

    An expert's rows of each unit are padded to a multiple of `TOKEN_STEP` (16), so sums over its rows may be carried
    on from one batch to the next where batches are cut between units: the bits of one batch.

    Args:
        experts: int32 [T, k], distinct in a row. A pair whose expert is negative, or `num_experts` or more, has no row.
        num_experts: E. cu_units: int32 [U + 1], where the units start, 0 first and T last, multiples of 16 but for the
            last (others are rounded down); None: one unit.

    Raises:
        TypeError: another dtype. ValueError: wrong rank, device or sizes.
    """
    checks.slots("dispatch", experts)
    core_checks.size("dispatch", "num_experts", num_experts)
    checks.count("dispatch", num_experts)
    checks.units("dispatch", cu_units, experts)
    return Dispatch(*_dispatch(experts, num_experts, cu_units))


def _check_dispatch(op: str, x: torch.Tensor, dispatched: Dispatch) -> None:
    if not isinstance(dispatched, Dispatch):
        raise TypeError(f"{op}: dispatched must be what `dispatch` returns, got {type(dispatched).__name__}")
    for name, t, ndim in (("rows", dispatched.rows, 1), ("places", dispatched.places, 2)):
        checks.int32(op, name, t, ndim, x)


def gather(x: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """[R, N]: each row its token's row of x [T, N], zeros where a row is padding; bf16, fp16 or fp32.

    Raises:
        TypeError: another dtype, or no `Dispatch`. ValueError: wrong rank or device, or another number of tokens.
    """
    checks.matrix("gather", "x", x)
    _check_dispatch("gather", x, dispatched)
    tokens = dispatched.places.shape[0]
    core_checks.shape("gather", x.shape[0] == tokens, lambda: f"x {list(x.shape)} for {tokens} dispatched tokens")
    return gather_op(x, dispatched.rows, dispatched.places)


def combine(y: torch.Tensor, dispatched: Dispatch) -> torch.Tensor:
    """[T, N]: for each token the sum of its rows of y [R, N], slot after slot in fp32 from +0, rounded once.

    Weights, if any, are in y already. Raises as `gather`.
    """
    checks.matrix("combine", "y", y)
    _check_dispatch("combine", y, dispatched)
    rows = dispatched.rows.shape[0]
    core_checks.shape("combine", y.shape[0] == rows, lambda: f"y {list(y.shape)} for {rows} dispatched rows")
    return combine_op(y, dispatched.rows, dispatched.places)


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    main_grad: torch.Tensor | MainGrad | None = None,
    *,
    aligned: bool = False,
) -> torch.Tensor:
    """``x[r] @ weight[e].T`` for rows offsets[e] <= r < offsets[e + 1], as `torch._grouped_mm`.

    A row has the bits of `bi_ops.matmul.linear` with its expert's weight, whatever the number of rows of each expert.
    So has the gradient of x; the weight's is summed over an expert's rows front to back. Rows behind offsets[E] are
    zeros, and so are their gradients. Counts stay on the device: nothing waits for the GPU, and a captured CUDA graph
    takes other counts.

    Args:
        x: [R, K], bf16, fp16 or fp32. weight: [E, N, K], the dtype of x, or fp32, which is cast first.
        offsets: int32 [E + 1], from 0 to at most R, ascending. Values are not checked.
        main_grad: fp32 [E, N, K], contiguous, or a `bi_ops.nn.MainGrad`, or None. If given, the weight's gradient is
            added to it in place and `weight.grad` stays as it is. That of an expert without rows is not touched.
        aligned: offsets are multiples of `TOKEN_STEP`, as `dispatch` makes them: a faster kernel of the weight's
            gradient, with the same bits. Not checked.

    Returns:
        [R, N] in the dtype of x.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: wrong rank, device or sizes.
    """
    op = "grouped_linear"
    checks.matrix(op, "x", x)
    checks.expert_weight(op, "weight", weight, x, x.shape[1])
    checks.int32(op, "offsets", offsets, 1, x)
    num_experts = weight.shape[0]
    ok = offsets.shape[0] == num_experts + 1
    core_checks.shape(op, ok, lambda: f"offsets must be [{num_experts + 1}], got {list(offsets.shape)}")
    core_checks.boolean(op, "aligned", aligned)
    if main_grad is not None:
        core_checks.main_grad(op, "main_grad", main_grad, weight.shape, x.device)
    return _GroupedLinear.apply(x, weight, offsets.contiguous(), main_grad, aligned)
