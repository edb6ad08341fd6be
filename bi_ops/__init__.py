"""bi_ops: differentiable, batch-invariant operators for PyTorch.

Operators are grouped in modules: `bi_ops.matmul.linear`, `bi_ops.norm.rms_norm` and so on; drop-in layers in
`bi_ops.nn`. `enable_batch_invariant_backward_mode` puts ordinary PyTorch code under the same contract. Importing bi_ops
touches no GPU. On a machine without one, kernels run in Triton's interpreter.
"""

from bi_ops.core import runtime as _runtime  # noqa: F401  # isort: skip  (first: it decides how triton is imported)
from bi_ops import activation, attention, embedding, logprob, matmul, moe, nn, norm, reduction, rope
from bi_ops.matmul import warmup
from bi_ops.mode import (
    audit,
    batch_invariant_backward_mode,
    disable_batch_invariant_backward_mode,
    enable_batch_invariant_backward_mode,
    is_batch_invariant_backward_mode_enabled,
)

__version__ = "0.1.0"
__all__ = [
    "activation",
    "attention",
    "audit",
    "batch_invariant_backward_mode",
    "disable_batch_invariant_backward_mode",
    "embedding",
    "enable_batch_invariant_backward_mode",
    "is_batch_invariant_backward_mode_enabled",
    "logprob",
    "matmul",
    "moe",
    "nn",
    "norm",
    "reduction",
    "rope",
    "warmup",
]
