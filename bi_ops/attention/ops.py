"""Attention: check, allocate, launch, differentiate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import triton

from bi_ops._common import checks, runtime
from bi_ops._common.providers import Availability, Provider, ProviderTable, vllm_availability
from bi_ops.attention import flash_attn, hopper
from bi_ops.attention import schedule as sched
from bi_ops.attention.kernels import (
    attention_add_chunks_kernel,
    attention_delta_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_dsinks_kernel,
    attention_kernel,
)

#: Head sizes at which vLLM's FlashAttention 3 gives a decoded row the bits of a prefilled one.
VLLM_HEAD_DIMS = (128, 256)


def _vllm_available() -> Availability:
    if runtime.INTERPRET:
        return Availability(False, "no GPU: vLLM's kernels need one")
    if runtime.architecture() != "sm_90":
        return Availability(False, f"FlashAttention 3 needs a Hopper GPU (sm_90), this one is {runtime.architecture()}")
    return vllm_availability()


def _triton_available() -> Availability:
    where = "Triton's interpreter" if runtime.INTERPRET else "Triton"
    if runtime.warp_specialised(runtime.default_device()):
        where += f", warp-specialised at head_dim {' and '.join(map(str, hopper.HEAD_DIMS))}"
    return Availability(True, f"{where}, own kernel; its bits are not those of vLLM's FlashAttention")


#: Who computes the forward, dense and paged alike. They do not agree in bits: one choice serves rollout and training.
#: Windows, soft-capping and sinks are the own kernel's; 'vllm' raises for them where it is forced. flash-attn's come
#: after the own kernel, which runs everywhere: they serve where they are forced and nowhere else.
providers = ProviderTable(
    "attention",
    (
        Provider(
            "vllm",
            _vllm_available,
            False,
            "vLLM's FlashAttention 3; bf16 and fp16, head_dim 128 and 256, no window, softcap or sinks",
        ),
        Provider("triton", _triton_available, True, "own kernel, every dtype, head_dim and feature; every backward"),
        *flash_attn.PROVIDERS,
    ),
)


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


def _provider(op: str, dtype: torch.dtype, head_dim: int, features: Sequence[str] = ()) -> str:
    """Who computes the forward for this dtype, head size and these features: never a function of the batch."""
    name = providers.choose()
    if name in flash_attn.NAMES:
        flash_attn.check(op, name, dtype, features)
        return name
    if name != "vllm" or dtype == torch.float32:
        return "triton"
    if head_dim in VLLM_HEAD_DIMS and not features:
        return "vllm"
    if providers.why() == "forced":
        why = f"{' and '.join(features)}: it serves plain attention only"
        if not features:
            why = (
                f"head_dim {head_dim}: FlashAttention 3 is known to give decoded and prefilled rows the same bits at "
                f"head_dim {VLLM_HEAD_DIMS} only"
            )
        raise RuntimeError(f"{op}: provider 'vllm' cannot serve {why}. Use provider 'triton'")
    return "triton"


# --------------------------------------------------------------------------------------------------------------
# sequence lengths


def check_cu_seqlens(cu_seqlens: torch.Tensor, total: int, name: str = "cu_seqlens", op: str = "attention") -> int:
    """Check where packed sequences start and end, and return the longest length. Waits for the GPU.

    Args:
        cu_seqlens: int32 [B + 1], 0 first, never decreasing, `total` last.
        total: the number of packed tokens. name, op: what an error calls them.

    Raises:
        TypeError: not int32. ValueError: wrong rank or contents.
    """
    _check_lengths_tensor(op, name, cu_seqlens)
    values = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(values)]
    checks.shape(op, values[0] == 0, f"{name} must start at 0, got {values[0]}")
    falls = next((i for i, n in enumerate(lengths) if n < 0), None)
    if falls is not None:
        raise ValueError(
            f"{op}: {name} must never decrease, got {values[falls]} then {values[falls + 1]} at {falls + 1}"
        )
    checks.shape(op, values[-1] == total, f"{name} ends at {values[-1]} but there are {total} tokens")
    return max(lengths, default=0)


def _check_lengths_tensor(op: str, name: str, t: torch.Tensor) -> None:
    checks.tensor(op, name, t, ndim=1)
    checks.dtype(op, name, t, (torch.int32,))
    checks.shape(op, t.shape[0] >= 1, f"{name} must have B + 1 entries, got none")


def _longest(op: str, name: str, cu_seqlens: torch.Tensor, total: int, given: int | None) -> int:
    """The longest length; contents are checked where that costs no wait for a GPU, or one is needed anyway."""
    if given is not None and cu_seqlens.device.type != "cpu":
        sequences = cu_seqlens.shape[0] - 1
        if given < 0 or given * sequences < total:
            raise ValueError(
                f"{op}: a given maximum of {given} for {sequences} sequences of {name} has no room for {total} tokens"
            )
        return given
    longest = check_cu_seqlens(cu_seqlens, total, name, op)
    if given is not None and given < longest:
        raise ValueError(f"{op}: the longest sequence of {name} has {longest} tokens, but the given maximum is {given}")
    return longest


# --------------------------------------------------------------------------------------------------------------
# launch


def _unit(t: torch.Tensor) -> torch.Tensor:
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
        return triton.cdiv(n_pairs, s.groups), triton.cdiv(longest, s.block)
    return ((n_rows // s.block + n_pairs // hkv) * hkv,)  # the kernels' `find_tile` knows which is whose


def _launch_forward(
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
    q, k, v = _unit(q), _unit(k), _unit(v)
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


def _vllm_forward(
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


def _warp_specialised(q: torch.Tensor, k: torch.Tensor, scores: Scores) -> bool:
    """Do the kernels of `hopper_forward` (the same bits) and `hopper_backward` (others than two passes') serve?

    A function of head size, dtype, GPU and features alone, but for there being nothing to compute.
    """
    if not hopper.serves(q.shape[2], q.dtype, q.device) or scores.features(None):
        return False
    return q.shape[0] > 0 and k.shape[0] > 0


def _launch_delta(
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
    attention_delta_kernel[(triton.cdiv(n_tokens * hq, rows),)](
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


def _launch_dsinks(sinks: torch.Tensor, delta: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The gradient of the sinks [Hq], in their dtype: the tokens' -exp(sink - lse) * delta, added front to back."""
    n_pairs, n_tokens, heads = delta.shape
    dsinks = sinks.new_empty(sinks.shape)
    s = sched.dsinks(sinks.shape[0])
    n_chunks = triton.cdiv(n_tokens, sched.CHUNK)
    partial = delta.new_empty((n_chunks, n_pairs * heads))
    tiles = triton.cdiv(n_pairs * heads, s.block_h)
    shape = {"H": n_pairs * heads, "BLOCK_H": s.block_h, "num_warps": s.num_warps}
    if n_chunks > 0:
        attention_dsinks_kernel[(triton.cdiv(n_chunks, s.rows), tiles)](
            sinks, shift, delta, partial, n_tokens, HEADS=heads, CHUNK=sched.CHUNK, ROWS=s.rows, **shape
        )
    attention_add_chunks_kernel[(tiles,)](partial, dsinks, n_chunks, UNROLL=s.unroll, **shape)
    return dsinks


# --------------------------------------------------------------------------------------------------------------
# custom operators


@torch.library.custom_op("bi_ops::flash_attention", mutates_args=())
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
    provider: str,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], lse fp32 [Hq, T])."""
    scores = Scores(causal, scale, left, right, softcap)
    max_q = _longest("flash_attention", "cu_seqlens", cu_q, q.shape[0], max_q)
    max_k = _longest("flash_attention", "cu_seqlens_k", cu_k, k.shape[0], max_k)
    if provider == "vllm" and q.shape[0] > 0 and k.shape[0] > 0:
        return _vllm_forward(q, k, v, cu_q, cu_k, None, max_q, max_k, scores)
    if provider in flash_attn.NAMES and q.shape[0] > 0 and k.shape[0] > 0:
        return flash_attn.forward(q, k, v, cu_q, cu_k, max_q, max_k, scores)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    if max_q > 64 and _warp_specialised(q, k, scores) and sinks is None:
        from bi_ops.attention import hopper_forward

        out, block_n = q.new_empty(q.shape), sched.order(q.shape[2], q.dtype).block_n
        hopper_forward.launch(q, k, v, out, lse, cu_q, cu_k, causal, scale, block_n)
        return out, lse
    return _launch_forward(q, k, v, lse, cu_q, cu_k, None, max_q, scores, sinks), lse


@_flash.register_fake
def _(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale, provider, *features):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("bi_ops::flash_attention_backward", mutates_args=())
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
    g_lse: torch.Tensor | None = None,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    provider: str = "triton",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsinks), contiguous; empty tensors where not needed. g_lse: [Hq, T], contiguous.

    The forward's sinks are in lse; they are given here if their gradient is needed. provider: who computed the forward.
    """
    scores = Scores(causal, scale, left, right, softcap)
    max_q = _longest("flash_attention", "cu_seqlens", cu_q, q.shape[0], max_q)
    max_k = _longest("flash_attention", "cu_seqlens_k", cu_k, k.shape[0], max_k)
    q, k, v, g = _unit(q), _unit(k), _unit(v), g.contiguous()
    n_tokens, hq, head_dim = q.shape
    hkv = k.shape[1]
    n_pairs, max_rows = (cu_q.shape[0] - 1) * hkv, max_q * (hq // hkv)
    theirs = provider == flash_attn.DETERMINISTIC and n_tokens > 0 and k.shape[0] > 0
    one_pass = _warp_specialised(q, k, scores)
    dsinks = q.new_empty(0)
    if sinks is not None or not (one_pass or theirs):
        delta, shift = _launch_delta(g, out, lse, g_lse, hq // hkv)
        dsinks = dsinks if sinks is None else _launch_dsinks(sinks, delta, shift)
    if one_pass or theirs:
        if theirs:
            dq, dk, dv = flash_attn.backward(g, q, k, v, out, lse, g_lse, cu_q, cu_k, max_q, max_k, scores)
        else:
            from bi_ops.attention import hopper_backward

            dq, dk, dv = hopper_backward.launch(g, q, k, v, out, lse, g_lse, cu_q, cu_k, max_k, causal, scale)
        return dq if need_q else dq.new_empty(0), *((dk, dv) if need_kv else (dk.new_empty(0), dk.new_empty(0))), dsinks
    dq = q.new_empty(q.shape if need_q else 0)
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    if n_pairs == 0:
        return dq, dk, dv, dsinks
    order = sched.order(head_dim, q.dtype)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    if need_q and max_rows > 0:
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
    if need_kv and max_k > 0:
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
    return dq, dk, dv, dsinks


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
    g_lse=None,
    left=-1,
    right=-1,
    softcap=0.0,
    sinks=None,
    provider="triton",
):
    dk, dv = (k.new_empty(k.shape if need_kv else 0) for _ in range(2))
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape if need_q else 0), dk, dv, dsinks


