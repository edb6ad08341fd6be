"""vLLM's attention through bi_ops' own kernels: any head size, the bits that backend 'triton' trains with.

FlashAttention 3 changes its tile between prefill and decode at some head sizes. A backend of vLLM's named CUSTOM, whose
KV cache is laid out as FLASH_ATTN's and read with `paged_attention`, does not. Sliding windows, soft-capping and
sinks are that function's. Layers whose backend nobody named get it; full CUDA graphs hold decoding, prefill and both.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from bi_ops import attention
from bi_ops.core import vllm
from bi_ops.core.replay import replayed
from bi_ops.vllm_plugin.orders import log_orders

#: Below vLLM's own logger, so that the lines are in the server's log.
logger = logging.getLogger("vllm.bi_ops")

#: Head sizes at which FlashAttention 3 was seen to give prefill and decode the same bits. At 64 and 96 it picks
#: another tile for decode: 44 of 54 probed rows differed.
FLASH_ATTN_HEAD_DIMS = (128, 256)

#: What vLLM calls the backend, and where it finds the class.
NAME, PATH = "CUSTOM", f"{__name__}.PagedAttentionBackend"

#: An eager prefill waits for Python, in every layer for the same.
_paged_attention, _write_cache = replayed(attention.paged_attention), replayed(attention.write_cache)


def served(head_dim: int) -> bool:
    """Can the backend serve this head size?"""
    return head_dim % 8 == 0 and 16 <= head_dim <= 256


def fa3_refusal(head_dim: int) -> str:
    """Why FlashAttention 3 is refused at `head_dim`, and what to do."""
    option = (
        "leave --attention-backend out, or give VllmEngine attention='triton': then bi_ops' own kernel computes it "
        f"(vLLM calls it {NAME})"
    )
    return (
        f"attention: FlashAttention 3 is not known to give decode and prefill the same bits at head_dim {head_dim}, "
        f"only at {' and '.join(map(str, FLASH_ATTN_HEAD_DIMS))}, so log-probabilities would depend on the batch; "
        f"{option if served(head_dim) else 'use another model'}"
    )


def choose_backend(stock: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's choice of a backend for a layer: bi_ops' own where nobody named one and it serves the layer.

    Raises where FLASH_ATTN would be batch-variant: in layers that decode, which an encoder's never do, and in version
    3, whose tiles are known.
    """

    @functools.wraps(stock)
    def choose(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        decodes = attn_selector_config.attn_type in ("decoder", "encoder_decoder")
        if backend is None and decodes:
            backend = own_backend(attn_selector_config)
        chosen = stock(backend, attn_selector_config, *args, **kwargs)
        head_dim = attn_selector_config.head_size
        if decodes and chosen.get_name() == "FLASH_ATTN" and head_dim not in FLASH_ATTN_HEAD_DIMS:
            from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

            if get_flash_attn_version(head_size=head_dim) == 3:
                raise ValueError(fa3_refusal(head_dim))
        if decodes:
            log_orders(chosen.get_name())
        return chosen

    return choose


def own_backend(attn_selector_config: Any) -> Any:
    """vLLM's name of bi_ops' backend if it serves the layer, else None, with a warning that says why not."""
    reasons = unserved(attn_selector_config)
    if reasons:
        logger.warning("bi_ops: vLLM chooses attention: %s does not serve this layer: %s", NAME, ", ".join(reasons))
        return None
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[NAME]


def unserved(attn_selector_config: Any) -> list[str]:
    """Why bi_ops' backend does not serve a layer, as vLLM asks it; empty where it does."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability()
    return _backend().validate_configuration(device_capability=capability, **attn_selector_config._asdict())


def check_metadata(metadata: Any, release: vllm.Release) -> None:
    """Raise NotImplementedError where a batch asks for what `paged_attention` does not compute.

    Once for each batch, where vLLM builds its metadata: the replay of a CUDA graph asks no layer.
    """
    asked = {name: getattr(metadata, field) for name, field in release.refused_metadata.items()}
    refused = [name for name, value in asked.items() if value is not None and value is not False]
    if metadata.causal is not True:
        refused.append("attention that is not causal")
    if refused:
        names = ", ".join(sorted(refused))
        raise NotImplementedError(f"attention: backend {NAME} does not compute {names}; use a model without")


def paged_output(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: Any,
    head_dim: int,
    scale: float,
    output: torch.Tensor,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one layer over vLLM's cache, whatever is in the batch: prefill, chunks of it, decode.

    Waits for no GPU, and its launch depends on the numbers of tokens and sequences alone, not on
    `metadata.max_query_len`: a CUDA graph serves every batch that vLLM pads to these. vLLM writes the metadata before
    the graph that reads it.

    Args:
        query: [T, Hq, D]. kv_cache: [blocks, Hkv, block_size, 2 * D], keys then values in the last dimension, any
            strides. metadata: vLLM's FlashAttentionMetadata, of `check_metadata`. output: [T, Hq, D], whose first
            `num_actual_tokens` rows are written. window_size, softcap, sinks: as `paged_attention`, the layer's own.
            The metadata's window is that of the layer's group in the cache, which need not be the same.
    """
    n = metadata.num_actual_tokens
    _paged_attention(
        query.narrow(0, 0, n),
        *_caches(kv_cache, head_dim),
        metadata.block_table,
        metadata.query_start_loc,
        metadata.seq_lens,
        softmax_scale=scale,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        backend="triton",
        out=output.narrow(0, 0, n),
        constant_metadata=True,
    )
    return output


def write_keys(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """The new tokens' keys and values [T, Hkv, D] to vLLM's cache, as `paged_output` reads it."""
    _write_cache(key, value, *_caches(kv_cache, key.shape[-1]), slot_mapping, constant_metadata=True)


def _caches(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [blocks, block_size, Hkv, D]. By `narrow`, which takes the host a third of `split`."""
    both = kv_cache.transpose(1, 2)
    return both.narrow(3, 0, head_dim), both.narrow(3, head_dim, head_dim)


@functools.cache
def _backend() -> Any:
    """The class behind `PATH`."""
    release = vllm.require("attention")
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionBackend,
        FlashAttentionImpl,
        FlashAttentionMetadataBuilder,
    )

    class PagedAttentionImpl(FlashAttentionImpl):
        """Writes the cache with `write_cache` and reads it with `paged_attention`."""

        can_return_lse_for_decode = False  # so vLLM refuses it for decode context parallelism
        supports_dcp = False

        def __init__(self, *args: Any, sinks: torch.Tensor | None = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)  # which takes sinks only where FlashAttention 3 is
            if self.alibi_slopes is not None:
                raise NotImplementedError(f"attention: backend {NAME} does not compute ALiBi; use a model without")
            if sinks is not None:
                if sinks.shape != (self.num_heads,):
                    raise ValueError(f"attention: sinks must be [{self.num_heads}], got {list(sinks.shape)}")
                self.sinks = sinks

        def do_kv_cache_update(
            self,
            layer: torch.nn.Module,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            slot_mapping: torch.Tensor,
        ) -> None:
            write_keys(key, value, kv_cache, slot_mapping)

        def forward(
            self,
            layer: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            output_scale: torch.Tensor | None = None,
            output_block_scale: torch.Tensor | None = None,
        ) -> torch.Tensor:
            if output_scale is not None or output_block_scale is not None:
                raise NotImplementedError(f"attention: backend {NAME} does not quantize its output")
            if attn_metadata is None:  # vLLM measures its memory
                return output.fill_(0)
            return paged_output(
                *(query, kv_cache, attn_metadata, self.head_size, self.scale, output),
                window_size=self.sliding_window,
                softcap=self.logits_soft_cap,
                sinks=self.sinks,
            )

    class PagedAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
        _cudagraph_support = AttentionCGSupport.ALWAYS

        def build(self, *args: Any, **kwargs: Any) -> Any:
            metadata = super().build(*args, **kwargs)
            check_metadata(metadata, release)
            return metadata

        def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
            return False

    class PagedAttentionBackend(FlashAttentionBackend):
        """What vLLM asks before it chooses; everything not overridden is as FLASH_ATTN, the cache's layout too."""

        supports_kv_cache_update_bypass = False  # a model's fused kernel would write keys with bits of its own

        @staticmethod
        def get_name() -> str:
            return NAME

        @staticmethod
        def get_impl_cls() -> type:
            return PagedAttentionImpl

        @staticmethod
        def get_builder_cls() -> type:
            return PagedAttentionMetadataBuilder

        @classmethod
        def supports_head_size(cls, head_size: int) -> bool:
            return served(head_size)

        @classmethod
        def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
            return kv_cache_dtype in (None, "auto", "float16", "bfloat16")

        @classmethod
        def supports_attn_type(cls, attn_type: str) -> bool:
            return attn_type == AttentionType.DECODER

        @classmethod
        def supports_non_causal(cls) -> bool:
            return False

        @classmethod
        def supports_mm_prefix(cls) -> bool:
            return False

        @classmethod
        def supports_rswa(cls) -> bool:  # asked by releases that know reference sliding windows
            return False

        @classmethod
        def supports_device_cpu_query_lens_mismatch(cls) -> bool:  # adaptive verification; rows it drops stay unwritten
            return False

        @classmethod
        def supports_sink(cls) -> bool:
            return True

        @classmethod
        def supports_per_head_quant_scales(cls) -> bool:
            return False

    # vLLM looks a backend up by this name again and again.
    PagedAttentionBackend.__module__, PagedAttentionBackend.__qualname__ = PATH.rsplit(".", 1)
    return PagedAttentionBackend


def computes(impl: Any) -> bool:
    """Is this bi_ops' implementation of a layer's attention?"""
    return _backend.cache_info().currsize > 0 and isinstance(impl, _backend().get_impl_cls())


def __getattr__(name: str) -> Any:
    """`PATH`, made when vLLM asks for it: it derives from vLLM's class, and importing bi_ops imports no vLLM."""
    if name == PATH.rsplit(".", 1)[1]:
        return _backend()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install() -> None:
    """Tell vLLM of the backend; who uses it is `choose_backend`'s matter, and the user's.

    Raises:
        RuntimeError: another plugin has taken the name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    slot = AttentionBackendEnum[NAME]
    if slot.is_overridden() and slot.get_path() != PATH:
        raise RuntimeError(
            f"vllm_plugin: vLLM's attention backend {NAME} is already {slot.get_path()}; bi_ops needs the name, so "
            "remove the other plugin (VLLM_PLUGINS lists those that load)"
        )
    register_backend(slot, PATH)


def uninstall() -> None:
    """Take the backend back from vLLM."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    AttentionBackendEnum[NAME].clear_override()
