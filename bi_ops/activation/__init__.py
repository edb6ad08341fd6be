"""Gated activations."""

from bi_ops.activation.ops import silu_and_mul

__all__ = ["silu_and_mul"]
