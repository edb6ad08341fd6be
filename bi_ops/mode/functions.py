"""Functions of torch that are replaced before the dispatcher sees them.

Torch takes them apart or chooses a backend for them early, or their gradients cannot be told from other operators below
autograd. The replacements bring the library's own gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bi_ops import matmul, norm
from bi_ops.core import dtypes, runtime
from bi_ops.core.checks import FLOAT_DTYPES
from bi_ops.core.operators import is_plain
from bi_ops.core.transforms import is_transformed
from bi_ops.mode.attention import scaled_dot_product_attention
from bi_ops.mode.served import scans

Tensor = torch.Tensor
aten = torch.ops.aten


def rms_norm_eps(eps: float | None) -> float:
    """`eps` as torch takes it."""
    return torch.finfo(torch.float32).eps if eps is None else eps  # torch's default, that of what it computes in


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm` through `bi_ops.norm.rms_norm`."""
    x, n_dims = input, len(normalized_shape)
    if n_dims == 0 or tuple(x.shape[-n_dims:]) != tuple(normalized_shape):
        raise ValueError(f"rms_norm: normalized_shape {list(normalized_shape)} does not fit x {list(x.shape)}")
    if weight is not None and tuple(weight.shape) != tuple(normalized_shape):
        raise ValueError(f"rms_norm: weight {list(weight.shape)} for normalized_shape {list(normalized_shape)}")
    x, weight = dtypes.widened("aten::rms_norm", x, weight)
    if weight is not None:
        weight = dtypes.norm_weight(x, weight).reshape(-1)
    return norm.rms_norm(x.flatten(-n_dims), weight, rms_norm_eps(eps)).reshape(x.shape)


# --------------------------------------------------------------------------------------------------------------
# softmax: aten's own operators below, whose forward and backward are served. `F.softmax` gets there only through
# aten::softmax, which vLLM replaces by one without a derivative, and which reads a 16-bit x as fp32 where fp32 is asked
# for, in another order than `bi_ops.logprob.softmax(x, torch.float32)`.


def _softmax(op: Callable[..., Tensor], x: Tensor, dim: int | None, dtype: torch.dtype | None) -> Tensor:
    if dim is None:
        dim = 0 if x.dim() in (0, 1, 3) else 1  # torch.nn.functional's own rule
    if dtype is None and x.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.float32  # as autocast does, on a GPU alone
    widened = dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    return op(x if dtype is None or widened else x.to(dtype), dim, widened)


def softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """`torch.softmax` and its kin."""
    return NotImplemented if options else _softmax(aten._softmax.default, input, dim, dtype)


