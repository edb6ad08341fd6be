"""Linear layers of an inference engine: no gradient, few rows in a captured CUDA graph or many outside."""

from __future__ import annotations

import math

import torch

from bi_ops.core import checks
from bi_ops.matmul.backends import backends, gemm
from bi_ops.matmul.linear import through_binding
from bi_ops.matmul.ops import check_operands

#: More rows are not the decode kernel's.
FEW_ROWS = 64
#: More rows outside of graphs are cuBLASLt's: a decoding step of so many sequences waits for the host, not for its LM
#: head, which takes cuBLASLt 2% longer (bench/results/h200/decode_gemm_exploration.csv).
EAGER_ROWS = 16


def inference_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    constant_weight: bool = False,
    in_graph: bool = True,
) -> torch.Tensor:
    """``x @ weight.T + bias`` without a gradient, by what is fastest here: the `decode` backend up to 64 rows.

    Args:
        x: [..., K], bf16, fp16 or fp32. weight: [N, K], the dtype of x.
        bias: [N] or None, added in the fp32 accumulator, which is rounded once (order "in_accumulator").
        constant_weight: no kernel of the CUDA graph that is being captured writes the weight. The kernel then reads it
            while the kernel before still runs; see `bi_ops.core.pdl`. Outside a capture it changes nothing: a weight
            update may be in flight.
        in_graph: the layer runs in captured CUDA graphs, which hide what a launch costs the host. False: it never does,
            as an LM head. From 17 rows on cuBLASLt computes it then, if it has verified the shape.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: shapes that do not fit, or another device.
    """
    op = "inference_linear"
    most = FEW_ROWS if in_graph else EAGER_ROWS
    if bias is None and isinstance(x, torch.Tensor) and x.ndim == 2 and x.shape[0] > most:
        out = through_binding(x, weight)
        if out is not None:
            return out
    check_operands(op, x, weight, ("x", "weight"))
    checks.same_dtype(op, x=x, weight=weight)
    fits = weight.ndim == 2 and x.ndim >= 1 and x.shape[-1] == weight.shape[1]
    checks.shape(op, fits, lambda: f"needs [..., K] and [N, K], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None:
        checks.tensor(op, "bias", bias, ndim=1)
        checks.dtype(op, "bias", bias)
        checks.same_device(op, x=x, bias=bias)
        have, n = bias.shape, weight.shape[0]
        checks.shape(op, have[0] == n, lambda: f"bias {list(have)} for {n} columns")
        bias = bias.contiguous()
    rows = x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    shape = (*x.shape[:-1], weight.shape[0])
    if backends.get("decode").available():
        from bi_ops.matmul import decode

        out = x.new_empty((rows.shape[0], weight.shape[0]))
        lt = backends.get("cublaslt")
        by_lt = not in_graph and rows.shape[0] > EAGER_ROWS and bool(lt.available())
        if by_lt and lt.gemm(rows, weight.t(), bias, out, "m"):
            return out.view(shape)
        if decode.serves(rows, weight, bias, out):
            prefetch = constant_weight and torch.cuda.is_current_stream_capturing()
            decode.launch(rows, weight, bias, out, prefetch=prefetch)
            return out.view(shape)
    return gemm(rows, weight.t(), bias).view(shape)
