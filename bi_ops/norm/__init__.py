"""RMS normalisation: alone, with the residual add before it, and of queries and keys with the rotation after it."""

from bi_ops.norm.ops import add_rms_norm, rms_norm
from bi_ops.norm.order import order_of
from bi_ops.norm.qk_ops import qk_norm_rope

__all__ = ["add_rms_norm", "order_of", "qk_norm_rope", "rms_norm"]
