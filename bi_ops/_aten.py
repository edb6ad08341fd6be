"""Aten operators under the contract: which are served by bi_ops, which may pass, which raise.

`mode.py` sends every operator through `call`. The list of what may pass is an allowlist by rule, so an operator that
nobody thought of raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from bi_ops import embedding, logprob, matmul, norm, reduction
from bi_ops.core import checks, runtime

Tensor = torch.Tensor
OpOverload = torch._ops.OpOverload
aten = torch.ops.aten

_WAY_OUT = (
    "run it outside the contract inside `with bi_ops.mode.batch_invariant_backward_mode(enabled=False)`, "
    "or, if you know that it keeps the contract, `bi_ops.mode.allow_operator({name!r})`"
)
_HINTS = {
    "native_layer_norm": "use torch.nn.RMSNorm, or write the norm with mean and pow",
    "convolution": "write it as unfold and matmul",
    "var": "write it with mean: (x - x.mean(d, keepdim=True)).pow(2).mean(d)",
    "std": "write it with mean: (x - x.mean(d, keepdim=True)).pow(2).mean(d).sqrt()",
    "linalg_vector_norm": "over some axes write x.pow(2).sum(dim).sqrt(); over everything it is allowed",
    "_scaled_dot_product": "call torch.nn.functional.scaled_dot_product_attention directly, not a backend of it or "
    "through nn.MultiheadAttention",
    "scaled_dot_product": "without attn_mask and dropout it is served; see bi_ops.attention.flash_attention",
    "softmax": "call torch.nn.functional.softmax directly: aten's own was replaced by one without autograd",
}


def unsupported(op: str, tensors: Sequence[Tensor], why: str = "has no batch-invariant implementation") -> Exception:
    """The error of an operator that cannot be served: its name, its shapes and the way out."""
    what = ", ".join(checks.describe(t) for t in tensors) or "no tensors"
    base = op.removeprefix("aten::")
    hint = next((h for prefix, h in _HINTS.items() if base.startswith(prefix)), None)
    way_out = _WAY_OUT.format(name=op)
    return NotImplementedError(
        f"batch-invariant mode: {op} on {what} {why}. "
        + (f"Way out: {hint}; or {way_out}" if hint else f"Way out: {way_out}")
    )


# --------------------------------------------------------------------------------------------------------------
# served: each function has the arguments of its aten operator

SERVED: dict[OpOverload, Callable[..., Any]] = {}


def _overload(name: str) -> OpOverload | None:
    """``"mm"``, ``"sum.dim_IntList"`` as an operator; None where this torch has none of that name."""
    base, _, overload = name.partition(".")
    return getattr(getattr(aten, base, None), overload or "default", None)


def _serves(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            op = _overload(name)
            if op is not None:
                SERVED[op] = fn
        return fn

    return register


@_serves("mm")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    checks.same_dtype("aten::mm", a=a, b=b)
    return matmul.mm(a, b)


@_serves("bmm")
def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return matmul.bmm(a, b)


@_serves("mv")
def _mv(a: Tensor, v: Tensor) -> Tensor:
    return _mm(a, v[:, None])[:, 0]


@_serves("dot", "vdot")
def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _mm(a[None], b[:, None])[0, 0]


def _plus(bias: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * bias + alpha * product, the product already rounded.

    torch turns F.linear into addmm or into a product and an addition by the rank and the strides of its input, so
    rounding first is what gives both the same bits; it also gives those of `bi_ops.matmul.linear` and of vLLM.
    """
    out = product if alpha == 1 else product * alpha
    if beta == 0:
        return out
    return out + (bias if beta == 1 else bias * beta).to(out.dtype)


@_serves("addmm")
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, _mm(a, b), beta, alpha)


@_serves("addmv")
def _addmv(bias: Tensor, a: Tensor, v: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, _mv(a, v), beta, alpha)


@_serves("baddbmm")
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, _bmm(a, b), beta, alpha)


@_serves("sum", "sum.dim_IntList")
def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x if x.is_floating_point() else x.to(dtype)
    return reduction.sum(x, dim, keepdim, dtype)


@_serves("mean", "mean.dim")
def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x if x.is_floating_point() else x.to(dtype)
    return reduction.mean(x, dim, keepdim, dtype)


@_serves("logsumexp")
def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    top = x.amax(dim, keepdim=True).float()
    top = torch.where(top.isinf(), 0.0, top)
    out = reduction.sum((x.float() - top).exp(), dim, keepdim=True).log() + top
    return (out if keepdim else out.squeeze(tuple(dim))).to(x.dtype)


