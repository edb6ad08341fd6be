"""Embedding lookup with a deterministic gradient."""

from bi_ops.embedding.ops import embedding, embedding_backward

__all__ = ["embedding", "embedding_backward"]
