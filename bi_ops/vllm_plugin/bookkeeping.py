"""What vLLM's Python does for each request in every step, done at once where there is little to do.

A step of hundreds of requests is as long as vLLM's bookkeeping takes, and a small model's GPU waits meanwhile. Most of
what it does for a request has one outcome: its KV cache has room for the next token, and a log-probability is appended.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bi_ops.vllm_plugin.points import Replaced


def without_new_blocks(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`KVCacheManager.allocate_slots`, which answers itself for a running request whose blocks have room.

    That is where vLLM's allocates no block, frees none and has none to put into the prefix cache: one kind of full
    attention, no draft tokens, nothing computed elsewhere. All else is vLLM's matter.
    """

    @functools.wraps(stock)
    def allocate_slots(self: Any, request: Any, num_new_tokens: int, *args: Any, **options: Any) -> Any:
        if not args and num_new_tokens > 0 and (not options or options == {"num_lookahead_tokens": 0}):
            blocks = blocks_of(self)
            if blocks is not None:
                name, size, tokens = request.request_id, blocks.block_size, request.num_computed_tokens + num_new_tokens
                held = blocks.req_to_blocks.get(name)
                if (
                    held
                    and tokens <= len(held) * size
                    and tokens <= self.max_model_len
                    and not (self.enable_caching and due(blocks, request, tokens))
                ):
                    return self.empty_kv_cache_blocks
        return stock(self, request, num_new_tokens, *args, **options)

    return allocate_slots


def due(blocks: Any, request: Any, tokens: int) -> bool:
    """Has the request a full block that is not in the prefix cache, when so many of its tokens are computed?"""
    full = min(tokens, request.num_tokens) // blocks.block_size
    return bool(full > blocks.num_cached_block.get(request.request_id, 0))


def blocks_of(manager: Any) -> Any:
    """vLLM's manager of the only kind of blocks; None where there are several, or one that frees or shares them too."""
    try:
        return manager._bi_ops_blocks
    except AttributeError:
        kinds = manager.coordinator.single_type_managers
        plain = len(kinds) == 1 and type(kinds[0]).__name__ == "FullAttentionManager"
        plain = plain and all(hasattr(kinds[0], name) for name in ("block_size", "req_to_blocks", "num_cached_block"))
        if plain and manager.enable_caching:  # a hash of less than a block caches blocks that are not full
            plain = kinds[0].block_size == kinds[0].block_pool.hash_block_size
        manager._bi_ops_blocks = kinds[0] if plain else None
        return manager._bi_ops_blocks


#: What the plugin replaces.
REPLACED = (
    Replaced(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.allocate_slots",
        ("self", "request", "num_new_tokens"),
        without_new_blocks,
        "it takes a quarter of the host's step of many requests, though few of them need a block",
    ),
)
