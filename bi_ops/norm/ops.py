"""RMS normalisation: check, allocate, launch, differentiate."""

from __future__ import annotations

import torch

from bi_ops._common import checks
from bi_ops._common.integers import cdiv
from bi_ops._common.operators import custom_op
from bi_ops._common.rows import aligned_rows, head_rows
from bi_ops.norm import schedule as sched
from bi_ops.norm.kernels import add_chunks_kernel, rms_norm_dweight_kernel, rms_norm_dx_kernel, rms_norm_kernel

# --------------------------------------------------------------------------------------------------------------
# launch: everything below works on rows (token, head) whose last dimension is contiguous


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows, n_cols = x.shape[:-1].numel(), x.shape[-1]
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape if residual is not None else 0)
    inv = x.new_empty(n_rows, dtype=torch.float32)
    if x.numel() > 0:
        heads, ((x_rows, *x_strides), (residual_rows, *residual_strides)) = head_rows((x, residual))
        s = sched.row_schedule(n_rows, n_cols, y.itemsize)
        rms_norm_kernel[(cdiv(n_rows, s.rows),)](
            x_rows,
            residual_rows,
            None if weight is None else aligned_rows(weight),
            y,
            total,
            inv,
            n_rows,
            n_cols,
            heads,
            eps,
            *x_strides,
            *residual_strides,
            ROWS=s.rows,
            CHUNKS=s.chunks,
            BLOCK=s.block,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            num_warps=s.num_warps,
        )
    return y, total, inv


def _dx(
    g: torch.Tensor, g_sum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, inv: torch.Tensor
) -> torch.Tensor:
    n_rows, n_cols = x.shape[:-1].numel(), x.shape[-1]
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    heads, ((g_rows, *g_strides), (sum_rows, *sum_strides), (x_rows, *x_strides)) = head_rows((g, g_sum, x))
    s = sched.row_schedule(n_rows, n_cols, dx.itemsize)
    rms_norm_dx_kernel[(cdiv(n_rows, s.rows),)](
        g_rows,
        sum_rows,
        x_rows,
        None if weight is None else aligned_rows(weight),
        inv,
        dx,
        n_rows,
        n_cols,
        heads,
        *g_strides,
        *sum_strides,
        *x_strides,
        ROWS=s.rows,
        CHUNKS=s.chunks,
        BLOCK=s.block,
        HAS_SUM=g_sum is not None,
        HAS_WEIGHT=weight is not None,
        num_warps=s.num_warps,
    )
    return dx


def _sum_over_rows(out: torch.Tensor, g: torch.Tensor, x: torch.Tensor, inv: torch.Tensor, accumulate: bool) -> None:
    """out[N] = sum of g * xhat over rows; accumulate: out is fp32 and where the sum starts."""
    if x.numel() == 0:
        return
    n_rows, n_cols = x.shape[:-1].numel(), x.shape[-1]
    chunk = sched.token_order().chunk
    s = sched.token_schedule(cdiv(n_rows, chunk), n_cols)
    # Chunks past the end are written too, as 0.0: the sum of the chunks then needs no mask.
    n_chunks = cdiv(n_rows, chunk * s.unroll) * s.unroll
    partial = x.new_empty((n_chunks, n_cols), dtype=torch.float32)
    heads, ((g_rows, *g_strides), (x_rows, *x_strides)) = head_rows((g, x))
    rms_norm_dweight_kernel[(cdiv(n_chunks, s.rows), cdiv(n_cols, s.cols))](
        g_rows,
        x_rows,
        inv,
        partial,
        n_rows,
        n_chunks,
        n_cols,
        heads,
        *g_strides,
        *x_strides,
        CHUNK=chunk,
        ROWS=s.rows,
        COLS=s.cols,
        num_warps=s.num_warps,
    )
    add_chunks_kernel[(cdiv(n_cols, s.add_cols),)](
        partial,
        out,
        n_chunks,
        n_cols,
        ACCUMULATE=accumulate,
        COLS=s.add_cols,
        UNROLL=s.unroll,
        STAGES=s.stages,
        num_warps=s.add_warps,
    )


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::rms_norm")
def _rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, inv = _forward(x, None, weight, eps)
    return y, inv


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@custom_op("bi_ops::add_rms_norm")
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x, residual, weight, eps)


@_add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@custom_op("bi_ops::rms_norm_dx")
def _rms_norm_dx(
    g: torch.Tensor, g_sum: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor | None, inv: torch.Tensor
) -> torch.Tensor:
    return _dx(g, g_sum, x, weight, inv)


@_rms_norm_dx.register_fake
def _(g, g_sum, x, weight, inv):
    return x.new_empty(x.shape)


