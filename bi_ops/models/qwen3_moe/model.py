"""Qwen3-MoE: the shared decoder with a mixture of experts in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from bi_ops import nn
from bi_ops.models.config import CausalLMConfig
from bi_ops.models.decoder import MLP, DecoderForCausalLM
from bi_ops.models.qwen3_moe.config import Qwen3MoeConfig

#: Tokens of a unit for each expert, over those that a token meets: each expert's rows of a unit are filled up to a step
#: of 16, by 7.5 rows of 384 on average.
_UNIT_ROWS = 384


class SparseMoeBlock(nn.MoE):
    """`nn.MoE` as a layer's `mlp`. Its backward keeps gate and up, and computes the activation again in any case."""

    def forward(self, x: torch.Tensor, cu_units: torch.Tensor | None = None, selective: bool = False) -> torch.Tensor:
        return super().forward(x, cu_units)


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    """Qwen3-MoE; arguments as `CausalLM`. vLLM has the names of all parameters but the experts'."""

    config_class: ClassVar[type[CausalLMConfig]] = Qwen3MoeConfig

    config: Qwen3MoeConfig

    def mlp(self, layer: int, **factory: Any) -> torch.nn.Module:
        c = self.config
        if not c.has_experts(layer):
            return MLP(c, **factory)
        sizes = (c.num_experts, c.num_experts_per_tok, c.hidden_size, c.moe_intermediate_size)
        return SparseMoeBlock(*sizes, c.norm_topk_prob, **factory)

    def unsegmented(self, segments: int) -> str | None:
        return "experts are not shared by tensor-parallel ranks"

    @property
    def unit_tokens(self) -> int:
        c = self.config
        return max(super().unit_tokens, _UNIT_ROWS * c.num_experts // c.num_experts_per_tok)

    def packed_modules(self) -> Mapping[str, Mapping[str, int]]:
        size = self.config.moe_intermediate_size
        return {**super().packed_modules(), "experts.gate_up_proj": {"gate_proj": size, "up_proj": size}}
