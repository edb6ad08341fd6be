"""The table of the aten operators that bi_ops serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
OpOverload = torch._ops.OpOverload
aten = torch.ops.aten

#: Operator to the function that serves it, which has the operator's arguments.
SERVED: dict[OpOverload, Callable[..., Any]] = {}


def overload(name: str) -> OpOverload | None:
    """``"mm"``, ``"sum.dim_IntList"`` as an operator; None where this torch has none of that name."""
    base, _, which = name.partition(".")
    return getattr(getattr(aten, base, None), which or "default", None)


def serves(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for the operators of these names."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            op = overload(name)
            if op is not None:
                SERVED[op] = fn
        return fn

    return register


def serves_writing(*names: str) -> None:
    """Register the in-place (``"addmm_"``) or out (``"mm.out"``) forms of operators that are served already."""
    for name in names:
        served, op = SERVED[overload(name.removesuffix(".out").removesuffix("_"))], overload(name)  # type: ignore[index]
        if op is not None:
            SERVED[op] = _writing(served)


def _writing(served: Callable[..., Any]) -> Callable[..., Any]:
    def write(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        result = served(*args, **kwargs)
        if out is None:
            return args[0].copy_(result)
        return out.resize_(result.shape).copy_(result)

    return write
