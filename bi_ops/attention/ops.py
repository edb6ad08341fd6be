"""Attention: check, select a backend, run, differentiate."""

from __future__ import annotations

import operator
from typing import Literal, overload

import torch

from bi_ops.attention.backends import AttentionBackend, backends, select
from bi_ops.attention.checks import (
    check_cache_head_dim,
    check_features,
    check_lengths_tensor,
    check_pages,
    check_qkv,
    check_rows,
    longest,
)
from bi_ops.attention.order import AttentionOrder, Problem
from bi_ops.attention.padding import padded, unpadded
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import checks
from bi_ops.core.arch import Arch
from bi_ops.core.launches import empty
from bi_ops.core.operators import custom_op
from bi_ops.core.replay import replayed

# --------------------------------------------------------------------------------------------------------------
# launch: nothing below reads a tensor's values, so that launches can be made again for others


def _chosen(
    backend: str, q: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None, paged: bool = False
) -> tuple[AttentionBackend, AttentionOrder, Arch]:
    """Who computes, in which order, for which architecture."""
    chosen, arch = backends.get(backend), arches.of(q.device)
    return chosen, chosen.order(Problem(q.shape[2], q.dtype, params.features(sinks), paged), arch), arch


@replayed
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    read: bool,
    backend: str,
    sinks: torch.Tensor | None,
    *params: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    seqlens, given = Seqlens(cu_q, cu_k, max_q, max_k, read), AttentionParams(*params)  # type: ignore[arg-type]
    chosen, order, arch = _chosen(backend, q, given, sinks)
    return chosen.forward(q, k, v, seqlens, given, sinks, order, arch)


@replayed
def _backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    g_lse: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    read: bool,
    backend: str,
    sinks: torch.Tensor | None,
    need_q: bool,
    need_kv: bool,
    need_sinks: bool,
    *params: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    seqlens, given = Seqlens(cu_q, cu_k, max_q, max_k, read), AttentionParams(*params)  # type: ignore[arg-type]
    chosen, order, arch = _chosen(backend, q, given, sinks)
    sinks = sinks if need_sinks else None  # the softmax's are in the lse
    dq, dk, dv, dsinks = chosen.backward(
        g, q, k, v, out, lse, g_lse, seqlens, given, sinks, need_q, need_kv, order, arch
    )
    return dq if need_q else empty(dq, 0), *((dk, dv) if need_kv else (empty(dk, 0), empty(dk, 0))), dsinks


# --------------------------------------------------------------------------------------------------------------
# custom operators


def _seqlens(
    q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int | None, max_k: int | None
) -> Seqlens:
    op, read = "flash_attention", max_q is None and max_k is None
    max_q = longest(op, "cu_seqlens", cu_q, q.shape[0], max_q)
    return Seqlens(cu_q, cu_k, max_q, longest(op, "cu_seqlens_k", cu_k, k.shape[0], max_k), read)


@custom_op("bi_ops::flash_attention")
def _flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int | None,
    max_k: int | None,
    causal: bool,
    scale: float,
    backend: str,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], lse fp32 [Hq, T]). backend: its name, as `select` returns it."""
    seqlens = _seqlens(q, k, cu_q, cu_k, max_q, max_k)
    return _forward(q, k, v, *seqlens, backend, sinks, causal, scale, left, right, softcap)


@_flash.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, backend, *features):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@custom_op("bi_ops::flash_attention_backward")
def _flash_grad(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int | None,
    max_k: int | None,
    causal: bool,
    scale: float,
    need_q: bool,
    need_kv: bool,
    need_sinks: bool = False,
    g_lse: torch.Tensor | None = None,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsinks), contiguous; empty tensors where not needed. g_lse: [Hq, T], contiguous.

    sinks, backend: the forward's.
    """
    seqlens = _seqlens(q, k, cu_q, cu_k, max_q, max_k)
    needed, params = (need_q, need_kv, need_sinks), (causal, scale, left, right, softcap)
    return _backward(g, q, k, v, out, lse, g_lse, *seqlens, backend, sinks, *needed, *params)


