"""Launches of the backward, in one pass or two, and beside a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bi_ops.attention import config as configs
from bi_ops.attention.config import (
    CHOSEN,
    BackwardConfig,
    BackwardConfigs,
    DkvConfig,
    DqConfig,
    KernelConfig,
    SinkConfig,
)
from bi_ops.attention.kernels.backward import (
    attention_add_chunks_kernel,
    attention_delta_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_dsinks_kernel,
)
from bi_ops.attention.launch.common import constants, grid, is_dense, is_plain, mask_strides, unit_stride
from bi_ops.attention.order import AttentionOrder, OnePass, RowSums, TwoPass
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import runtime
from bi_ops.core.arch import Arch
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, recorded
from bi_ops.core.triton_helpers import PINNED

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def dq_config(
    q: torch.Tensor, k: torch.Tensor, seqlens: Seqlens, params: AttentionParams, order: TwoPass, arch: Arch
) -> DqConfig | KernelConfig:
    """How dQ runs in two passes: the Gluon kernel where it serves and is faster, else the Triton kernel."""
    (_, hq, head_dim), hkv = q.shape, k.shape[1]
    gluon = configs.gluon_dq(seqlens.max_q, head_dim, q.dtype, order, arch) if is_plain(q, k, params) else None
    n_pairs = (seqlens.cu_q.shape[0] - 1) * hkv
    return gluon or configs.dq(seqlens.max_q * (hq // hkv), n_pairs, head_dim, q.dtype, order, arch)


def dkv_config(
    q: torch.Tensor, k: torch.Tensor, seqlens: Seqlens, params: AttentionParams, order: TwoPass, arch: Arch
) -> DkvConfig | KernelConfig:
    """How dK and dV run in two passes, likewise."""
    (_, hq, head_dim), hkv = q.shape, k.shape[1]
    gluon = configs.gluon_dkv(hq // hkv, head_dim, q.dtype, order, arch) if is_plain(q, k, params) else None
    n_pairs = (seqlens.cu_q.shape[0] - 1) * hkv
    return gluon or configs.dkv(seqlens.max_k, n_pairs, head_dim, q.dtype, order, arch)


def backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    g_lse: torch.Tensor | None,
    seqlens: Seqlens,
    params: AttentionParams,
    sinks: torch.Tensor | None,
    need_q: bool,
    need_kv: bool,
    order: AttentionOrder,
    arch: Arch,
    config: BackwardConfigs = CHOSEN,
) -> Gradients:
    """(dq, dk, dv, dsinks), contiguous; empty where not needed, or computed all the same.

    The forward's sinks are in the lse; they are given here if their gradient is needed. g_lse: [Hq, T], contiguous.
    """
    q, k, v, g = unit_stride(q), unit_stride(k), unit_stride(v), g.contiguous()
    some = q.shape[0] > 0 and k.shape[0] > 0
    two_pass = some and isinstance(order.backward, TwoPass)
    dq = empty(q, q.shape if need_q and two_pass else 0)
    dk, dv = (empty(k, k.shape if need_kv and two_pass else 0) for _ in range(2))
    dsinks = empty(q, 0)
    if sinks is not None or two_pass:
        gradients = [t if t.numel() else None for t in (dq, dk, dv)]
        heads = q.shape[1] // k.shape[1]
        delta, shift = launch_delta(g, out, lse, g_lse, gradients, seqlens, heads, order.row_sums)
        dsinks = dsinks if sinks is None else launch_dsinks(sinks, delta, shift, order, arch, config.sinks)
    if not some:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), dsinks
    if isinstance(order.backward, OnePass):
        dq, dk, dv = launch_one_pass(g, q, k, v, out, lse, g_lse, seqlens, params, order.backward, config.one_pass)
        return dq, dk, dv, dsinks
    assert isinstance(order.backward, TwoPass), f"{order.backward} is not of the own kernels"
    if need_q:
        launch_dq(g, q, k, v, shift, delta, dq, seqlens, params, order.backward, arch, config.dq)
    if need_kv:
        launch_dkv(g, q, k, v, shift, delta, dk, dv, seqlens, params, order.backward, arch, config.dkv)
    return dq, dk, dv, dsinks


def masked_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    neg_max: torch.Tensor,
    dmask: torch.Tensor | None,
    seqlens: Seqlens,
    params: AttentionParams,
    order: AttentionOrder,
    arch: Arch,
    config: BackwardConfigs = CHOSEN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, after `masked_forward` of at least one query and one key.

    dmask: [B, Hq, queries, keys], contiguous, zeros, which the mask's gradient is written to.
    """
    assert isinstance(order.backward, TwoPass), f"{order.backward} takes no mask"
    q, k, v, g = unit_stride(q), unit_stride(k), unit_stride(v), g.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    heads = q.shape[1] // k.shape[1]
    delta, shift = launch_delta(g, out, lse, None, (dq, dk, dv), seqlens, heads, order.row_sums)
    given, rest = (g, q, k, v, shift, delta), (seqlens, params, order.backward, arch)
    n_pairs, dtype = (seqlens.cu_q.shape[0] - 1) * k.shape[1], q.dtype
    of_dq = config.dq or configs.masked_dq(seqlens.max_q * heads, n_pairs, q.shape[2], dtype, order.backward, arch)
    of_dkv = config.dkv or configs.dkv(seqlens.max_k, n_pairs, q.shape[2], dtype, order.backward, arch)
    launch_dq(*given, dq, *rest, of_dq, mask, neg_max, dmask)
    launch_dkv(*given, dk, dv, *rest, of_dkv, mask, neg_max)
    return dq, dk, dv


