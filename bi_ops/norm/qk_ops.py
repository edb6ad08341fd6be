"""Norm and rotation of queries and keys inside a fused projection: check, allocate, launch, differentiate."""

from __future__ import annotations

from typing import Any

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks, pdl
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, recorded
from bi_ops.core.limits import SMALL
from bi_ops.core.operators import custom_op
from bi_ops.core.pairwise import pairwise_
from bi_ops.core.replay import replayed
from bi_ops.core.rows import ALIGNMENT, aligned_rows
from bi_ops.core.transforms import Node
from bi_ops.core.triton_helpers import PINNED
from bi_ops.norm import order as orders
from bi_ops.norm.config import (
    RowConfig,
    TokenConfig,
    heads_backward_config,
    heads_config,
    padded_chunks,
    token_config,
)
from bi_ops.norm.qk_kernels import qk_add_chunks_kernel, qk_norm_rope_backward_kernel, qk_norm_rope_kernel


def _heads(qkv: torch.Tensor, weight: torch.Tensor, num_heads: int) -> tuple[int, int, int]:
    """Query heads, key heads, head_dim."""
    dim = weight.shape[0]
    return num_heads, (qkv.shape[1] // dim - num_heads) // 2, dim


def _order(qkv: torch.Tensor, dim: int, segments: int = 1) -> orders.NormOrder:
    return orders.order(orders.Problem(dim, qkv.dtype, segments), arches.of(qkv.device))


def _check_positions(positions: torch.Tensor, cos_sin: torch.Tensor) -> None:
    """Raise IndexError for one outside the cache. Reads them, for which a GPU would be waited for."""
    if not ((positions >= 0) & (positions < len(cos_sin))).all():
        raise IndexError(
            f"qk_norm_rope: positions span {int(positions.min())}..{int(positions.max())}, the cache holds "
            f"0..{len(cos_sin) - 1}. Build it with a larger max_position"
        )


# --------------------------------------------------------------------------------------------------------------
# launch


def launch_forward(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    eps: float,
    config: RowConfig | None = None,
    constant_weight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, k, v, 1 / rms of the queries, then of the keys). config: None for the one of this size."""
    hq, hk, dim = _heads(qkv, q_weight, num_heads)
    n_tokens = len(qkv)
    q, k, v = (empty(qkv, (n_tokens, h, dim)) for h in (hq, hk, hk))
    rstd = empty(qkv, n_tokens * (hq + hk), torch.float32)
    if qkv.numel() > 0:
        if positions.is_cpu:
            _check_positions(positions, cos_sin)
        order = _order(qkv, dim)
        c = config or heads_config(n_tokens * hq, dim, qkv.itemsize, order.rows)
        rows = aligned_rows(qkv)
        wq, wk = aligned_rows(q_weight), aligned_rows(k_weight)
        recorded(qk_norm_rope_kernel)[(cdiv(n_tokens * max(hq, hk), c.rows * c.tiles), 3)](
            rows,
            wq,
            wk,
            positions,
            cos_sin,
            q,
            k,
            v,
            rstd,
            n_tokens,
            dim,
            len(cos_sin),
            eps,
            rows.stride(0),
            pdl.prefetch(constant_weight, (wq, q_weight), (wk, k_weight)),
            HQ=hq,
            HK=hk,
            HALF=dim // 2,
            ROWS=c.rows,
            TILES=c.tiles,
            BLOCK=order.rows.tile(dim, c.chunks > 0),
            LARGE=n_tokens * max(hq, hk) >= SMALL,
            num_warps=order.rows.num_warps,
            **pdl.launch_options(arches.of(qkv.device)),
            **PINNED,
        )
    return q, k, v, rstd


def launch_backward(
    q_weight_grad: torch.Tensor,
    k_weight_grad: torch.Tensor,
    accumulate: bool,
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    rstd: torch.Tensor,
    num_heads: int,
    config: tuple[RowConfig, TokenConfig] | None = None,
    segments: int = 1,
) -> torch.Tensor:
    """The gradient of qkv. The weights' are left in the first two, or added to these, fp32, if `accumulate`.

    config: None for the one of this size. segments: the weights' gradients are [segments, D].
    """
    dqkv = empty(qkv, qkv.shape)
    if qkv.numel() == 0:
        return dqkv
    hq, hk, dim = _heads(qkv, q_weight, num_heads)
    n_tokens, order = len(qkv), _order(qkv, dim, segments)
    add = config[1] if config else token_config(cdiv(n_tokens * hq, order.tokens.chunk), dim)
    own = [padded_chunks(n_tokens * h // order.heads.segments, order.tokens.chunk, add) for h in (hq, hk)]
    chunks = [order.heads.segments * n for n in own]
    partial = empty(qkv, (sum(chunks), dim), torch.float32)
    c = config[0] if config else heads_backward_config(max(chunks), dim, qkv.itemsize, order.rows)
    g_rows = [aligned_rows(g) for g in (gq, gk, gv)]
    rows = aligned_rows(qkv)
    recorded(qk_norm_rope_backward_kernel)[(cdiv(max(chunks), c.rows), 3)](
        *g_rows,
        rows,
        aligned_rows(q_weight),
        aligned_rows(k_weight),
        positions,
        cos_sin,
        rstd,
        dqkv,
        partial,
        n_tokens,
        *chunks,
        dim,
        len(cos_sin),
        *(g.stride(0) for g in g_rows),
        rows.stride(0),
        dqkv.stride(0),
        HQ=hq,
        HK=hk,
        HALF=dim // 2,
        SEGMENTS=order.heads.segments,
        CHUNK=order.tokens.chunk,
        ROWS=c.rows,
        BLOCK=order.rows.tile(dim, c.chunks > 0),
        STAGES=c.stages,
        LARGE=n_tokens * max(hq, hk) >= SMALL,
        num_warps=order.rows.num_warps,
        **PINNED,
    )
    recorded(qk_add_chunks_kernel)[(cdiv(dim, add.add_cols), 2, order.heads.segments)](
        partial,
        q_weight_grad,
        k_weight_grad,
        *own,
        dim,
        SEGMENTS=order.heads.segments,
        ACCUMULATE=accumulate,
        COLS=add.add_cols,
        UNROLL=add.unroll,
        STAGES=add.stages,
        num_warps=add.add_warps,
        **PINNED,
    )
    return dqkv


# --------------------------------------------------------------------------------------------------------------
# custom operators


@custom_op("bi_ops::qk_norm_rope")
@replayed
def _qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    eps: float,
    constant_weight: bool = False,
    segments: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    given = (qkv, q_weight, k_weight, positions, cos_sin, num_heads, eps)
    return launch_forward(*given, constant_weight=constant_weight)


@_qk_norm_rope.register_fake
def _(qkv, q_weight, k_weight, positions, cos_sin, num_heads, eps, constant_weight=False, segments=1):
    hq, hk, dim = _heads(qkv, q_weight, num_heads)
    n_tokens = qkv.shape[0]  # not len(qkv), which under torch.compile makes a graph for each number of tokens
    rstd = qkv.new_empty(n_tokens * (hq + hk), dtype=torch.float32)
    return *(qkv.new_empty((n_tokens, h, dim)) for h in (hq, hk, hk)), rstd


@custom_op("bi_ops::qk_norm_rope_backward", mutates_args={"q_weight_grad", "k_weight_grad"})
@replayed
def _qk_norm_rope_backward(
    q_weight_grad: torch.Tensor,
    k_weight_grad: torch.Tensor,
    accumulate: bool,
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    rstd: torch.Tensor,
    num_heads: int,
    segments: int = 1,
) -> torch.Tensor:
    return launch_backward(
        *(q_weight_grad, k_weight_grad, accumulate, gq, gk, gv, qkv, q_weight, k_weight, positions, cos_sin, rstd),
        num_heads,
        segments=segments,
    )


@_qk_norm_rope_backward.register_fake
def _(q_weight_grad, k_weight_grad, accumulate, gq, gk, gv, qkv, *_):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    *tensors, ctx.num_heads, _, _, ctx.segments = inputs
    ctx.save_for_backward(*tensors, output[3])
    ctx.mark_non_differentiable(output[3])


def _backward(ctx, gq, gk, gv, _):
    saved = ctx.saved_tensors
    weights, n = saved[1:3], ctx.segments
    weight_grads = [torch.zeros_like(w) if n == 1 else w.new_zeros((n, len(w)), dtype=torch.float32) for w in weights]
    dqkv = _qk_norm_rope_backward(*weight_grads, False, gq, gk, gv, *saved, ctx.num_heads, n)
    if n > 1:
        weight_grads = [pairwise_(g).to(w.dtype) for g, w in zip(weight_grads, weights, strict=True)]
    grads = zip((dqkv, *weight_grads), ctx.needs_input_grad, strict=False)
    return *(g if needed else None for g, needed in grads), *[None] * 6


_qk_norm_rope.register_autograd(_backward, setup_context=_setup)


class _IntoBuffers(Node):
    """qk_norm_rope whose weight gradients go into buffers and not to autograd."""

    operator = "qk_norm_rope with main_grad"

    @staticmethod
    def forward(ctx, q_main_grad, k_main_grad, *inputs):
        *tensors, ctx.num_heads, eps, ctx.segments = inputs
        *out, rstd = _qk_norm_rope(*tensors, ctx.num_heads, eps)
        ctx.save_for_backward(*tensors, rstd)
        ctx.main_grads = q_main_grad, k_main_grad
        return tuple(out)

    @staticmethod
    def backward(ctx, gq, gk, gv):
        saved = ctx.saved_tensors  # once: a checkpoint hands them out no second time
        # A weight that is frozen keeps its buffer, if it has one, as it is.
        each = zip(ctx.main_grads, saved[1:3], ctx.needs_input_grad[3:5], strict=True)
        shape = (ctx.segments, saved[1].shape[0])
        buffers = [b if needed else w.new_zeros(shape, dtype=torch.float32) for b, w, needed in each]
        dqkv = _qk_norm_rope_backward(*buffers, True, gq, gk, gv, *saved, ctx.num_heads, ctx.segments)
        return None, None, dqkv if ctx.needs_input_grad[2] else None, *[None] * 7


# --------------------------------------------------------------------------------------------------------------
# public function


def _check(op: str, qkv: Any, weights: dict[str, Any], positions: Any, cos_sin: Any, num_heads: int) -> None:
    checks.tensor(op, "qkv", qkv, ndim=2)
    checks.dtype(op, "qkv", qkv)
    for name, w in weights.items():
        checks.tensor(op, name, w, ndim=1)
        checks.dtype(op, name, w, (qkv.dtype, torch.float32))
    checks.tensor(op, "positions", positions, ndim=1)
    checks.dtype(op, "positions", positions, (torch.int64, torch.int32))
    checks.integer(op, "num_heads", num_heads)
    checks.tensor(op, "cos_sin", cos_sin, ndim=2)
    checks.dtype(op, "cos_sin", cos_sin, (qkv.dtype, torch.float32))
    checks.same_device(op, qkv=qkv, **weights, positions=positions, cos_sin=cos_sin)
    dims = {name: w.shape[0] for name, w in weights.items()} | {"cos_sin": cos_sin.shape[1]}
    dim = cos_sin.shape[1]
    longest = orders.RowOrder.block  # a head is one chunk; asked of the class, for this is traced by torch.compile
    checks.shape(op, len(set(dims.values())) == 1, lambda: f"head_dim differs: {dims}")
    checks.shape(
        op,
        dim > 0 and dim % ALIGNMENT == 0 and dim <= longest,
        lambda: (
            f"head_dim must be a multiple of {ALIGNMENT} up to {longest}, got {dim}; use rms_norm and rope.apply_rope"
        ),
    )
    fits = num_heads > 0 and qkv.shape[1] % dim == 0 and (n := qkv.shape[1] // dim - num_heads) > 0 and n % 2 == 0
    checks.shape(
        op,
        fits,
        lambda: f"qkv {list(qkv.shape)} does not hold {num_heads} query heads of {dim} and as many keys as values",
    )
    checks.shape(
        op,
        len(positions) == len(qkv),
        lambda: f"{len(positions)} positions for {len(qkv)} tokens, qkv {list(qkv.shape)}",
    )


def _check_segments(op: str, segments: int, num_heads: int, all_heads: int) -> None:
    checks.integer(op, "segments", segments)
    kv_heads = (all_heads - num_heads) // 2
    fits = segments > 0 and segments & (segments - 1) == 0 and num_heads % segments == 0 == kv_heads % segments
    checks.shape(
        op,
        fits,
        lambda: (
            f"segments is {segments}; it must be a power of two that divides the {num_heads} query heads and the "
            f"{kv_heads} key heads"
        ),
    )


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    num_heads: int,
    eps: float = 1e-6,
    q_main_grad: torch.Tensor | None = None,
    k_main_grad: torch.Tensor | None = None,
    *,
    constant_weight: bool = False,
    segments: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys of a fused projection, normalised per head, then turned by their positions' angles; and values.

    Bit for bit `apply_rope(rms_norm(q, q_weight, eps), positions, cos_sin)`, the same of k, and v, gradients included:
    what Qwen3 computes before attention, with one read of the projection.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], bf16, fp16 or fp32: the heads of queries, of keys, of values.
        q_weight, k_weight: [D], the dtype of qkv or fp32 (a master weight, as in `rms_norm`); D is a multiple of 16.
        positions: [T], int64 or int32, in 0..P-1. On a GPU a position outside turns its token into NaN.
        cos_sin: [P, D] from `rope.cos_sin_cache`, in the dtype of qkv or fp32. It gets no gradient.
        num_heads: Hq. eps: >= 0.
        q_main_grad, k_main_grad: fp32 [D], contiguous; as `main_grad` of `rms_norm`. If one is given, so is the other,
            unless its weight is frozen.
        constant_weight: as `rms_norm`; positions and cos_sin too are then not written by the graph.
        segments: a power of two that divides the heads. Each segment of consecutive heads has a sum of its own in the
            weights' gradients (`HeadsOrder`), so that ranks that share the heads can add theirs; the buffers are then
            fp32 [segments, D]. Another number has other bits; nothing else depends on it.

    Returns:
        q [T, Hq, D], k and v [T, Hkv, D], contiguous, in the dtype of qkv.

    Raises:
        TypeError: unsupported dtypes. ValueError: wrong shape, device or eps. IndexError: positions outside the cache
            (CPU).
    """
    op = "qk_norm_rope"
    _check(op, qkv, {"q_weight": q_weight, "k_weight": k_weight}, positions, cos_sin, num_heads)
    checks.shape(op, checks.real(op, "eps", eps) >= 0, lambda: f"eps must not be negative, got {eps}")
    checks.boolean(op, "constant_weight", constant_weight)
    constant_weight = constant_weight and positions.is_contiguous() and cos_sin.is_contiguous()  # else: a new copy
    _check_segments(op, segments, num_heads, qkv.shape[1] // q_weight.shape[0])
    inputs = (qkv, q_weight, k_weight, positions.contiguous(), cos_sin.contiguous(), num_heads, eps)
    if q_main_grad is None and k_main_grad is None:
        return _qk_norm_rope(*inputs, constant_weight, segments)[:3]
    for name, buffer, weight in (("q_main_grad", q_main_grad, q_weight), ("k_main_grad", k_main_grad, k_weight)):
        if buffer is not None or weight.requires_grad:
            shape = weight.shape if segments == 1 else torch.Size((segments, *weight.shape))
            checks.main_grad(op, name, buffer, shape, qkv.device)
    return _IntoBuffers.apply(q_main_grad, k_main_grad, *inputs, segments)
