"""Rotary position embedding, rotate-half (NeoX) style."""

from bi_ops.rope.ops import apply_rope, cos_sin_cache

__all__ = ["apply_rope", "cos_sin_cache"]
