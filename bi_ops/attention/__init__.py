"""Softmax attention over packed sequences, from dense keys or from a paged cache, with the same bits."""

from bi_ops.attention.checks import check_cu_seqlens
from bi_ops.attention.ops import flash_attention, paged_attention, providers

__all__ = ["check_cu_seqlens", "flash_attention", "paged_attention", "providers"]
