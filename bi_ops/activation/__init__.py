"""Gated activations."""

from bi_ops.activation.ops import silu_and_mul, silu_and_mul_backward
from bi_ops.activation.order import order_of

__all__ = ["order_of", "silu_and_mul", "silu_and_mul_backward"]
