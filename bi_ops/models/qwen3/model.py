"""Qwen3: the shared decoder with a dense MLP in each layer."""

from __future__ import annotations

from typing import ClassVar

from bi_ops.models.config import CausalLMConfig
from bi_ops.models.decoder import DecoderForCausalLM
from bi_ops.models.qwen3.config import Qwen3Config


class Qwen3ForCausalLM(DecoderForCausalLM):
    """Dense Qwen3; arguments as `CausalLM`."""

    config_class: ClassVar[type[CausalLMConfig]] = Qwen3Config

    config: Qwen3Config
