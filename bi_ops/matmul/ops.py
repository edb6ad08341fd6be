"""GEMMs: check, select, run, differentiate."""

from __future__ import annotations

import math
from typing import get_args

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.operators import custom_op
from bi_ops.matmul.backends import backends, gemm, gradient_backend, select
from bi_ops.matmul.launch import launch_triton
from bi_ops.matmul.order import BiasOrder, GemmOrder, Problem

# --------------------------------------------------------------------------------------------------------------
# custom operators. backend: a name, "" for the default selection


def _is_transposed(b: torch.Tensor) -> bool:
    """b is a [N, K] weight seen as [K, N]; its gradient should be laid out the same way."""
    return b.stride(0) == 1 and b.stride(1) != 1


def _grad_b(a: torch.Tensor, g: torch.Tensor, b: torch.Tensor, backend: str | None) -> torch.Tensor:
    """a.T @ g, the sum over rows in row order, laid out like b and in b's dtype."""
    if _is_transposed(b):
        return gemm(g.t(), a, None, b.dtype, "k", backend).t()
    return gemm(a.t(), g, None, b.dtype, "k", backend)


@custom_op("bi_ops::mm")
def _mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, backend: str) -> torch.Tensor:
    if b.dtype != a.dtype:
        b = b.to(a.dtype)  # an fp32 master weight under a bf16 forward
    return gemm(a, b, bias, backend=backend or None)


@_mm.register_fake
def _(a, b, bias, backend):
    return a.new_empty((a.shape[0], b.shape[1]))


