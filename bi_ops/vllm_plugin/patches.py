"""What is replaced inside vLLM, as data: where, what it must look like, by what, and why."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from bi_ops import logprob
from bi_ops.core.vllm import Release
from bi_ops.vllm_plugin import bookkeeping, parallel, parallel_experts, sampled_logprobs, sampling, scheduling
from bi_ops.vllm_plugin.backend import choose_backend
from bi_ops.vllm_plugin.compilation import without_inductor
from bi_ops.vllm_plugin.points import Point
from bi_ops.vllm_plugin.worker import with_own_kernels


@dataclass(frozen=True)
class Patch(Point):
    """A `Point` that becomes `build(the stock function)` for the whole process."""

    build: Callable[[Callable[..., Any]], Callable[..., Any]]
    why: str

    def replace(self, module: ModuleType, function: Callable[..., Any]) -> None:
        """Put `function` in the stock one's place."""
        holder, name = self.holder(module)
        static = isinstance(inspect.getattr_static(holder, name), staticmethod)
        setattr(holder, name, staticmethod(function) if static else function)


@dataclass(frozen=True)
class LeadingPatch(Patch):
    """A patch that reads the first parameters alone, and hands on what follows them."""

    def difference(self, found: tuple[str, ...] | None) -> str | None:
        """As `Patch.difference`, of the first parameters."""
        return super().difference(None if found is None else found[: len(self.parameters)])


def add_then_norm(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`rms_norm_batch_invariant` whose residual path is a rounded add followed by the stock row-wise norm.

    The bits of `bi_ops.norm.add_rms_norm`. Results are new tensors, never the inputs written in place, so a CUDA graph
    replays it like any other pair of kernels.
    """

    @functools.wraps(stock)
    def rms_norm_batch_invariant(
        input: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float = 1e-6,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return stock(input, weight, eps)
        if input.shape != residual.shape:
            raise ValueError(f"rms_norm: input {list(input.shape)} and residual {list(residual.shape)} differ")
        total = input + residual
        return stock(total, weight, eps), total

    return rms_norm_batch_invariant


def logprobs_of_logits(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`Sampler.compute_logprobs`, which reads the logits in the dtype that the model computed them in."""

    @functools.wraps(stock)
    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        return logprob.log_softmax(logits, torch.float32)

    return compute_logprobs


def patches_of(release: Release) -> tuple[Patch, ...]:
    """Every replacement in a release of vLLM. The norm twice, because layernorm.py imports it by name."""
    norm = ("input", "weight", "eps", "residual")
    return (
        Patch(
            release.batch_invariant,
            "rms_norm_batch_invariant",
            norm,
            add_then_norm,
            "with a residual it calls the CUDA fused_add_rms_norm, whose order of a row's sum is not that of the norm "
            "alone, and in 0.26 changes at 256 tokens",
        ),
        Patch(
            "vllm.model_executor.layers.layernorm",
            "rms_norm_batch_invariant",
            norm,
            add_then_norm,
            "RMSNorm.forward_cuda looks the function up here",
        ),
        Patch(
            "vllm.v1.attention.selector",
            "_cached_get_attn_backend",
            release.choose_backend,
            choose_backend,
            "FlashAttention 3 picks another tile for decode than for prefill at some head sizes, which is refused; "
            "layers whose backend nobody named take bi_ops' own, which has one order for both",
        ),
        Patch(
            "vllm.engine.arg_utils",
            "EngineArgs.create_engine_config",
            ("self", "usage_context", "headless"),
            without_inductor,
            "vLLM compiles models with Inductor by default, which fuses norms in an order that training does not have",
        ),
        Patch(
            "vllm.v1.sample.sampler",
            "Sampler.compute_logprobs",
            ("logits",),
            logprobs_of_logits,
            "the v1 model runner casts logits to fp32 first, and a row read in fp32 is summed in another order than "
            "training's",
        ),
        Patch(
            "vllm.v1.worker.worker_base",
            "WorkerWrapperBase.init_device",
            ("self",),
            with_own_kernels,
            "the layers of a loaded model compute with bi_ops' kernels, which have the same bits and are faster",
        ),
        Patch(
            release.batch_invariant,
            "override_envs_for_invariance",
            (),
            parallel.unpinned,
            "it has NCCL use one channel and one thread, so that its sums do not depend on sizes; under the plugin no "
            "number is added over ranks, and moving data that way takes ten times as long",
        ),
        *(
            LeadingPatch(*replaced)
            for module in (sampling, bookkeeping, scheduling, sampled_logprobs, parallel, parallel_experts)
            for replaced in module.REPLACED
        ),
    )