def _last(fn: Callable[..., Tensor], dim: int, *tensors: Tensor, dtype: torch.dtype) -> Tensor:
    """fn over `dim` as the last one."""
    if tensors[0].ndim == 0:
        return fn(*(t[None] for t in tensors), dtype)[0]
    return fn(*(t.movedim(dim, -1) for t in tensors), dtype).movedim(-1, dim)


@_serves("_softmax")
def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _last(logprob.softmax, dim, x, dtype=torch.float32 if half_to_float else x.dtype)


@_serves("_log_softmax")
def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return _last(logprob.log_softmax, dim, x, dtype=torch.float32 if half_to_float else x.dtype)


@_serves("_softmax_backward_data")
def _softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    y, product = y.float(), g.float() * y.float()
    return (product - y * reduction.sum(product, dim, keepdim=True)).to(input_dtype)


@_serves("_log_softmax_backward_data")
def _log_softmax_backward(g: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    g = g.float()
    return (g - y.float().exp() * reduction.sum(g, dim, keepdim=True)).to(input_dtype)


@_serves("_fused_rms_norm")
def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim - len(normalized_shape), x.ndim))
    rstd = torch.rsqrt(reduction.mean(x.float().pow(2), dims, keepdim=True) + _eps(eps))
    return rms_norm(x, normalized_shape, weight, eps), rstd


