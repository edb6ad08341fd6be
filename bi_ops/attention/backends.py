"""Who computes attention. Backends disagree in bits, so one of them serves a rollout and the training on it.

A backend is a forward, over packed keys and over pages, and a backward; what it does not bring is bi_ops' own. A new
one is a subclass of `AttentionBackend` and one call of `backends.register`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch

from bi_ops.attention import config, flash_attn, launch, vllm
from bi_ops.attention.order import (
    FEATURES,
    HALF_DTYPES,
    AttentionOrder,
    FlashAttention2,
    FlashAttention2Backward,
    FlashAttention3,
    KeySteps,
    Problem,
)
from bi_ops.attention.order import order as own_order
from bi_ops.attention.padding import padded_head_dim
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches
from bi_ops.core import checks, runtime
from bi_ops.core.arch import Arch
from bi_ops.core.backends import Backend, Backends, Support
from bi_ops.core.vllm import availability as vllm_availability


class AttentionBackend(Backend):
    """bi_ops' own kernels. A subclass overrides what it computes itself, and with it `order`, and `supports`.

    Tensors are checked; every method takes the order that `order` returned for them, and calls without queries or keys
    are among those it gets. A forward in an order of its own still has bi_ops' backward, which starts from out and lse.
    """

    def order(self, problem: Problem, arch: Arch) -> AttentionOrder:
        return own_order(problem, arch)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seqlens: Seqlens,
        params: AttentionParams,
        sinks: torch.Tensor | None,
        order: AttentionOrder,
        arch: Arch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [T, Hq, D], contiguous, lse fp32 [Hq, T]): q [T, Hq, D], k and v [Tk, Hkv, D], sinks [Hq]."""
        assert isinstance(order.forward, KeySteps), f"{order.forward} is not of the own kernels"
        return launch.forward(q, k, v, seqlens, params, sinks, order.forward, arch)

    def paged_forward(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        table: torch.Tensor,
        cu_q: torch.Tensor,
        seqlens_k: torch.Tensor,
        max_q: int | None,
        params: AttentionParams,
        sinks: torch.Tensor | None,
        order: AttentionOrder,
        arch: Arch,
        constant_metadata: bool,
    ) -> None:
        """Write out [T, Hq, D], contiguous: caches [blocks, block_size, Hkv, D], table int32 [B, max_blocks].

        max_q: at least the longest query, or None: the launch must then serve any split of the T tokens.
        constant_metadata: as `paged_attention`; a backend may ignore it.
        """
        assert isinstance(order.forward, KeySteps), f"{order.forward} is not of the own kernels"
        paged = (q, k_cache, v_cache, table, cu_q, seqlens_k, max_q)
        launch.paged_forward(*paged, params, sinks, order.forward, arch, out=out, constant_metadata=constant_metadata)

    def backward(
        self,
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
    ) -> launch.Gradients:
        """(dq, dk, dv, dsinks), contiguous; sinks only where their gradient is needed. g_lse: [Hq, T], contiguous."""
        saved = (g, q, k, v, out, lse, g_lse)
        return launch.backward(*saved, seqlens, params, sinks, need_q, need_kv, order, arch)


class TritonBackend(AttentionBackend):
    """The own kernels in Triton and, of the same order, in Gluon."""

    name = "triton"
    note = "own kernel, every dtype, head_dim and feature; every backward"

    def available(self) -> Support:
        where = "Triton's interpreter" if runtime.INTERPRET else "Triton"
        if arches.current().gluon:
            where += f", warp-specialised at head_dim {', '.join(map(str, config.GLUON_HEAD_DIMS))}"
        return Support(True, f"{where}, own kernel; its bits are not those of vLLM's FlashAttention")


