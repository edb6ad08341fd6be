"""Products: check, allocate, launch, differentiate."""

from __future__ import annotations

import math

import torch
import triton

from bi_ops._common import checks, runtime
from bi_ops._common.providers import Availability, Provider, ProviderTable, vllm_availability
from bi_ops.matmul import schedule as sched
from bi_ops.matmul.kernels import matmul_kernel


def _vllm_available() -> Availability:
    if runtime.INTERPRET:
        return Availability(False, "no GPU: vLLM's kernels need one")
    return vllm_availability()


def _triton_available() -> Availability:
    where = "Triton's interpreter" if runtime.INTERPRET else "Triton"
    return Availability(True, f"{where}, same bits as vLLM's kernel on Hopper")


#: Who computes products. Both have the same bits on Hopper; vLLM's is the one rollouts use.
providers = ProviderTable(
    "matmul",
    (
        Provider("vllm", _vllm_available, True, "vllm matmul_persistent; bf16 and fp16 forward"),
        Provider("triton", _triton_available, True, "own kernel, every dtype and layout"),
    ),
)


# --------------------------------------------------------------------------------------------------------------
# launch


def _launch(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out[B, M, N] = a[B, M, K] @ b[B, K, N] (+ bias[N]) with the Triton kernel; any strides."""
    batch, m, k = a.shape
    n = b.shape[2]
    if batch == 0 or m == 0 or n == 0:
        return
    s = sched.schedule(m, n, k, a.dtype)
    # Strided views reach past their element count, so the test is on the furthest offset.
    large = any(sum((d - 1) * st for d, st in zip(t.shape, t.stride(), strict=True)) >= 2**31 for t in (a, b, out))
    grid = (triton.cdiv(m, s.block_m) * triton.cdiv(n, s.block_n), batch)
    matmul_kernel[grid](
        a,
        b,
        bias,
        out,
        m,
        n,
        k,
        *a.stride(),
        *b.stride(),
        *out.stride(),
        BLOCK_M=s.block_m,
        BLOCK_N=s.block_n,
        BLOCK_K=s.block_k,
        GROUP_M=s.group_m,
        HAS_BIAS=bias is not None,
        LARGE=large,
        num_warps=s.num_warps,
        num_stages=s.num_stages,
    )


def _mm_out(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """a[M, K] @ b[K, N] by the Triton kernel, rounded once to `out_dtype`."""
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)
    _launch(a[None], b[None], bias, out[None])
    return out


def _is_transposed(b: torch.Tensor) -> bool:
    """b is a [N, K] weight seen as [K, N]; its gradient should be laid out the same way."""
    return b.stride(0) == 1 and b.stride(1) != 1


def _grad_b(a: torch.Tensor, g: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a.T @ g, the sum over rows in row order, laid out like b and in b's dtype."""
    if _is_transposed(b):
        return _mm_out(g.t(), a, out_dtype=b.dtype).t()
    return _mm_out(a.t(), g, out_dtype=b.dtype)


# --------------------------------------------------------------------------------------------------------------
# custom operators


@torch.library.custom_op("bi_ops::mm", mutates_args=())
def _mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, provider: str) -> torch.Tensor:
    if b.dtype != a.dtype:
        b = b.to(a.dtype)  # an fp32 master weight under a bf16 forward
    if provider == "vllm" and a.dtype in (torch.bfloat16, torch.float16) and min(a.shape) > 0:
        from vllm.model_executor.layers.batch_invariant import matmul_persistent

        return matmul_persistent(a, b, bias)
    return _mm_out(a, b, bias)


@_mm.register_fake
def _(a, b, bias, provider):
    return a.new_empty((a.shape[0], b.shape[1]))


@torch.library.custom_op("bi_ops::mm_backward", mutates_args=())
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


@torch.library.custom_op("bi_ops::bmm", mutates_args=())
def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty((a.shape[0], a.shape[1], b.shape[2]))
    _launch(a, b, None, out)
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


def _check(op: str, a: torch.Tensor, b: torch.Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    for name, t in zip(names, (a, b), strict=True):
        checks.tensor(op, name, t)
        checks.dtype(op, name, t)
    checks.same_device(op, **{names[0]: a, names[1]: b})


def mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b (+ bias)``, each row the same bits whatever rows stand beside it.

    Args:
        a: [M, K], bf16, fp16 or fp32, any strides.
        b: [K, N], the dtype of `a` (or fp32, a master weight: it is cast to the dtype of `a` first and its gradient
            comes back in fp32, rounded once).
        bias: [N], added to the fp32 accumulator before rounding.

    Returns:
        [M, N] in the dtype of `a`.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: wrong rank, device or inner dimensions.
    """
    _check("mm", a, b)
    checks.shape("mm", a.ndim == 2 and b.ndim == 2, f"needs 2-D tensors, got {list(a.shape)} and {list(b.shape)}")
    checks.shape("mm", a.shape[1] == b.shape[0], f"inner dimensions differ: {list(a.shape)} @ {list(b.shape)}")
    if b.dtype != torch.float32:
        checks.same_dtype("mm", a=a, b=b)
    if bias is not None:
        checks.tensor("mm", "bias", bias, ndim=1)
        checks.dtype("mm", "bias", bias)
        checks.shape("mm", bias.shape[0] == b.shape[1], f"bias {list(bias.shape)} for {b.shape[1]} columns")
    return _mm(a, b, bias, providers.choose())


def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``bias + a @ b`` with the bias added before rounding; bias [N], a [M, K], b [K, N]. See `mm`."""
    return mm(a, b, bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` as `torch.nn.functional.linear`.

    The product is rounded before the bias is added, as in vLLM's batch-invariant linear.

    Args:
        x: [..., K], bf16, fp16 or fp32. weight: [N, K], the dtype of x or fp32. bias: [N] or None.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError, ValueError: as `mm`.
    """
    _check("linear", x, weight, ("x", "weight"))
    checks.shape("linear", weight.ndim == 2, f"weight must be [N, K], got {list(weight.shape)}")
    checks.shape(
        "linear",
        x.ndim >= 1 and x.shape[-1] == weight.shape[1],
        f"x {list(x.shape)} does not fit weight {list(weight.shape)}: x's last dimension must be {weight.shape[1]}",
    )
    if weight.dtype != torch.float32:
        checks.same_dtype("linear", x=x, weight=weight)
    out = _mm(x.reshape(-1, x.shape[-1]), weight.t(), None, providers.choose())
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    if bias is None:
        return out
    checks.shape("linear", bias.shape == weight.shape[:1], f"bias {list(bias.shape)} for {weight.shape[0]} columns")
    return _AddBias.apply(out, bias)


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
    checks.shape("bmm", ok, f"needs [B, M, K] and [B, K, N], got {list(a.shape)} and {list(b.shape)}")
    checks.same_dtype("bmm", a=a, b=b)
    return _bmm(a, b)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.matmul` under the contract: 1-D to N-D, leading dimensions broadcast. Raises as `mm`."""
    _check("matmul", a, b)
    checks.same_dtype("matmul", a=a, b=b)
    checks.shape("matmul", a.ndim > 0 and b.ndim > 0, "0-dimensional tensors have no product; use a * b")
    a2 = a[None] if a.ndim == 1 else a
    b2 = b[:, None] if b.ndim == 1 else b
    checks.shape("matmul", a2.shape[-1] == b2.shape[-2], f"inner dimensions differ: {list(a.shape)} @ {list(b.shape)}")
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
