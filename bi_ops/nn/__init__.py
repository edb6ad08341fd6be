"""Drop-in layers: torch's constructors and state_dict, bi_ops' operators inside; and `convert` for whole models."""

from bi_ops.nn.convert import convert
from bi_ops.nn.layers import Attention, Embedding, Linear, RMSNorm, SiluAndMul

__all__ = ["Attention", "Embedding", "Linear", "RMSNorm", "SiluAndMul", "convert"]
