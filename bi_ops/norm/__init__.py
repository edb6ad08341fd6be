"""RMS normalisation, alone and with the residual add before it."""

from bi_ops.norm.ops import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
