"""The mode of the dispatcher: every aten operator below autograd, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bi_ops.core import runtime
from bi_ops.mode import allowlist, collectives
from bi_ops.mode.errors import unsupported
from bi_ops.mode.served import (
    COMPOSED,
    INTEGERS,
    SERVED,
    WIDE,
    check_arguments,
    decomposition,
    functional_form,
    on_meta,
    refuse,
    strided_as,
    write,
)
from bi_ops.mode.torch_bmm import BMM

Tensor = torch.Tensor
OpOverload = torch._ops.OpOverload


def call(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], mode: AbstractContextManager[Any]) -> Any:
    """`op` under the contract.

    Args:
        op, args, kwargs: what the dispatcher was about to run. mode: runs the parts of composite operators under the
            contract too.

    Raises:
        NotImplementedError: an operator that no rule covers. TypeError, ValueError: from the operator that serves it.
    """
    if allowlist.always_allowed(op) or op._schema.name in allowlist.trusted_operators:
        return op(*args, **kwargs)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if collectives.is_collective(op):
        collectives.check(op, args, tensors)
        return op(*args, **kwargs)
    here = [t for t in tensors if t.device.type == runtime.device_type()]
    wanted = kwargs.get("dtype")
    inexact = any(t.is_floating_point() or t.is_complex() for t in here)
    to_float = bool(here) and isinstance(wanted, torch.dtype) and (wanted.is_floating_point or wanted.is_complex)
    exact = not inexact and not to_float  # integers add up to the same in any order
    if exact and (functional_form(op) or op) not in INTEGERS:
        return op(*args, **kwargs)
    check_arguments(op, args, kwargs)
    if op in SERVED:
        if op not in WIDE and (
            any(t.dtype == torch.float64 or t.is_complex() for t in here) or wanted == torch.float64
        ):
            raise unsupported(op._schema.name, tensors, "is not served in fp64 or complex numbers")
        with torch._C.DisableTorchFunction():
            return SERVED[op](*args, **kwargs)
    parts = COMPOSED.get(op) or decomposition(op)
    if parts is not None:
        expected = on_meta(op, args, kwargs)
        with torch._C.DisableTorchFunction(), torch.no_grad(), mode:
            return strided_as(parts(*args, **kwargs), expected)
    form = functional_form(op)
    if form is not None:
        outs = [a.name for a in op._schema.arguments if a.is_out]
        inputs = {k: v for k, v in kwargs.items() if k not in outs}
        if outs and any(a.name == "dtype" for a in form._schema.arguments):
            inputs.setdefault("dtype", kwargs[outs[0]].dtype)
        return write(op, call(form, args, inputs, mode), args, kwargs)
    if op._can_decompose():
        if torch.is_grad_enabled() and any(t.requires_grad for t in here):
            # Autograd takes composite operators apart. One that arrives whole was replaced and lost its gradient.
            raise unsupported(op._schema.name, tensors, "was replaced by a kernel without a gradient")
        with mode:
            return op.decompose(*args, **kwargs)
    raise unsupported(op._schema.name, tensors)


class DispatchMode(TorchDispatchMode):
    """Sends every aten operator through `call`."""

    def __init__(self) -> None:
        super().__init__()
        self.suspended = 0

    @contextlib.contextmanager
    def suspend(self) -> Iterator[None]:
        """Torch's own operators inside the block."""
        self.suspended += 1
        try:
            yield
        finally:
            self.suspended -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.suspended:
            return func(*args, **kwargs)
        if any(t.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for t in types):
            return NotImplemented  # a tensor subclass unwraps itself first; its parts come back here
        if torch.bmm is not BMM.own:
            BMM.restore()
        try:
            return call(func, args, kwargs, self)
        except (TypeError, ValueError, IndexError) as error:
            refuse(func, args, kwargs, error)