def launch_one_pass(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    g_lse: torch.Tensor | None,
    seqlens: Seqlens,
    params: AttentionParams,
    order: OnePass,
    config: BackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, of plain attention over at least one query and one key."""
    from bi_ops.attention.hopper.backward import launch

    cu_q, cu_k, _, max_k, _ = seqlens
    if config is None:
        config = configs.one_pass(cdiv(max_k, order.block_n), q.shape[2], runtime.multiprocessors(q.device))
    return launch(g, q, k, v, out, lse, g_lse, cu_q, cu_k, max_k, params.causal, params.scale, order, config)


def launch_delta(
    g: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    g_lse: torch.Tensor | None,
    gradients: Sequence[torch.Tensor | None],
    seqlens: Seqlens,
    heads: int,
    order: RowSums,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums of g * out, less g_lse, and -lse in base 2, both fp32 [Hq / heads, T, heads].

    g and out are contiguous [T, Hq, D], lse and g_lse [Hq, T]; `heads` query heads share a KV head. A score's gradient
    is p * (dO . v - sum(dO * O)), and p * g_lse through the lse: so one number per row has both. Rows of `gradients`,
    (dq, dk, dv) or None for each, that belong to no sequence become zeros.
    """
    dq, dk, dv = gradients
    n_tokens, hq, head_dim = out.shape
    delta, shift = (empty(out, (hq // heads, n_tokens, heads), torch.float32) for _ in range(2))
    if n_tokens == 0:
        return delta, shift
    recorded(attention_delta_kernel)[(cdiv(n_tokens * hq, order.block_rows),)](
        g,
        out,
        lse,
        g_lse,
        delta,
        shift,
        *(dq, dk, dv, seqlens.cu_q, seqlens.cu_k),
        *(n_tokens, 0 if dk is None else dk.shape[0], seqlens.cu_q.shape[0] - 1),
        H=hq,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=configs.block_d(head_dim),
        ROWS=order.block_rows,
        num_warps=order.num_warps,
        **PINNED,
    )
    return delta, shift


def launch_dsinks(
    sinks: torch.Tensor,
    delta: torch.Tensor,
    shift: torch.Tensor,
    order: AttentionOrder,
    arch: Arch,
    config: SinkConfig | None = None,
) -> torch.Tensor:
    """The gradient of the sinks [Hq], in their dtype: the tokens' -exp(sink - lse) * delta, added front to back."""
    n_kv_heads, n_tokens, heads = delta.shape
    dsinks = empty(sinks, sinks.shape)
    config = configs.dsinks(sinks.shape[0], arch) if config is None else config
    n_chunks = cdiv(n_tokens, order.sinks_chunk)
    partial = empty(delta, (n_chunks, n_kv_heads * heads))
    tiles = cdiv(n_kv_heads * heads, config.block_h)
    shape = {"H": n_kv_heads * heads, "BLOCK_H": config.block_h, "num_warps": config.num_warps}
    if n_chunks > 0:
        recorded(attention_dsinks_kernel)[(cdiv(n_chunks, config.rows), tiles)](
            *(sinks, shift, delta, partial, n_tokens),
            HEADS=heads,
            CHUNK=order.sinks_chunk,
            ROWS=config.rows,
            **shape,
            **PINNED,
        )
    recorded(attention_add_chunks_kernel)[(tiles,)](partial, dsinks, n_chunks, UNROLL=config.unroll, **shape, **PINNED)
    return dsinks


def launch_dq(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    seqlens: Seqlens,
    params: AttentionParams,
    order: TwoPass,
    arch: Arch,
    config: DqConfig | KernelConfig | None = None,
    mask: torch.Tensor | None = None,
    neg_max: torch.Tensor | None = None,
    dmask: torch.Tensor | None = None,
) -> None:
    """Write dq [T, Hq, D], contiguous. q, k, v: as `unit_stride` returns them. shift, delta: of `launch_delta`.

    mask, neg_max, dmask: as `masked_backward`, with a KernelConfig.
    """
    if config is None:
        config = dq_config(q, k, seqlens, params, order, arch)
    cu_q, cu_k, max_q, *_ = seqlens
    if isinstance(config, DqConfig):
        from bi_ops.attention.hopper.dq import launch

        launch(g, q, k, v, shift, delta, dq, cu_q, cu_k, max_q, params.causal, params.scale, order, config)
        return
    n_tokens, hkv = q.shape[0], k.shape[1]
    heads = q.shape[1] // hkv
    n_pairs, max_rows = (cu_q.shape[0] - 1) * hkv, max_q * heads
    recorded(attention_dq_kernel)[grid(config, n_pairs, hkv, n_tokens * heads, max_rows)](
        *(g, q, k, v, shift, delta, dq, cu_q, cu_k, mask, neg_max, dmask, *params.arguments(), n_pairs, n_tokens),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *mask_strides(mask)),
        **constants(q, hkv, params),
        BLOCK_M=config.block,
        BLOCK_N=order.block_dq,
        GROUPS=config.pairs,
        DENSE=is_dense(config, max_rows),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **PINNED,
    )


def launch_dkv(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    seqlens: Seqlens,
    params: AttentionParams,
    order: TwoPass,
    arch: Arch,
    config: DkvConfig | KernelConfig | None = None,
    mask: torch.Tensor | None = None,
    neg_max: torch.Tensor | None = None,
) -> None:
    """Write dk and dv [Tk, Hkv, D], contiguous. Arguments as `launch_dq`."""
    if config is None:
        config = dkv_config(q, k, seqlens, params, order, arch)
    cu_q, cu_k, _, max_k, _ = seqlens
    if isinstance(config, DkvConfig):
        from bi_ops.attention.hopper.dkv import launch

        launch(g, q, k, v, shift, delta, dk, dv, cu_q, cu_k, max_k, params.causal, params.scale, order, config)
        return
    n_pairs, hkv = (cu_q.shape[0] - 1) * k.shape[1], k.shape[1]
    recorded(attention_dkv_kernel)[grid(config, n_pairs, hkv, k.shape[0], max_k)](
        *(g, q, k, v, shift, delta, dk, dv, cu_q, cu_k, mask, neg_max, *params.arguments(), n_pairs, q.shape[0]),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *mask_strides(mask)),
        **constants(q, hkv, params),
        BLOCK_N=config.block,
        BLOCK_R=order.block_r,
        GROUPS=config.pairs,
        DENSE=is_dense(config, max_k),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **PINNED,
    )