def _flash_setup(ctx, inputs, output):
    q, k, v, cu_q, cu_k, ctx.max_q, ctx.max_k, ctx.causal, ctx.scale, ctx.provider, *ctx.features, sinks = inputs
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
        *(g_lse, *ctx.features, sinks if need_sinks else None, ctx.provider),
    )
    grads = dq if need_q else None, dk if need_k else None, dv if need_v else None
    return *grads, *([None] * 10), dsinks if need_sinks else None


_flash.register_autograd(_flash_backward, setup_context=_flash_setup)


@torch.library.custom_op("bi_ops::paged_attention", mutates_args=())
def _paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    cu_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    max_q: int,
    causal: bool,
    scale: float,
    provider: str,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    scores = Scores(causal, scale, left, right, softcap)
    max_q = _longest("paged_attention", "cu_seqlens_q", cu_q, q.shape[0], max_q)
    if q.device.type == "cpu":
        _check_pages(k_cache, table, seqlens_k)
    if provider == "vllm" and q.shape[0] > 0 and table.numel() > 0:
        max_k = table.shape[1] * k_cache.shape[1]  # an upper bound is enough, as under vLLM's CUDA graphs
        return _vllm_forward(q, k_cache, v_cache, cu_q, seqlens_k, table, max_q, max_k, scores)[0]
    return _launch_forward(q, k_cache, v_cache, None, cu_q, seqlens_k, table, max_q, scores, sinks)


