"""`scaled_dot_product_attention` as torch defines it, through `bi_ops.attention`; attention that torch takes apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from bi_ops import attention
from bi_ops.core.checks import FLOAT_DTYPES
from bi_ops.mode.errors import unsupported

Tensor = torch.Tensor

_OP = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`: query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev].

    Without a mask it is `attention.flash_attention` of the batch, packed; with one, and in fp32 always,
    `attention.masked_attention`, which saves a row's maximum and sum apart: with scores of a hundred the rounding of
    their one logarithm is 60 times fp32's in every gradient. A query whose keys are all masked gives zeros and passes
    no gradient, as from torch 2.5 on. `is_causal` lets query i see keys up to i, also where L and S differ, and with a
    mask both hold.

    The result has torch's strides: [..., L, Hq, Ev] in memory, as its fused kernels leave it; contiguous where it has
    none, for tensors that are not all [B, H, ...] and for a mask with a gradient.
    """
    given = [query, key, value]
    if dropout_p > 0:
        raise unsupported(_OP, given, "is not served with dropout")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in given)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    _check(query, key, value, attn_mask)
    rank = max(t.ndim for t in given)
    is_fused = all(t.ndim == 4 for t in given) and (attn_mask is None or not attn_mask.requires_grad)
    query, key, value = (t if t.ndim > 2 else t.unsqueeze(0) for t in (query, key, value))
    n_heads, n_kv_heads = query.shape[-3], key.shape[-3]
    if enable_gqa and (n_heads % n_kv_heads or value.shape[-3] != n_kv_heads):
        raise RuntimeError(
            f"{_OP}: {n_heads} query heads over {n_kv_heads} key and {value.shape[-3]} value heads; with enable_gqa "
            "keys and values have as many heads, which divide those of the query"
        )
    own = -3 if enable_gqa else -2  # axes from here on are not broadcast
    if not query.shape[:own] == key.shape[:own] == value.shape[:own]:
        is_fused = False
        lead = torch.broadcast_shapes(*(t.shape[:own] for t in (query, key, value)))
        query, key, value = (t.expand(*lead, *t.shape[own:]) for t in (query, key, value))
    out = _dense(query, key, value, attn_mask, is_causal, scale)
    out = out if is_fused else out.contiguous()
    return out if rank > 2 else out.squeeze(0)


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> None:
    """torch's errors, before anything runs."""
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"{_OP}: query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if query.dtype not in FLOAT_DTYPES:
        raise unsupported(_OP, [query, key, value], "is served in bf16, fp16 and fp32")
    if min(query.ndim, key.ndim, value.ndim) < 2:
        raise RuntimeError(
            f"{_OP}: query, key and value need two dimensions or more, got {query.ndim}, {key.ndim}, {value.ndim}"
        )
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(
            f"{_OP}: query {list(query.shape)} and key {list(key.shape)} need one head size, key and value "
            f"{list(value.shape)} as many tokens"
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"{_OP}: attn_mask must be bool, float or {query.dtype}, got {attn_mask.dtype}")


def _dense(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """query [*lead, Hq, L, E], key [*lead, H, S, E], value [*lead, H, S, Ev] -> [*lead, Hq, L, Ev]."""
    lead, (n_heads, len_q, head_dim) = query.shape[:-3], query.shape[-3:]
    len_k, value_dim, n = key.shape[-2], value.shape[-1], math.prod(lead)
    shape = (*lead, n_heads, len_q, value_dim)
    if 0 in shape:
        # Nothing to compute, but a graph to hold.
        return query.new_zeros(shape) + 0 * (query.sum() + key.sum() + value.sum())
    if head_dim == 0:
        query, key = (F.pad(t, (0, 1)) for t in (query, key))
    scale = max(head_dim, 1) ** -0.5 if scale is None else scale
    if scale <= 0:
        query, scale = query * (0 if scale == 0 else -1), -scale or 1.0
    query, key, value = (t.reshape(n, *t.shape[-3:]).transpose(1, 2) for t in (query, key, value))
    if attn_mask is None and query.dtype == torch.float32:
        attn_mask = torch.ones((), dtype=torch.bool, device=query.device)  # one byte, whatever the size
    if attn_mask is not None:
        mask = attn_mask.expand(*lead, n_heads, len_q, len_k).reshape(n, n_heads, len_q, len_k)
        out = attention.masked_attention(query, key, value, mask, causal=is_causal, softmax_scale=scale)
        return out.transpose(1, 2).reshape(shape)
    window = (-1, -1)
    if is_causal and len_q <= len_k:  # no query sees a later key
        key, value, len_k = key[:, :len_q], value[:, :len_q], len_q
    elif is_causal:  # flash_attention aligns the last query and the last key
        is_causal, window = False, (-1, len_q - len_k)

    def starts(length: int) -> Tensor:
        return torch.arange(n + 1, dtype=torch.int32, device=query.device) * length

    query, key, value = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
    out = attention.flash_attention(
        query,
        key,
        value,
        starts(len_q),
        cu_seqlens_k=starts(len_k),
        max_seqlen=len_q,
        max_seqlen_k=len_k,
        causal=is_causal,
        softmax_scale=scale,
        window_size=window,
    )
    return out.view(n, len_q, n_heads, value_dim).transpose(1, 2).reshape(shape)


# --------------------------------------------------------------------------------------------------------------
# Functions of torch in Python that call others. A function mode is off while it handles one, so that what they call
# would pass unseen: they run with the mode on, without their own question whether there is one.


@functools.cache
def body(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` but for its first step, which hands the call to the mode that is on."""
    assert isinstance(function, FunctionType)
    own = function.__globals__ | {"has_torch_function": lambda tensors: False}
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


#: The functions that run so.
COMPOSED = frozenset({F.multi_head_attention_forward})
