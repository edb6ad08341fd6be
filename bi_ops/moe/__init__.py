"""Mixture-of-experts layers: router, dispatch, GEMMs of an expert's rows, combine."""

from bi_ops.core.rows import TOKEN_STEP
from bi_ops.moe.layer import experts
from bi_ops.moe.ops import Dispatch, combine, dispatch, gather, grouped_linear, router
from bi_ops.moe.order import order_of

__all__ = ["TOKEN_STEP", "Dispatch", "combine", "dispatch", "experts", "gather", "grouped_linear", "order_of", "router"]
