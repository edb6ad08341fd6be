"""The own kernels on checked tensors, no autograd: which kernel computes an order is a matter of speed.

Every launch takes the constants that shape a sum from the `order` it is given. `config` says how the kernel is laid
out, and with its class which kernel runs; None: chosen from sizes and architecture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from bi_ops.attention import config as configs
from bi_ops.attention.config import (
    CHOSEN,
    BackwardConfig,
    BackwardConfigs,
    DecodeConfig,
    DkvConfig,
    DqConfig,
    ForwardConfig,
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
from bi_ops.attention.kernels.forward import attention_clear_kernel, attention_kernel
from bi_ops.attention.order import AttentionOrder, KeySteps, OnePass, RowSums, TwoPass
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import runtime
from bi_ops.core.arch import Arch
from bi_ops.core.integers import cdiv
from bi_ops.core.triton_helpers import PINNED

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """t with unit stride in its last dimension, without a copy where possible."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _plain(q: torch.Tensor, k: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None = None) -> bool:
    """Is there something to compute, and without features? Then the Gluon kernels may serve."""
    return q.shape[0] > 0 and k.shape[0] > 0 and not params.features(sinks)


def _constants(q: torch.Tensor, hkv: int, params: AttentionParams) -> dict[str, int | bool]:
    head_dim = q.shape[2]
    heads = q.shape[1] // hkv
    return {"HKV": hkv, "HEADS": heads, "D": head_dim, "BLOCK_D": configs.block_d(head_dim), "CAUSAL": params.causal}


def _mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if mask is None else mask.stride()


def _dense(config: KernelConfig, longest: int | None) -> bool:
    """Is the grid one of pairs and tiles: where a CTA takes several pairs, or a pair is one tile, as in decoding.

    Otherwise it is a list of the tiles that exist, so that one long sequence costs the short ones nothing.
    """
    return config.pairs > 1 or (longest is not None and longest <= config.block)


