"""Launches of bi_ops' own GEMM kernels on plain tensors, no autograd."""

from __future__ import annotations

import torch

from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import recorded
from bi_ops.core.limits import GRID_YZ, SMALL, is_large
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.core.triton_helpers import PINNED
from bi_ops.matmul.config import GemmConfig, WgradConfig, WgradTileConfig, gemm_config, wgrad_config
from bi_ops.matmul.kernels import matmul_kernel
from bi_ops.matmul.order import GemmOrder, Problem
from bi_ops.matmul.order import order as order_of

#: Dtypes that the tensor cores multiply.
TENSOR_CORE_DTYPES = (torch.bfloat16, torch.float16)


def launch_triton(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    accumulate: bool = False,
    over_tokens: bool = False,
    order: GemmOrder | None = None,
    config: GemmConfig | None = None,
) -> None:
    """out[B, M, N] = a[B, M, K] @ b[B, K, N] (+ bias[N]) with the Triton kernel: any strides, any dtypes.

    accumulate: out is fp32 and where the accumulator starts. over_tokens: K counts tokens. order, config: None for
    those of `order.order` and `config.gemm_config`.
    """
    batch, m, k = a.shape
    n = b.shape[2]
    if batch == 0 or m == 0 or n == 0:
        return
    if batch > GRID_YZ:
        for i in range(0, batch, GRID_YZ):
            part = slice(i, i + GRID_YZ)
            launch_triton(a[part], b[part], bias, out[part], accumulate, over_tokens, order, config)
        return
    arch = arches.of(a.device)
    order = order or order_of(Problem(a.dtype, over_tokens), arch)
    config = config or gemm_config(m, n, a.dtype, arch)
    block_k = order.block_k(config.block_k)
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n), batch)
    recorded(matmul_kernel)[grid](
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
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=order.block_k(config.block_k),
        GROUP_M=config.group_m,
        HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate,
        EVEN_K=k % block_k == 0,
        # M is the batch but in weight gradients, and a batch compiles nothing anew.
        EVEN_M=over_tokens and along(a, 1) and m % config.block_m == 0,
        EVEN_N=along(b, 2) and n % config.block_n == 0,
        LARGE=is_large(a, b, out),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **PINNED,
    )


def along(t: torch.Tensor, axis: int) -> bool:
    """Are operands of the tensor cores, a batch of matrices, contiguous along this axis alone?"""
    return t.dtype in TENSOR_CORE_DTYPES and t.stride(axis) == 1 and t.stride(3 - axis) != 1


def is_matrix(t: torch.Tensor) -> bool:
    """Rows or columns are contiguous, lie apart, and start at multiples of 16 bytes (of a 16-bit dtype)."""
    (r, c), (sr, sc) = t.shape, t.stride()
    if t.data_ptr() % 16:
        return False
    return (sc == 1 and sr >= c and sr % 8 == 0) or (sr == 1 and sc >= r and sc % 8 == 0)


def hopper_serves(g: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> bool:
    """Can `hopper.launch` compute out += g.T @ x?"""
    if g.dtype not in TENSOR_CORE_DTYPES or not arches.of(g.device).gluon:
        return False
    if max(*g.shape, out.shape[1]) >= SMALL:  # TMA has coordinates in 32 bits
        return False
    stored = g.stride(1) == 1 and x.stride(1) == 1 and is_matrix(g) and is_matrix(x)
    return stored and out.data_ptr() % 16 == 0 and out.shape[1] % 4 == 0 and min(*g.shape, out.shape[1]) > 0


def launch_wgrad(
    g: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    config: WgradConfig | WgradTileConfig | None = None,
    accumulate: bool = True,
) -> None:
    """out[M, N] += g[T, M].T @ x[T, N], out fp32 and contiguous: the sum over T goes on from what out holds.

    accumulate: False begins from zero, with the bits of an out that holds zeros, and reads nothing of it.
    """
    if not hopper_serves(g, x, out):
        launch_triton(g.t()[None], x[None], None, out[None], accumulate=accumulate, over_tokens=True)
        return
    from bi_ops.matmul import hopper, hopper_tile

    (tokens, m), n, num_sms = g.shape, x.shape[1], runtime.multiprocessors(out.device)
    config = config or wgrad_config(m, n, tokens, num_sms)
    assert config.block_t % TOKEN_STEP == 0  # the order's step: `order.order` over tokens
    if isinstance(config, WgradTileConfig):
        hopper_tile.launch(g, x, out, config, accumulate)
    else:
        hopper.launch(g, x, out, config, num_sms, accumulate)
