"""Structs of kernel values: what a partition is given, by name."""

from __future__ import annotations

import typing
from collections.abc import Callable

from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate, base_value

#: A scalar of a kernel: known when it runs, or when it is compiled.
Scalar = gl.tensor | gl.constexpr


if typing.TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform() -> Callable[[Callable], Callable]:
        return lambda decorator: decorator


@dataclass_transform()
def aggregate(cls: type) -> type:
    """A class whose annotations name its fields and their types, as a struct that kernels make, pass and read.

    Triton's `_aggregate` with the constructor that its releases from 3.7 on write themselves. Values reach a partition
    in the order of the fields.
    """
    cls.__annotations__ = typing.get_type_hints(cls)
    names = tuple(cls.__annotations__)

    def init(self: object, *values: object) -> None:
        if len(values) != len(names):
            raise TypeError(f"{cls.__name__} has {len(names)} fields, {len(values)} values were given")
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))

    init.__triton_builtin__ = True  # type: ignore[attr-defined]  # not a function to be compiled
    cls.__init__ = init  # type: ignore[misc]
    made = _aggregate(cls)
    made.field_names = names
    return made
