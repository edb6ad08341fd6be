"""Gated activations: check, allocate, launch, differentiate."""

from __future__ import annotations

import torch

from bi_ops.activation.config import TileConfig, tile_config
from bi_ops.activation.kernels import silu_and_mul_backward_kernel, silu_and_mul_kernel
from bi_ops.core import arch as arches
from bi_ops.core import checks, pdl
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, recorded
from bi_ops.core.limits import SMALL
from bi_ops.core.operators import custom_op
from bi_ops.core.replay import replayed
from bi_ops.core.triton_helpers import PINNED

# --------------------------------------------------------------------------------------------------------------
# launch: everything below works on rows [R, 2D] whose last dimension is contiguous


def _rows(t: torch.Tensor) -> torch.Tensor:
    """t as [R, N] with unit column stride, without a copy where possible."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 else t.contiguous()


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    g: torch.Tensor | None = None,
    config: TileConfig | None = None,
    y: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out`, filled by the forward kernel, or by the backward kernel when the gradient `g` is given.

    config: None for the one of this size. y: contiguous, gets what the forward gave, from the backward kernel.
    """
    if x.numel() == 0:
        return out
    x2 = _rows(x)
    n_rows, n_cols = x2.shape[0], x2.shape[1] // 2
    c = config or tile_config(n_rows, n_cols)
    grid = (cdiv(n_rows, c.rows), cdiv(n_cols, c.cols))
    sizes = (n_rows, n_cols, x2.stride(0), c.rows, c.cols)
    options = {"LARGE": 2 * n_cols >= SMALL, "num_warps": c.num_warps}
    if g is None:
        pdl_options = pdl.launch_options(arches.of(x.device))
        recorded(silu_and_mul_kernel)[grid](x2, out, *sizes, **options, **pdl_options, **PINNED)
    else:
        options["HAS_Y"] = y is not None
        recorded(silu_and_mul_backward_kernel)[grid](g.contiguous(), x2, out, y, *sizes, **options, **PINNED)
    return out


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::silu_and_mul")
@replayed
def _silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    return launch(x, empty(x, (*x.shape[:-1], x.shape[-1] // 2)))


@_silu_and_mul.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@custom_op("bi_ops::silu_and_mul_backward")
@replayed
def _silu_and_mul_grad(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return launch(x, empty(x, x.shape), g)


@_silu_and_mul_grad.register_fake
def _(g, x):
    return x.new_empty(x.shape)


@custom_op("bi_ops::silu_and_mul_backward_again")
@replayed
def _silu_and_mul_again(g: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = empty(x, (*x.shape[:-1], x.shape[-1] // 2))
    return launch(x, empty(x, x.shape), g, y=y), y


@_silu_and_mul_again.register_fake
def _(g, x):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, g):
    return _silu_and_mul_grad(g, *ctx.saved_tensors)


_silu_and_mul.register_autograd(_backward, setup_context=_setup)


# --------------------------------------------------------------------------------------------------------------
# public functions


def _check(op: str, x: torch.Tensor) -> None:
    checks.tensor(op, "x", x)
    checks.dtype(op, "x", x)
    ok = x.ndim >= 1 and x.shape[-1] > 0 and x.shape[-1] % 2 == 0
    checks.shape(op, ok, lambda: f"the last dimension of x holds gate and up, so it is even; got {list(x.shape)}")


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` where gate is the first half of the last dimension of x (SwiGLU; Shazeer, 2020).

    silu is computed in fp32 and rounded, then the product is rounded: the bits of vLLM's CUDA `silu_and_mul`. The
    gradient is computed in fp32 and rounded once. Every element stands alone.

    Args:
        x: [..., 2D], bf16, fp16 or fp32; rows may be strided.

    Returns:
        [..., D] in the dtype of x, contiguous.

    Raises:
        TypeError: an unsupported dtype. ValueError: wrong device, or a last dimension that does not halve.
    """
    _check("silu_and_mul", x)
    return _silu_and_mul(x)


def silu_and_mul_backward(grad: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of x, and ``silu_and_mul(x)`` once more, from one read of x; both have the bits of their own call.

    For a backward that needs both: what follows takes the activation for its weight's gradient. Not differentiable.

    Args:
        grad: [..., D], the gradient of silu_and_mul(x), in the dtype of x. x: as `silu_and_mul`.

    Returns:
        ([..., 2D], [..., D]), contiguous.

    Raises:
        TypeError, ValueError: as `silu_and_mul`, or grad of another shape or dtype.
    """
    op = "silu_and_mul_backward"
    checks.tensor(op, "grad", grad)
    _check(op, x)
    checks.same_dtype(op, grad=grad, x=x)
    checks.same_device(op, grad=grad, x=x)
    half = (*x.shape[:-1], x.shape[-1] // 2)
    fits = grad.shape == half
    checks.shape(op, fits, lambda: f"grad must be {list(half)} for x {list(x.shape)}, got {list(grad.shape)}")
    return _silu_and_mul_again(grad, x)  # type: ignore[no-any-return]
