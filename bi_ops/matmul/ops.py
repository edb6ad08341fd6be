"""Products: check, allocate, launch, differentiate."""

from __future__ import annotations

import functools
import math

import torch

from bi_ops.core import checks, runtime
from bi_ops.core.operators import custom_op, dispatcher_is_watched, is_plain
from bi_ops.core.providers import Availability, Provider, ProviderTable, vllm_availability
from bi_ops.matmul import certificate, cublaslt
from bi_ops.matmul.launch import launch_cublaslt, launch_triton, launch_weight_grad


def _vllm_available() -> Availability:
    if runtime.INTERPRET:
        return Availability(False, "no GPU: vLLM's kernels need one")
    return vllm_availability()


def _triton_available() -> Availability:
    where = "Triton's interpreter" if runtime.INTERPRET else "Triton"
    return Availability(True, f"{where}, same bits as vLLM's kernel on Hopper")


@functools.cache
def _cublaslt_available() -> Availability:
    if runtime.INTERPRET:
        return Availability(False, "no GPU: cuBLASLt needs one")
    if runtime.architecture() != "sm_90":
        return Availability(
            False, f"the canonical order of tensor cores was shown on sm_90, not {runtime.architecture()}"
        )
    return cublaslt.availability()


#: Who computes products. All have the same bits on Hopper, so the order of preference is that of speed.
providers = ProviderTable(
    "matmul",
    (
        Provider("cublaslt", _cublaslt_available, True, "no split-K, each shape certified; bf16 and fp16"),
        Provider("triton", _triton_available, True, "own kernel, every dtype and layout"),
        Provider("vllm", _vllm_available, True, "vllm matmul_persistent; bf16 and fp16 forward"),
    ),
)


# --------------------------------------------------------------------------------------------------------------
# products of two matrices


def _mm_out(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    free: certificate.Free = "m",
    provider: str | None = None,
) -> torch.Tensor:
    """a[M, K] @ b[K, N], rounded once to `out_dtype`; `free` is the axis that the batch sets."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)
    if (provider or providers.choose()) != "cublaslt" or not launch_cublaslt(a, b, bias, out, free):
        launch_triton(a[None], b[None], bias, out[None], over_tokens=free == "k")
    return out


def _is_transposed(b: torch.Tensor) -> bool:
    """b is a [N, K] weight seen as [K, N]; its gradient should be laid out the same way."""
    return b.stride(0) == 1 and b.stride(1) != 1


def _grad_b(a: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a.T @ g, the sum over rows in row order, laid out like b and in b's dtype."""
    if _is_transposed(b):
        return _mm_out(g.t(), a, out_dtype=b.dtype, free="k").t()
    return _mm_out(a.t(), g, out_dtype=b.dtype, free="k")


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::mm")
def _mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, provider: str) -> torch.Tensor:
    if b.dtype != a.dtype:
        b = b.to(a.dtype)  # an fp32 master weight under a bf16 forward
    if provider == "vllm" and a.dtype in (torch.bfloat16, torch.float16) and min(a.shape) > 0:
        from vllm.model_executor.layers.batch_invariant import matmul_persistent

        return matmul_persistent(a, b, bias)
    return _mm_out(a, b, bias, provider=provider)


@_mm.register_fake
def _(a, b, bias, provider):
    return a.new_empty((a.shape[0], b.shape[1]))


