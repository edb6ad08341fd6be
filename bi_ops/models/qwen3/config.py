"""Qwen3's hyperparameters as Hugging Face writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bi_ops.models.decoder import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """A dense Qwen3; the defaults are those of its releases."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    head_dim: int = 128
    max_position_embeddings: int = 40960
    rope_theta: float = 1_000_000.0
