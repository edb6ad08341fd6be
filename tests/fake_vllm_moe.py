"""vLLM's mixture of experts as far as the plugin reads it: a runner with a gate, a router and routed experts."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
from fake_vllm_parallel import DISTRIBUTED, n_ranks, rank

FUSED = "vllm.model_executor.layers.fused_moe"
METHOD, ROUTER = f"{FUSED}.unquantized_fused_moe_method", f"{FUSED}.router.fused_topk_router"
ROUTED = f"{FUSED}.routed_experts"


class TritonExperts:
    """vLLM's experts whose order is known."""


class CutlassExperts:
    """Others."""


class UnquantizedFusedMoEMethod(torch.nn.Module):
    """vLLM's method of unquantized experts, which is a module as there."""

    def __init__(self, experts_cls: type = TritonExperts, moe: Any = None) -> None:
        super().__init__()
        self.experts_cls, self.moe = experts_cls, moe
        self.moe_kernel = types.SimpleNamespace(output_is_reduced=lambda: False)

    def create_weights(
        self, layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **attributes
    ):
        """[E, 2I, H] and [E, H, I] of this rank."""
        n = intermediate_size_per_partition
        for name, shape in (("w13_weight", (2 * n, hidden_size)), ("w2_weight", (hidden_size, n))):
            data = torch.randn(num_experts, *shape).to(params_dtype)
            weight = torch.nn.Parameter(data, requires_grad=False)
            vars(weight).update(attributes)
            layer.register_parameter(name, weight)

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):  # type: ignore[override]
        """On one rank another result than that of any experts, so that who computes is seen. Else what a rank has."""
        if n_ranks() == 1:
            return torch.full_like(x, 7.0)
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        out = torch.zeros(x.shape)
        for t, slot in (ids >= 0).nonzero().tolist():
            gate, up = (layer.w13_weight[ids[t, slot]].float() @ x[t].float()).chunk(2)
            h = (torch.nn.functional.silu(gate) * up).bfloat16().float()
            out[t] += topk_weights[t, slot] * (layer.w2_weight[ids[t, slot]].float() @ h)
        return out.to(x.dtype)


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
    """vLLM's weights of the experts, a slice of each on a rank, or whole ones."""

    def __init__(self, experts, hidden, size, experts_cls=TritonExperts, expert_parallel=False, parallel=(), **changes):
        super().__init__()
        n, owned = n_ranks(), experts
        sizes = {"tp_size": 1, "ep_size": n} if expert_parallel else {"tp_size": n, "ep_size": 1}
        self.moe_config = types.SimpleNamespace(has_bias=False, tp_rank=0 if expert_parallel else rank())
        self.moe_config.moe_parallel_config = types.SimpleNamespace(**sizes | dict(parallel))
        self.expert_map = self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None
        if expert_parallel:
            owned = experts // n
            self.expert_map = torch.full((experts,), -1, dtype=torch.int32)
            self.expert_map[rank() * owned : (rank() + 1) * owned] = torch.arange(owned, dtype=torch.int32)
        self.quant_method = sys.modules[METHOD].UnquantizedFusedMoEMethod(experts_cls, self.moe_config)
        per_rank = size // sizes["tp_size"]
        self.quant_method.create_weights(
            self, owned, hidden, per_rank, torch.bfloat16, weight_loader=self.weight_loader
        )
        self.top_k = 2
        self.activation, self.apply_router_weight_on_input = types.SimpleNamespace(value="silu"), False
        vars(self).update(changes)

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id):
        """One matrix of one expert."""
        if self.expert_map is not None:
            expert_id = int(self.expert_map[expert_id])
            if expert_id < 0:
                return
        data, (tp_rank, tp_size) = param.data[expert_id], (self.moe_config.tp_rank, self._tp_size())
        if shard_id == "w2":
            self._load_w2(expert_data=data, shard_dim=1, loaded_weight=loaded_weight, tp_rank=tp_rank)
        else:
            data.chunk(2)[shard_id == "w3"].copy_(loaded_weight.chunk(tp_size)[tp_rank])

    def _load_w2(self, expert_data, shard_dim, loaded_weight, tp_rank, load_full=False):
        expert_data.copy_(loaded_weight.chunk(self._tp_size(), shard_dim)[tp_rank])

    def _tp_size(self):
        return self.moe_config.moe_parallel_config.tp_size


class MoERunner(torch.nn.Module):
    """vLLM's experts of a layer; the gate is the block's too."""

    def __init__(self, gate, router, routed_experts, shared_experts=None):
        super().__init__()
        self.gate, self.router, self.routed_experts, self.shared = gate, router, routed_experts, shared_experts

    def forward(self, x):
        """x [T, H] -> [T, H]"""
        weights, ids = self.router.select_experts(x, self.gate(x), torch.int32)
        method = self.routed_experts.quant_method
        out = method.apply(
            layer=self.routed_experts,
            x=x,
            topk_weights=weights,
            topk_ids=ids,
            shared_experts=self.shared,
            shared_experts_input=None,
        )
        if n_ranks() == 1 or method.moe_kernel.output_is_reduced():
            return out
        return sys.modules[DISTRIBUTED].tensor_model_parallel_all_reduce(out)


class SparseMoeBlock(torch.nn.Module):
    """vLLM's block of Qwen3-MoE."""

    def __init__(self, gate, hidden=32, size=16, top_k=2, shared_experts=None, **options):
        super().__init__()
        self.gate = gate
        routed = sys.modules[ROUTED].RoutedExperts(gate.weight.shape[0], hidden, size, **options)
        self.experts = MoERunner(gate, FusedTopKRouter(top_k), routed, shared_experts)

    def forward(self, x):
        """x [T, H] -> [T, H]"""
        return self.experts(x)


def install(monkeypatch, modules: dict[str, Any]) -> None:
    """Add the classes to a fake vLLM's modules."""
    for name in (FUSED, f"{FUSED}.router", METHOD, ROUTER, ROUTED):
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
        parent, child = name.rsplit(".", 1)
        setattr(modules[parent], child, module)
    # The plugin changes the classes.
    modules[METHOD].UnquantizedFusedMoEMethod = type("UnquantizedFusedMoEMethod", (UnquantizedFusedMoEMethod,), {})
    modules[ROUTED].RoutedExperts = type("RoutedExperts", (RoutedExperts,), {})
    modules[ROUTER].FusedTopKRouter = FusedTopKRouter
