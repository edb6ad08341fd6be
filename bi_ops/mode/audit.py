"""`audit`: which operators of ordinary PyTorch code run outside the contract, and on which line."""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bi_ops.core import checks, runtime
from bi_ops.mode import allowlist, collectives
from bi_ops.mode.errors import unsupported
from bi_ops.mode.served import COMPOSED, INTEGERS, SERVED, decomposition, functional_form
from bi_ops.mode.switch import is_batch_invariant_backward_mode_enabled

Tensor = torch.Tensor
OpOverload = torch._ops.OpOverload

_ROOTS = tuple(str(Path(m.__file__).parent) for m in (torch, sys.modules["bi_ops"]) if m.__file__)

#: What is inside functions that the mode replaces whole.
_INSIDE_FUNCTIONS = ("aten::_scaled_dot_product",)


class OutsideTheContract(RuntimeError):
    """What `audit(strict=True)` raises."""


@dataclass(frozen=True)
class Stray:
    """An operator outside the contract, and where it was called.

    operator: torch's name. where: "file:line" of the user's code; of a backward, of the forward that it belongs to.
    code: that line. backward: it belongs to a gradient. served: the mode would compute it under the contract.
    tensors: dtypes and shapes of the first call. calls: how many.
    """

    operator: str
    where: str
    code: str
    backward: bool
    served: bool
    tensors: str
    calls: int = 1

    def __str__(self) -> str:
        hint = "the mode serves it" if self.served else "the mode refuses it"
        part = "backward of " if self.backward else ""
        times = f", {self.calls} calls" if self.calls > 1 else ""
        return f"{self.operator} on {self.tensors} ({part}{self.where}: {self.code}){times}: {hint}"


@dataclass
class Audit:
    """What was found so far. strays: in the order of their first calls."""

    strays: list[Stray] = field(default_factory=list)

    @property
    def refused(self) -> list[Stray]:
        """Those that the mode does not serve."""
        return [s for s in self.strays if not s.served]

    def __str__(self) -> str:
        if not self.strays:
            return "every operator keeps the contract"
        return "\n".join([f"{len(self.strays)} operators outside the contract:", *(f"  {s}" for s in self.strays)])


def keeps(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call keeps the contract as torch computes it: by the mode's allowlist, or because it adds no floats."""
    if allowlist.always_allowed(op) or op._schema.name in allowlist.trusted_operators:
        return True
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if collectives.is_collective(op):
        try:
            collectives.check(op, args, tensors)
        except NotImplementedError:
            return False
        return True
    here = [t for t in tensors if t.device.type == runtime.device_type()]
    wanted = kwargs.get("dtype")
    to_float = bool(here) and isinstance(wanted, torch.dtype) and (wanted.is_floating_point or wanted.is_complex)
    inexact = to_float or any(t.is_floating_point() or t.is_complex() for t in here)
    return not inexact and (functional_form(op) or op) not in INTEGERS


def served(op: OpOverload) -> bool:
    """Whether the mode computes `op` under the contract, or the function of torch that it comes from."""
    if op._schema.name.startswith(_INSIDE_FUNCTIONS):
        return True
    form = functional_form(op)
    found = [o for o in (op, form) if o is not None]
    return any(o in SERVED or o in COMPOSED or decomposition(o) is not None for o in found)


def user_line() -> tuple[str, str]:
    """("file:line", the code) of the innermost frame outside torch and bi_ops."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_ROOTS, "<")):
            return f"{name}:{frame.f_lineno}", linecache.getline(name, frame.f_lineno).strip()
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown", ""


class _Watch(TorchDispatchMode):
    """Sees every operator below autograd, and remembers on which line the node of its gradient was made."""

    def __init__(self, audit: Audit, strict: bool) -> None:
        super().__init__()
        self._audit, self._strict = audit, strict
        self._lines: dict[int, tuple[str, str]] = {}  # a node's sequence number to a line
        self._last = -1  # the newest node that has one
        self._places: dict[tuple[str, str, bool], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t.__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in types):
            return NotImplemented  # a tensor subclass unwraps itself first
        node = torch._C._current_autograd_node()
        if node is None:
            self._remember_line(func)
        if not is_batch_invariant_backward_mode_enabled() and not keeps(func, args, kwargs):
            if func not in SERVED and func not in COMPOSED and func._can_decompose():
                with self:
                    return func.decompose(*args, **kwargs)
            self._found(func, args, kwargs, node)
        return func(*args, **kwargs)

    def _remember_line(self, op: OpOverload) -> None:
        """Of the nodes that were made since the last operator.

        The first operator after a node was made is the node's own; later ones have no gradient. Nodes between are those
        of an operator in place: its own, where it saves a clone of what it overwrites, else those that are made after
        it ran, when it wrote to a view.
        """
        newest, line = torch.autograd._get_sequence_nr() - 1, user_line()
        between = line if op is torch.ops.aten.clone.default else self._lines.get(self._last, line)
        for node in range(self._last + 1, newest):
            self._lines[node] = between
        self._lines.setdefault(newest, line)
        self._last = newest

    def _found(self, op: OpOverload, args: Any, kwargs: Any, node: Any) -> None:
        line = user_line() if node is None else self._lines.get(node._sequence_nr(), None) or user_line()
        name, key = op._schema.name, (op._schema.name, line[0], node is not None)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self._strict:
            what = f"is outside the contract ({'backward of ' if node else ''}{line[0]}: {line[1]})"
            text = str(unsupported(name, tensors, what)).removeprefix("batch-invariant mode: ")
            raise OutsideTheContract(f"audit: {text}")
        at, strays = self._places.get(key), self._audit.strays
        if at is None:
            self._places[key] = len(strays)
            shapes = ", ".join(checks.describe(t) for t in tensors)
            strays.append(Stray(name, *line, node is not None, served(op), shapes))
        else:
            strays[at] = replace(strays[at], calls=strays[at].calls + 1)


@contextlib.contextmanager
def audit(strict: bool = False) -> Iterator[Audit]:
    """List every operator that runs outside the contract inside the block, forward and backward.

    Nothing is changed: torch's operators run as they are. What bi_ops computes, what cannot depend on the batch, and
    what runs under `batch_invariant_backward_mode` is inside. Call `backward` in the block to have it listed; its
    operators are told with the line of the forward. Under torch.compile, functions run eagerly here.

    Args:
        strict: raise at the first one instead.

    Returns:
        (of the context manager) an `Audit`, which fills while the block runs.

    Raises:
        TypeError: strict is no bool. OutsideTheContract: with `strict`, naming the operator, the shapes, the line and
        the way out.
    """
    checks.boolean("audit", "strict", strict)
    found = Audit()
    with _Watch(found, strict):
        yield found
