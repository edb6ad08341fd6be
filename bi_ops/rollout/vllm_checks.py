"""What a vLLM that samples has to be: checked before it starts, and what it has become afterwards."""

from __future__ import annotations

import os
import sys

import torch

from bi_ops import vllm_plugin
from bi_ops.models.config import CausalLMConfig

#: Who may compute attention in vLLM: bi_ops' own kernels as a backend of vLLM's, the default, or vLLM's
#: FlashAttention 3.
ATTENTION = ("triton", "vllm")

#: vLLM reads its mode from the environment. In-process, because that is where weights can be handed over.
ENVIRONMENT = {"VLLM_BATCH_INVARIANT": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def prepare_environment() -> None:
    """Set what vLLM reads from the environment.

    Raises:
        RuntimeError: it is set otherwise, or vLLM has already read and kept other values.
    """
    for name, value in ENVIRONMENT.items():
        if os.environ.get(name, value) != value:
            raise RuntimeError(f"VllmEngine: {name}={os.environ[name]} is set, but it must be {value}; unset it")
        os.environ[name] = value
    if "vllm" in sys.modules:
        from vllm import envs

        if not envs.VLLM_BATCH_INVARIANT or envs.VLLM_ENABLE_V1_MULTIPROCESSING:
            raise RuntimeError(
                "VllmEngine: vLLM is already running in this process in another mode; start a new process, or set "
                + " ".join(f"{n}={v}" for n, v in ENVIRONMENT.items())
                + " before it starts"
            )


def check_tensor_parallel(op: str, config: CausalLMConfig, size: int, expert_parallel: bool = False) -> None:
    """Raise ValueError unless `size` ranks can share the model evenly; KV heads fewer than ranks are copied.

    expert_parallel: ranks have whole experts; else each has a slice of every expert.
    """
    if size < 1:
        raise ValueError(f"{op}: tensor_parallel_size is {size}; it must be at least 1")
    shared = ["num_attention_heads", "hidden_size", "intermediate_size"]
    if hasattr(config, "num_experts"):
        shared.append("num_experts" if expert_parallel else "moe_intermediate_size")
    elif expert_parallel:
        raise ValueError(f"{op}: enable_expert_parallel: {type(config).__name__} has no experts; leave it out")
    uneven = [f"{n} {getattr(config, n)}" for n in shared if getattr(config, n) % size]
    if config.num_key_value_heads % size and size % config.num_key_value_heads:
        uneven.append(f"num_key_value_heads {config.num_key_value_heads}")
    if uneven:
        raise ValueError(
            f"{op}: tensor_parallel_size={size} does not divide the model's {', '.join(uneven)} evenly; take a "
            "size that divides them"
        )


def check_attention(attention: str, head_dim: int, plugin: bool) -> None:
    """Raise ValueError unless `attention` can keep the contract at `head_dim`; without the plugin nothing keeps it."""
    if attention not in ATTENTION:
        raise ValueError(f"VllmEngine: attention is {attention!r}; it must be {' or '.join(ATTENTION)}")
    if attention == "triton":
        if not plugin:
            raise ValueError("VllmEngine: attention='triton' is a part of the plugin; leave plugin=False out")
        if not vllm_plugin.backend.served(head_dim):
            raise ValueError(
                f"VllmEngine: attention at head_dim {head_dim} is not built; it must be a multiple of 8 from 16 to 256"
            )
    elif plugin and head_dim not in vllm_plugin.backend.FLASH_ATTN_HEAD_DIMS:
        raise ValueError(f"VllmEngine: {vllm_plugin.backend.fa3_refusal(head_dim)}")


def attention_kernels(model: torch.nn.Module) -> set[str]:
    """What computes attention in a vLLM model's layers: the backend's name, FLASH_ATTN with its version."""
    names = set()
    for layer in model.modules():
        if (backend := getattr(layer, "attn_backend", None)) is not None:
            name = backend.get_name()
            version = f" {getattr(layer.impl, 'vllm_flash_attn_version', None)}" if name == "FLASH_ATTN" else ""
            names.add(name + version)
    return names
