"""GEMMs below autograd: what einsum, autograd's formulas and other C++ of torch call.

`torch.mm`, `torch.addmm`, `torch.matmul` and `F.linear` themselves are replaced earlier, with their gradients
(`bi_ops.mode.functions`).
"""

from __future__ import annotations

from bi_ops import matmul
from bi_ops.core import checks
from bi_ops.mode.served.registry import Tensor, composes, serves


@serves("mm")
def _mm(a: Tensor, b: Tensor) -> Tensor:
    checks.same_dtype("aten::mm", a=a, b=b)
    return matmul.mm(a, b)


@serves("bmm")
def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return matmul.bmm(a, b)


@serves("mv")
def _mv(a: Tensor, v: Tensor) -> Tensor:
    return _mm(a, v[:, None])[:, 0]


@serves("dot", "vdot")
def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _mm(a[None], b[:, None])[0, 0]


def _plus(bias: Tensor, ab: Tensor, beta: float, alpha: float) -> Tensor:
    """beta * bias + alpha * ab, the GEMM `ab` already rounded, as in `bi_ops.matmul.addmm`."""
    out = ab if alpha == 1 else ab * alpha
    if beta == 0:
        return out
    return out + (bias if beta == 1 else bias * beta).to(out.dtype)


@serves("addmm")
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if bias.shape in ((b.shape[1],), (a.shape[0], b.shape[1])):
        return matmul.addmm(bias, a, b, beta=beta, alpha=alpha)
    return _plus(bias, _mm(a, b), beta, alpha)


@serves("addmv")
def _addmv(bias: Tensor, a: Tensor, v: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, _mv(a, v), beta, alpha)


@serves("baddbmm")
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _plus(bias, _bmm(a, b), beta, alpha)


@composes("addbmm")
def _addbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The GEMMs of the batch added up are one GEMM along batch and K."""
    return bias.addmm(a.transpose(0, 1).flatten(1), b.flatten(0, 1), beta=beta, alpha=alpha)