def _grid(config: KernelConfig, n_pairs: int, hkv: int, n_rows: int, longest: int | None) -> tuple[int, ...]:
    """CTAs for tiles of `config.block` rows. n_rows: of a KV head in all sequences; longest: of the longest one.

    longest is None: not known; a list of tiles needs no more than the number of rows.
    """
    if _dense(config, longest):
        assert longest is not None, "several pairs in a CTA need the longest sequence"
        return cdiv(n_pairs, config.pairs), cdiv(longest, config.block)
    return ((n_rows // config.block + n_pairs // hkv) * hkv,)  # the kernels' `get_tile` knows which is whose


# --------------------------------------------------------------------------------------------------------------
# forward


def forward_config(
    q: torch.Tensor,
    k: torch.Tensor,
    seqlens: Seqlens,
    params: AttentionParams,
    sinks: torch.Tensor | None,
    order: KeySteps,
    arch: Arch,
) -> ForwardConfig | KernelConfig:
    """How the dense forward runs: the Gluon kernel where it serves and is faster, else the Triton kernel."""
    (_, hq, head_dim), hkv = q.shape, k.shape[1]
    if _plain(q, k, params, sinks):
        gluon = configs.gluon_forward(seqlens.max_q, head_dim, q.dtype, order, arch)
        if gluon is not None:
            return gluon
    n_pairs = (seqlens.cu_q.shape[0] - 1) * hkv
    return configs.forward(seqlens.max_q * (hq // hkv), n_pairs, head_dim, q.dtype, order, arch)


def decode_config(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int | None,
    params: AttentionParams,
    sinks: torch.Tensor | None,
    order: KeySteps,
    arch: Arch,
) -> DecodeConfig | ForwardConfig | KernelConfig:
    """How the paged forward runs; reads no memory of the GPU. The Gluon kernels take pages that TMA can copy.

    Where the longest query is not known (max_q is None), a config for as many tokens in sequences of equal length.
    """
    (n_tokens, hq, head_dim), (page, hkv), n_seqs = q.shape, k_cache.shape[1:3], cu_q.shape[0] - 1
    longest = cdiv(n_tokens, max(n_seqs, 1)) if max_q is None else max_q
    n_pairs, max_rows = n_seqs * hkv, longest * (hq // hkv)
    if table.numel() > 0 and _plain(q, k_cache, params, sinks):
        num_sms = runtime.multiprocessors(q.device)
        gluon = configs.gluon_paged(longest, hq // hkv, n_pairs, head_dim, q.dtype, order, arch, num_sms)
        box = math.gcd(page, order.block_n)
        if gluon is not None:
            from bi_ops.gluon import tma  # needs a Triton that has Gluon

            if tma.is_cache_compatible(k_cache, box) and tma.is_cache_compatible(v_cache, box):
                return gluon
    config = configs.forward(max_rows, n_pairs, head_dim, q.dtype, order, arch)
    return replace(config, pairs=1) if max_q is None else config


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlens: Seqlens,
    params: AttentionParams,
    sinks: torch.Tensor | None,
    order: KeySteps,
    arch: Arch,
    config: ForwardConfig | KernelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], contiguous, lse fp32 [Hq, T]): q [T, Hq, D], k and v [Tk, Hkv, D]."""
    if config is None:
        config = forward_config(q, k, seqlens, params, sinks, order, arch)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    cu_q, cu_k, max_q, *_ = seqlens
    if isinstance(config, ForwardConfig):
        from bi_ops.attention.hopper.forward import launch

        out = q.new_empty(q.shape)
        launch(q, k, v, out, lse, cu_q, cu_k, None, max_q, params.causal, params.scale, order, config)
        return out, lse
    return _triton_forward(q, k, v, lse, cu_q, cu_k, None, max_q, params, sinks, order, config), lse


def paged_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    max_q: int | None,
    params: AttentionParams,
    sinks: torch.Tensor | None,
    order: KeySteps,
    arch: Arch,
    config: DecodeConfig | ForwardConfig | KernelConfig | None = None,
    out: torch.Tensor | None = None,
    constant_metadata: bool = False,
) -> torch.Tensor:
    """[T, Hq, D], contiguous: `forward` over pages [blocks, block_size, Hkv, D], the same bits.

    max_q: at least the longest query, or None: then the launch is that of any split of the tokens into sequences, as a
    CUDA graph needs it. out: where it is written to. constant_metadata: as `paged_attention`.
    """
    out = q.new_empty(q.shape) if out is None else out
    if config is None:
        config = decode_config(q, k_cache, v_cache, table, cu_q, max_q, params, sinks, order, arch)
    if isinstance(config, DecodeConfig):
        from bi_ops.attention.hopper.decode import launch

        decoding = max_q is not None and max_q * (q.shape[1] // k_cache.shape[2]) <= config.rows
        rest = (params.causal, params.scale, order, config, constant_metadata)
        launch(q, k_cache, v_cache, table, cu_q, seqlens_k, out, decoding, *rest)
        return out
    if isinstance(config, ForwardConfig):
        from bi_ops.attention.hopper import forward as hopper

        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)  # which nobody reads
        paged = (q, k_cache, v_cache, out, lse, cu_q, seqlens_k, table, max_q)
        hopper.launch(*paged, params.causal, params.scale, order, config)
        return out
    return _triton_forward(
        *(q, k_cache, v_cache, None, cu_q, seqlens_k, table, max_q, params, sinks, order, config), out=out
    )


def _triton_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    table: torch.Tensor | None,
    max_q: int | None,
    params: AttentionParams,
    sinks: torch.Tensor | None,
    order: KeySteps,
    config: KernelConfig,
    mask: torch.Tensor | None = None,
    neg_max: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """k and v [Tk, Hkv, D] with cu_k [B + 1], or pages with lengths cu_k [B] and their table.

    max_q: None, for pages: not known. mask, neg_max: as `masked_forward`. out: where it is written to.
    """
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    n_tokens, hq = q.shape[:2]
    hkv = k.shape[-2]
    out = q.new_empty(q.shape) if out is None else out
    n_pairs, max_rows = (cu_q.shape[0] - 1) * hkv, None if max_q is None else max_q * (hq // hkv)
    if n_pairs == 0 or n_tokens == 0 or max_rows == 0:
        return out
    attention_kernel[_grid(config, n_pairs, hkv, n_tokens * (hq // hkv), max_rows)](
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        table,
        sinks,
        mask,
        neg_max,
        *params.arguments(),
        n_pairs,
        n_tokens,
        *q.stride()[:2],
        *(k.stride()[:3] if table is not None else (0, *k.stride()[:2])),
        *(v.stride()[:3] if table is not None else (0, *v.stride()[:2])),
        0 if table is None else table.stride(0),
        *_mask_strides(mask),
        **_constants(q, hkv, params),
        BLOCK_M=config.block,
        BLOCK_N=order.block_n,
        GROUPS=config.pairs,
        DENSE=_dense(config, max_rows),
        PAGE=0 if table is None else k.shape[1],
        HAS_LSE=lse is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **PINNED,
    )
    return out


def masked_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    seqlens: Seqlens,
    params: AttentionParams,
    order: KeySteps,
    arch: Arch,
    config: KernelConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], contiguous, log of the row sums fp32 [Hq, T], -row_max fp32 [Hkv, T, Hq / Hkv]).

    mask: [B, Hq, queries, keys], any strides, numbers or uint8 of a bool; B sequences of one length. Row maximum and
    row sum are kept apart, because beside a mask of -3e38 the logarithm of a sum is lost.
    """
    (n_tokens, hq, head_dim), hkv = q.shape, k.shape[1]
    if config is None:
        n_pairs = (seqlens.cu_q.shape[0] - 1) * hkv
        config = configs.masked_forward(seqlens.max_q * (hq // hkv), n_pairs, head_dim, q.dtype, order, arch)
    lse = q.new_empty((hq, n_tokens), dtype=torch.float32)
    neg_max = q.new_empty((hkv, n_tokens, hq // hkv), dtype=torch.float32)
    given = (seqlens.cu_q, seqlens.cu_k, None, seqlens.max_q, params, None, order, config)
    return _triton_forward(q, k, v, lse, *given, mask, neg_max), lse, neg_max


def clear_outside(cu: torch.Tensor, rows: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Zeros in rows [T, H, D], contiguous, and lse [H, T] of tokens outside the sequences, which the GPU alone knows.

    For kernels that are not ours: ours do so themselves.
    """
    n_tokens, heads, head_dim = rows.shape
    attention_clear_kernel[(min(n_tokens, 256),)](
        *(rows, lse, cu, cu.shape[0] - 1, n_tokens), H=heads, D=head_dim, num_warps=4, **PINNED
    )


# --------------------------------------------------------------------------------------------------------------
# backward


def dq_config(
    q: torch.Tensor, k: torch.Tensor, seqlens: Seqlens, params: AttentionParams, order: TwoPass, arch: Arch
) -> DqConfig | KernelConfig:
    """How dQ runs in two passes: the Gluon kernel where it serves and is faster, else the Triton kernel."""
    (_, hq, head_dim), hkv = q.shape, k.shape[1]
    gluon = configs.gluon_dq(seqlens.max_q, head_dim, q.dtype, order, arch) if _plain(q, k, params) else None
    n_pairs = (seqlens.cu_q.shape[0] - 1) * hkv
    return gluon or configs.dq(seqlens.max_q * (hq // hkv), n_pairs, head_dim, q.dtype, order, arch)


def dkv_config(
    q: torch.Tensor, k: torch.Tensor, seqlens: Seqlens, params: AttentionParams, order: TwoPass, arch: Arch
) -> DkvConfig | KernelConfig:
    """How dK and dV run in two passes, likewise."""
    (_, hq, head_dim), hkv = q.shape, k.shape[1]
    gluon = configs.gluon_dkv(hq // hkv, head_dim, q.dtype, order, arch) if _plain(q, k, params) else None
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
    dq = q.new_empty(q.shape if need_q and two_pass else 0)
    dk, dv = (k.new_empty(k.shape if need_kv and two_pass else 0) for _ in range(2))
    dsinks = q.new_empty(0)
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
    delta, shift = (out.new_empty((hq // heads, n_tokens, heads), dtype=torch.float32) for _ in range(2))
    if n_tokens == 0:
        return delta, shift
    attention_delta_kernel[(cdiv(n_tokens * hq, order.block_rows),)](
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
    dsinks = sinks.new_empty(sinks.shape)
    config = configs.dsinks(sinks.shape[0], arch) if config is None else config
    n_chunks = cdiv(n_tokens, order.sinks_chunk)
    partial = delta.new_empty((n_chunks, n_kv_heads * heads))
    tiles = cdiv(n_kv_heads * heads, config.block_h)
    shape = {"H": n_kv_heads * heads, "BLOCK_H": config.block_h, "num_warps": config.num_warps}
    if n_chunks > 0:
        attention_dsinks_kernel[(cdiv(n_chunks, config.rows), tiles)](
            *(sinks, shift, delta, partial, n_tokens),
            HEADS=heads,
            CHUNK=order.sinks_chunk,
            ROWS=config.rows,
            **shape,
            **PINNED,
        )
    attention_add_chunks_kernel[(tiles,)](partial, dsinks, n_chunks, UNROLL=config.unroll, **shape, **PINNED)
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
    attention_dq_kernel[_grid(config, n_pairs, hkv, n_tokens * heads, max_rows)](
        *(g, q, k, v, shift, delta, dq, cu_q, cu_k, mask, neg_max, dmask, *params.arguments(), n_pairs, n_tokens),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *_mask_strides(mask)),
        **_constants(q, hkv, params),
        BLOCK_M=config.block,
        BLOCK_N=order.block_dq,
        GROUPS=config.pairs,
        DENSE=_dense(config, max_rows),
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
    attention_dkv_kernel[_grid(config, n_pairs, hkv, k.shape[0], max_k)](
        *(g, q, k, v, shift, delta, dk, dv, cu_q, cu_k, mask, neg_max, *params.arguments(), n_pairs, q.shape[0]),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *_mask_strides(mask)),
        **_constants(q, hkv, params),
        BLOCK_N=config.block,
        BLOCK_R=order.block_r,
        GROUPS=config.pairs,
        DENSE=_dense(config, max_k),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **PINNED,
    )
