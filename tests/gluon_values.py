"""What the kernels of `gluon_model` compute with: threads that wait for one another, values, memory and barriers.

Scalars and indices are real, other tensors have shapes alone.
"""

# mypy: disable-error-code="arg-type, attr-defined, call-overload"
from __future__ import annotations

import collections
import operator
import threading
import types
from typing import Any

import numpy as np

INT32 = 2**31


class Failure(Exception):
    """A kernel does what it must not."""


class State(threading.local):
    """Of a thread: its program, its name and warps, whether it has waited for the kernels before, products it has in
    flight, and tiles that its copies read."""

    program: int | None = 0
    programs, name, warps, allocated, waited = 1, "", 4, 0, False

    def __init__(self):
        self.groups, self.leaving = [], []


here = State()
lock = threading.Condition()
machine = types.SimpleNamespace()


def fail(message):
    with lock:
        machine.failed = machine.failed or message
        lock.notify_all()
    raise Failure(message)


def until(holds, what):
    """Wait; the last thread that could change anything does not, but names those that wait."""
    with lock:
        if machine.copies and machine.random.random() < 0.3:
            arrive()
        me = threading.get_ident()
        while not holds():
            if machine.failed:
                raise Failure(machine.failed)
            if machine.copies:
                arrive()
                continue
            machine.waiting[me] = holds, f"{here.name}: {what}"
            if len(machine.waiting) == machine.alive and not any(h() for h, _ in machine.waiting.values()):
                fail("deadlock: " + "; ".join(w for _, w in machine.waiting.values()))
            lock.wait(5)
        machine.waiting.pop(me, None)


def arrive():
    """One of the copies under way is there."""
    barrier, size, tile = machine.copies.pop(machine.random.randrange(len(machine.copies)))
    tile.root.coming[tile.slot] -= 1
    barrier.count(0, -size)


# --------------------------------------------------------------------------------------------------------------
# values


def _div(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


OPERATORS = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "xor")},
    **{"rshift": operator.rshift, "and": operator.and_, "or": operator.or_, "truediv": operator.truediv},
    **{"floordiv": _div, "mod": lambda a, b: a - _div(a, b) * b},  # as in C
}


class Index(int):
    """A scalar of 32 bits, but where it was made wider."""

    wide = False

    def to(self, dtype):
        made = Index(self)
        made.wide = made.wide or dtype == "int64"
        return made


def _scalar(f, turned):
    def apply(self, other):
        if not isinstance(other, int):
            return NotImplemented
        a, b = (int(other), int(self)) if turned else (int(self), int(other))
        value = f(a, b)
        made = Index(value)
        made.wide = self.wide or getattr(other, "wide", False)
        if not made.wide and not -INT32 <= value < INT32:
            fail(f"{here.name}: {value} of {a} and {b} has no room in 32 bits")
        return made

    return apply


class Tensor:
    """Indices in `value`, or None: numbers that are not computed."""

    def __init__(self, shape, value=None, layout=None):
        self.shape, self.value = tuple(int(n) for n in shape), value
        self.type = types.SimpleNamespace(layout=layout or Layout())

    def like(self, shape, value=None):
        return Tensor(shape, value, self.type.layout)

    def to(self, dtype):
        return self

    def __getitem__(self, at):
        there = np.broadcast_to(0, self.shape)[at] if self.value is None else self.value[at]
        return self.like(there.shape, None if self.value is None else there)

    def reshape(self, shape):
        assert np.prod(shape) == np.prod(self.shape)
        return self.like(shape)

    def permute(self, order):
        return self.like([self.shape[i] for i in order])

    def apply(self, f, other):
        if isinstance(other, Tensor):
            shape, value = np.broadcast_shapes(self.shape, other.shape), other.value
        else:
            shape, value = self.shape, int(other) if isinstance(other, int) else None
        known = self.value is not None and value is not None
        return self.like(shape, f(self.value, value) if known else None)

    def __neg__(self):
        return self


def _tensor(f, turned):
    return lambda self, other: (
        NotImplemented if isinstance(other, Pointer) else self.apply((lambda a, b: f(b, a)) if turned else f, other)
    )


for _name, _f in OPERATORS.items():
    _numpy = {"floordiv": lambda a, b: np.trunc(a / b).astype(np.int64), "mod": np.fmod}.get(_name, _f)
    for _prefix in ("", "r") if _name not in ("lt", "le", "gt", "ge", "eq", "ne") else ("",):
        setattr(Index, f"__{_prefix}{_name}__", _scalar(_f, _prefix == "r"))
        setattr(Tensor, f"__{_prefix}{_name}__", _tensor(_numpy, _prefix == "r"))