class VllmBackend(AttentionBackend):
    """vLLM's FlashAttention 3; the backward is bi_ops' own."""

    name = "vllm"
    note = "vLLM's FlashAttention 3; bf16 and fp16, head_dim 128 and 256, no window, softcap or sinks"

    def available(self) -> Support:
        if runtime.INTERPRET:
            return Support(False, "no GPU: vLLM's kernels need one")
        if not (here := arches.current()).flash_attention_3:
            return Support(False, f"FlashAttention 3 needs a Hopper GPU (sm_90), this one is {_described(here)}")
        return vllm_availability()

    def supports(self, problem: Problem, arch: Arch) -> Support:
        why = ""
        if not arch.flash_attention_3:
            why = f"{_described(arch)}: FlashAttention 3 needs a Hopper GPU"
        elif problem.dtype not in HALF_DTYPES:
            why = f"{problem.dtype}: it serves bf16 and fp16 only"
        elif problem.features:
            why = f"{' and '.join(problem.features)}: it serves plain attention only"
        elif problem.head_dim not in vllm.HEAD_DIMS:
            why = (
                f"head_dim {problem.head_dim}: FlashAttention 3 is known to give decoded and prefilled rows the same "
                f"bits at head_dim {' and '.join(map(str, vllm.HEAD_DIMS))} only"
            )
        return Support(not why, why and f"{why}. Use backend 'triton'")

    def order(self, problem: Problem, arch: Arch) -> AttentionOrder:
        return _with_forward(FlashAttention3(), problem, arch)

    def forward(self, q, k, v, seqlens, params, sinks, order, arch):
        if q.shape[0] == 0 or k.shape[0] == 0:
            return _no_keys(q)
        out, lse = vllm.forward(q, k, v, seqlens.cu_q, seqlens.cu_k, None, seqlens.max_q, seqlens.max_k, params)
        if not seqlens.read:
            launch.clear_outside(seqlens.cu_q, out, lse)
        return out, lse

    def paged_forward(
        self, out, q, k_cache, v_cache, table, cu_q, seqlens_k, max_q, params, sinks, order, arch, constant_metadata
    ):
        page = k_cache.shape[1]
        if page % vllm.PAGE_MULTIPLE != 0:
            raise RuntimeError(
                f"paged_attention: backend 'vllm' needs a block size that is a multiple of {vllm.PAGE_MULTIPLE}, got "
                f"{page}. Use such a cache, or backend 'triton'"
            )
        if q.shape[0] == 0 or table.numel() == 0:
            out.zero_()
            return
        max_q = q.shape[0] if max_q is None else max_q
        max_k = table.shape[1] * page  # upper bounds are enough, as under vLLM's CUDA graphs
        vllm.forward(q, k_cache, v_cache, cu_q, seqlens_k, table, max_q, max_k, params, out)
        launch.clear_outside(cu_q, out)


class FlashAttnBackend(AttentionBackend):
    """flash-attn's forward; the backward is bi_ops' own."""

    name = "flash_attn"
    note = "flash-attn's forward, bi_ops' backward; bf16 and fp16, dense only, no sinks"
    automatic = False

    def available(self) -> Support:
        return flash_attn.availability()

    def supports(self, problem: Problem, arch: Arch) -> Support:
        if problem.paged:
            return Support(
                False,
                "pages: over these flash-attn runs another kernel, so decoded rows are not known to have the bits of "
                "prefilled ones. Use backend 'triton' or 'vllm' in rollout and training",
            )
        if problem.dtype not in HALF_DTYPES:
            return Support(False, f"{problem.dtype}. Use bf16 or fp16, or backend 'triton'")
        for missing in ("sinks", "attn_mask"):
            if missing in problem.features:
                return Support(False, f"{missing}: flash-attn has none. Use backend 'triton'")
        return Support(True)

    def order(self, problem: Problem, arch: Arch) -> AttentionOrder:
        return _with_forward(FlashAttention2(), problem, arch)

    def forward(self, q, k, v, seqlens, params, sinks, order, arch):
        if q.shape[0] == 0 or k.shape[0] == 0:  # flash-attn takes no empty batch
            return _no_keys(q)
        out, lse = flash_attn.forward(q, k, v, seqlens, params)
        if not seqlens.read:
            launch.clear_outside(seqlens.cu_q, out, lse)
        return out, lse


