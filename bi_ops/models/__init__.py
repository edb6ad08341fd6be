"""Thin causal language models made of bi_ops layers, found by the model_type of their checkpoint."""

from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from bi_ops.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM
from bi_ops.models.registry import known, load_config, load_model, make_model, register, unregister

__all__ = ["known", "load_config", "load_model", "make_model", "register", "unregister"]

register("qwen3", Qwen3Config, Qwen3ForCausalLM)
register("qwen3_moe", Qwen3MoeConfig, Qwen3MoeForCausalLM)