@_serves("_fused_rms_norm_backward")
def _rms_norm_backward(
    g: Tensor, x: Tensor, normalized_shape: list[int], rstd: Tensor, weight: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    rows, cols = list(range(x.ndim - len(normalized_shape))), list(range(x.ndim - len(normalized_shape), x.ndim))
    normed, wide = x.float() * rstd.float(), g.float()
    scaled = wide if weight is None else wide * weight.float()
    dx = (rstd.float() * (scaled - normed * reduction.mean(scaled * normed, cols, keepdim=True))).to(x.dtype)
    if weight is None or not output_mask[1]:
        return dx if output_mask[0] else None, None
    dw = reduction.sum(wide * normed, rows) if rows else wide * normed
    return dx if output_mask[0] else None, dw.to(weight.dtype)


@_serves("embedding_dense_backward")
def _embedding_backward(g: Tensor, ids: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    if scale_grad_by_freq:
        raise unsupported("aten::embedding_dense_backward", [g, ids], "is not served with scale_grad_by_freq")
    return embedding.embedding_backward(g, ids, rows, padding_idx, g.dtype)


def _accumulate(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x [V, D] + the sum of values [n, D] over rows [n], front to back: what atomics would add in any order."""
    return x + embedding.embedding_backward(values.to(x.dtype), rows, x.shape[0], -1, x.dtype)


@_serves("index_put")
def _index_put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    used = [i for i in indices if i is not None]
    if not accumulate or all(i.dtype == torch.bool for i in used):  # a mask names no element twice
        return aten.index_put.default(x, indices, values, accumulate)
    if any(i is None for i in indices[: len(used)]) or any(i.dtype not in (torch.int64, torch.int32) for i in used):
        why = "accumulates over indices that are not integers on leading axes"
        raise unsupported("aten::index_put", [x, *used], why)
    used = list(torch.broadcast_tensors(*used))
    flat = torch.zeros_like(used[0], dtype=torch.int64)
    for index, size in zip(used, x.shape, strict=False):
        flat = flat * size + torch.where(index < 0, index + size, index)
    rest = x.shape[len(used) :]
    values = values.expand(*flat.shape, *rest).reshape(flat.numel(), math.prod(rest))
    return _accumulate(x.reshape(-1, math.prod(rest)), flat.reshape(-1), values).view(x.shape)


@_serves("index_add")
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    source = source if alpha == 1 else source * alpha
    moved = x.movedim(dim, 0) if x.ndim else x[None]
    values = (source.movedim(dim, 0) if source.ndim else source[None]).reshape(index.numel(), -1)
    out = _accumulate(moved.reshape(moved.shape[0], -1), index.reshape(-1), values).view(moved.shape)
    return out.movedim(0, dim).contiguous() if x.ndim else out[0]


@_serves("scatter_add")
def _scatter_add(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if index.ndim == 0 or index.shape[dim] <= 1:  # one addition per element at most: there is no order
        return aten.scatter_add.default(x, dim, index, src)
    where = [torch.arange(n, device=x.device) for n in index.shape]
    where = list(torch.meshgrid(*where, indexing="ij"))
    where[dim] = index
    return _index_put(x, where, src[tuple(slice(n) for n in index.shape)], True)


@_serves("nll_loss_forward")
def _nll_loss(x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    if weight is not None:
        raise unsupported("aten::nll_loss_forward", [x, target, weight], "is not served with class weights")
    keep = target != ignore_index
    picked = x.gather(-1, torch.where(keep, target, 0).unsqueeze(-1)).squeeze(-1)
    losses = torch.where(keep, -picked, 0.0)
    count = keep.sum().float()
    if how == 0:
        return losses, count
    total = reduction.sum(losses, dtype=torch.float32)
    return (total / count if how == 1 else total).to(x.dtype), count


@_serves("nll_loss_backward")
def _nll_loss_backward(
    g: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, how: int, ignore_index: int, count: Tensor
) -> Tensor:
    keep = target != ignore_index
    g = g.float() / count if how == 1 else g.float()
    values = torch.where(keep, -g, 0.0).to(x.dtype).unsqueeze(-1)
    return x.new_zeros(x.shape).scatter(-1, torch.where(keep, target, 0).unsqueeze(-1), values)


def _serve_loss(op: OpOverload) -> None:
    """A loss that is pointwise but for its reduction."""
    names = [a.name for a in op._schema.arguments]

    def impl(*args: Any, **kwargs: Any) -> Tensor:
        bound = dict(zip(names, args, strict=False)) | kwargs
        how = bound.pop("reduction", 1)
        losses = op(**bound, reduction=0)
        return losses if how == 0 else reduction.mean(losses) if how == 1 else reduction.sum(losses)

    SERVED[op] = impl


_LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")
for _name in (*_LOSSES, "binary_cross_entropy_with_logits"):
    _serve_loss(_overload(_name))  # type: ignore[arg-type]


def _serve_writing(name: str, written: str) -> None:
    """The in-place (`addmm_`) or out (`mm.out`) form of a served operator."""
    served, op = SERVED[_overload(name)], _overload(written)  # type: ignore[index]

    def impl(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        result = served(*args, **kwargs)
        if out is None:
            return args[0].copy_(result)
        return out.resize_(result.shape).copy_(result)

    if op is not None:
        SERVED[op] = impl


for _name in ("addmm", "baddbmm", "addmv", "index_put", "index_add", "scatter_add"):
    _serve_writing(_name, _name + "_")
for _name in ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addmv"):
    _serve_writing(_name, _name + ".out")


# --------------------------------------------------------------------------------------------------------------
# functions that torch takes apart, or chooses a backend for, before the dispatcher sees them


def _eps(eps: float | None) -> float:
    return torch.finfo(torch.float32).eps if eps is None else eps  # torch's default, that of what it computes in


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm` through `bi_ops.norm.rms_norm`."""
    x, n_dims = input, len(normalized_shape)
    if n_dims == 0 or tuple(x.shape[-n_dims:]) != tuple(normalized_shape):
        raise ValueError(f"rms_norm: normalized_shape {list(normalized_shape)} does not fit x {list(x.shape)}")
    eps = _eps(eps)
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
    from bi_ops import attention

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


def softmax_was_replaced() -> bool:
    """Whether someone registered an own kernel for aten::softmax, which takes its derivative away (vLLM does)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::softmax.int", runtime.device_type().upper())


def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax` through the operator that has a derivative."""
    if dtype is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.float32  # as autocast does
    return aten._softmax.default(x if dtype is None else x.to(dtype), dim, False)


# --------------------------------------------------------------------------------------------------------------
# allowed: what cannot depend on the batch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Copies, selections and comparisons: they move or compare numbers and add none.
_MOVES = _names(
    """
_to_copy copy copy_ clone _lazy_clone _pin_memory _unsafe_view lift lift_fresh set_ resize_ resize_as_ record_stream
contiguous detach_ squeeze_ unsqueeze_ t_ transpose_ as_strided_ alias_copy view_copy expand_copy permute_copy
index index_select _unsafe_index gather take embedding masked_select masked_fill masked_fill_ masked_scatter
masked_scatter_ masked_scatter_backward index_fill index_fill_ index_copy index_copy_ scatter scatter_
where select_scatter slice_scatter diagonal_scatter as_strided_scatter select_backward slice_backward
diagonal_backward value_selecting_reduction_backward cat stack _stack _chunk_cat block_diag unsafe_split
unsafe_split_with_sizes split_with_sizes_copy repeat repeat_interleave roll flip rot90 tril tril_ triu triu_ diag_embed
constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d reflection_pad2d replication_pad1d
replication_pad2d fill fill_ zero zero_ complex polar im2col
sort topk kthvalue median nanmedian mode max min amax amin aminmax _aminmax argmax argmin cummax cummin _cummax_helper
_cummin_helper any all equal allclose is_same_size isin searchsorted bucketize nonzero nonzero_static count_nonzero
unique_dim _unique _unique2 unique_consecutive unique_dim_consecutive _is_all_true _is_any_true
_local_scalar_dense _assert_async _functional_assert_async _assert_scalar _assert_tensor_metadata is_pinned
_has_same_storage_numel
"""
)

#: Factories and random numbers.
_MAKES = _names(
    """
empty_like new_empty new_empty_strided new_full new_ones new_zeros full_like ones_like zeros_like rand_like randn_like
randint_like bernoulli bernoulli_ uniform uniform_ normal normal_ normal_functional random random_ exponential
exponential_ cauchy_ geometric_ log_normal_ multinomial poisson native_dropout _fused_dropout _masked_scale
"""
)

#: One output element per input element, though torch does not tag them so.
_POINTWISE = _names(
    """
glu glu_backward glu_jvp addr addr_ _prelu_kernel _prelu_kernel_backward floor_divide floor_divide_ hardswish_backward
gelu_ xlogy_ threshold_ elu_backward gelu_backward hardsigmoid_backward hardtanh_backward leaky_relu_backward
log_sigmoid_forward log_sigmoid_backward softplus_backward softshrink_backward hardshrink_backward rsub
native_dropout_backward mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward
soft_margin_loss_backward _fused_adam _fused_adam_ _fused_adamw _fused_adamw_ _fused_sgd _fused_sgd_
_fused_adagrad _fused_adagrad_ _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale _amp_update_scale_
"""
)

_ALLOWED = _MOVES | _MAKES | _POINTWISE

#: Namespaces whose operators keep the contract, and single operators that a caller vouches for.
_TRUSTED_NAMESPACES = ("bi_ops", "profiler")
trusted_operators: set[str] = set()


@functools.cache
def _always_allowed(op: OpOverload) -> bool:
    """Whether `op` keeps the contract whatever its arguments."""
    if op.namespace != "aten":
        return op.namespace in _TRUSTED_NAMESPACES
    name = op._schema.name.removeprefix("aten::")
    if op in SERVED or "reduce" in op._overloadname:  # scatter.reduce adds
        return False
    if torch.Tag.pointwise in op.tags or op.is_view or torch.Tag.inplace_view in op.tags or name in _ALLOWED:
        return True
    return name.startswith("_foreach_") and _is_foreach_pointwise(name.removeprefix("_foreach_").removesuffix("_"))


def _is_foreach_pointwise(base: str) -> bool:
    """Whether a fused loop over a list of tensors is pointwise, or a norm of gradient clipping (whole tensors)."""
    if base in ("norm", "max", "copy", "zero"):
        return True
    packet = getattr(aten, base, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _is_full_norm(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A norm over all of a tensor, as gradient clipping takes it: the same on every run, and no row's result."""
    if op is _overload("norm.Scalar"):
        return True
    if op is not _overload("linalg_vector_norm"):
        return False
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    return dim is None or len(dim) == args[0].ndim


def call(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], decompose: Callable[[], Any]) -> Any:
    """`op` under the contract.

    Args:
        op, args, kwargs: what the dispatcher was about to run. decompose: runs the parts of a composite operator.

    Raises:
        NotImplementedError: an operator that no rule covers. TypeError, ValueError: from the operator that serves it.
    """
    if _always_allowed(op) or op._schema.name in trusted_operators:
        return op(*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = [t for t in tensors if t.device.type == runtime.device_type()]
    wanted = kwargs.get("dtype")
    inexact = any(t.is_floating_point() or t.is_complex() for t in here)
    to_float = bool(here) and isinstance(wanted, torch.dtype) and (wanted.is_floating_point or wanted.is_complex)
    if not inexact and not to_float:  # integers add up to the same in any order
        return op(*args, **kwargs)
    if op in SERVED:
        if any(t.dtype == torch.float64 or t.is_complex() for t in here) or wanted == torch.float64:
            raise unsupported(op._schema.name, tensors, "is not served in fp64 or complex numbers")
        with torch._C.DisableTorchFunction():
            return SERVED[op](*args, **kwargs)
    if _is_full_norm(op, args, kwargs):
        return op(*args, **kwargs)
    if op._can_decompose():
        if torch.is_grad_enabled() and any(t.requires_grad for t in here):
            # Autograd takes composite operators apart. One that arrives whole was replaced and lost its gradient.
            raise unsupported(op._schema.name, tensors, "was replaced by a kernel without a gradient")
        return decompose()
    raise unsupported(op._schema.name, tensors)