class FlashAttnDeterministicBackend(FlashAttnBackend):
    """Both passes are flash-attn's: the same bits on every run of a batch, but dQ depends on the batch."""

    name = "flash_attn_deterministic"
    note = "as flash_attn, but with flash-attn's deterministic backward: reruns agree, dQ depends on the batch"
    batch_invariant = False

    def order(self, problem: Problem, arch: Arch) -> AttentionOrder:
        return AttentionOrder(FlashAttention2(), FlashAttention2Backward())

    def backward(self, g, q, k, v, out, lse, g_lse, seqlens, params, sinks, need_q, need_kv, order, arch):
        if q.shape[0] == 0 or k.shape[0] == 0:
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), q.new_empty(0)
        q, k, v = (launch.unit_stride(t) for t in (q, k, v))
        dq, dk, dv = flash_attn.backward(g.contiguous(), q, k, v, out, lse, g_lse, seqlens, params)
        if not seqlens.read:
            for rows, cu in ((dq, seqlens.cu_q), (dk, seqlens.cu_k), (dv, seqlens.cu_k)):
                launch.clear_outside(cu, rows)
        return dq, dk, dv, q.new_empty(0)


def _described(arch: Arch) -> str:
    """The architecture, and why it took the portable orders if it did."""
    return f"{arch.name} ({arch.reason})" if arch.reason else arch.name


@functools.lru_cache(maxsize=1024)
def _with_forward(forward: FlashAttention3 | FlashAttention2, problem: Problem, arch: Arch) -> AttentionOrder:
    """The own order, but for the forward."""
    return replace(own_order(problem, arch), forward=forward)


def _no_keys(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What queries that see no key give: out of zeros, lse of +inf."""
    return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), float("inf"), dtype=torch.float32)


#: In order of preference. The own kernels serve everything everywhere, vLLM's rollouts under the plugin too. The others
#: serve where they are named, or where a rollout's record has their order.
backends: Backends[AttentionBackend] = Backends(
    "attention", (TritonBackend(), VllmBackend(), FlashAttnBackend(), FlashAttnDeterministicBackend())
)


def select(
    head_dim: int,
    dtype: torch.dtype,
    features: tuple[str, ...],
    device: torch.device,
    backend: str | None,
    paged: bool = False,
) -> str:
    """The name of the backend that computes this; a constant to torch.compile, which keeps it in the graph.

    Raises:
        ValueError, RuntimeError: as `Backends.select`.
    """
    return backends.select(Problem(head_dim, dtype, features, paged), arches.of(device), backend).name


# All that torch.compiler.assume_constant_result does, but for its import of dynamo, which takes as long as torch's.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def order_of(
    head_dim: int,
    dtype: torch.dtype,
    features: Sequence[str] = (),
    backend: str | None = None,
    device: torch.device | None = None,
) -> AttentionOrder:
    """The order in which `flash_attention` sums: what a rollout states and what trains on it compares.

    Args:
        head_dim, dtype: of q, k and v; the larger head size where v has another. features: those in use, of
            "window_size", "softcap", "sinks" and "attn_mask". backend: a name; None: the one that is selected. device:
            None is where kernels run.

    Raises:
        TypeError: an argument of another type. ValueError: an unknown feature or backend. RuntimeError: the backend
            cannot run here or does not serve this.
    """
    op = "attention.order_of"
    checks.size(op, "head_dim", head_dim)
    checks.result_dtype(op, dtype)
    checks.backend_name(op, backend)
    if device is not None:
        checks.device(op, device)
    if isinstance(features, str) or not isinstance(features, Sequence):
        raise TypeError(f"{op}: features must be a sequence of names, got {features!r}")
    if unknown := sorted(set(features) - set(FEATURES)):
        raise ValueError(f"attention: no features {unknown}; features are {', '.join(FEATURES)}")
    arch = arches.current() if device is None else arches.of(device)
    problem = Problem(padded_head_dim(head_dim), dtype, tuple(f for f in FEATURES if f in features))
    return backends.select(problem, arch, backend).order(problem, arch)