@_flash_grad.register_fake
def _(
    g,
    q,
    k,
    v,
    out,
    lse,
    cu_q,
    cu_k,
    max_q,
    max_k,
    causal,
    scale,
    need_q,
    need_kv,
    need_sinks=False,
    g_lse=None,
    left=-1,
    right=-1,
    softcap=0.0,
    sinks=None,
    backend="triton",
):
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    dsinks = sinks.new_empty(sinks.shape) if need_sinks else q.new_empty(0)
    return q.new_empty(q.shape if need_q else 0), dk, dv, dsinks


def _flash_setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.causal, ctx.scale, ctx.backend, *ctx.features, sinks = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, sinks)
    ctx.set_materialize_grads(False)  # what nobody asked for comes as None


def _flash_backward(ctx, g, g_lse):
    q, k, v, out, lse, cu_q, cu_k, sinks = ctx.saved_tensors
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    need_sinks = ctx.needs_input_grad[-1]
    g = torch.zeros_like(out) if g is None else g
    g_lse = None if g_lse is None else g_lse.contiguous()
    dq, dk, dv, dsinks = _flash_grad(
        *(g, q, k, v, out, lse, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.causal, ctx.scale, need_q, need_k or need_v),
        *(need_sinks, g_lse, *ctx.features, sinks, ctx.backend),
    )
    grads = dq if need_q else None, dk if need_k else None, dv if need_v else None
    return *grads, *([None] * 10), dsinks if need_sinks else None


_flash.register_autograd(_flash_backward, setup_context=_flash_setup)


def _run_paged(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    max_q: int | None,
    params: AttentionParams,
    backend: str,
    sinks: torch.Tensor | None,
    constant_metadata: bool,
) -> None:
    """Write out [T, Hq, D], contiguous."""
    if max_q is not None or q.device.type == "cpu":
        longest("paged_attention", "cu_seqlens_q", cu_q, q.shape[0], max_q)
    max_q = None if max_q is None else min(max_q, q.shape[0])
    if q.device.type == "cpu":
        check_pages(k_cache, table, seqlens_k)
    chosen, order, arch = _chosen(backend, q, params, sinks, paged=True)
    paged = (out, q, k_cache, v_cache, table, cu_q, seqlens_k, max_q)
    chosen.paged_forward(*paged, params, sinks, order, arch, constant_metadata)


@custom_op("bi_ops::paged_attention")
def _paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    max_q: int | None,
    causal: bool,
    scale: float,
    backend: str,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    constant_metadata: bool = False,
) -> torch.Tensor:
    out, params = empty(q, q.shape), AttentionParams(causal, scale, left, right, softcap)
    _run_paged(out, q, k_cache, v_cache, table, cu_q, seqlens_k, max_q, params, backend, sinks, constant_metadata)
    return out


@_paged.register_fake
def _(q, k_cache, v_cache, table, cu_q, seqlens_k, max_q, causal, scale, backend, *features):
    return q.new_empty(q.shape)


@custom_op("bi_ops::paged_attention_out", mutates_args=("out",))
def _paged_out(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    max_q: int | None,
    causal: bool,
    scale: float,
    backend: str,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    constant_metadata: bool = False,
) -> None:
    params = AttentionParams(causal, scale, left, right, softcap)
    _run_paged(out, q, k_cache, v_cache, table, cu_q, seqlens_k, max_q, params, backend, sinks, constant_metadata)


@_paged_out.register_fake
def _(out, q, k_cache, v_cache, table, cu_q, seqlens_k, max_q, causal, scale, backend, *features):
    return None


# --------------------------------------------------------------------------------------------------------------
# public functions


