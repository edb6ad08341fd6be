"""RMS normalisation: check, allocate, launch, differentiate."""

from __future__ import annotations

import math

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks, pdl, runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, filled, recorded
from bi_ops.core.limits import SMALL, check_programs
from bi_ops.core.operators import custom_op
from bi_ops.core.replay import replayed
from bi_ops.core.rows import aligned_rows, head_rows
from bi_ops.core.transforms import Node
from bi_ops.core.triton_helpers import PINNED
from bi_ops.norm import order as orders
from bi_ops.norm.config import BackwardConfig, RowConfig, backward_config, padded_chunks, row_config
from bi_ops.norm.kernels import (
    GROUP,
    add_chunks_kernel,
    rms_norm_backward_kernel,
    rms_norm_dweight_kernel,
    rms_norm_dx_kernel,
    rms_norm_kernel,
)

_GROUP: int = GROUP.value

# --------------------------------------------------------------------------------------------------------------
# launch: everything below works on rows (token, head) whose last dimension is contiguous


def _is_large(n_rows: int, n_cols: int) -> bool:
    """Do rows, or columns of `GROUP` chunks, need 64 bits? Raises ValueError if a grid cannot hold the rows."""
    large = max(n_rows, n_cols * _GROUP) >= SMALL
    if large:
        check_programs("rms_norm", n_rows)
    return large


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    config: RowConfig | None = None,
    constant_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, x + residual, 1 / rms); the second is empty without a residual. config: None for the one of this size."""
    n_rows, n_cols = x.shape[:-1].numel(), x.shape[-1]
    y = empty(x, x.shape)
    total = empty(x, x.shape if residual is not None else 0)
    rstd = empty(x, n_rows, torch.float32)
    if x.numel() > 0:
        heads, ((x_rows, *x_strides), (residual_rows, *residual_strides)) = head_rows((x, residual))
        arch = arches.of(x.device)
        order = orders.order(orders.Problem(n_cols, x.dtype), arch)
        c = config or row_config(n_rows, n_cols, x.itemsize, order.rows)
        w = None if weight is None else aligned_rows(weight)
        recorded(rms_norm_kernel)[(cdiv(n_rows, c.rows),)](
            x_rows,
            residual_rows,
            w,
            y,
            total,
            rstd,
            n_rows,
            n_cols,
            heads,
            eps,
            *x_strides,
            *residual_strides,
            pdl.prefetch(constant_weight, (w, weight)),
            ROWS=c.rows,
            CHUNKS=c.chunks,
            BLOCK=order.rows.tile(n_cols, c.chunks > 0),
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            LARGE=_is_large(n_rows, n_cols),
            num_warps=order.rows.num_warps,
            **pdl.launch_options(arch),
            **PINNED,
        )
    return y, total, rstd


def launch_backward(
    g: torch.Tensor,
    g_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    need_x: bool,
    weight_grad: torch.Tensor | None,
    accumulate: bool,
    config: BackwardConfig | None = None,
) -> torch.Tensor:
    """The gradient of x, empty if not needed; the weight's is left in `weight_grad`, or if `accumulate` added to it.

    config: None for the one of this size.
    """
    dx = empty(x, x.shape if need_x else 0)
    if x.numel() == 0:
        return dx
    n_rows, n_cols = x.shape[:-1].numel(), x.shape[-1]
    heads, ((g_rows, *g_strides), (sum_rows, *sum_strides), (x_rows, *x_strides)) = head_rows((g, g_sum, x))
    weight_row = None if weight is None else aligned_rows(weight)
    order = orders.order(orders.Problem(n_cols, x.dtype), arches.of(x.device))
    c, add, one_pass = config or backward_config(
        n_rows, n_cols, x.itemsize, order.rows, order.tokens.chunk, runtime.multiprocessors(x.device)
    )
    large = _is_large(n_rows, n_cols)
    n_chunks = padded_chunks(n_rows, order.tokens.chunk, add)
    if weight_grad is not None:
        partial = empty(x, (n_chunks, n_cols), torch.float32)
    if need_x and weight_grad is not None and one_pass:
        recorded(rms_norm_backward_kernel)[(cdiv(n_chunks, c.rows),)](
            *(g_rows, sum_rows, x_rows, weight_row, rstd, dx, partial, n_rows, n_chunks, n_cols, heads),
            *(*g_strides, *sum_strides, *x_strides),
            CHUNK=order.tokens.chunk,
            ROWS=c.rows,
            CHUNKS=c.chunks,
            BLOCK=order.rows.tile(n_cols, c.chunks > 0),
            STAGES=c.stages,
            HAS_SUM=g_sum is not None,
            LARGE=large,
            num_warps=order.rows.num_warps,
            **PINNED,
        )
    else:
        if need_x:
            recorded(rms_norm_dx_kernel)[(cdiv(n_rows, c.rows),)](
                *(g_rows, sum_rows, x_rows, weight_row, rstd, dx, n_rows, n_cols, heads),
                *(*g_strides, *sum_strides, *x_strides),
                ROWS=c.rows,
                CHUNKS=c.chunks,
                BLOCK=order.rows.tile(n_cols, c.chunks > 0),
                HAS_SUM=g_sum is not None,
                HAS_WEIGHT=weight is not None,
                LARGE=large,
                num_warps=order.rows.num_warps,
                **PINNED,
            )
        if weight_grad is not None:
            recorded(rms_norm_dweight_kernel)[(cdiv(n_chunks, add.rows), cdiv(n_cols, add.cols))](
                *(g_rows, x_rows, rstd, partial, n_rows, n_chunks, n_cols, heads, *g_strides, *x_strides),
                CHUNK=order.tokens.chunk,
                ROWS=add.rows,
                COLS=add.cols,
                LARGE=large,
                num_warps=add.num_warps,
                **PINNED,
            )
    if weight_grad is not None:
        recorded(add_chunks_kernel)[(cdiv(n_cols, add.add_cols),)](
            *(partial, weight_grad, n_chunks, n_cols),
            ACCUMULATE=accumulate,
            COLS=add.add_cols,
            UNROLL=add.unroll,
            STAGES=add.stages,
            LARGE=large,
            num_warps=add.add_warps,
            **PINNED,
        )
    return dx


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::rms_norm")
@replayed
def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, constant_weight: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = launch_forward(x, None, weight, eps, constant_weight=constant_weight)
    return y, rstd


@_rms_norm.register_fake
def _(x, weight, eps, constant_weight=False):
    return x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


@custom_op("bi_ops::add_rms_norm")
@replayed
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, constant_weight: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_forward(x, residual, weight, eps, constant_weight=constant_weight)


@_add_rms_norm.register_fake
def _(x, residual, weight, eps, constant_weight=False):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)


@custom_op("bi_ops::rms_norm_backward")
@replayed
def _rms_norm_backward(
    g: torch.Tensor,
    g_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight_grad = filled(weight, weight.shape) if weight is not None and need_weight else None
    dx = launch_backward(g, g_sum, x, weight, rstd, need_x, weight_grad, accumulate=False)
    return dx, empty(x, 0) if weight_grad is None else weight_grad


@_rms_norm_backward.register_fake
def _(g, g_sum, x, weight, rstd, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0), torch.empty_like(weight) if need_weight else x.new_empty(0)


@custom_op("bi_ops::accumulate_rms_norm_backward", mutates_args={"main_grad"})
@replayed
def _accumulate_backward(
    main_grad: torch.Tensor,
    g: torch.Tensor,
    g_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    need_x: bool,
    need_weight: bool,
) -> torch.Tensor:
    return launch_backward(g, g_sum, x, weight, rstd, need_x, main_grad if need_weight else None, accumulate=True)


@_accumulate_backward.register_fake
def _(main_grad, g, g_sum, x, weight, rstd, need_x, need_weight):
    return x.new_empty(x.shape if need_x else 0)


def _norm_setup(ctx, inputs, output):
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx, g, _):
    need_x, need_weight, *_ = ctx.needs_input_grad
    dx, dw = _rms_norm_backward(g, None, *ctx.saved_tensors, need_x, need_weight)
    return dx if need_x else None, dw if need_weight else None, None, None


def _add_norm_setup(ctx, inputs, output):
    weight = inputs[2]
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _add_norm_backward(ctx, g, g_sum, _):
    *need_either, need_weight = ctx.needs_input_grad[:3]  # a compiler leaves arguments out that are the defaults
    dx, dw = _rms_norm_backward(g, g_sum, *ctx.saved_tensors, any(need_either), need_weight)
    return *(dx if needed else None for needed in need_either), dw if need_weight else None, None, None


_rms_norm.register_autograd(_norm_backward, setup_context=_norm_setup)
_add_rms_norm.register_autograd(_add_norm_backward, setup_context=_add_norm_setup)


class _NormIntoBuffer(Node):
    """rms_norm whose weight gradient goes into a buffer and not to autograd."""

    operator = "rms_norm with main_grad"

    @staticmethod
    def forward(ctx, x, weight, eps, main_grad):
        y, rstd = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.main_grad = main_grad
        return y

    @staticmethod
    def backward(ctx, g):
        need_x, need_weight, *_ = ctx.needs_input_grad
        dx = _accumulate_backward(ctx.main_grad, g, None, *ctx.saved_tensors, need_x, need_weight)
        return dx if need_x else None, None, None, None


class _AddNormIntoBuffer(Node):
    """add_rms_norm whose weight gradient goes into a buffer and not to autograd."""

    operator = "add_rms_norm with main_grad"

    @staticmethod
    def forward(ctx, x, residual, weight, eps, main_grad):
        y, total, rstd = _add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.main_grad = main_grad
        return y, total

    @staticmethod
    def backward(ctx, g, g_sum):
        *need_either, need_weight, _, _ = ctx.needs_input_grad
        dx = _accumulate_backward(ctx.main_grad, g, g_sum, *ctx.saved_tensors, any(need_either), need_weight)
        return *(dx if needed else None for needed in need_either), None, None, None


# --------------------------------------------------------------------------------------------------------------
# public functions


def _check(op: str, x: torch.Tensor, weight: torch.Tensor | None, eps: float, main_grad: torch.Tensor | None) -> None:
    checks.tensor(op, "x", x)
    checks.dtype(op, "x", x)
    checks.shape(
        op, x.ndim >= 1 and x.shape[-1] > 0, lambda: f"x must have a last dimension to normalise, got {list(x.shape)}"
    )
    checks.shape(op, checks.real(op, "eps", eps) >= 0, lambda: f"eps must not be negative, got {eps}")
    if weight is not None:
        checks.tensor(op, "weight", weight, ndim=1)
        checks.dtype(op, "weight", weight)
        if weight.dtype != torch.float32:
            checks.same_dtype(op, x=x, weight=weight)
        checks.same_device(op, x=x, weight=weight)
        fits = weight.shape[0] == x.shape[-1]
        checks.shape(op, fits, lambda: f"weight {list(weight.shape)} does not fit x {list(x.shape)}")
    if main_grad is not None:
        checks.shape(op, weight is not None, "main_grad needs a weight whose gradient it holds")
        checks.main_grad(op, "main_grad", main_grad, x.shape[-1:], x.device)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    main_grad: torch.Tensor | None = None,
    *,
    constant_weight: bool = False,
) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019).

    Computed in fp32 and rounded once; where N is a multiple of 16, the bits of vLLM's `rms_norm_batch_invariant`. dX
    depends on its own row; the gradient of the weight sums rows in chunks of TOKEN_STEP, the chunks front to back.

    Args:
        x: [..., N], bf16, fp16 or fp32; for per-head norms [..., heads, head_dim].
        weight: [N], the dtype of x or fp32 (a master weight: rounded to the dtype of x first, its gradient comes back
            in fp32), or None.
        eps: >= 0.
        main_grad: fp32 [N], contiguous, or None. If given, the weight's sum is accumulated in it, in place, and
            `weight.grad` stays as it is: cut at multiples of TOKEN_STEP rows, a batch ends in the bits of one pass.
        constant_weight: no kernel of the CUDA graph that is being captured writes the weight. The kernel then reads it
            while the kernel before still runs (`bi_ops.core.pdl`). Outside a capture it changes nothing.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: an unsupported dtype. ValueError: wrong shape, device or eps; main_grad without a weight.
    """
    _check("rms_norm", x, weight, eps, main_grad)
    checks.boolean("rms_norm", "constant_weight", constant_weight)
    if main_grad is not None:
        return _NormIntoBuffer.apply(x, weight, eps, main_grad)
    return _rms_norm(x, weight, eps, constant_weight)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    main_grad: torch.Tensor | None = None,
    *,
    constant_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to the dtype of x before it is normalised.

    Args:
        x, residual: [..., N], one dtype and shape. weight, eps, main_grad, constant_weight: as
            `rms_norm`.

    Raises:
        TypeError, ValueError: as `rms_norm`, and when x and residual differ in shape or dtype.
    """
    _check("add_rms_norm", x, weight, eps, main_grad)
    checks.boolean("add_rms_norm", "constant_weight", constant_weight)
    checks.tensor("add_rms_norm", "residual", residual)
    checks.same_dtype("add_rms_norm", x=x, residual=residual)
    checks.same_device("add_rms_norm", x=x, residual=residual)
    checks.shape(
        "add_rms_norm",
        x.shape == residual.shape,
        lambda: f"x {list(x.shape)} and residual {list(residual.shape)} differ",
    )
    if main_grad is not None:
        return _AddNormIntoBuffer.apply(x, residual, weight, eps, main_grad)
    y, total, _ = _add_rms_norm(x, residual, weight, eps, constant_weight)
    return y, total
