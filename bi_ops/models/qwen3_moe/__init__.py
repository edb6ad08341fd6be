"""Qwen3-MoE: Qwen3's decoder whose layers route each token to a few of many experts."""

from bi_ops.models.qwen3_moe.config import Qwen3MoeConfig
from bi_ops.models.qwen3_moe.model import Qwen3MoeForCausalLM

__all__ = ["Qwen3MoeConfig", "Qwen3MoeForCausalLM"]
