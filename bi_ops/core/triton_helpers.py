"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from bi_ops.core.runtime import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)

#: Launch options that shape bits, passed at every launch. Whether the compiler fuses a multiplication with an addition
#: decides whether the product is rounded, and Triton changes its default: on up to 3.9, off from 3.10.
PINNED = {"enable_fp_fusion": True}


def thread_sums(release: str) -> str:
    """How `tl.sum` of that release of Triton adds what one thread holds: since 3.8 as a tree (triton#9220)."""
    version = tuple(int(n) for n in release.split(".")[:2])
    return "sequential" if version < (3, 8) else "pairwise"


_SEQUENTIAL = tl.constexpr(thread_sums(triton.__version__) == "sequential")


@triton.jit
def sum_front_to_back(x, N: tl.constexpr):
    """[1], the sum of x [N], which every thread holds whole, first element first."""
    if _SEQUENTIAL or N == 2:
        return tl.sum(x, axis=0, keep_dims=True)
    total = tl.zeros([1], dtype=tl.float32)
    for i in tl.static_range(N):  # each step adds one element and zeros
        total += tl.sum(tl.where(tl.arange(0, N) == i, x, 0.0), axis=0, keep_dims=True)
    return total


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in the canonical order: K front to back, one fp32 accumulator, never TF32.

    a: [M, K], b: [K, N], acc: [M, N] fp32. The interpreter's own `tl.dot` multiplies the raw bits of bf16 and
    hands fp32 to a BLAS whose order depends on M, so there the tile product is taken in fp64, where a sum of bf16
    products is exact and has no order.
    """
    if _INTERPRET:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def widen(x, LARGE: tl.constexpr):
    """x, an index or a size, in 64 bits if LARGE: the host found that 32 bits do not hold all of its multiples."""
    if LARGE:
        return tl.cast(x, tl.int64)
    else:  # the compiler reads what follows an `if`, and one function returns one type
        return x


@triton.jit
def fma(a, b, c):
    """a * b + c of fp32 tensors, rounded once. The interpreter's own, before Triton 3.9, rounds the product too."""
    if _INTERPRET:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in `dtype`, rounded to nearest even. Kernels store through it: the interpreter's own fp32 to bf16 truncates."""
    if _INTERPRET:
        if dtype == tl.bfloat16:
            x = x.to(tl.float32)
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # NaN stays NaN
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def exp(x):
    """exp(x) in fp32 with CUDA's own `expf`; `tl.exp` is a faster approximation with other bits."""
    if _INTERPRET:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def div_rn(x, y):
    """x / y correctly rounded, as CUDA's `/`; the plain operator of Triton is an approximation on a GPU."""
    if _INTERPRET:
        return x / y
    return tl.div_rn(x, y)


@triton.jit
def silu_and_mul(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of fp32 tensors. silu is rounded to `dtype`, as in vLLM's CUDA kernel; the product is not yet."""
    return cast(div_rn(gate, 1.0 + exp(-gate)), dtype).to(tl.float32) * up


@triton.jit
def silu_and_mul_backward(g, gate, up):
    """(dgate, dup) in fp32. With s = sigmoid(gate): g * up * (s + gate * s * (1 - s)) and g * gate * s."""
    s = div_rn(1.0, 1.0 + exp(-gate))
    return g * up * (s + gate * s * (1.0 - s)), g * (gate * s)
