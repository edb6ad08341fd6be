"""Qwen3 (dense): packed sequences, vLLM's fused projections, bf16 forward over fp32 master weights."""

from bi_ops.models.qwen3.config import Qwen3Config
from bi_ops.models.qwen3.model import Qwen3ForCausalLM

__all__ = ["Qwen3Config", "Qwen3ForCausalLM"]