@custom_op("bi_ops::mm_backward")
def _mm_grad(
    g: torch.Tensor, a: torch.Tensor, b: torch.Tensor, need_a: bool, need_b: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a[M, K] @ b[K, N]: g @ b.T and a.T @ g; an empty tensor where not needed."""
    grad_a = _mm_out(g, b.to(g.dtype).t()) if need_a else g.new_empty(0)
    grad_b = _grad_b(a, g, b) if need_b else g.new_empty(0)
    return grad_a, grad_b


@_mm_grad.register_fake
def _(g, a, b, need_a, need_b):
    grad_a = g.new_empty(a.shape) if need_a else g.new_empty(0)
    if not need_b:
        return grad_a, g.new_empty(0)
    return grad_a, b.new_empty(b.shape[::-1]).t() if _is_transposed(b) else b.new_empty(b.shape)


def _mm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _mm_backward(ctx, g):
    a, b, bias = ctx.saved_tensors
    need_a, need_b, need_bias, _ = ctx.needs_input_grad
    grad_a, grad_b = _mm_grad(g, a, b, need_a, need_b)
    # A bias sums g over rows: a product with ones has the same fixed row order as dB.
    grad_bias = _mm(g.new_ones(1, g.shape[0]), g, None, "triton")[0].to(bias.dtype) if need_bias else None
    return grad_a if need_a else None, grad_b if need_b else None, grad_bias, None


_mm.register_autograd(_mm_backward, setup_context=_mm_setup)


def _mm_grad_setup(ctx, inputs, output):
    *tensors, ctx.need_a, ctx.need_b = inputs
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
    return grad_g, grad_a, grad_b, None, None


_mm_grad.register_autograd(_mm_grad_backward, setup_context=_mm_grad_setup)


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


@custom_op("bi_ops::accumulate_weight_grad", mutates_args={"main_grad"})
def _accumulate(main_grad: torch.Tensor, g: torch.Tensor, x: torch.Tensor) -> None:
    launch_weight_grad(g, x, main_grad)


@_accumulate.register_fake
def _(main_grad, g, x):
    return None


@custom_op("bi_ops::linear_backward", mutates_args={"main_grad"})
def _linear_grad(
    main_grad: torch.Tensor, g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool
) -> torch.Tensor:
    """Gradients of x[T, K] @ weight[N, K].T: g @ weight, empty where not needed, and g.T @ x, added to main_grad."""
    if need_weight:
        launch_weight_grad(g, x, main_grad)
    return _mm_out(g, weight) if need_x else g.new_empty(0)


@_linear_grad.register_fake
def _(main_grad, g, x, weight, need_x, need_weight):
    return g.new_empty(x.shape if need_x else 0)


def _through_binding(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """x @ weight.T in C++, without Python's cost per call, gradient included. None: the operator has to be called.

    That is where the shape has no certificate yet or is not for cuBLASLt, and where an `Operator` would go through the
    dispatcher.
    """
    if dispatcher_is_watched() or not (is_plain(x) and is_plain(weight)):
        return None
    return cublaslt.extension().linear(x, weight) if providers.choose() == "cublaslt" else None


class _LinearIntoBuffer(torch.autograd.Function):
    """x @ weight.T whose weight gradient goes into a buffer and not to autograd."""

    @staticmethod
    def forward(ctx, x, weight, main_grad):
        weight = weight.to(x.dtype)  # once for both passes; the rounded weight stays in memory until the second
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad
        out = _through_binding(x, weight)
        return _mm(x, weight.t(), None, providers.choose()) if out is None else out

    @staticmethod
    def backward(ctx, g):
        need_x, need_weight, _ = ctx.needs_input_grad
        dx = _linear_grad(ctx.main_grad, g.contiguous(), *ctx.saved_tensors, need_x, need_weight)
        return dx if need_x else None, None, None


# --------------------------------------------------------------------------------------------------------------
# public functions


def _check(op: str, a: torch.Tensor, b: torch.Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    for name, t in zip(names, (a, b), strict=True):
        checks.tensor(op, name, t)
        checks.dtype(op, name, t)
    checks.same_device(op, **{names[0]: a, names[1]: b})


def mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b``, or with a bias `addmm`; each row the same bits whatever rows stand beside it.

    Args:
        a: [M, K], bf16, fp16 or fp32, any strides.
        b: [K, N], the dtype of `a` (or fp32, a master weight: it is cast to the dtype of `a` first and its gradient
            comes back in fp32, rounded once).
        bias: [N], added after the rounding, as by `linear`.

    Returns:
        [M, N] in the dtype of `a`.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: wrong rank, device or inner dimensions.
    """
    _check("mm", a, b)
    checks.shape(
        "mm", a.ndim == 2 and b.ndim == 2, lambda: f"needs 2-D tensors, got {list(a.shape)} and {list(b.shape)}"
    )
    checks.shape("mm", a.shape[1] == b.shape[0], lambda: f"inner dimensions differ: {list(a.shape)} @ {list(b.shape)}")
    if b.dtype != torch.float32:
        checks.same_dtype("mm", a=a, b=b)
    if bias is not None:
        checks.tensor("mm", "bias", bias, ndim=1)
        checks.dtype("mm", "bias", bias)
        checks.same_device("mm", a=a, bias=bias)
        checks.shape("mm", bias.shape[0] == b.shape[1], lambda: f"bias {list(bias.shape)} for {b.shape[1]} columns")
    out = _mm(a, b, None, providers.choose())
    return out if bias is None else _AddBias.apply(out, bias)


def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """``beta * bias + alpha * (a @ b)`` as `torch.addmm`, the product rounded before anything is done to it.

    torch turns `F.linear` into addmm or into a product and an addition by the rank and the strides of its input, so
    only an addition after the rounding, which is what `linear` does, gives one result.

    Args:
        bias: [N] or [M, N], not looked at if beta is 0. a: [M, K]. b: [K, N]. See `mm`.

    Raises:
        TypeError, ValueError: as `mm`, and for a bias of another shape.
    """
    out = mm(a, b)
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
    return _AddBias.apply(out, bias) if bias.ndim == 1 else out + bias.to(out.dtype)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, main_grad: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias`` as `torch.nn.functional.linear`.

    The product is rounded before the bias is added, as in vLLM's batch-invariant linear.

    Args:
        x: [..., K], bf16, fp16 or fp32. weight: [N, K], the dtype of x or fp32. bias: [N] or None.
        main_grad: fp32 [N, K], contiguous, or None. If given, the weight's gradient is added to it in place and
            `weight.grad` stays as it is; see `accumulate_weight_grad`.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError: as `mm`.
    """
    if bias is None and main_grad is None:
        out = _through_binding(x, weight)
        if out is not None:
            return out
    _check("linear", x, weight, ("x", "weight"))
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
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # a view would be one more node, in both passes
    if main_grad is None:
        out = _mm(rows, weight.t(), None, providers.choose())
    else:
        checks.main_grad("linear", "main_grad", main_grad, weight.shape, x.device)
        out = _LinearIntoBuffer.apply(rows, weight, main_grad)
    if x.ndim != 2:
        out = out.reshape(*x.shape[:-1], weight.shape[0])
    return out if bias is None else _AddBias.apply(out, bias)


def accumulate_weight_grad(main_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Carry the sum ``main_grad += grad.T @ x`` on, over the tokens in order, in place.

    The buffer is where the fp32 accumulator starts, so a batch cut into pieces ends in the bits of one pass, as long
    as every cut lies on a multiple of 16 tokens, the step in which tensor cores sum. Rows of zeros add exactly
    nothing: pad with them to get there.

    Args:
        main_grad: fp32 [N, K], contiguous. grad: [T, N], x: [T, K], one dtype.

    Raises:
        TypeError, ValueError: as `mm`, or main_grad of another dtype, shape or layout.
    """
    op = "accumulate_weight_grad"
    _check(op, grad, x, ("grad", "x"))
    checks.same_dtype(op, grad=grad, x=x)
    ok = grad.ndim == 2 and x.ndim == 2 and grad.shape[0] == x.shape[0]
    checks.shape(op, ok, lambda: f"needs [T, N] and [T, K], got {list(grad.shape)} and {list(x.shape)}")
    checks.main_grad(op, "main_grad", main_grad, torch.Size((grad.shape[1], x.shape[1])), x.device)
    _accumulate(main_grad, grad, x)


class _AddBias(torch.autograd.Function):
    """out + bias, with the bias gradient summed in row order (torch's own sum depends on the row count)."""

    @staticmethod
    def forward(ctx, out, bias):
        ctx.bias_dtype = bias.dtype
        return out + bias.to(out.dtype)

    @staticmethod
    def backward(ctx, g):
        rows = g.reshape(-1, g.shape[-1])
        return g, _mm(rows.new_ones(1, rows.shape[0]), rows, None, "triton")[0].to(ctx.bias_dtype)


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a[i] @ b[i]`` for every i; a [B, M, K], b [B, K, N], one dtype; out [B, M, N]. Raises as `mm`."""
    _check("bmm", a, b)
    ok = a.ndim == 3 and b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1]
    checks.shape("bmm", ok, lambda: f"needs [B, M, K] and [B, K, N], got {list(a.shape)} and {list(b.shape)}")
    checks.same_dtype("bmm", a=a, b=b)
    return _bmm(a, b)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.matmul` under the contract: 1-D to N-D, leading dimensions broadcast. Raises as `mm`."""
    _check("matmul", a, b)
    checks.same_dtype("matmul", a=a, b=b)
    checks.shape("matmul", a.ndim > 0 and b.ndim > 0, "0-dimensional tensors have no product; use a * b")
    a2 = a[None] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    checks.shape(
        "matmul", a2.shape[-1] == b2.shape[-2], lambda: f"inner dimensions differ: {list(a.shape)} @ {list(b.shape)}"
    )
    if b2.ndim == 2:
        out = _mm(a2.reshape(-1, a2.shape[-1]), b2, None, providers.choose())
        out = out.reshape(*a2.shape[:-1], b2.shape[1])
    else:
        lead = torch.broadcast_shapes(a2.shape[:-2], b2.shape[:-2])
        a3 = a2.expand(*lead, *a2.shape[-2:]).reshape(math.prod(lead), *a2.shape[-2:])
        b3 = b2.expand(*lead, *b2.shape[-2:]).reshape(math.prod(lead), *b2.shape[-2:])
        out = _bmm(a3, b3).reshape(*lead, a2.shape[-2], b2.shape[-1])
    if a.ndim == 1:
        out = out.squeeze(-2)
    return out.squeeze(-1) if b.ndim == 1 else out
