"""Verification ahead of time: which GEMMs a model needs, compared before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bi_ops.matmul import cublaslt, verification
from bi_ops.matmul.backends import backends
from bi_ops.matmul.launch import TENSOR_CORE_DTYPES
from bi_ops.matmul.verification import GemmShape

#: Called with (shapes done, shapes in all, what comes next: a shape, or a kernel that is compiled before all).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Warmup:
    """What a warm-up found. verified, refused: shapes whose bits are cuBLASLt's too, and those whose are not, which
    the Triton kernel computes. reason: why nothing was to verify here; empty elsewhere."""

    verified: int
    refused: tuple[str, ...]
    reason: str = ""


def shapes_of(module: torch.nn.Module, dtype: torch.dtype) -> Iterator[GemmShape]:
    """The GEMMs of every two-dimensional weight of a model: forward, dX and, for weights that are learned, dW.

    dtype: of the activations, for fp32 weights; those of a 16-bit weight have its own. dW counts for a weight with a
    `main_grad` too, which may be without one in another step.
    """
    for weight in module.parameters():
        if weight.ndim != 2 or not weight.is_cuda:
            continue
        (n, k), device = weight.shape, weight.get_device()
        d = weight.dtype if weight.dtype in TENSOR_CORE_DTYPES else dtype
        yield GemmShape(device, d, d, "m", n, k, False, True, False)
        if weight.requires_grad:
            yield GemmShape(device, d, d, "m", k, n, False, False, False)
            yield GemmShape(device, d, weight.dtype, "k", k, n, True, False, False)


def warmup(
    module: torch.nn.Module | None = None,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = lambda done, total, shape: None,
    build: bool = True,
) -> Warmup:
    """Verify cuBLASLt's GEMMs for a model, so that they run instead of the Triton kernel of the same bits.

    Without it every GEMM of a new shape runs in Triton: the same results, more slowly. Results are kept in
    `~/.cache/bi_ops`, per GPU and library versions, so it is needed once per machine.

    Args:
        module: a model on a GPU; None: the shapes that have run unverified in this process.
        dtype: of the activations over fp32 weights, bf16 or fp16. progress: called with (done, total, what comes next).
        build: False verifies nothing where the binding would have to be compiled first, which takes seconds.

    Raises:
        TypeError: another dtype, or what is no module. RuntimeError: a CUDA graph is being captured.
    """
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"warmup: module must be a torch.nn.Module or None, got {type(module).__name__}")
    if not isinstance(dtype, torch.dtype) or dtype not in TENSOR_CORE_DTYPES:
        raise TypeError(f"warmup: dtype is {dtype}; cuBLASLt is verified for bfloat16 and float16 alone")
    here = backends.get("cublaslt").available()
    if not here:
        return Warmup(0, (), here.reason)
    if build is False and cublaslt.loaded() is None:
        return Warmup(0, (), here.reason)
    found = verification.wanted() if module is None else list(dict.fromkeys(shapes_of(module, dtype)))
    if not found:
        none = "no GEMM has run unverified" if module is None else "the model has no two-dimensional weight on a GPU"
        return Warmup(0, (), none)
    cublaslt.extension()  # seconds where it has to be compiled
    verified, refused = 0, []
    verification.compile_kernels(found, lambda done, total: progress(0, len(found), f"kernel {done} of {total}"))
    for i, shape in enumerate(found):
        progress(i, len(found), shape.key())
        if verification.verify(shape):
            verified += 1
        else:
            refused.append(shape.key())
    progress(len(found), len(found), "")
    return Warmup(verified, tuple(refused))
