"""Softmax attention over packed sequences, from dense keys or from a paged cache, with the same bits."""

from bi_ops.attention.backends import backends, order_of
from bi_ops.attention.cache import write_cache
from bi_ops.attention.checks import check_cu_seqlens
from bi_ops.attention.masked import masked_attention
from bi_ops.attention.ops import flash_attention, paged_attention
from bi_ops.attention.order import AttentionOrder, Problem

__all__ = [
    "AttentionOrder",
    "Problem",
    "backends",
    "check_cu_seqlens",
    "flash_attention",
    "masked_attention",
    "order_of",
    "paged_attention",
    "write_cache",
]
