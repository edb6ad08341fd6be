"""Thin models made of bi_ops operators."""
