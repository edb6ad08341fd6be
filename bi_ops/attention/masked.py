"""Attention with a mask: a dense batch, whose scores take a number or a yes or no for each query and key."""

from __future__ import annotations

import torch

from bi_ops.attention import launch
from bi_ops.attention.backends import backends
from bi_ops.attention.checks import check_qkv, check_rows
from bi_ops.attention.order import Problem
from bi_ops.attention.padding import padded, unpadded
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.operators import custom_op


def _seqlens(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> Seqlens:
    n, _, len_q, len_k = mask.shape
    starts = torch.arange(n + 1, dtype=torch.int32, device=q.device)
    return Seqlens(starts * len_q, starts * len_k, len_q, len_k, True)


def _readable(mask: torch.Tensor) -> torch.Tensor:
    """A bool as the bytes that it is."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


@custom_op("bi_ops::masked_attention")
def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, causal: bool, scale: float, right: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [B * queries, Hq, D], and what the backward needs): q [B * queries, Hq, D], k and v [B * keys, Hkv, D]."""
    params, arch = AttentionParams(causal, scale, -1, right), arches.of(q.device)
    order = _order(q, arch)
    return launch.masked_forward(q, k, v, _readable(mask), _seqlens(q, k, mask), params, order.forward, arch)


@_masked.register_fake
def _(q, k, v, mask, causal, scale, right):
    (n, hq, _), hkv = q.shape, k.shape[1]
    statistics = (q.new_empty(s, dtype=torch.float32) for s in ((hq, n), (hkv, n, hq // hkv)))
    return q.new_empty(q.shape), *statistics


@custom_op("bi_ops::masked_attention_backward")
def _masked_grad(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    neg_max: torch.Tensor,
    causal: bool,
    scale: float,
    right: int,
    need_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dmask), contiguous; an empty dmask where it is not needed."""
    dmask = mask.new_zeros(mask.shape if need_mask else 0)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), dmask
    params, arch = AttentionParams(causal, scale, -1, right), arches.of(q.device)
    saved = (_readable(mask), out, lse, neg_max, dmask if need_mask else None)
    rest = (_seqlens(q, k, mask), params, _order(q, arch), arch)
    return *launch.masked_backward(g, q, k, v, *saved, *rest), dmask


@_masked_grad.register_fake
def _(g, q, k, v, mask, out, lse, neg_max, causal, scale, right, need_mask):
    return *(t.new_empty(t.shape) for t in (q, k, v)), mask.new_empty(mask.shape if need_mask else 0)


def _setup(ctx, inputs, output):
    q, k, v, mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, g, *_):
    if g is None:
        return (None,) * 7
    need_mask = ctx.needs_input_grad[3]
    *grads, dmask = _masked_grad(g, *ctx.saved_tensors, *ctx.options, need_mask)
    return *grads, dmask if need_mask else None, None, None, None


_masked.register_autograd(_backward, setup_context=_setup)


def _order(q: torch.Tensor, arch):
    return backends.get("triton").order(Problem(q.shape[2], q.dtype, ("attn_mask",)), arch)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of a dense batch under a mask, by the own Triton kernels: softmax(q k^T * scale + attn_mask) v.

    Key steps are those of `order_of(..., features=("attn_mask",))`. Sequence and head have the same bits alone and in
    any batch, under the same mask and padding.

    Args:
        q: [B, Lq, Hq, D], bf16, fp16 or fp32. k: [B, Lk, Hkv, D], Hkv divides Hq. v: [B, Lk, Hkv, Dv].
        attn_mask: [B, Hq, Lq, Lk], any strides, so expanded as well: bool, True where a query sees a key, or
            floating-point numbers that are added to the scores. These have a gradient.
        causal: query i also sees key j only when j <= i, as torch aligns them, whatever Lq and Lk.
        softmax_scale: > 0; None: D ** -0.5.

    Returns:
        [B, Lq, Hq, Dv], contiguous unless Dv was padded. A query that sees no key gives zeros and passes no gradient.

    Raises:
        TypeError: unsupported or differing dtypes. ValueError: wrong shapes or devices.
    """
    op = "masked_attention"
    checks.boolean(op, "causal", causal)
    for name, t in (("q", q), ("k", k), ("v", v), ("attn_mask", attn_mask)):
        checks.tensor(op, name, t, ndim=4)
    n, len_q, hq, _ = q.shape
    len_k, head_dim = k.shape[1], v.shape[3]
    ok = k.shape[0] == v.shape[0] == n and v.shape[1] == len_k
    checks.shape(op, ok, lambda: f"batches differ: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    scale = check_qkv(op, softmax_scale, q=rows[0], k=rows[1], v=rows[2])
    checks.dtype(op, "attn_mask", attn_mask, (torch.bool, *checks.FLOAT_DTYPES))
    checks.same_device(op, q=q, attn_mask=attn_mask)
    shape = (n, hq, len_q, len_k)
    fits = attn_mask.shape == shape
    checks.shape(op, fits, lambda: f"attn_mask must be {list(shape)}, got {list(attn_mask.shape)}; expand it")
    check_rows(op, n * max(len_q, len_k), hq, n)
    right = -1
    if causal and len_q <= len_k:  # no query sees a later key
        rows[1:] = [t[:, :len_q].flatten(0, 1) for t in (k, v)]
        attn_mask = attn_mask[..., :len_q]
    elif causal:  # kernels align last queries and last keys
        causal, right = False, len_q - len_k
    out, *_ = _masked(*padded(*rows), attn_mask, causal, scale, right)
    return unpadded(out, head_dim).view(n, len_q, hq, head_dim)
