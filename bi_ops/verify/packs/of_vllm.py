"""Operators of the installed vLLM, stock: its CUDA kernels, its batch-invariant kernels, its FlashAttention 3.

The plugin is not registered in a process that verifies, so what is found is the release's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bi_ops.core import runtime
from bi_ops.core.vllm import batch_invariant_module, require
from bi_ops.verify import operators
from bi_ops.verify.subject import Subject
from bi_ops.verify.values import Make

Tensor = torch.Tensor
EPS = 1e-6

#: Hidden sizes of language models; head sizes that FlashAttention 3 takes.
_HIDDEN = {"cpu": (), "cuda": ((2048, 64), (4096, 64))}
_HEAD_DIMS = {"cpu": (), "cuda": ((64, 0), (96, 0), (128, 0), (256, 0))}
_X = {"x": 0}


def _in_place(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from vllm import _custom_ops

    x, residual = x.detach().clone(), residual.detach().clone()
    _custom_ops.fused_add_rms_norm(x, residual, weight, EPS)
    return x, residual


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from vllm import _custom_ops

    out = torch.empty_like(x)
    _custom_ops.rms_norm(out, x, weight, EPS)
    return out


def _silu_and_mul(x: Tensor) -> Tensor:
    importlib.import_module("vllm._custom_ops")  # it loads the kernels
    out = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
    torch.ops._C.silu_and_mul(out, x)
    return out


def _kernel(name: str) -> Callable[..., Any]:
    """A function of the release's module of batch-invariant kernels, looked up when it is called."""
    return lambda *given: getattr(batch_invariant_module(), name)(*given)


def _flash_attention_3(q: Tensor, keys: dict[str, Any], cu_q: Tensor, longest: int) -> Tensor:
    """As the release's attention backend calls it in batch-invariant mode: one split."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    fixed = {"causal": True, "softcap": 0.0, "num_splits": 1, "fa_version": 3, "window_size": [-1, -1]}
    out = torch.empty_like(q)
    flash_attn_varlen_func(q=q, out=out, cu_seqlens_q=cu_q, max_seqlen_q=longest, **keys, **fixed)
    return out


def _prefilled(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    cu, longest = operators.starts(lengths, q.device), max(lengths)
    return _flash_attention_3(q, {"k": k, "v": v, "cu_seqlens_k": cu, "max_seqlen_k": longest}, cu, longest)


def _from_pages(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    k_cache, v_cache, table = operators.in_pages(k, v, lengths)
    used = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    keys = {"k": k_cache, "v": v_cache, "seqused_k": used, "block_table": table, "max_seqlen_k": max(lengths)}
    return _flash_attention_3(q, keys, operators.starts(lengths, q.device), max(lengths))


def _decoded(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    k_cache, v_cache, table = operators.in_pages(k, v, lengths)
    used = torch.tensor([i + 1 for n in lengths for i in range(n)], dtype=torch.int32, device=q.device)
    owners = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=q.device)
    keys = {"k": k_cache, "v": v_cache, "seqused_k": used, "block_table": table[owners], "max_seqlen_k": max(lengths)}
    return _flash_attention_3(q, keys, operators.starts((1,) * len(used), q.device), 1)


def _linear(m: Make) -> dict[str, Tensor]:
    return {"x": m.x(), "weight": m.randn(m.shape.n, m.shape.k)}


def subjects() -> Sequence[Subject]:
    """Raises ValueError without a supported vLLM and a GPU."""
    if runtime.INTERPRET:
        raise ValueError("verify: vLLM's operators need a CUDA GPU")
    try:
        require("verify")
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    # At odd addresses its CUDA kernels end in an illegal instruction, or a misaligned address.
    forward: dict[str, Any] = {"differentiable": False, "dtypes": (torch.bfloat16,), "compiled": False}
    forward["strided"] = False
    rows: dict[str, Any] = {"sizes": _HIDDEN, **forward}
    found = [
        Subject("fused_add_rms_norm", _in_place, operators.added, {"x": 0, "residual": 0}, **rows),
        Subject("rms_norm", _rms_norm, operators.normed, _X, **rows),
        Subject("silu_and_mul", _silu_and_mul, operators.x_only, _X, **rows),
        Subject("matmul_persistent", _kernel("matmul_persistent"), operators.gemm, {"a": 0}, **rows),
        Subject("linear_batch_invariant", _kernel("linear_batch_invariant"), _linear, _X, **rows),
        Subject("rms_norm_batch_invariant", _kernel("rms_norm_batch_invariant"), operators.normed, _X, **rows),
        Subject("log_softmax", _kernel("log_softmax"), operators.x_only, _X, **rows),
        Subject(
            "FlashAttention 3",
            _prefilled,
            operators.qkv,
            {"q": 0, "k": 0, "v": 0},
            sequences=True,
            decode=_decoded,
            paged=_from_pages,
            sizes=_HEAD_DIMS,
            **forward,
        ),
    ]
    return found
