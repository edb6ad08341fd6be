"""vLLM's mixture of experts as far as the plugin reads it: a runner with a gate, a router and routed experts."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch

FUSED = "vllm.model_executor.layers.fused_moe"
METHOD, ROUTER = f"{FUSED}.unquantized_fused_moe_method", f"{FUSED}.router.fused_topk_router"


class TritonExperts:
    """vLLM's experts whose order is known."""


class CutlassExperts:
    """Others."""


class UnquantizedFusedMoEMethod(torch.nn.Module):
    """vLLM's method of unquantized experts, which is a module as there."""

    def __init__(self, experts_cls: type = TritonExperts) -> None:
        super().__init__()
        self.experts_cls = experts_cls

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):  # type: ignore[override]
        """Another result than that of any experts, so that who computes is seen."""
        return torch.full_like(x, 7.0)


class FusedTopKRouter:
    """vLLM's router."""

    def __init__(self, top_k, renormalize=True, scoring_func="softmax"):
        self.top_k, self.renormalize, self.scoring_func = top_k, renormalize, scoring_func

    def select_experts(self, hidden_states, router_logits, topk_indices_dtype=None):
        """As the runner calls it."""
        return self._compute_routing(hidden_states, router_logits, topk_indices_dtype, input_ids=None)

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        """The first experts, so that who computes is seen."""
        ids = torch.arange(self.top_k, dtype=indices_type or torch.int32).expand(len(hidden_states), -1)
        return torch.full(ids.shape, 0.5), ids


class RoutedExperts(torch.nn.Module):
    """vLLM's weights of the experts, [E, 2I, H] and [E, H, I]."""

    def __init__(self, experts, hidden, size, method, tp_size=1, **changes):
        super().__init__()
        self.w13_weight = torch.nn.Parameter(torch.randn(experts, 2 * size, hidden).bfloat16(), requires_grad=False)
        self.w2_weight = torch.nn.Parameter(torch.randn(experts, hidden, size).bfloat16(), requires_grad=False)
        self.quant_method, self.top_k = method, 2
        self.activation, self.apply_router_weight_on_input = types.SimpleNamespace(value="silu"), False
        self.expert_map = self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None
        parallel = types.SimpleNamespace(tp_size=tp_size)
        self.moe_config = types.SimpleNamespace(has_bias=False, moe_parallel_config=parallel)
        vars(self).update(changes)


class MoERunner(torch.nn.Module):
    """vLLM's experts of a layer; the gate is the block's too."""

    def __init__(self, gate, router, routed_experts, shared_experts=None):
        super().__init__()
        self.gate, self.router, self.routed_experts, self.shared = gate, router, routed_experts, shared_experts

    def forward(self, x):
        """x [T, H] -> [T, H]"""
        weights, ids = self.router.select_experts(x, self.gate(x), torch.int32)
        method = self.routed_experts.quant_method
        return method.apply(
            layer=self.routed_experts,
            x=x,
            topk_weights=weights,
            topk_ids=ids,
            shared_experts=self.shared,
            shared_experts_input=None,
        )


class SparseMoeBlock(torch.nn.Module):
    """vLLM's block of Qwen3-MoE."""

    def __init__(self, gate, hidden=32, size=16, top_k=2, experts_cls=TritonExperts, shared_experts=None, **changes):
        super().__init__()
        self.gate = gate
        routed = RoutedExperts(gate.weight.shape[0], hidden, size, UnquantizedFusedMoEMethod(experts_cls), **changes)
        self.experts = MoERunner(gate, FusedTopKRouter(top_k), routed, shared_experts)

    def forward(self, x):
        """x [T, H] -> [T, H]"""
        return self.experts(x)


def install(monkeypatch, modules: dict[str, Any]) -> None:
    """Add the classes to a fake vLLM's modules."""
    for name in (FUSED, f"{FUSED}.router", METHOD, ROUTER):
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
        parent, child = name.rsplit(".", 1)
        setattr(modules[parent], child, module)
    modules[METHOD].UnquantizedFusedMoEMethod = UnquantizedFusedMoEMethod
    modules[ROUTER].FusedTopKRouter = FusedTopKRouter
