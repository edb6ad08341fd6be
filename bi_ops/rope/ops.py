"""Rotary position embedding: the cache of angles; check, allocate, launch, differentiate."""

from __future__ import annotations

import math

import torch

from bi_ops.core import checks
from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.limits import SMALL
from bi_ops.core.operators import custom_op
from bi_ops.core.triton_helpers import PINNED
from bi_ops.rope.config import RowConfig, row_config
from bi_ops.rope.kernels import rope_kernel

# --------------------------------------------------------------------------------------------------------------
# launch


def launch(
    x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inverse: bool, config: RowConfig | None = None
) -> torch.Tensor:
    """x [T, H, D] rotated by the angles of its tokens, or back; contiguous. config: None for the one of this size."""
    n_tokens, n_heads, dim = x.shape
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    if x.stride(2) != 1:
        x = x.contiguous()
    if positions.device.type == "cpu" and not ((positions >= 0) & (positions < cos_sin.shape[0])).all():
        raise IndexError(
            f"apply_rope: positions span {int(positions.min())}..{int(positions.max())}, the cache holds "
            f"0..{cos_sin.shape[0] - 1}. Build it with a larger max_position"
        )
    n_rows, half = n_tokens * n_heads, dim // 2
    cols = next_power_of_2(half)
    c = config or row_config(n_rows, cols)
    rope_kernel[(cdiv(n_rows, c.rows),)](
        x,
        positions.contiguous(),
        cos_sin.contiguous(),
        y,
        n_rows,
        n_heads,
        cos_sin.shape[0],
        x.stride(0),
        x.stride(1),
        HALF=half,
        ROWS=c.rows,
        COLS=cols,
        INVERSE=inverse,
        LARGE=n_rows >= SMALL,
        num_warps=c.num_warps,
        **PINNED,
    )
    return y


# --------------------------------------------------------------------------------------------------------------
# custom operator


@custom_op("bi_ops::rope")
def _rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    return launch(x, positions, cos_sin, inverse)


@_rope.register_fake
def _(x, positions, cos_sin, inverse):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    _, positions, cos_sin, ctx.inverse = inputs
    ctx.save_for_backward(positions, cos_sin)


def _backward(ctx, g):
    positions, cos_sin = ctx.saved_tensors
    return _rope(g, positions, cos_sin, not ctx.inverse), None, None, None


_rope.register_autograd(_backward, setup_context=_setup)


@custom_op("bi_ops::cos_sin")
def _cos_sin(like: torch.Tensor, head_dim: int, max_position: int, theta: float) -> torch.Tensor:
    """An operator, for a compiler has cosines and sines of its own. like: of the dtype, on the device."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    inv_freq = 1.0 / (theta**exponents)
    # vLLM writes an einsum; an outer product has one product per element whichever way it is spelled.
    angles = torch.arange(max_position, dtype=torch.float32, device=like.device)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(like.dtype)


@_cos_sin.register_fake
def _(like, head_dim, max_position, theta):
    return like.new_empty((max_position, head_dim))


# --------------------------------------------------------------------------------------------------------------
# public functions


def cos_sin_cache(
    head_dim: int,
    max_position: int,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The cosines and sines of every position: cos in the first head_dim / 2 columns, sin in the rest.

    vLLM's arithmetic: frequencies, angles, cos and sin in fp32, then cast to `dtype`. vLLM computes it on the device
    its model lives on, and CPU and GPU differ in the last bit, so this computes on `device` too; bits belong to it.

    Args:
        head_dim: D, even. max_position: P, how many positions. theta: the base of the frequencies. dtype: vLLM uses
            the model's. device: None for torch's default.

    Returns:
        [P, D] in `dtype`.

    Raises:
        TypeError: sizes, theta or dtype of another type. ValueError: an odd or non-positive head_dim, a non-positive
            max_position, a theta that is not positive and finite.
    """
    op = "cos_sin_cache"
    checks.integer(op, "head_dim", head_dim)
    checks.integer(op, "max_position", max_position)
    theta = checks.real(op, "theta", theta)
    checks.result_dtype(op, dtype)
    checks.shape(op, head_dim > 0 and head_dim % 2 == 0, lambda: f"head_dim must be even and positive, got {head_dim}")
    checks.shape(op, max_position > 0, lambda: f"max_position must be positive, got {max_position}")
    checks.shape(op, 0 < theta < math.inf, lambda: f"theta must be positive and finite, got {theta}")
    return _cos_sin(torch.zeros(0, dtype=dtype, device=device), head_dim, max_position, theta)


def apply_rope(x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Each head (x1, x2) of each token becomes (x1 cos - x2 sin, x2 cos + x1 sin) (Su et al., 2021).

    In fp32, rounded once: the bits of vLLM's CUDA `rotary_embedding`. The gradient is the rotation back.

    Args:
        x: [T, H, D], bf16, fp16 or fp32; tokens and heads may be strided (a view of a fused projection).
        positions: [T], int64 or int32, in 0..P-1. On a GPU a position outside turns its token into NaN.
        cos_sin: [P, R] from `cos_sin_cache`, in the dtype of x or fp32. It gets no gradient. Where R < D the first R
            columns of a head are rotated, and the rest is copied (partial rotary embedding).

    Returns:
        [T, H, D] in the dtype of x, contiguous.

    Raises:
        TypeError: unsupported dtypes. ValueError: wrong shape or device. IndexError: positions outside the cache (CPU).
    """
    checks.tensor("apply_rope", "x", x, ndim=3)
    checks.dtype("apply_rope", "x", x)
    checks.tensor("apply_rope", "positions", positions, ndim=1)
    checks.dtype("apply_rope", "positions", positions, (torch.int64, torch.int32))
    checks.tensor("apply_rope", "cos_sin", cos_sin, ndim=2)
    checks.same_device("apply_rope", x=x, positions=positions, cos_sin=cos_sin)
    if cos_sin.dtype != torch.float32:
        checks.same_dtype("apply_rope", x=x, cos_sin=cos_sin)
    n_tokens, _, dim = x.shape
    checks.shape(
        "apply_rope", dim > 0 and dim % 2 == 0, lambda: f"head_dim must be even and positive, got x {list(x.shape)}"
    )
    checks.shape(
        "apply_rope",
        0 < cos_sin.shape[1] <= dim and cos_sin.shape[1] % 2 == 0,
        lambda: f"cos_sin {list(cos_sin.shape)} does not fit x {list(x.shape)}: it needs 2 to {dim} columns, even",
    )
    fits = positions.shape[0] == n_tokens
    checks.shape("apply_rope", fits, lambda: f"{positions.shape[0]} positions for {n_tokens} tokens, x {list(x.shape)}")
    rotary = cos_sin.shape[1]
    if rotary < dim:
        return torch.cat((_rope(x[..., :rotary], positions, cos_sin, False), x[..., rotary:]), -1)
    return _rope(x, positions, cos_sin, False)