@_paged.register_fake
def _(q, k_cache, v_cache, table, cu_q, seqlens_k, max_q, causal, scale, provider, *features):
    return q.new_empty(q.shape)


def _check_pages(k_cache: torch.Tensor, table: torch.Tensor, seqlens_k: torch.Tensor) -> None:
    """Every length fits its row of the table, and every page in use exists."""
    n_pages, page = k_cache.shape[:2]
    room = table.shape[1] * page
    for i, n in enumerate(seqlens_k.tolist()):
        if not 0 <= n <= room:
            raise ValueError(f"paged_attention: seqlens_k[{i}] is {n}, but the block table has room for 0 to {room}")
        used = table[i, : triton.cdiv(n, page)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < n_pages:
            raise ValueError(f"paged_attention: block_table[{i}] names {used.tolist()}; blocks are 0 to {n_pages - 1}")


# --------------------------------------------------------------------------------------------------------------
# public functions


def _check_qkv(op: str, scale: float | None, **tensors: torch.Tensor) -> float:
    """Check q, keys and values but for the number of tokens; the softmax scale."""
    q, k, v = tensors.values()
    for name, t in tensors.items():
        checks.tensor(op, name, t, ndim=3 if name in ("q", "k", "v") else 4)
        checks.dtype(op, name, t)
    checks.same_dtype(op, **tensors)
    checks.same_device(op, **tensors)
    hq, head_dim = q.shape[1:]
    hkv = k.shape[-2]
    what = ", ".join(f"{n} {list(t.shape)}" for n, t in tensors.items())
    checks.shape(op, k.shape == v.shape, f"keys and values must have one shape, got {what}")
    checks.shape(op, k.shape[-1] == head_dim, f"head sizes differ: {what}")
    checks.shape(
        op, hkv > 0 and hq % hkv == 0, f"{hq} query heads are not a positive multiple of {hkv} key heads: {what}"
    )
    ok = head_dim % 8 == 0 and 16 <= head_dim <= 256
    checks.shape(op, ok, f"head_dim must be a multiple of 8 from 16 to 256, got {head_dim}; pad q, k and v with zeros")
    scale = head_dim**-0.5 if scale is None else float(scale)
    checks.shape(op, 0 < scale < float("inf"), f"softmax_scale must be positive and finite, got {scale}")
    return scale


#: A window of so many keys or more has no limit: no sequence is as long, and positions in the kernels are int32.
_UNLIMITED = 2**30


def _check_features(
    op: str,
    q: torch.Tensor,
    causal: bool,
    scale: float,
    window_size: Sequence[int],
    softcap: float,
    sinks: torch.Tensor | None,
) -> Scores:
    """Check what comes on top of plain attention, and gather it with the rest."""
    ok = len(window_size) == 2 and all(isinstance(n, int) and n >= -1 for n in window_size)
    checks.shape(
        op, ok, f"window_size must be (left, right), numbers of keys or -1 for no limit, got {tuple(window_size)}"
    )
    ok = 0 <= softcap < math.inf
    checks.shape(op, ok, f"softcap must be finite and at least 0, which is none, got {softcap}")
    if sinks is not None:
        checks.tensor(op, "sinks", sinks)
        checks.dtype(op, "sinks", sinks)
        checks.same_device(op, q=q, sinks=sinks)
        checks.shape(op, sinks.shape == q.shape[1:2], f"sinks must be [{q.shape[1]}], got {list(sinks.shape)}")
    left, right = (-1 if n >= _UNLIMITED else n for n in window_size)
    return Scores(causal, scale, left, right, float(softcap))


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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention inside each packed sequence (Dao et al., 2022), in memory linear in the tokens.

    out, dq, dk and dv of a sequence have the same bits alone or packed with others (but for the gradients of a forced
    'flash_attn_deterministic'). Query heads share key heads in order: query head h uses key head h // (Hq / Hkv).

    Args:
        q: [T, Hq, D], bf16, fp16 or fp32; D a multiple of 8 from 16 to 256. k, v: [Tk, Hkv, D], Hkv divides Hq. The
            last dimension should be contiguous, other strides are free: views into a fused projection are fine.
        cu_seqlens: int32 [B + 1], where each sequence starts in q; sequences may be empty.
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

    Returns:
        [T, Hq, D], contiguous, in the dtype of q; with return_lse (that, lse fp32 [Hq, T]). A query that sees no key
        gives zeros, and an lse of +inf, or of its sink.

    Raises:
        TypeError: unsupported or differing dtypes. ValueError: wrong shapes, devices, cu_seqlens, window_size or
        softcap. RuntimeError: the forced provider cannot serve this head size, dtype or feature.
    """
    op = "flash_attention"
    scale = _check_qkv(op, softmax_scale, q=q, k=k, v=v)
    scores = _check_features(op, q, causal, scale, window_size, softcap, sinks)
    _check_lengths_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens_k is None:
        same = q.shape[0] == k.shape[0]
        checks.shape(op, same, f"{q.shape[0]} queries but {k.shape[0]} keys; give cu_seqlens_k if they differ")
        cu_seqlens_k = cu_seqlens
        max_seqlen_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    _check_lengths_tensor(op, "cu_seqlens_k", cu_seqlens_k)
    checks.same_device(op, q=q, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    same = cu_seqlens.shape == cu_seqlens_k.shape
    checks.shape(op, same, f"cu_seqlens {list(cu_seqlens.shape)} and cu_seqlens_k {list(cu_seqlens_k.shape)} differ")
    provider = _provider(op, q.dtype, q.shape[2], scores.features(sinks))
    out, lse = _flash(
        *(q, k, v, cu_seqlens.contiguous(), cu_seqlens_k.contiguous(), max_seqlen, max_seqlen_k, causal, scale),
        *(provider, scores.left, scores.right, scores.softcap, sinks if sinks is None else sinks.contiguous()),
    )
    return (out, lse) if return_lse else out


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    causal: bool = True,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`flash_attention` with keys and values in pages: decoding and chunked prefill. Forward only, the same bits.

    Args:
        q: [T, Hq, D], the new tokens of each sequence. k_cache, v_cache: [blocks, block_size, Hkv, D], any block size
            (provider 'vllm': a multiple of 16), with the new tokens' keys and values already written.
        block_table: int32 [B, max_blocks], the blocks of each sequence in order.
        cu_seqlens_q: int32 [B + 1]. seqlens_k: int32 [B], all keys of each sequence, the new ones included.
        max_seqlen_q: at least the longest of the new parts. causal, softmax_scale, window_size, softcap, sinks: as
            `flash_attention`. Blocks before the first new token's window may hold anything.

    Returns:
        [T, Hq, D], contiguous, in the dtype of q.

    Raises:
        TypeError, ValueError, RuntimeError: as `flash_attention`, and RuntimeError if q needs a gradient. What the
        block table and seqlens_k contain is checked on the CPU only.
    """
    op = "paged_attention"
    scale = _check_qkv(op, softmax_scale, q=q, k_cache=k_cache, v_cache=v_cache)
    scores = _check_features(op, q, causal, scale, window_size, softcap, sinks)
    learned = (q, k_cache, v_cache, *(() if sinks is None else (sinks,)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        raise RuntimeError(f"{op}: has no backward; use flash_attention, or torch.no_grad() to decode")
    _check_lengths_tensor(op, "cu_seqlens_q", cu_seqlens_q)
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
        f"cu_seqlens_q has {n} sequences, block_table {block_table.shape[0]} and seqlens_k {seqlens_k.shape[0]}",
    )
    checks.shape(op, k_cache.shape[1] > 0, f"block_size must not be 0, got k_cache {list(k_cache.shape)}")
    provider = _provider(op, q.dtype, q.shape[2], scores.features(sinks))
    if provider == "vllm" and k_cache.shape[1] % 16 != 0:
        raise RuntimeError(
            f"{op}: provider 'vllm' needs a block size that is a multiple of 16, got {k_cache.shape[1]}. Use such a "
            "cache, or provider 'triton'"
        )
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    return _paged(
        *(q, k_cache, v_cache, table, cu_seqlens_q.contiguous(), seqlens_k.contiguous(), max_seqlen_q, causal, scale),
        *(provider, scores.left, scores.right, scores.softcap, sinks if sinks is None else sinks.contiguous()),
    )
