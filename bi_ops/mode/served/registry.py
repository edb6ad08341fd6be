"""The tables of the aten operators that bi_ops serves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map

Tensor = torch.Tensor
OpOverload = torch._ops.OpOverload
aten = torch.ops.aten

#: Operator to the function that serves it, which has the operator's arguments. It calls kernels of bi_ops, and of torch
#: what adds nothing: the mode does not see it.
SERVED: dict[OpOverload, Callable[..., Any]] = {}

#: Those of them that take fp64 and complex numbers too.
WIDE: set[OpOverload] = set()

#: Those that take integers too, of which other operators have torch's own results.
INTEGERS: set[OpOverload] = set()

#: Operator to a function that is put together from other operators of torch. Each of them is seen by the mode.
COMPOSED: dict[OpOverload, Callable[..., Any]] = {}


def names(text: str) -> frozenset[str]:
    """The words of a table."""
    return frozenset(text.split())


def overload(name: str) -> OpOverload | None:
    """``"mm"``, ``"sum.dim_IntList"`` as an operator; None where this torch has none of that name."""
    base, _, which = name.partition(".")
    return getattr(getattr(aten, base, None), which or "default", None)


def _register(table: dict[OpOverload, Callable[..., Any]], which: tuple[str, ...]) -> Callable[..., Any]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in which:
            op = overload(name)
            if op is not None:
                table[op] = fn
        return fn

    return register


def serves(
    *which: str, wide: bool = False, integers: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for the operators of these names in `SERVED`; wide: and in `WIDE`; integers: `INTEGERS`."""
    for also, table in ((wide, WIDE), (integers, INTEGERS)):
        if also:
            table.update(op for op in map(overload, which) if op is not None)
    return _register(SERVED, which)


def composes(*which: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for the operators of these names in `COMPOSED`."""
    return _register(COMPOSED, which)


def ask_torch(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call torch's own `op` on copies, for its error if it has one."""

    def copy(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    op(*tree_map(copy, args), **tree_map(copy, kwargs))


def refuse(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> NoReturn:
    """Raise the error that torch's own `op` has for these arguments; `error` where it takes them."""
    try:
        ask_torch(op, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as torchs:
        raise torchs from error
    raise error


def _inputs(op: OpOverload) -> list[tuple[str, str]]:
    """Name and type of the arguments that `op` reads."""
    return [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]


@functools.cache
def functional_form(op: OpOverload) -> OpOverload | None:
    """The operator whose result `op` writes: aten::mm of aten::mm.out, aten::cumsum of aten::cumsum_."""
    if not op._schema.is_mutable or op.namespace != "aten":
        return None
    name = op._schema.name.removeprefix("aten::")
    into_self = not any(a.is_out for a in op._schema.arguments)
    packet = getattr(aten, name.removesuffix("_") if into_self else name, None)
    forms = [] if packet is None else [getattr(packet, o) for o in packet.overloads()]
    return next((f for f in forms if not f._schema.is_mutable and _inputs(f) == _inputs(op)), None)


def write(op: OpOverload, results: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Store the `results` of `functional_form(op)` where `op` stores them, and return what `op` returns.

    Raises:
        RuntimeError: `out` has a dtype that torch does not write the result to. ValueError: the tensor that is written
            in place has another shape.
    """
    outs = [kwargs[a.name] for a in op._schema.arguments if a.is_out] or [args[0]]
    results = [results] if isinstance(results, Tensor) else list(results)
    for out, result in zip(outs, results, strict=True):
        if out.dtype != result.dtype:
            ask_torch(op, args, kwargs)
        if out.shape != result.shape:
            if args and out is args[0]:
                raise ValueError(f"{op._schema.name}: {list(result.shape)} does not fit into {list(out.shape)}")
            out.resize_(result.shape)
        out.copy_(result)
    return outs[0] if len(outs) == 1 else tuple(outs)
