"""Embedding lookup with a deterministic gradient."""

from bi_ops.embedding.ops import embedding, embedding_backward
from bi_ops.embedding.order import order_of

__all__ = ["embedding", "embedding_backward", "order_of"]
