"""vLLM's FlashAttention 3 where vLLM is installed: a forward alone, dense and paged, one split."""

from __future__ import annotations

import torch

from bi_ops.attention.params import AttentionParams

#: Head sizes at which it gives a decoded row the bits of a prefilled one.
HEAD_DIMS = (128, 256)

#: It reads pages whose size is a multiple of this.
PAGE_MULTIPLE = 16


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    table: torch.Tensor | None,
    max_q: int,
    max_k: int,
    params: AttentionParams,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as vLLM's FlashAttention backend computes them under VLLM_BATCH_INVARIANT.

    The backend also hands over query and key scales, which FlashAttention 3 reads for fp8 alone.

    Args:
        q: [T, Hq, D], T > 0. k, v: [Tk, Hkv, D] with cu_k int32 [B + 1], or pages [blocks, block_size, Hkv, D] with
            lengths cu_k int32 [B] and their table int32 [B, max_blocks]. out: [T, Hq, D], where it is written to.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    keys = {"cu_seqlens_k": cu_k} if table is None else {"seqused_k": cu_k, "block_table": table}
    return flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_q,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=params.scale,
        causal=params.causal,
        window_size=[-1, -1],
        softcap=0.0,
        return_softmax_lse=True,
        scheduler_metadata=None,
        num_splits=1,
        fa_version=3,
        out=out,
        **keys,
    )
