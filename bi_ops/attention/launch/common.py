"""What launches of a forward and of a backward share: grids, and a kernel's arguments."""

from __future__ import annotations

import torch

from bi_ops.attention import config as configs
from bi_ops.attention.config import KernelConfig
from bi_ops.attention.params import AttentionParams
from bi_ops.core.integers import cdiv


def unit_stride(t: torch.Tensor) -> torch.Tensor:
    """t with unit stride in its last dimension, without a copy where possible."""
    return t if t.stride(-1) == 1 else t.contiguous()


def is_plain(q: torch.Tensor, k: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None = None) -> bool:
    """Is there something to compute, and without features? Then the Gluon kernels may serve."""
    return q.shape[0] > 0 and k.shape[0] > 0 and not params.features(sinks)


def constants(q: torch.Tensor, hkv: int, params: AttentionParams) -> dict[str, int | bool]:
    head_dim = q.shape[2]
    heads = q.shape[1] // hkv
    return {"HKV": hkv, "HEADS": heads, "D": head_dim, "BLOCK_D": configs.block_d(head_dim), "CAUSAL": params.causal}


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if mask is None else mask.stride()


def is_dense(config: KernelConfig, longest: int | None) -> bool:
    """Is the grid one of pairs and tiles: where a CTA takes several pairs, or a pair is one tile, as in decoding.

    Otherwise it is a list of the tiles that exist, so that one long sequence costs the short ones nothing.
    """
    return config.pairs > 1 or (longest is not None and longest <= config.block)


def grid(config: KernelConfig, n_pairs: int, hkv: int, n_rows: int, longest: int | None) -> tuple[int, ...]:
    """CTAs for tiles of `config.block` rows. n_rows: of a KV head in all sequences; longest: of the longest one.

    longest is None: not known; a list of tiles needs no more than the number of rows.
    """
    if is_dense(config, longest):
        assert longest is not None, "several pairs in a CTA need the longest sequence"
        return cdiv(n_pairs, config.pairs), cdiv(longest, config.block)
    return ((n_rows // config.block + n_pairs // hkv) * hkv,)  # the kernels' `get_tile` knows which is whose
