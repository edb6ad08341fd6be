"""Who computes GEMMs. All have one order on Hopper, so any of them may be chosen for speed."""

from __future__ import annotations

import functools

import torch

from bi_ops.core import arch as arches
from bi_ops.core import runtime, vllm
from bi_ops.core.arch import Arch
from bi_ops.core.backends import Backend, Backends, Support
from bi_ops.matmul import cublaslt, verification
from bi_ops.matmul.launch import TENSOR_CORE_DTYPES, is_matrix, launch_triton
from bi_ops.matmul.order import GemmOrder, Problem
from bi_ops.matmul.order import order as order_of


class GemmBackend(Backend):
    """A backend of `mm`, `linear` and their gradients. forward_only: gradients are the default backend's."""

    forward_only = False

    def order(self, problem: Problem, arch: Arch) -> GemmOrder:  # type: ignore[override]
        return order_of(problem, arch)

    def gemm(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        batch_axis: verification.BatchAxis,
    ) -> bool:
        """out[M, N] = a[M, K] @ b[K, N] (+ bias[N], in the accumulator), rounded once to out's dtype.

        batch_axis: the axis whose length the batch sets, rows "m" or tokens "k". False, and nothing done, where it
        cannot compute these operands: the Triton kernel then does, in the same order.
        """
        raise NotImplementedError


class CublasLt(GemmBackend):
    """cuBLASLt without split-K. A shape is trusted when its bits have been verified; see `verification`."""

    name = "cublaslt"
    note = "no split-K, each shape verified bitwise; bf16 and fp16"

    def available(self) -> Support:
        return _cublaslt_available()

    def supports(self, problem: Problem, arch: Arch) -> Support:  # type: ignore[override]
        return Support(problem.dtype in TENSOR_CORE_DTYPES, f"{problem.dtype}: it multiplies bf16 and fp16")

    def gemm(self, a, b, bias, out, batch_axis):
        if a.dtype not in TENSOR_CORE_DTYPES or out.numel() == 0 or a.shape[1] == 0:
            return False
        if not (is_matrix(a) and is_matrix(b)) or out.stride(0) * out.element_size() % 16:
            return False
        if bias is not None and bias.dtype != out.dtype:
            return False
        shape = verification.GemmShape(
            a.get_device(),
            a.dtype,
            out.dtype,
            batch_axis,
            out.shape[1],
            a.shape[1] if batch_axis == "m" else out.shape[0],
            a.stride(1) != 1,
            b.stride(1) != 1,
            bias is not None,
        )
        return verification.is_verified(shape) and cublaslt.extension().run(a, b, out, bias, -1, True)


class Triton(GemmBackend):
    """bi_ops' own kernel."""

    name = "triton"
    note = "own kernel, every dtype and layout"

    def available(self) -> Support:
        where = "Triton's interpreter" if runtime.INTERPRET else "Triton"
        return Support(True, f"{where}, same bits as vLLM's kernel on Hopper")

    def gemm(self, a, b, bias, out, batch_axis):
        launch_triton(a[None], b[None], bias, out[None], over_tokens=batch_axis == "k")
        return True


class Decode(GemmBackend):
    """bi_ops' own kernel for up to 64 rows on Hopper; more rows, and what TMA cannot read, are the other backends'.

    Not chosen by itself: a launch takes the host longer than cuBLASLt's, which a CUDA graph hides. vLLM's plugin names
    it.
    """

    name = "decode"
    note = "own kernel for up to 64 rows in CUDA graphs; bf16 and fp16 on Hopper"
    automatic = False
    forward_only = True

    def available(self) -> Support:
        return _decode_available()

    def supports(self, problem: Problem, arch: Arch) -> Support:  # type: ignore[override]
        if not arch.gluon:
            return Support(False, f"{arch.name}: its kernel needs Hopper's wgmma and TMA")
        return Support(problem.dtype in TENSOR_CORE_DTYPES, f"{problem.dtype}: it multiplies bf16 and fp16")

    def gemm(self, a, b, bias, out, batch_axis):
        from bi_ops.matmul import decode

        if batch_axis == "m" and decode.serves(a, b.t(), bias, out):
            decode.launch(a, b.t(), bias, out)
            return True
        return bool(_CUBLASLT.available()) and _CUBLASLT.gemm(a, b, bias, out, batch_axis)


class Vllm(GemmBackend):
    """vLLM's batch-invariant kernel, for comparison."""

    name = "vllm"
    note = "vllm matmul_persistent; bf16 and fp16 forward"
    forward_only = True

    def available(self) -> Support:
        return Support(False, "no GPU: vLLM's kernels need one") if runtime.INTERPRET else vllm.availability()

    def supports(self, problem: Problem, arch: Arch) -> Support:  # type: ignore[override]
        if not arch.canonical_gemm:
            return Support(False, f"{arch.name}: the order of vLLM's kernel was not examined there")
        return Support(problem.dtype in TENSOR_CORE_DTYPES, f"{problem.dtype}: it multiplies bf16 and fp16")

    def gemm(self, a, b, bias, out, batch_axis):
        if min(a.shape) == 0:
            return False
        out.copy_(vllm.batch_invariant_module().matmul_persistent(a, b, bias))
        return True


@functools.cache
def _cublaslt_available() -> Support:
    if runtime.INTERPRET:
        return Support(False, "no GPU: cuBLASLt needs one")
    here = arches.current()
    if not here.canonical_gemm:
        return Support(False, f"its GEMMs were not shown to have the canonical order on {here.name}")
    return cublaslt.availability()


@functools.cache
def _decode_available() -> Support:
    if runtime.INTERPRET:
        return Support(False, "no GPU: Gluon's kernels need one")
    here = arches.current()
    return Support(here.gluon, "" if here.gluon else f"{here.name}: its kernel needs Hopper's wgmma and TMA")


_CUBLASLT, _TRITON = CublasLt(), Triton()

#: In order of preference, which is that of speed.
backends: Backends[GemmBackend] = Backends("matmul", (_CUBLASLT, _TRITON, Decode(), Vllm()))


@backends.cached
def select(dtype: torch.dtype, device: torch.device, backend: str | None = None) -> GemmBackend:
    """Who computes GEMMs of this dtype. Raises as `Backends.select`."""
    return backends.select(Problem(dtype), arches.of(device), backend)


def gradient_backend(name: str) -> str | None:
    """Who computes the gradients of a GEMM by backend `name`, "" for the default selection: itself, if it can."""
    return None if not name or backends.get(name).forward_only else name


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    batch_axis: verification.BatchAxis = "m",
    backend: str | None = None,
) -> torch.Tensor:
    """a[M, K] @ b[K, N] (+ bias[N]), rounded once to `out_dtype`, by the backend that is selected.

    Where it cannot take these operands, or has not verified their shape, the Triton kernel runs: the same bits.
    """
    out = a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype)
    if not select(a.dtype, a.device, backend).gemm(a, b, bias, out, batch_axis):
        _TRITON.gemm(a, b, bias, out, batch_axis)
    return out