setattr(Index, "__hash__", int.__hash__)  # noqa: B010 (after __eq__)
setattr(Index, "__neg__", lambda self: 0 - self)  # noqa: B010


class Pointer:
    """Into global memory: a list of numbers, or how often each element of an output was written."""

    dtype = types.SimpleNamespace(element_ty="bfloat16")

    def __init__(self, memory, at=0, shared=False):
        """shared: with the kernels before, so that it may be touched after the wait for them alone."""
        self.memory, self.at, self.shared = memory, at, shared

    def __add__(self, other):
        if isinstance(other, Tensor) or isinstance(self.at, Tensor):
            at = self.at if isinstance(self.at, Tensor) else Tensor((), np.int64(self.at))
            return Pointer(self.memory, at + other, self.shared)
        return Pointer(self.memory, int(self.at) + int(other), self.shared)

    def __getitem__(self, at):
        return Pointer(self.memory, self.at[at], self.shared)


class Layout:
    def __init__(self, *args):
        self.parent = next((a for a in args if isinstance(a, Layout)), None)


class Barrier:
    def __init__(self, n):
        self.n = self.left = n
        self.missing = self.phase = 0
        self.used = False

    def count(self, arrivals, size):
        with lock:
            self.used = True
            self.left -= arrivals
            self.missing += size
            if self.left < 0:
                fail(f"{here.name}: more arrivals than {self.n}")
            if self.left == self.missing == 0:
                self.phase, self.left = self.phase + 1, self.n
            lock.notify_all()


class Shared:
    """Tiles or barriers in shared memory. What has come is known of a whole tile, a `slot`; what is read, of its rows.

    rows: from and to; None: all. axis: the dimension that counts them.
    """

    def __init__(self, dtype, shape, layout, root=None, slot=0, whole=True, rows=None, axis=0):
        self.dtype, self.shape, self.layout, self.slot = dtype, tuple(int(n) for n in shape), layout, slot
        self.root, self.whole, self.rows, self.axis = root or self, whole, rows, axis
        if root is None:
            self.barriers = {}
            self.coming: collections.Counter[Any] = collections.Counter()
            self.readers: collections.defaultdict[Any, list[Any]] = collections.defaultdict(list)
            self.writers: collections.defaultdict[Any, list[Any]] = collections.defaultdict(list)
            here.allocated += 1
            with lock:
                machine.shared[here.allocated].append(self)

    type = property(lambda self: self)
    barrier = property(lambda self: self.root.barriers[self.slot])

    def view(self, shape, slot=None, whole=None, rows=None, axis=None):
        slot, whole = self.slot if slot is None else int(slot), self.whole if whole is None else whole
        return Shared(self.dtype, shape, self.layout, self.root, slot, whole, rows, axis)

    def index(self, i):
        if not 0 <= i < self.shape[0]:
            fail(f"{here.name}: {i} of {self.shape}")
        return self.view(self.shape[1:], i if self.whole else None, axis=0 if self.whole else None)  # or a part of it

    def slice(self, start, size, dim=0):
        if not 0 <= start <= start + size <= self.shape[dim]:
            fail(f"{here.name}: {start} to {start + size} of {self.shape}")
        rows = self.rows
        if dim == self.axis:
            first = start + (rows[0] if rows else 0)
            rows = first, first + size
        return self.view([*self.shape[:dim], size, *self.shape[dim + 1 :]], rows=rows, axis=self.axis)

    def permute(self, order):
        axis = None if self.axis is None else order.index(self.axis)
        return self.view([self.shape[i] for i in order], rows=self.rows, axis=axis)

    def reshape(self, shape):
        return self.view(shape, rows=self.rows)

    def those(self, users):
        """Who of a slot's readers or writers has any of these rows."""
        mine = self.rows
        return [n for n, r in users[self.slot] if not (r and mine) or (r[0] < mine[1] and mine[0] < r[1])]

    def use(self):
        if self.root.coming[self.slot]:
            fail(f"{here.name}: uses {self.shape} in slot {self.slot} before it has come")

    def load(self, layout=None):
        self.use()
        return Tensor(self.shape, None, layout)

    def store(self, x):
        self.use()
        if self.those(self.root.readers):
            fail(f"{here.name}: writes {self.shape} in slot {self.slot}, read by {self.those(self.root.readers)}")


class Descriptor:
    """Global memory as TMA sees it, {corner: [(how, program)]}: stores are in `log`, stores and loads in `history`."""

    dtype = layout = None

    def __init__(self, shape, block, itemsize, shared=False):
        self.shared = shared  # as `Pointer`
        self.shape, self.log, self.history = shape, collections.defaultdict(list), collections.defaultdict(list)
        self.block_type = types.SimpleNamespace(shape=block, nbytes=int(np.prod(block)) * itemsize)
