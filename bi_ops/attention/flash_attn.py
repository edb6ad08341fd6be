"""flash-attn's FlashAttention 2 where that package is installed: never chosen, only forced.

Read in the sources of flash-attn 2.7 to 2.8, whose signatures are one. Its forward walks each tile of queries over the
keys of its sequence alone, unless the batch's longest sequences make it choose another kernel: `_arguments` keeps them
from it. Its deterministic backward adds dQ up in ceil(SMs / (sequences * query heads)) parts, so dQ's bits depend on
how many sequences share the batch. Hence two providers with one forward, and the second says what it gives up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bi_ops.core import runtime
from bi_ops.core.providers import Availability, Provider

if TYPE_CHECKING:
    from bi_ops.attention.launch import Scores

#: From, and below. Before 2.7 the backward has other arguments, and before 2.6 lse another layout.
SUPPORTED = ((2, 7), (3, 0))

_GET = "pip install --no-build-isolation 'bi-ops[flash-attn]'"


def availability() -> Availability:
    """Can flash-attn run here? Imports it where there is a GPU: a build for another torch shows only then."""
    if runtime.INTERPRET:
        return Availability(False, f"no GPU: flash-attn's kernels need one; on a machine with one {_GET}")
    if torch.cuda.get_device_capability() < (8, 0):
        return Availability(False, f"flash-attn needs sm_80 or newer, this GPU is {runtime.architecture()}")
    try:
        import flash_attn
        from flash_attn import flash_attn_varlen_func  # noqa: F401  (flash-attn 4 alone has the name, but not this)
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward  # noqa: F401
    except ImportError as e:
        return Availability(False, f"flash-attn cannot be imported ({e}); {_GET}")
    low, high = SUPPORTED
    version = flash_attn.__version__
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        return Availability(False, f"flash-attn {version} is not supported, 2.7 to 2.8 are; {_GET}")
    return Availability(True, f"flash-attn {version}; serves where it is forced")


#: Both passes are flash-attn's: the same bits on every run of a batch, but dQ depends on the batch.
DETERMINISTIC = "flash_attn_deterministic"

#: One forward, so the same outputs and lse in bits, which are nobody else's.
PROVIDERS = (
    Provider(
        "flash_attn",
        availability,
        False,
        "flash-attn's forward, bi_ops' backward; bf16 and fp16, dense only, no sinks",
    ),
    Provider(
        DETERMINISTIC,
        availability,
        False,
        "as flash_attn, but with flash-attn's deterministic backward: reruns agree, dQ depends on the batch",
        batch_invariant=False,
    ),
)
NAMES = tuple(p.name for p in PROVIDERS)


def check(op: str, name: str, dtype: torch.dtype, features: Sequence[str]) -> None:
    """Raise RuntimeError unless the forced provider `name` serves this operator, dtype and these features."""
    if op == "paged_attention":
        raise RuntimeError(
            f"{op}: provider {name!r} cannot serve it: over pages flash-attn runs another kernel, so decoded rows are "
            "not known to have the bits of prefilled ones. Use provider 'triton' or 'vllm' in rollout and training"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"{op}: provider {name!r} cannot serve {dtype}. Use bf16 or fp16, or provider 'triton'")
    if "sinks" in features:
        raise RuntimeError(f"{op}: provider {name!r} cannot serve sinks: flash-attn has none. Use provider 'triton'")


def _arguments(cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, scores: Scores) -> dict[str, Any]:
    """What both passes take. The maxima are bounds, and here ones at which the batch chooses no kernel.

    At a max_seqlen_q of 1 flash-attn drops `causal` and, where heads share keys, splits the keys by how full the GPU
    is. A window that covers max_seqlen_k is dropped, and on some GPUs the kernel without has other steps.
    """
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(max_q, 2),
        "max_seqlen_k": max(max_k, scores.left + 1, scores.right + 1),
        "dropout_p": 0.0,
        "softmax_scale": scores.scale,
        "causal": scores.causal,
        "softcap": scores.softcap,
        "alibi_slopes": None,
        "deterministic": True,
    }


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], contiguous, lse fp32 [Hq, T]) of at least one query and one key."""
    from flash_attn import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        q,
        k,
        v,
        **_arguments(cu_q, cu_k, max_q, max_k, scores),
        window_size=(scores.left, scores.right),
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
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous: the same bits on every run, not in every batch.

    Raises:
        RuntimeError: a gradient through lse, for which flash-attn has no place.
    """
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    if g_lse is not None:
        raise RuntimeError(
            f"flash_attention: provider {DETERMINISTIC!r} has no gradient through lse. Use provider 'flash_attn', the "
            "same forward with bi_ops' backward"
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
        **_arguments(cu_q, cu_k, max_q, max_k, scores),
        window_size_left=scores.left,
        window_size_right=scores.right,
    )
    return dq, dk, dv
