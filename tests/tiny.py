"""The tiny Qwen3 that tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

from bi_ops.core import runtime
from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from bi_ops.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM


def tiny_config(**changes) -> Qwen3Config:
    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16 if runtime.INTERPRET else 128,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return Qwen3Config(**(sizes | changes))


def tiny_model(seed: int = 0, recompute: Any = "selective", segments: int = 1, **changes) -> Qwen3ForCausalLM:
    model = Qwen3ForCausalLM(tiny_config(**changes), recompute=recompute, segments=segments)
    model.init_weights(seed)
    return model


def tiny_moe_config(**changes) -> Qwen3MoeConfig:
    values = {f.name: getattr(tiny_config(), f.name) for f in dataclasses.fields(tiny_config())}
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return Qwen3MoeConfig(**(values | {"num_hidden_layers": 1} | sizes | changes))


def tiny_moe_model(seed: int = 0, recompute: Any = "selective", **changes) -> Qwen3MoeForCausalLM:
    model = Qwen3MoeForCausalLM(tiny_moe_config(**changes), recompute=recompute)
    model.init_weights(seed)
    return model
