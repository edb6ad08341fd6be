"""Linear layers: one GEMM each way, a bias, and weight gradients that are accumulated in a buffer.

A call is one autograd node. Which one, is decided by what has to be differentiated:

    plain tensors, a verified shape      `_Served`: the C++ binding, because the operator's way through Python takes the
                                         host longer than a small GEMM takes the GPU (bench/products.py)
    a bias, or a main_grad               `_Linear`
    everything else                      `mm`'s custom operator: torch.compile, transforms, modes and subclasses
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from bi_ops.core import checks, rounding
from bi_ops.core.main_grad import MainGrad, open_buffer
from bi_ops.core.operators import custom_op, dispatcher_is_watched, is_plain
from bi_ops.core.replay import replayed
from bi_ops.core.transforms import Node, is_transformed
from bi_ops.matmul import cublaslt
from bi_ops.matmul.backends import gemm, gradient_backend, select
from bi_ops.matmul.launch import launch_wgrad
from bi_ops.matmul.ops import _mm, _mm_grad, add_bias, bias_grad, check_backend, check_operands

_wgrad = replayed(launch_wgrad)


@custom_op("bi_ops::accumulate_weight_grad", mutates_args={"main_grad"})
def _accumulate(main_grad: torch.Tensor, g: torch.Tensor, x: torch.Tensor, accumulate: bool = True) -> None:
    _wgrad(g, x, main_grad, accumulate=accumulate)


@_accumulate.register_fake
def _(main_grad, g, x, accumulate=True):
    return None


@custom_op("bi_ops::linear_backward", mutates_args={"main_grad"})
def _linear_grad(
    main_grad: torch.Tensor,
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    need_x: bool,
    need_weight: bool,
    backend: str = "",
    accumulate: bool = True,
) -> torch.Tensor:
    """Gradients of x[T, K] @ weight[N, K].T: g @ weight, empty where not needed, and g.T @ x, added to main_grad.

    accumulate: False writes the second over whatever main_grad holds.
    """
    if need_weight:
        _wgrad(g, x, main_grad, accumulate=accumulate)
    return gemm(g, weight, backend=gradient_backend(backend)) if need_x else g.new_empty(0)


@_linear_grad.register_fake
def _(main_grad, g, x, weight, need_x, need_weight, backend="", accumulate=True):
    return g.new_empty(x.shape if need_x else 0)


class _Served(torch.autograd.Function):
    """x [..., K] @ weight[N, K].T of plain tensors on the allowlist, no transform active."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        binding = cublaslt.loaded()
        out = None if binding is None else binding.linear(x, weight)
        if out is None:  # no algorithm for this row count, or none timed yet
            out = _mm(x.reshape(-1, x.shape[-1]), weight.t(), None, "").view(*x.shape[:-1], weight.shape[0])
        return out

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        rows, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, weight.shape[0])
        dx, dweight = _mm_grad(g, rows, weight.t(), need_x, need_weight, "")
        return dx.view(x.shape) if need_x else None, dweight.t() if need_weight else None


def through_binding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """x @ weight.T by cuBLASLt's binding, without the operator's cost per call, gradient included.

    None: the operator has to be called. That is where the shape is not verified or not for cuBLASLt, or where an
    `Operator` goes through the dispatcher.
    """
    if dispatcher_is_watched() or not (is_plain(x) and is_plain(weight)):
        return None
    binding = cublaslt.loaded() if select(x.dtype, x.device).name == "cublaslt" else None
    if binding is None:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Served.apply(x, weight) if binding.serves(x, weight) else None
    return binding.linear(x, weight)


class _Linear(Node):
    """x[T, K] @ weight[N, K].T + bias, whose weight gradient goes into `main_grad` if there is one."""

    operator = "linear with main_grad"

    @staticmethod
    def forward(ctx, x, weight, bias, main_grad, backend, in_accumulator):
        rounded = rounding.rounded(weight, x.dtype)
        # With a buffer the rounded weight stays in memory until the backward, so that a master is rounded once.
        ctx.save_for_backward(x, weight if main_grad is None else rounded, bias)
        ctx.main_grad, ctx.backend = main_grad, backend
        if in_accumulator:
            return _mm(x, rounded.t(), bias.contiguous(), backend)
        out = None if backend else through_binding(x, rounded)
        out = _mm(x, rounded.t(), None, backend) if out is None else out
        return out if bias is None else out + bias.to(out.dtype)

    @staticmethod
    def backward(ctx, g):
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        dbias = bias_grad(g).to(bias.dtype) if need_bias else None
        if ctx.main_grad is not None:
            dx = linear_backward(ctx.main_grad, g.contiguous(), x, weight, need_x, need_weight, ctx.backend)
            return dx, None, dbias, None, None, None
        dx, dweight = _mm_grad(g, x, weight.t(), need_x, need_weight, ctx.backend)
        return dx if need_x else None, dweight.t() if need_weight else None, dbias, None, None, None


