"""Rotary position embedding, rotate-half (NeoX) style."""

from bi_ops.rope.ops import apply_rope, cos_sin_cache
from bi_ops.rope.order import order_of

__all__ = ["apply_rope", "cos_sin_cache", "order_of"]
