"""Launches of attention on checked tensors, no autograd: the Triton kernels, and vLLM's forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bi_ops.attention import schedule as sched
from bi_ops.attention.hopper import support
from bi_ops.attention.kernels.backward import (
    attention_add_chunks_kernel,
    attention_delta_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_dsinks_kernel,
)
from bi_ops.attention.kernels.forward import attention_kernel
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys before the softmax.

    left, right: how many keys a query sees before and after its own, -1: all. softcap: 0 leaves the scores alone.
    """

    causal: bool
    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0

    def features(self, sinks: torch.Tensor | None) -> tuple[str, ...]:
        """The features in use beyond plain attention, by the names of their arguments."""
        asked = {
            "window_size": self.left >= 0 or self.right >= 0,
            "softcap": self.softcap > 0,
            "sinks": sinks is not None,
        }
        return tuple(name for name, used in asked.items() if used)

    def arguments(self) -> tuple[float, int | None, int | None, float | None]:
        """The kernels' scale, left, right and softcap; None where one is off, and compiled out."""
        left = self.left if self.left >= 0 else None
        right = self.right if self.right >= 0 and not self.causal else None
        return self.scale, left, right, self.softcap if self.softcap > 0 else None


def unit(t: torch.Tensor) -> torch.Tensor:
    """t with unit stride in its last dimension, without a copy where possible."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _constants(q: torch.Tensor, hkv: int, scores: Scores) -> dict[str, int | bool]:
    head_dim = q.shape[2]
    heads = q.shape[1] // hkv
    return {"HKV": hkv, "HEADS": heads, "D": head_dim, "BLOCK_D": sched.block_d(head_dim), "CAUSAL": scores.causal}


def _dense(s: sched.Schedule, longest: int) -> bool:
    """Is the grid one of pairs and tiles: where a program takes several pairs, or a pair is one tile, as in decoding.

    Otherwise it is a list of the tiles that exist, so that one long sequence costs the short ones nothing.
    """
    return s.groups > 1 or longest <= s.block


def _grid(s: sched.Schedule, n_pairs: int, hkv: int, n_rows: int, longest: int) -> tuple[int, ...]:
    """Programs for tiles of `s.block` rows. n_rows: of a key head in all sequences; longest: of the longest one."""
    if _dense(s, longest):
        return cdiv(n_pairs, s.groups), cdiv(longest, s.block)
    return ((n_rows // s.block + n_pairs // hkv) * hkv,)  # the kernels' `find_tile` knows which is whose


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor | None,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    table: torch.Tensor | None,
    max_q: int,
    scores: Scores,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The Triton forward: k and v [Tk, Hkv, D] with cu_k [B + 1], or pages with lengths cu_k [B] and their table."""
    q, k, v = unit(q), unit(k), unit(v)
    n_tokens, hq, head_dim = q.shape
    hkv = k.shape[-2]
    out = q.new_empty(q.shape)
    n_pairs, max_rows = (cu_q.shape[0] - 1) * hkv, max_q * (hq // hkv)
    if n_pairs == 0 or max_rows == 0:
        return out
    s = sched.forward(max_rows, n_pairs, head_dim, q.dtype)
    attention_kernel[_grid(s, n_pairs, hkv, n_tokens * (hq // hkv), max_rows)](
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        table,
        sinks,
        *scores.arguments(),
        n_pairs,
        n_tokens,
        *q.stride()[:2],
        *(k.stride()[:3] if table is not None else (0, *k.stride()[:2])),
        *(v.stride()[:3] if table is not None else (0, *v.stride()[:2])),
        0 if table is None else table.stride(0),
        **_constants(q, hkv, scores),
        BLOCK_M=s.block,
        BLOCK_N=sched.order(head_dim, q.dtype).block_n,
        GROUPS=s.groups,
        DENSE=_dense(s, max_rows),
        PAGE=0 if table is None else k.shape[1],
        HAS_LSE=lse is not None,
        num_warps=s.num_warps,
        num_stages=s.num_stages,
    )
    return out


def launch_vllm(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    table: torch.Tensor | None,
    max_q: int,
    max_k: int,
    scores: Scores,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) as vLLM's FlashAttention backend computes them under VLLM_BATCH_INVARIANT.

    The backend also hands over query and key scales, which FlashAttention 3 reads for fp8 alone.
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
        softmax_scale=scores.scale,
        causal=scores.causal,
        window_size=[-1, -1],
        softcap=0.0,
        return_softmax_lse=True,
        scheduler_metadata=None,
        num_splits=1,
        fa_version=3,
        **keys,
    )


def _plain(q: torch.Tensor, k: torch.Tensor, scores: Scores, sinks: torch.Tensor | None = None) -> bool:
    """Is there something to compute, and without features? Then the Hopper kernels may serve."""
    return q.shape[0] > 0 and k.shape[0] > 0 and not scores.features(sinks)


def tile_schedule(
    q: torch.Tensor, k: torch.Tensor, max_q: int, scores: Scores, sinks: torch.Tensor | None
) -> sched.TileSchedule | None:
    """How `hopper.forward` runs, None where it does not serve: the Triton forward then gives the same bits."""
    if not support.serves(q.shape[2], q.dtype, q.device) or not _plain(q, k, scores, sinks):
        return None
    return sched.tiles(q.shape[2], max_q)


def in_one_pass(q: torch.Tensor, k: torch.Tensor, scores: Scores) -> bool:
    """Does `hopper.backward` serve? Its bits are not those of two passes.

    A function of head size, dtype, GPU and features alone, but for there being nothing to compute.
    """
    return support.serves_one_pass(q.shape[2], q.dtype, q.device) and _plain(q, k, scores)


def ring_schedule(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int,
    scores: Scores,
    sinks: torch.Tensor | None,
) -> sched.RingSchedule | None:
    """How `hopper.decode` runs, None where it does not serve: the Triton forward then gives the same bits.

    Reads no memory of the GPU. The arguments are those of `launch_forward`.
    """
    (hq, head_dim), (page, hkv) = q.shape[1:], k_cache.shape[1:3]
    if not support.serves(head_dim, q.dtype, q.device) or not _plain(q, k_cache, scores, sinks):
        return None
    from bi_ops.gluon import tma

    box = math.gcd(page, sched.order(head_dim, q.dtype).block_n)
    if not (tma.is_cache_compatible(k_cache, box) and tma.is_cache_compatible(v_cache, box)):
        return None
    processors = runtime.multiprocessors(q.device)
    return sched.ring(max_q * (hq // hkv), (cu_q.shape[0] - 1) * hkv, head_dim, processors)


def launch_delta(
    g: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, g_lse: torch.Tensor | None, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row sums of g * out, less g_lse, and -lse in base 2, both fp32 [Hq / heads, T, heads].

    g and out are contiguous [T, Hq, D], lse and g_lse [Hq, T]; `heads` query heads share a key head. A score's gradient
    is p * (dO . v - sum(dO * O)), and p * g_lse through the lse: so one number per row has both.
    """
    n_tokens, hq, head_dim = out.shape
    delta, shift = (out.new_empty((hq // heads, n_tokens, heads), dtype=torch.float32) for _ in range(2))
    if n_tokens == 0:
        return delta, shift
    rows, num_warps = sched.delta(n_tokens * hq)
    attention_delta_kernel[(cdiv(n_tokens * hq, rows),)](
        g,
        out,
        lse,
        g_lse,
        delta,
        shift,
        n_tokens * hq,
        n_tokens,
        H=hq,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=sched.block_d(head_dim),
        ROWS=rows,
        num_warps=num_warps,
    )
    return delta, shift


def launch_dsinks(sinks: torch.Tensor, delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The gradient of the sinks [Hq], in their dtype: the tokens' -exp(sink - lse) * delta, added front to back."""
    n_pairs, n_tokens, heads = delta.shape
    dsinks = sinks.new_empty(sinks.shape)
    s = sched.dsinks(sinks.shape[0])
    n_chunks = cdiv(n_tokens, sched.CHUNK)
    partial = delta.new_empty((n_chunks, n_pairs * heads))
    tiles = cdiv(n_pairs * heads, s.block_h)
    shape = {"H": n_pairs * heads, "BLOCK_H": s.block_h, "num_warps": s.num_warps}
    if n_chunks > 0:
        attention_dsinks_kernel[(cdiv(n_chunks, s.rows), tiles)](
            sinks, shift, delta, partial, n_tokens, HEADS=heads, CHUNK=sched.CHUNK, ROWS=s.rows, **shape
        )
    attention_add_chunks_kernel[(tiles,)](partial, dsinks, n_chunks, UNROLL=s.unroll, **shape)
    return dsinks


def launch_two_passes(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shift: torch.Tensor,
    delta: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scores: Scores,
    need_q: bool,
    need_kv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv), contiguous, empty where not needed.

    g: contiguous. q, k, v: as `unit` returns them. shift, delta: of `launch_delta`.
    """
    n_tokens, hq, head_dim = q.shape
    hkv = k.shape[1]
    n_pairs, max_rows = (cu_q.shape[0] - 1) * hkv, max_q * (hq // hkv)
    dq = q.new_empty(q.shape if need_q else 0)
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    if n_pairs == 0:
        return dq, dk, dv
    order = sched.order(head_dim, q.dtype)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    if need_q and _plain(q, k, scores) and support.serves_dq(head_dim, max_q, q.dtype, q.device):
        from bi_ops.attention.hopper.dq import launch as launch_dq

        launch_dq(g, q, k, v, shift, delta, dq, cu_q, cu_k, max_q, scores.causal, scores.scale)
    elif need_q and max_rows > 0:
        s = sched.backward_dq(max_rows, n_pairs, head_dim, q.dtype)
        attention_dq_kernel[_grid(s, n_pairs, hkv, n_tokens * (hq // hkv), max_rows)](
            *(g, q, k, v, shift, delta, dq, cu_q, cu_k, *scores.arguments(), n_pairs, n_tokens, *strides),
            **_constants(q, hkv, scores),
            BLOCK_M=s.block,
            BLOCK_N=order.block_dq,
            GROUPS=s.groups,
            DENSE=_dense(s, max_rows),
            num_warps=s.num_warps,
            num_stages=s.num_stages,
        )
    if need_kv and _plain(q, k, scores) and support.serves_dkv(head_dim, hq // hkv, q.dtype, q.device):
        from bi_ops.attention.hopper.dkv import launch as launch_dkv

        launch_dkv(g, q, k, v, shift, delta, dk, dv, cu_q, cu_k, max_k, scores.causal, scores.scale)
    elif need_kv and max_k > 0:
        s = sched.backward_dkv(max_k, n_pairs, head_dim, q.dtype)
        attention_dkv_kernel[_grid(s, n_pairs, hkv, k.shape[0], max_k)](
            *(g, q, k, v, shift, delta, dk, dv, cu_q, cu_k, *scores.arguments(), n_pairs, n_tokens, *strides),
            **_constants(q, hkv, scores),
            BLOCK_N=s.block,
            BLOCK_R=order.block_r,
            GROUPS=s.groups,
            DENSE=_dense(s, max_k),
            num_warps=s.num_warps,
            num_stages=s.num_stages,
        )
    return dq, dk, dv
