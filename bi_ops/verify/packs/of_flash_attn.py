"""The package flash-attn: FlashAttention 2, packed, with its gradient as it is and as it calls deterministic."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch

from bi_ops.core import runtime
from bi_ops.verify import operators
from bi_ops.verify.subject import Subject

Tensor = torch.Tensor


def _packed(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], deterministic: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = operators.starts(lengths, q.device), max(lengths)
    return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, deterministic=deterministic)


def _decoded(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    k_cache, v_cache, table = operators.in_pages(k, v, lengths, 256)  # its smallest page
    used = [i + 1 for n in lengths for i in range(n)]
    owners = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=q.device)
    cu_q, cu_k = operators.starts((1,) * len(used), q.device), operators.starts(tuple(used), q.device)
    pages = {"block_table": table[owners], "causal": True}
    return flash_attn_varlen_func(q, k_cache, v_cache, cu_q, cu_k, 1, max(lengths), **pages)


def subjects() -> Sequence[Subject]:
    """Raises ValueError without flash-attn and a GPU."""
    if runtime.INTERPRET or importlib.util.find_spec("flash_attn") is None:
        raise ValueError("verify: flash-attn is not installed, or there is no CUDA GPU; pip install flash-attn")
    return [
        Subject(
            name,
            functools.partial(_packed, deterministic=deterministic),
            operators.qkv,
            {"q": 0, "k": 0, "v": 0},
            sequences=True,
            decode=_decoded,
            dtypes=(torch.bfloat16,),
            sizes={"cpu": (), "cuda": ((64, 0), (96, 0), (128, 0), (256, 0))},
            compiled=False,
        )
        for name, deterministic in (("flash_attn_varlen_func", False), ("flash_attn_varlen_func, deterministic", True))
    ]