@custom_op("bi_ops::rms_norm_dweight")
def _rms_norm_dweight(g: torch.Tensor, x: torch.Tensor, inv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dw = x.new_zeros(x.shape[-1], dtype=dtype)
    _sum_over_rows(dw, g, x, inv, accumulate=False)
    return dw


@_rms_norm_dweight.register_fake
def _(g, x, inv, dtype):
    return x.new_empty(x.shape[-1], dtype=dtype)


@custom_op("bi_ops::accumulate_norm_grad", mutates_args={"main_grad"})
def _accumulate(main_grad: torch.Tensor, g: torch.Tensor, x: torch.Tensor, inv: torch.Tensor) -> None:
    _sum_over_rows(main_grad, g, x, inv, accumulate=True)


@_accumulate.register_fake
def _(main_grad, g, x, inv):
    return None


def _norm_setup(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx, g, _):
    x, weight, inv = ctx.saved_tensors
    dx = _rms_norm_dx(g, None, x, weight, inv) if ctx.needs_input_grad[0] else None
    dw = _rms_norm_dweight(g, x, inv, weight.dtype) if ctx.needs_input_grad[1] else None
    return dx, dw, None


def _add_norm_setup(ctx, inputs, output):
    weight = inputs[2]
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])


def _add_norm_backward(ctx, g, g_sum, _):
    total, weight, inv = ctx.saved_tensors
    dx = _rms_norm_dx(g, g_sum, total, weight, inv) if any(ctx.needs_input_grad[:2]) else None
    dw = _rms_norm_dweight(g, total, inv, weight.dtype) if ctx.needs_input_grad[2] else None
    return dx, dx, dw, None


_rms_norm.register_autograd(_norm_backward, setup_context=_norm_setup)
_add_rms_norm.register_autograd(_add_norm_backward, setup_context=_add_norm_setup)


class _NormIntoBuffer(torch.autograd.Function):
    """rms_norm whose weight gradient goes into a buffer and not to autograd."""

    @staticmethod
    def forward(ctx, x, weight, eps, main_grad):
        y, inv = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inv)
        ctx.main_grad = main_grad
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, inv = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            _accumulate(ctx.main_grad, g, x, inv)
        return _rms_norm_dx(g, None, x, weight, inv) if ctx.needs_input_grad[0] else None, None, None, None


class _AddNormIntoBuffer(torch.autograd.Function):
    """add_rms_norm whose weight gradient goes into a buffer and not to autograd."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, main_grad):
        y, total, inv = _add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, inv)
        ctx.main_grad = main_grad
        return y, total

    @staticmethod
    def backward(ctx, g, g_sum):
        total, weight, inv = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            _accumulate(ctx.main_grad, g, total, inv)
        dx = _rms_norm_dx(g, g_sum, total, weight, inv) if any(ctx.needs_input_grad[:2]) else None
        return dx, dx, None, None, None


# --------------------------------------------------------------------------------------------------------------
# public functions


def _check(op: str, x: torch.Tensor, weight: torch.Tensor | None, eps: float, main_grad: torch.Tensor | None) -> None:
    checks.tensor(op, "x", x)
    checks.dtype(op, "x", x)
    checks.shape(
        op, x.ndim >= 1 and x.shape[-1] > 0, lambda: f"x must have a last dimension to normalise, got {list(x.shape)}"
    )
    checks.shape(op, eps >= 0, lambda: f"eps must not be negative, got {eps}")
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
) -> torch.Tensor:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019).

    Computed in fp32 and rounded once; where N is a multiple of 16, the bits of vLLM's `rms_norm_batch_invariant`. dX
    depends on its own row; the gradient of the weight sums rows in chunks of TOKEN_STEP, the chunks front to back.

    Args:
        x: [..., N], bf16, fp16 or fp32; for per-head norms [..., heads, head_dim].
        weight: [N], the dtype of x or fp32 (a master weight: rounded to the dtype of x first, its gradient comes back
            in fp32), or None.
        eps: >= 0.
        main_grad: fp32 [N], contiguous, or None. If given, the weight's sum is carried on in it, in place, and
            `weight.grad` stays as it is: cut at multiples of TOKEN_STEP rows, a batch ends in the bits of one pass.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: an unsupported dtype. ValueError: wrong shape, device or eps; main_grad without a weight.
    """
    _check("rms_norm", x, weight, eps, main_grad)
    if main_grad is not None:
        return _NormIntoBuffer.apply(x, weight, eps, main_grad)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    main_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to the dtype of x before it is normalised.

    Args:
        x, residual: [..., N], one dtype and shape. weight, eps, main_grad: as `rms_norm`.

    Raises:
        TypeError, ValueError: as `rms_norm`, and when x and residual differ in shape or dtype.
    """
    _check("add_rms_norm", x, weight, eps, main_grad)
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
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total