@custom_op("bi_ops::mm_backward")
def _mm_grad(
    g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, need_a: bool, need_b: bool, backend: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a[M, K] @ b[K, N]: g @ b.T and a.T @ g; an empty tensor where not needed."""
    name = gradient_backend(backend)
    grad_a = gemm(g, b.to(g.dtype).t(), backend=name) if need_a else g.new_empty(0)
    grad_b = _grad_b(a, g, b, name) if need_b else g.new_empty(0)
    return grad_a, grad_b


@_mm_grad.register_fake
def _(g, a, b, need_a, need_b, backend=""):
    grad_a = g.new_empty(a.shape) if need_a else g.new_empty(0)
    if not need_b:
        return grad_a, g.new_empty(0)
    return grad_a, b.new_empty(b.shape[::-1]).t() if _is_transposed(b) else b.new_empty(b.shape)


def _mm_setup(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _mm_backward(ctx, g):
    a, b, bias = ctx.saved_tensors
    need_a, need_b, need_bias, _ = ctx.needs_input_grad
    grad_a, grad_b = _mm_grad(g, a, b, need_a, need_b, ctx.backend)
    grad_bias = bias_grad(g).to(bias.dtype) if need_bias else None
    return grad_a if need_a else None, grad_b if need_b else None, grad_bias, None


_mm.register_autograd(_mm_backward, setup_context=_mm_setup)


def _mm_grad_setup(ctx, inputs, output):
    *tensors, ctx.need_a, ctx.need_b, _ = inputs
    ctx.save_for_backward(*tensors)


def _mm_grad_backward(ctx, h_a, h_b):
    """Gradients of (g @ b.T, a.T @ g), for a gradient of a gradient. h_a [M, K], h_b [K, N]."""
    g, a, b = ctx.saved_tensors
    grad_g, grad_a, grad_b = None, None, None
    if ctx.need_a:
        grad_g, grad_b = mm(h_a, b), mm(h_a.t(), g).to(b.dtype)
    if ctx.need_b:
        h_b = h_b.to(g.dtype)
        grad_a, part = mm(g, h_b.t()), mm(a, h_b)
        grad_g = part if grad_g is None else grad_g + part
    return grad_g, grad_a, grad_b, None, None, None


_mm_grad.register_autograd(_mm_grad_backward, setup_context=_mm_grad_setup)


def bias_grad(g: torch.Tensor) -> torch.Tensor:
    """The sum of g[T, N] over its rows: a GEMM with ones has the fixed row order of dB."""
    return _mm(g.new_ones(1, g.shape[0]), g, None, "triton")[0]


@custom_op("bi_ops::add_bias")
def add_bias(out: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """out [T, N] + bias [N], whose gradient is summed in row order (torch's own sum depends on the row count)."""
    return out + bias.to(out.dtype)


@add_bias.register_fake
def _(out, bias):
    return torch.empty_like(out)


def _add_bias_setup(ctx, inputs, output):
    ctx.bias_dtype = inputs[1].dtype


def _add_bias_backward(ctx, g):
    return g, bias_grad(g).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None


add_bias.register_autograd(_add_bias_backward, setup_context=_add_bias_setup)


@custom_op("bi_ops::bmm")
def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    launch_triton(a, b, None, out)
    return out


@_bmm.register_fake
def _(a, b):
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


def _bmm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _bmm_backward(ctx, g):
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return _bmm(g, b.mT) if need_a else None, _bmm(a.mT, g) if need_b else None


_bmm.register_autograd(_bmm_backward, setup_context=_bmm_setup)


# --------------------------------------------------------------------------------------------------------------
# public functions


def check_operands(op: str, a: torch.Tensor, b: torch.Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    for name, t in zip(names, (a, b), strict=True):
        checks.tensor(op, name, t)
        checks.dtype(op, name, t)
    checks.same_device(op, **{names[0]: a, names[1]: b})


def check_backend(op: str, a: torch.Tensor, backend: str | None) -> str:
    """The name that a custom operator takes. Raises as `bi_ops.core.backends.Backends.select`."""
    checks.backend_name(op, backend)
    if backend is None or torch.compiler.is_compiling():  # a trace keeps the name; the operator asks when it runs
        return backend or ""
    return select(a.dtype, a.device, backend).name


def check_batched(op: str, backend: str | None) -> None:
    """Batches of matrices have the Triton kernel alone: raise if another backend is named."""
    checks.backend_name(op, backend)
    if backend is not None and backends.get(backend).name != "triton":
        raise RuntimeError(
            f"{op}: backend {backend!r} cannot serve batches of matrices; leave it out, or name 'triton'"
        )


def backend_of(dtype: torch.dtype, device: torch.device) -> str:
    """The name of the backend that computes GEMMs of this dtype unless another is named.

    Raises TypeError for another dtype, or what is no device.
    """
    checks.result_dtype("matmul.backend_of", dtype)
    checks.device("matmul.backend_of", device)
    return select(dtype, device).name


def order_of(
    dtype: torch.dtype, bias: BiasOrder = "none", backend: str | None = None, device: torch.device | None = None
) -> GemmOrder:
    """The order in which GEMMs of this dtype are computed; bias: when one is added, if there is one.

    Raises:
        TypeError: another dtype, or an argument of another type. ValueError: no such backend or bias. RuntimeError: the
            backend cannot serve here.
    """
    op = "matmul.order_of"
    checks.result_dtype(op, dtype)
    checks.shape(op, bias in get_args(BiasOrder), lambda: f"bias is {bias!r}; it may be {get_args(BiasOrder)}")
    checks.backend_name(op, backend)
    if device is not None:
        checks.device(op, device)
    arch = arches.current() if device is None else arches.of(device)
    problem = Problem(dtype, bias=bias)
    return backends.select(problem, arch, backend).order(problem, arch)


def _check_matrices(op: str, a: torch.Tensor, b: torch.Tensor) -> None:
    check_operands(op, a, b)
    checks.shape(op, a.ndim == 2 and b.ndim == 2, lambda: f"needs 2-D tensors, got {list(a.shape)} and {list(b.shape)}")
    checks.shape(op, a.shape[1] == b.shape[0], lambda: f"inner dimensions differ: {list(a.shape)} @ {list(b.shape)}")
    if b.dtype != torch.float32:
        checks.same_dtype(op, a=a, b=b)


def mm(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """``a @ b``, or with a bias `addmm`; each row the same bits whatever rows stand beside it.

    Args:
        a: [M, K], bf16, fp16 or fp32, any strides.
        b: [K, N], the dtype of `a` (or fp32, a master weight: it is cast to the dtype of `a` first and its gradient
            comes back in fp32, rounded once).
        bias: [N], added after the rounding, as by `linear`.
        backend: a name of `bi_ops.matmul.backends`; None: the fastest that can run here. All have the same bits.

    Returns:
        [M, N] in the dtype of `a`.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: wrong rank, device or inner dimensions, or an
        unknown backend. RuntimeError: the named backend cannot serve this dtype, or not here.
    """
    _check_matrices("mm", a, b)
    if bias is not None:
        checks.tensor("mm", "bias", bias, ndim=1)
        checks.dtype("mm", "bias", bias)
        checks.same_device("mm", a=a, bias=bias)
        checks.shape("mm", bias.shape[0] == b.shape[1], lambda: f"bias {list(bias.shape)} for {b.shape[1]} columns")
    out = _mm(a, b, None, check_backend("mm", a, backend))
    return out if bias is None else add_bias(out, bias)


def addmm(
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    backend: str | None = None,
) -> torch.Tensor:
    """``beta * bias + alpha * (a @ b)`` as `torch.addmm`, the product rounded before anything is done to it.

    torch turns `F.linear` into addmm or into a product and an addition by the rank and the strides of its input, so
    only an addition after the rounding, which is what `linear` does, gives one result.

    Args:
        bias: [N] or [M, N], not looked at if beta is 0. a: [M, K]. b: [K, N]. backend: as `mm`.

    Raises:
        TypeError, ValueError: as `mm`, and for a bias of another shape.
    """
    _check_matrices("addmm", a, b)
    beta, alpha = checks.real("addmm", "beta", beta), checks.real("addmm", "alpha", alpha)
    out = _mm(a, b, None, check_backend("addmm", a, backend))
    checks.tensor("addmm", "bias", bias)
    checks.dtype("addmm", "bias", bias)
    checks.same_device("addmm", a=a, bias=bias)
    fits = bias.shape in (out.shape[1:], out.shape)
    checks.shape("addmm", fits, lambda: f"bias {list(bias.shape)} for {list(out.shape)}; it must be [N] or [M, N]")
    if alpha != 1:
        out = out * alpha
    if beta == 0:
        return out
    bias = bias if beta == 1 else bias * beta
    return add_bias(out, bias) if bias.ndim == 1 else out + bias.to(out.dtype)


def bmm(a: torch.Tensor, b: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """``a[i] @ b[i]`` for every i; a [B, M, K], b [B, K, N], one dtype; out [B, M, N]. Raises as `mm`.

    backend: None or "triton", the one that computes batches.
    """
    check_operands("bmm", a, b)
    check_batched("bmm", backend)
    ok = a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    checks.shape("bmm", ok, lambda: f"needs [B, M, K] and [B, K, N], got {list(a.shape)} and {list(b.shape)}")
    checks.same_dtype("bmm", a=a, b=b)
    return _bmm(a, b)


def matmul(a: torch.Tensor, b: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """`torch.matmul` under the contract: 1-D to N-D, leading dimensions broadcast. Raises as `mm`.

    backend: as `mm` where b has one or two dimensions, else as `bmm`.
    """
    check_operands("matmul", a, b)
    checks.same_dtype("matmul", a=a, b=b)
    checks.shape("matmul", a.ndim > 0 and b.ndim > 0, "0-dimensional tensors have no product; use a * b")
    a2 = a[None] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    checks.shape(
        "matmul", a2.shape[-1] == b2.shape[-2], lambda: f"inner dimensions differ: {list(a.shape)} @ {list(b.shape)}"
    )
    if b2.ndim == 2:
        out = _mm(a2.reshape(math.prod(a2.shape[:-1]), a2.shape[-1]), b2, None, check_backend("matmul", a, backend))
        out = out.reshape(*a2.shape[:-1], b2.shape[1])
    else:
        check_batched("matmul", backend)
        lead = torch.broadcast_shapes(a2.shape[:-2], b2.shape[:-2])
        a3 = a2.expand(*lead, *a2.shape[-2:]).reshape(math.prod(lead), *a2.shape[-2:])
        b3 = b2.expand(*lead, *b2.shape[-2:]).reshape(math.prod(lead), *b2.shape[-2:])
        out = _bmm(a3, b3).reshape(*lead, a2.shape[-2], b2.shape[-1])
    if a.ndim == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if b.ndim == 1 else out