@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> torch.Tensor: ...
@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention inside each packed sequence (Dao et al., 2022), in memory linear in the tokens.

    out, dq, dk and dv of a sequence have the same bits alone or packed with others (but for the gradients of backend
    'flash_attn_deterministic'). Query heads share key heads in order: query head h uses key head h // (Hq / Hkv).

    Args:
        q: [T, Hq, D], bf16, fp16 or fp32. k: [Tk, Hkv, D], Hkv divides Hq. v: [Tk, Hkv, Dv]. D and Dv are from 1 to
            256; unless they are one multiple of 8 from 16 on, q, k and v are padded with zeros to the next, whose order
            and bits they then have. The last dimension should be contiguous, other strides are free: views into a
            fused projection are fine.
        cu_seqlens: int32 [B + 1], where each sequence starts in q; sequences may be empty. Rows before the first or
            after the last, which a GPU call with `max_seqlen` does not see, give zeros: out, lse and gradients.
        cu_seqlens_k: the same for k and v; None: as `cu_seqlens`.
        max_seqlen, max_seqlen_k: at least the longest sequence. Without them a GPU call waits for `cu_seqlens`, and
            then checks its contents; with them a GPU call sees only that they leave room (see `check_cu_seqlens`).
        causal: query i of n sees key j of m when j <= i + m - n (the last query sees the last key).
        softmax_scale: > 0; None: D ** -0.5.
        window_size: (left, right): query i also sees key j only when i + m - n - left <= j <= i + m - n + right; -1
            is no limit. As flash-attn's, so causal is right = 0.
        softcap: scores become softcap * tanh(score / softcap), score being scaled by softmax_scale; 0: they stay.
        sinks: [Hq], a learned score per head, bf16, fp16 or fp32, that joins the softmax and takes no value. Its
            gradient is a sum over tokens, front to back in chunks of 16: the same bits for the same tokens.
        return_lse: also return the log of the sum of exponentials, the sink's among them. It has a gradient.
        backend: who computes it, a name of `bi_ops.attention.backends`; None: the first that serves this head size,
            dtype and features here. Backends differ in bits (`order_of` says how): rollout and training name the same.

    Returns:
        [T, Hq, Dv], contiguous unless v was padded, in the dtype of q; with return_lse (that, lse fp32 [Hq, T]). A
        query that sees no key gives zeros, and an lse of +inf, or of its sink.

    Raises:
        TypeError: unsupported or differing dtypes. ValueError: wrong shapes, devices, cu_seqlens, window_size or
        softcap, or an unknown backend. RuntimeError: the named backend cannot run here, or cannot serve this head size,
        dtype or feature.
    """
    op = "flash_attention"
    checks.boolean(op, "return_lse", return_lse)
    for given, longest_given in (("max_seqlen", max_seqlen), ("max_seqlen_k", max_seqlen_k)):
        if longest_given is not None:
            checks.integer(op, given, longest_given)
    checks.backend_name(op, backend)
    scale = check_qkv(op, softmax_scale, q=q, k=k, v=v)
    params = check_features(op, q, causal, scale, window_size, softcap, sinks)
    check_lengths_tensor(op, "cu_seqlens", cu_seqlens)
    checks.same_device(op, q=q, cu_seqlens=cu_seqlens)
    cu_q = cu_k = cu_seqlens.contiguous()
    if cu_seqlens_k is None:
        same = q.shape[0] == k.shape[0]
        checks.shape(op, same, lambda: f"{q.shape[0]} queries but {k.shape[0]} keys; give cu_seqlens_k if they differ")
        max_seqlen_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    else:
        check_lengths_tensor(op, "cu_seqlens_k", cu_seqlens_k)
        checks.same_device(op, q=q, cu_seqlens_k=cu_seqlens_k)
        cu_k = cu_seqlens_k.contiguous()
        checks.shape(
            op,
            cu_q.shape == cu_k.shape,
            lambda: f"cu_seqlens {list(cu_q.shape)} and cu_seqlens_k {list(cu_k.shape)} differ",
        )
    check_rows(op, max(q.shape[0], k.shape[0]), q.shape[1], cu_q.shape[0])
    q, k, v, value_dim = *padded(q, k, v), v.shape[2]
    name = select(operator.index(q.shape[2]), q.dtype, params.features(sinks), q.device, backend)
    out, lse = _flash(
        *(q, k, v, cu_q, cu_k, max_seqlen, max_seqlen_k, causal, scale),
        *(name, params.left, params.right, params.softcap, sinks if sinks is None else sinks.contiguous()),
    )
    out = unpadded(out, value_dim)
    return (out, lse) if return_lse else out


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    backend: str | None = None,
    out: torch.Tensor | None = None,
    constant_metadata: bool = False,
) -> torch.Tensor:
    """`flash_attention` with keys and values in pages: decoding and chunked prefill. Forward only, the same bits.

    Args:
        q: [T, Hq, D], the new tokens of each sequence. k_cache, v_cache: [blocks, block_size, Hkv, D], any block size
            (backend 'vllm': a multiple of 16), with the new tokens' keys and values already written.
        block_table: int32 [B, max_blocks], the blocks of each sequence in order.
        cu_seqlens_q: int32 [B + 1]. seqlens_k: int32 [B], all keys of each sequence, the new ones included.
        max_seqlen_q: at least the longest of the new parts. None: any split of the T tokens into B new parts may come,
            so a CUDA graph captured without it serves decoding, prefill and mixed batches of T tokens; no bit differs.
        causal, softmax_scale, window_size, softcap, sinks and backend: as `flash_attention`. Blocks before the first
            new token's window may hold anything.
        out: [T, Hq, D], contiguous, of q's dtype: where the result is written.
        constant_metadata: no kernel of the CUDA graph that is being captured writes block_table, cu_seqlens_q or
            seqlens_k. They are then read while the kernel before still runs (`bi_ops.core.pdl`). Outside a capture it
            changes nothing.

    Returns:
        [T, Hq, D], contiguous, in the dtype of q: out if it is given. Rows of no sequence are zeros.

    Raises:
        TypeError, ValueError, RuntimeError: as `flash_attention`, and RuntimeError if q needs a gradient. What the
        block table and seqlens_k contain is checked on the CPU only.
    """
    op = "paged_attention"
    checks.backend_name(op, backend)
    if max_seqlen_q is not None:
        checks.integer(op, "max_seqlen_q", max_seqlen_q)
    scale = check_qkv(op, softmax_scale, q=q, k_cache=k_cache, v_cache=v_cache)
    params = check_features(op, q, causal, scale, window_size, softcap, sinks)
    inputs = (q, k_cache, v_cache, *(() if sinks is None else (sinks,)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise RuntimeError(f"{op}: has no backward; use flash_attention, or torch.no_grad() to decode")
    check_lengths_tensor(op, "cu_seqlens_q", cu_seqlens_q)
    checks.tensor(op, "block_table", block_table, ndim=2)
    checks.tensor(op, "seqlens_k", seqlens_k, ndim=1)
    checks.dtype(op, "block_table", block_table, (torch.int32,))
    checks.dtype(op, "seqlens_k", seqlens_k, (torch.int32,))
    checks.same_device(op, q=q, block_table=block_table, cu_seqlens_q=cu_seqlens_q, seqlens_k=seqlens_k)
    n = cu_seqlens_q.shape[0] - 1
    ok = block_table.shape[0] == n and seqlens_k.shape[0] == n
    checks.shape(
        op,
        ok,
        lambda: (
            f"cu_seqlens_q has {n} sequences, block_table {block_table.shape[0]} and seqlens_k {seqlens_k.shape[0]}"
        ),
    )
    checks.shape(op, k_cache.shape[1] > 0, lambda: f"block_size must not be 0, got k_cache {list(k_cache.shape)}")
    check_rows(op, q.shape[0], q.shape[1], n)
    check_cache_head_dim(op, q.shape[2], v_cache.shape[3])
    name = select(operator.index(q.shape[2]), q.dtype, params.features(sinks), q.device, backend, paged=True)
    checks.boolean(op, "constant_metadata", constant_metadata)
    metadata = block_table, cu_seqlens_q, seqlens_k
    dense = [t if t.stride(-1) == 1 else t.contiguous() for t in metadata]
    constant_metadata = constant_metadata and all(a is b for a, b in zip(dense, metadata, strict=True))  # no new copy
    given = (
        *(q, k_cache, v_cache, *dense, max_seqlen_q, causal, scale, name, params.left, params.right, params.softcap),
        *(sinks if sinks is None else sinks.contiguous(), constant_metadata),
    )
    if out is None:
        return _paged(*given)
    checks.tensor(op, "out", out, ndim=3)
    checks.same_dtype(op, q=q, out=out)
    checks.same_device(op, q=q, out=out)
    ok = out.shape == q.shape and out.is_contiguous() and not out.requires_grad
    checks.shape(op, ok, lambda: f"out must be {list(q.shape)}, contiguous, without a gradient, got {list(out.shape)}")
    _paged_out(out, *given)
    return out
