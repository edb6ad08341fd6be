"""Functions that torch takes apart, or chooses a backend for, before the dispatcher sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bi_ops import attention, norm
from bi_ops.core import runtime
from bi_ops.mode.errors import unsupported

Tensor = torch.Tensor
aten = torch.ops.aten


def rms_norm_eps(eps: float | None) -> float:
    """`eps` as torch takes it."""
    return torch.finfo(torch.float32).eps if eps is None else eps  # torch's default, that of what it computes in


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm` through `bi_ops.norm.rms_norm`."""
    x, n_dims = input, len(normalized_shape)
    if n_dims == 0 or tuple(x.shape[-n_dims:]) != tuple(normalized_shape):
        raise ValueError(f"rms_norm: normalized_shape {list(normalized_shape)} does not fit x {list(x.shape)}")
    eps = rms_norm_eps(eps)
    if weight is not None:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        weight = weight.reshape(-1)
    return norm.rms_norm(x.flatten(-n_dims), weight, eps).reshape(x.shape)


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
    """`torch.nn.functional.scaled_dot_product_attention` through `bi_ops.attention.flash_attention`; [..., H, S, D]."""
    op, given = "scaled_dot_product_attention", [query, key, value]
    if attn_mask is not None or dropout_p > 0:
        raise unsupported(op, given, "is not served with an attn_mask or dropout")
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise unsupported(op, given, "is served for [..., heads, tokens, head_dim] of one rank")
    (*lead, n_heads, len_q, dim), (*lead_k, n_kv_heads, len_k, _) = query.shape, key.shape
    if lead != lead_k or key.shape != value.shape or key.shape[-1] != dim:
        raise unsupported(op, given, "needs equal batch axes and head sizes, and keys shaped like values")
    if is_causal and len_q != len_k:
        raise unsupported(op, given, "is not served causal with unequal lengths of query and key")
    if n_heads != n_kv_heads and not enable_gqa:
        raise ValueError(f"{op}: {n_heads} query heads over {n_kv_heads} key heads need enable_gqa=True")
    batch = math.prod(lead)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    def packed(t: Tensor) -> Tensor:
        return t.reshape(batch, *t.shape[-3:]).transpose(1, 2).reshape(-1, t.shape[-3], dim)

    def starts(length: int) -> Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device=query.device) * length

    out = attention.flash_attention(
        packed(query),
        packed(key),
        packed(value),
        starts(len_q),
        cu_seqlens_k=starts(len_k),
        max_seqlen=len_q,
        max_seqlen_k=len_k,
        causal=is_causal,
        softmax_scale=scale,
    )
    return out.view(batch, len_q, n_heads, dim).transpose(1, 2).reshape(query.shape)


def _softmax_was_replaced() -> bool:
    """Whether someone registered an own kernel for aten::softmax, which takes its derivative away (vLLM does)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::softmax.int", runtime.device_type().upper())


def torch_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax` through the operator that has a derivative."""
    if not _softmax_was_replaced():
        return NotImplemented
    if dtype is None and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32  # as autocast does
    return aten._softmax.default(input if dtype is None else input.to(dtype), dim, False)


def functional_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.softmax`."""
    if dim is None:
        dim = 0 if input.dim() in (0, 1, 3) else 1  # F.softmax's own rule
    return torch_softmax(input, dim, dtype)


#: What replaces a function of torch where its first argument is a floating-point tensor on the kernels' device. The
#: replacement has the function's arguments, and returns NotImplemented for what is left to the dispatcher.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.softmax: functional_softmax,
    torch.softmax: torch_softmax,
    torch.special.softmax: torch_softmax,
    torch.Tensor.softmax: torch_softmax,
}


def replaced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What replaces this call of torch; NotImplemented if nothing does."""
    replacement = FUNCTIONS.get(func)
    if replacement is None:
        return NotImplemented
    first = args[0] if args else kwargs.get("input", kwargs.get("query"))
    if not (isinstance(first, Tensor) and first.device.type == runtime.device_type() and first.is_floating_point()):
        return NotImplemented
    return replacement(*args, **kwargs)
