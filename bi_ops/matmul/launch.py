"""Launches of products on plain tensors, no autograd: the Triton kernels and cuBLASLt. All end in the same bits."""

from __future__ import annotations

import torch

from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.matmul import certificate, cublaslt
from bi_ops.matmul import schedule as sched
from bi_ops.matmul.kernels import matmul_kernel

_HALVES = (torch.bfloat16, torch.float16)


def launch_triton(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool = False,
    over_tokens: bool = False,
) -> None:
    """out[B, M, N] = a[B, M, K] @ b[B, K, N] (+ bias[N]) with the Triton kernel: any strides, any dtypes.

    accumulate: out is fp32 and where the accumulator starts. over_tokens: as `schedule`.
    """
    batch, m, k = a.shape
    n = b.shape[2]
    if batch == 0 or m == 0 or n == 0:
        return
    s = sched.schedule(m, n, k, a.dtype, over_tokens)
    # Strided views reach past their element count, so the test is on the furthest offset.
    large = any(sum((d - 1) * st for d, st in zip(t.shape, t.stride(), strict=True)) >= 2**31 for t in (a, b, out))
    grid = (cdiv(m, s.block_m) * cdiv(n, s.block_n), batch)
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
        ACCUMULATE=accumulate,
        EVEN_K=k % s.block_k == 0,
        LARGE=large,
        num_warps=s.num_warps,
        num_stages=s.num_stages,
    )


def _is_matrix(t: torch.Tensor) -> bool:
    """Rows or columns are contiguous, lie apart, and start at multiples of 16 bytes (of a 16-bit dtype)."""
    (r, c), (sr, sc) = t.shape, t.stride()
    if t.data_ptr() % 16:
        return False
    return (sc == 1 and sr >= c and sr % 8 == 0) or (sr == 1 and sc >= r and sc % 8 == 0)


def launch_cublaslt(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, free: certificate.Free
) -> bool:
    """out[M, N] = a @ b (+ bias) with cuBLASLt; False, and nothing done, where it may not or cannot.

    free: the axis whose length the batch sets; the certificate holds for every length.
    """
    if a.dtype not in _HALVES or out.numel() == 0 or a.shape[1] == 0 or not (_is_matrix(a) and _is_matrix(b)):
        return False
    if out.stride(0) * out.element_size() % 16 or (bias is not None and bias.dtype != out.dtype):
        return False
    product = certificate.Product(
        a.get_device(),
        a.dtype,
        out.dtype,
        free,
        out.shape[1],
        a.shape[1] if free == "m" else out.shape[0],
        a.stride(1) != 1,
        b.stride(1) != 1,
        bias is not None,
    )
    return bool(certificate.holds(product)) and cublaslt.extension().run(a, b, out, bias, -1, True)


def _hopper_serves(g: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> bool:
    """Can `hopper.launch` compute out += g.T @ x?"""
    if g.dtype not in _HALVES or not runtime.warp_specialised(g.device):
        return False
    stored = g.stride(1) == 1 and x.stride(1) == 1 and _is_matrix(g) and _is_matrix(x)
    return stored and out.data_ptr() % 16 == 0 and out.shape[1] % 4 == 0 and min(*g.shape, out.shape[1]) > 0


def launch_weight_grad(g: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """out[M, N] += g[T, M].T @ x[T, N], out fp32 and contiguous: the sum over T is carried on from what out holds."""
    if not _hopper_serves(g, x, out):
        launch_triton(g.t()[None], x[None], None, out[None], accumulate=True, over_tokens=True)
        return
    from bi_ops.matmul import hopper

    (tokens, m), n, processors = g.shape, x.shape[1], runtime.multiprocessors(out.device)
    hopper.launch(g, x, out, sched.carry_schedule(m, n, tokens, processors), processors)