def log_softmax(input: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """`torch.log_softmax` and its kin."""
    return NotImplemented if options else _softmax(aten._log_softmax.default, input, dim, dtype)


def functional_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.softmax`."""
    return _softmax(aten._softmax.default, input, dim, dtype)


def functional_log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.log_softmax`."""
    return _softmax(aten._log_softmax.default, input, dim, dtype)


# --------------------------------------------------------------------------------------------------------------
# GEMMs: the operators of `bi_ops.matmul` with their own gradients. Below autograd an aten::mm does not know that it is
# a weight gradient, nor an aten::sum that it is that of a bias.


def _operands(*tensors: Tensor) -> tuple[Tensor, ...] | None:
    """The tensors as `bi_ops.matmul` takes them, cast as autocast would; None where they are the dispatcher's."""
    kind = runtime.device_type()
    plain = all(is_plain(t) and t.device.type == kind and t.is_floating_point() for t in tensors)
    if not plain or is_transformed():
        return None
    tensors = dtypes.lowered(*tensors)
    found = {t.dtype for t in tensors}
    return tensors if len(found) == 1 and found.issubset(FLOAT_DTYPES) else None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` through `bi_ops.matmul.linear`."""
    given = _operands(input, weight, *([] if bias is None else [bias]))
    if given is None or input.ndim == 0 or weight.ndim != 2:
        return NotImplemented
    if bias is not None and bias.shape != weight.shape[:1]:
        return NotImplemented
    return matmul.linear(*given)


def mm(input: Tensor, mat2: Tensor, **options: Any) -> Tensor:
    """`torch.mm` through `bi_ops.matmul.mm`."""
    given = None if options else _operands(input, mat2)
    return NotImplemented if given is None else matmul.mm(*given)


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *deprecated: Any, beta: float = 1, alpha: float = 1, **options: Any
) -> Tensor:
    """`torch.addmm` through `bi_ops.matmul.addmm`, where its bias is [N] or [M, N]."""
    given = None if deprecated or options else _operands(input, mat1, mat2)
    if given is None or mat1.ndim != 2 or mat2.ndim != 2:
        return NotImplemented
    shape = mat1.shape[0], mat2.shape[1]
    return matmul.addmm(*given, beta=beta, alpha=alpha) if input.shape in (shape[1:], shape) else NotImplemented


def torch_matmul(input: Tensor, other: Tensor, **options: Any) -> Tensor:
    """`torch.matmul` and ``@`` through `bi_ops.matmul.matmul`."""
    given = None if options else _operands(input, other)
    return NotImplemented if given is None or input.ndim == 0 or other.ndim == 0 else matmul.matmul(*given)


def multi_dot(tensors: Sequence[Tensor], **options: Any) -> Tensor:
    """`torch.linalg.multi_dot` from left to right: torch chooses the order by all sizes, that of the batch included."""
    if options or len(tensors) < 3:  # two have one order; fewer are torch's error
        return NotImplemented
    bad = next((t for t in tensors[1:-1] if t.ndim != 2), None)
    if bad is not None or not all(t.ndim in (1, 2) for t in tensors):
        raise ValueError("multi_dot: needs matrices, of which the first and the last may be vectors")
    return functools.reduce(torch.matmul, tensors)


def chain_matmul(*matrices: Tensor, **options: Any) -> Tensor:
    """`torch.chain_matmul`, as `multi_dot`."""
    return multi_dot(matrices, **options)


def einsum(*args: Any) -> Tensor:
    """`torch.einsum` from left to right: with opt_einsum installed torch chooses the order by all sizes."""
    if len(args) <= 3 and not isinstance(args[-1], (list, tuple)):
        return NotImplemented
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum(*args)


# --------------------------------------------------------------------------------------------------------------
# products: torch's gradient takes one formula or another by whether any element of any row is zero. That of a product
# by halving is a product too.


def prod(
    input: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None, **options: Any
) -> Tensor:
    """`torch.prod`."""
    if options or not isinstance(dim, int | None):
        return NotImplemented
    return scans.prod(input, dtype=dtype) if dim is None else scans.prod_dim(input, dim, keepdim, dtype=dtype)


def cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """`torch.cumprod`."""
    return NotImplemented if options or not isinstance(dim, int) else scans.cumprod(input, dim, dtype=dtype)


#: What replaces a function of torch where its first tensor is a floating-point one on the kernels' device. The
#: replacement has the function's arguments, and returns NotImplemented for what is left to the dispatcher.
FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.softmax: functional_softmax,
    torch.softmax: softmax,
    torch.special.softmax: softmax,
    torch.Tensor.softmax: softmax,
    F.log_softmax: functional_log_softmax,
    torch.log_softmax: log_softmax,
    torch.special.log_softmax: log_softmax,
    torch.Tensor.log_softmax: log_softmax,
    F.linear: linear,
    torch.mm: mm,
    torch.Tensor.mm: mm,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
    torch.matmul: torch_matmul,
    torch.Tensor.matmul: torch_matmul,
    torch.linalg.matmul: torch_matmul,
    torch.linalg.multi_dot: multi_dot,
    torch.chain_matmul: chain_matmul,
    torch.einsum: einsum,
    torch.prod: prod,
    torch.Tensor.prod: prod,
    torch.cumprod: cumprod,
    torch.Tensor.cumprod: cumprod,
}


def replaced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What replaces this call of torch; NotImplemented if nothing does."""
    replacement = FUNCTIONS.get(func)
    if replacement is None:
        return NotImplemented
    first = args[0] if args else kwargs.get("input", kwargs.get("query", kwargs.get("tensors")))
    first = args[1] if isinstance(first, str) and len(args) > 1 else first  # of einsum
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    if not (isinstance(first, Tensor) and first.device.type == runtime.device_type() and first.is_floating_point()):
        return NotImplemented
    return replacement(*args, **kwargs)
