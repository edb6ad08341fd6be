"""Qwen3-MoE's hyperparameters as Hugging Face writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bi_ops.models.decoder import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """A Qwen3-MoE; what a config.json leaves out has the value that transformers gives it.

    Attributes:
        num_experts: of each layer that has experts. num_experts_per_tok: those that a token is sent to.
        moe_intermediate_size: of an expert; `intermediate_size` is that of a layer without experts.
        norm_topk_prob: the weights of a token's experts are divided by their sum.
        decoder_sparse_step, mlp_only_layers: every such layer has experts, but for those listed.

    The auxiliary loss that balances experts is not computed: `router_aux_loss_coef` is kept and not read, and
    `output_router_logits`, with which transformers adds that loss, is refused.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    architecture: ClassVar[str] = "Qwen3MoeForCausalLM"
    aliases: ClassVar[Mapping[str, str]] = {"num_local_experts": "num_experts"}

    num_experts: int = 128
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mlp_only_layers is None:
            object.__setattr__(self, "mlp_only_layers", [])
        super().__post_init__()
        name = type(self).__name__
        for n in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
            if getattr(self, n) < 1:
                raise ValueError(f"{name}: {n} must be at least 1, got {getattr(self, n)}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"{name}: num_experts_per_tok {self.num_experts_per_tok} is more than num_experts {self.num_experts}"
            )
        layers = self.mlp_only_layers
        if not isinstance(layers, list) or not all(type(i) is int and i >= 0 for i in layers):
            raise ValueError(f"{name}: mlp_only_layers is {layers!r}, it must be a list of layers, counted from 0")

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def unsupported(cls, values: Mapping[str, Any]) -> list[str]:
        """As `CausalLMConfig.unsupported`."""
        found = super().unsupported(values)
        if values.get("output_router_logits"):
            found.append("output_router_logits True (the auxiliary loss is not computed here; set it to false)")
        if values.get("shared_expert_intermediate_size"):
            size = values["shared_expert_intermediate_size"]
            found.append(f"shared_expert_intermediate_size {size!r} (no expert takes every token here)")
        # transformers' model gives the window to every layer, whatever `max_window_layers` says.
        if not found and values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None:
            found.append(
                f"use_sliding_window True, sliding_window {values.get('sliding_window', 4096)!r} (all layers attend to "
                "the whole sequence here; set use_sliding_window to false to train so)"
            )
        return found
