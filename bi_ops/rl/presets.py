"""Settings that were tried, by name."""

from __future__ import annotations

import dataclasses

from bi_ops.models.tiny import TINY, TINY_MOE
from bi_ops.rl.config import TrainConfig

_EXPERTS = {name: value for name, value in TINY_MOE.items() if TINY.get(name) != value}

PRESETS: dict[str, TrainConfig] = {
    # Two CPU cores and Triton's interpreter: a kernel program costs milliseconds, so few and small.
    "demo": TrainConfig(),
    # One H100 with vLLM: head_dim 128 is what FlashAttention 3 decodes and prefills with the same bits.
    "h100": TrainConfig(
        architecture={
            **TINY,
            "vocab_size": 256,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 512,
            "initializer_range": 0.07,
        },
        engine="vllm",
        symbols=16,
        max_new_tokens=16,
        prompts_per_step=32,
        group_size=16,
        lr=1e-3,
    ),
}
# The same with experts in every layer.
PRESETS["demo-moe"] = dataclasses.replace(PRESETS["demo"], architecture=TINY_MOE)
PRESETS["h100-moe"] = dataclasses.replace(
    PRESETS["h100"],
    architecture={
        **PRESETS["h100"].architecture,
        **_EXPERTS,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
    },
)
