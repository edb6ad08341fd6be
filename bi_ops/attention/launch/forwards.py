"""Launches of the forward, of dense keys and values, of pages, and beside a mask."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from bi_ops.attention import config as configs
from bi_ops.attention.config import DecodeConfig, ForwardConfig, KernelConfig
from bi_ops.attention.kernels.forward import attention_clear_kernel, attention_kernel
from bi_ops.attention.launch.common import constants, grid, is_dense, is_plain, mask_strides, unit_stride
from bi_ops.attention.order import KeySteps
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import runtime
from bi_ops.core.arch import Arch
from bi_ops.core.integers import cdiv
from bi_ops.core.launches import empty, recorded
from bi_ops.core.triton_helpers import PINNED


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
    if is_plain(q, k, params, sinks):
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
    if table.numel() > 0 and is_plain(q, k_cache, params, sinks):
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
    lse = empty(q, (q.shape[1], q.shape[0]), torch.float32)
    cu_q, cu_k, max_q, *_ = seqlens
    if isinstance(config, ForwardConfig):
        from bi_ops.attention.hopper.forward import launch

        out = empty(q, q.shape)
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
    out = empty(q, q.shape) if out is None else out
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

        lse = empty(q, (q.shape[1], q.shape[0]), torch.float32)  # which nobody reads
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
    out = empty(q, q.shape) if out is None else out
    n_pairs, max_rows = (cu_q.shape[0] - 1) * hkv, None if max_q is None else max_q * (hq // hkv)
    if n_pairs == 0 or n_tokens == 0 or max_rows == 0:
        return out
    recorded(attention_kernel)[grid(config, n_pairs, hkv, n_tokens * (hq // hkv), max_rows)](
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
        *mask_strides(mask),
        **constants(q, hkv, params),
        BLOCK_M=config.block,
        BLOCK_N=order.block_n,
        GROUPS=config.pairs,
        DENSE=is_dense(config, max_rows),
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
