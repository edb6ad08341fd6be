"""CUDA graphs of steps with more tokens than vLLM captures: prefills that would wait for Python, not for the GPU.

vLLM captures steps of up to 512 tokens; a longer one is launched kernel by kernel. bi_ops' attention has one launch for
every mixture of prefill and decoding, so a full graph may hold a step of any length. It pays as long as the GPU needs
less for a decoder layer than Python: a padded step then takes no longer than Python would.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.bi_ops")

#: What a decoder layer outside of a graph takes the host, about, in seconds (1 to 3 ms on hosts of H200); what a GPU
#: computes in one.
HOST_SECONDS, FLOPS = 2e-3, 6e14


def layer_weights(model: Any, ranks: int) -> int:
    """Weights of a decoder layer that a token meets on a rank. model: the Hugging Face config of the text model."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or hidden // heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    chosen = getattr(model, "num_experts_per_tok", None) or 0
    inner = chosen * model.moe_intermediate_size if chosen else model.intermediate_size
    return hidden * (2 * (heads + kv_heads) * head_dim + 3 * inner) // ranks


def sizes(captured: list[int], weights: int, most: int) -> list[int]:
    """Numbers of tokens to capture beyond `captured`, up to `most`: two to each doubling, as long as they pay."""
    limit = min(most, int(HOST_SECONDS * FLOPS / (2 * weights)))
    first = max(captured, default=0)
    steps = [n << i for i in range(limit.bit_length()) for n in (2, 3)]
    return sorted({n for n in (*steps, most) if first < n <= limit})


def extend(config: Any, asked: bool | None) -> None:
    """Have vLLM capture longer steps too, where this `VllmConfig` has full graphs of every kind of step.

    asked: whether to; None: yes, but without a warning where that cannot be.
    """
    ranks = config.parallel_config.tensor_parallel_size
    if asked is False:
        return
    compiled, scheduler = config.compilation_config, config.scheduler_config
    captured = list(compiled.cudagraph_capture_sizes or ())
    if getattr(compiled.cudagraph_mode, "name", compiled.cudagraph_mode) != "FULL" or not captured:
        if asked:
            logger.warning(
                "bi_ops: no CUDA graphs of long prefills: they need cudagraph_mode FULL, for every kind of step"
            )
        return
    more = sizes(captured, layer_weights(config.model_config.hf_text_config, ranks), scheduler.max_num_batched_tokens)
    if more:
        compiled.cudagraph_capture_sizes = [*sorted(captured), *more]
        compiled.max_cudagraph_capture_size = more[-1]
        logger.info("bi_ops: CUDA graphs of steps of %s tokens too", ", ".join(map(str, more)))
