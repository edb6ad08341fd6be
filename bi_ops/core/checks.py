"""Argument checks. Each raises before any kernel runs and names the operator, what came and the way out."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence

import torch

from bi_ops.core import runtime
from bi_ops.core.main_grad import MainGrad

#: Dtypes that the floating-point kernels accept.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe(t: torch.Tensor) -> str:
    """``bfloat16[4, 8] on cpu``: how a tensor is named in an error."""
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device.type}"


def tensor(op: str, name: str, t: object, *, ndim: int | None = None) -> torch.Tensor:
    """`t` as a tensor of rank `ndim` on the device kernels run on.

    Raises:
        TypeError: `t` is not a tensor, or none of strides.
        ValueError: another rank, or another device.
    """
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has the layout {t.layout}; kernels read strided tensors, so use .to_dense()")
    if ndim is not None and t.ndim != ndim:
        raise ValueError(f"{op}: {name} must have {ndim} dimensions, got {describe(t)}")
    if not (t.is_cpu if runtime.INTERPRET else t.is_cuda) and not t.is_meta:
        hint = (
            "kernels run in Triton's interpreter here, so move it with .cpu()"
            if runtime.INTERPRET
            else "move it with .cuda(), or set TRITON_INTERPRET=1 to run on the CPU"
        )
        raise ValueError(f"{op}: {name} is {describe(t)}; {hint}")
    return t


def dtype(op: str, name: str, t: torch.Tensor, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """Raise TypeError unless `t.dtype` is one of `allowed`."""
    if t.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(allowed))
        raise TypeError(f"{op}: {name} is {describe(t)}; supported dtypes are {names}. Cast it with .to(...)")


def result_dtype(op: str, dtype: object, allowed: Sequence[torch.dtype] = FLOAT_DTYPES) -> torch.dtype:
    """`dtype`, which a result is asked in. Raises TypeError unless it is one of `allowed`."""
    if not isinstance(dtype, torch.dtype) or dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: dtype is {str(dtype).removeprefix('torch.')}; supported dtypes are {names}")
    return dtype


def integer(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a whole number, ValueError unless int64 holds it."""
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: {name} must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:  # type: ignore[operator]
        raise ValueError(f"{op}: {name} must fit int64, got {value}")


def size(op: str, name: str, value: object, least: int = 1) -> None:
    """Raise TypeError unless `value` is a whole number, ValueError unless it is `least` or more."""
    integer(op, name, value)
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def real(op: str, name: str, value: object) -> float:
    """`value` as a float. Raises TypeError unless it is a real number, ValueError if it is too large for a float."""
    if type(value) is not float:
        if isinstance(value, torch.SymFloat):
            return value  # type: ignore[return-value]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
        try:
            value = float(value)
        except OverflowError as e:
            raise ValueError(f"{op}: {name} is too large for a float") from e
    return value


def device(op: str, value: object) -> None:
    """Raise TypeError unless `value` is a torch.device."""
    if not isinstance(value, torch.device):
        raise TypeError(f"{op}: device must be a torch.device, got {value!r}")


def backend_name(op: str, value: object) -> None:
    """Raise TypeError unless `value` can name a backend; whether there is one is for `Backends.get` to say."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{op}: backend must be a name or None, got {value!r}")


def boolean(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def same_dtype(op: str, **tensors: torch.Tensor) -> None:
    """Raise TypeError unless all `tensors` share one dtype."""
    if len({t.dtype for t in tensors.values()}) > 1:
        what = ", ".join(f"{n} {describe(t)}" for n, t in tensors.items())
        raise TypeError(f"{op}: dtypes differ: {what}. Cast them to one dtype")


def same_device(op: str, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless all `tensors` are on one device."""
    if len({t.device for t in tensors.values()}) > 1:
        what = ", ".join(f"{n} on {t.device}" for n, t in tensors.items())
        raise ValueError(f"{op}: tensors are on different devices: {what}")


def shape(op: str, ok: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError(`op`: `message`) unless `ok`. A message that has to be put together is called for."""
    if not ok:
        raise ValueError(f"{op}: {message if isinstance(message, str) else message()}")


def main_grad(op: str, name: str, buffer: object, size: torch.Size, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `buffer` can hold a sum of this size: fp32, contiguous, on `device`."""
    if isinstance(buffer, MainGrad):
        if torch.compiler.is_compiling():
            raise TypeError(
                f"{op}: {name} is a MainGrad, which takes its memory in the backward, where torch.compile does not see "
                "it; give tensors: allocate_main_grads(tensors=True)"
            )
        on, found, is_dense = buffer.device, buffer.shape, True
    else:
        t = tensor(op, name, buffer)
        dtype(op, name, t, (torch.float32,))
        on, found, is_dense = t.device, t.shape, t.is_contiguous()
    shape(op, on == device, lambda: f"{name} is on {on}, what it is summed from on {device}")
    fits = found == size and is_dense
    strides = "" if isinstance(buffer, MainGrad) else f", strides {list(t.stride())}"
    shape(op, fits, lambda: f"{name} must be contiguous {list(size)}, got {list(found)}{strides}")
