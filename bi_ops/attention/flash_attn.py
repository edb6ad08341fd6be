"""The package flash-attn, FlashAttention 2, where it is installed: never chosen, it serves where it is named.

Read in the sources of flash-attn 2.7 to 2.8, whose signatures are one. Its forward takes each tile of queries over the
keys of its sequence alone, unless the batch's longest sequences make it choose another kernel: `_arguments` keeps them
from it. Its deterministic backward adds dQ up in ceil(SMs / (sequences * query heads)) parts, so dQ's bits depend on
how many sequences share the batch. Hence two backends with one forward, and the second says what it gives up.
"""

from __future__ import annotations

from typing import Any

import torch

from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import runtime
from bi_ops.core.backends import Support

#: From, and below. Before 2.7 the backward has other arguments, and before 2.6 lse another layout.
SUPPORTED = ((2, 7), (3, 0))

_GET = "pip install --no-build-isolation 'bi-ops[flash-attn]'"


def availability() -> Support:
    """Can flash-attn run here? Imports it where there is a GPU: a build for another torch shows only then."""
    if runtime.INTERPRET:
        return Support(False, f"no GPU: flash-attn's kernels need one; on a machine with one {_GET}")
    if torch.cuda.get_device_capability() < (8, 0):
        return Support(False, f"flash-attn needs sm_80 or newer, this GPU is {runtime.architecture()}")
    try:
        import flash_attn
        from flash_attn import flash_attn_varlen_func  # noqa: F401  (flash-attn 4 alone has the name, but not this)
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward  # noqa: F401
    except ImportError as e:
        return Support(False, f"flash-attn cannot be imported ({e}); {_GET}")
    low, high = SUPPORTED
    version = flash_attn.__version__
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        return Support(False, f"flash-attn {version} is not supported, 2.7 to 2.8 are; {_GET}")
    return Support(True, f"flash-attn {version}; serves where it is named")


def _arguments(seqlens: Seqlens, params: AttentionParams) -> dict[str, Any]:
    """What both passes take. The maxima are bounds, and here ones at which the batch chooses no kernel.

    At a max_seqlen_q of 1 flash-attn drops `causal` and, where heads share keys, splits the keys by how full the GPU
    is. A window that covers max_seqlen_k is dropped, and on some GPUs the kernel without has other steps.
    """
    return {
        "cu_seqlens_q": seqlens.cu_q,
        "cu_seqlens_k": seqlens.cu_k,
        "max_seqlen_q": max(seqlens.max_q, 2),
        "max_seqlen_k": max(seqlens.max_k, params.left + 1, params.right + 1),
        "dropout_p": 0.0,
        "softmax_scale": params.scale,
        "causal": params.causal,
        "softcap": params.softcap,
        "alibi_slopes": None,
        "deterministic": True,
    }


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seqlens: Seqlens, params: AttentionParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], contiguous, lse fp32 [Hq, T]) of at least one query and one key."""
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        **_arguments(seqlens, params),
        window_size=(params.left, params.right),
        return_attn_probs=True,  # without dropout that is lse, and no probabilities
    )
    return out.contiguous(), lse  # out has the order of q's strides


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous: the same bits on every run, not in every batch.

    Raises:
        RuntimeError: a gradient through lse, for which flash-attn has no place.
    """
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    if g_lse is not None:
        raise RuntimeError(
            "flash_attention: backend 'flash_attn_deterministic' has no gradient through lse. Use backend "
            "'flash_attn', the same forward with bi_ops' backward"
        )
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    _flash_attn_varlen_backward(
        g,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        **_arguments(seqlens, params),
        window_size_left=params.left,
        window_size_right=params.right,
    )
    return dq, dk, dv
