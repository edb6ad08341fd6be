"""bi_ops: differentiable, batch-invariant operators for PyTorch.

Operators live in their families: `bi_ops.matmul.linear`, `bi_ops.norm.rms_norm` and so on. Importing bi_ops touches
no GPU. On a machine without one, kernels run in Triton's interpreter.
"""

from bi_ops._common import runtime as _runtime  # noqa: F401  # isort: skip  (first: it decides how triton is imported)
from bi_ops import activation, attention, embedding, logprob, matmul, nn, norm, rope

__version__ = "0.1.0"
__all__ = ["activation", "attention", "embedding", "logprob", "matmul", "nn", "norm", "rope"]
