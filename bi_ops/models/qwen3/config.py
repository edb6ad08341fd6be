"""Qwen3's hyperparameters as Hugging Face writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bi_ops.models.config import CausalLMConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(CausalLMConfig):
    """A dense Qwen3; the defaults are those of its releases."""

    model_type: ClassVar[str] = "qwen3"
    architecture: ClassVar[str] = "Qwen3ForCausalLM"

    head_dim: int = 128
    max_position_embeddings: int = 40960
    rope_theta: float = 1_000_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 16:
            raise ValueError(f"Qwen3Config: head_dim must be a multiple of 16 (norm.qk_norm_rope), got {self.head_dim}")
