"""Mixtures of experts in vLLM: who may compute them, and bi_ops' operators in a layer's router and its experts.

Under the batch-invariant mode vLLM computes unquantized experts with its Triton kernel, whose reduction order is
bi_ops'.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from bi_ops import moe
from bi_ops.core.vllm import Release
from bi_ops.vllm_plugin import parallel_experts

#: Below vLLM's own logger, so that the lines are in the server's log.
logger = logging.getLogger("vllm.bi_ops")

#: Classes of vLLM's experts whose reduction order is known. CUTLASS, DeepGEMM, FlashInfer, Humming and others are not.
KNOWN = ("TritonExperts",)


def router_of(layer: Any, release: Release) -> Any:
    """`_compute_routing` of a router that takes the top k of a softmax; None for others."""
    router = layer.router
    if router.scoring_func != "softmax":
        return None
    top_k, renormalize = router.top_k, router.renormalize

    def compute_routing(
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = moe.router(router_logits, top_k, normalize=renormalize)
        return weights, ids if indices_type is None else ids.to(indices_type)

    return compute_routing


def _is_plain(layer: Any) -> bool:
    """Does a layer compute what `moe.experts` does?"""
    return (
        getattr(layer.activation, "value", layer.activation) == "silu"
        and not layer.moe_config.has_bias
        and not layer.apply_router_weight_on_input
        and all(getattr(layer, name, None) is None for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
    )


def experts_of(layer: Any, release: Release) -> Any:
    """`apply` of unquantized experts with silu; None where bi_ops does not compute what they do."""
    stock = type(layer.quant_method).apply
    if not _is_plain(layer):
        return None
    shared = parallel_experts.apply_of(layer) if parallel_experts.ranks_of(layer) > 1 else None

    def apply(
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        if shared is not None and shared_experts is not None:
            raise ValueError(f"vllm_plugin: experts {list(x.shape)} with shared experts need tensor_parallel_size=1")
        if shared is not None:
            return shared(x, topk_weights, topk_ids)
        if shared_experts is not None:  # which vLLM's kernel runs beside the others
            return stock(layer.quant_method, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        return moe.experts(x, layer.w13_weight.data, layer.w2_weight.data, topk_weights, topk_ids)

    return apply


def refuse_experts(model: torch.nn.Module, kernels: str = "bi_ops") -> None:
    """Raise ValueError for experts that vLLM computes with something else than the kernel whose order is known.

    So for experts that ranks share, and that bi_ops does not compute, or in a way of which it does not know the bits.
    Quantized experts of that kernel are left to vLLM, with a warning.
    """
    quantized = set()
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        kind = type(method).__name__
        if "MoE" not in kind:
            continue
        chosen = getattr(method, "experts_cls", None)
        if getattr(chosen, "__name__", None) not in KNOWN:
            raise ValueError(
                f"vllm_plugin: {name} computes its experts with {getattr(chosen, '__name__', kind)}, "
                f"whose reduction order is not known; bi_ops knows {', '.join(KNOWN)}: take an unquantized checkpoint "
                "and leave --moe-backend out"
            )
        if kind != "UnquantizedFusedMoEMethod":
            quantized.add(kind)
        n_ranks = parallel_experts.ranks_of(layer)
        if n_ranks > 1:
            parallel_experts.refuse(name, layer)
        if n_ranks > 1 and (kind in quantized or kernels != "bi_ops" or not _is_plain(layer)):
            raise ValueError(
                f"vllm_plugin: {name} leaves its experts to vLLM, which adds outputs of {n_ranks} ranks in an order of "
                "each size; take unquantized experts with silu and kernels 'bi_ops', or tensor_parallel_size=1"
            )
    for kind in sorted(quantized):
        logger.warning("bi_ops: experts quantized with %s are left to vLLM; bi_ops has not examined them", kind)


def refuse_routers(model: torch.nn.Module) -> None:
    """Raise ValueError if a router of experts (vLLM's GateLinear) picks its GEMM by the number of tokens.

    Since 0.33 vLLM's batch-invariant mode turns these GEMMs off.
    """
    for name, layer in model.named_modules():
        # The first says that others may be chosen, not that one was.
        found = [a for a in vars(layer) if a.startswith("allow_") and a.endswith("_gemm") and "specialized" not in a]
        chosen = [a.removeprefix("allow_") for a in found if getattr(layer, a)]
        if chosen:
            raise ValueError(
                f"vllm_plugin: {name} picks its GEMM by the number of tokens ({', '.join(chosen)}), so a prompt's bits "
                "depend on its batch; use vLLM 0.33.0, whose batch-invariant mode does not; or unset "
                "VLLM_BATCH_INVARIANT"
            )
