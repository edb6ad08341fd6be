"""Calls with one argument made wrong, systematically: of tensors, of numbers, and of what is left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Args = dict[str, Any]

#: What a malformed call may raise. Anything else is a crash.
ERRORS = (TypeError, ValueError, IndexError, RuntimeError, OSError)


@dataclass(frozen=True)
class Target:
    """A public function and a valid call of it.

    names: what its errors may begin with, or hold with brackets behind. args: made anew for every call. reference:
    what a valid call gives in plain torch, of the same arguments, as a tensor or several; None: no tensors. torchs:
    arguments of which torch, or what is called, judges, and names itself. counts: arguments of which a huge one is
    legal, and takes as long.
    """

    names: tuple[str, ...]
    call: Callable[..., Any]
    args: Callable[[], Args]
    reference: Callable[..., Any] | None = None
    torchs: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    def names_itself(self, message: str) -> bool:
        return any(message.startswith((f"{n}:", f"{n} ")) or f"{n}()" in message for n in self.names)


DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)


def of_a_tensor(t: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """What may stand where `t` stood, right or wrong."""
    for value in (None, 3, "text", [[1.0]], object()):
        yield f"{type(value).__name__} for a tensor", value
    for dtype in DTYPES:
        if dtype != t.dtype:
            yield f"dtype {dtype}", t.to(dtype)
    yield "one axis more", t[None]
    yield "one axis more at the end", t[..., None]
    yield "flattened", t.reshape(-1)
    yield "a scalar", t.reshape(-1)[0]
    for axis in range(t.ndim):
        yield f"axis {axis} longer", torch.cat((t, t.narrow(axis, 0, 1)), axis)
        yield f"axis {axis} shorter", t.narrow(axis, 0, t.shape[axis] - 1)
        yield f"axis {axis} empty", t.narrow(axis, 0, 0)
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()
    yield "transposed", t.mT if t.ndim > 1 else t.flip(0)
    yield "not contiguous", torch.stack((t, t), -1)[..., 0]
    yield "expanded", t.reshape(-1)[:1].as_strided(t.shape, [0] * t.ndim)
    if t.is_floating_point():
        yield "needs a gradient", t.clone().requires_grad_()
        yield "NaN", torch.full_like(t, math.nan)
    else:
        yield "negative", t - 100
        yield "huge", t + 2**30


SCALARS: tuple[Any, ...] = (
    *("text", None, [], {}, math.nan, math.inf, -1, 0, 1, 2**40, 2**70, 1.5, True, 1j, torch.float64, torch.bfloat16),
    *(torch.ones(2), (1,), (1, 2, 3), ("a", "b"), (-2, 0), object),
)


def of_a_scalar(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand where a number, a dtype, a name or another plain value stood."""
    for other in SCALARS:
        if repr(other) != repr(value):
            yield repr(other), other


def calls(target: Target) -> Iterator[tuple[str, str, Args]]:
    """(what is wrong, the argument, all arguments) of every call with one argument changed, left out or unknown."""
    for name, value in target.args().items():
        made = of_a_tensor(value) if isinstance(value, torch.Tensor) else of_a_scalar(value)
        for what, other in made:
            if name in target.counts and isinstance(other, int) and other > 100:
                continue
            yield f"{target.names[0]}({name}: {what})", name, target.args() | {name: other}
        left_out = target.args()
        del left_out[name]
        yield f"{target.names[0]}(no {name})", name, left_out
    yield f"{target.names[0]}(an unknown argument)", "", target.args() | {"unknown": 1}