def linear_backward(
    main_grad: torch.Tensor | MainGrad,
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    need_x: bool,
    need_weight: bool,
    backend: str = "",
) -> torch.Tensor | None:
    """The backward of a linear layer whose forward has checked the operands: g @ weight, None where not needed.

    g.T @ x is added to main_grad, as by `accumulate_weight_grad`, where needed.

    Args:
        g: [T, N], contiguous. x: [T, K]. weight: [N, K]. All of one dtype. backend: of the forward.
    """
    unused = g.new_empty(0, dtype=torch.float32), True
    buffer, holds_sum = open_buffer(main_grad) if need_weight else unused
    dx = _linear_grad(buffer, g, x, weight, need_x, need_weight, backend, holds_sum)
    return dx if need_x else None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    main_grad: torch.Tensor | MainGrad | None = None,
    *,
    backend: str | None = None,
    bias_order: Literal["after_rounding", "in_accumulator"] = "after_rounding",
) -> torch.Tensor:
    """``x @ weight.T + bias`` as `torch.nn.functional.linear`.

    The GEMM is rounded before the bias is added: torch takes F.linear apart into a GEMM with a bias or one without, by
    the rank and the strides of x, and this is what both can agree on.

    Args:
        x: [..., K], bf16, fp16 or fp32. weight: [N, K], the dtype of x or fp32. bias: [N] or None.
        main_grad: fp32 [N, K], contiguous, or a `bi_ops.nn.MainGrad`, or None. If given, the weight's gradient is
            added to it in place and `weight.grad` stays as it is; see `accumulate_weight_grad`.
        backend: as `bi_ops.matmul.mm`.
        bias_order: "in_accumulator" adds the bias to the fp32 accumulator instead, and rounds once: other bits, which
            vLLM's batch-invariant linear has had since 0.32.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as `mm`.
    """
    if bias is None and main_grad is None and backend is None:
        out = through_binding(x, weight)
        if out is not None:
            return out
    check_operands("linear", x, weight, ("x", "weight"))
    checks.shape("linear", weight.ndim == 2, lambda: f"weight must be [N, K], got {list(weight.shape)}")
    checks.shape(
        "linear",
        x.ndim >= 1 and x.shape[-1] == weight.shape[1],
        lambda: (
            f"x {list(x.shape)} does not fit weight {list(weight.shape)}: x's last dimension must be {weight.shape[1]}"
        ),
    )
    if weight.dtype != torch.float32:
        checks.same_dtype("linear", x=x, weight=weight)
    if bias is not None:
        checks.tensor("linear", "bias", bias, ndim=1)
        checks.dtype("linear", "bias", bias)
        checks.same_device("linear", x=x, bias=bias)
        n = weight.shape[0]
        checks.shape("linear", bias.shape[0] == n, lambda: f"bias {list(bias.shape)} for {n} columns")
    orders = ("after_rounding", "in_accumulator")
    checks.shape("linear", bias_order in orders, lambda: f"bias_order is {bias_order!r}; it may be {orders}")
    in_accumulator = bias is not None and bias_order == "in_accumulator"
    name = check_backend("linear", x, backend)
    # A view of a matrix would be one more node, in both passes.
    rows = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if main_grad is not None:
        checks.main_grad("linear", "main_grad", main_grad, weight.shape, x.device)
    if main_grad is None and (bias is None or in_accumulator):
        out = _mm(rows, weight.t(), None if bias is None else bias.contiguous(), name)
    elif main_grad is None and (
        torch._C._are_functorch_transforms_active() or is_transformed()
    ):  # the same bits from two operators, which torch.func can see into
        out = add_bias(_mm(rows, weight.t(), None, name), bias)
    else:
        out = _Linear.apply(rows, weight, bias, main_grad, name, in_accumulator)
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], weight.shape[0])


def accumulate_weight_grad(main_grad: torch.Tensor | MainGrad, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Accumulate ``main_grad += grad.T @ x`` over the tokens in order, in place.

    The buffer is where the fp32 accumulator starts, so a batch cut into pieces ends in the bits of one pass, as long
    as every cut lies on a multiple of 16 tokens, the step in which tensor cores sum. Rows of zeros add exactly
    nothing: pad with them to get there.

    Args:
        main_grad: fp32 [N, K], contiguous, or a `bi_ops.nn.MainGrad`. grad: [T, N], x: [T, K], one dtype.

    Raises:
        TypeError, ValueError: as `mm`, or main_grad of another dtype, shape or layout.
    """
    op = "accumulate_weight_grad"
    check_operands(op, grad, x, ("grad", "x"))
    checks.same_dtype(op, grad=grad, x=x)
    ok = grad.ndim == 2 and x.ndim == 2 and grad.shape[0] == x.shape[0]
    checks.shape(op, ok, lambda: f"needs [T, N] and [T, K], got {list(grad.shape)} and {list(x.shape)}")
    checks.main_grad(op, "main_grad", main_grad, torch.Size((grad.shape[1], x.shape[1])), x.device)
    buffer, holds_sum = open_buffer(main_grad)
    _accumulate(buffer, grad, x, holds_sum)
